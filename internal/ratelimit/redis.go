package ratelimit

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// nameOf is Lua for the name of the data: empty if it has none, false or nil if it is not one that edges give. Whoever has Redis's password
// may have written any other, such as one with a space: a bucket that bore it would be taken for a whole one, for ever. Or one of
// megabytes, which nobody may read.
const nameOf = `
local function nameOf(data)
	local length = redis.call('HSTRLEN', data, 'name')
	if length == 0 then
		return ''
	end
	return length == 26 and string.match(redis.call('HGET', data, 'name'), '^[A-Z2-7]+$')
end
local foreign = redis.error_reply('FOREIGN the data of redis is not what edges write')
`

// exchangeScript settles with the bucket of one key and leases from it: GCRA in microseconds of Redis's own clock, the only one that
// all edges share. What was spent counts whatever the bucket holds; more is leased only from what it has left.
//
// A bucket that owes more than edges could have spent comes from a clock that was set back, or from other limits: it is cut to
// that. Where the data has another name than this edge knows, Redis was emptied, or has come back with older data: nothing is leased of a
// bucket that is whole because it was forgotten. A bucket bears the name of the data that it belongs to: one from before is forgotten, since
// edges tell all of what they let through. So is one of another type, by which somebody would keep all edges from their leases.
var exchangeScript = redis.NewScript(nameOf + `
local current = nameOf(KEYS[2])
if not current then
	return foreign
end
if current ~= ARGV[5] then
	return redis.error_reply('EMPTIED redis was emptied')
end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, depth = tonumber(ARGV[1]), tonumber(ARGV[2])
local spent, want = tonumber(ARGV[3]), tonumber(ARGV[4])
local bucket = redis.pcall('GET', KEYS[1])
local empty, name = string.match(type(bucket) == 'string' and bucket or '', '^(%S+) (%S+)$')
empty = math.min(name == ARGV[5] and tonumber(empty) or 0, now + (depth + ARGV[6]) * interval)
empty = math.max(now, math.max(now, empty) + spent * interval)
local left = math.max(0, math.floor((now + depth * interval - empty) / interval + 0.001))
local leased = math.min(want, left)
empty = empty + leased * interval
if empty > now then
	redis.call('SET', KEYS[1], string.format('%.17g ', empty) .. ARGV[5], 'PX', math.ceil((empty - now) / 1000) + 1000)
else
	redis.call('DEL', KEYS[1])
end
return {leased, left - leased, math.ceil(math.max(0, empty + interval - depth * interval - now))}
`)

const (
	// exchangeTimeout bounds an exchange, dialling included. Requests do not wait for it.
	exchangeTimeout = time.Second

	// maxBatch is how many keys one round trip settles.
	maxBatch = 512
)

// newClient returns a client for a URL: redis://, rediss:// (TLS) or unix://, with user, password, host, port and database.
// connected is asked about each new connection.
func newClient(url string, connected func() error) (*redis.Client, error) {
	options, err := redis.ParseURL(url)
	if err != nil {
		// Not err: it repeats the URL, and the password in it.
		return nil, errors.New("the rate limit store's URL is not usable: write it as redis://user:password@host:6379/0, or rediss:// for TLS")
	}
	options.ContextTimeoutEnabled = true
	options.DialTimeout, options.ReadTimeout, options.WriteTimeout = exchangeTimeout, exchangeTimeout, exchangeTimeout
	options.MaxRetries = -1 // what was spent must not count twice; an answer that is missing is an outage
	options.DialerRetries = 1
	options.PoolSize, options.PipelinePoolSize = 1, -1 // one connection: a new one tells of an outage
	options.ConnMaxIdleTime = -1
	options.OnConnect = func(context.Context, *redis.Conn) error { return connected() }
	options.DisableIdentity = true
	options.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	options.Dialer = bound(redis.NewDialer(options))
	return redis.NewClient(options), nil
}

// The client would write to standard error, which belongs to whoever runs the gateway. What fails is returned to us as well.
func init() { redis.SetLogger(silent{}) }

type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

// settlement is what one exchange says of a lease, and Redis's answer.
type settlement struct {
	lease *lease
	epoch uint64 // that Redis knows of with the answer

	spent int64 // without Redis's knowledge; below zero: given back
	want  int64

	debt int64 // that the bucket may have already, at most

	owed   int64 // that is settled by this: what was spent, forgiven or not
	answer *redis.Cmd
}

