package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fastRules makes alerts fire as soon as their condition holds: "for" goes, and rates and
// waits are of seconds in place of minutes.
func fastRules(rules string) string {
	rules = regexp.MustCompile(`(?m)^ *for: .*\n`).ReplaceAllString(rules, "")
	rules = regexp.MustCompile(`\[\d+m\]`).ReplaceAllString(rules, "[15s]")
	rules = strings.ReplaceAll(rules, "> 120", "> 3")
	return strings.ReplaceAll(rules, "> 600", "> 70") // a watch says each minute that it lives
}

// awaitFired waits until the alert has fired for routers of the Kubernetes namespace.
func (p *prometheus) awaitFired(alert, namespace string) {
	p.t.Helper()
	expr := fmt.Sprintf(`max_over_time(ALERTS{alertname=%q, namespace=%q, alertstate="firing"}[10m])`, alert, namespace)
	eventually(p.t, 2*time.Minute, alert+" to fire", func() error { return p.hasData(p.t.Context(), expr) })
}

// stage is a router on which one thing goes wrong.
type stage struct {
	t         *testing.T
	outside   outside
	dialer    dialer
	overrides string // the directory
}

// newStage starts a router with these backends, and with these overrides of namespaces.
func newStage(t *testing.T, program string, backends []string, overrides map[string]string, flags ...string) *stage {
	t.Helper()
	s := &stage{t: t, overrides: t.TempDir()}
	for namespace, owner := range overrides {
		s.pin(namespace, owner)
	}
	s.outside = runRouter(t, program, append([]string{"-kube=none", "-overrides=" + s.overrides,
		"-backends=" + strings.Join(backends, ","), "-move-settle=10ms"}, flags...)...)
	s.dialer = dialer{base: s.outside.address(t), http: http.DefaultClient}
	s.outside.awaitReady(t)
	return s
}

// pin writes an override.
func (s *stage) pin(namespace, owner string) {
	s.t.Helper()
	file := filepath.Join(s.overrides, namespace)
	if err := os.WriteFile(file+".new", []byte(owner), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		s.t.Fatal(err)
	}
}

// follow opens a session that stays until the test ends.
func (s *stage) follow(namespace string) {
	s.t.Helper()
	session, err := s.dialer.open(s.t.Context(), namespace)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(follow(session).close)
}

// keepAsking opens sessions of the namespace until the test ends, one after the other, and
// lets each of them end.
func (s *stage) keepAsking(namespace string) {
	keepDoing(s.t, 100*time.Millisecond, func(ctx context.Context, _ int) {
		if session, err := s.dialer.open(ctx, namespace); err == nil {
			session.conn.CloseNow()
		}
	})
}

// upgrade sends the request of a session, and answers nothing that comes: also no Close.
func (s *stage) upgrade(namespace string) {
	s.t.Helper()
	conn, err := s.ask(namespace)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
}

// upgradeAndLeave opens a session and ends it.
func (s *stage) upgradeAndLeave(namespace string) {
	if conn, err := s.ask(namespace); err == nil {
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		conn.Read(make([]byte, 1<<10))
		conn.Close()
	}
}

// ask connects and sends the request of a session. The caller closes the connection.
func (s *stage) ask(namespace string) (net.Conn, error) {
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.dialer.base, "ws://"))
	if err == nil {
		fmt.Fprintf(conn, "GET /ws/%s HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", namespace)
	}
	return conn, err
}

// awaitMetric waits until a metric of the router has at least this value.
func (s *stage) awaitMetric(name string, least float64) {
	s.t.Helper()
	eventually(s.t, 30*time.Second, name, func() error {
		m, err := s.outside.metrics(s.t.Context())
		if got := m.sum(name); err == nil && got < least {
			err = fmt.Errorf("it is %v, want %v", got, least)
		}
		return err
	})
}

// rawBackend accepts connections, gives them the answer to each request, and keeps them.
func rawBackend(t *testing.T, answer string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
			go func() {
				io.WriteString(conn, answer)
				io.Copy(io.Discard, conn)
			}()
		}
	}()
	return l.Addr().String()
}

// fillLog lets sessions end, each with a line in the log, until the router has dropped one.
func (s *stage) fillLog() {
	namespace := strings.Repeat("a", 250)
	for range 8 {
		keepDoing(s.t, 0, func(context.Context, int) {
			if m, err := s.outside.metrics(s.t.Context()); err != nil || m.sum("router_log_lines_dropped_total") > 0 {
				return
			}
			for range 100 {
				s.upgradeAndLeave(namespace)
			}
		})
	}
}

