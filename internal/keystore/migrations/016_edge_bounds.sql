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
