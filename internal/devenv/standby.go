package devenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