// trial returns a settlement of nothing, with a bucket that stays whole.
func trial() settlement {
	l := &lease{key: "rekall:rl:{trial}"}
	l.minute.Store(1)
	l.depth.Store(1)
	return settlement{lease: l}
}

const (
	dataKey = "rekall:rl:state" // a hash: the name of the data, and how many probes it has seen, of all edges
	dataFor = 24 * time.Hour    // each probe prolongs it; longer than outages, after which it must not seem that Redis was emptied
)

// probeScript counts a probe and returns the name of the data and how many probes it has seen. It gives a new name to data that has none,
// that has seen fewer probes than the edge knows of, or that somebody else has written, which goes, and is a failure all the same. That is
// one step for Redis: of edges that probe at once, the first names the data for all.
var probeScript = redis.NewScript(nameOf + `
local function isOurs(data)
	local kind = redis.call('TYPE', data).ok
	if kind ~= 'hash' then
		return kind == 'none'
	end
	local probes = redis.call('HSTRLEN', data, 'probes') < 16 and (redis.call('HGET', data, 'probes') or '0')
	return nameOf(data) and probes and (probes == '0' or string.match(probes, '^[1-9]%d*$'))
end
if not isOurs(KEYS[1]) then
	redis.call('UNLINK', KEYS[1])
	redis.call('HSET', KEYS[1], 'name', ARGV[1])
	return foreign
end
local name = nameOf(KEYS[1])
local probes = redis.call('HINCRBY', KEYS[1], 'probes', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
if name == '' or name == ARGV[2] and probes < tonumber(ARGV[3]) then
	redis.call('HSET', KEYS[1], 'name', ARGV[1])
end
return {redis.call('HGET', KEYS[1], 'name'), probes}
`)

// nameOfData returns a name that Redis keeps as long as it keeps the buckets, and gives it one if it has none: it is new, or was
// restarted empty. Data that has seen fewer probes than this edge knows of is older than it was, as after a crash of a Redis that saves
// now and then: it is told of all keys as if it had been emptied, so it gets another name. An edge that is new, or does without Redis,
// reads the number and adds nothing: it would hide from the others that theirs are missing.
func (s *store) nameOfData(ctx context.Context) (string, error) {
	var one int64
	if s.data != "" && !s.fallback.Load() {
		one = 1
	}
	answer, err := probeScript.Run(ctx, s.client, []string{dataKey}, rand.Text(), s.data, s.probes+one, one, int(dataFor.Seconds())).Slice()
	if err != nil {
		return "", fmt.Errorf("ask redis for the name of its data: %w", err)
	}
	if len(answer) == 2 {
		name, _ := answer[0].(string)
		if probes, ok := answer[1].(int64); ok && name != "" {
			s.probes = probes
			return name, nil
		}
	}
	return "", fmt.Errorf("ask redis for the name of its data: %w", errNoAnswer)
}

// errNoAnswer says that what was asked was not Redis, or not ours.
var errNoAnswer = errors.New("the answer is none that the script gives")

// send runs the script for each settlement, in one round trip. Each has its answer, or the error, when it returns.
func (s *store) send(ctx context.Context, batch []settlement) {
	pipe := s.client.Pipeline()
	for i := range batch {
		b := &batch[i]
		interval := strconv.FormatFloat(float64(time.Minute/time.Microsecond)/float64(b.lease.minute.Load()), 'g', -1, 64)
		b.answer = pipe.EvalSha(ctx, exchangeScript.Hash(), []string{b.lease.key, dataKey},
			interval, b.lease.depth.Load(), b.spent, b.want, s.data, b.debt)
	}
	s.exchanges.Add(1)
	_, _ = pipe.Exec(ctx) // the first of the errors that the answers have
}

// answered returns what Redis has leased, what it has left and how long it takes until it has something again.
func (b *settlement) answered() (leased, left int64, wait time.Duration, err error) {
	numbers, err := b.answer.Int64Slice()
	if err == nil && (len(numbers) != 3 || slices.Min(numbers) < 0 || numbers[0] > b.want || slices.Max(numbers) > mostAnswered) {
		err = errNoAnswer
	}
	if err != nil {
		return 0, 0, 0, fmt.Errorf("exchange leases: %w", err)
	}
	return numbers[0], numbers[1], time.Duration(numbers[2]) * time.Microsecond, nil
}

// mostAnswered keeps what is added to an answer, in nanoseconds too, from an overflow.
const mostAnswered = 1 << 52

func scriptMissing(err error) bool { return redis.HasErrorPrefix(err, "NOSCRIPT") }
