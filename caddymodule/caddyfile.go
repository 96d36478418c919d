package caddymodule

import (
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/internal/keysapi"
)

func init() {
	httpcaddyfile.RegisterGlobalOption("rekall", parseApp)
	httpcaddyfile.RegisterHandlerDirective("rekall_gateway", parseGateway)
	httpcaddyfile.RegisterDirectiveOrder("rekall_gateway", httpcaddyfile.Before, "reverse_proxy")
	httpcaddyfile.RegisterHandlerDirective("rekall_keys", parseKeys)
	httpcaddyfile.RegisterDirectiveOrder("rekall_keys", httpcaddyfile.Before, "respond")
	httpcaddyfile.RegisterHandlerDirective("rekall_jwks", parseBare("rekall_jwks", func() caddyhttp.MiddlewareHandler { return new(JWKS) }))
	// Before the gateway, which nothing comes after.
	httpcaddyfile.RegisterDirectiveOrder("rekall_jwks", httpcaddyfile.Before, "respond")
	httpcaddyfile.RegisterHandlerDirective("rekall_health", parseBare("rekall_health", func() caddyhttp.MiddlewareHandler { return new(Health) }))
	// Before "handle", which would send the probes to a gateway that takes all requests.
	httpcaddyfile.RegisterDirectiveOrder("rekall_health", httpcaddyfile.Before, "handle")
	httpcaddyfile.RegisterHandlerDirective("rekall_tls_only", parseBare("rekall_tls_only", func() caddyhttp.MiddlewareHandler { return new(TLSOnly) }))
	// Before all that could answer or redirect: a redirect invites the client to send its key in the clear again.
	httpcaddyfile.RegisterDirectiveOrder("rekall_tls_only", httpcaddyfile.Before, "redir")
}

// parseApp reads the global option:
//
//	rekall {
//		database      <url>
//		read_database <url>
//		refresh       <duration>
//		max_staleness <duration>
//		cache_size    <keys>
//		warm          <keys>
//		listen        on|off
//		edge          <name> [<region>]
//		canary
//		usage_flush      <duration>
//		usage_retention  <duration>
//		rate_limit_store <url>
//	}
func parseApp(d *caddyfile.Dispenser, existing any) (any, error) {
	d.Next() // an error says where it stands
	if existing != nil {
		return nil, d.Err("rekall stands twice in the global options: merge the two blocks")
	}
	app := new(App)
	if d.NextArg() {
		return nil, d.Err("rekall takes nothing beside its block: begin it with { on this line, and put each option on a line of its own")
	}
	seen := map[string]bool{}
	for d.NextBlock(0) {
		option := d.Val()
		if seen[option] {
			return nil, d.Errf("%s is given twice", option)
		}
		seen[option] = true
		if option == "canary" {
			if d.NextArg() {
				return nil, d.Errf(isSwitch, option)
			}
			app.Canary = true
			continue
		}
		if option == "edge" {
			args := d.RemainingArgs()
			if len(args) < 1 || len(args) > 2 || slices.Contains(args, "") { // an empty name would be the host's
				return nil, d.Err("edge takes a name and, if you like, a region: see that each {$VARIABLE} in them is set")
			}
			app.EdgeName = args[0]
			if len(args) == 2 {
				app.EdgeRegion = args[1]
			}
			continue
		}
		var value string
		values := d.RemainingArgs()
		if len(values) == 1 {
			value = values[0]
		}
		var err error
		switch option {
		case "database":
			app.Database = value
		case "read_database":
			app.ReadDatabase = value
		case "refresh":
			app.Refresh, err = parseDuration(value)
		case "max_staleness":
			app.MaxStaleness, err = parseDuration(value)
		case "cache_size":
			app.CacheSize, err = parseCount(value)
		case "warm":
			app.Warm, err = parseCount(value)
		case "usage_flush":
			app.UsageFlush, err = parseDuration(value)
		case "usage_retention":
			app.UsageRetention, err = parseDuration(value)
		case "rate_limit_store":
			app.RateLimitStore = value
		case "listen":
			if value != "on" && value != "off" {
				return nil, d.Err("listen must be on or off")
			}
			app.ListenOff = value == "off"
		default:
			return nil, d.Errf("unknown rekall option %q: use database, read_database, refresh, max_staleness, cache_size, warm, listen, edge, canary, usage_flush, usage_retention or rate_limit_store", option)
		}
		switch {
		case value == "": // after the option is known: the one of another block may take none
			return nil, d.Errf(takesOneValue, option)
		case err != nil:
			return nil, d.Errf("%s: %q is not usable: %v", option, value, err)
		}
	}
	return httpcaddyfile.App{Name: "rekall", Value: caddyconfig.JSON(app, nil)}, nil
}

