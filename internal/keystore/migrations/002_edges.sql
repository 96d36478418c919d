-- The edges that are running, each with the last change that it has applied. A row is written now and then and after
-- changes, never for a key or a request.

create table rekall.edges (
	instance      text primary key check (instance ~ '^[0-9A-Za-z]{22}$'),
	name          text not null check (char_length(name) between 1 and 200),
	region        text not null check (char_length(region) <= 200),
	version       text not null check (char_length(version) <= 200),
	max_staleness interval not null check (max_staleness > interval '0'),
	started_at    timestamptz not null,
	-- When this row was last written, by the database's clock.
	seen_at       timestamptz not null default now(),
	-- A number that the edge counts up at each report. Seen again on a standby, it tells how far that one has replayed.
	beat          bigint not null check (beat > 0),
	-- When the last sync began, by the database's clock. Null: there was none yet.
	synced_at     timestamptz,
	-- The snapshot that the last sync read: a change is applied if its transaction is visible in it.
	applied       pg_snapshot
);
