package keysapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apierror"
	"github.com/rekall-ai/gateway/internal/outage"
)

// GitHubKeys is where GitHub publishes the keys that its secret scanning signs with.
const GitHubKeys = "https://api.github.com/meta/public_keys/secret_scanning"

const (
	// gitHubMaxAge is how long published keys are used before they are read again.
	gitHubMaxAge = time.Hour

	// gitHubRetry is the time between two reads, so that a stranger who names unknown keys does not make us ask GitHub
	// each time.
	gitHubRetry = time.Minute

	// gitHubReadTimeout leaves time for the rest of the request.
	gitHubReadTimeout = 2 * time.Second

	maxGitHubKeys = 1 << 20 // bytes
)

var (
	errSignature = apierror.New(http.StatusForbidden, "SIGNATURE_INVALID",
		"The signature of the report is missing or wrong: only GitHub's secret scanning may send here.")
	errGitHubSource = errors.New("must be an https URL, or the path of a file")
)

// GitHub checks the signatures of GitHub's secret-scanning partner programme: ECDSA with P-256 and SHA-256 over the body.
type GitHub struct {
	source string
	isURL  bool
	now    func() time.Time

	failures outage.Failures

	mu      sync.Mutex
	reading outage.Kind
	keys    map[string]*ecdsa.PublicKey
	readAt  time.Time // of keys; zero: never
	triedAt time.Time // of the last read, good or bad
	err     error     // of the last read
}

// NewGitHub returns a GitHub that reads the public keys from an https URL (http only of this machine) or a file, in the
// format of GitHubKeys, when they are first needed and then every hour. A file must be there already.
func NewGitHub(source string) (*GitHub, error) {
	g := &GitHub{source: source, now: time.Now, reading: outage.Kind{
		Begins: "public keys of GitHub cannot be read", Over: "public keys of GitHub are read again", Level: zap.WarnLevel,
	}}
	u, err := url.Parse(source)
	switch {
	case source == "" || err != nil:
		return nil, errGitHubSource
	case u.Scheme == "https" && u.Host != "" || u.Scheme == "http" && loopback(u.Hostname()):
		g.isURL = true
	case u.Scheme != "":
		return nil, errGitHubSource
	default:
		if _, err := g.read(context.Background()); err != nil {
			return nil, fmt.Errorf("read GitHub's public keys: %w", err)
		}
	}
	return g, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// signature is what a request says of who has signed its body.
type signature struct {
	identifier string // of a published key
	der        []byte
}

func readSignature(h http.Header) (signature, error) {
	identifiers, signatures := h["Github-Public-Key-Identifier"], h["Github-Public-Key-Signature"]
	if len(identifiers) != 1 || len(signatures) != 1 {
		return signature{}, errSignature
	}
	der, err := base64.StdEncoding.DecodeString(signatures[0])
	if err != nil {
		return signature{}, errSignature
	}
	return signature{identifiers[0], der}, nil
}

// verify checks that the holder of a key has signed a body.
func (s signature) verify(key *ecdsa.PublicKey, body []byte) error {
	digest := sha256.Sum256(body)
	if !ecdsa.VerifyASN1(key, digest[:], s.der) {
		return errSignature
	}
	return nil
}

// key returns a published key. It reads them again if they are old or this one is not among them; if that fails it does
// with those that it has.
func (g *GitHub) key(ctx context.Context, identifier string) (*ecdsa.PublicKey, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.now()
	key, ok := g.keys[identifier]
	if ok && now.Sub(g.readAt) < gitHubMaxAge {
		return key, nil
	}
	if g.triedAt.IsZero() || now.Sub(g.triedAt) >= gitHubRetry {
		g.triedAt = now
		var keys map[string]*ecdsa.PublicKey
		if keys, g.err = g.read(ctx); g.err == nil {
			g.keys, g.readAt = keys, now
		}
		g.failures.Note(&g.reading, g.err)
		key, ok = g.keys[identifier]
	}
	switch {
	case ok:
		return key, nil
	case g.err != nil: // it may have been published since
		return nil, fmt.Errorf("read GitHub's public keys: %w", g.err)
	}
	return nil, errSignature
}

func (g *GitHub) read(ctx context.Context) (map[string]*ecdsa.PublicKey, error) {
	text, err := g.fetch(ctx)
	if err != nil {
		return nil, err
	}
	var published struct {
		PublicKeys []struct {
			Identifier string `json:"key_identifier"`
			Key        string `json:"key"`
		} `json:"public_keys"`
	}
	if err := json.Unmarshal(text, &published); err != nil {
		return nil, err
	}
	keys := map[string]*ecdsa.PublicKey{}
	for _, p := range published.PublicKeys {
		// Keys of other kinds may come to stand beside those of today.
		if key := parsePublicKey(p.Key); key != nil {
			keys[p.Identifier] = key
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("there is none of P-256 among them")
	}
	return keys, nil
}

func parsePublicKey(text string) *ecdsa.PublicKey {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil
	}
	return key
}

// noRedirects keeps the keys from coming from elsewhere than was configured.
var noRedirects = &http.Client{
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

func (g *GitHub) fetch(ctx context.Context) ([]byte, error) {
	if !g.isURL {
		return os.ReadFile(g.source)
	}
	// A stranger who goes away at once must not spoil the only read of this minute.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), gitHubReadTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.source, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := noRedirects.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", resp.StatusCode)
	}
	return io.ReadAll(io.LimitReader(resp.Body, maxGitHubKeys))
}
