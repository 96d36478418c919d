package keystore

import (
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/rekall-ai/gateway/internal/apikey"
)

// recordRow receives recordColumns, all null where a join found no key. It is used for one row after another: what it holds is
// valid until the next.
type recordRow struct {
	id, account, hash, environment pgtype.DriverBytes // as the connection has read them; nil if null
	scopes                         pgtype.UndecodedBytes
	manageKeys                     pgtype.Bool
	tier                           pgtype.DriverBytes // null: nobody gave the account one
	perMinute, burst, concurrent   pgtype.Int4
	expiresAt, revokedAt           pgtype.Timestamptz

	text    []byte
	decoded map[string]apikey.Scopes // few sets of scopes serve most keys; to decode an array takes longer than all the rest
}

// maxDecoded bounds recordRow.decoded.
const maxDecoded = 1000

func (r *recordRow) targets() []any {
	return []any{&r.id, &r.account, &r.hash, &r.environment, &r.scopes, &r.manageKeys, &r.expiresAt, &r.revokedAt,
		&r.tier, &r.perMinute, &r.burst, &r.concurrent}
}

func (r *recordRow) record() (apikey.Record, error) {
	environment, err := apikey.ParseEnvironment(string(r.environment))
	if err != nil {
		return apikey.Record{}, err
	}
	r.text = append(append(r.text[:0], r.id...), r.account...)
	text := string(r.text) // one piece of memory for both
	scopes, err := r.knownScopes()
	if err != nil {
		return apikey.Record{}, err
	}
	record := apikey.Record{
		ID: text[:len(r.id)], Account: text[len(r.id):], Environment: environment, Scopes: scopes, ManageKeys: r.manageKeys.Bool,
	}
	r.limit(&record)
	if copy(record.Digest[:], r.hash) != len(record.Digest) {
		return apikey.Record{}, errors.New("stored hash is not a SHA-256")
	}
	if r.expiresAt.Valid {
		record.ExpiresAt = apikey.TimeOf(r.expiresAt.Time)
	}
	if r.revokedAt.Valid {
		record.RevokedAt = apikey.TimeOf(r.revokedAt.Time)
	}
	return record, nil
}

// limit sets the limits of a record whose environment is set. A tier that a newer version has added must not keep revocations from an
// edge: what it allows is unknown there, so it counts as free.
func (r *recordRow) limit(record *apikey.Record) {
	tier := apikey.Free
	switch {
	case record.Environment == apikey.Sandbox:
		tier = apikey.SandboxTier
	case r.tier != nil:
		tier, _ = apikey.ParseTier(string(r.tier))
	}
	own := apikey.Limits{PerMinute: int(r.perMinute.Int32), Burst: int(r.burst.Int32), Concurrent: int(r.concurrent.Int32)}
	record.Limits = apikey.RefLimits(tier, own)
}

func (r *recordRow) knownScopes() (apikey.Scopes, error) {
	scopes, ok := r.decoded[string(r.scopes)]
	if ok {
		return scopes, nil
	}
	format := int16(pgtype.BinaryFormatCode)
	// An array in text begins so, the second if its first index is not 1; one in binary begins with its dimensions.
	if len(r.scopes) > 0 && (r.scopes[0] == '{' || r.scopes[0] == '[') {
		format = pgtype.TextFormatCode
	}
	var names []string
	if err := pgtype.NewMap().Scan(pgtype.TextArrayOID, format, r.scopes, &names); err != nil {
		return 0, fmt.Errorf("decode scopes: %w", err)
	}
	scopes = apikey.KnownScopes(names)
	if r.decoded == nil || len(r.decoded) >= maxDecoded {
		r.decoded = make(map[string]apikey.Scopes)
	}
	r.decoded[string(r.scopes)] = scopes
	return scopes, nil
}
