package main

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// heldMost is how much the relay may hold of what a side does not take, in bytes.
const heldMost = 64 << 10

// stuff writes until nothing is taken for a while, and returns how much was.
func stuff(conn net.Conn) (n int64) { return stuffWith(conn, endless{}, 32<<10) }

// stuffWith writes pieces of what r has until nothing is taken for a while, and
// returns how much was: no more than 64 MiB, which no kernel has for a socket.
func stuffWith(conn net.Conn, r io.Reader, piece int) (n int64) {
	for buf := make([]byte, piece); n < 64<<20; {
		io.ReadFull(r, buf) // endless, or long enough
		conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		m, err := conn.Write(buf)
		if n += int64(m); err != nil {
			break
		}
	}
	return n
}

// smallPairs returns what a session is between, as behind nginx: the ends of a
// Unix socket and of a TCP connection, of which the kernel holds little. (A TCP
// socket that takes less than a segment at a time, 64 KiB on the loopback device,
// is slow beyond measure.)
func smallPairs(t testing.TB) (client, near halfConn, far, backend halfConn) {
	t.Helper()
	c, n := unixPair(t)
	f, b := tcpPair(t)
	for _, conn := range []interface{ SetWriteBuffer(int) error }{c, n, f, b} {
		conn.SetWriteBuffer(16 << 10)
	}
	f.SetReadBuffer(64 << 10)
	b.SetReadBuffer(64 << 10)
	return c, n, f, b
}

// stuckSession is a session of smallPairs.
type stuckSession struct{ client, backend halfConn }

func carriedSmall(t testing.TB, r *relay) stuckSession {
	t.Helper()
	client, near, far, backend := smallPairs(t)
	r.carry(&session{namespace: "ns-01"}, [2]net.Conn{near, far}, [2][]byte{})
	return stuckSession{client, backend}
}

