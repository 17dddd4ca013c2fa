package main

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
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
	shell.Env, shell.Stdout, shell.Stderr = p.cmd.Env, p.log, &p.stderr
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

// wantQuiet checks that the process does next to nothing for a second.
func (p *routerProcess) wantQuiet(t *testing.T) {
	t.Helper()
	before := p.cpuTime(t)
	<-time.After(time.Second)
	if took := p.cpuTime(t) - before; took > 150*time.Millisecond {
		t.Errorf("the process used %s of CPU time in a second, want next to nothing", took)
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
	if errors := p.log.all("http"); len(errors) > 0 {
		t.Errorf("net/http has troubles: %v", errors)
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
	p.log.wait(t, "http", 1) // "accept4: too many open files"
	p.wantQuiet(t)
	for _, ws := range open {
		sayAndHear(t, ws, "still here")
	}
	for _, conn := range more {
		conn.Close()
	}
	p.open(t, "ns-01")
}
