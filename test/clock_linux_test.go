package test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rekall-ai/gateway/internal/devenv/pgtest"
	"github.com/rekall-ai/gateway/internal/keyadmin"
	"github.com/rekall-ai/gateway/test/eventually"
)

// setClock sets the wall clock of a running gateway off by so many whole seconds from the machine's, and leaves its monotonic
// clock alone. The machine's clock is not a test's to set, and Go reads it from the vDSO, where no preloaded library stands
// between. So the process gets another vDSO function: a private copy of the page, in which CLOCK_REALTIME is off.
func (g *gateway) setClock(offset time.Duration) {
	g.t.Helper()
	pid := g.process.Pid()
	memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = memory.Close() }()
	start, end := vdso(g.t, pid)
	image := make([]byte, end-start)
	if _, err := memory.ReadAt(image, int64(start)); err != nil {
		g.t.Fatal(err)
	}
	// A thread that stands in the function while it is replaced would go on in the middle of another.
	eventually.True(g.t, "no thread reads the clock", func() bool {
		g.process.Signal(g.t, syscall.SIGSTOP)
		if stopped, inside := threads(g.t, pid, start, end); stopped && !inside {
			return true
		}
		g.process.Signal(g.t, syscall.SIGCONT)
		return false
	})
	if _, err := memory.WriteAt(clockCode(g.t, offset), int64(start+clockFunction(g.t, image))); err != nil {
		g.t.Fatal(err)
	}
	g.process.Signal(g.t, syscall.SIGCONT)
}

// vdso is the range of addresses that the kernel's own code takes in a process.
func vdso(t *testing.T, pid int) (start, end uint64) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(strings.TrimSpace(line), "[vdso]") {
			if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil {
				t.Fatal(err)
			}
			return start, end
		}
	}
	t.Fatal("the process has no vDSO")
	return 0, 0
}

// threads reports whether all threads of a process are stopped, and whether one of them stands within the range.
func threads(t *testing.T, pid int, start, end uint64) (stopped, inside bool) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatal("no threads", err)
	}
	for _, task := range tasks {
		status, err := os.ReadFile(task + "/status")
		if err != nil || !strings.Contains(string(status), "State:\tT") {
			return false, false
		}
		where, err := os.ReadFile(task + "/syscall") // its last field is the program counter
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(where))
		at, err := strconv.ParseUint(fields[len(fields)-1], 0, 64)
		if err != nil { // "running"
			return false, false
		}
		inside = inside || at >= start && at < end
	}
	return true, inside
}

// clockFunction is where the function that reads the clock stands in the image of a vDSO.
func clockFunction(t *testing.T, image []byte) uint64 {
	t.Helper()
	file, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	symbols, err := file.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	for _, symbol := range symbols {
		if symbol.Name != "__vdso_clock_gettime" && symbol.Name != "__kernel_clock_gettime" {
			continue
		}
		for _, segment := range file.Progs {
			if segment.Type == elf.PT_LOAD {
				return symbol.Value - segment.Vaddr
			}
		}
	}
	t.Fatal("the vDSO has no clock_gettime")
	return 0
}

// clockCode is a function that makes the system call clock_gettime and adds to the seconds if CLOCK_REALTIME was asked for.
func clockCode(t *testing.T, offset time.Duration) []byte {
	t.Helper()
	seconds := int64(offset / time.Second)
	switch runtime.GOARCH {
	case "amd64":
		code := []byte{
			0xb8, 228, 0, 0, 0, // mov eax, clock_gettime
			0x0f, 0x05, // syscall
			0x85, 0xff, // test edi, edi
			0x75, 0x07, // jne ret
			0x48, 0x81, 0x06, // add qword [rsi], seconds
		}
		code = binary.LittleEndian.AppendUint32(code, uint32(int32(seconds)))
		return append(code, 0xc3) // ret
	case "arm64":
		var code []byte
		for _, instruction := range []uint32{
			0x2a0003e9, // mov w9, w0
			0xd2800e28, // mov x8, clock_gettime
			0xd4000001, // svc 0
			0x350000a9, // cbnz w9, ret
			0xf940002a, // ldr x10, [x1]
			0x5800008b, // ldr x11, seconds
			0x8b0b014a, // add x10, x10, x11
			0xf900002a, // str x10, [x1]
			0xd65f03c0, // ret
		} {
			code = binary.LittleEndian.AppendUint32(code, instruction)
		}
		return binary.LittleEndian.AppendUint64(code, uint64(seconds))
	}
	t.Fatalf("no machine code for %s: add it", runtime.GOARCH)
	return nil
}

// clock is the gateway's wall clock, as it shows it in the Date of an answer.
func (g *gateway) clock() time.Time {
	g.t.Helper()
	date, err := http.ParseTime(g.do("GET", "/v1/memories", nil).Header.Get("Date"))
	if err != nil {
		g.t.Fatal(err)
	}
	return date
}

// verdicts asks for the rig's good key, for one that has been revoked and for one that expires, all at once, until the two are
// refused. The test's clock is the machine's, and so Postgres's.
func (f *faultRig) verdicts(revoked, expiring keyadmin.Key, revokedAt, expiresAt time.Time) {
	f.t.Helper()
	eventually.True(f.t, "both keys are refused and the good one is not", func() bool {
		good := f.goodKeyWorks()
		began := time.Now()
		first := f.g.ask(revoked)
		if first == "" && began.Sub(revokedAt) > faultBound {
			f.t.Fatal("a revoked key was let in past the bound")
		}
		return f.expiry(expiring, expiresAt) && first == "API_KEY_REVOKED" && good
	})
}

// aboutNow is what the reading of Postgres's clock may be off by: the time that a sync may take.
const aboutNow = 2 * time.Second

