package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
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
}

// newRouterProcess prepares this test binary to run as the router.
func newRouterProcess(t *testing.T, args ...string) *routerProcess {
	t.Helper()
	p := &routerProcess{runningRouter: runningRouter{log: newLogTail()}}
	p.cmd = exec.Command(os.Args[0], args...)
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
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			p.cmd.Process.Kill()
			p.cmd.Wait()
		}
	})
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
	if err != nil {
		t.Fatal(err)
	}
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
	const sessions = 8
	dir := overridesDir(t, map[string]string{"ns-0": "backend-1"})
	p := newRouterProcess(t, slices.Concat(onFreePorts, []string{"-backends", echoBackends(t, 2), "-overrides", dir,
		"-drain-delay", "2s", "-drain-time", "800ms"})...)
	p.start(t)
	p.await(t)
	p.log.wait(t, "table", 1)
	if status, body := p.get(t, "/readyz"); status != 200 || body != "ready\n" {
		t.Fatalf("readyz is %d %q, want 200 ready", status, body)
	}
	var open []*websocket.Conn
	for i := range sessions - 1 {
		open = append(open, p.open(t, fmt.Sprint("ns-", i)))
	}

	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.log.wait(t, "draining", 1)
	if status, body := p.get(t, "/readyz"); status != 503 || body != "the router stops\n" {
		t.Errorf("readyz is %d %q while draining, want 503 and why", status, body)
	}
	open = append(open, p.open(t, "latecomer"))
	for _, ws := range open {
		sayAndHear(t, ws, "still here")
	}
	waitRefused(t, p.front)
	ends := endTimes(open)
	if spread := ends[sessions-1].Sub(ends[0]); spread < 400*time.Millisecond {
		t.Errorf("%d sessions ended within %s, want them spread over -drain-time 800ms", sessions, spread)
	}

	if state := p.wait(t); state.ExitCode() != 0 || p.stderr.Len() > 0 {
		t.Errorf("the process ended with %v and stderr %q, want exit code 0", state, p.stderr.String())
	}
	if got := p.log.wait(t, "stopped", 1)["sessions"]; got != float64(sessions) {
		t.Errorf("the log says that %v sessions were ended, want %d", got, sessions)
	}
	for _, line := range p.log.all("session ended") {
		if line["cause"] != "drain" || line["cut"] != false {
			t.Errorf("a session ended with cause %v, cut %v; want drain and false", line["cause"], line["cut"])
		}
	}
}

// waitRefused waits until nobody listens on addr.
func waitRefused(t *testing.T, addr string) {
	t.Helper()
	for end := time.Now().Add(patience); ; <-time.After(5 * time.Millisecond) {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			return
		}
		conn.Close()
		if time.Now().After(end) {
			t.Fatalf("%s still takes connections", addr)
		}
	}
}

// endTimes returns when the other side ended each session, sorted, and answers by
// an end.
func endTimes(open []*websocket.Conn) []time.Time {
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
	slices.SortFunc(ends, time.Time.Compare)
	return ends
}

func TestProcessSecondSignalKills(t *testing.T) {
	t.Parallel()
	p := newRouterProcess(t, slices.Concat(onFreePorts, []string{"-backends", echoBackends(t, 1), "-overrides", t.TempDir(),
		"-drain-delay", "1h"})...)
	p.start(t)
	p.await(t)
	p.log.wait(t, "table", 1)
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
	if err != nil {
		t.Fatal(err)
	}
	p := newRouterProcess(t, append([]string{"-backends", echoBackends(t, 1), "-overrides", t.TempDir()}, onFreePorts...)...)
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
	p.log.wait(t, "table", 1)
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
			p := newRouterProcess(t, slices.Concat(onFreePorts, []string{"-backends", echoBackends(t, 1), "-overrides", t.TempDir()})...)
			p.traced(t, "accept4:error="+errno+":when=3+2") // of each thread's
			p.start(t)
			p.await(t)
			p.log.wait(t, "table", 1)
			ws := p.open(t, "ns-01")
			failed := map[any]bool{}
			for end := time.Now().Add(patience); len(failed) < 2 && time.Now().Before(end); {
				p.open(t, "ns-02").Close()
				if conn, err := net.Dial("tcp", p.side); err == nil { // a new one: get keeps its own
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
