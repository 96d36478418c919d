package keyadmin

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"time"
)

var errDuration = errors.New("must be a duration such as 90d, 2w, 12h or 1h30m")

// ParseDuration reads a duration as people write it: whole days (90d) or weeks (2w), of 24 hours each day, or Go's form
// (12h, 1h30m). It is never negative.
func ParseDuration(s string) (time.Duration, error) {
	const day = 24 * time.Hour
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
