package ratelimit

import (
	"context"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// FuzzAnswersNeitherEndTheClientNorFillMemory has a client read what may stand in Redis's place sends.
func FuzzAnswersNeitherEndTheClientNorFillMemory(f *testing.F) {
	for _, answers := range []string{
		"+OK\r\n*2\r\n$26\r\nABCDEFGHIJKLMNOPQRSTUVWXYZ\r\n:1\r\n",
		"%2\r\n+server\r\n+redis\r\n$7\r\nmodules\r\n*1\r\n%1\r\n+name\r\n$1\r\nx\r\n*3\r\n:1\r\n:2\r\n:0\r\n",
		"-NOSCRIPT No matching script.\r\n$40\r\n" + strings.Repeat("a", 40) + "\r\n*3\r\n:1\r\n$-1\r\n_\r\n",
		"*2\r\n$-0\r\n+a*9223372036854775807\r\n",
		"*-1\r\n*0\r\n$0\r\n\r\n,1.5\r\n#t\r\n",
		strings.Repeat("|1\r\n", 9) + "!3\r\nERR\r\n=5\r\ntxt:x\r\n~1\r\n>1\r\n+x\r\n(1\r\n",
	} {
		f.Add([]byte(answers))
	}
	f.Fuzz(func(t *testing.T, answers []byte) {
		options := &redis.Options{MaxRetries: -1, DialerRetries: 1, PoolSize: 1, DisableIdentity: true, ReadTimeout: time.Second}
		options.Dialer = bound(func(context.Context, string, string) (net.Conn, error) {
			here, there := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, there) }()
			go func() {
				_, _ = there.Write(answers)
				_ = there.Close()
			}()
			return here, nil
		})
		client := redis.NewClient(options)
		defer func() { _ = client.Close() }()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range 2 {
			_ = client.EvalSha(t.Context(), exchangeScript.Hash(), []string{"bucket", dataKey}, 1).Err()
		}
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; took > 8<<20+64*uint64(len(answers)) {
			t.Errorf("%d bytes of memory for an answer of %d", took, len(answers))
		}
	})
}