// TestMonitoringAlerts has each thing go wrong that can without an API server, with real
// routers, and sees the alert of it fire. It needs no cluster.
func TestMonitoringAlerts(t *testing.T) {
	program := build(t, ".")
	backends := (&system{t: t}).localBackends(build(t, "./backend"), 2)
	first, second := map[string]string{"a": "backend-0"}, map[string]string{"a": "backend-1"}
	small := filepath.Join(t.TempDir(), "small") // a router with few descriptors
	if err := os.WriteFile(small, []byte("#!/bin/sh\nulimit -n 300\nexec "+program+" \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}

	unread := filepath.Join(t.TempDir(), "unread") // a router whose log nobody reads
	const reader = `exec %s "$@" > >(sed -u '/"msg":"serving"/q'; exec tail --pid=$$ -f /dev/null) 2>&1`
	if err := os.WriteFile(unread, fmt.Appendf(nil, "#!/bin/bash\n"+reader+"\n", program), 0o700); err != nil {
		t.Fatal(err)
	}

	refuses := newStage(t, program, backends, first, "-max-sessions=1")
	disagrees, with := newStage(t, program, backends, first), newStage(t, program, backends, second)
	rejects := newStage(t, program, backends, map[string]string{"a": "backend-7"})
	holds := newStage(t, program, []string{freeAddress(t)}, nil, "-hold=50ms")
	errs := newStage(t, program, []string{rawBackend(t, "no HTTP\r\n\r\n")}, nil)
	drains := newStage(t, program, backends, nil, "-drain-delay=5m")
	ends := newStage(t, program, backends, nil)
	stuck := newStage(t, program, []string{backends[0], freeAddress(t)}, first)
	waits := newStage(t, program, []string{rawBackend(t, ""), backends[1]}, first, "-upgrade-timeout=5m")
	cuts := newStage(t, program, backends, first)
	full := newStage(t, small, backends, first)
	drops := newStage(t, unread, backends, nil)
	soon := newPair(t, time.Now().Add(6*24*time.Hour))
	expires := newStage(t, program, backends, nil, "-tls-cert="+soon.directory)
	stages := map[string]*stage{
		"refuses": refuses, "rejects": rejects, "holds": holds, "errs": errs, "drains": drains,
		"ends": ends, "stuck": stuck, "waits": waits, "cuts": cuts, "full": full, "drops": drops,
		"expires": expires,
	}
	routers := map[string][]*router{"disagrees": {disagrees.outside.router, with.outside.router}}
	for name, s := range stages {
		routers[name] = []*router{s.outside.router}
	}
	with.outside.router.pod = "with"
	expires.outside.router.pod = "expires" // it has other metrics than all others
	p := startPrometheusOf(t, routers, fastRules)
	for _, s := range stages { // counters begin to be seen before they count
		p.checkScrape(s.outside.router)
	}

	refuses.follow("a")
	refuses.keepAsking("b")
	holds.keepAsking("a")
	errs.keepAsking("a")
	drains.follow("a")
	if err := drains.outside.process.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ends.outside.process.cmd.Process.Kill()
	stuck.follow("a")
	stuck.pin("a", "backend-1")
	waits.upgrade("a")
	waits.awaitMetric("router_pending_upgrades", 1)
	waits.pin("a", "backend-1")
	cuts.upgrade("a")
	cuts.awaitMetric("router_sessions", 1)
	cuts.pin("a", "backend-1")
	for range 60 {
		full.upgrade("a")
	}
	drops.fillLog()
	if err := os.WriteFile(filepath.Join(soon.directory, "tls.key"), []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, want := range [][2]string{
		{"RouterRefusing", "refuses"}, {"RoutersDisagree", "disagrees"}, {"RouterOverridesRejected", "rejects"},
		{"RouterHoldTimeouts", "holds"}, {"RouterBackendErrors", "errs"}, {"RouterNotReady", "drains"},
		{"RouterDown", "ends"}, {"RouterMoveStuck", "stuck"}, {"RouterHandoffWaiting", "waits"},
		{"RouterCuts", "cuts"}, {"RouterDescriptors", "full"}, {"RouterAcceptPaused", "full"},
		{"RouterLogsDropped", "drops"}, {"RouterCertificateExpires", "expires"}, {"RouterCertificateRejected", "expires"},
	} {
		p.awaitFired(want[0], want[1])
	}
}

// TestMonitoringAlertsOfKube does the same with what needs an API server, in the cluster.
func TestMonitoringAlertsOfKube(t *testing.T) {
	s := newSystem(t)
	s.keepOverrides()
	t.Cleanup(func() { s.cordon("") })
	scale := func(replicas int) {
		ctx, stop := cleanupContext()
		defer stop()
		if _, err := s.kubectl(ctx, "", "scale", "statefulset", "backend", fmt.Sprint("--replicas=", replicas)); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(func() { scale(4) })
	const second = prefix + "second"
	s.mustKubectl(manifestOf(t, second, nil, map[string]string{"a": "backend-0"}), "apply", "-f", "-")
	t.Cleanup(func() {
		ctx, stop := cleanupContext()
		defer stop()
		if _, err := s.kubectl(ctx, "", "delete", "configmap", second); err != nil {
			t.Error(err)
		}
	})
	link := s.startKubectlProxy()
	watches, _ := s.startRouter("-configmap=" + configMap + "," + second)
	p := startPrometheusOf(t, map[string][]*router{
		"default": s.routers(t.Context()), "watches": {watches.router},
	}, fastRules)
	for _, r := range append(s.routers(t.Context()), watches.router) {
		p.checkScrape(r)
	}
	s.apply(map[string]string{"a": "backend-1"})
	p.awaitFired("RouterOverridesConflict", "watches")
	if err := link.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.cordon("2;")
	p.awaitFired("RouterCordonRejected", "default")
	s.cordon("")
	scale(5) // the new backend takes a while
	p.awaitFired("RouterScaleOutStuck", "default")
	s.mustKubectl("", "rollout", "status", "statefulset", "backend", "--timeout=2m")
	scale(4)
	s.mustKubectl("", "delete", "pod", "backend-1", "--wait=false")
	p.awaitFired("RouterBackendNotReady", "default")
	s.awaitWhole()
	s.mustKubectl("", "delete", "configmap", configMap)
	p.awaitFired("RouterOverridesAbsent", "default")
	p.awaitFired("RouterWatchStale", "watches")
}
