package usage

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/outage"
)

// chore is what one edge of all does once in a period.
type chore struct {
	name   string
	period time.Duration
	do     func(context.Context) error
	doneAt atomic.Pointer[time.Time] // by this edge; at first when it began

	undone bool // this edge had its last turn in vain
	more   bool // its last turn was too short
}

// errMore says that a turn was too short for all there was to do.
var errMore = errors.New("more is left to do")

const (
	choreTimeout = 30 * time.Second

	forgetBatch = 10_000 // rows removed in one statement

	forgetTurn = choreTimeout / 2 // removing them, then the other chores may be due
)

func (c *Counter) newChores() []*chore {
	chores := []*chore{
		{name: "find spikes", period: time.Minute, do: c.findSpikes},
		{name: "forget usage", period: time.Hour, do: c.forget},
	}
	for _, chore := range chores {
		chore.doneAt.Store(new(time.Now()))
	}
	return chores
}

// ChoreAges is how long ago this edge did each chore, or began. The least of all edges tells whether anybody does it.
func (c *Counter) ChoreAges() map[string]time.Duration {
	ages := make(map[string]time.Duration, len(c.chores))
	for _, chore := range c.chores {
		ages[chore.name] = time.Since(*chore.doneAt.Load())
	}
	return ages
}

// DoChores does what one edge does for all, until ctx is done: it finds spikes and forgets what is past its retention. It asks for its
// turn at each chore a few times in its period, so that another edge steps in when one stops. It must run once.
func (c *Counter) DoChores(ctx context.Context) {
	ticker := time.NewTicker(c.chores[0].period / 4)
	defer ticker.Stop()
	doing := slices.Repeat([]outage.Kind{{
		Begins: "usage chore failed; it is tried again", Over: "usage chore works again", Level: zap.WarnLevel,
	}}, len(c.chores))
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		for i, chore := range c.chores {
			mine, err := c.doChore(ctx, chore)
			if mine { // else the connection was lost, say, and there is as much left as before
				if chore.more = errors.Is(err, errMore); chore.more {
					err = nil
				}
				if err == nil {
					chore.doneAt.Store(new(time.Now()))
				}
			}
			if ctx.Err() != nil || err == nil && !mine && chore.undone { // to be told that it is not its turn shows nothing
				continue
			}
			chore.undone = err != nil && (mine || chore.undone)
			c.failures.Note(&doing[i], err, zap.String("chore", chore.name))
		}
	}
}

// doChore also reports whether it was this edge's turn, which it is again where the last one was too short.
func (c *Counter) doChore(ctx context.Context, chore *chore) (mine bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, choreTimeout)
	defer cancel()
	period := chore.period
	if chore.more {
		period = 0
	}
	if mine, err = c.store.ClaimChore(ctx, chore.name, period); err != nil || !mine {
		return false, err
	}
	return true, chore.do(ctx)
}

// forget removes counts that are past their retention, in batches that hold no lock for long. What has come together while that failed, or
// is past a retention that was shortened, takes many turns.
func (c *Counter) forget(ctx context.Context) error {
	for startedAt := time.Now(); time.Since(startedAt) < forgetTurn; {
		n, err := c.store.ForgetUsage(ctx, c.cfg.Retention, forgetBatch)
		if err != nil || n < forgetBatch {
			return err
		}
	}
	return errMore
}
