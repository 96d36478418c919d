package usage

import (
	"context"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/outage"
)

// chore is what one edge of all does once in a period.
type chore struct {
	name   string
	period time.Duration
	do     func(context.Context) error
}

const (
	choreTimeout = 30 * time.Second

	forgetBatch = 10_000 // rows removed in one statement
)

func (c *Counter) chores() []chore {
	return []chore{
		{"find spikes", time.Minute, c.findSpikes},
		{"forget usage", time.Hour, c.forget},
	}
}

// doChores asks for its turn at each chore a few times in its period, so that another edge steps in when one stops.
func (c *Counter) doChores(ctx context.Context) {
	chores := c.chores()
	ticker := time.NewTicker(chores[0].period / 4)
	defer ticker.Stop()
	doing := slices.Repeat([]outage.Kind{{
		Begins: "usage chore failed; it is tried again", Over: "usage chore works again", Level: zap.WarnLevel,
	}}, len(chores))
	undone := make([]bool, len(chores)) // whether this edge had its last turn in vain
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		for i, chore := range chores {
			mine, err := c.doChore(ctx, chore)
			if ctx.Err() != nil || err == nil && !mine && undone[i] { // to be told that it is not its turn shows nothing
				continue
			}
			undone[i] = err != nil && (mine || undone[i])
			c.failures.Note(&doing[i], err, zap.String("chore", chore.name))
		}
	}
}

// doChore also reports whether it was this edge's turn.
func (c *Counter) doChore(ctx context.Context, chore chore) (mine bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, choreTimeout)
	defer cancel()
	if mine, err = c.store.ClaimChore(ctx, chore.name, chore.period); err != nil || !mine {
		return false, err
	}
	return true, chore.do(ctx)
}

// forget removes counts that are past their retention, in batches that hold no lock for long.
func (c *Counter) forget(ctx context.Context) error {
	for {
		n, err := c.store.ForgetUsage(ctx, c.cfg.Retention, forgetBatch)
		if err != nil || n < forgetBatch {
			return err
		}
	}
}