// A reader that stops stops its sender: of a session whose sockets are full no
// more is taken than heldMost, and all of it comes when the reader goes on. It
// fails if more is held, or if a side is read while something is held of it.
func TestRelayBackpressure(t *testing.T) {
	client, near, far, backend := smallPairs(t)
	full := [2]int64{stuff(client) + stuff(far), stuff(backend) + stuff(near)}
	near.SetDeadline(time.Time{})
	far.SetDeadline(time.Time{})
	r := quietRelay(t)
	r.carry(&session{namespace: "ns-01"}, [2]net.Conn{near, far}, [2][]byte{})
	ends := [2]halfConn{client, backend}
	for i, conn := range ends {
		held := stuff(conn)
		t.Logf("side %d: the kernel took %d bytes, and %d more when the session was carried", i, full[i], held)
		if held > heldMost*5/4 { // the kernel counts in segments
			t.Errorf("side %d: %d bytes were taken for a reader that does not read, want %d", i, held, heldMost)
		}
		full[i] += held
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	mustReadAll(t, backend, full[0])
	mustReadAll(t, client, full[1])
	waitFor(t, r)
}

// echoing starts sessions whose backends send back what comes, until the test
// ends.
func echoing(t *testing.T, r *relay, count int) []relayed {
	t.Helper()
	all := make([]relayed, count)
	var echoes sync.WaitGroup
	for i := range all {
		c := carried(t, r, 0, nil, nil)
		all[i] = c
		echoes.Go(func() { io.Copy(c.backend, c.backend) })
	}
	t.Cleanup(func() {
		for _, c := range all {
			c.client.Close()
		}
		echoes.Wait()
	})
	return all
}

// medianEchoes returns how long an echo takes in the sessions of each relay, in the
// middle of many. They take turns, one echo at a time, so that other programs have
// the same part in both.
func medianEchoes(t *testing.T, relays [2][]relayed) (medians [2]time.Duration) {
	t.Helper()
	const echoes = 3000
	var took [2][]time.Duration
	message := make([]byte, 100)
	for k := range echoes {
		for i, sessions := range relays {
			c := sessions[k%len(sessions)]
			c.client.SetDeadline(time.Now().Add(patience))
			begun := time.Now()
			_, err := c.client.Write(message)
			if _, rerr := io.ReadFull(c.client, message); errors.Join(err, rerr) != nil {
				t.Fatal(errors.Join(err, rerr))
			}
			took[i] = append(took[i], time.Since(begun))
		}
	}
	for i := range took {
		slices.Sort(took[i])
		medians[i] = took[i][echoes/2]
	}
	return medians
}

// wantMedianEchoes checks that an echo takes no more than twice the time in the
// second relay's sessions.
func wantMedianEchoes(t *testing.T, relays [2][]relayed) {
	t.Helper()
	medians := medianEchoes(t, relays)
	t.Logf("half of all echoes took at most %s without stuck sessions and %s with them", medians[0], medians[1])
	if medians[1] > 2*medians[0] {
		t.Errorf("half of all echoes took %s or more with stuck sessions, want twice the %s without at most", medians[1], medians[0])
	}
}

// processorTime returns what this process has used.
func processorTime(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(os.NewSyscallError("getrusage", err))
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Sessions that are stuck in both directions cost the others nothing, and at rest
// no processor time. Latencies are compared with those of a relay without them.
//
// It fails if a poller waits for a socket, or asks again and again for what a
// stuck one has.
func TestRelayStuckStopsItselfOnly(t *testing.T) {
	const others, stuck = 50, 200
	calm, crowded := quietRelay(t), quietRelay(t)
	without, with := echoing(t, calm, others), echoing(t, crowded, others)
	var all sync.WaitGroup
	for range stuck {
		c := carriedSmall(t, crowded)
		all.Go(func() { stuff(c.client) })
		all.Go(func() { stuff(c.backend) })
	}
	all.Wait()

	wantMedianEchoes(t, [2][]relayed{without, with})
	wantRest(t)
}

// wantRest waits until this process uses a tenth of a processor at most.
func wantRest(t *testing.T) {
	t.Helper()
	const rest = 200 * time.Millisecond
	for end := time.Now().Add(patience); ; {
		begun := processorTime(t)
		<-time.After(rest)
		took := processorTime(t) - begun
		if took <= rest/10 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s of processor time in %s with nothing to do, want a tenth at most", took, rest)
		}
	}
}

// userMemory is what this process has in use for the heap and stacks, in bytes.
// The far ends' part is in it too; the kernel's buffers are not.
func userMemory() int64 {
	for range 2 { // what was put in a sync.Pool outlives one
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// inBatches calls do for 0 to count-1, so many at once that a processor has time
// for each.
func inBatches(count int, do func(i int)) {
	const atOnce = 200
	for first := 0; first < count; first += atOnce {
		var all sync.WaitGroup
		for i := first; i < min(count, first+atOnce); i++ {
			all.Go(func() { do(i) })
		}
		all.Wait()
	}
}

// stuckFlow is what comes from the backend of session i: of every other one
// frames, which a relay may hold in another way than arbitrary bytes.
func stuckFlow(noise []byte, seed uint64, i int) *flow {
	f := newFlow(noise, seed+uint64(i), 64<<20, server, i%2 == 0)
	f.whole = false // where it will stop is not known
	return f
}

// Two thousand stuck sessions take bounded memory, each byte comes when their
// readers go on, and the memory is given back. It fails if what is held is not
// bounded or is lost at the end, and if the relay keeps buffers for ever.
func TestRelayStuckMemory(t *testing.T) {
	const sessions = 2000
	seed := randomSeed(t)
	noise := newNoise(seed)
	r := quietRelay(t)
	all, sent := make([]stuckSession, sessions), make([]int64, sessions)
	before := userMemory()
	for i := range all {
		all[i] = carriedSmall(t, r)
	}
	open := userMemory()
	inBatches(sessions, func(i int) {
		sent[i] = stuffWith(all[i].backend, stuckFlow(noise, seed, i), 4<<10)
		all[i].backend.CloseWrite()
	})
	full, taken := userMemory(), r.bytes()[server]
	inBatches(sessions, func(i int) {
		flow := stuckFlow(noise, seed, i)
		flow.left = int(sent[i])
		all[i].client.SetReadDeadline(time.Now().Add(patience))
		if err := flow.check(all[i].client, rand.New(rand.NewPCG(seed, uint64(i)))); err != nil {
			t.Errorf("session %d: %v", i, err)
		}
		all[i].client.Close()
	})
	waitFor(t, r)
	after := userMemory()
	var total int64
	for _, n := range sent {
		total += n
	}
	const mega = 1 << 20
	t.Logf("of %d MiB sent %d MiB were taken; memory: %d KiB open, %d MiB full, %d KiB after",
		total/mega, taken/mega, (open-before)>>10, (full-before)/mega, (after-before)>>10)
	if full-before > 100*mega {
		t.Errorf("%d stuck sessions take %d MiB, want 100 at most", sessions, (full-before)/mega)
	}
	if after-before > 20*mega {
		t.Errorf("%d MiB are still in use, want 20 at most", (after-before)/mega)
	}
	if total-taken < sessions*heldMost {
		t.Errorf("%d bytes were not taken, want at least %d for each session: are they stuck?", total-taken, heldMost)
	}
	if got := r.bytes(); got != [2]int64{0, total} || r.ended[causeBackend].Load() != sessions {
		t.Errorf("%d bytes and %d clean ends, want %d and %d", got, r.ended[causeBackend].Load(), total, sessions)
	}
}
