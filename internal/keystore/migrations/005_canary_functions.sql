-- What an edge does beyond reading keys, without the right to write them.

-- Canaries: an edge may make and revoke one, and no other key. It gives neither id nor hash, so that it cannot make a key
-- that it knows: the hash is that of random bytes, which no key in the world has.
create function rekall.create_canary() returns text
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	with old as (delete from rekall.api_keys where account = 'rekall:canary' and revoked_at < now() - interval '1 hour')
	insert into rekall.api_keys (id, account, name, environment, key_hash, scopes)
	select 'key_' || left(replace(gen_random_uuid()::text, '-', ''), 22), 'rekall:canary', 'Canary', 'sandbox',
		sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), '{}'
	where not exists (
		select from rekall.api_keys where account = 'rekall:canary' and created_at > now() - interval '50 seconds')
	returning id
$$;

create function rekall.revoke_canary(canary text) returns void
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	update rekall.api_keys set revoked_at = now() where id = canary and account = 'rekall:canary' and revoked_at is null
$$;

revoke execute on function rekall.create_canary(), rekall.revoke_canary(text) from public;

-- Rows of edges: whoever wrote one may change it, and nobody else. Edges that log in as different users cannot forge each
-- other's reports; the table's owner is not bound.
alter table rekall.edges add column writer name not null default session_user;
-- No gateway accepts more. A forged row must not make a wait for all edges last.
alter table rekall.edges add check (max_staleness < interval '60 seconds');
alter table rekall.edges enable row level security;

create policy read_all on rekall.edges for select using (true);
create policy insert_own on rekall.edges for insert with check (writer = session_user);
create policy update_own on rekall.edges for update using (writer = session_user);
-- Another's row only when it has gone away without a word: forgetAfter in internal/edge.
create policy delete_own_or_gone on rekall.edges for delete
	using (writer = session_user or seen_at < now() - interval '10 minutes');
