package keyadmin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keystore"
)

// ImportOptions say how a file is read.
type ImportOptions struct {
	Format    string               // csv or jsonl
	PlainKeys bool                 // whether the file may hold keys themselves; they are hashed at once and kept nowhere
	DryRun    bool                 // validate everything, write nothing
	Progress  func(ImportProgress) // called now and then; nil: nobody watches
}

// ImportProgress says how far an import is.
type ImportProgress struct {
	Step  ImportStep
	Lines int64 // keys that were read
}

// ImportStep is what an import is doing.
type ImportStep string

// The steps, in their order.
const (
	ImportReading  ImportStep = "reading"
	ImportChecking ImportStep = "checking" // against each other and what is stored
	ImportWriting  ImportStep = "writing"
)

// Imported says what an import did.
type Imported struct {
	Imported     int64 `json:"imported"`      // keys that were added; with DryRun, that would be
	AlreadyThere int64 `json:"already_there"` // the same as in an earlier import
	Ended        int64 `json:"ended"`         // of those, revoked or expired: an import revives none
}

// ImportError says which lines of a file are not acceptable. Nothing was written. It quotes nothing of the file.
type ImportError struct {
	Lines []BadLine // the first 20
	Total int64
}

// BadLine is a line that cannot be imported.
type BadLine struct {
	Line   int64
	Field  string // empty: the line as a whole
	Reason string
}

func (e *ImportError) Error() string {
	first := e.Lines[0]
	if e.Total == 1 {
		return "nothing was imported, 1 line is not acceptable: " + first.String()
	}
	return fmt.Sprintf("nothing was imported, %d lines are not acceptable; the first: %s", e.Total, first)
}

func (l BadLine) String() string {
	if l.Field == "" {
		return fmt.Sprintf("line %d %s", l.Line, l.Reason)
	}
	return fmt.Sprintf("line %d: %s %s", l.Line, l.Field, l.Reason)
}

const (
	maxBadLines   = 20
	progressEvery = 10_000 // lines
)

// Import adds existing keys, by their SHA-256, all of a file or none. In CSV the first line names the columns; in JSON lines
// each line is an object. Both have the same fields:
//
//	hash         SHA-256 of the whole key, in hexadecimal; or, with PlainKeys,
//	key          the key itself, whose prefix must agree with environment
//	account      that owns it
//	name         for people
//	environment  production or sandbox; may be missing where key is given
//	scopes       a JSON list, or text with spaces or commas between them
//	manage_keys  true or false; may be missing: false
//	created_at   RFC 3339, not in the future; may be missing: now
//	expires_at   RFC 3339; may be missing: never
//	hint         last four characters of the key, for lists; may be missing
//
// A key that is stored already is passed over if it may do the same, so an import can be repeated; otherwise it is an error,
// like any line that is not acceptable: an *ImportError. Only an operator may import.
func (a *Admin) Import(ctx context.Context, actor Actor, file io.Reader, options ImportOptions) (Imported, error) {
	if actor.rank != operator {
		return Imported{}, &ForbiddenError{"", "only an operator may import keys"}
	}
	reader, err := newImportReader(file, options)
	if err != nil {
		return Imported{}, err
	}
	progress := options.Progress
	if progress == nil {
		progress = func(ImportProgress) {}
	}
	var done Imported
	err = a.store.ChangeOnce(ctx, func(tx *keystore.Tx) error {
		now, err := tx.Now(ctx)
		if err != nil {
			return err
		}
		staging := &staging{reader: reader, now: now, progress: progress}
		if err := tx.Stage(ctx, staging.next); err != nil {
			return err
		}
		progress(ImportProgress{ImportChecking, staging.staged})
		if err := staging.check(ctx, tx); err != nil {
			return err
		}
		if done.AlreadyThere, done.Ended, err = tx.CountStagedThere(ctx); err != nil {
			return err
		}
		if options.DryRun {
			done.Imported = staging.staged - done.AlreadyThere
			return nil
		}
		progress(ImportProgress{ImportWriting, staging.staged})
		done.Imported, err = tx.InsertStaged(ctx, actor.String())
		done.AlreadyThere = staging.staged - done.Imported
		return err
	})
	if err != nil {
		return Imported{}, err
	}
	return done, nil
}

// staging reads a file into the staging table, and gathers the lines that are not acceptable.
type staging struct {
	reader   importReader
	now      time.Time
	progress func(ImportProgress)
	staged   int64
	bad      ImportError
}

