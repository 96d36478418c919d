package dashboard

import (
	"cmp"
	"embed"
	"fmt"
	"html/template"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

//go:embed templates
var templateFiles embed.FS

// templates are the pages, each with the layout and the parts that several of them have.
var templates = func() map[string]*template.Template {
	pages := map[string]*template.Template{}
	for _, name := range []string{"list", "new", "created", "key", "rotate", "undo", "revoke", "sign-in", "error"} {
		pages[name] = template.Must(template.New("layout.html").Funcs(functions).
			ParseFS(templateFiles, "templates/layout.html", "templates/parts.html", "templates/"+name+".html"))
	}
	return pages
}()

var functions = template.FuncMap{
	"root":    func() string { return Root },
	"version": func() string { return assetVersion },
	"when":    when,
	"clock":   func(t time.Time) string { return t.UTC().Format("15:04 MST") },
	"number":  humanize.Comma,
	"num":     func(f float64) string { return fmt.Sprintf("%.2f", f) },
	"action":  func(a keyadmin.Action) string { return cmp.Or(actions[a], string(a)) },
	"delay":   delay,
	"percent": func(n int64) string { return fmt.Sprintf("%d %%", n) },
	"short":   short,
	"redact":  apikey.Redact, // a key that was typed into the wrong field is not to come back in the page
	"ranges":  func() []string { return []string{"24h", "7d", "30d"} },
}

// actions say the lines of the audit for people.
var actions = map[keyadmin.Action]string{
	keyadmin.KeyCreated:        "Created",
	keyadmin.KeyRenamed:        "Renamed",
	keyadmin.KeyRevoked:        "Revoked",
	keyadmin.KeyRotated:        "Rotated",
	keyadmin.KeyRotationUndone: "Rotation undone",
	keyadmin.KeyGraceStarted:   "Successor used for the first time",
	keyadmin.LeakReported:      "Reported as leaked",
	keyadmin.KeysRevoked:       "Revoked with others",
	keyadmin.KeysImported:      "Imported with others",

	keyadmin.TierLimitsChanged:    "Limits of the tier changed",
	keyadmin.AccountLimitsChanged: "Limits of the account changed",
	keyadmin.KeyLimitsChanged:     "Limits changed",
}

// moment is a time as people say it, and exactly.
type moment struct{ Relative, Exact, Machine string }

// when takes a time or a pointer to one. Nil is an empty moment.
func when(at any) moment {
	var t time.Time
	switch at := at.(type) {
	case time.Time:
		t = at
	case *time.Time:
		if at == nil {
			return moment{}
		}
		t = *at
	}
	return moment{relative(t, time.Now()), t.Format("2 January 2006, 15:04:05 MST"), t.Format(time.RFC3339)}
}

// relative says how long before now a moment is, or how far ahead. It counts seconds: the longest time.Duration is 292 years, and a key
// that was imported may end in the year 9998.
func relative(t, now time.Time) string {
	const minute, hour, day = 60, 60 * 60, 24 * 60 * 60
	seconds, near, form := now.Unix()-t.Unix(), "just now", "%s ago"
	if seconds < 0 {
		seconds, near, form = -seconds, "in a moment", "in %s"
	}
	unit, name := int64(365*day), "year"
	switch {
	case seconds < minute:
		return near
	case seconds < hour:
		unit, name = minute, "minute"
	case seconds < 2*day:
		unit, name = hour, "hour"
	case seconds < 60*day:
		unit, name = day, "day"
	case seconds < 365*day:
		unit, name = 30*day, "month"
	}
	return fmt.Sprintf(form, english.Plural(int((seconds+unit/2)/unit), name, ""))
}

// delay is what an edge took to confirm: milliseconds, until they are too many to read.
func delay(seconds float64) string {
	if seconds < 1 {
		return fmt.Sprintf("%.0f ms", seconds*1000)
	}
	return fmt.Sprintf("%.1f s", seconds)
}

// short is what stands of scopes in a row of the list.
func short(scopes []string) string {
	const shown = 2
	text := strings.Join(scopes[:min(shown, len(scopes))], ", ")
	if more := len(scopes) - shown; more > 0 {
		text += fmt.Sprintf(" +%d", more)
	}
	return text
}
