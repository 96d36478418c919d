-- As before, but a canary is revoked too that an edge has left alive, as when it was killed: nothing else would ever end it.
create or replace function rekall.create_canary() returns text
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	update rekall.api_keys set revoked_at = now()
	where account = 'rekall:canary' and revoked_at is null and created_at < now() - interval '10 minutes';
	with old as (delete from rekall.api_keys where account = 'rekall:canary' and revoked_at < now() - interval '1 hour')
	insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
	select 'key_' || left(replace(gen_random_uuid()::text, '-', ''), 22), 'rekall:canary', 'Canary', 'sandbox',
		sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), '{}'
	where not exists (
		select from rekall.api_keys where account = 'rekall:canary' and created_at > now() - interval '50 seconds')
	returning id
$$;
