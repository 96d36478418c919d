-- How much a key may be used: as the tier of its account says, unless the account or the key has limits of its own. None of
-- it is in the keys' rows: an account with 100,000 keys changes its tier with one row, and so does a tier its numbers.
-- Edges read tiers whole with every sync. Where limits of an account or a key changed they read the keys anew, each as of
-- one moment: so a key that is made at that time is not missed.

create table rekall.tiers (
	name                text primary key check (name in ('free', 'pro', 'team', 'enterprise', 'sandbox')),
	requests_per_minute int check (requests_per_minute between 1 and 1000000), -- null: no limit
	-- Requests in any 15 seconds. With less than a quarter of the rate per minute, nobody could ever use the rate.
	burst               int check (burst <= 10000000 and burst >= requests_per_minute / 4.0),
	concurrent_requests int check (concurrent_requests between 1 and 1000000), -- null: no limit
	check ((requests_per_minute is null) = (burst is null))
);

-- Accounts that are not free, or have limits of their own; null: the tier's. They apply to production keys: a sandbox key
-- has the tier sandbox, whatever its account's.
create table rekall.account_limits (
	account             text primary key check (
		char_length(account) between 1 and 200 and account !~ '[\u0001-\u001f\u007f-\u009f]' and account = btrim(account)),
	tier                text not null default 'free' references rekall.tiers (name) check (tier <> 'sandbox'),
	requests_per_minute int check (requests_per_minute between 1 and 1000000),
	burst               int check (burst <= 10000000 and burst >= requests_per_minute / 4.0),
	concurrent_requests int check (concurrent_requests between 1 and 1000000),
	-- As in api_keys: the transaction that last changed the row, by which edges find what is new to them.
	change_xid          xid8 not null,
	check ((requests_per_minute is null) = (burst is null))
);

create index account_limits_change_xid on rekall.account_limits (change_xid);

-- Keys with limits of their own; null: their account's.
create table rekall.key_limits (
	key_id              text primary key check (key_id ~ '^key_[0-9A-Za-z]{22}$'),
	requests_per_minute int check (requests_per_minute between 1 and 1000000),
	burst               int check (burst <= 10000000 and burst >= requests_per_minute / 4.0),
	concurrent_requests int check (concurrent_requests between 1 and 1000000),
	change_xid          xid8 not null,
	check ((requests_per_minute is null) = (burst is null))
);

create index key_limits_change_xid on rekall.key_limits (change_xid);

create function rekall.stamp_limits() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	new.change_xid := pg_current_xact_id();
	return new;
end $$;

create function rekall.refuse_limits_removal() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	raise exception 'limits are never removed or renamed, which edges could not see: update the row instead' using errcode = 'RK005';
end $$;

create trigger stamp before insert or update on rekall.account_limits for each row execute function rekall.stamp_limits();
create trigger stamp before insert or update on rekall.key_limits for each row execute function rekall.stamp_limits();
create trigger refuse_delete before delete on rekall.tiers for each row execute function rekall.refuse_limits_removal();
create trigger refuse_delete before delete on rekall.account_limits for each row execute function rekall.refuse_limits_removal();
create trigger refuse_delete before delete on rekall.key_limits for each row execute function rekall.refuse_limits_removal();
create trigger refuse_truncate before truncate on rekall.tiers for each statement execute function rekall.refuse_limits_removal();
create trigger refuse_truncate before truncate on rekall.account_limits for each statement execute function rekall.refuse_limits_removal();
create trigger refuse_truncate before truncate on rekall.key_limits for each statement execute function rekall.refuse_limits_removal();
create trigger refuse_rename before update on rekall.tiers
	for each row when (old.name <> new.name) execute function rekall.refuse_limits_removal();
create trigger refuse_rename before update on rekall.account_limits
	for each row when (old.account <> new.account) execute function rekall.refuse_limits_removal();
create trigger refuse_rename before update on rekall.key_limits
	for each row when (old.key_id <> new.key_id) execute function rekall.refuse_limits_removal();

-- ALWAYS: also for what a logical replication worker or session_replication_role = replica writes.
alter table rekall.tiers enable always trigger refuse_delete;
alter table rekall.tiers enable always trigger refuse_truncate;
alter table rekall.tiers enable always trigger refuse_rename;
alter table rekall.account_limits enable always trigger stamp;
alter table rekall.account_limits enable always trigger refuse_delete;
alter table rekall.account_limits enable always trigger refuse_truncate;
alter table rekall.account_limits enable always trigger refuse_rename;
alter table rekall.key_limits enable always trigger stamp;
alter table rekall.key_limits enable always trigger refuse_delete;
alter table rekall.key_limits enable always trigger refuse_truncate;
alter table rekall.key_limits enable always trigger refuse_rename;

-- As Rekall's documentation has them. An enterprise is agreed with one by one: its account gets limits of its own.
insert into rekall.tiers (name, requests_per_minute, burst, concurrent_requests) values
	('free', 100, 150, 5),
	('pro', 1000, 1500, 25),
	('team', 5000, 7500, 100),
	('enterprise', null, null, null),
	('sandbox', 50, 75, 2);

alter table rekall.audit drop constraint audit_action_check;
alter table rekall.audit add constraint audit_action_check check (action in (
	'key.created', 'key.renamed', 'key.revoked', 'key.rotated', 'key.rotation_undone', 'key.grace_started',
	'keys.revoked', 'keys.imported', 'leak.reported', 'limits.tier_changed', 'limits.account_changed', 'limits.key_changed'));
