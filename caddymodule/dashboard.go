package caddymodule

import (
	"net/http"
	"strings"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/credential"
	"github.com/rekall-ai/gateway/internal/dashboard"
	"github.com/rekall-ai/gateway/internal/keyadmin"
)

// visitor is the person whom Caddy has authenticated in front of the dashboard. A key in a header is for programs, which
// have the API: in a browser it would act for whoever's page sent the request.
func (k *Keys) visitor(r *http.Request) (keyadmin.Actor, error) {
	if _, authenticated := k.person(r); !authenticated {
		credential.Take(r)
		return keyadmin.Actor{}, dashboard.ErrNobody
	}
	return k.actor(r)
}

// signIn is who holds a key that was typed into the dashboard. It is looked for like any other: a flood of keys that do not
// exist costs the database no more here.
func (k *Keys) signIn(r *http.Request, key string) (keyadmin.Actor, error) {
	key = strings.TrimSpace(key) // what was copied along with it
	environment, err := apikey.Parse(key)
	if err != nil {
		return keyadmin.Actor{}, k.refusal(r, apikey.Malformed, new(credential.Credential))
	}
	return k.holder(r, &credential.Credential{Kind: credential.Key, Environment: environment, Digest: apikey.Hash(key)})
}

// secure reports whether a browser used TLS: to Caddy, or as a trusted proxy says that ends it in front.
func secure(r *http.Request) bool {
	if trusted, _ := caddyhttp.GetVar(r.Context(), caddyhttp.TrustedProxyVarKey).(bool); !trusted || r.TLS != nil {
		return r.TLS != nil
	}
	scheme, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Proto"), ",") // the first of several proxies
	return strings.EqualFold(strings.TrimSpace(scheme), "https")
}
