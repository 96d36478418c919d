package caddymodule

import (
	"net/http"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/identitytoken"
	"github.com/rekall-ai/gateway/internal/keycache"
)

func init() { caddy.RegisterModule(JWKS{}) }

// IdentityToken is what the tokens of a gateway say besides the key that allowed the request.
type IdentityToken struct {
	// The iss claim. Default: rekall-gateway.
	Issuer string `json:"issuer,omitempty"`

	// The aud claim: who is to accept the tokens. Default: none.
	Audience []string `json:"audience,omitempty"`

	// How long a token is valid. One may be handed out for a minute after it was signed. Between 2m and 1h. Default: 5m.
	Lifetime caddy.Duration `json:"lifetime,omitempty"`
}

func (g *Gateway) provisionIdentityToken(app *App) error {
	if g.IdentityToken == nil {
		return nil
	}
	var err error
	g.issuer, err = identitytoken.NewIssuer(app.runtime.signer, app.runtime.tokens, identitytoken.Options{
		Issuer: g.IdentityToken.Issuer, Audience: g.IdentityToken.Audience, Lifetime: time.Duration(g.IdentityToken.Lifetime),
	})
	app.issuers = append(app.issuers, g.issuer)
	return err
}

// signIdentity sets the token of an allowed request, where tokens are asked for.
func (x *exchange) signIdentity(found keycache.Found) error {
	if x.gateway.issuer == nil {
		return nil
	}
	var err error
	x.values[tokenValue], err = x.gateway.issuer.Token(&x.pass, found.Record, found.Now)
	return err
}

// JWKS answers with the public keys of all edges, by which backends verify identity tokens. It needs no key: the keys are
// public. Where Postgres is away it answers with those that it has.
type JWKS struct {
	signer *identitytoken.Signer
	logger *zap.Logger
}

// CaddyModule returns the Caddy module information.
func (JWKS) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.rekall_jwks", New: func() caddy.Module { return new(JWKS) }}
}

// Provision finds the signer and guards the server's door.
func (j *JWKS) Provision(ctx caddy.Context) error {
	app, err := app(ctx)
	if err != nil {
		return err
	}
	j.signer, j.logger = app.runtime.signer, ctx.Logger()
	return guardDoor(ctx)
}

var (
	jwksUnavailable = apierror.New(http.StatusServiceUnavailable, "JWKS_UNAVAILABLE", "The signing keys cannot be read right now. Try again shortly.")
	jwksMaxAge      = "public, max-age=" + strconv.Itoa(int(identitytoken.JWKSMaxAge.Seconds()))
)

func (j *JWKS) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	if !onlyReads(w, r) {
		return nil
	}
	document, err := j.signer.JWKS(r.Context())
	if err != nil {
		j.logger.Debug("key set cannot be served", zap.Error(err))
		refuse(w, r, jwksUnavailable)
		return nil
	}
	h := w.Header()
	h.Set("Content-Type", "application/jwk-set+json")
	h.Set("Content-Length", strconv.Itoa(len(document)))
	h.Set("Cache-Control", jwksMaxAge)
	h.Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(document) // the client may be gone
	return nil
}

var (
	_ caddy.Provisioner           = (*JWKS)(nil)
	_ caddyhttp.MiddlewareHandler = (*JWKS)(nil)
)
