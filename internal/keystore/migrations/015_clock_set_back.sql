-- What was written while Postgres's clock was ahead does not hold until it is there again, once the clock has been set back.

-- As before, but a canary of the future keeps no edge from making one, and is revoked as an old one is.
create or replace function rekall.create_canary() returns text
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	update rekall.api_keys set revoked_at = now()
	where account = 'rekall:canary' and revoked_at is null
		and created_at not between now() - interval '10 minutes' and now() + interval '10 minutes';
	with old as (delete from rekall.api_keys where account = 'rekall:canary' and revoked_at < now() - interval '1 hour')
	insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
	select 'key_' || left(replace(gen_random_uuid()::text, '-', ''), 22), 'rekall:canary', 'Canary', 'sandbox',
		sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), '{}'
	where not exists (
		select from rekall.api_keys where account = 'rekall:canary'
			and created_at between now() - interval '50 seconds' and now() + interval '50 seconds')
	returning id
$$;

-- As before, but the report of an edge that lies ahead counts from now on, whoever wrote it: one that was killed would be live until the
-- clock is there. Its row is not removed at once, since an edge that lives may not have reported since the clock was set back, and
-- a revocation waits for it.
create or replace function rekall.forget_replaced_edges(edge text) returns void
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	update rekall.edges set seen_at = least(seen_at, clock_timestamp()),
		synced_at = case when synced_at > clock_timestamp() then clock_timestamp() else synced_at end
	where greatest(seen_at, synced_at) > clock_timestamp() + max_staleness;
	delete from rekall.edges former using rekall.edges own
	where own.instance = edge and own.writer = session_user
		and former.name = own.name and former.writer = session_user and former.instance <> own.instance
		and clock_timestamp() - former.seen_at > former.max_staleness
$$;
