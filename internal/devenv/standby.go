package devenv

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
)

// StartStandby copies the server and starts the copy as its hot standby, in a temporary directory.
func (p *Postgres) StartStandby(ctx context.Context) (*Postgres, error) {
	s := &Postgres{bin: p.bin, user: p.user, password: p.password, options: PostgresOptions{Settings: p.options.Settings}}
	err := s.copyFrom(ctx, p)
	if err == nil {
		err = s.start(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("start a standby: %w", errors.Join(err, s.release()))
	}
	return s, nil
}

func (p *Postgres) copyFrom(ctx context.Context, primary *Postgres) error {
	if err := p.makeRunDir(); err != nil {
		return err
	}
	if err := p.makeDir(p.data); err != nil {
		return err
	}
	// -R writes the settings of a standby into the copy.
	return p.runProgram(ctx, "pg_basebackup", "-d", primary.URL(), "-D", p.data, "-R", "-X", "stream", "--checkpoint=fast", "--no-sync")
}

// Promote makes a standby a server of its own.
func (p *Postgres) Promote(ctx context.Context) error {
	if err := p.runProgram(ctx, "pg_ctl", "promote", "-w", "-D", p.data); err != nil {
		return fmt.Errorf("promote: %w", err)
	}
	return nil
}

// RestoreFrom copies another server's database by dump and restore, which loses the count of its transactions.
func (p *Postgres) RestoreFrom(ctx context.Context, other *Postgres) error {
	dump := filepath.Join(p.socketDir(), "dump")
	err := p.runProgram(ctx, "pg_dump", "-Fc", "-f", dump, "-d", other.URL())
	if err == nil {
		err = p.runProgram(ctx, "pg_restore", "--exit-on-error", "-d", p.URL(), dump)
	}
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	return nil
}
