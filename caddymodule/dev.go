package caddymodule

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/spf13/cobra"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/command"
	"github.com/rekall-ai/gateway/internal/dashboard"
	"github.com/rekall-ai/gateway/internal/devenv"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func init() {
	register(command.Command{
		Name:  "dev",
		Usage: "[--listen <address>] [--production <url>] [--sandbox <url>] [--data <dir>] [--database <url>]",
		Short: "Runs the gateway with everything it needs, to try it",
		Long: "Starts a private Postgres, makes a production key, a sandbox key and one for the dashboard, starts two demo backends that echo what they receive, " +
			"and the gateway in front of them, on loopback and without TLS. Ctrl-C stops all and leaves nothing behind, but for what is in --data, and in --database: " +
			"the schema, and three keys of the account demo that do not expire, one of which manages keys.",
		Add: func(cmd *cobra.Command) {
			cmd.Flags().String("listen", "127.0.0.1:8080", "Address of the gateway")
			cmd.Flags().String("production", "", "URL of your own production backend (default: a demo backend)")
			cmd.Flags().String("sandbox", "", "URL of your own sandbox backend (default: a demo backend)")
			cmd.Flags().String("data", "", "Directory that keeps the database between runs (default: a temporary one)")
			cmd.Flags().String("database", "", "URL of your own Postgres (default: a private one)")
		},
		Do: func(ctx context.Context, cmd *cobra.Command, _ []string) error {
			if err := command.NotEmpty(cmd, "production", "sandbox", "data", "database"); err != nil {
				return err
			}
			d := dev{out: cmd.OutOrStdout()}
			d.listen, _ = cmd.Flags().GetString("listen")
			d.production, _ = cmd.Flags().GetString("production")
			d.sandbox, _ = cmd.Flags().GetString("sandbox")
			d.data, _ = cmd.Flags().GetString("data")
			d.database, _ = cmd.Flags().GetString("database")
			return d.run(ctx)
		},
	})
}

// dev is one run of the dev command.
type dev struct {
	out                                       io.Writer
	listen, production, sandbox               string
	data, database                            string
	databaseNote, productionNote, sandboxNote string
	stops                                     []func(context.Context) error // in the order of starting
}

// demoScopes leave out the delete scopes, so that a 403 can be shown.
var demoScopes = []string{"memories:read", "memories:write"}

func (d *dev) run(ctx context.Context) (err error) {
	if err := d.check(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	keys, err := d.start(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil // interrupted while starting
		}
		return err
	}
	d.explain(keys)
	<-ctx.Done()
	return nil
}

// check refuses unusable flags before anything is started.
func (d *dev) check() error {
	host, port, err := net.SplitHostPort(d.listen)
	if err != nil || port == "" {
		return fmt.Errorf("--listen %q is not an address: write it as 127.0.0.1:8080", d.listen)
	}
	if host == "" {
		d.listen = net.JoinHostPort("127.0.0.1", port) // keys travel without TLS here
	}
	for flag, backend := range map[string]*string{"--production": &d.production, "--sandbox": &d.sandbox} {
		if *backend == "" {
			continue // a demo backend is started
		}
		if *backend, err = backendURL(*backend); err != nil {
			return fmt.Errorf("%s %w", flag, err)
		}
	}
	if d.data != "" && d.database != "" {
		return errors.New("--data and --database exclude each other: the first keeps a private Postgres, the second uses yours")
	}
	// A taken port is the usual mistake; find it before a database is made.
	listener, err := net.Listen("tcp", d.listen)
	if err != nil {
		return fmt.Errorf("cannot listen on %s, choose another with --listen: %w", d.listen, err)
	}
	// Caddy knows no names of ports, and what is printed needs the one that port 0 has become.
	host, _, _ = net.SplitHostPort(d.listen)
	_, port, _ = net.SplitHostPort(listener.Addr().String())
	d.listen = net.JoinHostPort(host, port)
	return listener.Close()
}

// backendURL is a URL as Caddy takes it for a backend, which it does not with a slash at its end.
func backendURL(text string) (string, error) {
	u, err := url.Parse(strings.TrimSuffix(text, "/"))
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || *u != (url.URL{Scheme: u.Scheme, Host: u.Host}) {
		return "", fmt.Errorf("%q is not the URL of a backend: write it as http://127.0.0.1:3000", text)
	}
	if u.Scheme == "http" && u.Port() == "443" || u.Scheme == "https" && u.Port() == "80" {
		return "", fmt.Errorf("%q has the port of the other scheme: write https with 443, http with 80, or use another port", text)
	}
	if _, err := strconv.ParseUint(cmp.Or(u.Port(), "80"), 10, 16); err != nil {
		return "", fmt.Errorf("%q has a port that does not exist: the highest is 65535", text)
	}
	return u.String(), nil
}

// devKeys are the keys of one run.
type devKeys struct{ production, sandbox, manager keyadmin.Key }

func (d *dev) start(ctx context.Context) (keys devKeys, err error) {
	if err = d.startDatabase(ctx); err != nil {
		return
	}
	if _, _, err = keystore.Migrate(ctx, d.database); err != nil {
		return
	}
	if keys, err = d.createKeys(ctx); err != nil {
		return
	}
	d.productionNote, d.sandboxNote = "yours", "yours"
	if d.production == "" {
		if d.production, err = d.startBackend(ctx, "production"); err != nil {
			return
		}
		d.productionNote = "demo backend, echoes what it receives"
	}
	if d.sandbox == "" {
		if d.sandbox, err = d.startBackend(ctx, "sandbox"); err != nil {
			return
		}
		d.sandboxNote = "demo backend, echoes what it receives"
	}
	err = d.startGateway()
	return
}

