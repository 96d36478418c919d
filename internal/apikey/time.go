package apikey

import "time"

// Time is a moment in a third of time.Time's memory: microseconds since the year 1, the precision of Postgres. Zero is no
// moment, as in time.Time.
type Time int64

// unixEpoch is 1970 as a Time. Counting from there instead would make a key that expired in that moment one that never does.
const unixEpoch = 62_135_596_800 * 1_000_000

// TimeOf returns t, rounded down to microseconds.
func TimeOf(t time.Time) Time { return Time(t.UnixMicro() + unixEpoch) }

// Time returns t in UTC.
func (t Time) Time() time.Time { return time.UnixMicro(int64(t) - unixEpoch).UTC() }

// IsZero reports whether t is no moment.
func (t Time) IsZero() bool { return t == 0 }

// Reached reports whether t is a moment and now is not before it.
func (t Time) Reached(now time.Time) bool { return t != 0 && t <= TimeOf(now) }
