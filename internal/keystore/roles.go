package keystore

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Roles are the names of the Postgres roles with which the gateway's processes need no more rights than they use. Users log
// in as members of them. An empty name: there is no such role, or it is to be left alone.
type Roles struct {
	Edge  string // of running gateways: read keys without their names, write what they count and their own row in edges
	Admin string // of key management: create, change and revoke keys, set limits, look at edges
}

// grant is an object of the schema, and what each role may do with it.
type grant struct {
	on, edge, admin string
}

// grants is all that the roles may do. Every table, sequence and function of the schema has a line, also those that
// neither role needs. Rows of edges and signing_keys are guarded by policies besides, and revocations by triggers. Who may remove rows of a
// table, or change all columns, may lock it against everybody.
var grants = []grant{
	{on: "schema rekall", edge: "usage", admin: "usage"},
	{on: "table rekall.schema_version", edge: "select (version)"}, // for /rekall/status
	{
		on:   "table rekall.api_keys",
		edge: "select (id, account, key_hash, environment, scopes, manage_keys, expires_at, revoked_at, change_xid)",
		admin: "select, insert (id, account, name, environment, key_hash, hint, scopes, manage_keys, created_by, created_at, expires_at, " +
			"predecessor, overlap_on_first_use), " +
			"update (name, expires_at, revoked_at, predecessor, overlap_on_first_use, grace_started_at, prior_expires_at)",
	},
	{on: "table rekall.audit", admin: "select, insert (actor, action, key_id, account, environment, details)"},
	{on: "sequence rekall.audit_id_seq"},
	{
		on: "table rekall.idempotency_keys",
		admin: "select, insert (account, actor, idempotency_key, request_hash, key_id), " +
			"update (request_hash, key_id, created_at), delete",
	},
	{on: "table rekall.tiers", edge: "select", admin: "select, update (requests_per_minute, burst, concurrent_requests)"},
	{
		on: "table rekall.account_limits", edge: "select",
		admin: "select, insert (account), update (tier, requests_per_minute, burst, concurrent_requests)",
	},
	{
		on: "table rekall.key_limits", edge: "select",
		admin: "select, insert (key_id), update (requests_per_minute, burst, concurrent_requests)",
	},
	{on: "table rekall.usage", edge: "select, insert, update, delete", admin: "select"},
	{on: "table rekall.last_used", edge: "select, insert, update (first_used_at, last_used_at)", admin: "select"},
	{on: "table rekall.usage_flushes", edge: "select, insert, update, delete"},
	{on: "table rekall.spikes", edge: "select, insert, delete", admin: "select"},
	{on: "table rekall.usage_chores", edge: "select, insert, update (claimed_at)"},
	{on: "table rekall.signing_keys", edge: "select, insert (id, public_key, instance, expires_at), update (expires_at), delete"},
	{
		on: "table rekall.edges",
		edge: "select (instance, max_staleness, synced_at, applied, applied_on, beat, seen_at), " +
			"insert (instance, name, region, version, max_staleness, started_at, synced_at, applied, applied_on, beat, seen_at), " +
			"update (synced_at, applied, applied_on, beat, seen_at), delete",
		admin: "select (instance, name, region, version, max_staleness, synced_at, applied, applied_on, seen_at)",
	},
	{on: "function rekall.create_canary()", edge: "execute"},
	{on: "function rekall.revoke_canary(text)", edge: "execute"},
	{on: "function rekall.forget_replaced_edges(text)", edge: "execute"},
	{on: "function rekall.forget_edges()", edge: "execute"},
	{on: "function rekall.forget_signing_keys()", edge: "execute"},
	{on: "function rekall.stamp_api_key()"},
	{on: "function rekall.stamp_new_api_key()"},
	{on: "function rekall.refuse_removal()"},
	{on: "function rekall.notify_key_change()"},
	{on: "function rekall.refuse_audit_change()"},
	{on: "function rekall.stamp_limits()"},
	{on: "function rekall.refuse_limits_removal()"},
	{on: "function rekall.key_first_used()"},
}

// maxIdentifier is where Postgres cuts a name off (NAMEDATALEN - 1), in bytes.
const maxIdentifier = 63

// Check returns an error if the roles cannot be what MigrateAndGrant makes of them, whatever the database has.
func (r Roles) Check() error {
	if r.Edge == r.Admin && r.Edge != "" {
		return errors.New("edges and administrators need different roles: give --edge-role and --admin-role different names")
	}
	for _, role := range []string{r.Edge, r.Admin} {
		if len(role) > maxIdentifier || strings.ContainsRune(role, 0) {
			return fmt.Errorf("role %q is not a name for Postgres: use up to %d bytes", role, maxIdentifier)
		}
	}
	return nil
}

