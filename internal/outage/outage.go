// Package outage logs once that something which is tried again and again fails, and once that it works again, and keeps its
// last failure. It tells also that the reason has become another one.
package outage

import (
	"errors"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Failure is a try that failed.
type Failure struct {
	At  time.Time // by this machine's clock
	Err error
}

// Kind is one of the things that a part tries. It belongs to the goroutine that tries.
type Kind struct {
	Begins  string        // message of its first failure
	Over    string        // message of the success after it; empty: another line says so
	Level   zapcore.Level // of Begins
	Failing bool          // whether the last try failed

	reason   string // of its last line
	loggedAt time.Time
}

// Failures are those of one part of the gateway, of whatever kind.
type Failures struct {
	Logger func() *zap.Logger // asked at each line: a reload closes the old logger's writers

	last atomic.Pointer[Failure]
}

// Last returns the last failure; nil: there was none.
func (f *Failures) Last() *Failure { return f.last.Load() }

// Keep keeps a failure that is not logged.
func (f *Failures) Keep(err error) { f.last.Store(&Failure{At: time.Now(), Err: err}) }

// logAgainAfter is the least time between two lines of one outage: a server that starts anew passes through several reasons.
const logAgainAfter = time.Minute

// reasonOf is Postgres's code of an error, or empty where Postgres did not answer. The text of an error is none: it names ports and
// lengths of time, and would be another with each try.
func reasonOf(err error) string {
	if answer, ok := errors.AsType[interface {
		error
		SQLState() string
	}](err); ok {
		return answer.SQLState()
	}
	return ""
}

// Note takes how a try has ended.
func (f *Failures) Note(k *Kind, err error, fields ...zap.Field) {
	switch {
	case err != nil && (!k.Failing || reasonOf(err) != k.reason && time.Since(k.loggedAt) >= logAgainAfter):
		k.reason, k.loggedAt = reasonOf(err), time.Now()
		f.Logger().Log(k.Level, k.Begins, append(fields, zap.Error(err))...)
	case err == nil && k.Failing && k.Over != "":
		f.Logger().Info(k.Over, fields...)
	}
	if k.Failing = err != nil; k.Failing {
		f.Keep(err)
	}
}
