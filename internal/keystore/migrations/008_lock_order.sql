-- Whatever locks several keys in one statement locks them in the byte order of their ids: first uses, of which a flush may
-- bring many, and revocations of many keys at once. Otherwise they could wait for each other in turn.

drop trigger first_used on rekall.last_used;
drop function rekall.start_grace(text);

-- Called when keys are used for the first time: starts the grace periods of the predecessors that wait for them, once.
create or replace function rekall.key_first_used() returns trigger
	language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
	waiting   text[];
	successor record;
	ended     rekall.api_keys;
begin
	-- Nearly always there is nothing to do, and no lock to take.
	select array_agg(k.id) || array_agg(k.predecessor) into waiting
	from used u join rekall.api_keys k on k.id = u.key_id
	where k.overlap_on_first_use is not null and k.revoked_at is null;
	if waiting is null then
		return null;
	end if;
	perform 1 from rekall.api_keys k where k.id = any(waiting) order by k.id collate "C" for no key update;
	for successor in -- except where it was done or undone meanwhile
		select k.id, k.predecessor, k.overlap_on_first_use as overlap from used u join rekall.api_keys k on k.id = u.key_id
		where k.id = any(waiting) and k.overlap_on_first_use is not null and k.revoked_at is null
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

create trigger first_used after insert on rekall.last_used
	referencing new table as used
	for each statement execute function rekall.key_first_used();
