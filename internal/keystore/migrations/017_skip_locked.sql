-- What a user of the database with an edge's rights locks, and leaves locked, keeps others from no more than that.

-- A key belongs to the user that published it, as a row of edges does: nobody else can change, remove or lock it before its lease has ended.
-- Null: published before there was a writer, by whom nobody knows; its edge replaces it within a day or so.
alter table rekall.signing_keys add column writer name;
alter table rekall.signing_keys alter column writer set default session_user;
alter table rekall.signing_keys enable row level security;

create policy read_all on rekall.signing_keys for select using (true);
create policy insert_own on rekall.signing_keys for insert with check (writer = session_user);
create policy update_own on rekall.signing_keys for update using (writer is null or writer = session_user);
create policy delete_own_or_gone on rekall.signing_keys for delete
	using (writer is null or writer = session_user or expires_at <= now());

create function rekall.forget_signing_keys() returns void
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	delete from rekall.signing_keys where id in (
		select id from rekall.signing_keys where expires_at <= now() for update skip locked)
$$;

-- Of edges that went away without a word, as the policy of 005 has it.
create function rekall.forget_edges() returns void
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	delete from rekall.edges where instance in (
		select instance from rekall.edges where seen_at < now() - interval '10 minutes' for update skip locked)
$$;

revoke execute on function rekall.forget_signing_keys(), rekall.forget_edges() from public;

-- As before, but without waiting for a row.
create or replace function rekall.forget_replaced_edges(edge text) returns void
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	update rekall.edges set seen_at = least(seen_at, clock_timestamp()),
		synced_at = case when synced_at > clock_timestamp() then clock_timestamp() else synced_at end
	where instance in (
		select instance from rekall.edges where greatest(seen_at, synced_at) - clock_timestamp() > max_staleness for update skip locked);
	delete from rekall.edges where instance in (
		select former.instance from rekall.edges former, rekall.edges own
		where own.instance = edge and own.writer = session_user
			and former.name = own.name and former.writer = session_user and former.instance <> own.instance
			and clock_timestamp() - former.seen_at > former.max_staleness
		for update of former skip locked)
$$;
