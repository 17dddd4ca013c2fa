//go:build !portable && !386

package main

import (
	"bufio"
	"flag"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// partsFlag is for the whole of what 20,000 descriptors allow: 9000.
var partsFlag = flag.Int("parts", 600, "how many sessions TestProcessParts moves, and then drains")

// stuckFlag is for the whole of what 20,000 descriptors allow: 9000.
var stuckFlag = flag.Int("stuck", 600, "how many sessions TestProcessStuck has")

// Sessions whose clients take nothing cost what is held of them, within a budget,
// and all others go on.
func TestProcessStuck(t *testing.T) {
	t.Run("1 KiB", func(t *testing.T) { stickSessions(t, 1<<10, *stuckFlag*4) }) // 36 MiB for 9,000
	t.Run("64 KiB", func(t *testing.T) { stickSessions(t, 64<<10, min(*stuckFlag*64*5/4, 2*heldBudget>>10)) })
}

// stickSessions sends pieces to clients that take none until each session holds one,
// and checks that the router has at most that much more memory then, in KiB.
func stickSessions(t *testing.T, piece, most int) {
	sessions, conns := *stuckFlag, make(chan net.Conn, *stuckFlag)
	done := make(chan struct{})
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, switching)
		conns <- conn
		<-done
	})
	t.Cleanup(func() { close(done) }) // before the backend's own
	addrs := backend.addr + "," + startStub(t, "127.0.0.2:0", echo).addr
	overrides := pinned(10, 0)
	overrides["other"] = "backend-1"
	p := newRouterProcess(t, slices.Concat(onFreePorts, []string{"-listen", "unix:" + filepath.Join(t.TempDir(), "socket"),
		"-backends", addrs, "-overrides", overridesDir(t, overrides), "-drain-time", "0"})...)
	p.build(t)
	p.start(t)
	p.await(t)
	p.log.wait(t, "table", 1)
	p.openParting(t, sessions, 10)
	other, err := net.Dial("unix", p.front)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	mustWrite(t, other, upgradeRequest("/ws/other"))
	mustAnswer(t, other, http.StatusSwitchingProtocols)

	before := p.memory(t)["VmRSS"]
	stuck, data := make([]net.Conn, sessions), make([]byte, piece)
	for i := range stuck {
		stuck[i] = <-conns
	}
	for taken, grown := 0.0, 2.0; grown > 1; { // until all hold what they were sent last: only the other's byte is taken
		was := taken
		for _, conn := range stuck {
			conn.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
			conn.Write(data) // in part, where its buffers have no more room
		}
		mustWrite(t, other, "x")
		mustRead(t, other, "x")
		taken = scrape(t, &p.runningRouter).values[`router_bytes_total{direction="to_client"}`]
		grown = taken - was
	}
	grown := p.memory(t)["VmRSS"] - before
	t.Logf("%d sessions take %d KiB", sessions, grown)
	if grown > most {
		t.Errorf("%d sessions take %d KiB, want %d at most", sessions, grown, most)
	}
}