// next returns the next acceptable key, or nil at the end.
func (s *staging) next() (*keystore.Staged, error) {
	for {
		line, err := s.reader.next()
		var bad *BadLine
		switch {
		case errors.Is(err, io.EOF):
			return nil, nil
		case errors.As(err, &bad):
			s.reject(*bad)
			continue
		case err != nil:
			return nil, fmt.Errorf("read import: %w", err)
		}
		key, err := line.key(s.now)
		if err != nil {
			invalid, ok := errors.AsType[*InvalidError](err)
			if !ok {
				return nil, err
			}
			s.reject(BadLine{line.number, invalid.Field, invalid.Reason})
			continue
		}
		if s.bad.Total > 0 {
			continue // nothing will be written: the rest is only read for what else is wrong
		}
		s.staged++
		if s.staged%progressEvery == 0 {
			s.progress(ImportProgress{ImportReading, s.staged})
		}
		return key, nil
	}
}

func (s *staging) reject(line BadLine) {
	s.bad.Total++
	if len(s.bad.Lines) < maxBadLines {
		s.bad.Lines = append(s.bad.Lines, line)
	}
}

// check compares the keys with each other and with those that are stored.
func (s *staging) check(ctx context.Context, tx *keystore.Tx) error {
	if s.bad.Total == 0 {
		faults, total, err := tx.StagedFaults(ctx, maxBadLines)
		if err != nil {
			return err
		}
		for _, f := range faults {
			reason := "is of a key that is stored with another account, environment, scopes, permission or expiry"
			if f.FirstLine != nil {
				reason = fmt.Sprintf("is the same as on line %d", *f.FirstLine)
			}
			s.reject(BadLine{f.Line, "hash", reason})
		}
		s.bad.Total = total
	}
	if s.bad.Total > 0 {
		return &s.bad
	}
	return nil
}

// key returns the key that a line describes, or an *InvalidError.
func (l importLine) key(now time.Time) (*keystore.Staged, error) {
	key := &keystore.Staged{Line: l.number, ID: newID(), Account: l.Account, Name: l.Name, ManageKeys: l.ManageKeys}
	if err := checkNewAccount(l.Account); err != nil {
		return nil, err
	}
	if err := checkName("name", l.Name); err != nil {
		return nil, err
	}
	if err := l.identify(key); err != nil {
		return nil, err
	}
	var err error
	if key.Scopes, err = parseScopes(l.Scopes); err != nil {
		return nil, err
	}
	if key.ExpiresAt, err = l.time("expires_at", l.ExpiresAt); err != nil {
		return nil, err
	}
	if key.CreatedAt, err = l.time("created_at", l.CreatedAt); err != nil {
		return nil, err
	}
	if key.CreatedAt != nil && key.CreatedAt.After(now) {
		return nil, &InvalidError{"created_at", "must not be in the future"}
	}
	return key, nil
}

// identify sets the hash, the environment and the hint, from the key itself or from what the line says.
func (l importLine) identify(key *keystore.Staged) error {
	environment, err := apikey.ParseEnvironment(l.Environment)
	if err != nil && (l.Environment != "" || l.Key == "") {
		return errEnvironment
	}
	key.Environment = environment
	if l.Key == "" {
		if key.Digest, err = parseHash(l.Hash); err != nil {
			return err
		}
		if l.Hint != "" && !hintPattern.MatchString(l.Hint) {
			return &InvalidError{"hint", "must be the last four characters of the key"}
		}
		key.Hint = l.Hint
		return nil
	}
	if l.Hash != "" {
		return &InvalidError{"hash", "must be left out where key is given"}
	}
	prefix, err := apikey.Parse(l.Key)
	if err != nil {
		return &InvalidError{"key", "is not a key: rk_ or rk_test_ and letters and digits, 48 characters in all"}
	}
	if environment != 0 && environment != prefix {
		return &InvalidError{"environment", "contradicts the prefix of the key"}
	}
	key.Environment, key.Digest, key.Hint = prefix, apikey.Hash(l.Key), apikey.Hint(l.Key)
	return nil
}

// time reads a moment within what the database accepts.
func (l importLine) time(field, s string) (*time.Time, error) {
	t, err := parseTime(field, s)
	if t == nil {
		return nil, err
	}
	return t, checkYear(field, *t)
}
