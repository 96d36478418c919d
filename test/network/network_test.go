package network

import "testing"

// TestBytesThatWaitPassAfterASecondStall: nobody would close what they wait for.
func TestBytesThatWaitPassAfterASecondStall(t *testing.T) {
	l, _ := To(t, "postgres://127.0.0.1:1/none")
	l.Stall()
	waiting := l.passing // as copy does
	l.Stall()
	select {
	case <-waiting:
		t.Error("a second stall lets pass what waits")
	default:
	}
	l.Resume()
	select {
	case <-waiting:
	default:
		t.Error("it waits for ever")
	}
}
