package keyadmin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/rekall-ai/gateway/internal/keystore"
)

// EdgeStatus says how an edge stands to the data that it decides on.
type EdgeStatus string

// The statuses.
const (
	// Live edges have reported a sync within their max_staleness.
	Live EdgeStatus = "live"

	// FailClosed edges have not: by their own rule they trust no cached key any longer, even if they report.
	FailClosed EdgeStatus = "fail-closed"
)

// Edge is a gateway as operators see it.
type Edge struct {
	Name       string     `json:"name"`
	Region     string     `json:"region"`
	Version    string     `json:"version"`
	Instance   string     `json:"instance"`
	Status     EdgeStatus `json:"status"`
	LastSyncAt *time.Time `json:"last_sync_at"` // null: never
	AgeSeconds float64    `json:"age_seconds"`  // since then, to the millisecond; since its last report, if never
}

// Edges lists the edges that are running, and those that went silent a short while ago.
func (a *Admin) Edges(ctx context.Context) ([]Edge, error) {
	seen, _, err := a.look(ctx, 0)
	if err != nil {
		return nil, err
	}
	edges := make([]Edge, 0, len(seen))
	for _, e := range seen {
		edges = append(edges, fromSeen(e))
	}
	return edges, nil
}

func fromSeen(e keystore.SeenEdge) Edge {
	edge := Edge{
		Name: e.Name, Region: e.Region, Version: e.Version, Instance: e.Instance, Status: Live,
		LastSyncAt: utc(e.SyncedAt), AgeSeconds: float64(e.Age.Round(time.Millisecond).Milliseconds()) / 1000,
	}
	if !e.Live {
		edge.Status = FailClosed
	}
	return edge
}

// Confirmation says that an edge no longer allows a revoked key, and how it is known.
type Confirmation struct {
	Edge

	// Confirmed: the edge has applied the revocation. Otherwise, with status fail-closed, its max_staleness has passed
	// since the revocation: it refuses what it has not heard of.
	Confirmed bool `json:"confirmed"`

	// DelaySeconds is from the revocation to the edge's report of it; 0 if not confirmed, or if earlier reports may have had it.
	DelaySeconds float64 `json:"delay_seconds"`
}

// The edges are looked at every confirmPoll while those confirm that can, and every latePoll once only those are waited for that
// may be away, up to their max_staleness.
const (
	confirmPoll = 20 * time.Millisecond
	confirmSoon = time.Second
	latePoll    = 250 * time.Millisecond
)

// Revocation is a committed transaction that revoked keys, for the edges to confirm.
type Revocation struct {
	Count int64     // of the keys
	At    time.Time // by Postgres's clock; zero: it was a dry run
	xid   uint64

	server keystore.Server // whose xid that is
}

// errOtherServer keeps a revocation that was lost from being confirmed: its id may be another transaction's there.
var errOtherServer = errors.New("database has become another server, or was restarted, since the keys were revoked: revoke them again, " +
	"which changes nothing if the revocation was not lost")

// waitFor bounds a wait though Postgres hangs: by then every edge refuses what is revoked.
var waitFor = time.Minute

// stillInForce says of a revocation that the edges cannot be asked about what holds without them.
func stillInForce(err error) error {
	return fmt.Errorf("%w. Every edge refuses what is revoked within 60 seconds", err)
}

// WaitRevoked is Wait for one revoked key.
func (a *Admin) WaitRevoked(ctx context.Context, id string, progress func(Confirmation)) error {
	ctx, cancel := context.WithTimeout(ctx, waitFor)
	defer cancel()
	revocation := Revocation{Count: 1}
	err := a.store.Change(ctx, func(tx *keystore.Tx) error {
		row, err := tx.Get(ctx, keystore.Everything(), id)
		if err != nil {
			return err
		}
		if row.RevokedAt == nil {
			return fmt.Errorf("key %s is not revoked", id)
		}
		revocation.At, revocation.xid = *row.RevokedAt, row.ChangeXid
		revocation.server, err = tx.Server(ctx)
		return err
	})
	if err != nil {
		return err
	}
	return a.Wait(ctx, revocation, progress)
}

// edgesWithin bounds one look at the edges: whoever has taken one over can lock their table.
const edgesWithin = 5 * time.Second

var errEdgesLate = errors.New("database did not list the edges within 5 seconds: see whether it answers, and who locks rekall.edges")

// Wait waits until every edge that knew the keys may no longer allow them: it has confirmed the revocation, or its
// max_staleness has passed since. progress is called once for each edge. It ends within 60 seconds, or with ctx; and with an error if
// the edges cannot be read at first, or the database becomes another server.
func (a *Admin) Wait(ctx context.Context, revocation Revocation, progress func(Confirmation)) error {
	ctx, cancel := context.WithTimeout(ctx, waitFor)
	defer cancel()
	done, looked := make(map[string]bool), false
	for began := time.Now(); ; {
		seen, server, err := a.look(ctx, revocation.xid)
		if looked && errors.Is(err, errEdgesLate) {
			continue // a database that hangs for a while ends no wait that went well
		}
		if err != nil {
			return stillInForce(err)
		}
		looked = true
		if server.String() != revocation.server.String() {
			return errOtherServer
		}
		waiting := 0
		for _, e := range seen {
			c := Confirmation{Edge: fromSeen(e), Confirmed: e.Applied}
			switch {
			case done[e.Instance]:
				continue
			case e.Applied:
				c.DelaySeconds = max(0, e.SeenAt.Sub(revocation.At).Seconds())
			case time.Since(began) > e.MaxStaleness:
				c.Status = FailClosed
			default:
				waiting++
				continue
			}
			done[e.Instance] = true
			progress(c)
		}
		if waiting == 0 {
			return nil
		}
		poll := confirmPoll
		if time.Since(began) > confirmSoon {
			poll = latePoll
		}
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			return stillInForce(ctx.Err())
		}
	}
}

func (a *Admin) look(ctx context.Context, xid uint64) (seen []keystore.SeenEdge, server keystore.Server, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, edgesWithin, errEdgesLate)
	defer cancel()
	end, err := a.turnToRead(ctx, Actor{})
	if err == nil {
		defer end()
		seen, server, err = a.store.Edges(ctx, xid)
	}
	if err != nil && errors.Is(context.Cause(ctx), errEdgesLate) {
		err = errEdgesLate
	}
	return seen, server, err
}
