package keyadmin

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rekall-ai/gateway/internal/keystore"
)

// expiringWithin is how near its end an active key is listed as expiring: time enough for two weekly deployments.
const expiringWithin = 14 * day

// ListRequest selects keys: those to which all that is set applies. The zero value is the first page of all keys.
type ListRequest struct {
	Account     string // empty: all that the actor manages
	Environment string // production or sandbox; empty: both
	Status      string // active, expired or revoked, or expiring: active and in its last 14 days; empty: any
	Name        string // part of the name, in upper or lower case as far as the database's locale has them; for all accounts at once, its beginning; empty: any
	CreatedBy   string // an actor, such as "key:key_…"; empty: any
	Limit       int    // 1 to 100; 0: 100
	Cursor      string // NextCursor of the page before; empty: the first page
	WithTotal   bool   // whether Page.Total is wanted
	WithoutUse  bool   // whether LastUsedAt may be left out, as LastUseUnknown: nothing is read that an edge's role can lock
}

// Page is one page of a list, newest keys first.
type Page struct {
	Keys       []Key  // never nil
	NextCursor string // empty: the last page
	Total      *int64 // on all pages together; nil: not asked for, or not counted since it is of all accounts
}

const maxPage = 100

// List returns a page of keys. A request that is not acceptable is an *InvalidError.
func (a *Admin) List(ctx context.Context, actor Actor, request ListRequest) (Page, error) {
	filter, after, limit, err := request.validate()
	if err != nil {
		return Page{}, err
	}
	turn := a.turnToRead
	if filter.WithoutUse = request.WithoutUse; filter.WithoutUse {
		turn = a.turn
	}
	end, err := turn(ctx, actor)
	if err != nil {
		return Page{}, err
	}
	defer end()
	reach := actor.within(request.Account)
	// One more than asked for tells whether there is a next page.
	rows, err := a.store.List(ctx, reach, filter, after, limit+1)
	if err != nil {
		return Page{}, err
	}
	var page Page
	if len(rows) > limit {
		rows = rows[:limit]
		page.NextCursor = formatCursor(rows[limit-1])
	}
	page.Keys = fromRows(rows)
	for i := range page.Keys {
		page.Keys[i].LastUseUnknown = request.WithoutUse
	}
	if request.WithTotal && (request.Account != "" || actor.rank != operator) {
		total, err := a.store.Count(ctx, reach, filter)
		if err != nil {
			return Page{}, err
		}
		page.Total = &total
	}
	return page, nil
}

// validate returns what to look for, where the page begins and how long it is.
func (r ListRequest) validate() (filter keystore.Filter, after keystore.Position, limit int, err error) {
	filter = keystore.Filter{Environment: r.Environment, CreatedBy: r.CreatedBy, Name: r.Name, ExpiringWithin: expiringWithin}
	var badStatus, badLimit, badCursor error
	filter.State, badStatus = parseState(r.Status)
	limit, badLimit = checkLimit(r.Limit)
	after, badCursor = parseCursor(r.Cursor)
	return filter, after, limit, cmp.Or(
		given(r.Account, checkText("account", r.Account)),
		given(r.CreatedBy, checkActor("created_by", r.CreatedBy)),
		checkSearch("name", r.Name),
		given(r.Environment, checkEnvironment(r.Environment)),
		badStatus, badLimit, badCursor)
}

// stateNames are the states as a ListRequest's status has them.
var stateNames = [...]string{
	keystore.AnyState: "", keystore.Active: string(Active), keystore.Expiring: "expiring", keystore.Expired: string(Expired),
	keystore.Revoked: string(Revoked),
}

// StatusNames returns what a ListRequest's status may be.
func StatusNames() []string { return slices.Clone(stateNames[keystore.AnyState+1:]) }

func parseState(status string) (keystore.State, error) {
	state := slices.Index(stateNames[:], status)
	if state < 0 {
		return 0, &InvalidError{"status", "must be active, expiring, expired or revoked"}
	}
	return keystore.State(state), nil
}

func checkLimit(limit int) (int, error) {
	if limit == 0 {
		return maxPage, nil
	}
	if limit < 1 || limit > maxPage {
		return 0, &InvalidError{"limit", "must be from 1 to 100"}
	}
	return limit, nil
}

func formatCursor(last keystore.Row) string {
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%d %s", last.CreatedAt.UnixMicro(), last.ID))
}

var errCursor = &InvalidError{"cursor", "must be the cursor that came with the page before"}

func parseCursor(s string) (keystore.Position, error) {
	if s == "" {
		return keystore.Position{}, nil
	}
	text, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		return keystore.Position{}, errCursor
	}
	micros, id, _ := strings.Cut(string(text), " ")
	at, err := strconv.ParseInt(micros, 10, 64)
	if err != nil || at < 0 || at > maxCursor || !idPattern.MatchString(id) {
		return keystore.Position{}, errCursor
	}
	return keystore.Position{CreatedAt: time.UnixMicro(at), ID: id}, nil
}

// maxCursor is the last moment that a key can have been created, in microseconds since 1970: the database checks the same.
var maxCursor = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC).UnixMicro()