func (d *dev) startDatabase(ctx context.Context) error {
	if d.database != "" {
		d.databaseNote = "yours"
		return nil
	}
	postgres, err := devenv.StartPostgres(ctx, devenv.PostgresOptions{Dir: d.data})
	if err != nil {
		return err
	}
	d.stops = append(d.stops, postgres.Stop)
	d.database, d.databaseNote = postgres.URL(), "private, gone after Ctrl-C"
	if d.data != "" {
		d.databaseNote = "kept in " + d.data
	}
	return nil
}

func (d *dev) createKeys(ctx context.Context) (keys devKeys, err error) {
	store, err := keystore.Open(d.database, keystore.Options{ApplicationName: "rekall-gateway dev"})
	if err != nil {
		return
	}
	defer store.Close()
	admin := keyadmin.New(store)
	for _, one := range []struct {
		into              *keyadmin.Key
		name, environment string
		scopes            []string
	}{
		{&keys.production, "Demo production", "production", demoScopes},
		{&keys.sandbox, "Demo sandbox", "sandbox", demoScopes},
		{&keys.manager, "Demo dashboard", "production", apikey.ScopeNames()},
	} {
		request := keyadmin.CreateRequest{
			Name: one.name, Account: "demo", Environment: one.environment, Scopes: one.scopes, ManageKeys: one.into == &keys.manager,
		}
		if *one.into, _, err = admin.Create(ctx, keyadmin.Operator("dev"), request); err != nil {
			return
		}
	}
	return
}

func (d *dev) startBackend(ctx context.Context, name string) (string, error) {
	backend, err := devenv.StartBackend(ctx, name, "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	d.stops = append(d.stops, backend.Stop)
	return backend.URL(), nil
}

// startGateway runs Caddy in this process, with a configuration like the one in Caddyfile.example but for TLS.
func (d *dev) startGateway() error {
	storage, err := os.MkdirTemp("", "rekall-dev-")
	if err != nil {
		return fmt.Errorf("make a storage directory: %w", err)
	}
	d.stops = append(d.stops, func(context.Context) error { return os.RemoveAll(storage) })
	// Caddy notes its instance's id below this folder.
	if err := errors.Join(os.Setenv("XDG_DATA_HOME", storage), os.Setenv(keystore.DatabaseVariable, d.database)); err != nil {
		return fmt.Errorf("configure the gateway: %w", err)
	}
	host, port, _ := net.SplitHostPort(d.listen)
	caddyfile := fmt.Sprintf(`{
	admin off
	persist_config off
	storage file_system %[1]q
	log {
		level WARN
		exclude admin
	}
	servers {
		protocols h1
	}
	rekall {
		database {env.REKALL_DATABASE_URL}
	}
}

http://:%[2]s {
	bind %[3]s
	rekall_keys
	rekall_gateway {
		production {
			reverse_proxy %[4]s {
				header_up Host {upstream_hostport}
			}
		}
		sandbox {
			reverse_proxy %[5]s {
				header_up Host {upstream_hostport}
			}
		}
	}
}
`, filepath.ToSlash(storage), port, host, d.production, d.sandbox)
	config, _, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(caddyfile), map[string]any{"filename": "dev"})
	if err != nil {
		return fmt.Errorf("configure the gateway: %w", err)
	}
	if err := caddy.Load(config, true); err != nil {
		return fmt.Errorf("start the gateway: %w", err)
	}
	d.stops = append(d.stops, func(context.Context) error {
		defer closeAll() // while there is a database for what they have counted
		return caddy.Stop()
	})
	return nil
}

// stop undoes the starts, last first.
func (d *dev) stop() error {
	const stopTimeout = 15 * time.Second
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	var errs []error
	for _, stop := range slices.Backward(d.stops) {
		errs = append(errs, stop(ctx))
	}
	return errors.Join(errs...)
}

func (d *dev) explain(keys devKeys) {
	self, err := os.Executable()
	if err != nil {
		self = "rekall-gateway"
	}
	base := "http://" + d.listen
	fmt.Fprintf(d.out, `Rekall gateway, for development

  gateway          %[1]s
  production       %[2]s (%[3]s)
  sandbox          %[4]s (%[5]s)
  database         %[6]s (%[7]s)

  production key   %[8]s
  sandbox key      %[9]s

  dashboard        %[1]s%[12]s
  sign in with     %[13]s

Allowed, to production:
  curl -i %[1]s/v1/memories -H 'Authorization: Bearer %[8]s'

Allowed, to the sandbox:
  curl -i %[1]s/v1/memories -H 'x-api-key: %[9]s'

401, no key:
  curl -i %[1]s/v1/memories

403, the key lacks memories:delete:
  curl -i -X DELETE %[1]s/v1/memories/mem_1 -H 'Authorization: Bearer %[8]s'

Revoke the production key, then try the first line again (401):
  '%[10]s' keys revoke %[11]s --database '%[6]s'

Ready. Ctrl-C stops everything.
`, base, d.production, d.productionNote, d.sandbox, d.sandboxNote, d.database, d.databaseNote,
		keys.production.Key.Reveal(), keys.sandbox.Key.Reveal(), self, keys.production.ID, dashboard.Root, keys.manager.Key.Reveal())
}
