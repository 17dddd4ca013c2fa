package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
)

// appStage is where applications run: four backends with e2e/apps/server.js, and routers.
type appStage struct {
	base    string   // URL of the routers, or of nginx before them
	env     []string // of clients, in addition to the test's own
	owner   func(namespace string) string
	move    func(owners map[string]string) // returns when the change is written
	handled func() []appMessage            // by all backends, in the order of each
	browser func() context.Context         // a tab that finds base and trusts it
}

// appMessage is a message that a backend has handled.
type appMessage struct {
	App, Namespace, Backend string
	N                       int
}

// appResult is what a client of e2e/apps/client.js knows in the end.
type appResult struct {
	Sent         int
	Acknowledged []int
	Unknown      []int // whose connection ended while they were under way
	Waiting      []int
	Connections  int
	Transports   []string
	Ticks        [][]int    // what the server sent, for each connection
	Lists        [][]string // the same list, from each side
	Backends     []string
	Failures     []string // of requests that were made again
	Bytes        int
	Statuses     map[string]int
}

// messagesIn returns what a backend has written down in these lines of its output.
func messagesIn(lines []string) (all []appMessage) {
	for _, line := range lines {
		var m appMessage
		if json.Unmarshal([]byte(line), &m) == nil && m.App != "" {
			all = append(all, m)
		}
	}
	return all
}

// needNode skips the test on a machine without node, or with one that is too old, and
// installs the packages of e2e/apps if they are not.
func needNode(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("node"); err != nil {
		t.Skip("nothing tested: node is not installed")
	}
	version, err := exec.Command("node", "-p", "process.versions.node.split('.')[0] >= 20").Output()
	if err != nil || strings.TrimSpace(string(version)) != "true" {
		t.Skip("nothing tested: node is older than 20")
	}
	lock, err := os.ReadFile("apps/package-lock.json")
	if err != nil {
		t.Fatal(err)
	}
	if installed, err := os.ReadFile(installedLock); err == nil && bytes.Equal(installed, lock) {
		return
	}
	if _, err := exec.LookPath("npm"); err != nil {
		t.Skip("nothing tested: npm is not installed")
	}
	cmd := exec.CommandContext(t.Context(), "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0")
	cmd.Dir = "apps"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("npm ci in e2e/apps: %v (\"make modules\" does this where there is a network)\n%s", err, out)
	}
	if err := os.WriteFile(installedLock, lock, 0o644); err != nil {
		t.Fatal(err)
	}
}

// installedLock is a copy of the package-lock.json whose packages are installed.
const installedLock = "apps/node_modules/.installed-lock.json"

// appClient is a client that runs until the test ends, if it does not end before.
type appClient struct {
	*process
	app, namespace string
}

// client starts a client of an application.
func (s *appStage) client(t *testing.T, app, namespace string) *appClient {
	t.Helper()
	command := append(slices.Clone(s.env), "node", "apps/client.js", app, s.base, namespace)
	return &appClient{start(t, "env", command...), app, namespace}
}

// decode reads the last line of the client's output that has the field, into value. It
// reports whether there is one.
func (c *appClient) decode(field string, value any) bool {
	for _, line := range slices.Backward(c.output()) {
		message := map[string]json.RawMessage{}
		if json.Unmarshal([]byte(line), &message) == nil && message[field] != nil {
			return json.Unmarshal(message[field], value) == nil
		}
	}
	return false
}

// awaitOwner waits until this backend has answered the client last.
func (c *appClient) awaitOwner(t *testing.T, backend string) {
	t.Helper()
	eventually(t, 2*time.Minute, fmt.Sprintf("%s to be served by %s", c.app, backend), func() error {
		var owner string
		if c.decode("owner", &owner); owner != backend {
			return cmp.Or(c.failed(), fmt.Errorf("it is by %q", owner))
		}
		return nil
	})
}

