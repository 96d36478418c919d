-- What keys are used for, added up by the edges. Nothing here touches a key's row, where every use would be a change for
-- the feed; a foreign key would lock that row at every first use in an hour.

-- Rows of the current hour are updated every few seconds: the free space keeps the new version in the old one's page, so
-- that no index has to follow.
create table rekall.usage (
	key_id  text collate "C" not null,
	hour    timestamptz not null, -- its beginning, in UTC
	outcome text collate "C" not null,
	count   bigint not null check (count > 0),
	primary key (key_id, hour, outcome)
) with (fillfactor = 70);

create index usage_hour on rekall.usage (hour); -- for what is past its retention

-- Outlives the counts. Only an allowed request is a use.
create table rekall.last_used (
	key_id        text collate "C" primary key,
	first_used_at timestamptz not null,
	last_used_at  timestamptz not null
) with (fillfactor = 50);

-- The last flush that was applied of each edge: one whose answer was lost comes again, and must not count twice.
create table rekall.usage_flushes (
	instance   text primary key check (instance ~ '^[0-9A-Za-z]{22}$'),
	sequence   bigint not null check (sequence > 0),
	flushed_at timestamptz not null default now()
) with (fillfactor = 50);

-- Hours in which a key was used far more than ever before. Whoever inserts the row tells of it.
create table rekall.spikes (
	key_id      text collate "C" not null,
	hour        timestamptz not null,
	threshold   bigint not null, -- requests in an hour from which on it is a spike
	detected_at timestamptz not null default now(),
	primary key (key_id, hour)
);

create index spikes_hour on rekall.spikes (hour);

-- What one edge of all does now and then, and which has taken its turn.
create table rekall.usage_chores (
	name       text primary key,
	claimed_at timestamptz not null default now()
);

-- A rotation may wait for its new key's first use.
create function rekall.key_first_used() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	perform rekall.start_grace(new.key_id);
	return null;
end $$;

create trigger first_used after insert on rekall.last_used
	for each row execute function rekall.key_first_used();
