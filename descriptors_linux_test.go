package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// startWithFiles runs a router in a process that may open this many files, if Go
// asks for it (it asks for one less), and has some open that it does not know of.
func startWithFiles(t *testing.T, files, others int) *routerProcess {
	t.Helper()
	p := newRouterProcess(t)
	shell := exec.Command("sh", append([]string{"-c", fmt.Sprintf(`ulimit -S -n %d && ulimit -H -n %d && exec "$0" "$@"`, files-20, files), os.Args[0],
		"-backends", echoBackends(t, 1), "-overrides", t.TempDir(), "-hold", "3s"}, onFreePorts...)...)
	shell.Env, shell.Stdout, shell.Stderr = append(p.cmd.Env, "GOMAXPROCS=2"), p.log, &p.stderr
	for range others {
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		shell.ExtraFiles = append(shell.ExtraFiles, null)
	}
	p.cmd = shell
	p.start(t)
	p.await(t)
	p.log.wait(t, "table", 1)
	return p
}

// ask sends an upgrade and does not wait for the answer.
func (p *routerProcess) ask(t *testing.T, namespace string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", p.front)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	mustWrite(t, conn, upgradeRequest("/ws/"+namespace))
	return conn
}

// wantQuiet checks that the process does not spin, for a second.
func (p *routerProcess) wantQuiet(t *testing.T) {
	t.Helper()
	before := p.cpuTime(t)
	<-time.After(time.Second)
	if took := p.cpuTime(t) - before; took > 400*time.Millisecond {
		t.Errorf("the process used %s of CPU time in a second, want little: it spins", took)
	}
}

// cpuTime is utime and stime of proc_pid_stat(5), of which a second has 100.
func (p *routerProcess) cpuTime(t *testing.T) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := bytes.Cut(stat, []byte(") ")) // the command's name may have spaces
	fields := strings.Fields(string(rest))
	utime, err := strconv.Atoi(fields[11])
	if err != nil {
		t.Fatal(err)
	}
	stime, err := strconv.Atoi(fields[12])
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(utime+stime) * 10 * time.Millisecond
}

// Clients for whom there are no descriptors wait until there are, with all
// others none the wiser.
func TestProcessWaitsForDescriptors(t *testing.T) {
	t.Parallel()
	const files = 300
	p := startWithFiles(t, files, 0)
	limit := int(scrape(t, &p.runningRouter).values[`router_descriptors{kind="limit"}`])
	g := &gate{limit: limit}
	p.log.wait(t, "the open files allow fewer sessions than -max-sessions", 1)
	warning := p.log.all("the open files allow fewer sessions than -max-sessions")
	wantLine(t, warning, 1, map[string]any{"files": files - 1.0, "sessions": float64(g.sessions()), "max": 100_000.0})

	var open []*websocket.Conn
	for i := range g.sessions() {
		open = append(open, p.open(t, fmt.Sprint("ns-", i)))
	}
	var waiting []net.Conn
	for i := range 2 * g.sessions() {
		waiting = append(waiting, p.ask(t, fmt.Sprint("ns-", i)))
	}
	full := map[string]float64{`router_accept_paused`: 1, `router_ready`: 0, `router_descriptors{kind="used"}`: float64(2 * g.sessions()),
		`router_upgrades_waiting`: 0, `router_sessions{backend="backend-0"}`: float64(g.sessions())}
	waitMetrics(t, &p.runningRouter, full)
	why := fmt.Sprintf("clients wait for descriptors: %d of %d are used\n", 2*g.sessions(), limit)
	if status, body := p.get(t, "/readyz"); status != 503 || body != why {
		t.Errorf("readyz is %d %q, want 503 %q", status, body, why)
	}
	p.wantQuiet(t)
	for _, ws := range open {
		sayAndHear(t, ws, "still here")
	}

	half := g.sessions() / 2
	for _, ws := range open[:half] {
		ws.Close()
	}
	for _, conn := range waiting[:half] { // in the order in which they came
		mustAnswer(t, conn, http.StatusSwitchingProtocols)
	}
	waitMetrics(t, &p.runningRouter, full)
	for _, ws := range open[half:] {
		sayAndHear(t, ws, "still here")
	}
	for _, conn := range waiting[half:] {
		conn.Close()
	}
	waitBody(t, &p.runningRouter, "/readyz", 503, why) // those who left are taken in turn, and then
	open[half].Close()
	waitBody(t, &p.runningRouter, "/readyz", 200, "ready\n")
	if errors := append(p.log.all("http"), p.log.all("cannot accept connections")...); len(errors) > 0 {
		t.Errorf("there were troubles: %v", errors)
	}
}