// failed is an error if the client has ended without a result.
func (c *appClient) failed() error {
	if err := c.ended(); err != nil && !c.decode("result", new(appResult)) {
		return err
	}
	return nil
}

// stop lets the client come to its end, and returns its result.
func (c *appClient) stop(t *testing.T) (result appResult) {
	t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
	eventually(t, 2*time.Minute, "the result of "+c.app, func() error {
		if !c.decode("result", &result) {
			return cmp.Or(c.ended(), errors.New("there is none"))
		}
		return nil
	})
	return result
}

// nextBackend returns the backend after this one, of four.
func nextBackend(backend string) string {
	return fmt.Sprintf("backend-%d", (int(backend[len(backend)-1]-'0')+1)%4)
}

// appCase is an application in a namespace, and what must be true of it after a move.
type appCase struct {
	app, namespace string
	key            string // of its override
	check          func(*testing.T, *appCase, appResult, []appMessage)

	client   *appClient
	from, to string // backends
	long     bool   // one long request, which begins when it is asked to
}

// play runs clients of all cases, moves their namespaces at once while all are under way,
// and checks what they know in the end.
func (s *appStage) play(t *testing.T, cases []*appCase) {
	t.Helper()
	owners := map[string]string{}
	for _, c := range cases {
		c.from = s.owner(c.namespace)
		c.to = nextBackend(c.from)
		owners[c.key] = c.to
		c.client = s.client(t, c.app, c.namespace)
	}
	for _, c := range cases {
		c.client.awaitOwner(t, c.from)
	}
	began := s.moveUnderWay(t, cases, owners)
	for _, c := range cases {
		c.client.awaitOwner(t, c.to)
		t.Logf("%s: %q is on %s %.1f s after the change", c.app, c.namespace, c.to, time.Since(began).Seconds())
	}
	results := make([]appResult, len(cases))
	for i, c := range cases {
		results[i] = c.client.stop(t)
	}
	handled := s.handled()
	for i, c := range cases {
		t.Run(c.app+" "+c.namespace, func(t *testing.T) {
			c.check(t, c, results[i], slices.DeleteFunc(slices.Clone(handled), func(m appMessage) bool {
				return m.Namespace != c.namespace
			}))
		})
	}
}

