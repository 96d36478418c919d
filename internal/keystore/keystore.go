// Package keystore reads and writes keys in Postgres: single rows and the change feed for the cache, the statements of key
// administration, and the schema. It knows nothing of caches and sees no key, only digests.
package keystore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// DatabaseVariable is the environment variable that names the database where neither the configuration nor the command line does.
const DatabaseVariable = "REKALL_DATABASE_URL"

// ErrNotMigrated says that the database lacks tables, columns or functions that this binary needs.
var ErrNotMigrated = errors.New(`database has no schema rekall, or an older one: run "rekall-gateway migrate"`)

// What to do where the database user lacks a right. Postgres's own words follow, which name the table.
var (
	errNotEdge = errors.New(`database user lacks a right: make it a member of the role of "rekall-gateway migrate --edge-role", ` +
		`and run that again after an upgrade`)
	errNotAdmin = errors.New(`database user lacks a right: make it a member of the role of "rekall-gateway migrate --admin-role", ` +
		`and run that again after an upgrade`)
	errNotOwner = errors.New("database user lacks a right: migrate as the owner of the schema, or as a user that may create schemas and roles")
)

// errBadURL replaces pgx's errors, which quote the URL and mask passwords on a best-effort basis only.
var errBadURL = errors.New("database URL is not usable: write it as postgres://user:password@host:5432/database, " +
	"percent-encode special characters, and check the certificate files it names")

const (
	defaultMaxConns = 4
	defaultName     = "rekall-gateway"

	// connLifetimeJitter is the most that is added to the hour that a connection lives. A fleet connects in the same second after
	// Postgres has restarted, and would reconnect in the same second of each hour.
	connLifetimeJitter = 20 * time.Minute

	// connectTimeout leaves time for the statement in the second that a request has.
	connectTimeout = 800 * time.Millisecond
)

// Options of Open. The zero value is ready for an edge.
type Options struct {
	MaxConns        int32  // connections at most, besides the one that Listen makes; default 4
	ApplicationName string // as pg_stat_activity shows it, if the URL names none; default "rekall-gateway"
	Instance        string // of the edge whose reports Snapshot looks for; default none
	PlanOnce        bool   // statements are planned once for each connection, not for each call with its arguments; default false

	// ConnectTimeout is for making a connection, if the URL names none; default 800 ms, which is what an edge can wait. From far
	// away it takes longer: six times there and back, with TLS and a password.
	ConnectTimeout time.Duration

	// Asked is told of each call that is about to ask Postgres, by its context; nil: nobody is.
	Asked func(context.Context)
}

// Store is a pool of connections to the Postgres that holds the keys. Its methods may be called concurrently.
type Store struct {
	Reader
	pool     *pgxpool.Pool
	instance string
}

// Open returns a store that connects when it is first used. url is a Postgres URL or connection string; a connect_timeout
// in it replaces that of the options, and behind PgBouncer's transaction pooling it needs
// default_query_exec_mode=exec. Errors, here and later, show neither url nor the password in it.
func Open(url string, options Options) (*Store, error) {
	config, err := parse(url, cmp.Or(options.ConnectTimeout, connectTimeout))
	if err != nil {
		return nil, err
	}
	config.MaxConns, config.MinConns, config.MinIdleConns = cmp.Or(options.MaxConns, defaultMaxConns), 0, 0
	config.MaxConnLifetimeJitter = cmp.Or(config.MaxConnLifetimeJitter, connLifetimeJitter)
	params := config.ConnConfig.RuntimeParams
	params["application_name"] = cmp.Or(params["application_name"], options.ApplicationName, defaultName)
	// Whatever the defaults of the database or the role are: pgx reads no others. PgBouncer keeps both for each of its clients, and sets
	// what is spelt otherwise than Postgres reports it before each transaction.
	params["client_encoding"], params["datestyle"] = cmp.Or(params["client_encoding"], "UTF8"), cmp.Or(params["datestyle"], "ISO, MDY")
	boundCleanup(config)
	config.BeforeConnect = readFilesAnew(url)
	if options.Asked != nil {
		config.ConnConfig.Tracer = asked(options.Asked)
	}
	// Behind a pooler that gives each statement another connection nothing can be planned ahead.
	if options.PlanOnce && config.ConnConfig.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement {
		config.AfterConnect = planOnce
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	return &Store{Reader: Reader{pool}, pool: pool, instance: options.Instance}, nil
}

// planOnce makes Postgres keep the plans of a connection's statements. To plan the feed anew, which it would prefer, takes three
// times as long as to read that nothing has changed. A plan that was made while the table was small must not read all of it when it
// has grown. Nor may it memoize limits, since each key comes once: that takes longer than to look for them.
func planOnce(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout) // nobody else's bounds the making of a connection
	defer cancel()
	// Not parameters of the connection's start, which PgBouncer refuses.
	_, err := conn.Exec(ctx, "set plan_cache_mode = force_generic_plan; set jit = off; set enable_seqscan = off; set enable_memoize = off")
	return err
}