// takesOneValue is what is said of an option without a value, or with several.
const takesOneValue = "%s takes one value: write exactly one, and see that each {$VARIABLE} in it is set"

// takesMatcher is what is said of a directive with something else before its block.
const takesMatcher = "%s takes a matcher, which is * or begins with / or @, and nothing else beside its block"

// isSwitch is what is said of an option that is on where it stands.
const isSwitch = "%s takes no value: write it alone, or leave it out to have it off"

var errNotPositive = errors.New("must be more than 0")

func parseDuration(s string) (caddy.Duration, error) {
	d, err := caddy.ParseDuration(s)
	if err != nil { // which has no weeks
		d, err = keyadmin.ParseDuration(s)
	}
	switch {
	case err != nil:
		return 0, errors.New("must be a duration, such as 30s, 1h30m, 90d or 2w")
	case d <= 0:
		return 0, errNotPositive
	}
	return caddy.Duration(d), nil
}

func parseCount(s string) (int, error) {
	n, err := strconv.Atoi(s)
	switch {
	case err != nil:
		return 0, errors.New("must be a whole number")
	case n <= 0:
		return 0, errNotPositive
	}
	return n, nil
}

// parseGateway reads the directive:
//
//	rekall_gateway [<matcher>] {
//		scope <scope> <method> <path>
//		scopes report_only
//		forward_credential
//		rate_limits
//		address_limit <requests per minute> [<burst>]
//		identity_token {
//			issuer   <name>
//			audience <names...>
//			lifetime <duration>
//		}
//		production {
//			<directives...>
//		}
//		sandbox {
//			<directives...>
//		}
//	}
func parseGateway(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	g := new(Gateway)
	h.Next()
	if h.NextArg() {
		return nil, h.Errf(takesMatcher, "rekall_gateway")
	}
	seen := map[string]bool{}
	for nesting := h.Nesting(); h.NextBlock(nesting); {
		option := h.Val()
		if seen[option] && option != "scope" {
			return nil, h.Errf("%s is given twice: merge the two", option)
		}
		seen[option] = true
		switch option {
		case "production", "sandbox":
			raw := &g.ProductionRaw
			if option == "sandbox" {
				raw = &g.SandboxRaw
			}
			segment := h.NewFromNextSegment()
			segment.Next()
			if beside := segment.RemainingArgs(); len(beside) > 0 {
				directive := strings.Join(beside, " ")
				if strings.ContainsAny(beside[0], ":./") { // it is an address: no directive's name has one of them
					directive = "reverse_proxy " + directive
				}
				return nil, h.Errf("%s takes a block and nothing beside it: put '%s' into its block", option, directive)
			}
			segment.Reset()
			handlers, err := httpcaddyfile.ParseSegmentAsSubroute(h.WithDispenser(segment))
			if err != nil {
				return nil, err
			}
			if block, ok := handlers.(*caddyhttp.Subroute); ok && len(block.Routes) == 0 { // its requests would all be answered 502
				return nil, h.Errf("%s is empty: give it a reverse_proxy, or leave it out", option)
			}
			*raw = caddyconfig.JSONModuleObject(handlers, "handler", "subroute", nil)
		case "scope":
			var rule ScopeRule
			if !h.AllArgs(&rule.Scope, &rule.Method, &rule.Path) {
				return nil, h.Err("scope takes three arguments: a scope, a method and a path, as in 'scope memories:read GET /v1/exports/*'")
			}
			g.ScopeRules = append(g.ScopeRules, rule)
			if _, err := g.ownRules(); err != nil { // here it has a line
				return nil, h.WrapErr(err)
			}
		case "scopes":
			var mode string
			if !h.AllArgs(&mode) || mode != "report_only" {
				return nil, h.Err("scopes takes one argument: report_only")
			}
			g.ScopesReportOnly = true
		case "forward_credential":
			if h.NextArg() {
				return nil, h.Errf(isSwitch, option)
			}
			g.ForwardCredential = true
		case "rate_limits":
			if h.NextArg() {
				return nil, h.Errf(isSwitch, option)
			}
			g.RateLimits = true
		case "address_limit":
			var err error
			if g.AddressLimit, err = parseAddressLimit(h); err != nil {
				return nil, err
			}
		case "identity_token":
			var err error
			if g.IdentityToken, err = parseIdentityToken(h); err != nil {
				return nil, err
			}
		default:
			return nil, h.Errf("unknown option %q: use production, sandbox, scope, scopes, forward_credential, rate_limits, address_limit or identity_token", option)
		}
	}
	if g.ProductionRaw == nil && g.SandboxRaw == nil {
		return nil, h.Err("rekall_gateway needs a production block, a sandbox block, or both")
	}
	return g, nil
}

