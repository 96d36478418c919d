package dashboard

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

const (
	// pageSize is what people can look over, and how many sparklines a page asks Postgres for.
	pageSize = 25

	// maxSorted is how many of the newest keys a list in another order is made of.
	maxSorted = 500
)

// listData is the list of keys, as it was asked for.
type listData struct {
	Environment, Search, Status, Sort string
	Rows                              []listRow
	Total                             int64
	Next                              string // query of the next page; empty: this is the last
	Cut                               bool   // there are more keys than were sorted
	Filtered                          bool
	Production                        bool // whether the visitor manages production keys
}

type listRow struct {
	keyadmin.Key
	Marks []mark
	Spark *chart // nil: nobody can tell now
}

// mark is something to see about a key at a glance.
type mark struct{ Class, Text, Title string }

// orders sort a list by something else than the newest first: by a text of each key.
var orders = map[string]func(keyadmin.Key) string{
	"name":      func(k keyadmin.Key) string { return strings.ToLower(k.Name) },
	"last-used": func(k keyadmin.Key) string { return timeOrder(k.LastUsedAt, -1) },
	"expires":   func(k keyadmin.Key) string { return timeOrder(k.ExpiresAt, 1) },
}

// timeOrder is a text that sorts as times do, or (-1) the other way round. Times that are not known come last.
func timeOrder(t *time.Time, sign int64) string {
	if t == nil {
		return "~"
	}
	return fmt.Sprintf("%019d", 1<<62+sign*t.UnixMicro())
}

// place is where a key stands in a sorted list. Among equals the newest comes first.
type place struct {
	value   string // by which the list is sorted
	created int64
	id      string
}

func (p place) compare(other place) int {
	return cmp.Or(strings.Compare(p.value, other.value), cmp.Compare(other.created, p.created), strings.Compare(other.id, p.id))
}

// cursor writes a place down: the key that stood there may leave the list before the next page is asked for.
func (p place) cursor() string {
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%d %s %s", p.created, p.id, p.value))
}

func parsePlace(cursor string) (p place, err error) {
	text, err := base64.RawURLEncoding.DecodeString(cursor)
	parts := strings.SplitN(string(text), " ", 3)
	if err == nil && len(parts) == 3 {
		p.id, p.value = parts[1], parts[2]
		p.created, err = strconv.ParseInt(parts[0], 10, 64)
	}
	if err != nil || p.id == "" {
		return place{}, &keyadmin.InvalidError{Field: "cursor", Reason: "must be the cursor that came with the page before"}
	}
	return p, nil
}

// selection is what the list's form says. What cannot be is as if it were not said, but for the cursor.
func (v *visit) selection() listData {
	query := v.r.URL.Query()
	data := listData{Environment: apikey.Production.String(), Search: apikey.Redact(strings.TrimSpace(query.Get("q")))}
	data.Production = v.actor.Manages(data.Environment)
	if query.Get("environment") == apikey.Sandbox.String() || !data.Production {
		data.Environment = apikey.Sandbox.String()
	}
	if status := query.Get("status"); slices.Contains(keyadmin.StatusNames(), status) {
		data.Status = status
	}
	if _, ok := orders[query.Get("sort")]; ok {
		data.Sort = query.Get("sort")
	}
	data.Filtered = data.Search != "" || data.Status != ""
	return data
}

func (l listData) query(cursor string) string {
	query := url.Values{"environment": {l.Environment}}
	for name, value := range map[string]string{"q": l.Search, "status": l.Status, "sort": l.Sort, "cursor": cursor} {
		if value != "" {
			query.Set(name, value)
		}
	}
	return "?" + query.Encode()
}

func (d *Dashboard) list(v *visit) error {
	data := v.selection()
	keys, next, err := d.find(v, &data, v.r.URL.Query().Get("cursor"))
	if err != nil {
		return err
	}
	if next != "" {
		data.Next = data.query(next)
	}
	ids := make([]string, 0, len(keys))
	for _, key := range keys {
		ids = append(ids, key.ID)
	}
	usage := v.usage(weekStart, ids...)
	for _, key := range keys {
		data.Rows = append(data.Rows, newRow(key, usage))
	}
	return v.show(http.StatusOK, "list", layout{Title: "API Keys", Data: data})
}

