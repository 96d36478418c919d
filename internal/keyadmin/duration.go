package keyadmin

import (
	"errors"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
)

var errDuration = errors.New("must be a duration such as 90d, 2w, 12h, 1h30m or P90D")

const day = 24 * time.Hour

// ParseDuration reads a duration as people write it: whole days (90d) or weeks (2w), of 24 hours each day, Go's form (12h,
// 1h30m), or ISO 8601's in whole numbers (P90D, P2W, P1DT12H), where a month is 30 days and a year 365. It is never
// negative.
func ParseDuration(s string) (time.Duration, error) {
	if strings.HasPrefix(s, "P") {
		return parseISO(s)
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		return whole(days, day)
	}
	if weeks, ok := strings.CutSuffix(s, "w"); ok {
		return whole(weeks, 7*day)
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, errDuration
	}
	return d, nil
}

func whole(count string, unit time.Duration) (time.Duration, error) {
	n, err := strconv.ParseUint(count, 10, 63)
	if err != nil || n > uint64(math.MaxInt64/unit) {
		return 0, errDuration
	}
	return time.Duration(n) * unit, nil
}

var (
	isoDuration = regexp.MustCompile(`^P(?:(\d+)Y)?(?:(\d+)M)?(?:(\d+)W)?(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?)?$`)
	isoUnits    = [...]time.Duration{365 * day, 30 * day, 7 * day, day, time.Hour, time.Minute, time.Second}
)

func parseISO(s string) (time.Duration, error) {
	counts := isoDuration.FindStringSubmatch(s)
	if counts == nil || s == "P" || strings.HasSuffix(s, "T") {
		return 0, errDuration
	}
	var sum time.Duration
	for i, unit := range isoUnits {
		if counts[i+1] == "" {
			continue
		}
		d, err := whole(counts[i+1], unit)
		if err != nil || d > math.MaxInt64-sum {
			return 0, errDuration
		}
		sum += d
	}
	return sum, nil
}

// FormatDuration writes a duration as people do, and so that ParseDuration reads it: 90d if it is whole days, else 2h or 1h30m.
func FormatDuration(d time.Duration) string {
	if d > 0 && d%day == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	}
	text := d.String() // which ends in 0m0s or 0s if it is whole hours or minutes
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}