// Where others have taken the descriptors that the gate counts on, clients wait
// or are told so; the sessions that are there go on.
func TestProcessSurvivesWithoutDescriptors(t *testing.T) {
	t.Parallel()
	const files, others = 300, 230
	p := startWithFiles(t, files, others)
	var open []*websocket.Conn
	for i := range 10 {
		open = append(open, p.open(t, fmt.Sprint("ns-", i)))
	}
	var more []net.Conn
	for i := range files - others {
		more = append(more, p.ask(t, fmt.Sprint("ns-", i)))
	}
	p.log.wait(t, "cannot accept connections", 1) // "too many open files"
	p.wantQuiet(t)
	for _, ws := range open {
		sayAndHear(t, ws, "still here")
	}
	for _, conn := range more {
		conn.SetReadDeadline(time.Now().Add(time.Millisecond)) // what was said was said in that second
		said, _ := io.ReadAll(conn)
		if len(said) > 0 && !strings.HasPrefix(string(said), "HTTP/1.1 101 ") && !strings.HasPrefix(string(said), "HTTP/1.1 503 ") {
			t.Errorf("a client heard %.100q, want 101, 503, or nothing yet", said)
		}
		conn.Close()
	}
	// The upgrades of those who left end by and by: until then a new client may be told
	// 503 too.
	for end := time.Now().Add(patience); ; {
		ws, err := websocket.Dial(p.ws+"ns-01", "", "http://client")
		if err == nil {
			ws.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatalf("a client that comes when all others have left: %v", err)
		}
	}
}

// marked checks that what it is given is one mark over and over.
type marked struct {
	mark [8]byte
	seen int
}

func (m *marked) Write(b []byte) (int, error) {
	for _, c := range b {
		if c != m.mark[m.seen%len(m.mark)] {
			return 0, fmt.Errorf("byte %d is %#x in session %x", m.seen, c, m.mark)
		}
		m.seen++
	}
	return len(b), nil
}

// talk makes a session in which both ends send back what they get, which is the
// session's number over and over, and ends it in four ways at once. No port is
// left waiting (TIME_WAIT): there would be too few for what else is tested.
func talk(t *testing.T, r *relay, number uint64, after time.Duration) {
	client, near := unixPair(t)
	far, backend := tcpPair(t)
	s := &session{namespace: "ns-01"}
	r.carry(s, [2]net.Conn{near, far}, [2][]byte{})
	var atClient, atBackend marked
	binary.BigEndian.PutUint64(atClient.mark[:], number)
	atBackend.mark = atClient.mark
	mustWrite(t, client, string(bytes.Repeat(atClient.mark[:], 100)))
	var talking sync.WaitGroup
	talking.Go(func() { wantMarked(t, &atBackend, io.TeeReader(backend, backend)) })
	talking.Go(func() { wantMarked(t, &atClient, io.TeeReader(client, client)) })
	<-time.After(after)
	for _, end := range []func(){
		func() { s.end(causeMoved) }, func() { s.end(causeDrain) },
		func() { client.Close() }, func() { reset(backend) },
	} {
		talking.Go(end)
	}
	talking.Wait()
}

// wantMarked reads until the connection is gone.
func wantMarked(t *testing.T, m *marked, r io.Reader) {
	buf := make([]byte, 4<<10)
	for {
		n, err := r.Read(buf)
		if _, bad := m.Write(buf[:n]); bad != nil {
			t.Error(bad)
		}
		if err != nil {
			return
		}
	}
}

// A descriptor that was closed is not used any more: it may be another session's
// by then. All come back.
func TestRelayKeepsSessionsApart(t *testing.T) {
	r := quietRelay(t)
	carried(t, r, 0, nil, nil).end(causeDrain) // Go's poller has its descriptors now
	before := descriptors(t)
	const sessions, workers = 4000, 8
	var all sync.WaitGroup
	for worker := range uint64(workers) {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(worker, 1))
			for i := range uint64(sessions / workers) {
				talk(t, r, rng.Uint64()<<16|worker<<12|i, time.Duration(rng.IntN(1000))*time.Microsecond)
			}
		})
	}
	all.Wait()
	waitFor(t, r)
	for end := time.Now().Add(patience); descriptors(t) > before; <-time.After(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d descriptors are open, %d were before the sessions", descriptors(t), before)
		}
	}
}

// descriptors is how many this process has open (proc_pid_fd(5)).
func descriptors(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}