func parseAddressLimit(h httpcaddyfile.Helper) (*AddressLimit, error) {
	const usage = "address_limit takes requests per minute and, if you like, a burst, as in 'address_limit 60 20'"
	args, limit := h.RemainingArgs(), new(AddressLimit)
	if len(args) < 1 || len(args) > 2 || h.NextBlock(h.Nesting()) {
		return nil, h.Err(usage)
	}
	for i, field := range []*int{&limit.PerMinute, &limit.Burst}[:len(args)] {
		n, err := strconv.Atoi(args[i])
		if err != nil || n < 1 || n > maxAddressRate {
			return nil, h.Errf("%s; %q is not a number from 1 to %d", usage, args[i], maxAddressRate)
		}
		*field = n
	}
	return limit, nil
}

func parseIdentityToken(h httpcaddyfile.Helper) (*IdentityToken, error) {
	if h.NextArg() {
		return nil, h.Err("identity_token takes no arguments: put issuer, audience and lifetime in a block")
	}
	token, seen := new(IdentityToken), map[string]bool{}
	for nesting := h.Nesting(); h.NextBlock(nesting); {
		option, values := h.Val(), h.RemainingArgs()
		if seen[option] {
			return nil, h.Errf("%s is given twice", option)
		}
		seen[option] = true
		switch {
		case option != "issuer" && option != "audience" && option != "lifetime":
			return nil, h.Errf("unknown identity_token option %q: use issuer, audience or lifetime", option)
		case option == "audience" && len(values) == 0:
			return nil, h.Errf("%s needs a value", option)
		case option != "audience" && (len(values) != 1 || values[0] == ""):
			return nil, h.Errf(takesOneValue, option)
		}
		switch option {
		case "issuer":
			token.Issuer = values[0]
		case "audience":
			token.Audience = values
		case "lifetime":
			var err error
			if token.Lifetime, err = parseDuration(values[0]); err != nil {
				return nil, h.Errf("lifetime: %q is not usable: %v", values[0], err)
			}
		}
	}
	return token, nil
}

// parseKeys reads the directive:
//
//	rekall_keys [<matcher>] {
//		account                <text with placeholders>
//		user                   <placeholder>
//		database               <url>
//		github_secret_scanning [<url>|<file>]
//		keys_per_day           <n>
//	}
func parseKeys(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	k := new(Keys)
	h.Next()
	if h.NextArg() {
		return nil, h.Errf(takesMatcher, "rekall_keys")
	}
	var keysPerDay string
	settings := map[string]*string{
		"account": &k.Account, "user": &k.User, "database": &k.Database, "github_secret_scanning": &k.GitHubSecretScanning, "keys_per_day": &keysPerDay,
	}
	for nesting := h.Nesting(); h.NextBlock(nesting); {
		option, values := h.Val(), h.RemainingArgs()
		setting, known := settings[option]
		switch {
		case !known:
			return nil, h.Errf("unknown option %q: use account, user, database, github_secret_scanning or keys_per_day", option)
		case *setting != "":
			return nil, h.Errf("%s is given twice", option)
		case len(values) == 0 && option == "github_secret_scanning":
			values = []string{keysapi.GitHubKeys}
		case len(values) != 1 || values[0] == "":
			return nil, h.Errf(takesOneValue, option)
		}
		*setting = values[0]
		if option == "keys_per_day" {
			var err error
			if k.KeysPerDay, err = strconv.Atoi(values[0]); err != nil || k.KeysPerDay < 1 || k.KeysPerDay > maxKeysPerDay {
				return nil, h.Errf("keys_per_day must be a whole number from 1 to %d", maxKeysPerDay)
			}
		}
	}
	return k, nil
}

// parseBare reads a directive that takes nothing.
func parseBare(directive string, handler func() caddyhttp.MiddlewareHandler) httpcaddyfile.UnmarshalHandlerFunc {
	return func(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		h.Next()
		if h.NextArg() || h.NextBlock(h.Nesting()) {
			return nil, h.Errf("%s takes no arguments and no block", directive)
		}
		return handler(), nil
	}
}
