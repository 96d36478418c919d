-- Makes keys for measurements, in a database that is only for them:
--
--	psql "$REKALL_DATABASE_URL" -v ON_ERROR_STOP=1 -v n=10000000 -f test/load/keys.sql
--
-- Key number n is "rk_" and n with leading zeros to 45 digits, so that whoever makes the load can name it. The table must be
-- empty. The lower its number, the later a key was used last. A million takes about 30 s: the stamps are written without the
-- trigger, and the index that is filled in random order is built at the end.
begin;
alter table rekall.api_keys disable trigger user;
alter table rekall.api_keys drop constraint api_keys_key_hash_key;
insert into rekall.api_keys (id, account, name, environment, key_hash, hint, scopes, created_at, change_xid)
select 'key_' || lpad(n::text, 22, '0'), 'acct_' || lpad((n % 100000)::text, 10, '0'), 'Key ' || n, 'production',
	sha256(('rk_' || lpad(n::text, 45, '0'))::bytea), right(lpad(n::text, 45, '0'), 4),
	'{memories:read,memories:write,entities:read}', now() - make_interval(secs => n), pg_current_xact_id()
from generate_series(1, :n) n;
alter table rekall.api_keys add constraint api_keys_key_hash_key unique (key_hash);
alter table rekall.api_keys enable always trigger stamp;
alter table rekall.api_keys enable always trigger refuse_delete;
alter table rekall.api_keys enable always trigger refuse_truncate;
alter table rekall.api_keys enable always trigger notify;
alter table rekall.last_used disable trigger user;
insert into rekall.last_used (key_id, first_used_at, last_used_at)
select 'key_' || lpad(n::text, 22, '0'), now() - interval '90 days', now() - n * (interval '90 days' / :n)
from generate_series(1, :n) n;
alter table rekall.last_used enable trigger user;
commit;
vacuum (analyze) rekall.api_keys, rekall.last_used;