// find returns one page of the keys that the list shows. One in an order of its own is made of the newest keys.
func (d *Dashboard) find(v *visit, data *listData, cursor string) (keys []keyadmin.Key, next string, err error) {
	request := keyadmin.ListRequest{
		Environment: data.Environment, Status: data.Status, Name: data.Search, Limit: pageSize, Cursor: cursor, WithTotal: true,
		WithoutUse: data.Sort != "last-used", // whoever sees a key can revoke it
	}
	order := orders[data.Sort]
	if order != nil {
		request.Limit, request.Cursor = 100, ""
	}
	for {
		page, err := d.Admin.List(v.r.Context(), v.actor, request)
		if err != nil {
			return nil, "", err
		}
		if page.Total != nil {
			data.Total = *page.Total
		}
		keys = append(keys, page.Keys...)
		request.Cursor, request.WithTotal = page.NextCursor, false
		if order == nil {
			return keys, page.NextCursor, nil
		}
		if page.NextCursor == "" || len(keys) >= maxSorted {
			break
		}
	}
	data.Cut = data.Total > int64(len(keys))
	return sortedPage(keys, order, cursor)
}

// sortedPage is the page of a sorted list that begins after the place in cursor, or with the first key.
func sortedPage(keys []keyadmin.Key, order func(keyadmin.Key) string, cursor string) ([]keyadmin.Key, string, error) {
	placeOf := func(k keyadmin.Key) place { return place{order(k), k.CreatedAt.UnixMicro(), k.ID} }
	slices.SortFunc(keys, func(a, b keyadmin.Key) int { return placeOf(a).compare(placeOf(b)) })
	if cursor != "" {
		last, err := parsePlace(cursor)
		if err != nil {
			return nil, "", err
		}
		keys = slices.DeleteFunc(keys, func(k keyadmin.Key) bool { return placeOf(k).compare(last) <= 0 })
	}
	if len(keys) <= pageSize {
		return keys, "", nil
	}
	return keys[:pageSize], placeOf(keys[pageSize-1]).cursor(), nil
}

// usage is what keys were used for, by their ids; empty: it cannot be read. Keys are worth more than that: a page of theirs, with which they
// are revoked, does not fail with it.
func (v *visit) usage(since func(now time.Time) time.Time, ids ...string) map[string]keyadmin.Usage {
	if len(ids) == 0 {
		return nil
	}
	if v.usageUntil.IsZero() {
		v.usageUntil = time.Now().Add(keyadmin.AnswerWithin / 2)
	}
	ctx, cancel := context.WithDeadline(v.r.Context(), v.usageUntil)
	defer cancel()
	usage, err := v.Admin.UsageSince(ctx, v.actor, ids, since)
	v.State.note(&v.State.readingUsage, v.Logger, err)
	return usage
}

// lastDays tells when the last days began, of which today is one.
func lastDays(n int) func(now time.Time) time.Time {
	return func(now time.Time) time.Time { return now.Truncate(24*time.Hour).AddDate(0, 0, 1-n) }
}

// weekStart is when a week began that a key's marks are about.
var weekStart = lastDays(7)

func newRow(key keyadmin.Key, usage map[string]keyadmin.Usage) listRow {
	row := listRow{Key: key}
	used, known := usage[key.ID]
	if known {
		row.LastUsedAt, row.LastUseUnknown = used.LastUsedAt, false
		spark := daily(used, sparkline)
		row.Spark = &spark
	}
	row.Marks = marks(row.Key, used)
	return row
}

// marks are what to look at: at a key that has ended, there is nothing left to do. The usage begins at weekStart or before.
func marks(key keyadmin.Key, usage keyadmin.Usage) []mark {
	if key.Status != keyadmin.Active {
		return nil
	}
	var marks []mark
	if key.Expiring {
		marks = append(marks, mark{"warn", "Expires soon", "Ends within 14 days"})
	}
	week := weekStart(usage.To)
	if slices.ContainsFunc(usage.Hourly, func(hour keyadmin.UsageHour) bool { return hour.Spike && !hour.Hour.Before(week) }) {
		marks = append(marks, mark{"alert", "Spike", "Far more requests than usual in the last 7 days"})
	}
	if key.LastUsedAt == nil && !key.LastUseUnknown && usage.FirstUsedAt == nil {
		marks = append(marks, mark{"quiet", "Never used", "No request was allowed with this key so far"})
	}
	return marks
}
