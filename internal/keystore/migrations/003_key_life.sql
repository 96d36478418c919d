-- The life of a key: who made it, who may manage others with it, how it is rotated, and a record of all that was done.

alter table rekall.api_keys
	add manage_keys boolean not null default false,
	-- Who made the key, as the audit writes an actor. Null: made before there was one.
	add created_by text check (split_part(created_by, ':', 1) in ('key', 'user', 'cli', 'leak', 'system') and char_length(created_by) <= 210),
	-- The key that this one was made to replace.
	add predecessor text references rekall.api_keys (id) check (predecessor <> id),
	-- Set while the first use of this key is awaited: so long its predecessor lives on from then.
	add overlap_on_first_use interval check (overlap_on_first_use >= interval '0'),
	-- When the rotation of this key set its end, and the expiry that it had before. Undoing the rotation restores it.
	add grace_started_at timestamptz,
	add prior_expires_at timestamptz,
	add check (overlap_on_first_use is null or predecessor is not null),
	add check (prior_expires_at is null or grace_started_at is not null);

-- A key has one successor at a time; more, of which one is not revoked, where a successor was revoked.
create unique index api_keys_living_successor on rekall.api_keys (predecessor) where predecessor is not null and revoked_at is null;
create index api_keys_successors on rekall.api_keys (predecessor, created_at desc) where predecessor is not null;

-- What is rare among all keys is found without reading them all.
create index api_keys_creator on rekall.api_keys (created_by);
create index api_keys_revoked on rekall.api_keys (created_at desc, id desc) where revoked_at is not null;
create index api_keys_ending on rekall.api_keys (expires_at) where expires_at is not null and revoked_at is null;
create index api_keys_name on rekall.api_keys (lower(name) collate "C");

create or replace function rekall.stamp_api_key() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	if old.revoked_at is not null and new.revoked_at is distinct from old.revoked_at then
		raise exception 'revocation is permanent: create a new key' using errcode = 'RK001';
	end if;
	if (new.id, new.account, new.environment, new.key_hash, new.created_at, new.created_by)
		is distinct from (old.id, old.account, old.environment, old.key_hash, old.created_at, old.created_by) then
		raise exception 'id, account, environment, hash, creation time and creator of a key never change' using errcode = 'RK002';
	end if;
	if new.predecessor is distinct from old.predecessor and new.predecessor is not null then
		raise exception 'a key never gets another predecessor' using errcode = 'RK002';
	end if;
	new.change_xid := pg_current_xact_id();
	return new;
end $$;

-- For imports, without a search_path of its own: setting it takes as long as all the rest. It needs none, since it names
-- the schema of all that it uses.
create function rekall.stamp_new_api_key() returns trigger
	language plpgsql as $$
begin
	new.change_xid := pg_catalog.pg_current_xact_id();
	return new;
end $$;

drop trigger stamp on rekall.api_keys;
create trigger stamp before update on rekall.api_keys
	for each row execute function rekall.stamp_api_key();
create trigger stamp_new before insert on rekall.api_keys
	for each row execute function rekall.stamp_new_api_key();
alter table rekall.api_keys enable always trigger stamp;
alter table rekall.api_keys enable always trigger stamp_new;

drop trigger notify on rekall.api_keys;
create trigger notify after update on rekall.api_keys
	for each row when (
		old.revoked_at is distinct from new.revoked_at
		or old.expires_at is distinct from new.expires_at
		or old.scopes is distinct from new.scopes
		or old.manage_keys is distinct from new.manage_keys)
	execute function rekall.notify_key_change();
alter table rekall.api_keys enable always trigger notify;

-- Who did what to which key and when. Never key material.
create table rekall.audit (
	id          bigint generated always as identity primary key,
	at          timestamptz not null default clock_timestamp(),
	actor       text not null check (split_part(actor, ':', 1) in ('key', 'user', 'cli', 'leak', 'system') and char_length(actor) <= 210),
	action      text not null check (action in (
		'key.created', 'key.renamed', 'key.revoked', 'key.rotated', 'key.rotation_undone', 'key.grace_started',
		'keys.revoked', 'keys.imported', 'leak.reported')),
	-- Null where it was not one key, one account or one environment.
	key_id      text,
	account     text,
	environment text check (environment in ('production', 'sandbox')),
	details     jsonb not null default '{}' check (jsonb_typeof(details) = 'object')
);

create index audit_account on rekall.audit (account, id desc);
create index audit_key on rekall.audit (key_id, id desc) where key_id is not null;
create index audit_actor on rekall.audit (actor, id desc);

create function rekall.refuse_audit_change() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	raise exception 'the audit is append-only' using errcode = 'RK004';
end $$;

create trigger refuse_change before update or delete on rekall.audit
	for each row execute function rekall.refuse_audit_change();
create trigger refuse_truncate before truncate on rekall.audit
	for each statement execute function rekall.refuse_audit_change();
alter table rekall.audit enable always trigger refuse_change;
alter table rekall.audit enable always trigger refuse_truncate;

-- By permission as well, and for the owner too, whom no other revoke reaches. The triggers hold superusers.
revoke update, delete, truncate on rekall.audit from public, current_user;

-- Which key a request with an idempotency key made, for 24 hours.
create table rekall.idempotency_keys (
	account         text not null,
	actor           text not null,
	idempotency_key text not null check (char_length(idempotency_key) between 1 and 255),
	request_hash    bytea not null check (octet_length(request_hash) = 32),
	key_id          text not null,
	created_at      timestamptz not null default now(),
	primary key (account, actor, idempotency_key)
);

create index idempotency_keys_created on rekall.idempotency_keys (created_at);

-- Called when a key is used for the first time: starts the grace period of the predecessor that waits for it, once.
create function rekall.start_grace(successor text) returns void
	language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
	overlap interval;
	waiting text;
	ended   rekall.api_keys;
begin
	-- Nearly always there is nothing to do, and no lock to take.
	select k.predecessor into waiting from rekall.api_keys k
	where k.id = successor and k.overlap_on_first_use is not null and k.revoked_at is null;
	if waiting is null then
		return;
	end if;
	-- In the order in which a rotation is undone: the old key first.
	perform 1 from rekall.api_keys k where k.id = waiting for no key update;
	select k.overlap_on_first_use into overlap from rekall.api_keys k
	where k.id = successor and k.predecessor = waiting and k.overlap_on_first_use is not null and k.revoked_at is null
	for no key update;
	if overlap is null then
		return; -- done or undone meanwhile
	end if;
	update rekall.api_keys k set overlap_on_first_use = null where k.id = successor;
	-- Not a key that has ended: nothing revives it.
	update rekall.api_keys k set
		prior_expires_at = k.expires_at, expires_at = least(k.expires_at, now() + overlap), grace_started_at = now()
	where k.id = waiting and k.revoked_at is null and k.grace_started_at is null
		and (k.expires_at is null or k.expires_at > now())
	returning k.* into ended;
	if ended.id is not null then
		insert into rekall.audit (actor, action, key_id, account, environment, details)
		values ('system:first-use', 'key.grace_started', ended.id, ended.account, ended.environment,
			jsonb_build_object('successor', successor, 'expires_at', ended.expires_at));
	end if;
end $$;
