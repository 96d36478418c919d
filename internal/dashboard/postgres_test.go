package dashboard_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
)

func TestListAsksPostgresTheSameNumberOfTimesForOneKeyAndForTwentyFive(t *testing.T) {
	var asked pgtest.Proxy
	r := newRigVia(t, asked.URL)
	b := r.browser("ann@acme")
	r.key("acme", "Key", false)
	list := func(rows int) int64 {
		before := asked.Statements.Load()
		page := b.do("", nil)
		page.want(t, http.StatusOK)
		if n := strings.Count(page.body, `class="spark"><svg`); n != rows {
			t.Fatalf("%d rows with a sparkline, want %d", n, rows)
		}
		return asked.Statements.Load() - before
	}
	one := list(1)
	for i := range 24 {
		r.key("acme", fmt.Sprint("Key ", i), false)
	}
	if many := list(25); one == 0 || many != one {
		t.Errorf("%d statements for one key, %d for 25", one, many)
	}
}

// TestKeysAreShownThoughUsageCannotBeRead: whoever sees a key can revoke it.
func TestKeysAreShownThoughUsageCannotBeRead(t *testing.T) {
	r := newRig(t)
	key, old := r.key("acme", "Backend", false), r.key("acme", "Old", false)
	b := r.browser("ann@acme")
	b.do("/"+old.ID+"/rotate", url.Values{"overlap": {"1d"}}).want(t, http.StatusCreated)
	b.do("/"+key.ID, nil).want(t, http.StatusOK, "No requests in this time")
	b.do("/"+old.ID, nil).want(t, http.StatusOK, "Neither key was used")
	pgtest.Exec(t, r.database, "alter table rekall.spikes rename to gone")
	b.do("", nil).want(t, http.StatusOK, "Backend", "Not known now")
	b.do("/"+key.ID, nil).want(t, http.StatusOK, "Usage cannot be read right now", "/revoke")
	b.do("/"+old.ID+"?range=24h", nil).want(t, http.StatusOK, "Usage cannot be read right now", "/rotate/undo")
	r.browser("bob@other").do("", nil).want(t, http.StatusOK) // there is no usage to read
	pgtest.Exec(t, r.database, "alter table rekall.gone rename to spikes")
	b.do("/"+old.ID, nil).want(t, http.StatusOK, "Neither key was used")
	for _, line := range []string{"cannot read usage", "can read usage again"} {
		if n := strings.Count(r.log.String(), line); n != 1 {
			t.Errorf("%d lines %q", n, line)
		}
	}
}

// TestKeyIsRevokedThoughAnEdgeThatWasTakenOverLocksItsTables: whoever has the key may be whoever has the edge.
func TestKeyIsRevokedThoughAnEdgeThatWasTakenOverLocksItsTables(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Backend", false)
	b := r.browser("ann@acme")
	pgtest.LockAsEdge(t, r.database)
	b.do("", nil).want(t, http.StatusOK, key.ID, "Not known now")
	b.do("/"+key.ID, nil).want(t, http.StatusOK, "Not known now", "Usage cannot be read right now", "/revoke")
	b.do("/"+key.ID+"/revoke", nil).want(t, http.StatusOK, "Not known now")
	b.revoke(key)
	b.do("/"+key.ID+"?done=revoked", nil).want(t, http.StatusOK, "The key is revoked, for good.", "Every edge refuses it within 60 seconds.")
}
