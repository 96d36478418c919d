// Package devenv runs the parts around the gateway on one machine: a private Postgres, a private Redis and demo backends. The
// dev command and the tests use it.
package devenv
