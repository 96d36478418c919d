package keycache

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"sync/atomic"

	"github.com/rekall-ai/gateway/internal/apikey"
)

const (
	// filterBits is the memory for each key. With 16 bits about one unknown key in a thousand looks known.
	filterBits = 16

	// filterWords is the number of words in a block, one cache line, and of bits set for each key, one in each word.
	filterWords = 8

	filterBlockKeys = filterWords * 64 / filterBits

	// minFilterKeys leaves a small installation room to grow.
	minFilterKeys = 1 << 16
)

// filter is a set of digests that may report a digest which is not in it, and never misses one that is: a split block Bloom
// filter. Digests are added while others look. None is ever removed: keys are never deleted, and
// canaries that were stay in it until it is built again.
type filter struct {
	origin   uint64 // of the states that it belongs to
	blocks   [][filterWords]atomic.Uint64
	keys     atomic.Int64 // that were added, save the few that looked known
	capacity int64        // beyond which too many unknown keys look known

	// Which unknown keys look known is another matter in each filter: one that a stranger has found out, by how long its answer took,
	// costs the other edges no lookups, nor this one once it has built another.
	seeds [2]uint64
}

// newFilter returns an empty filter with room for that many keys and an eighth more.
func newFilter(origin uint64, keys int) *filter {
	capacity := max(minFilterKeys, keys+keys/8)
	return &filter{
		origin: origin, capacity: int64(capacity),
		blocks: make([][filterWords]atomic.Uint64, (capacity+filterBlockKeys-1)/filterBlockKeys),
		seeds:  [2]uint64{rand.Uint64() | 1, rand.Uint64() | 1},
	}
}

// at returns the block of a digest and what selects a bit in each of its words. Digests are uniform, and nobody can choose them: they
// need no hashing but by the seeds.
func (f *filter) at(prefix []byte) (*[filterWords]atomic.Uint64, uint64) {
	first, second := binary.LittleEndian.Uint64(prefix), binary.LittleEndian.Uint64(prefix[8:])
	block, _ := bits.Mul64(first*f.seeds[0], uint64(len(f.blocks)))
	high, low := bits.Mul64(first^second, f.seeds[1])
	return &f.blocks[block], high ^ low
}

// add takes the first keystore.HashPrefix bytes of a digest, or more.
func (f *filter) add(prefix []byte) {
	block, selector := f.at(prefix)
	added := false
	for i := range block {
		bit := uint64(1) << (selector >> (6 * i) & 63)
		added = block[i].Or(bit)&bit == 0 || added
	}
	if added {
		f.keys.Add(1)
	}
}

// has reports whether d may be in the filter. False is certain.
func (f *filter) has(d *apikey.Digest) bool {
	block, selector := f.at(d[:])
	for i := range block {
		if block[i].Load()&(1<<(selector>>(6*i)&63)) == 0 {
			return false
		}
	}
	return true
}

func (f *filter) full() bool { return f.keys.Load() > f.capacity }

func (f *filter) bytes() int { return len(f.blocks) * filterWords * 8 }