// expiry asks for a key and reports whether it is refused as expired, which must be at its time.
func (f *faultRig) expiry(key keyadmin.Key, at time.Time) bool {
	f.t.Helper()
	began := time.Now()
	switch code := f.g.ask(key); code {
	case "API_KEY_EXPIRED":
		if early := time.Until(at); early > aboutNow {
			f.t.Fatalf("a key was refused %v before its expiry", early)
		}
		return true
	case "":
		if late := began.Sub(at); late > 100*time.Millisecond { // the machine's own clock may be adjusted a little
			f.t.Fatalf("a key was let in %v after its expiry", late)
		}
	case "AUTH_UNAVAILABLE", "cut":
	default:
		f.t.Fatalf("a key that expires got %s", code)
	}
	return false
}

// expiring creates a key that expires then, and lets the gateway meet it.
func (f *faultRig) expiring(at time.Time) (keyadmin.Key, *follower) {
	f.t.Helper()
	key := f.rig.key("production", "memories:read")
	pgtest.Exec(f.t, f.database, "update rekall.api_keys set expires_at = $2 where id = $1", key.ID, at)
	return key, f.openStream(key)
}

func TestWallClockSetForwardOrBackChangesNoVerdict(t *testing.T) {
	t.Parallel()
	f := newFaultRig(t)
	was := time.Duration(0)
	for _, offset := range []time.Duration{time.Hour, -time.Hour, -10 * time.Minute, 10 * time.Minute} {
		t.Logf("the clock is %v off", offset)
		revoked := f.rig.key("production", "memories:read")
		revokedStream := f.openStream(revoked)
		expiresAt := time.Now().Add(6 * time.Second)
		expiring, expiringStream := f.expiring(expiresAt)

		f.g.setClock(offset)
		if off := time.Until(f.g.clock()); (off - offset).Abs() > time.Minute {
			t.Fatalf("the gateway's clock is %v off, want %v", off, offset)
		}
		f.revoke(revoked.ID)
		f.verdicts(revoked, expiring, time.Now(), expiresAt)
		revokedStream.ends(t)
		expiringStream.ends(t)
		f.stream.goesOn(t)
		eventually.True(t, "the log tells of the leap", func() bool { return f.leaps(offset-was) > 0 })
		if n := f.leaps(offset - was); n != 1 {
			t.Errorf("the log tells %d times of the leap, want once", n)
		}
		was = offset
	}
	log := f.g.log.String()
	f.wantNoneLogged(log, log, "key sync failed", "key sync works again")
	if f.logged("key sync starts over") != 1 {
		t.Error("the log tells of a fault in syncing")
	}
	eventually.True(t, "each loss of trust in the log has its end there", func() bool {
		return f.logged("cached keys are not trusted any longer") == f.logged("cached keys are trusted again")
	})
}

// leaps counts the lines of the log that say that the clock was set by about so much. A machine that was suspended is another thing.
func (f *faultRig) leaps(by time.Duration) (n int) {
	for _, line := range linesOf(f.g.log.String(), clockSet) {
		if math.Abs(line.By-by.Seconds()) < 60 {
			n++
		}
	}
	return n
}

// TestWallClockDoesNotProlongTrust sets the clock of an edge that is cut off.
func TestWallClockDoesNotProlongTrust(t *testing.T) {
	t.Parallel()
	for _, offset := range []time.Duration{-time.Hour, time.Hour} {
		t.Run(offset.String(), func(t *testing.T) {
			f := newFaultRig(t)
			good := f.rig.key("production", "memories:read")
			f.g.do("GET", "/v1/memories", bearer(good)).wantCode(t, 200, "")
			f.mark()
			f.network.Stall()
			f.revoke(f.key.ID)
			revokedAt := time.Now()
			f.g.setClock(offset)
			eventually.True(t, "the edge stops trusting", func() bool {
				began := time.Now()
				revoked, other := f.g.ask(f.key), f.g.ask(good)
				if revoked == "" && began.Sub(revokedAt) > faultBound {
					t.Fatal("a revoked key was let in past the bound")
				}
				if other != "" && other != "AUTH_UNAVAILABLE" && other != "cut" {
					t.Fatalf("a good key got %s", other)
				}
				return revoked == "AUTH_UNAVAILABLE" && other == "AUTH_UNAVAILABLE"
			})
			f.stream.ends(t)
			f.network.Heal()
			eventually.True(t, "the edge knows", func() bool {
				return f.g.ask(f.key) == "API_KEY_REVOKED" && f.g.ask(good) == ""
			})
			f.wantLogged("cached keys are not trusted any longer", "cached keys are trusted again")
			if n := f.leaps(offset); n != 1 {
				t.Errorf("the log says %d times that the clock was set, want once", n)
			}
		})
	}
}

// TestKeyIsNotExpiredByTheEdgesWallClock sets the clock forward by less than max_staleness and past a key's expiry, while
// Postgres cannot be asked: nothing but that clock says that the key has expired.
func TestKeyIsNotExpiredByTheEdgesWallClock(t *testing.T) {
	t.Parallel()
	f := newFaultRig(t, "refresh 100ms", "max_staleness 50s")
	expiresAt := time.Now().Add(15 * time.Second)
	expiring, stream := f.expiring(expiresAt)
	f.server.Pause()
	f.g.setClock(20 * time.Second)
	f.g.doOnce("GET", "/v1/memories", bearer(f.key)).wantCode(t, 200, "")
	for range 10 {
		f.expiry(expiring, expiresAt)
	}
	if time.Until(expiresAt) > aboutNow {
		stream.goesOn(t)
	}
	f.server.Resume()
	eventually.True(t, "the key is refused at its time", func() bool { return f.expiry(expiring, expiresAt) })
	stream.ends(t)
	f.stream.goesOn(t)
}
