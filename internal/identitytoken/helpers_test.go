package identitytoken

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/apikey"
	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keystore"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// shelf is a store in memory: no connection can be made where time is fake. What Postgres does with the same calls is tested
// beside the statements and in the end-to-end tests.
type shelf struct {
	mu        sync.Mutex
	rows      map[string]shelved
	down      bool
	unread    bool          // reads fail
	hanging   chan struct{} // reads wait until it is closed
	publishes int
	reads     int
}

type shelved struct {
	key       keystore.SigningKey
	expiresAt time.Time
}

var errDown = errors.New("down")

func newShelf() *shelf { return &shelf{rows: map[string]shelved{}} }

func (s *shelf) PublishSigningKeys(_ context.Context, _ string, keys []keystore.SigningKey, lease time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.publishes++
	if s.down {
		return errDown
	}
	for _, k := range keys {
		s.rows[k.ID] = shelved{k, time.Now().Add(lease)}
	}
	return nil
}

func (s *shelf) SigningKeys(ctx context.Context) ([]keystore.SigningKey, error) {
	s.mu.Lock()
	s.reads++
	hanging := s.hanging
	s.mu.Unlock()
	if hanging != nil {
		select {
		case <-hanging:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down || s.unread {
		return nil, errDown
	}
	maps.DeleteFunc(s.rows, func(_ string, row shelved) bool { return !row.expiresAt.After(time.Now()) })
	var keys []keystore.SigningKey
	for _, id := range slices.Sorted(maps.Keys(s.rows)) {
		keys = append(keys, s.rows[id].key)
	}
	return keys, nil
}

func (s *shelf) set(down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = down
}

func (s *shelf) hang() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hanging = make(chan struct{})
}

// published returns until when a key is published; zero: it is not.
func (s *shelf) published(id string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rows[id].expiresAt
}

func (s *shelf) counts() (publishes, reads int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.publishes, s.reads
}

// run runs a signer until the test ends.
func run(t testing.TB, store Store, schedule schedule) *Signer {
	t.Helper()
	s := newSigner(store, apikey.RandomText(22), zap.NewNop, schedule)
	start(t, s)
	return s
}

func start(t testing.TB, s *Signer) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

func issuer(t testing.TB, signer *Signer, options Options) *Issuer {
	t.Helper()
	i, err := NewIssuer(signer, 1000, options)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func record() *apikey.Record {
	r := &apikey.Record{
		ID: "key_" + apikey.RandomText(22), Account: "acme & söhne", Environment: apikey.Sandbox,
		Scopes: apikey.MemoriesRead | apikey.HivesWrite,
	}
	rand.Read(r.Digest[:])
	return r
}

func mustToken(t testing.TB, i *Issuer, r *apikey.Record, now time.Time) string {
	t.Helper()
	text, err := i.Token(context.Background(), r, now)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func mustJWKS(t testing.TB, s *Signer) []byte {
	t.Helper()
	document, err := s.JWKS(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return document
}

// verify checks a token as a backend does, with a library that has nothing in common with the one that signed.
func verify(t testing.TB, text string, document []byte, options ...jwt.ParserOption) jwt.MapClaims {
	t.Helper()
	claims, err := tryVerify(text, document, options...)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return claims
}

func tryVerify(text string, document []byte, options ...jwt.ParserOption) (jwt.MapClaims, error) {
	set, err := keyfunc.NewJWKSetJSON(document)
	if err != nil {
		return nil, err
	}
	return verifyWith(set.Keyfunc, text, options...)
}

func verifyWith(keys jwt.Keyfunc, text string, options ...jwt.ParserOption) (jwt.MapClaims, error) {
	options = append(options, jwt.WithValidMethods([]string{"EdDSA"}), jwt.WithExpirationRequired(), jwt.WithIssuedAt())
	claims := jwt.MapClaims{}
	_, err := jwt.ParseWithClaims(text, claims, keys, options...)
	return claims, err
}

func keyID(t testing.TB, text string) string {
	t.Helper()
	parsed, _, err := jwt.NewParser().ParseUnverified(text, jwt.MapClaims{})
	if err != nil {
		t.Fatal(err)
	}
	return parsed.Header["kid"].(string)
}
