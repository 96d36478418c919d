-- The keys. A row holds no key, only its SHA-256, and never goes away: the change feed cannot see a DELETE.

create table rekall.api_keys (
	id          text primary key check (id ~ '^key_[0-9A-Za-z]{22}$'),
	-- The account travels in a header, which loses spaces at its ends: ' acme' must not become 'acme' at a backend.
	account     text not null check (
		char_length(account) between 1 and 200 and account !~ '[\u0001-\u001f\u007f-\u009f]' and account = btrim(account)),
	name        text not null check (char_length(name) between 1 and 200 and name !~ '[\u0001-\u001f\u007f-\u009f]'),
	environment text not null check (environment in ('production', 'sandbox')),
	key_hash    bytea not null unique check (octet_length(key_hash) = 32),
	-- The last four characters, by which its owner recognises a key. Unknown for keys that were imported as hashes.
	hint        text check (hint ~ '^[0-9A-Za-z]{4}$'),
	-- One dimension: the gateway could not read a matrix, and one unreadable row would stop the feed.
	scopes      text[] not null check (
		coalesce(array_ndims(scopes), 1) = 1 and scopes <@ array[
			'memories:read', 'memories:write', 'memories:delete',
			'entities:read', 'entities:write', 'entities:delete',
			'relationships:read', 'relationships:write',
			'workflows:read', 'workflows:write',
			'agents:read', 'agents:write',
			'hives:read', 'hives:write']),
	-- Times within what the gateway can read: it would take the first moment of year 1 for "never", and not know infinity.
	created_at  timestamptz not null default now() check (created_at between '1970-01-01 00:00Z' and '9999-12-31 00:00Z'),
	expires_at  timestamptz check (expires_at between '1970-01-01 00:00Z' and '9999-12-31 00:00Z'),
	revoked_at  timestamptz check (revoked_at between '1970-01-01 00:00Z' and '9999-12-31 00:00Z'),
	-- The transaction that last changed the row, stamped by a trigger. The feed reads all rows at or above its watermark;
	-- a timestamp or a sequence would lose changes that commit out of order.
	change_xid  xid8 not null
);

create index api_keys_change_xid on rekall.api_keys (change_xid);
create index api_keys_account on rekall.api_keys (account, created_at desc, id desc);
create index api_keys_created on rekall.api_keys (created_at desc, id desc);

create function rekall.stamp_api_key() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	if tg_op = 'UPDATE' then
		if old.revoked_at is not null and new.revoked_at is distinct from old.revoked_at then
			raise exception 'revocation is permanent: create a new key' using errcode = 'RK001';
		end if;
		if (new.id, new.account, new.environment, new.key_hash, new.created_at)
			is distinct from (old.id, old.account, old.environment, old.key_hash, old.created_at) then
			raise exception 'id, account, environment, hash and creation time of a key never change' using errcode = 'RK002';
		end if;
	end if;
	new.change_xid := pg_current_xact_id();
	return new;
end $$;

create function rekall.refuse_removal() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	-- Canaries are nobody's keys. Long revoked and known to be so everywhere, one is refused as unknown when it is gone.
	if tg_op = 'DELETE' then
		if old.account = 'rekall:canary' and old.revoked_at < now() - interval '1 hour' then
			return old;
		end if;
	end if;
	raise exception 'keys are never deleted: revoke the key instead' using errcode = 'RK003';
end $$;

create function rekall.notify_key_change() returns trigger
	language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
	perform pg_notify('rekall_keys', '');
	return null;
end $$;

create trigger stamp before insert or update on rekall.api_keys
	for each row execute function rekall.stamp_api_key();
create trigger refuse_delete before delete on rekall.api_keys
	for each row execute function rekall.refuse_removal();
create trigger refuse_truncate before truncate on rekall.api_keys
	for each statement execute function rekall.refuse_removal();
-- Only changes that matter to security wake the edges: NOTIFY takes a third of the write throughput.
create trigger notify after update on rekall.api_keys
	for each row when (
		old.revoked_at is distinct from new.revoked_at
		or old.expires_at is distinct from new.expires_at
		or old.scopes is distinct from new.scopes)
	execute function rekall.notify_key_change();

-- ALWAYS: also for what a logical replication worker or session_replication_role = replica writes.
alter table rekall.api_keys enable always trigger stamp;
alter table rekall.api_keys enable always trigger refuse_delete;
alter table rekall.api_keys enable always trigger refuse_truncate;
alter table rekall.api_keys enable always trigger notify;