// TestProcessParts moves all sessions of a router in a process of its own, and
// drains as many. It holds the Close frames at both ends, the pace and the
// memory, and tells of the CPU time.
func TestProcessParts(t *testing.T) {
	const rate, namespaces = 2000, 10
	sessions := *partsFlag
	drainTime := time.Duration(sessions) * time.Second / rate
	addrs := startStub(t, "127.0.0.1:0", serveParting(t)).addr + "," + startStub(t, "127.0.0.2:0", serveParting(t)).addr
	dir := overridesDir(t, pinned(namespaces, 0))
	p := newRouterProcess(t, slices.Concat(onFreePorts, []string{"-listen", "unix:" + filepath.Join(t.TempDir(), "socket"),
		"-backends", addrs, "-overrides", dir, "-move-rate", strconv.Itoa(rate), "-drain-delay", "0", "-drain-time", drainTime.String()})...)
	p.start(t)
	p.await(t)
	p.log.wait(t, "table", 1)

	moving := leave(t, p.openParting(t, sessions, namespaces), restarts)
	cpu, before := p.cpuTime(t), p.memory(t)
	for namespace, backend := range pinned(namespaces, 1) {
		if err := os.WriteFile(filepath.Join(dir, namespace), []byte(backend), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	wantPace(t, "move", moving(), drainTime)
	receipt := p.log.wait(t, "moved", 1)
	if receipt["sessions"] != float64(sessions) || receipt["namespaces"] != float64(namespaces) || receipt["cut"] != 0.0 {
		t.Errorf("the receipt is %v, want %d sessions of %d namespaces and none cut", receipt, sessions, namespaces)
	}
	t.Logf("move: %s of CPU time; memory in KiB before %v, after %v", p.cpuTime(t)-cpu, before, p.memory(t))
	draining := leave(t, p.openParting(t, sessions, namespaces), goesAway)
	cpu, second := p.cpuTime(t), p.memory(t)
	if grown := second["VmRSS"] - before["VmRSS"]; grown > 32<<10 && !raced() { // the race detector keeps memory of its own
		t.Errorf("with as many sessions as before the move the router has %d KiB more", grown)
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wantPace(t, "drain", draining(), drainTime)
	state := p.wait(t)
	if state.ExitCode() != 0 {
		t.Errorf("the router ended with %v, want exit code 0", state)
	}
	t.Logf("drain: %s of CPU time", state.UserTime()+state.SystemTime()-cpu)
}

// serveParting is a backend that says nothing until the router parts from it.
func serveParting(t *testing.T) func(net.Conn, *bufio.Reader) {
	return func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, switching)
		first, payload, err := nextWireFrame(br, true, nil)
		if got := describeFrame(first, payload); err != nil || got != goesAway {
			t.Errorf("a backend read %s, %v; want %s", got, err, goesAway)
			return
		}
		conn.Write(closeFrame(closeGoingAway, "", false))
	}
}

// openParting opens sessions of the namespaces of pinned, in turn.
func (p *routerProcess) openParting(t *testing.T, sessions, namespaces int) (open []net.Conn) {
	t.Helper()
	names := slices.Sorted(maps.Keys(pinned(namespaces, 0)))
	for i := range sessions {
		conn, err := net.Dial("unix", p.front)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		mustWrite(t, conn, upgradeRequest("/ws/"+names[i%namespaces]))
		mustAnswer(t, conn, http.StatusSwitchingProtocols)
		open = append(open, conn)
	}
	return open
}

// leave waits for the Close frame of each session, and answers it. What it
// returns waits for all, and says when they came, in order.
func leave(t *testing.T, open []net.Conn, want string) func() []time.Time {
	ends := make([]time.Time, len(open))
	var reading sync.WaitGroup
	for i, conn := range open {
		reading.Go(func() {
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(6 * patience))
			first, payload, err := nextWireFrame(conn, false, nil)
			ends[i] = time.Now()
			if got := describeFrame(first, payload); err != nil || got != want {
				t.Errorf("client %d read %s, %v; want %s", i, got, err, want)
			}
			conn.Write(closeFrame(1000, "", true))
			io.Copy(io.Discard, conn)
		})
	}
	return func() []time.Time {
		reading.Wait()
		slices.SortFunc(ends, time.Time.Compare)
		return ends
	}
}

// wantPace checks that the times span so much: within a twentieth, and what a busy
// machine may be late.
func wantPace(t *testing.T, what string, times []time.Time, want time.Duration) {
	t.Helper()
	took := times[len(times)-1].Sub(times[0])
	t.Logf("%s: %d sessions in %s, want %s (%+.1f %%)", what, len(times), took.Round(time.Millisecond), want, 100*(took.Seconds()/want.Seconds()-1))
	if early, late := want/20+50*time.Millisecond, want/20+time.Second; took < want-early || took > want+late {
		t.Errorf("%s: %d sessions in %s, want %s, at most %s less or %s more", what, len(times), took, want, early, late)
	}
}
