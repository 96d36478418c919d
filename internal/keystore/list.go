package keystore

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Position is a key's place in a list. The zero value is the beginning.
type Position struct {
	CreatedAt time.Time
	ID        string
}

// State of a key, as a filter.
type State uint8

// The states. A key that is Expiring is Active too.
const (
	AnyState State = iota
	Active
	Expiring // within the filter's ExpiringWithin
	Expired  // and not revoked
	Revoked
)

// Filter selects keys. The zero value selects all.
type Filter struct {
	IDs            []string      // nil: any
	Environment    string        // empty: both
	CreatedBy      string        // an actor; empty: any
	State          State         // by Postgres's clock
	ExpiringWithin time.Duration // what Expiring means
	WithoutUse     bool          // the rows come without their last use
	Name           string        // part of the name; beyond one account, its beginning. Upper and lower case are the same.
}

// List returns up to limit keys that follow a position, newest first. Canaries are listed to nobody who did not ask for
// their account.
func (s *Store) List(ctx context.Context, reach Reach, filter Filter, after Position, limit int) ([]Row, error) {
	q := filtered(reach, filter)
	if after.ID != "" {
		q.add("(k.created_at, k.id) < (?, ?)", after.CreatedAt, after.ID)
	}
	q.args = append(q.args, limit)
	rows, _ := s.pool.Query(ctx, `select `+rowColumnsWith(!filter.WithoutUse)+` from rekall.api_keys k where `+q.where()+`
order by k.created_at desc, k.id desc limit `+placeholder(len(q.args)), q.args...) // CollectRows returns its error
	list, err := pgx.CollectRows(rows, scanRow)
	if err != nil {
		return nil, failed("list keys", err)
	}
	return list, nil
}

// Count returns how many keys List would return without a limit.
func (s *Store) Count(ctx context.Context, reach Reach, filter Filter) (count int64, err error) {
	q := filtered(reach, filter)
	if err := s.pool.QueryRow(ctx, `select count(*) from rekall.api_keys k where `+q.where(), q.args...).Scan(&count); err != nil {
		return 0, failed("count keys", err)
	}
	return count, nil
}

// filtered has only the conditions that are asked for, so that Postgres can choose the index for them.
func filtered(reach Reach, filter Filter) *conditions {
	q := new(conditions)
	q.reach(reach)
	if filter.IDs != nil {
		q.add("k.id = any(?)", filter.IDs)
	}
	if filter.Environment != "" {
		q.add("k.environment = ?", filter.Environment)
	}
	if filter.CreatedBy != "" {
		q.add("k.created_by = ?", filter.CreatedBy)
	}
	if filter.Name != "" && reach.all {
		// The largest character closes the range of all names with that beginning, in the index's order. A literal of it would be an
		// error where standard_conforming_strings is off.
		q.add(`lower(k.name) collate "C" between lower(?) and lower(?) || chr(1114111)`, filter.Name, filter.Name)
	} else if filter.Name != "" {
		q.add("position(lower(?) in lower(k.name)) > 0", filter.Name)
	}
	switch filter.State {
	case AnyState:
	case Active:
		q.add("k.revoked_at is null and (k.expires_at is null or k.expires_at > now())")
	case Expiring:
		q.add("k.revoked_at is null and k.expires_at is not null and k.expires_at > now() and k.expires_at < now() + ?::interval", filter.ExpiringWithin)
	case Expired:
		q.add("k.revoked_at is null and k.expires_at is not null and k.expires_at <= now()")
	case Revoked:
		q.add("k.revoked_at is not null")
	}
	return q
}

// conditions are a WHERE clause in the making.
type conditions struct {
	text []string
	args []any
}

// add appends a condition, whose question marks stand for args.
func (c *conditions) add(text string, args ...any) {
	for _, arg := range args {
		c.args = append(c.args, arg)
		text = strings.Replace(text, "?", placeholder(len(c.args)), 1)
	}
	c.text = append(c.text, text)
}

func (c *conditions) reach(r Reach) {
	if r.all {
		c.add("k.account <> ?", CanaryAccount)
	} else {
		c.add("k.account = ?", r.account)
	}
	if r.environment != "" {
		c.add("k.environment = ?", r.environment)
	}
}

func (c *conditions) where() string { return strings.Join(c.text, " and ") }

func placeholder(n int) string { return "$" + strconv.Itoa(n) }
