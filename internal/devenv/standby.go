package devenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
)

// StartStandby copies the server and starts the copy as its hot standby, in a temporary directory.
func (p *Postgres) StartStandby(ctx context.Context) (_ *Postgres, err error) {
	s := &Postgres{bin: p.bin, credential: p.credential, temporary: true, password: p.password, settings: p.settings}
	if err = s.makeDir(""); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
		}
	}()
	// -R writes the settings of a standby into the copy.
	cmd := s.command(ctx, "pg_basebackup", "-d", p.URL(), "-D", s.data, "-R", "-X", "stream", "--checkpoint=fast", "--no-sync")
	if output, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("pg_basebackup: %w: %s", err, bytes.TrimSpace(output))
	}
	return s, s.start(ctx)
}

// Promote makes a standby a server of its own.
func (p *Postgres) Promote(ctx context.Context) error {
	if output, err := p.command(ctx, "pg_ctl", "promote", "-w", "-D", p.data).CombinedOutput(); err != nil {
		return fmt.Errorf("pg_ctl promote: %w: %s", err, bytes.TrimSpace(output))
	}
	return nil
}

// RestoreFrom copies another server's database by dump and restore, which loses the count of its transactions.
func (p *Postgres) RestoreFrom(ctx context.Context, other *Postgres) error {
	dump := filepath.Join(p.dir, "dump")
	for _, cmd := range []*exec.Cmd{
		p.command(ctx, "pg_dump", "-Fc", "-f", dump, "-d", other.URL()),
		p.command(ctx, "pg_restore", "--exit-on-error", "-d", p.URL(), dump),
	} {
		if output, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, bytes.TrimSpace(output))
		}
	}
	return nil
}
