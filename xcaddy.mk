# Builds the gateway with xcaddy: make -f xcaddy.mk [OUTPUT=path] [XCADDY=path] [CADDY_VERSION=v2.x.y]
#
# The result has the same modules as "go build ./cmd/rekall-gateway". Use this form to add Caddy plugins of your own:
# make -f xcaddy.mk WITH='--with github.com/caddy-dns/cloudflare'

MODULE        := github.com/rekall-ai/gateway
CADDY_VERSION ?= $(shell go list -m -f '{{.Version}}' github.com/caddyserver/caddy/v2)
XCADDY        ?= go tool -modfile=.ci/tools/go.mod xcaddy
OUTPUT        ?= rekall-gateway
WITH          ?=

.PHONY: build
build:
	@command -v go >/dev/null || { echo "go is not installed: see https://go.dev/dl"; exit 1; }
	# xcaddy needs a version even for a replaced module.
	$(XCADDY) build $(CADDY_VERSION) --with $(MODULE)@v0.0.0=$(CURDIR) $(WITH) --output $(OUTPUT)
