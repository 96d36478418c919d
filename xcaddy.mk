# Builds the gateway with xcaddy: make -f xcaddy.mk [OUTPUT=path] [CADDY_VERSION=v2.x.y] [XCADDY=path] [WITH=…]
#
# The modules are those of "go build ./cmd/rekall-gateway". Use this form to add Caddy plugins of your own:
#
#   make -f xcaddy.mk WITH='--with github.com/caddy-dns/cloudflare'

MODULE        := github.com/rekall-ai/gateway
CADDY_VERSION ?= $(shell go list -m -f '{{.Version}}' github.com/caddyserver/caddy/v2)
XCADDY        ?= go tool -modfile=.ci/tools/go.mod xcaddy
OUTPUT        ?= rekall-gateway
WITH          ?=

# The package is named with a version and replaced as if it were a module of its own, and so is the module: without the
# first, "go get" asks the module proxy whether there is such a module, and a proxy may refuse to say.
SOURCE = --with $(MODULE)/caddymodule@v0.0.0=$(CURDIR) --replace $(MODULE)@v0.0.0=$(CURDIR)

.PHONY: build
build:
	@command -v go >/dev/null || { echo "xcaddy.mk: there is no go: install it from https://go.dev/dl" >&2; exit 1; }
	$(XCADDY) build $(CADDY_VERSION) $(SOURCE) $(WITH) --output $(OUTPUT)
