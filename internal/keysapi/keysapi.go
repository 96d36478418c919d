// Package keysapi is the JSON API of key management, /v1/api-keys. It reads requests strictly, has keyadmin do what they ask
// for, and answers in Rekall's envelopes. Who asks is for the server around it to find out. openapi.json is its description.
package keysapi

import (
	"context"
	_ "embed"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/ratelimit"
	"github.com/rekall-ai/gateway/internal/scoperule"
)

// Root is the path of the collection; all others begin with it.
const Root = "/v1/api-keys"

// Config of an API. GitHub, Refused and Answered may be left out.
type Config struct {
	Admin *keyadmin.Admin

	// Actor returns who asks. Its error is an *apierror.Error, or one of keyadmin's.
	Actor func(*http.Request) (keyadmin.Actor, error)

	// Client returns the address that a request comes from; the zero value if it is unknown. Reports of leaks, which
	// anyone may send, are limited by it.
	Client func(*http.Request) netip.Addr

	// GitHub checks what GitHub's secret scanning reports. Nil: its endpoint does not exist.
	GitHub *GitHub

	// Refused is told of each refusal before it is answered; nil: nobody is.
	Refused func(r *http.Request, requestID string, e *apierror.Error)

	// Answered is told of each request that was carried out, with nil, and of each that could not be though nobody refused it, with
	// why. Nil: nobody is.
	Answered func(r *http.Request, err error)

	Logger *zap.Logger
}

// API serves Root and all below it.
type API struct {
	Config
	mux     *http.ServeMux
	finders *ratelimit.Addresses // that report leaks
	sites   *ratelimit.Addresses // of finders
	reports *rate.Limiter        // of all their reports

	longReports chan struct{} // a place for each that is read
}

// New returns an API.
func New(config Config) *API {
	a := &API{
		Config: config, mux: http.NewServeMux(), finders: ratelimit.NewAddresses(leaksOfOne, leaksOfOne),
		sites:   ratelimit.NewAddresses(leaksOfSite, leaksOfSite),
		reports: rate.NewLimiter(rate.Every(time.Minute/leaksOfAll), leaksOfAll), longReports: make(chan struct{}, longReports),
	}
	if a.GitHub != nil {
		a.GitHub.failures.Logger = func() *zap.Logger { return a.Logger }
	}
	for path, endpoints := range a.routes() {
		a.mux.Handle(path, resource{a, endpoints})
	}
	a.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { a.refuse(w, r, errNoPath) })
	return a
}

// endpoint answers a request for one path with one method.
type endpoint func(*http.Request) (answer, error)

// routes are all paths and methods. HEAD goes where GET does.
func (a *API) routes() map[string]map[string]endpoint {
	const key = Root + "/{id}"
	routes := map[string]map[string]endpoint{
		Root:                   {"GET": a.managed(a.long(a.list)), "POST": a.managed(a.create)},
		Root + "/audit":        {"GET": a.managed(a.long(a.audit))},
		Root + "/leaked":       {"POST": a.leaked},
		Root + "/openapi.json": {"GET": describe},
		key:                    {"GET": a.managed(a.get), "PATCH": a.managed(a.rename), "DELETE": a.managed(a.revoke)},
		key + "/revoke":        {"POST": a.managed(a.revoke)},
		key + "/rotate":        {"POST": a.managed(a.rotate)},
		key + "/rotate/undo":   {"POST": a.managed(a.undoRotation)},
		key + "/usage":         {"GET": a.managed(a.long(a.usage))},
		key + "/audit":         {"GET": a.managed(a.long(a.auditOfKey))},
	}
	if a.GitHub != nil {
		routes[Root+"/leaked/github"] = map[string]endpoint{"POST": a.leakedOnGitHub}
	}
	return routes
}

// managing answers a request of somebody who may manage keys.
type managing func(*http.Request, keyadmin.Actor) (answer, error)

// managed is an endpoint for those who may manage keys. Who asks is known before anything of the request is read.
func (a *API) managed(do managing) endpoint {
	return func(r *http.Request) (answer, error) {
		actor, err := a.Actor(r)
		if err != nil {
			return answer{}, err
		}
		return do(r, actor)
	}
}

// long has an answer that may be long wait for its turn, which ends when it is sent.
func (a *API) long(do managing) managing {
	return func(r *http.Request, actor keyadmin.Actor) (made answer, err error) {
		end, err := a.Admin.TurnToAnswer(r.Context(), actor)
		if err != nil {
			return answer{}, err
		}
		defer func() {
			if made.sent == nil { // which whoever sends it tells
				end()
			}
		}()
		if made, err = do(r, actor); err == nil {
			made.sent = end
		}
		return made, err
	}
}

// ServeHTTP answers any request, also for paths that do not exist.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set(requestID, apierror.NewRequestID())
	// The mux would redirect what is not canonical; a redirect invites to send the key again.
	if !scoperule.Canonical(r.URL.EscapedPath()) {
		a.refuse(w, r, apierror.Of(apikey.PathInvalid))
		return
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(keyadmin.ReadWithin)) // where that cannot be set, the server's holds
	ctx, cancel := context.WithTimeout(r.Context(), keyadmin.AnswerWithin)
	defer cancel()
	a.mux.ServeHTTP(w, r.WithContext(ctx))
}

// resource is a path and what can be done there.
type resource struct {
	api       *API
	endpoints map[string]endpoint
}

func (res resource) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	do, ok := res.endpoints[method]
	if !ok {
		w.Header().Set("Allow", res.allowed())
		res.api.refuse(w, r, errMethod)
		return
	}
	answer, err := do(r)
	if err != nil {
		res.api.refuse(w, r, err)
		return
	}
	if answer.sent != nil {
		defer answer.sent()
	}
	res.api.answered(r, nil)
	answer.write(w)
}

func (res resource) allowed() string {
	methods := slices.Collect(maps.Keys(res.endpoints))
	if _, ok := res.endpoints[http.MethodGet]; ok {
		methods = append(methods, http.MethodHead)
	}
	slices.Sort(methods)
	return strings.Join(methods, ", ")
}

//go:embed openapi.json
var description []byte

// describe answers with the OpenAPI document. It needs no key: it is the same for all.
func describe(*http.Request) (answer, error) {
	return answer{status: http.StatusOK, raw: description}, nil
}