// grantTo makes the roles' rights those of the table, in one transaction: a running edge never misses a right in between.
func grantTo(ctx context.Context, conn *pgx.Conn, roles Roles) error {
	if roles == (Roles{}) {
		return nil
	}
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if err := revokeAll(ctx, tx, "public"); err != nil {
			return err
		}
		// Each step for both before the next: a role may be a member of the other, and would still have its rights.
		if err := roles.each(func(role string, _ func(grant) string) error { return startFromNothing(ctx, tx, role) }); err != nil {
			return err
		}
		if err := roles.each(func(role string, _ func(grant) string) error { return refuseMore(ctx, tx, role) }); err != nil {
			return err
		}
		if err := refuseOneInTheOther(ctx, tx, roles); err != nil {
			return err
		}
		return roles.each(func(role string, right func(grant) string) error { return grantRights(ctx, tx, role, right) })
	})
}

// each calls do with each role that has a name, and with what picks its rights from the table.
func (r Roles) each(do func(role string, right func(grant) string) error) error {
	for _, of := range []struct {
		role  string
		right func(grant) string
	}{
		{r.Edge, func(g grant) string { return g.edge }},
		{r.Admin, func(g grant) string { return g.admin }},
	} {
		if of.role == "" {
			continue
		}
		if err := do(of.role, of.right); err != nil {
			return fmt.Errorf("role %q: %w", of.role, err)
		}
	}
	return nil
}

// startFromNothing makes the role if need be, and takes all rights in the schema from it.
func startFromNothing(ctx context.Context, tx pgx.Tx, role string) error {
	var exists bool
	if err := tx.QueryRow(ctx, "select exists (select from pg_roles where rolname = $1)", role).Scan(&exists); err != nil {
		return err
	}
	if !exists {
		if _, err := tx.Exec(ctx, "create role "+quote(role)+" nologin"); err != nil {
			return fmt.Errorf("create it: %w", err)
		}
	}
	return revokeAll(ctx, tx, quote(role))
}

func quote(role string) string { return pgx.Identifier{role}.Sanitize() }

// revokeAll takes all rights in the schema from a role, which is quoted, or from public.
func revokeAll(ctx context.Context, tx pgx.Tx, role string) error {
	for _, objects := range []string{"schema rekall", "all tables in schema rekall", "all sequences in schema rekall", "all routines in schema rekall"} {
		if _, err := tx.Exec(ctx, "revoke all on "+objects+" from "+role+" cascade"); err != nil {
			return err
		}
	}
	return nil
}

// remainingSQL finds what a role may still do when all was revoked from it: as itself, or as any role that it inherits from or can
// make itself with "set role".
const remainingSQL = `
with reached as (select oid from pg_roles where pg_has_role($1::name, oid, 'member'))
select coalesce(string_agg(object, ', ' order by object), '') from (
	select 'schema rekall' from pg_namespace n where nspname = 'rekall' and exists (
		select from reached r where r.oid = nspowner or has_schema_privilege(r.oid, n.oid, 'usage, create'))
	union all
	select c.oid::regclass::text from pg_class c where relnamespace = 'rekall'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'f', 'S')
		and exists (select from reached r where r.oid = relowner or case relkind
			when 'S' then has_sequence_privilege(r.oid, c.oid, 'usage, select, update')
			else has_table_privilege(r.oid, c.oid, 'select, insert, update, delete, truncate, references, trigger')
				or has_any_column_privilege(r.oid, c.oid, 'select, insert, update, references') end)
	union all
	select p.oid::regprocedure::text from pg_proc p where pronamespace = 'rekall'::regnamespace and exists (
		select from reached r where r.oid = proowner or has_function_privilege(r.oid, p.oid, 'execute'))
) as remaining (object)`

// refuseMore fails if a role has rights though all were revoked from it.
func refuseMore(ctx context.Context, tx pgx.Tx, role string) error {
	var remaining string
	if err := tx.QueryRow(ctx, remainingSQL, role).Scan(&remaining); err != nil {
		return err
	}
	if remaining != "" {
		return fmt.Errorf("it has rights that cannot be revoked here, as a superuser, an owner or a member of another role: "+
			"name another role, or take away what it has on %s", remaining)
	}
	return nil
}

// refuseOneInTheOther fails if a role is a member of the other: with that one's rights it would have more than its own.
func refuseOneInTheOther(ctx context.Context, tx pgx.Tx, roles Roles) error {
	if roles.Edge == "" || roles.Admin == "" {
		return nil
	}
	for _, of := range []struct{ member, group string }{{roles.Edge, roles.Admin}, {roles.Admin, roles.Edge}} {
		var member bool
		if err := tx.QueryRow(ctx, "select pg_has_role($1::name, $2::name, 'member')", of.member, of.group).Scan(&member); err != nil {
			return err
		}
		if member {
			return fmt.Errorf("role %q is a member of %q and would have its rights: name another role, or revoke that membership", of.member, of.group)
		}
	}
	return nil
}

func grantRights(ctx context.Context, tx pgx.Tx, role string, right func(grant) string) error {
	for _, g := range grants {
		if right(g) == "" {
			continue
		}
		if _, err := tx.Exec(ctx, "grant "+right(g)+" on "+g.on+" to "+quote(role)); err != nil {
			return fmt.Errorf("%s: %w", g.on, err)
		}
	}
	return nil
}
