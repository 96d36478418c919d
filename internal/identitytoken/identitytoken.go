// Package identitytoken proves to backends that a request came through the gateway: a short-lived JWT, signed with Ed25519,
// that says whose key allowed it.
//
// Each edge has private keys of its own, in memory only, and publishes the public ones in Postgres, from where every edge
// serves those of all as one JSON Web Key Set. Two rules leave no moment in which a good token cannot be verified:
//
//   - A key signs only while it is published, and for longer than its tokens live. The next key is published well before its
//     first signature, and the last one stays until its last token has expired.
//   - A key set is read after it was asked for, so it has the key that made somebody ask.
package identitytoken

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/rekall-ai/gateway/internal/apikey"
)

const (
	// defaultIssuer is the iss claim where none is configured.
	defaultIssuer = "rekall-gateway"

	// defaultLifetime is how long a token lives where nothing else is configured.
	defaultLifetime = 5 * time.Minute

	// minLifetime leaves a minute to a token that was signed a minute ago.
	minLifetime = 2 * time.Minute

	// maxLifetime bounds how long a token outlives the revocation of its key.
	maxLifetime = time.Hour

	// resignAfter is how long a token is handed out.
	resignAfter = time.Minute
)

// Options of an Issuer. The zero value stands for the defaults.
type Options struct {
	Issuer   string        // iss; default "rekall-gateway"
	Audience []string      // aud; default none
	Lifetime time.Duration // exp - iat; default 5 minutes
}

const shards = 64

// Issuer makes the tokens of one gateway and keeps them for a minute.
type Issuer struct {
	signer  *Signer
	options Options
	limit   int // slots in a shard
	shards  [shards]shard
}

// shard holds the tokens of some keys.
type shard struct {
	mu      sync.RWMutex
	slots   map[apikey.Digest]*slot
	sweptAt time.Time
}

// slot is the place of one key's token. Its lock is held while signing, so that requests at once sign once.
type slot struct {
	mu    sync.Mutex
	token atomic.Pointer[token]
}

// token is a signed token and what it was made from.
type token struct {
	text     string
	signedAt time.Time
	record   apikey.Record
}

// NewIssuer returns an Issuer that keeps about size tokens at most, of half a kilobyte to one each.
func NewIssuer(signer *Signer, size int, options Options) (*Issuer, error) {
	if options.Issuer == "" {
		options.Issuer = defaultIssuer
	}
	if options.Lifetime == 0 {
		options.Lifetime = defaultLifetime
	}
	if options.Lifetime < minLifetime || options.Lifetime > maxLifetime {
		return nil, fmt.Errorf("lifetime must be between %s and %s", short(minLifetime), short(maxLifetime))
	}
	if slices.Contains(options.Audience, "") {
		return nil, errors.New("audience must not be empty")
	}
	i := &Issuer{signer: signer, options: options, limit: (size+size/8)/shards + 1} // an eighth more than the share: shards fill unevenly
	for n := range i.shards {
		i.shards[n].slots = make(map[apikey.Digest]*slot)
	}
	return i, nil
}

// short writes whole minutes and hours as people do, "2m" for "2m0s".
func short(d time.Duration) string {
	return strings.TrimSuffix(strings.TrimSuffix(d.String(), "0s"), "0m")
}

// Ready reports whether tokens can be signed now.
func (i *Issuer) Ready() bool { return i.signer.signs(i.signer.active.Load(), i.options.Lifetime) }

// Token returns a token for a request that was allowed with that record at now, a reading of Postgres's clock, which all
// edges share. An error, within half a second, says that no backend could verify a token now.
func (i *Issuer) Token(ctx context.Context, r *apikey.Record, now time.Time) (string, error) {
	shard := &i.shards[r.Digest[30]%shards]
	shard.mu.RLock()
	s := shard.slots[r.Digest]
	shard.mu.RUnlock()
	if s != nil {
		if t := s.token.Load(); t.serves(r, now) {
			return t.text, nil
		}
	}
	return i.sign(ctx, shard, r, now)
}

// serves reports whether the token still says what is known of its key. A change makes another record, not a changed one.
func (t *token) serves(r *apikey.Record, now time.Time) bool {
	return t != nil && now.Sub(t.signedAt).Abs() < resignAfter && t.record == *r
}

func (i *Issuer) sign(ctx context.Context, shard *shard, r *apikey.Record, now time.Time) (string, error) {
	key, err := i.signer.signingKey(ctx, i.options.Lifetime)
	if err != nil {
		return "", fmt.Errorf("sign identity token: %w", err)
	}
	slot := shard.slot(r.Digest, i.limit, now)
	slot.mu.Lock()
	defer slot.mu.Unlock()
	if t := slot.token.Load(); t.serves(r, now) {
		return t.text, nil
	}
	text, err := i.signed(key, r, now)
	if err != nil {
		return "", fmt.Errorf("sign identity token: %w", err)
	}
	slot.token.Store(&token{text: text, signedAt: now, record: *r})
	return text, nil
}

// claims of a token.
type claims struct {
	jwt.Claims
	Account     string `json:"account"`
	Environment string `json:"environment"`
	Scope       string `json:"scope"`
}

func (i *Issuer) signed(key *key, r *apikey.Record, now time.Time) (string, error) {
	expiry := now.Add(i.options.Lifetime)
	if r.ExpiresAt.Reached(expiry) {
		expiry = r.ExpiresAt.Time().Add(time.Second - 1) // claims have whole seconds: the one in which the key expires is its last
	}
	payload, err := json.Marshal(claims{
		Claims: jwt.Claims{
			Issuer: i.options.Issuer, Subject: r.ID, Audience: i.options.Audience,
			IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(expiry),
		},
		Account: r.Account, Environment: r.Environment.String(), Scope: r.Scopes.String(),
	})
	if err != nil {
		return "", err
	}
	jws, err := key.sign.Sign(payload)
	if err != nil {
		return "", err
	}
	return jws.CompactSerialize()
}

// slot returns the slot of a key, a new one if there is none.
func (s *shard) slot(d apikey.Digest, limit int, now time.Time) *slot {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.sweptAt).Abs() >= resignAfter {
		s.sweep(now)
	}
	if found := s.slots[d]; found != nil {
		return found
	}
	for other := range s.slots { // any: a token that is missed is signed again
		if len(s.slots) < limit {
			break
		}
		delete(s.slots, other)
	}
	added := new(slot)
	s.slots[d] = added
	return added
}

// sweep gives back the tokens of keys that are no longer in use. A token that is only due to be signed again is kept.
func (s *shard) sweep(now time.Time) {
	s.sweptAt = now
	for d, slot := range s.slots {
		if t := slot.token.Load(); t == nil || now.Sub(t.signedAt).Abs() >= 2*resignAfter {
			delete(s.slots, d)
		}
	}
}
