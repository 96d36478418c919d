package keystore

import (
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// Failure is something that went wrong on the way to Postgres.
type Failure struct {
	At  time.Time // by this machine's clock
	Err error
}

// Failures are those of something that is tried again and again. Of each kind a line is logged when it begins and when it is over.
type Failures struct {
	Logger func() *zap.Logger // asked at each line

	last atomic.Pointer[Failure]
}

// Last returns the last failure; nil: there was none.
func (f *Failures) Last() *Failure { return f.last.Load() }

// Note takes how a try has ended. failing is the state of its kind.
func (f *Failures) Note(err error, failing *bool, begins, over string) {
	switch {
	case err != nil && !*failing:
		f.Logger().Warn(begins, zap.Error(err))
	case err == nil && *failing:
		f.Logger().Info(over)
	}
	if *failing = err != nil; *failing {
		f.last.Store(&Failure{At: time.Now(), Err: err})
	}
}