// readFilesAnew has each connection use the certificates and the password file that the URL names as they are then: they are replaced
// while a gateway runs, and a reload of the same URL goes on with the same store. While one cannot be read, such as a half-written one,
// what was read at first is used.
func readFilesAnew(url string) func(context.Context, *pgx.ConnConfig) error {
	return func(_ context.Context, conn *pgx.ConnConfig) error {
		if anew, err := pgx.ParseConfig(url); err == nil {
			conn.Password, conn.TLSConfig, conn.Fallbacks = cmp.Or(anew.Password, conn.Password), anew.TLSConfig, anew.Fallbacks
		}
		return nil
	}
}

// asked is called for each connection that is asked for, even if none is free.
type asked func(context.Context)

func (a asked) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	a(ctx)
	return ctx
}

func (asked) TraceAcquireEnd(context.Context, *pgxpool.Pool, pgxpool.TraceAcquireEndData) {}

// A pool takes no tracer but one of statements.
func (asked) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}

func (asked) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// parse reads a database URL. Nothing of it may stand in the error.
func parse(url string, defaultConnectTimeout time.Duration) (*pgxpool.Config, error) {
	if url == "" { // pgx would connect to whatever listens on this machine
		return nil, errBadURL
	}
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, errBadURL
	}
	conn := config.ConnConfig
	// An unescaped @ in the password makes the rest of it part of the host or the database name, which errors of
	// connecting do show. An abstract Unix socket begins with @.
	if strings.LastIndex(conn.Host, "@") > 0 || strings.Contains(conn.Database, "@") {
		return nil, errBadURL
	}
	if conn.ConnectTimeout == 0 {
		conn.ConnectTimeout = defaultConnectTimeout
	}
	return config, nil
}

// Close closes all connections, when the calls in flight have returned.
func (s *Store) Close() { s.pool.Close() }

// failed wraps an error of pgx with what was being done to manage keys.
func failed(doing string, err error) error { return failedAs(errNotAdmin, doing, err) }

// failedAtEdge is failed for what gateways do.
func failedAtEdge(doing string, err error) error { return failedAs(errNotEdge, doing, err) }

// SQLSTATEs.
const (
	insufficientPrivilege = "42501"
	lockNotAvailable      = "55P03" // lock_timeout has ended the statement
	deadlockDetected      = "40P01"
)

func failedAs(notGranted error, doing string, err error) error {
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch pgErr.Code {
		case "42P01", "42703", "42883", "3F000": // undefined table, column, function, schema
			return fmt.Errorf("%s: %w (SQLSTATE %s)", doing, ErrNotMigrated, pgErr.Code)
		case insufficientPrivilege:
			return fmt.Errorf("%s: %w: %w", doing, notGranted, err)
		}
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		err = oneLine{err}
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// hasState reports whether an error is Postgres's with that SQLSTATE.
func hasState(err error, state string) bool {
	pgErr, ok := errors.AsType[*pgconn.PgError](err)
	return ok && pgErr.Code == state
}

// byOwner adds to the error of a migration who may do what was denied.
func byOwner(err error) error {
	if hasState(err, insufficientPrivilege) {
		return fmt.Errorf("%w: %w", errNotOwner, err)
	}
	return err
}

// oneLine is an error of connecting, which has a line for every address that was tried.
type oneLine struct{ error }

func (e oneLine) Error() string { return strings.Join(strings.Fields(e.error.Error()), " ") }

func (e oneLine) Unwrap() error { return e.error }
