package outage

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

func TestAnOutageIsLoggedOnceWhenItBeginsAndOnceWhenItIsOver(t *testing.T) {
	core, logs := observer.New(zap.DebugLevel)
	failures := Failures{Logger: func() *zap.Logger { return zap.New(core) }}
	spoken := Kind{Begins: "it fails", Over: "it works again", Level: zap.WarnLevel}
	silent := Kind{Begins: "that fails", Level: zap.ErrorLevel} // its end is told by another line
	first, last := errors.New("first"), errors.New("last")
	failures.Note(&spoken, nil)
	if failures.Last() != nil || logs.Len() != 0 {
		t.Errorf("where nothing has failed: %v, %v", failures.Last(), logs.All())
	}
	for _, err := range []error{first, first, last, nil, nil, first} {
		failures.Note(&spoken, err, zap.String("what", "it"))
	}
	failures.Note(&silent, last)
	failures.Note(&silent, nil)
	var lines []string
	for _, entry := range logs.All() {
		lines = append(lines, entry.Level.String()+" "+entry.Message)
	}
	if want := []string{"warn it fails", "info it works again", "warn it fails", "error that fails"}; !slices.Equal(lines, want) {
		t.Errorf("%q, want %q", lines, want)
	}
	if !errors.Is(failures.Last().Err, last) || !spoken.Failing || silent.Failing {
		t.Errorf("last %v, failing %v and %v", failures.Last(), spoken.Failing, silent.Failing)
	}
	failures.Keep(first)
	if !errors.Is(failures.Last().Err, first) || logs.Len() != len(lines) {
		t.Errorf("last %v, %d lines", failures.Last(), logs.Len())
	}
}

func TestAnotherReasonOfAnOutageIsLoggedAMinuteAfterTheLastLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.DebugLevel)
		failures := Failures{Logger: func() *zap.Logger { return zap.New(core) }}
		kind := Kind{Begins: "it fails", Over: "it works again", Level: zap.ErrorLevel}
		refused := func(n int) error { return fmt.Errorf("dial tcp 127.0.0.1:%d: connection refused", n) }
		password := fmt.Errorf("connect: %w", &pgconn.PgError{Severity: "FATAL", Code: "28P01", Message: "password authentication failed"})
		try := func(err error) {
			<-time.After(30 * time.Second)
			failures.Note(&kind, err)
		}
		for n := range 5 {
			try(refused(n)) // in other words each time
		}
		for range 5 {
			try(password)
		}
		try(refused(5))
		try(password)
		try(refused(6))
		try(nil)
		try(password)
		var lines []string
		for _, entry := range logs.All() {
			lines = append(lines, fmt.Sprint(entry.Level, " ", entry.Message, " ", entry.ContextMap()["error"]))
		}
		want := []string{
			"error it fails " + refused(0).Error(), "error it fails " + password.Error(), "error it fails " + refused(5).Error(),
			"info it works again <nil>", "error it fails " + password.Error(),
		}
		if !slices.Equal(lines, want) {
			t.Errorf("%q, want %q", lines, want)
		}
	})
}
