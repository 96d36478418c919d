-- An edge that was killed and started again takes the row of its former self off the list, without the right to read the names of
-- edges: only rows with the name of its own, that the same user wrote, and that are silent for longer than they may be.
create function rekall.forget_replaced_edges(edge text) returns void
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	delete from rekall.edges former using rekall.edges own
	where own.instance = edge and own.writer = session_user
		and former.name = own.name and former.writer = session_user and former.instance <> own.instance
		and clock_timestamp() - former.seen_at > former.max_staleness
$$;

revoke execute on function rekall.forget_replaced_edges(text) from public;
