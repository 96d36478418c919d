package caddymodule

import (
	"sync/atomic"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// upstreams say of each environment once that its backends give no answer, and once that they do again. They live as long as the
// runtime: the reload that names other backends may be what ends the trouble.
type upstreams [apikey.Sandbox + 1]trouble

// troubleOver is the time without trouble after which it counts as over. Without it, one dead backend of several, or one client whose
// uploads break off, would begin and end it with every request.
const troubleOver = 10 * time.Second

// trouble is what many requests may meet, and is to be logged once.
type trouble struct {
	metAt atomic.Int64 // instant at which a request met it last; 0: it is over
}

// met notes that a request met the trouble. It reports whether it begins.
func (t *trouble) met() bool { return t.metAt.Swap(int64(now())) == 0 }

// over reports whether the trouble is over, once.
func (t *trouble) over() bool {
	at := t.metAt.Load()
	return at != 0 && instant(at).since() >= troubleOver && t.metAt.CompareAndSwap(at, 0)
}
