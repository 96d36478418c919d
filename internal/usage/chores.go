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
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		for i, chore := range chores {
			if err := c.doChore(ctx, chore); ctx.Err() == nil {
				c.failures.Note(&doing[i], err, zap.String("chore", chore.name))
			}
		}
	}
}

func (c *Counter) doChore(ctx context.Context, chore chore) error {
	ctx, cancel := context.WithTimeout(ctx, choreTimeout)
	defer cancel()
	mine, err := c.store.ClaimChore(ctx, chore.name, chore.period)
	if err != nil || !mine {
		return err
	}
	return chore.do(ctx)
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