// moveUnderWay moves the namespaces while all long requests are under way. It returns when
// the change was written.
func (s *appStage) moveUnderWay(t *testing.T, cases []*appCase, owners map[string]string) time.Time {
	t.Helper()
	long := slices.DeleteFunc(slices.Clone(cases), func(c *appCase) bool { return !c.long })
	for _, c := range long {
		if err := c.client.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range long {
		eventually(t, time.Minute, c.app+" to begin", func() error {
			if !c.client.decode("begun", new(bool)) {
				return cmp.Or(c.client.failed(), errors.New("it has not"))
			}
			return nil
		})
	}
	s.move(owners)
	for _, c := range long {
		if c.client.decode("ended", new(bool)) {
			t.Errorf("%s had ended when its namespace moved", c.app)
		}
	}
	return time.Now()
}

// playAll plays all applications, each with a move under way.
func (s *appStage) playAll(t *testing.T) {
	t.Helper()
	events := s.openEvents(t, "app-events")
	s.play(t, messageCases())
	s.play(t, waitedCases())
	s.play(t, cutCases())
	s.playEvents(t, events)
}

// messageCases are the applications whose clients send all the time and connect again.
func messageCases() []*appCase {
	socketIO := checkSocketIO("polling", "websocket")
	return []*appCase{
		{app: "y-websocket", namespace: "my room", key: "my_x20room", check: checkDocument},
		{app: "y-websocket", namespace: "café", key: "caf_xC3_xA9", check: checkDocument},
		{app: "hocuspocus", namespace: "doc:42", key: "doc_x3A42", check: checkDocument},
		{app: "y-sweet", namespace: "app-y-sweet", key: "app-y-sweet", check: checkDocument},
		{app: "socket.io", namespace: "app-socket.io", key: "app-socket.io", check: socketIO},
		{app: "socket.io-polling", namespace: "app-polling", key: "app-polling", check: checkSocketIO("polling")},
		{app: "signalr", namespace: "app signalr", key: "app_x20signalr", check: checkSignalR},
		{app: "phoenix", namespace: "app-phoenix", key: "app-phoenix", check: checkMessages},
		{app: "phoenix-longpoll", namespace: "app-longpoll", key: "app-longpoll", check: checkMessages},
		{app: "rest", namespace: "app-rest", key: "app-rest", check: checkREST},
	}
}

// waitedCases are long requests that end before -http-move-timeout.
func waitedCases() []*appCase {
	return []*appCase{
		{app: "lines-down", namespace: "app-lines-down", key: "app-lines-down", check: checkLinesDown, long: true},
		{app: "lines-up", namespace: "app-lines-up", key: "app-lines-up", check: checkLinesUp, long: true},
		{app: "upload", namespace: "app-upload", key: "app-upload", check: checkBody(false), long: true},
		{app: "download", namespace: "app-download", key: "app-download", check: checkBody(false), long: true},
	}
}

// cutCases are long requests that a move cuts, and that are made again.
func cutCases() []*appCase {
	return []*appCase{
		{app: "signalr-sse", namespace: "app-signalr-sse", key: "app-signalr-sse", check: checkSignalR},
		{app: "upload-cut", namespace: "app-upload-cut", key: "app-upload-cut", check: checkBody(true), long: true},
		{app: "download-cut", namespace: "app-download-cut", key: "app-download-cut", check: checkBody(true), long: true},
	}
}

// checkMessages: as checkHandled, and each backend has handled messages in the order in
// which they were sent.
func checkMessages(t *testing.T, c *appCase, r appResult, handled []appMessage) {
	t.Helper()
	checkHandled(t, c, r, handled)
	last := map[string]int{}
	for _, m := range handled {
		if m.N <= last[m.Backend] {
			t.Errorf("%s has handled %d after %d", m.Backend, m.N, last[m.Backend])
		}
		last[m.Backend] = m.N
	}
}

// checkHandled: each acknowledged message was handled once, the new owner has handled only
// later ones than the old, and all are acknowledged but those that were under way when a
// connection ended: these were handled at most once.
func checkHandled(t *testing.T, c *appCase, r appResult, handled []appMessage) {
	t.Helper()
	t.Logf("%d sent, %d acknowledged, %d under way when the connection ended, %d connections",
		r.Sent, len(r.Acknowledged), len(r.Unknown), r.Connections)
	if len(r.Acknowledged)+len(r.Unknown) != r.Sent || len(r.Waiting) > 0 || r.Sent < 50 {
		t.Errorf("of %d messages %d are acknowledged and %d were under way; waiting: %v",
			r.Sent, len(r.Acknowledged), len(r.Unknown), r.Waiting)
	}
	times := map[int]int{}
	by := map[string][]int{}
	for _, m := range handled {
		times[m.N]++
		by[m.Backend] = append(by[m.Backend], m.N)
	}
	for n, count := range times {
		if count != 1 || n > r.Sent {
			t.Errorf("message %d was handled %d times", n, count)
		}
	}
	seen := map[int]bool{}
	for _, n := range r.Acknowledged {
		if seen[n] || times[n] != 1 {
			t.Errorf("message %d was acknowledged (again: %t), and handled %d times", n, seen[n], times[n])
		}
		seen[n] = true
	}
	if len(by) != 2 || by[c.from] == nil || by[c.to] == nil {
		t.Errorf("%v have handled messages, want %s and %s", slices.Sorted(maps.Keys(by)), c.from, c.to)
	} else if latest, first := slices.Max(by[c.from]), slices.Min(by[c.to]); first <= latest {
		t.Errorf("%s has handled %d, and %s %d", c.to, first, c.from, latest)
	}
	if r.Connections < 2 {
		t.Errorf("%d connections, want one to each backend", r.Connections)
	}
}

// checkTicks: each connection has got all that the server sent, in order. The last one was
// open long enough to get something.
func checkTicks(t *testing.T, r appResult) {
	t.Helper()
	if n := len(r.Ticks); n != r.Connections || n == 0 || len(r.Ticks[n-1]) == 0 {
		t.Errorf("the server's messages on %d connections: %v", r.Connections, r.Ticks)
	}
	for i, ticks := range r.Ticks {
		t.Logf("connection %d: %d messages of the server", i, len(ticks))
		for at, n := range ticks {
			if n != at+1 {
				t.Errorf("connection %d: message %d of the server is %d", i, at+1, n)
			}
		}
	}
}

// checkSignalR: as checkHandled, since the server may handle two messages of a connection
// at once, and checkTicks.
func checkSignalR(t *testing.T, c *appCase, r appResult, handled []appMessage) {
	t.Helper()
	checkHandled(t, c, r, handled)
	checkTicks(t, r)
}

// checkSocketIO: as checkMessages and checkTicks, by these transports.
func checkSocketIO(transports ...string) func(*testing.T, *appCase, appResult, []appMessage) {
	return func(t *testing.T, c *appCase, r appResult, handled []appMessage) {
		checkMessages(t, c, r, handled)
		checkTicks(t, r)
		if slices.Sort(r.Transports); !slices.Equal(r.Transports, transports) {
			t.Errorf("transports %v, want %v", r.Transports, transports)
		}
	}
}

// checkDocument: all sides have the same list, with each entry of each side once.
func checkDocument(t *testing.T, c *appCase, r appResult, _ []appMessage) {
	t.Helper()
	t.Logf("%d entries by each of two sides", r.Sent)
	if r.Sent < 50 || len(r.Lists) < 2 {
		t.Fatalf("%d entries, %d sides", r.Sent, len(r.Lists))
	}
	want := map[string]bool{}
	for n := range r.Sent {
		want[fmt.Sprintf("0:%d", n+1)], want[fmt.Sprintf("1:%d", n+1)] = true, true
	}
	for i, list := range r.Lists {
		if !slices.Equal(list, r.Lists[0]) {
			t.Errorf("side %d has another list than side 0", i)
		}
		got := map[string]bool{}
		for _, entry := range list {
			got[entry] = true
		}
		if len(list) != len(want) || !maps.Equal(got, want) {
			t.Errorf("side %d has %d entries, %d different ones, want the %d that were written", i, len(list), len(got), len(want))
		}
	}
}

// checkREST: each request has got its answer, though its namespace was moving.
func checkREST(t *testing.T, _ *appCase, r appResult, _ []appMessage) {
	t.Helper()
	if !maps.Equal(r.Statuses, map[string]int{"200": r.Sent}) {
		t.Errorf("statuses of %d requests: %v, want 200 only", r.Sent, r.Statuses)
	}
}

// upTo returns the numbers from 1 to n.
func upTo(n int) (numbers []int) {
	for i := range n {
		numbers = append(numbers, i+1)
	}
	return numbers
}

// checkLinesDown: the move has waited for the end of the stream.
func checkLinesDown(t *testing.T, c *appCase, r appResult, _ []appMessage) {
	t.Helper()
	if !slices.Equal(r.Acknowledged, upTo(r.Sent)) || !slices.Equal(r.Backends, []string{c.from}) {
		t.Errorf("got lines %v of %v, want all %d from %s", r.Acknowledged, r.Backends, r.Sent, c.from)
	}
}

// checkLinesUp: the move has waited for the answer to the stream.
func checkLinesUp(t *testing.T, c *appCase, r appResult, handled []appMessage) {
	t.Helper()
	var got []int
	for _, m := range handled {
		got = append(got, m.N)
	}
	if !slices.Equal(got, upTo(r.Sent)) || !slices.Equal(r.Backends, []string{c.from}) {
		t.Errorf("%v have got lines %v, want all %d by %s", r.Backends, got, r.Sent, c.from)
	}
}

// checkBody: the move has waited for a large body, which went once, to the old owner; or,
// if it is cut, the request failed, and went whole to the new owner when it was made again.
func checkBody(cut bool) func(*testing.T, *appCase, appResult, []appMessage) {
	return func(t *testing.T, c *appCase, r appResult, handled []appMessage) {
		t.Logf("failures: %q", r.Failures)
		backend := c.from
		if cut {
			backend = c.to
		}
		if r.Bytes != 100<<20 || !slices.Equal(r.Backends, []string{backend}) || (len(r.Failures) > 0) != cut {
			t.Errorf("%d bytes at %v after %q, want 100 MiB at %s, cut before: %t", r.Bytes, r.Backends, r.Failures, backend, cut)
		}
		for _, m := range handled {
			if m.Backend != backend || m.N != 100<<20 {
				t.Errorf("%s has taken %d bytes as a whole body", m.Backend, m.N)
			}
		}
		if strings.HasPrefix(c.app, "upload") && len(handled) != 1 {
			t.Errorf("%d backends have got a whole body", len(handled))
		}
	}
}

// appEvents is a page in a browser that reads server-sent events.
type appEvents struct {
	tab       context.Context
	namespace string
	from      string // the backend
}

// appEvent is one of them, as the page has got it.
type appEvent struct {
	N       int
	Backend string
}

// readEvents is JavaScript that opens an EventSource as a page does.
const readEvents = `
	window.opened = 0;
	window.got = [];
	const source = new EventSource('events');
	source.onopen = () => { window.opened++ };
	source.onmessage = message => { window.got.push(JSON.parse(message.data)) };
	true`

// openEvents opens the page, and waits for events of the owner.
func (s *appStage) openEvents(t *testing.T, namespace string) *appEvents {
	t.Helper()
	e := &appEvents{s.browser(), namespace, s.owner(namespace)}
	if err := openPage(e.tab, s.base+"/api/"+namespace+"/page"); err != nil {
		t.Fatal(err)
	}
	if _, err := chromedp.Run(e.tab, chromedp.Evaluate[bool](readEvents)); err != nil {
		t.Fatal(err)
	}
	e.await(t, e.from, 1)
	return e
}

// await waits until the page has got so many events of the backend.
func (e *appEvents) await(t *testing.T, backend string, count int) (all []appEvent) {
	t.Helper()
	eventually(t, time.Minute, "events from "+backend, func() error {
		var err error
		if all, err = chromedp.Run(e.tab, chromedp.Evaluate[[]appEvent](`window.got`)); err != nil {
			t.Fatal(err)
		}
		of := 0
		for _, event := range all {
			if event.Backend == backend {
				of++
			}
		}
		if of < count {
			return fmt.Errorf("there are %d of %d", of, len(all))
		}
		return nil
	})
	return all
}

// playEvents moves the namespace: the browser connects again with the last event that it
// has got, and the new owner goes on after it. No event is lost or comes twice.
func (s *appStage) playEvents(t *testing.T, e *appEvents) {
	t.Helper()
	to := nextBackend(e.from)
	s.move(map[string]string{e.namespace: to})
	all := e.await(t, to, 10)
	opened, err := chromedp.Run(e.tab, chromedp.Evaluate[int](`window.opened`))
	if err != nil || opened != 2 {
		t.Errorf("the browser has connected %d times (error %v), want 2", opened, err)
	}
	for i, event := range all {
		if event.N != i+1 || event.Backend != e.from && event.Backend != to || i > 0 && event.Backend == e.from && all[i-1].Backend == to {
			t.Errorf("event %d is %+v", i+1, event)
		}
	}
}
