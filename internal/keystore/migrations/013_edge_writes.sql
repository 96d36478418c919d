-- An edge writes counts, and its own row in edges. What it writes is read wherever keys are managed, so an edge that was taken over
-- must not be able to write what cannot be read there, or what is more than text on an administrator's terminal.
-- What there is of it already goes, or no flush that meets it would come through. An edge whose row goes reports again.
delete from rekall.usage where hour not between '1970-01-01 00:00Z' and '9999-12-31 00:00Z' or outcome !~ '^[a-z_]{1,40}$';
update rekall.usage set used_at = null where used_at not between '1970-01-01 00:00Z' and '9999-12-31 00:00Z';
update rekall.last_used set first_used_at = now(), last_used_at = now()
	where first_used_at not between '1970-01-01 00:00Z' and '9999-12-31 00:00Z'
		or last_used_at not between '1970-01-01 00:00Z' and '9999-12-31 00:00Z';
delete from rekall.spikes where hour not between '1970-01-01 00:00Z' and '9999-12-31 00:00Z';
delete from rekall.edges where (name || region || version || coalesce(applied_on, '')) ~ '[\u0001-\u001f\u007f-\u009f]'
	or max_staleness > interval '1 day' or seen_at not between '1970-01-01 00:00Z' and '9999-12-31 00:00Z'
	or synced_at not between '1970-01-01 00:00Z' and '9999-12-31 00:00Z';

-- NOT VALID: nothing is read whole while others wait.
alter table rekall.usage
	add constraint usage_hour_check check (hour between '1970-01-01 00:00Z' and '9999-12-31 00:00Z') not valid,
	add constraint usage_used_at_check check (used_at between '1970-01-01 00:00Z' and '9999-12-31 00:00Z') not valid,
	add constraint usage_outcome_check check (outcome ~ '^[a-z_]{1,40}$') not valid;
alter table rekall.last_used
	add constraint last_used_first_used_at_check check (first_used_at between '1970-01-01 00:00Z' and '9999-12-31 00:00Z') not valid,
	add constraint last_used_last_used_at_check check (last_used_at between '1970-01-01 00:00Z' and '9999-12-31 00:00Z') not valid;
alter table rekall.spikes
	add constraint spikes_hour_check check (hour between '1970-01-01 00:00Z' and '9999-12-31 00:00Z') not valid;
alter table rekall.edges
	add constraint edges_text_check check ((name || region || version || coalesce(applied_on, '')) !~ '[\u0001-\u001f\u007f-\u009f]') not valid,
	add constraint edges_max_staleness_bound check (max_staleness <= interval '1 day') not valid,
	add constraint edges_seen_at_check check (seen_at between '1970-01-01 00:00Z' and '9999-12-31 00:00Z') not valid,
	add constraint edges_synced_at_check check (synced_at between '1970-01-01 00:00Z' and '9999-12-31 00:00Z') not valid;

-- As before, but each key is read by its id, however many there are: last_used.key_id has another collation than api_keys.id, and an
-- index serves no join of the two.
create or replace function rekall.key_first_used() returns trigger
	language plpgsql security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
	ids       text[];
	waiting   text[];
	successor record;
	ended     rekall.api_keys;
begin
	select array_agg(key_id) into ids from used;
	-- Nearly always there is nothing to do, and no lock to take.
	select array_agg(k.id) || array_agg(k.predecessor) into waiting
	from rekall.api_keys k
	where k.id = any(ids) and k.overlap_on_first_use is not null and k.revoked_at is null;
	if waiting is null then
		return null;
	end if;
	perform 1 from rekall.api_keys k where k.id = any(waiting) order by k.id collate "C" for no key update;
	for successor in -- except where it was done or undone meanwhile
		select k.id, k.predecessor, k.overlap_on_first_use as overlap from rekall.api_keys k
		where k.id = any(ids) and k.id = any(waiting) and k.overlap_on_first_use is not null and k.revoked_at is null
	loop
		update rekall.api_keys k set overlap_on_first_use = null where k.id = successor.id;
		-- Not a key that has ended: nothing revives it.
		update rekall.api_keys k set
			prior_expires_at = k.expires_at, expires_at = least(k.expires_at, now() + successor.overlap), grace_started_at = now()
		where k.id = successor.predecessor and k.revoked_at is null and k.grace_started_at is null
			and (k.expires_at is null or k.expires_at > now())
		returning k.* into ended;
		if ended.id is not null then
			insert into rekall.audit (actor, action, key_id, account, environment, details)
			values ('system:first-use', 'key.grace_started', ended.id, ended.account, ended.environment,
				jsonb_build_object('successor', successor.id, 'expires_at', ended.expires_at));
		end if;
	end loop;
	return null;
end $$;

revoke execute on function rekall.key_first_used() from public;
