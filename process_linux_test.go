package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// routerProcess is a router in a process of its own.
type routerProcess struct {
	runningRouter
	cmd    *exec.Cmd
	stderr bytes.Buffer // complete after wait
	tls    *tls.Config  // of the clients of ask; nil for none
}

// newRouterProcess prepares this test binary to run as the router, on free ports unless
// args say others.
func newRouterProcess(t *testing.T, args ...string) *routerProcess {
	t.Helper()
	p := &routerProcess{runningRouter: runningRouter{log: newLogTail()}}
	p.cmd = exec.Command(os.Args[0], slices.Concat(onFreePorts, args)...)
	p.cmd.Env = append(os.Environ(), asRouter+"=1", "GORACE=atexit_sleep_ms=0")
	p.cmd.Stdout, p.cmd.Stderr = p.log, &p.stderr
	return p
}

// build has the process run a program that is built for it, in place of this test
// binary: the race detector takes memory and time of its own. start must not have been
// called.
func (p *routerProcess) build(t *testing.T) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "router")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	p.cmd.Path = program
}

// start starts the process, which the end of the test kills.
func (p *routerProcess) start(t *testing.T) {
	t.Helper()
	must(t, p.cmd.Start())
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			p.cmd.Process.Kill()
			p.cmd.Wait()
		}
	})
}

// serve starts the process and waits until it has a table.
func (p *routerProcess) serve(t *testing.T) {
	t.Helper()
	p.start(t)
	p.await(t)
	p.log.wait(t, "routing table updated", 1)
}

// wantSuccess waits for the end of the process, and returns the state that it ended in.
func (p *routerProcess) wantSuccess(t *testing.T) *os.ProcessState {
	t.Helper()
	state := p.wait(t)
	if state.ExitCode() != 0 || p.stderr.Len() > 0 {
		t.Errorf("the process ended with %v and stderr %q, want exit code 0", state, p.stderr.String())
	}
	return state
}

// wait returns the state that the process ended in.
func (p *routerProcess) wait(t *testing.T) *os.ProcessState {
	t.Helper()
	timeout := time.AfterFunc(patience, func() { p.cmd.Process.Signal(syscall.SIGQUIT) })
	defer timeout.Stop()
	p.cmd.Wait() // its error is in the state
	return p.cmd.ProcessState
}

