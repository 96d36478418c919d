package identitytoken

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/zap"

	"github.com/rekall-ai/gateway/internal/clock"
	"github.com/rekall-ai/gateway/internal/keystore"
	"github.com/rekall-ai/gateway/internal/outage"
)

// errUnpublished says that there is no key whose tokens a backend could verify now: Postgres has not taken the public key
// yet, or not for too long.
var errUnpublished = errors.New("no signing key is published")

// Store is where edges publish their public keys. *keystore.Store is one.
type Store interface {
	PublishSigningKeys(ctx context.Context, instance string, keys []keystore.SigningKey, lease time.Duration) error
	SigningKeys(ctx context.Context) ([]keystore.SigningKey, error)
}

// schedule of a signer's keys.
type schedule struct {
	rotate time.Duration // age at which a key gives way to the next
	lead   time.Duration // from a key's publication to its first signature; the first key does without
	renew  time.Duration // between two renewals of the published keys
	lease  time.Duration // for which a key stays published after its last renewal
}

// standard has a lead that is longer than JWKSMaxAge and than the hour after which libraries fetch a key set again of their
// own accord, and a lease that carries tokens of maxLifetime through an hour without Postgres.
var standard = schedule{rotate: 24 * time.Hour, lead: 61 * time.Minute, renew: 30 * time.Second, lease: 2 * time.Hour}

const (
	// retryEvery is the time between two attempts to publish while they fail.
	retryEvery = time.Second

	// storeTimeout bounds one statement.
	storeTimeout = 2 * time.Second

	// publishedWithin bounds how long a request waits for the first publication, while the gateway starts.
	publishedWithin = 500 * time.Millisecond
)

// Signer has this edge's private keys, which never leave its memory, and publishes the public ones.
type Signer struct {
	store    Store
	instance string
	schedule schedule
	wake     chan struct{}
	active   atomic.Pointer[active]
	keySet   keySet
	failures outage.Failures // to publish a key, or to read keys

	current, next *key // of Run alone; next is published and waits for its lead
}

// key is an Ed25519 key pair.
type key struct {
	public      keystore.SigningKey
	sign        jose.Signer // safe for concurrent use: signing changes nothing in it
	madeAt      time.Time
	publishedAt time.Time // zero: not yet
}

// active is the key to sign with. It is immutable and replaced as a whole.
type active struct {
	key        *key      // nil: none yet
	renewedAt  time.Time // before the statement that renewed the key's lease, both clocks
	superseded chan struct{}
}

// NewSigner returns a signer that does nothing until Run. instance is the edge's, and logger is asked at each line.
func NewSigner(store Store, instance string, logger func() *zap.Logger) *Signer {
	return newSigner(store, instance, logger, standard)
}

func newSigner(store Store, instance string, logger func() *zap.Logger, schedule schedule) *Signer {
	s := &Signer{
		store: store, instance: instance, failures: outage.Failures{Logger: logger}, schedule: schedule, wake: make(chan struct{}, 1),
		keySet: keySet{store: store, turn: make(chan struct{}, 1)},
	}
	s.active.Store(&active{superseded: make(chan struct{})})
	return s
}

// Run makes keys, publishes them and replaces them until ctx is done.
func (s *Signer) Run(ctx context.Context) {
	publishing := outage.Kind{
		Begins: "signing key cannot be published; identity tokens end with its lease", Over: "signing key is published again", Level: zap.WarnLevel,
	}
	reading := outage.Kind{
		Begins: "key set cannot be read; backends are given the last one, if there is any", Over: "key set is read again", Level: zap.WarnLevel,
	}
	for {
		err := s.tend(ctx)
		if ctx.Err() != nil {
			return
		}
		s.failures.Note(&publishing, err)
		if err == nil {
			err := s.keySet.refresh(ctx)
			if ctx.Err() != nil {
				return
			}
			s.failures.Note(&reading, err)
		}
		if !s.rest(ctx, publishing.Failing) {
			return
		}
	}
}

// rest waits until the keys need tending again. It reports false when ctx is done.
func (s *Signer) rest(ctx context.Context, failing bool) bool {
	wait, wake := s.schedule.renew, s.wake
	if failing {
		wait, wake = min(wait, retryEvery), nil // a flood of requests must not become one of attempts
	}
	select {
	case <-time.After(wait):
	case <-wake:
	case <-ctx.Done():
		return false
	}
	return true
}

// tend makes the next key when it is time, renews what is published, and lets the next key sign after its lead.
func (s *Signer) tend(ctx context.Context) error {
	if s.next == nil && (s.current == nil || time.Since(s.current.madeAt) >= s.schedule.rotate-s.schedule.lead) {
		next, err := newKey()
		if err != nil {
			return err
		}
		s.next = next
	}
	renewedAt := time.Now()
	if err := s.publish(ctx); err != nil {
		return err
	}
	if s.next != nil {
		if s.next.publishedAt.IsZero() {
			s.next.publishedAt = time.Now()
		}
		if s.current == nil || time.Since(s.next.publishedAt) >= s.schedule.lead {
			s.current, s.next = s.next, nil
			s.failures.Logger().Info("signing with a new key", zap.String("signing_key", s.current.public.ID))
		}
	}
	last := s.active.Swap(&active{key: s.current, renewedAt: renewedAt, superseded: make(chan struct{})})
	close(last.superseded)
	return nil
}

func (s *Signer) publish(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	var keys []keystore.SigningKey
	for _, k := range []*key{s.current, s.next} {
		if k != nil {
			keys = append(keys, k.public)
		}
	}
	return s.store.PublishSigningKeys(ctx, s.instance, keys, s.schedule.lease)
}

func newKey() (*key, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make signing key: %w", err)
	}
	k := &key{madeAt: time.Now()}
	copy(k.public.PublicKey[:], public)
	thumbprint, err := (&jose.JSONWebKey{Key: public}).Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("make signing key: %w", err)
	}
	k.public.ID = base64.RawURLEncoding.EncodeToString(thumbprint)
	k.sign, err = jose.NewSigner(
		jose.SigningKey{Algorithm: jose.EdDSA, Key: jose.JSONWebKey{Key: private, KeyID: k.public.ID}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, fmt.Errorf("make signing key: %w", err)
	}
	return k, nil
}

// LastFailure returns the last failure to publish a key, or to read keys; nil: there was none.
func (s *Signer) LastFailure() *outage.Failure { return s.failures.Last() }

// signs reports whether a's key stays published until a token of that lifetime, signed now, has expired.
func (s *Signer) signs(a *active, lifetime time.Duration) bool {
	return a.key != nil && clock.Age(a.renewedAt, time.Now())+lifetime <= s.schedule.lease
}

// signingKey returns a key that stays published until a token of that lifetime has expired. While there is none it waits a moment:
// the gateway may be starting.
func (s *Signer) signingKey(ctx context.Context, lifetime time.Duration) (*key, error) {
	ctx, cancel := context.WithTimeout(ctx, publishedWithin)
	defer cancel()
	for {
		a := s.active.Load()
		if s.signs(a, lifetime) {
			return a.key, nil
		}
		select { // after a suspension the lease may be over, and the next renewal half a minute away
		case s.wake <- struct{}{}:
		default:
		}
		select {
		case <-a.superseded:
		case <-ctx.Done():
			return nil, errUnpublished
		}
	}
}
