package dashboard_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/test/eventually"
)

// edge reports as a gateway does, when it is told to.
type edge struct {
	r     *rig
	store *keystore.Store
	row   keystore.Edge
}

func (r *rig) edge(name string, maxStaleness time.Duration) *edge {
	r.t.Helper()
	e := &edge{r, pgtest.Store(r.t, r.database), keystore.Edge{
		Instance: strings.Repeat(name[:1], 22), Name: name, Region: "eu", Version: "1", MaxStaleness: maxStaleness, StartedAt: time.Now(),
	}}
	e.report()
	return e
}

func (e *edge) report() keystore.Server {
	e.r.t.Helper()
	e.row.Beat++
	report, err := e.store.ReportEdge(e.r.t.Context(), e.row)
	if err != nil {
		e.r.t.Fatal(err)
	}
	return report.TakenBy
}

// catchUp reports that the edge knows all that is committed.
func (e *edge) catchUp() {
	e.r.t.Helper()
	conn, err := pgx.Connect(e.r.t.Context(), e.r.database)
	if err != nil {
		e.r.t.Fatal(err)
	}
	defer func() { _ = conn.Close(e.r.t.Context()) }()
	if err := conn.QueryRow(e.r.t.Context(), "select pg_current_snapshot()::text, now()").Scan(&e.row.Applied, &e.row.SyncedAt); err != nil {
		e.r.t.Fatal(err)
	}
	e.row.AppliedOn = e.report().String()
	e.report()
}

// awaitPage opens a key's page until it has a text, and returns it.
func (b *browser) awaitPage(id, text string) (page reply) {
	b.r.t.Helper()
	eventually.Within(b.r.t, 30*time.Second, "the page says "+text, func() bool {
		page = b.do("/"+id, nil)
		return strings.Contains(page.body, text)
	})
	return page
}

func (b *browser) revoke(key keyadmin.Key) {
	b.r.t.Helper()
	b.do("/"+key.ID+"/revoke", url.Values{"name": {key.Name}}).want(b.r.t, http.StatusSeeOther)
}

func TestPageOpenedAfterARevocationClaimsNoDelayAndNotThatSilentEdgesConfirmed(t *testing.T) {
	r := newRig(t)
	north := r.edge("north", 30*time.Second)
	r.edge("silent", time.Second)
	key := r.key("acme", "Key", false)
	if _, err := r.admin.Revoke(t.Context(), operator, key.ID); err != nil {
		t.Fatal(err)
	}
	north.catchUp()
	page := r.browser("ann@acme").awaitPage(key.ID, "No edge that reports allows this key")
	page.want(t, http.StatusOK, "north", ">confirmed<", "silent, and refuses", "Those that are silent")
	for _, claim := range []string{"confirmed after", "All of them have confirmed"} {
		if strings.Contains(page.body, claim) {
			t.Errorf("the page says %q", claim)
		}
	}
}

func TestPageThatRevokedSaysWhatEachEdgeTook(t *testing.T) {
	r := newRig(t)
	north := r.edge("north", 30*time.Second)
	key := r.key("acme", "Key", false)
	b := r.browser("ann@acme")
	b.revoke(key)
	b.awaitPage(key.ID, "waiting</span>")
	north.catchUp()
	b.awaitPage(key.ID, "All of them have confirmed").want(t, http.StatusOK, "confirmed after")
}

func TestRevocationIsWatchedAgainAfterPostgresWasAway(t *testing.T) {
	r := newRig(t)
	r.edge("north", 50*time.Second)
	key := r.key("acme", "Key", false)
	b := r.browser("ann@acme")
	b.revoke(key)
	pgtest.Exec(t, r.database, "alter table rekall.edges rename to gone")
	eventually.Within(t, 30*time.Second, "the watch has failed", func() bool { return !r.state.Watched(key.ID) })
	pgtest.Exec(t, r.database, "alter table rekall.gone rename to edges")
	b.awaitPage(key.ID, "Waiting for the edges")
}

// TestRevokedKeyIsShownThoughTheEdgesCannotBeAsked: whoever revokes a key then is told that it is in force.
func TestRevokedKeyIsShownThoughTheEdgesCannotBeAsked(t *testing.T) {
	r := newRig(t)
	key := r.key("acme", "Key", false)
	pgtest.Exec(t, r.database, `insert into rekall.edges (instance, name, region, version, max_staleness, started_at, beat)
		select lpad(n::text, 22, '0'), 'forged', '', '', '59s', now(), 1 from generate_series(1, 10001) n`)
	b := r.browser("ann@acme")
	b.revoke(key)
	b.do("/"+key.ID, nil).want(t, http.StatusOK, "Every edge refuses it within 60 seconds.", "data-live")
}

func TestRevocationsAreWatchedHoweverManyCameBefore(t *testing.T) {
	r := newRig(t)
	b := r.browser("ann@acme")
	for i := range 21 {
		key := r.key("acme", fmt.Sprint("Key ", i), false)
		b.revoke(key)
		b.awaitPage(key.ID, "No edge reports")
	}
}

func TestRevocationThatNobodyWatchesStillSaysWhenItHolds(t *testing.T) {
	r := newRig(t)
	r.edge("north", 50*time.Second)
	b := r.browser("ann@acme")
	var last keyadmin.Key
	for i := range 21 {
		last = r.key("acme", fmt.Sprint("Key ", i), false)
		b.revoke(last)
	}
	b.do("/"+last.ID, nil).want(t, http.StatusOK, "Every edge refuses it within 60 seconds.", "data-live")
}
