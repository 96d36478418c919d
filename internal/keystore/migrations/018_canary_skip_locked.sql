-- As before, but without waiting for a canary that a user of the database with an edge's rights has locked, and leaves locked.
create or replace function rekall.create_canary() returns text
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	update rekall.api_keys set revoked_at = now() where id in (
		select id from rekall.api_keys where account = 'rekall:canary' and revoked_at is null
			and created_at not between now() - interval '10 minutes' and now() + interval '10 minutes' for update skip locked);
	with old as (delete from rekall.api_keys where id in (
		select id from rekall.api_keys where account = 'rekall:canary' and revoked_at < now() - interval '1 hour' for update skip locked))
	insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
	select 'key_' || left(replace(gen_random_uuid()::text, '-', ''), 22), 'rekall:canary', 'Canary', 'sandbox',
		sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), '{}'
	where not exists (
		select from rekall.api_keys where account = 'rekall:canary'
			and created_at between now() - interval '50 seconds' and now() + interval '50 seconds')
	returning id
$$;
