package test

import (
	"strconv"
	"strings"
	"testing"
)

// series is the value of a series of the gateway's metrics: a name, with labels if it has any.
func (g *gateway) series(t *testing.T, name string) float64 {
	t.Helper()
	answer := do(t, "GET", g.admin+"/metrics", nil, nil)
	for line := range strings.Lines(answer.body) {
		if text, ok := strings.CutPrefix(line, name+" "); ok {
			value, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
			if err != nil {
				t.Fatal(err)
			}
			return value
		}
	}
	t.Fatalf("the metrics (%d, %d bytes) have no %s", answer.StatusCode, len(answer.body), name)
	return 0
}
