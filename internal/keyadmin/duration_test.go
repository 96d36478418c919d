package keyadmin_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/keyadmin"
)

func TestParseDurationReadsWhatPeopleWrite(t *testing.T) {
	const day = 24 * time.Hour
	for s, want := range map[string]time.Duration{
		"90d": 90 * day, "2w": 14 * day, "12h": 12 * time.Hour, "1h30m": 90 * time.Minute, "500ms": 500 * time.Millisecond,
		"2s": 2 * time.Second, "0d": 0, "007d": 7 * day, "106751d": 106751 * day, "15250w": 15250 * 7 * day,
	} {
		if got, err := keyadmin.ParseDuration(s); err != nil || got != want {
			t.Errorf("%q: %v, %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{
		"", "d", "w", "90", "-1d", "+1d", "1.5d", " 1d", "1d ", "1 d", "1d12h", "1w2d", "-1h", "1e3d", "0x1d", "1_0d", "٣d",
		"106752d", "15251w", "9223372036854775807d", "18446744073709551616d", "99999999999999999999w", "9999999999h", "inf", "NaN",
	} {
		if got, err := keyadmin.ParseDuration(s); err == nil {
			t.Errorf("%q: %v", s, got)
		}
	}
}

func TestDurationsAreShownAsPeopleWriteThem(t *testing.T) {
	for _, s := range []string{"90d", "2h", "36h", "1h30m", "10m", "100h0m1s", "1h0m30s", "30s", "10s", "1m30s", "0s", "1.5s", "500ms", "20h", "14d"} {
		d, err := keyadmin.ParseDuration(s)
		if got := keyadmin.FormatDuration(d); err != nil || got != s {
			t.Errorf("%s is shown as %s, %v", s, got, err)
		}
	}
}

func FuzzParseDuration(f *testing.F) {
	for _, s := range []string{"90d", "2w", "1h30m", "106751d", "106752d", "-1h", "9223372036854775807w", "1.5h", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := keyadmin.ParseDuration(s)
		if err != nil {
			if d != 0 {
				t.Errorf("%q: %v with an error", s, d)
			}
			return
		}
		if d < 0 {
			t.Errorf("%q overflows to %v", s, d)
		}
		// Both ways of writing it are read as the same, and whole days come back.
		if again, err := keyadmin.ParseDuration(keyadmin.FormatDuration(d)); err != nil || again != d {
			t.Errorf("%q is shown as %s, which is read as %v, %v", s, keyadmin.FormatDuration(d), again, err)
		}
		if again, err := keyadmin.ParseDuration(d.String()); err != nil || again != d {
			t.Errorf("%q is %v, which is read as %v, %v", s, d, again, err)
		}
		if days := d / (24 * time.Hour); days > 0 {
			if again, err := keyadmin.ParseDuration(fmt.Sprintf("%dd", days)); err != nil || again != days*24*time.Hour {
				t.Errorf("%dd is read as %v, %v", days, again, err)
			}
		}
	})
}
