package caddymodule

import (
	"sync/atomic"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// upstreams say of each environment once that its backends give no answer, and once that they do again. They live as long as the
// runtime: the reload that names other backends may be what ends the trouble.
type upstreams [apikey.Sandbox + 1]upstream

// troubleOver is how long no request must have gone without an answer before one ends the trouble. One of several backends that is away,
// or one client whose uploads they break off, would else begin and end it with every request.
const troubleOver = 10 * time.Second

// upstream is the backends of one environment.
type upstream struct {
	failedAt atomic.Int64 // instant of the last request without an answer; 0: no trouble
}

// failed notes that a request got no answer. It reports whether the trouble begins.
func (u *upstream) failed() bool { return u.failedAt.Swap(int64(time.Since(processStart))) == 0 }

// answered notes that a request got one. It reports whether the trouble is over.
func (u *upstream) answered() bool {
	at := u.failedAt.Load()
	return at != 0 && time.Since(processStart)-time.Duration(at) >= troubleOver && u.failedAt.CompareAndSwap(at, 0)
}
