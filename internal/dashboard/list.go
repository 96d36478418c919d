package dashboard

import (
	"cmp"
	"context"
	"net/http"
	"net/url"
	"slices"
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

	expiringWithin = 14 * 24 * time.Hour // as keyadmin's filter has it
)

// listData is the list of keys, as it was asked for.
type listData struct {
	Environment, Search, Status, Sort string
	Rows                              []listRow
	Total                             int64
	Next                              string // query of the next page; empty: this is the last
	Cut                               bool   // there are more keys than were sorted
	Filtered                          bool
}

type listRow struct {
	keyadmin.Key
	Marks []mark
	Spark chart
}

// mark is something to see about a key at a glance.
type mark struct{ Class, Text, Title string }

// orders sort a list by something else than the newest first.
var orders = map[string]func(a, b keyadmin.Key) int{
	"name":      func(a, b keyadmin.Key) int { return strings.Compare(strings.ToLower(a.Name), strings.ToLower(b.Name)) },
	"last-used": func(a, b keyadmin.Key) int { return -compareTimes(a.LastUsedAt, b.LastUsedAt, -1) },
	"expires":   func(a, b keyadmin.Key) int { return compareTimes(a.ExpiresAt, b.ExpiresAt, 1) },
}

// compareTimes puts times that are not known before (-1) or after (1) all others.
func compareTimes(a, b *time.Time, unknown int) int {
	switch {
	case a == nil && b == nil:
		return 0
	case a == nil:
		return unknown
	case b == nil:
		return -unknown
	}
	return a.Compare(*b)
}

// selection is what the list's form says. What cannot be is as if it were not said, but for the cursor.
func selection(query url.Values) listData {
	data := listData{Environment: apikey.Production.String(), Search: strings.TrimSpace(query.Get("q"))}
	if query.Get("environment") == apikey.Sandbox.String() {
		data.Environment = apikey.Sandbox.String()
	}
	if status := query.Get("status"); slices.Contains([]string{"active", "expiring", "expired", "revoked"}, status) {
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
	query := v.r.URL.Query()
	data := selection(query)
	keys, next, err := d.find(v, &data, query.Get("cursor"))
	if err != nil {
		return err
	}
	if next != "" {
		data.Next = data.query(next)
	}
	for _, key := range keys {
		row, err := d.row(v.r.Context(), v.actor, key)
		if err != nil {
			return err
		}
		data.Rows = append(data.Rows, row)
	}
	return v.show(http.StatusOK, "list", layout{Title: "API Keys", Data: data})
}

// find returns one page of the keys that the list shows. One in an order of its own is made of the newest keys.
func (d *Dashboard) find(v *visit, data *listData, cursor string) (keys []keyadmin.Key, next string, err error) {
	request := keyadmin.ListRequest{
		Environment: data.Environment, Status: data.Status, Name: data.Search, Limit: pageSize, Cursor: cursor, WithTotal: true,
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
	slices.SortStableFunc(keys, order)
	data.Cut = data.Total > int64(len(keys))
	return sortedPage(keys, cursor)
}

// sortedPage is the page of a sorted list that begins after the key with the id in cursor.
func sortedPage(keys []keyadmin.Key, cursor string) ([]keyadmin.Key, string, error) {
	begin := slices.IndexFunc(keys, func(k keyadmin.Key) bool { return k.ID == cursor }) + 1
	keys = keys[begin:]
	if len(keys) <= pageSize {
		return keys, "", nil
	}
	return keys[:pageSize], keys[pageSize-1].ID, nil
}

func (d *Dashboard) row(ctx context.Context, actor keyadmin.Actor, key keyadmin.Key) (listRow, error) {
	usage, err := d.Admin.Usage(ctx, actor, key.ID, time.Now().Add(-7*24*time.Hour), time.Time{})
	if err != nil {
		return listRow{}, err
	}
	return listRow{Key: key, Marks: marks(key, usage), Spark: daily(usage, sparkline)}, nil
}

// marks are what to look at: at a key that has ended, there is nothing left to do.
func marks(key keyadmin.Key, usage keyadmin.Usage) []mark {
	if key.Status != keyadmin.Active {
		return nil
	}
	var marks []mark
	if key.ExpiresAt != nil && time.Until(*key.ExpiresAt) < expiringWithin {
		marks = append(marks, mark{"warn", "Expires soon", "Ends within 14 days"})
	}
	if slices.ContainsFunc(usage.Daily, func(day keyadmin.UsageDay) bool { return day.Spike }) {
		marks = append(marks, mark{"alert", "Spike", "Far more requests than usual in the last 7 days"})
	}
	if key.LastUsedAt == nil && usage.FirstUsedAt == nil {
		marks = append(marks, mark{"quiet", "Never used", "No request was allowed with this key so far"})
	}
	return slices.Clip(marks)
}

// or is the first text that is not empty.
func or(texts ...string) string { return cmp.Or(texts...) }
