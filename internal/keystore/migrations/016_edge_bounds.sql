-- What a user of the database with an edge's rights can write or take is bounded: an edge that was taken over must not harm the others.

-- As before, but without a notification while there is little room in the queue: any user of the database can fill it, by a session that
-- listens and stays in a transaction, and then every commit that notifies fails. Edges that are not woken read the change at their next tick.
create or replace function rekall.notify_key_change() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	if pg_notification_queue_usage() < 0.5 then
		perform pg_notify('rekall_keys', '');
	end if;
	return null;
end $$;

-- Counts are of keys, in full hours, with outcomes that there are: ids that are long, hours of a microsecond and outcomes without end would
-- fill the memory of whoever reads them. An outcome that is added to apikey.Outcome is added here by a migration of its own.
-- NOT VALID: usage has millions of rows, and is not read whole while others wait. What was written before stays until its retention is
-- past, since nothing that counts ever changes such a row. One in last_used would keep all edges from forgetting counts, which
-- updates it, and goes. That table has a row for each key, and is read before anybody waits.
delete from rekall.last_used where not (left(key_id, 4) = 'key_' and char_length(key_id) = 26 and substr(key_id, 5) !~ '[^0-9A-Za-z]');
alter table rekall.usage
	add constraint usage_key_id_check
		check (left(key_id, 4) = 'key_' and char_length(key_id) = 26 and substr(key_id, 5) !~ '[^0-9A-Za-z]') not valid,
	add constraint usage_full_hour_check check (hour = date_bin('1 hour', hour, timestamptz 'epoch')) not valid,
	drop constraint usage_outcome_check,
	add constraint usage_outcome_check check (outcome in (
		'unavailable', 'allowed', 'missing', 'malformed', 'token_type', 'ambiguous', 'unknown', 'revoked', 'expired', 'environment_mismatch',
		'not_covered', 'scope_insufficient', 'path_invalid', 'method_invalid', 'rate_limited', 'abandoned')) not valid;
alter table rekall.last_used
	add constraint last_used_key_id_check
		check (left(key_id, 4) = 'key_' and char_length(key_id) = 26 and substr(key_id, 5) !~ '[^0-9A-Za-z]') not valid;
alter table rekall.spikes
	add constraint spikes_key_id_check
		check (left(key_id, 4) = 'key_' and char_length(key_id) = 26 and substr(key_id, 5) !~ '[^0-9A-Za-z]') not valid,
	add constraint spikes_full_hour_check check (hour = date_bin('1 hour', hour, timestamptz 'epoch')) not valid;

-- Each look of a revocation that waits reads every edge's snapshot: it has room for 8000 transactions in progress. An interval of
-- months and days is compared as so many hours, and too long to be added to a time. What there is of either goes, and only once no more
-- can come, or no report that lies ahead could be corrected (below). An edge whose row goes reports again.
alter table rekall.edges
	add constraint edges_applied_size check (pg_column_size(applied) <= 65536) not valid,
	add constraint edges_max_staleness_time check (
		extract(year from max_staleness) = 0 and extract(month from max_staleness) = 0 and extract(day from max_staleness) = 0) not valid;
delete from rekall.edges where pg_column_size(applied) > 65536
	or extract(year from max_staleness) <> 0 or extract(month from max_staleness) <> 0 or extract(day from max_staleness) <> 0;

-- As before, but without a sum with what an edge has written, which may be out of range and fail for all: times apart are compared.
create or replace function rekall.forget_replaced_edges(edge text) returns void
	language sql security definer set search_path = pg_catalog, pg_temp as $$
	update rekall.edges set seen_at = least(seen_at, clock_timestamp()),
		synced_at = case when synced_at > clock_timestamp() then clock_timestamp() else synced_at end
	where greatest(seen_at, synced_at) - clock_timestamp() > max_staleness;
	delete from rekall.edges former using rekall.edges own
	where own.instance = edge and own.writer = session_user
		and former.name = own.name and former.writer = session_user and former.instance <> own.instance
		and clock_timestamp() - former.seen_at > former.max_staleness
$$;
