package apikey_test

import (
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/apikey"
)

func TestTimeKeepsEveryMomentThatPostgresMayHold(t *testing.T) {
	for _, moment := range []time.Time{
		{}, // none
		time.Unix(0, 0),
		time.Date(1970, 1, 1, 0, 0, 0, 1000, time.UTC),
		time.Date(2025, 11, 23, 12, 0, 0, 123456000, time.FixedZone("", 3600)),
		time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC),
	} {
		got := apikey.TimeOf(moment)
		if !got.Time().Equal(moment) || got.IsZero() != moment.IsZero() {
			t.Errorf("%v became %v", moment, got.Time())
		}
	}
}

func TestKeyThatExpiredInTheFirstMomentOfUnixTimeIsExpired(t *testing.T) {
	record := &apikey.Record{ExpiresAt: apikey.TimeOf(time.Unix(0, 0))}
	if got := record.Validity(time.Now()); got != apikey.Expired {
		t.Errorf("%v, want expired", got)
	}
}
