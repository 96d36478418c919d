package keycache

import "context"

// Shrink makes the cache drop what only makes Find fast: the keys in memory, the filter, and what is read ahead of need. A million
// keys are 370 MB, which a cache that only follows streams would hold until the last of them ends. The feed and the requests in
// flight need none of it, and Find asks Postgres for what is not there.
func (c *Cache) Shrink() { c.shrink() }

// fillLoop reads ahead until the cache is to shrink. What it read last must not come after the cache was emptied.
func (c *Cache) fillLoop(ctx context.Context) {
	filling, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(c.shrunk, stop)()
	c.keepFilled(filling)
	if ctx.Err() == nil {
		c.empty()
	}
}

func (c *Cache) empty() {
	c.closing.Lock() // ristretto's Clear must not race Set
	defer c.closing.Unlock()
	if c.closed {
		return
	}
	c.unknown.filter.Store(nil)
	c.known.Clear()
	for i := range c.hot {
		c.hot[i].Store(nil)
	}
}
