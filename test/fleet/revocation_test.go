//go:build fleet

package fleet

import (
	"context"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// answer of an edge about a key.
type answer struct {
	verdict verdict
	decided time.Time // not before
	arrived time.Time
	detail  string // of a wrong answer
}

type verdict int

const (
	unavailable verdict = iota // nobody can tell, or nobody is there
	allowed
	revoked
	wrong // none of these, and never right
)

// answersAll asks for all keys at a time, and reports whether the edge answers each as wanted.
func (e *edgeUnderTest) answersAll(want verdict, keys []keyadmin.Key) bool {
	var others atomic.Int64
	var wg sync.WaitGroup
	for _, key := range keys {
		wg.Go(func() {
			if e.ask(key).verdict != want {
				others.Add(1)
			}
		})
	}
	wg.Wait()
	return others.Load() == 0
}

// revocation of a key at a moment of the run.
type revocation struct {
	key keyadmin.Key
	at  time.Duration // since the beginning

	done            chan struct{} // closed when those below are set
	sent, committed time.Time     // the commit was between the two
	xid             uint64        // its transaction
}

func keys(revocations []*revocation) []keyadmin.Key {
	list := make([]keyadmin.Key, len(revocations))
	for i, r := range revocations {
		list[i] = r.key
	}
	return list
}

// revoke revokes a key in one statement, so that the moment of the commit is known well.
func (f *fleet) revoke(id string) (sent, committed time.Time, xid uint64) {
	ctx := context.Background()
	conn, err := f.pool.Acquire(ctx)
	if err != nil {
		f.t.Errorf("revoke: %v", err)
		return
	}
	defer conn.Release()
	var text string
	sent = time.Now()
	err = conn.QueryRow(ctx, `update rekall.api_keys set revoked_at = now() where id = $1 returning change_xid::text`, id).Scan(&text)
	committed = time.Now()
	if err == nil {
		xid, err = strconv.ParseUint(text, 10, 64)
	}
	if err != nil {
		f.t.Errorf("revoke: %v", err)
	}
	return sent, committed, xid
}

// revokeAndWatch revokes a key at its moment, while every edge is asked for it, and returns when the bound is well past.
func (f *fleet) revokeAndWatch(r *revocation) {
	const lead = 50 * time.Millisecond
	wait(f.t.Context(), r.at)
	var watching sync.WaitGroup
	for _, e := range f.edges {
		watching.Go(func() { f.watch(e, r) })
	}
	wait(f.t.Context(), lead)
	r.sent, r.committed, r.xid = f.revoke(r.key.ID)
	close(r.done)
	watching.Wait()
}

// watch asks an edge for a key until the bound is well past, and records when the key was last allowed.
func (f *fleet) watch(e *edgeUnderTest, r *revocation) {
	const (
		margin = 2 * time.Second        // after the bound
		calm   = 250 * time.Millisecond // between two requests when the key has been refused
	)
	var lastAllowed, firstRefused time.Time
	for {
		a := e.ask(r.key)
		switch {
		case a.verdict == allowed && a.decided.After(lastAllowed):
			lastAllowed = a.decided
		case a.verdict == revoked && firstRefused.IsZero():
			firstRefused = a.arrived
		case a.verdict == wrong:
			f.t.Errorf("%s gave a revoked key %s", e.name, a.detail)
		}
		since := r.since()
		if since > f.maxStaleness+margin {
			break
		}
		interval := max(5*time.Millisecond, since/50)
		if !firstRefused.IsZero() {
			interval = calm
		}
		wait(f.t.Context(), interval)
	}
	f.judge(e, r, lastAllowed, firstRefused)
}

// since is the time since the commit, and 0 before.
func (r *revocation) since() time.Duration {
	select {
	case <-r.done:
		return time.Since(r.committed)
	default:
		return 0
	}
}

func (f *fleet) judge(e *edgeUnderTest, r *revocation, lastAllowed, firstRefused time.Time) {
	g := group{kind: e.kind}
	if e.fault != nil {
		g.fault = e.fault.name
	}
	if late := lastAllowed.Sub(r.committed); late > f.maxStaleness {
		f.t.Errorf("%s (%s) allowed a key %v after its revocation was committed", e.name, g.fault, late)
	}
	if !firstRefused.IsZero() && firstRefused.Before(r.sent) {
		f.t.Errorf("%s (%s) refused a key that was still good", e.name, g.fault)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.delays[g] = append(f.delays[g], max(0, lastAllowed.Sub(r.sent)))
}

// watchGood asks an edge for a key that stays good until ctx is done.
func (f *fleet) watchGood(ctx context.Context, e *edgeUnderTest, key keyadmin.Key) {
	for wait(ctx, 50*time.Millisecond) {
		switch a := e.ask(key); a.verdict {
		case revoked:
			f.t.Errorf("%s refused a good key", e.name)
		case wrong:
			f.t.Errorf("%s gave a good key %s", e.name, a.detail)
		}
	}
}

// confirmed reports whether every edge is live and has applied a transaction.
func (f *fleet) confirmed(xid uint64) bool {
	f.t.Helper()
	seen, _, err := f.store.Edges(f.t.Context(), xid)
	if err != nil {
		f.t.Fatal(err)
	}
	applied := make(map[string]bool)
	for _, s := range seen {
		if s.Applied && s.Age <= s.MaxStaleness {
			applied[s.Name] = true
		}
	}
	return f.hasAll(applied)
}

func (f *fleet) hasAll(names map[string]bool) bool {
	for _, e := range f.edges {
		if !names[e.name] {
			return false
		}
	}
	return true
}

// waitRevoked revokes one more key as "keys revoke --wait" does, and returns how long each edge took to confirm.
func (f *fleet) waitRevoked() []time.Duration {
	f.t.Helper()
	key := f.key()
	if _, err := f.admin.Revoke(f.t.Context(), keyadmin.Operator("test"), key.ID); err != nil {
		f.t.Fatal(err)
	}
	names := make(map[string]bool)
	var delays []time.Duration
	err := f.admin.WaitRevoked(f.t.Context(), key.ID, func(c keyadmin.Confirmation) {
		if c.Confirmed {
			names[c.Name] = true
			delays = append(delays, time.Duration(c.DelaySeconds*float64(time.Second)))
		}
	})
	if err != nil {
		f.t.Fatal(err)
	}
	if !f.hasAll(names) {
		f.t.Errorf("%d of %d edges confirmed the last revocation", len(names), len(f.edges))
	}
	return delays
}