// memory is what Linux knows of the process's memory, in KiB: VmRSS now, VmHWM
// at most.
func (p *routerProcess) memory(t *testing.T) map[string]int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	must(t, err)
	kib := map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^(VmHWM|VmRSS):\s+(\d+) kB$`).FindAllSubmatch(status, -1) {
		kib[string(m[1])], _ = strconv.Atoi(string(m[2]))
	}
	return kib
}

func TestProcessExitCodes(t *testing.T) {
	t.Parallel()
	taken := httptest.NewServer(http.NotFoundHandler())
	defer taken.Close()
	addr := taken.Listener.Addr().String()
	tests := map[string]struct {
		args   []string
		code   int
		stderr string
	}{
		"help":  {[]string{"-help"}, 0, ""},
		"usage": {[]string{"-hold", "long"}, 2, "router: invalid value \"long\" for flag -hold: parse error\n"},
		"taken": {[]string{"-replicas", "1", "-listen", addr}, 1, "router: -listen: listen tcp " + addr + ": bind: address already in use\n"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			p := newRouterProcess(t, tt.args...)
			p.start(t)
			if got := p.wait(t).ExitCode(); got != tt.code || p.stderr.String() != tt.stderr {
				t.Errorf("exit code %d, stderr %q; want %d, %q", got, p.stderr.String(), tt.code, tt.stderr)
			}
		})
	}
}

// TestProcessDrains sends a router with open sessions SIGTERM, and follows it
// to its end.
func TestProcessDrains(t *testing.T) {
	t.Parallel()
	const sessions, delay, duration = 8, 5 * time.Second, 800 * time.Millisecond
	dir := overridesDir(t, map[string]string{"ns-0": "backend-1"})
	p := newRouterProcess(t, "-backends", echoBackends(t, 2), "-overrides", dir,
		"-drain-delay", delay.String(), "-drain-duration", duration.String())
	p.serve(t)
	if status, body := p.get(t, "/readyz"); status != 200 || body != "ready\n" {
		t.Fatalf("readyz is %d %q, want 200 ready", status, body)
	}
	var open []*websocket.Conn
	for i := range sessions - 1 {
		open = append(open, p.open(t, fmt.Sprint("ns-", i)))
	}

	begun := time.Now()
	must(t, p.cmd.Process.Signal(syscall.SIGTERM))
	p.log.wait(t, "draining", 1)
	if status, body := p.get(t, "/readyz"); status != 503 || body != "the router is stopping\n" {
		t.Errorf("readyz is %d %q while draining, want 503 and why", status, body)
	}
	open = append(open, p.open(t, "latecomer"))
	for _, ws := range open {
		sayAndHear(t, ws, "still here")
	}
	waitRefused(t, p.clientAddr)
	if took := lastEnd(open).Sub(begun); took < delay+duration/2 {
		t.Errorf("%d sessions ended within %s, want them spread over %s after %s", sessions, took, duration, delay)
	}

	p.wantSuccess(t)
	wantEqual(t, "sessions that were ended, by the log", p.log.wait(t, "stopped", 1)["closed"], any(float64(sessions)))
	for _, line := range p.log.all("session ended") {
		if line["cause"] != "drain" || line["cut"] != false {
			t.Errorf("a session ended with cause %v, cut %v; want drain and false", line["cause"], line["cut"])
		}
	}
}

// waitRefused waits until nobody listens on addr.
func waitRefused(t *testing.T, addr string) {
	t.Helper()
	eventually(t, addr+" refuses connections", true, func() bool {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// lastEnd returns when the other side ended the last of the sessions, and answers each by
// an end.
func lastEnd(open []*websocket.Conn) time.Time {
	ends := make([]time.Time, len(open))
	var reading sync.WaitGroup
	for i, ws := range open {
		reading.Go(func() {
			io.Copy(io.Discard, ws) // to its Close frame
			ends[i] = time.Now()
			ws.Close()
		})
	}
	reading.Wait()
	return slices.MaxFunc(ends, time.Time.Compare)
}

func TestProcessSecondSignalKills(t *testing.T) {
	t.Parallel()
	p := newRouterProcess(t, "-backends", echoBackends(t, 1), "-overrides", t.TempDir(), "-drain-delay", "1h")
	p.serve(t)
	ws := p.open(t, "ns-01")
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.log.wait(t, "draining", 1)
	sayAndHear(t, ws, "the first signal cuts nothing")
	gone := make(chan struct{})
	var signals sync.WaitGroup
	signals.Go(func() {
		// The signal is given back to the system just after the drain began:
		// a second one that comes in between would be the first's twin.
		for {
			p.cmd.Process.Signal(syscall.SIGTERM)
			select {
			case <-gone:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	state := p.wait(t)
	close(gone)
	signals.Wait()
	if status := state.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("the process ended with %v, want killed by SIGTERM", state)
	}
}

// A log whose reader has gone away does not end the sessions.
func TestProcessLogReaderGone(t *testing.T) {
	out, in, err := os.Pipe()
	must(t, err)
	p := newRouterProcess(t, "-backends", echoBackends(t, 1), "-overrides", t.TempDir())
	p.cmd.Stdout = in
	p.start(t)
	in.Close()
	var reading sync.WaitGroup
	enough := make(chan struct{})
	reading.Go(func() {
		buf := make([]byte, 4096)
		for {
			select {
			case <-enough:
				return
			default:
			}
			out.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			n, _ := out.Read(buf)
			p.log.Write(buf[:n])
		}
	})
	p.await(t)
	p.log.wait(t, "routing table updated", 1)
	ws := p.open(t, "ns-01")
	sayAndHear(t, ws, "before")
	close(enough)
	reading.Wait()
	out.Close() // the reader of the log is gone
	p.open(t, "ns-02").Close()
	gone := make(chan *os.ProcessState, 1)
	go func() { state, _ := p.cmd.Process.Wait(); gone <- state }()
	select {
	case state := <-gone:
		t.Errorf("the router ended with %v: its sessions are lost with the reader of its log", state)
	case <-time.After(2 * time.Second):
		sayAndHear(t, ws, "after")
		p.cmd.Process.Kill()
		<-gone
	}
}

// What an http.Transport says by itself, here of a backend that answers a release twice, is a
// line of the log, and not one of stderr in another form.
func TestProcessLogsTransport(t *testing.T) {
	t.Parallel()
	old, next := newReleasingBackend(t), newReleasingBackend(t)
	old.setAnswer(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, strings.Repeat("HTTP/1.1 204 No Content\r\n\r\n", 2))
		io.Copy(io.Discard, conn)
	})
	dir := overridesDir(t, map[string]string{"ns-01": "backend-0"})
	addrs := old.Listener.Addr().String() + "," + next.Listener.Addr().String()
	p := newRouterProcess(t, "-backends", addrs, "-overrides", dir, "-handoff=single", "-release=/release")
	p.serve(t)
	p.open(t, "ns-01")
	must(t, os.WriteFile(filepath.Join(dir, "ns-01"), []byte("backend-1"), 0o644))
	line := p.log.wait(t, "HTTP error", 1)
	if text, _ := line["error"].(string); !strings.Contains(text, "Unsolicited response") {
		t.Errorf("the log has %q, want an unsolicited response", text)
	}
	must(t, p.cmd.Process.Signal(syscall.SIGTERM))
	p.wantSuccess(t)
}

// traced makes strace run the process and tamper with its system calls. What it did
// is in the file that is returned.
func (p *routerProcess) traced(t *testing.T, inject string) (file string) {
	t.Helper()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip(err)
	}
	call, _, _ := strings.Cut(inject, ":")
	file = filepath.Join(t.TempDir(), "strace")
	traced := exec.Command(strace, append([]string{"-D", "-f", "-qq", "-o", file, "-e", "trace=" + call, // -D: the process is the router, not strace
		"-e", "inject=" + inject}, p.cmd.Args...)...)
	traced.Env, traced.Stdout, traced.Stderr = p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr
	p.cmd = traced
	return file
}

// Whatever accept fails with, on the clients' listener and on the admin port's,
// both go on accepting, and the sessions live.
func TestProcessSurvivesAccept(t *testing.T) {
	for _, errno := range []string{"ENOMEM", "ENOBUFS", "EPROTO", "EPERM", "EMFILE", "ECONNABORTED"} {
		t.Run(errno, func(t *testing.T) {
			p := newRouterProcess(t, "-backends", echoBackends(t, 1), "-overrides", t.TempDir())
			p.traced(t, "accept4:error="+errno+":when=3+2") // of each thread's
			p.serve(t)
			ws := p.open(t, "ns-01")
			failed := map[any]bool{}
			for end := time.Now().Add(patience); len(failed) < 2 && time.Now().Before(end); {
				p.open(t, "ns-02").Close()
				if conn, err := net.Dial("tcp", p.adminAddr); err == nil { // a new one: get keeps its own
					conn.Close()
				}
				if status, _ := p.get(t, "/healthz"); status != http.StatusOK {
					t.Fatalf("healthz is %d", status)
				}
				for _, line := range p.log.all("cannot accept connections") {
					failed[line["listener"]] = true
				}
				if errno == "ECONNABORTED" && len(p.log.all("session ended")) > 8 {
					break
				}
			}
			if want := errno != "ECONNABORTED"; failed["-listen"] != want || failed["-admin"] != want {
				t.Errorf("the log tells of a failed accept of %v, want of both listeners' %v", failed, want)
			}
			sayAndHear(t, ws, "still here")
		})
	}
}

// startWithFiles runs a router in a process that may open this many files, if Go
// asks for it (it asks for one less), and has some open that it does not know of.
func startWithFiles(t *testing.T, files, others int) *routerProcess {
	t.Helper()
	p := newRouterProcess(t, "-backends", echoBackends(t, 1), "-overrides", t.TempDir(), "-hold", "3s")
	limit := fmt.Sprintf(`ulimit -S -n %d && ulimit -H -n %d && exec "$0" "$@"`, files-20, files)
	shell := exec.Command("sh", slices.Concat([]string{"-c", limit}, p.cmd.Args)...)
	shell.Env, shell.Stdout, shell.Stderr = append(p.cmd.Env, "GOMAXPROCS=2"), p.log, &p.stderr
	for range others {
		null, err := os.Open(os.DevNull)
		must(t, err)
		defer null.Close()
		shell.ExtraFiles = append(shell.ExtraFiles, null)
	}
	p.cmd = shell
	p.serve(t)
	return p
}

// ask sends an upgrade and does not wait for the answer.
func (p *routerProcess) ask(t *testing.T, namespace string) net.Conn {
	t.Helper()
	conn := dial(t, p.clientAddr)
	if p.tls != nil {
		conn = tls.Client(conn, p.tls)
	}
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
	must(t, err)
	_, rest, _ := bytes.Cut(stat, []byte(") ")) // the command's name may have spaces
	fields := strings.Fields(string(rest))
	var utime, stime int
	_, err = fmt.Sscan(fields[11]+" "+fields[12], &utime, &stime)
	must(t, err)
	return time.Duration(utime+stime) * 10 * time.Millisecond
}

// Clients for whom there are no descriptors wait until there are, with all
// others none the wiser.
func TestProcessWaitsForDescriptors(t *testing.T) {
	t.Parallel()
	const files = 300
	p := startWithFiles(t, files, 0)
	limit := int(scrape(t, &p.runningRouter).values[`router_client_descriptors_limit`])
	g := &descriptorLimit{limit: limit}
	p.log.wait(t, "open file limit allows fewer sessions than -max-sessions", 1)
	warning := p.log.all("open file limit allows fewer sessions than -max-sessions")
	wantLine(t, warning, 1, map[string]any{"max_files": files - 1.0, "sessions": float64(g.moreSessions()), "max_sessions": 100_000.0})

	var open []*websocket.Conn
	for i := range g.moreSessions() {
		open = append(open, p.open(t, fmt.Sprint("ns-", i)))
	}
	var waiting []net.Conn
	for i := range 2 * g.moreSessions() {
		waiting = append(waiting, p.ask(t, fmt.Sprint("ns-", i)))
	}
	full := map[string]float64{`router_accept_paused`: 1, `router_ready`: 0, `router_client_descriptors`: float64(2 * g.moreSessions()),
		`router_pending_upgrades`: 0, `router_sessions{backend="backend-0"}`: float64(g.moreSessions())}
	waitMetrics(t, &p.runningRouter, full)
	why := fmt.Sprintf("clients wait for descriptors: %d of %d are used\n", 2*g.moreSessions(), limit)
	if status, body := p.get(t, "/readyz"); status != 503 || body != why {
		t.Errorf("readyz is %d %q, want 503 %q", status, body, why)
	}
	p.wantQuiet(t)
	for _, ws := range open {
		sayAndHear(t, ws, "still here")
	}

	half := g.moreSessions() / 2
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
	if errors := append(p.log.all("HTTP error"), p.log.all("cannot accept connections")...); len(errors) > 0 {
		t.Errorf("there were troubles: %v", errors)
	}
}

// Where others have taken the descriptors that the limit counts on, clients wait
// or are told so; the sessions that are there go on.
func TestProcessSurvivesWithoutDescriptors(t *testing.T) {
	t.Parallel()
	const files, others = 300, 230 + maxPeerConns // routers that are not there are not asked
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
	// The upgrades of those who left end by and by. Then there are descriptors again.
	waitMetrics(t, &p.runningRouter, map[string]float64{
		`router_pending_upgrades`: 0, `router_sessions{backend="backend-0"}`: float64(len(open)),
	})
	p.open(t, "ns-01")
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
	r.startSession(s, [2]net.Conn{near, far}, [2][]byte{})
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
	startedSession(t, r).end(causeDrain) // Go's poller has its descriptors now
	before := descriptors(t, "self")
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
	eventually(t, "more descriptors are open than before the sessions", 0, func() int { return max(0, descriptors(t, "self")-before) })
}

// descriptors is how many a process has open (proc_pid_fd(5)).
func descriptors(t *testing.T, pid string) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/" + pid + "/fd")
	must(t, err)
	return len(fds)
}

// stalling is a log whose reader can be kept from reading.
type stalling struct {
	*logTail
	held sync.Mutex
}

func (s *stalling) Write(b []byte) (int, error) {
	s.held.Lock()
	defer s.held.Unlock()
	return s.logTail.Write(b)
}

// startStalling runs a router in a process and, once it serves, stops reading
// its log until resume. There were this many sessions since.
func startStalling(t *testing.T, sessions int) (p *routerProcess, resume func()) {
	t.Helper()
	p = newRouterProcess(t, "-backends", echoBackends(t, 1), "-overrides", t.TempDir())
	reader := &stalling{logTail: p.log}
	p.cmd.Stdout = reader
	p.serve(t)
	reader.held.Lock()
	resume = sync.OnceFunc(reader.held.Unlock)
	t.Cleanup(resume)
	long := strings.Repeat("n", 240) // for a long line
	for i := range sessions {
		p.open(t, fmt.Sprint(long, i)).Close()
	}
	waitMetrics(t, &p.runningRouter, map[string]float64{`router_sessions_opened_total{backend="backend-0"}`: float64(sessions),
		`router_sessions{backend="backend-0"}`: 0, `router_log_lines_dropped_total`: 0})
	return p, resume
}

// Sessions start, echo and end while nobody reads the log, which is whole when
// somebody does.
func TestProcessLogStalls(t *testing.T) {
	t.Parallel()
	const sessions = 400 // whose lines a pipe and its reader do not hold
	p, resume := startStalling(t, sessions)
	must(t, p.cmd.Process.Signal(syscall.SIGTERM))
	resume()
	p.wantSuccess(t)
	wantLine(t, p.log.all("session ended"), sessions, nil)
	wantLine(t, p.log.all("stopped"), 1, nil)
}

// A log that nobody reads does not keep the process from ending.
func TestProcessEndsWithoutLog(t *testing.T) {
	t.Parallel()
	p, _ := startStalling(t, 400)
	begun := time.Now()
	must(t, p.cmd.Process.Signal(syscall.SIGTERM))
	timeout := time.AfterFunc(patience, func() { p.cmd.Process.Signal(syscall.SIGQUIT) })
	defer timeout.Stop()
	state, err := p.cmd.Process.Wait()
	if took := time.Since(begun); err != nil || state.ExitCode() != 0 || took < logFlushTimeout {
		t.Errorf("the process ended with %v and error %v after %s, want exit code 0 after %s", state, err, took, logFlushTimeout)
	}
}

// previewBodies are the ConfigMaps that cost most to plan, by what is in them: the
// largest that are planned, and some that are not.
func previewBodies() map[string][]byte {
	data := func(entries int, entry func(i int) string) []byte {
		b := []byte(`{"kind":"ConfigMap","metadata":{"name":"overwriting"},"data":{`)
		for i := range entries {
			b = append(append(b, entry(i)...), ',')
		}
		return append(b[:len(b)-1], "}}"...)
	}
	one := func(text string, size int) func(int) string {
		return func(int) string { return `"a":"` + strings.Repeat(text, size/len(text)) + `"` }
	}
	const most, entries = maxPreviewBody - 100, (maxConfigMapData - 100) / entryOverhead
	return map[string][]byte{
		"commas":          data(1, one(",", maxConfigMapData-100)),
		"escapes":         data(1, one(`\u0001`, most)),
		"tiny":            data(entries*6/11, func(i int) string { return fmt.Sprintf(`"%05x":""`, i) }),
		"distinct":        data(entries*6/16, func(i int) string { return fmt.Sprintf(`"%05x":"%05x"`, i, i) }),
		"distinct, long":  data(entries*6/48, func(i int) string { return fmt.Sprintf(`"%016x":"backend-%018d"`, i, i) }),
		"same name":       data(entries*6/14, func(i int) string { return fmt.Sprintf(`"%x":"%05x"`, i&0xfff, i) }),
		"too many":        data(most/12, func(i int) string { return fmt.Sprintf(`"%05x":""`, i) }),
		"too large":       data(1, one(",", 16<<20)),
		"no end":          bytes.Repeat([]byte(`{"a":`), most/5),
		"an array of all": bytes.Repeat([]byte(`[1,`), most/3),
	}
}

// Whatever is sent to the admin port at once, a probe is answered, and the memory
// that it takes is bounded.
func TestProcessAdminUnderLoad(t *testing.T) {
	const grows = 64 << 20
	p := newRouterProcess(t, "-backends", echoBackends(t, 4), "-kube", kubeAnswers(t, oneMap()))
	p.build(t)
	p.serve(t)
	bodies := previewBodies()
	before := p.memory(t)["VmHWM"] << 10

	var work, probes sync.WaitGroup
	done := make(chan struct{})
	probes.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				p.probeHealth(t)
			}
		}
	})
	for range 300 { // idle
		dial(t, p.adminAddr)
	}
	planned := make(chan string, 3*len(bodies))
	for name, body := range bodies {
		for range 3 {
			work.Go(func() {
				if p.planStatus(body) == http.StatusOK {
					planned <- name
				}
			})
		}
		work.Go(func() {
			body := "--B\r\nContent-Disposition: form-data; name=f; filename=g\r\n\r\n" + strings.Repeat("x", 16<<20)
			req, err := http.NewRequest("GET", p.admin+"/owner?namespace=a", strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Content-Type", "multipart/form-data; boundary=B")
			if resp, err := http.DefaultClient.Do(req); err == nil {
				resp.Body.Close()
			}
		})
		work.Go(func() {
			if resp, err := http.Get(p.admin + "/metrics"); err == nil { // else its connection had to make room
				resp.Body.Close()
			}
		})
	}
	work.Wait()
	close(done)
	probes.Wait()
	if grown := p.memory(t)["VmHWM"]<<10 - before; grown > grows {
		t.Errorf("the memory has grown by %d MiB, want %d at most", grown>>20, grows>>20)
	} else {
		t.Logf("the memory has grown by %d MiB, and %d plans were made", grown>>20, len(planned))
	}
	close(planned)
	kinds := map[string]bool{}
	for name := range planned {
		kinds[name] = true
	}
	if want := []string{"commas", "distinct", "distinct, long", "escapes", "same name", "tiny"}; !slices.Equal(slices.Sorted(maps.Keys(kinds)), want) {
		t.Errorf("there were plans of %v, want %v", kinds, want)
	}
}

// planStatus asks for a plan until it is that plan's turn, and returns what comes of
// it, or 0 after a while.
func (p *routerProcess) planStatus(body []byte) int {
	for end := time.Now().Add(4 * patience); time.Now().Before(end); <-time.After(100 * time.Millisecond) {
		resp, err := http.Post(p.admin+"/plan", "application/json", bytes.NewReader(body))
		if err != nil { // the connection had to make room
			continue
		}
		io.Copy(io.Discard, resp.Body)
		if resp.Body.Close(); resp.StatusCode != http.StatusServiceUnavailable {
			return resp.StatusCode
		}
	}
	return 0
}

// probeHealth asks as a kubelet does: with a connection for each probe, and again
// when one fails, which it may where the machine was busy while others connected.
func (p *routerProcess) probeHealth(t *testing.T) {
	t.Helper()
	var said []byte
	var err error
	for range 3 {
		<-time.After(10 * time.Millisecond)
		var conn net.Conn
		if conn, err = net.Dial("tcp", p.adminAddr); err != nil {
			continue
		}
		conn.SetDeadline(time.Now().Add(patience))
		io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
		said, err = io.ReadAll(conn)
		conn.Close()
		if err == nil && strings.HasPrefix(string(said), "HTTP/1.1 200 ") {
			return
		}
	}
	t.Errorf("/healthz is %q, %v at the third time, want 200", said, err)
}

// churnFlag is for "make churn".
var churnFlag = flag.Duration("churn", 5*time.Second, "how long TestProxyChurn opens and closes sessions")

// churnWay is how a session of the churn ends. Its number is the first byte of
// the client's message.
type churnWay byte

const (
	clientCloses churnWay = iota
	clientResets
	backendCloses
	backendResets
	bothClose
	bothReset
	clientResetsStuck // while the backend sends it a big frame; rare, since it takes long
	clientGivesUp     // without waiting for the 101: there may be no session
	churnWays
)

// churn opens and closes sessions through a router in a process of its own.
type churn struct {
	clientAddr string   // the router's address
	log        churnLog // the router's

	// Sessions: those that had their echo, and upgrades that were given up.
	echoed, givenUp atomic.Int64
}

// churnLog counts the sessions that have ended and leaves the rest to tail,
// which keeps its lines.
type churnLog struct {
	tail  *logTail
	ended atomic.Int64
	rest  []byte // of a line that has not ended
}

func (l *churnLog) Write(b []byte) (int, error) {
	l.rest = append(l.rest, b...)
	for {
		end := bytes.IndexByte(l.rest, '\n') + 1
		if end == 0 {
			return len(b), nil
		}
		if line := l.rest[:end]; bytes.Contains(line, []byte(`"msg":"session ended"`)) {
			l.ended.Add(1)
		} else {
			l.tail.Write(line)
		}
		l.rest = l.rest[end:]
	}
}

// churnBackend serves until the test ends, and keeps nothing of what was, as
// startStub does. It sends back what a message has behind its way, and ends its
// part of the session as that says.
func churnBackend(t *testing.T, host string) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", host+":0")
	must(t, err)
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { serveChurn(conn.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() { l.Close(); running.Wait() })
	return l.Addr().String()
}

func serveChurn(conn *net.TCPConn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	br := bufio.NewReader(conn)
	if _, err := readHead(br); err != nil {
		return // the client gave up
	}
	io.WriteString(conn, switching)
	var head [3]byte
	if _, err := io.ReadFull(br, head[:]); err != nil {
		return
	}
	io.CopyN(conn, br, int64(binary.BigEndian.Uint16(head[1:])))
	switch way := churnWay(head[0]); way {
	case backendCloses: // its last bytes are the echo
	case backendResets, bothClose, bothReset, clientResetsStuck:
		br.ReadByte() // the client has the echo
		switch way {
		case backendResets, bothReset:
			reset(conn)
		case clientResetsStuck:
			conn.Write(churnFrame(make([]byte, 4<<20))) // until the end
		}
	default:
		io.Copy(io.Discard, br)
	}
}

// churnFrame returns a WebSocket frame with this payload, as a backend sends it.
func churnFrame(payload []byte) []byte {
	return slices.Concat(binary.BigEndian.AppendUint64([]byte{0x82, 127}, uint64(len(payload))), payload)
}

// session opens a session, has its echo and ends it. local is an address that
// has ports left: a side that ends first keeps its port for a minute.
func (c *churn) session(rng *rand.Rand, local net.Addr) error {
	way := churnWay(rng.IntN(int(churnWays)))
	if way == clientResetsStuck && rng.IntN(10) > 0 {
		way = clientResets
	}
	conn, err := (&net.Dialer{LocalAddr: local, Timeout: patience}).Dial("tcp", c.clientAddr)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	text := make([]byte, logUniform(rng, 20_000))
	rand.NewChaCha8([32]byte{byte(rng.Uint32())}).Read(text)
	text = churnFrame(text)
	message := slices.Concat(binary.BigEndian.AppendUint16([]byte{byte(way)}, uint16(len(text))), text)
	request := upgradeRequest("/ws/ns-" + strconv.Itoa(rng.IntN(1000)))
	if rng.IntN(2) == 0 {
		request, message = request+string(message), nil
	}
	if _, err := io.WriteString(conn, request); err != nil {
		return err
	}
	if way == clientGivesUp {
		c.givenUp.Add(1)
		if rng.IntN(2) == 0 {
			reset(conn.(*net.TCPConn))
		}
		return nil
	}
	if err := echoed(conn, message, text); err != nil {
		return fmt.Errorf("way %d: %w", way, err)
	}
	c.echoed.Add(1)
	return endChurn(conn.(*net.TCPConn), way, rng)
}

// echoed reads the 101, sends the message and reads the text.
func echoed(conn net.Conn, message, text []byte) error {
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(resp.Body)
		return fmt.Errorf("status %d %q, want 101", resp.StatusCode, body)
	}
	if _, err := conn.Write(message); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if n, err := io.ReadFull(br, got); err != nil || !bytes.Equal(got, text) {
		return fmt.Errorf("%d bytes of an echo, %v; want the %d that were sent", n, err, len(text))
	}
	return nil
}

// endChurn ends the client's part of a session.
func endChurn(conn *net.TCPConn, way churnWay, rng *rand.Rand) error {
	if way >= backendResets {
		conn.Write([]byte{0}) // an error shows below, or is an end as good as another
	}
	switch way {
	case clientResets, bothReset:
		reset(conn)
	case clientResetsStuck:
		time.Sleep(time.Duration(rng.IntN(5000)) * time.Microsecond) // in which it fills up, or not
		reset(conn)
	case backendCloses, backendResets:
		_, err := io.Copy(io.Discard, conn)
		if err != nil && (way == backendCloses || errors.Is(err, os.ErrDeadlineExceeded)) {
			return fmt.Errorf("way %d: %w, want the end", way, err)
		}
	}
	return nil
}

// run keeps some sessions open at once for that long, and calls tell each minute.
func (c *churn) run(t *testing.T, d time.Duration, tell func()) {
	t.Helper()
	const atOnce = 32
	end, seed := time.Now().Add(d), randomSeed(t)
	var stop atomic.Bool
	var running sync.WaitGroup
	for i := range atOnce {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		running.Go(func() {
			for time.Now().Before(end) && !stop.Load() {
				local := &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(1+rng.IntN(200)))}
				if err := c.session(rng, local); err != nil {
					t.Error(err)
					stop.Store(true)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { running.Wait(); close(done) }()
	minute := time.NewTicker(time.Minute)
	defer minute.Stop()
	for {
		select {
		case <-done:
			return
		case <-minute.C:
			tell()
		}
	}
}

// usage is what a router has of what a session may leave behind.
type usage struct {
	descriptors, goroutines int
	heap, resident          int // bytes; the heap with the stacks
}

func (u usage) String() string {
	return fmt.Sprintf("%d descriptors, %d goroutines, %d KiB heap, %d KiB resident",
		u.descriptors, u.goroutines, u.heap>>10, u.resident>>10)
}

// within reports whether u is as other but for what comes and goes by itself.
func (u usage) within(other usage) bool {
	resident, pipes := 16<<20, 32*runtime.NumCPU() // descriptors that a relay may keep for big frames
	if raced() {
		resident = 64 << 20 // the detector's own memory
	}
	return u.descriptors <= other.descriptors+pipes && u.goroutines <= other.goroutines+2 &&
		u.heap <= other.heap+512<<10 && u.resident <= other.resident+resident
}

// usage asks the process, after a collection, which is the n-th.
func (p *routerProcess) usage(t *testing.T, n int) (u usage) {
	t.Helper()
	p.cmd.Process.Signal(syscall.SIGHUP)
	u.heap = int(p.log.wait(t, "memory", n)["used"].(float64))
	u.goroutines = int(scrape(t, &p.runningRouter).values["go_goroutines"])
	u.descriptors, u.resident = descriptors(t, strconv.Itoa(p.cmd.Process.Pid)), p.memory(t)["VmRSS"]<<10
	return u
}

// settled waits until no session and no upgrade is left.
func (p *routerProcess) settled(t *testing.T) {
	t.Helper()
	waitMetrics(t, &p.runningRouter, map[string]float64{"router_pending_upgrades": 0,
		`router_sessions{backend="backend-0"}`: 0, `router_sessions{backend="backend-1"}`: 0})
}

// Sessions that come and go at full speed, ended by the client, the backend or
// both, by FIN or RST, leave nothing behind in the router: no descriptor, no
// goroutine, no memory; and each is counted and logged once. A router that has
// served some is what the end is compared with.
//
// It fails if a socket or a goroutine is left, if a session stays in the relay's
// set, and if an end is not counted or logged; after some 10,000 sessions also if
// a timer outlives each, and after 100,000 if a few bytes of each stay.
func TestProxyChurn(t *testing.T) {
	const warmSessions = 1000 // at least: what a router keeps for good, it has by then, however slow the machine
	addrs := churnBackend(t, "127.0.0.1") + "," + churnBackend(t, "127.0.0.2")
	p := newRouterProcess(t, "-backends", addrs, "-overrides", t.TempDir())
	c := &churn{log: churnLog{tail: p.log}}
	p.cmd.Stdout = &c.log
	p.serve(t)
	c.clientAddr = p.clientAddr

	warmUp := func() { c.run(t, max(time.Second, *churnFlag/60), func() {}) }
	for warmUp(); c.echoed.Load() < warmSessions && !t.Failed(); warmUp() {
	}
	p.settled(t)
	asked := 1
	before := p.usage(t, asked)
	warm, begun := c.echoed.Load(), time.Now()
	c.run(t, *churnFlag, func() {
		asked++
		t.Logf("%s: %d sessions; %s", time.Since(begun).Round(time.Second), c.echoed.Load()-warm, p.usage(t, asked))
	})
	count, took := c.echoed.Load()-warm, time.Since(begun)
	p.settled(t)
	var after usage
	for end := time.Now().Add(patience); ; <-time.After(100 * time.Millisecond) {
		asked++
		if after = p.usage(t, asked); after.within(before) {
			break
		}
		if time.Now().After(end) {
			t.Errorf("%d sessions left something behind", count)
			break
		}
	}
	t.Logf("%d sessions in %s, %.0f a second\nbefore: %s\nafter:  %s", count, took.Round(time.Millisecond), float64(count)/took.Seconds(), before, after)
	c.wantAccounts(t, p)
}

// wantAccounts checks what the router counted and logged.
func (c *churn) wantAccounts(t *testing.T, p *routerProcess) {
	t.Helper()
	var total, ended float64
	for series, value := range scrape(t, &p.runningRouter).values {
		switch {
		case strings.HasPrefix(series, "router_sessions_opened_total{"):
			total += value
		case strings.HasPrefix(series, "router_sessions_ended_total{"):
			ended += value
		}
	}
	least, most := float64(c.echoed.Load()), float64(c.echoed.Load()+c.givenUp.Load())
	if logged := float64(c.log.ended.Load()); total < least || total > most || ended != total || logged != total {
		t.Errorf("%v sessions, %v ended, %v in the log; want %v to %v of each", total, ended, logged, least, most)
	}
}

// A router with a million overrides from 30 ConfigMaps never has more than 96 MiB, neither
// at its start nor while they change: 70 were seen. While namespaces are on their way to
// their new owners it has two tables, and at most 1.3 of the memory before.
func TestMemoryOfAMillion(t *testing.T) {
	const objects, overrides, events, most = 30, 33_334, 14, 96 << 10 // KiB
	next := make(chan int, events)
	server := scriptedKube(script{respond(200, string(largeList(objects, overrides)))}, script{func(w http.ResponseWriter, r *http.Request) {
		stream()(w, r)
		for version := range next {
			fmt.Fprintf(w, `{"type":"MODIFIED","object":%s}`, largeMap(version%objects, overrides, version))
			w.(http.Flusher).Flush()
		}
		<-r.Context().Done()
	}})
	p := newRouterProcess(t, "-backends", echoBackends(t, 16), "-configmap-selector", "a=b", "-kube-namespace", "edge",
		"-drain-duration", "0", "-move-settle", "1h", "-kube", server.url(t))
	p.build(t)
	p.serve(t)
	p.log.wait(t, "routing table updated", 1)
	change := func(version int) {
		next <- version
		line := p.log.wait(t, "routing table updated", version)
		if line["overrides"] != float64(objects*overrides) || line["changed"] != float64(overrides) {
			t.Fatalf("%v", line)
		}
	}
	for version := 2; version < 1+events; version++ {
		change(version)
	}
	rest := p.memory(t)
	p.until(t, "/status", `"in_progress":false`)
	const last = 1 + events
	p.open(t, fmt.Sprintf("tenant-%07d", last%objects*overrides)) // it has to move, in an hour
	change(last)
	p.until(t, "/status", `"in_progress":true`)
	during := p.memory(t)
	close(next)
	t.Logf("resident: %d KiB at rest, %d in a change, %d at most", rest["VmRSS"], during["VmRSS"], during["VmHWM"])
	if during["VmHWM"] > most {
		t.Errorf("%d KiB resident at most, want %d", during["VmHWM"], most)
	}
	if during["VmRSS"] > rest["VmRSS"]*13/10 {
		t.Errorf("%d KiB resident in a change, want at most 1.3 of %d", during["VmRSS"], rest["VmRSS"])
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.wantSuccess(t)
}
