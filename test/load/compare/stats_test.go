//go:build load

package compare

import (
	"fmt"
	"slices"
)

// spread of what was measured in all rounds.
type spread struct {
	median    float64
	p10, p90  float64
	low, high float64 // the median lies between them with 95 % confidence; 0: not told
}

func spreadOf(values []float64) spread {
	sorted := slices.Sorted(slices.Values(values))
	return spread{median: quantile(sorted, 0.5), p10: quantile(sorted, 0.1), p90: quantile(sorted, 0.9)}
}

func median(values []float64) float64 { return quantile(slices.Sorted(slices.Values(values)), 0.5) }

// quantile of sorted values, between two of them if need be.
func quantile(sorted []float64, q float64) float64 {
	position := q * float64(len(sorted)-1)
	below := int(position)
	above := min(below+1, len(sorted)-1)
	return sorted[below] + (position-float64(below))*(sorted[above]-sorted[below])
}

// cells of a table: median, confidence, p10 to p90.
func (s spread) cells(format string) string {
	return fmt.Sprintf(format+" | "+format+" – "+format+" | "+format+" – "+format, s.median, s.low, s.high, s.p10, s.p90)
}
