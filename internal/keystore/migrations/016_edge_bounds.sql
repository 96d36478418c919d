-- What a user of the database with an edge's rights can write or take is bounded: an edge that was taken over must not harm the others.

-- As before, but nothing fails for want of room in the queue: any user of the database can fill it, by a session that listens and stays in
-- a transaction, and then every commit that notifies fails. Edges that are not woken read the change at their next tick.
create or replace function rekall.notify_key_change() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	if pg_notification_queue_usage() < 0.5 then
		perform pg_notify('rekall_keys', '');
	end if;
	return null;
end $$;
