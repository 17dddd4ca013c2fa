package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// golden compares got with testdata/golden/NAME, or writes that file with -update. It
// names the first line that differs. Golden files are all that a user sees: one that
// changes is a change of the interface, and needs a line in the CHANGELOG.
func golden(t testing.TB, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "golden", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v (go test -run Golden -update . writes it)", err)
	}
	if difference := firstDifference(string(want), string(got)); difference != "" {
		t.Errorf("%s:%s\n(go test -run Golden -update . writes it anew)", path, difference)
	}
}

// firstDifference returns the number of the first line in which two texts differ, with
// that line of both and how many lines each has; "" if they are equal.
func firstDifference(want, got string) string {
	wants, gots := strings.SplitAfter(want, "\n"), strings.SplitAfter(got, "\n")
	line := func(lines []string, i int) string {
		if i < len(lines) && lines[i] != "" {
			return fmt.Sprintf("%q", lines[i])
		}
		return "the end"
	}
	for i := range max(len(wants), len(gots)) {
		if w, g := line(wants, i), line(gots, i); w != g {
			return fmt.Sprintf("%d:\n got %s\nwant %s\n%d lines are wanted, %d came", i+1, g, w, len(wants)-1, len(gots)-1)
		}
	}
	return ""
}

// volatile is a value that is another in each run, and what stands for it in a golden
// file.
type volatile struct{ pattern, stands string }

// steady replaces the volatile values in text, in their order.
func steady(text string, values ...volatile) string {
	for _, v := range values {
		text = regexp.MustCompile(v.pattern).ReplaceAllString(text, v.stands)
	}
	return text
}

// What is another in each run, in all that clients, backends and the log get.
var volatileOfClients = []volatile{
	{`Date: [^\n]+`, "Date: DATE"},
	{`(read|write) tcp 127\.0\.0\.1:\d+->127\.0\.0\.1:\d+`, "$1 tcp ADDRESS->ADDRESS"},
	{`127\.0\.0\.1:\d+`, "ADDRESS"},
	{`seconds=\S+`, "seconds=SECONDS"},
	{`X-Router-Step: \d{13}`, "X-Router-Step: STEP"},
	{`/tmp/\S*`, "PATH"},
	// A dial that ends with the hold and one that ends before it differ in their words
	// only: which of the two comes last is chance.
	{`; last error: [^\n]* result=`, "; last error: REASON result="},
	{`(could not be reached within \S+: )[^;\n]*(; last error:| result=)`, "${1}REASON${2}"},
	{`omitted=\d+`, "omitted=NUMBER"},
}

// goldenRouter is a router that a test stops, to read its log to the end.
type goldenRouter struct {
	*runningRouter
	conns []net.Conn // of clients
}

// startGolden starts the router, and waits until it has a table if it has overrides.
func startGolden(t *testing.T, overrides string, args ...string) *goldenRouter {
	t.Helper()
	args = slices.Concat([]string{"-kube", "none", "-overrides", overrides, "-move-settle", "0", "-max-sessions", "1000"}, args)
	r := &goldenRouter{runningRouter: startRouter(t, args...)}
	if _, err := os.Stat(overrides); err == nil {
		r.log.wait(t, "routing table updated", 1)
	}
	return r
}

// dial connects to the router as a client.
func (r *goldenRouter) dial(t *testing.T) net.Conn {
	t.Helper()
	conn := dial(t, r.clientAddr)
	conn.SetReadDeadline(time.Now().Add(2 * patience))
	r.conns = append(r.conns, conn)
	return conn
}

// upgrades returns what became of upgrades so far, as the metrics say it, once it is of
// n.
func (r *goldenRouter) upgrades(t *testing.T, n int) string {
	t.Helper()
	sample := regexp.MustCompile(`(?m)^router_(?:upgrades|http_requests)_total(\{.*\}) ([1-9]\d*)$`)
	var all []string
	eventually(t, "upgrades that are counted", n, func() (sum int) {
		_, text := r.get(t, "/metrics")
		all = nil
		for _, m := range sample.FindAllStringSubmatch(text, -1) {
			count, _ := strconv.Atoi(m[2])
			sum += count
			all = append(all, m[1]+" "+m[2])
		}
		return sum
	})
	return strings.Join(all, ", ")
}

// warnings returns the lines of the log above Info, each once, with their fields in the
// order of the alphabet (log.txt has the order). The router was stopped.
func (r *goldenRouter) warnings() (lines []string) {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	for _, line := range r.log.lines {
		if line["level"] != "INFO" {
			lines = append(lines, steady(logged(line), volatileOfClients...))
		}
	}
	slices.Sort(lines)
	return slices.Compact(lines)
}

// logged is a line of the log in words.
func logged(fields map[string]any) string {
	line := fmt.Sprintf("%v %v", fields["level"], fields["msg"])
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		if !slices.Contains([]string{"level", "msg", "time"}, key) {
			line += fmt.Sprintf(" %s=%v", key, fields[key])
		}
	}
	return line
}

// part is a text with a prefix before each line, and long ones cut.
func part(prefix, text string) string {
	var all strings.Builder
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		if len(line) > 400 {
			line = fmt.Sprintf("%s... (%d bytes)", line[:100], len(line))
		}
		if !utf8.ValidString(line) || strings.ContainsAny(line, "\x00\x01") {
			line = strconv.Quote(line)
		}
		fmt.Fprintf(&all, "%s%s\n", prefix, line)
	}
	return all.String()
}

// inOrder sorts the fields of a head between two lines of it: the router writes the
// fields that it passes on in any order, which means nothing (RFC 9110 §5.3), but those
// of one name in theirs. All others have to stand where they stand.
func inOrder(head, after, before string) string {
	lines := strings.SplitAfter(head, "\r\n")
	from := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, after) }) + 1
	to := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, before) })
	if from == 0 || to < from {
		return head + "(fields are missing)"
	}
	name := func(line string) string { name, _, _ := strings.Cut(line, ":"); return name }
	slices.SortStableFunc(lines[from:to], func(a, b string) int { return strings.Compare(name(a), name(b)) })
	return strings.Join(lines, "")
}

// goldenAnswer reads what a client gets for its request: all answers, interim ones and the
// last with its body.
func goldenAnswer(t *testing.T, conn net.Conn, method string) (text string, switched, closes bool) {
	t.Helper()
	var raw bytes.Buffer
	br := bufio.NewReader(io.TeeReader(conn, &raw))
	for {
		resp, err := http.ReadResponse(br, &http.Request{Method: method})
		if err != nil {
			return raw.String() + fmt.Sprintf("(no answer: %v)", plainError(err)), false, true
		}
		if resp.StatusCode == http.StatusContinue {
			continue
		}
		if resp.StatusCode == http.StatusSwitchingProtocols {
			head, rest := raw.String(), ""
			if at := strings.LastIndex(head, "HTTP/1.1 101 "); at >= 0 {
				rest = inOrder(head[at:], "Upgrade: websocket\r\n", "\r\n")
				head = head[:at]
			}
			return head + rest, true, false
		}
		if _, err := io.ReadAll(resp.Body); err != nil {
			return raw.String() + fmt.Sprintf("(cut off: %v)", plainError(err)), false, true
		}
		return raw.String(), false, resp.Close
	}
}

// plainError is an error of a connection in words that are the same whichever call on it
// has failed.
func plainError(err error) string {
	switch {
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.Is(err, net.ErrClosed):
		return "the client has closed it"
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return "the end"
	}
	return err.Error()
}

// keeps says whether the router takes another request on the connection.
func keeps(t *testing.T, conn net.Conn, closes bool) string {
	t.Helper()
	if closes {
		if n, _ := io.Copy(io.Discard, conn); n > 0 {
			t.Errorf("%d bytes after an answer with Connection: close", n)
		}
		return "closed"
	}
	io.WriteString(conn, "GET /again HTTP/1.1\r\nHost: h\r\n\r\n") // an error shows when the answer is read
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "closed without a word: " + plainError(err)
	}
	return fmt.Sprintf("kept: the next request gets %d", resp.StatusCode)
}

// clientCase is a request, what is behind the router, and what there is before it.
type clientCase struct {
	args      string // flags of the router
	overrides map[string]string
	noTable   bool
	request   string
	serve     func(net.Conn, *bufio.Reader)       // the backend; nil: nobody listens at its address
	before    func(t *testing.T, r *goldenRouter) // what is done first
	during    func(t *testing.T, r *goldenRouter, conn net.Conn)
	none      bool // the request is not counted
	oneWay    bool // it is played as it is only
	stops     bool // the router stops during the request, and with it the metrics
	often     bool // the backend gets the same request as often as there is time
	earlier   int  // requests that were counted before it
}

// absolute is the request with its target in absolute form, which the fast path leaves
// to net/http. A request that has no path is returned as it is.
func absolute(request string) string {
	host := "www.mydomain.com"
	if m := regexp.MustCompile(`(?mi)^Host: ([\w.:\[\]-]+)\r`).FindStringSubmatch(request); m != nil {
		host = m[1]
	}
	return regexp.MustCompile(`^(\s*[A-Z]+ )(/)`).ReplaceAllString(request, "${1}http://"+host+"${2}")
}

// run plays the case. It returns all that the client gets and the operator sees, and what
// the backend got.
func (c *clientCase) run(t *testing.T, request string) (seen string, heads []string) {
	t.Helper()
	address := refusingAddr(t)
	backend := &stubBackend{}
	if c.serve != nil {
		backend = startStub(t, "127.0.0.1:0", c.serve)
		address = backend.addr
	}
	overrides := overridesDir(t, c.overrides)
	if c.noTable {
		overrides = filepath.Join(overrides, "missing")
	}
	args := append([]string{"-backends", address}, strings.Fields(c.args)...)
	if last := len(args) - 1; args[last] == "unix:" {
		args[last] += filepath.Join(t.TempDir(), "s")
	}
	r := startGolden(t, overrides, args...)
	if c.before != nil {
		c.before(t, r)
	}
	conn := r.dial(t)
	mustWrite(t, conn, request)
	count := c.earlier + 1
	if c.none {
		count--
	}
	if c.during != nil {
		c.during(t, r, conn)
	}
	text, switched, closes := goldenAnswer(t, conn, strings.Fields(request + " -")[0])
	rest, result := "", ""
	if !c.stops {
		result = r.upgrades(t, count)
	}
	if !switched {
		rest = keeps(t, conn, closes)
	}
	for _, conn := range r.conns {
		conn.Close()
	}
	if !c.stops && !c.noTable {
		r.metric(t, `router_sessions\{.*\} 0`) // or the router would part with them
	}
	r.stop()
	seen = part("< ", text) + part("= ", rest) + part("= ", result)
	for _, line := range r.warnings() {
		seen += part("! ", line)
	}
	for _, head := range backend.heads() {
		head = steady(head, volatileOfClients[3:5]...)
		heads = append(heads, inOrder(head, headerPod+": ", headerTable+": "))
	}
	if c.often {
		heads = slices.Compact(heads)
	}
	return steady(seen, volatileOfClients...), heads
}

// playAll plays each case in both ways that a handshake has, which have to give the
// same, and returns what was seen by the name of the case.
func playAll(t *testing.T, cases map[string]clientCase) (answers, heads map[string]string) {
	t.Helper()
	var mu sync.Mutex
	answers, heads = map[string]string{}, map[string]string{}
	places := make(chan struct{}, 16) // they wait more than they work
	var playing sync.WaitGroup
	for name, c := range cases {
		playing.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			t.Run(name, func(t *testing.T) {
				seen, got := c.run(t, c.request)
				if other := absolute(c.request); other != c.request && !c.oneWay {
					seenByHTTP, gotByHTTP := c.run(t, other)
					if difference := firstDifference(seen, seenByHTTP); difference != "" {
						t.Errorf("net/http gives another answer than the fast path at line %s", difference)
					}
					if difference := firstDifference(strings.Join(got, ""), strings.Join(gotByHTTP, "")); difference != "" {
						t.Errorf("net/http asks the backend otherwise than the fast path at line %s", difference)
					}
				}
				head := "== " + name + "\n"
				if c.args != "" {
					head += "router " + c.args + "\n"
				}
				head += part("> ", c.request)
				mu.Lock()
				defer mu.Unlock()
				answers[name] = head + seen
				heads[name] = head
				for _, one := range got {
					heads[name] += part("< ", one)
				}
			})
		})
	}
	playing.Wait()
	return answers, heads
}

// inNames are the sections in the order of their names.
func inNames(sections map[string]string) []byte {
	var all strings.Builder
	for _, name := range slices.Sorted(maps.Keys(sections)) {
		fmt.Fprintln(&all, sections[name])
	}
	return []byte(all.String())
}

// upgradeWith is an upgrade of ns-01 in which a text is replaced.
func upgradeWith(old, new string) string {
	return strings.Replace(upgradeRequest("/ws/ns-01"), old, new, 1)
}

// atPath is an upgrade of the path.
func atPath(path string) clientCase { return clientCase{request: upgradeRequest(path), serve: echo} }

// badRequests are the requests that are wrong in themselves.
func badRequests() map[string]clientCase {
	return map[string]clientCase{
		"404 another path":             atPath("/other"),
		"404 root":                     atPath("/"),
		"404 long path":                atPath("/" + strings.Repeat("p", 300)),
		"404 no namespace":             atPath("/ws/"),
		"404 empty namespace":          atPath("/ws//x"),
		"404 two routes":               {request: upgradeRequest("/ws/a"), args: "-route /a/{namespace} -route /b/{namespace}/c"},
		"404 no parameter":             {request: upgradeRequest("/ws/a?docs=b"), args: "-namespace-from query:doc"},
		"400 fragment in the query":    {request: upgradeRequest("/?doc=a#b"), args: "-namespace-from query:doc"},
		"400 escape in the query":      {request: upgradeRequest("/?doc=%zz"), args: "-namespace-from query:doc"},
		"400 query not escaped":        {request: upgradeRequest("/?doc=café"), args: "-namespace-from query:doc"},
		"400 name in the query":        {request: upgradeRequest("/?doc=a%2Fb"), args: "-namespace-from query:doc"},
		"400 two parameters":           {request: upgradeRequest("/ws/a?doc=a&doc=b"), args: "-namespace-from query:doc"},
		"400 character":                atPath("/ws/ns%0001"),
		"400 not ASCII":                {request: upgradeRequest("/ws/caf\u00e9"), oneWay: true},
		"400 escaped slash":            atPath("/ws/a%2Fb"),
		"400 slash escaped twice":      atPath("/ws/a%252Fb"),
		"101 escape":                   atPath("/ws/ns%2D01"),
		"101 any room":                 atPath("/ws/my%20caf%C3%A9:42@x+y"),
		"400 long namespace":           atPath("/ws/" + strings.Repeat("a", 254)),
		"400 dots":                     atPath("/ws/.."),
		"101 two dots first":           atPath("/ws/..data"),
		"400 dot segment":              atPath("/ws/ns-01/../ns-02"),
		"400 no path":                  {request: strings.Replace(upgradeRequest("x:http://ns-02.mydomain.com/"), "www", "ns-01", 1), args: "-namespace-from host"},
		"400 escaped dot segment":      atPath("/ws/ns-01/%2e%2E/ns-02"),
		"426 no upgrade":               {request: "GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\n\r\n", args: "-http off"},
		"426 no Connection":            {request: upgradeWith("Connection: keep-alive, Upgrade\r\n", "")},
		"426 another protocol":         {request: upgradeWith("Upgrade: websocket", "Upgrade: h2c")},
		"426 HEAD":                     {request: "HEAD /ws/ns-01 HTTP/1.1\r\nHost: h\r\n\r\n", args: "-http off"},
		"400 POST":                     {request: upgradeWith("GET", "POST")},
		"400 method":                   {request: upgradeWith("GET", "AMETHODWITHAVERYLONGNAME")},
		"400 body":                     {request: upgradeWith("\r\n\r\n", "\r\nContent-Length: 2\r\n\r\nhi")},
		"400 chunked body":             {request: upgradeWith("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")},
		"400 HTTP 1.0":                 {request: upgradeWith("HTTP/1.1", "HTTP/1.0")},
		"431 fields":                   {request: upgradeWith("Origin", strings.Repeat("X-A: a\r\n", 12)+"Origin"), args: "-max-header-fields 16"},
		"431 by net http":              {request: upgradeWith("\r\n\r\n", "\r\nX-Long: "+strings.Repeat("x", 20<<10)+"\r\n\r\n")},
		"400 no Host":                  {request: upgradeWith("Host: www.mydomain.com\r\n", "")},
		"400 two Host":                 {request: upgradeWith("Host: www.mydomain.com\r\n", "Host: a\r\nHost: b\r\n")},
		"400 odd Host":                 {request: upgradeWith("www.mydomain.com", "a b")},
		"400 name with a space":        {request: upgradeWith("Origin", "Ori gin")},
		"400 line without a colon":     {request: upgradeWith("Origin: https://www.mydomain.com", "Origin")},
		"400 value":                    {request: upgradeWith("https://", "\x01")},
		"400 no HTTP":                  {request: "SSH-2.0-OpenSSH_9.6\r\n\r\n"},
		"400 escape in the path":       {request: upgradeRequest("/ws/ns-01/%zz")},
		"400 length":                   {request: upgradeWith("\r\n\r\n", "\r\nContent-Length: two\r\n\r\n")},
		"501 transfer coding":          {request: upgradeWith("\r\n\r\n", "\r\nTransfer-Encoding: gzip\r\n\r\n")},
		"404 HTTP 2.0":                 {request: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
		"505 HTTP 3.0":                 {request: upgradeWith("HTTP/1.1", "HTTP/3.0")},
		"417 expectation":              {request: upgradeWith("Origin", "Expect: a miracle\r\nOrigin")},
		"404 OPTIONS of all":           {request: "OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n"},
		"404 a release":                {request: "POST /release?doc=a HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}", args: "-namespace-from query:doc -release /release"},
		"400 TRACE":                    {request: "TRACE /ws/ns-01 HTTP/1.1\r\nHost: h\r\n\r\n"},
		"400 slow body":                {request: "POST /ws/ns-01 HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nslow", args: "-header-timeout 2s"},
		"404 OPTIONS":                  {request: "OPTIONS / HTTP/1.1\r\nHost: h\r\n\r\n"},
		"404 the admin port's":         {request: "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n"},
		"404 asks for a close":         {request: "GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"},
		"slow head":                    {request: upgradeWith("\r\n\r\n", ""), args: "-header-timeout 2s"},
		"nothing but an empty line":    {request: "\r\n", args: "-header-timeout 2s", none: true},
		"400 host without a domain":    {request: upgradeWith("www.mydomain.com", "localhost:8000"), args: "-namespace-from host"},
		"400 host is an address":       {request: upgradeWith("www.mydomain.com", "127.0.0.1"), args: "-namespace-from host"},
		"400 label":                    {request: upgradeWith("www.mydomain.com", "ns%2f.mydomain.com"), args: "-namespace-from host", oneWay: true},
		"400 long label":               {request: upgradeWith("www", strings.Repeat("a", 64)), args: "-namespace-from host"},
		"426 before the overrides":     {request: "GET /ws/ns-01 HTTP/1.1\r\nHost: h\r\n\r\n", noTable: true, args: "-http off"},
		"400 early bytes of a refused": {request: upgradeRequest("/ws/ns%2F01") + "\x81\x80\x00\x00\x00\x00"},
	}
}

// occupied occupies what the router has for clients: a session, or an upgrade that the
// backend does not answer.
func occupied(request string, sign string) func(t *testing.T, r *goldenRouter) {
	return func(t *testing.T, r *goldenRouter) {
		mustWrite(t, r.dial(t), request)
		r.metric(t, sign)
	}
}

// metric waits until the metrics have a line of the pattern.
func (r *goldenRouter) metric(t *testing.T, pattern string) {
	t.Helper()
	r.until(t, "/metrics", `(?m)^`+pattern+`$`)
}

// fromBackend is an upgrade that gets this from its owner.
func fromBackend(text string) clientCase {
	return clientCase{request: upgradeRequest("/ws/ns-01"), serve: answer(text)}
}

// switchingWith is a 101 with more fields.
func switchingWith(fields string) string {
	return strings.Replace(switching, "\r\n\r\n", "\r\n"+fields+"\r\n", 1)
}

// refusals are the upgrades that are right and do not become a session.
//
// These cannot be provoked from outside, or not at will:
//   - cannot accept clients: out of file descriptors (fastPath.refuseClient, which writes
//     "503 Service Unavailable", Retry-After: 1, Connection: close, Content-Length: 0 by
//     itself): something else in the process would have to take the descriptors that are kept
//     for clients. fastpath_linux_test.go does that.
//   - a session with the pod that the backend was before (oldPodSessionsDone): the client gets the
//     answer of "503 no owner in time", since only the reason in the log is another. It
//     needs the API server: move_test.go has it.
//   - errors of hijack and of the write of the 101: the client is gone, and gets nothing.
func refusals() map[string]clientCase {
	good := upgradeRequest("/ws/ns-01")
	waiting := func(n int) string { return fmt.Sprintf("router_pending_upgrades %d", n) }
	return map[string]clientCase{
		"503 no table":                  {request: good, noTable: true},
		"503 rejected override":         {request: good, overrides: map[string]string{"ns-01": "bakend-0"}, serve: echo},
		"503 no owner in time":          {request: good, args: "-hold 5s"},
		"503 released":                  {request: good, args: "-hold 5s", serve: answer("HTTP/1.1 409 Conflict\r\nX-Router-Step: 1\r\nContent-Length: 0\r\n\r\n"), often: true},
		"503 another backend":           {request: good, args: "-hold 5s", serve: answer(notMeant), often: true},
		"503 sessions":                  {request: good, args: "-max-sessions 1", serve: echo, before: occupied(good, `router_sessions\{.*\} 1`), earlier: 1},
		"503 sessions of one namespace": {request: good, args: "-max-sessions-per-namespace 1", serve: echo, before: occupied(good, `router_sessions\{.*\} 1`), earlier: 1},
		"503 upgrades under way":        {request: good, args: "-max-pending-upgrades 1 -upgrade-timeout 1m", serve: silent, before: occupied(good, waiting(1))},
		"503 heads under way":           {request: upgradeWith("Origin: ", "Origin: "+strings.Repeat("x", headBytesPerRequest)), args: "-max-pending-upgrades 1"},
		"503 the router is stopping":    {request: good, during: stopRouter, stops: true},
		"no answer, client left": {request: good, during: func(t *testing.T, r *goldenRouter, conn net.Conn) {
			r.metric(t, waiting(1))
			reset(conn.(*net.TCPConn))
		}},
		"503 half-closed client":  {request: good, args: "-hold 1m", during: func(t *testing.T, r *goldenRouter, conn net.Conn) { closeWrite(t, conn.(*net.TCPConn)) }},
		"504 silence":             {request: good, args: "-upgrade-timeout 1s", serve: silent},
		"502 close":               {request: good, serve: func(net.Conn, *bufio.Reader) {}},
		"502 close in the head":   fromBackend("HTTP/1.1 1"),
		"502 no HTTP":             fromBackend("SSH-2.0-OpenSSH\r\n\r\n"),
		"502 another protocol":    fromBackend(strings.Replace(switching, "websocket", "h2c", 1)),
		"502 long head":           fromBackend("HTTP/1.1 101 S\r\nX: " + strings.Repeat("x", 20<<10)),
		"502 status 099":          fromBackend("HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n"),
		"502 status 600":          fromBackend("HTTP/1.1 600 Odd\r\nContent-Length: 0\r\n\r\n"),
		"502 interim answers":     fromBackend(strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", maxInterimResponses+1)),
		"passed 200":              fromBackend("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nok"),
		"passed 204":              fromBackend("HTTP/1.1 204 No Content\r\n\r\n"),
		"passed 302":              fromBackend("HTTP/1.1 302 Found\r\nLocation: https://other.example/ws/ns-01\r\nContent-Length: 0\r\n\r\n"),
		"passed 307":              fromBackend("HTTP/1.1 307 Temporary Redirect\r\nLocation: /elsewhere\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 0\r\n\r\n"),
		"passed 401":              fromBackend("HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"r\"\r\nContent-Length: 0\r\n\r\n"),
		"passed 403":              fromBackend("HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\nX-Why: quota\r\nKeep-Alive: 5\r\nServer: s\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\nnope"),
		"passed 426":              fromBackend("HTTP/1.1 426 Upgrade Required\r\nUpgrade: h9\r\nConnection: Upgrade, X\r\nX: y\r\nSec-WebSocket-Version: 13\r\nContent-Length: 0\r\n\r\n"),
		"passed 429":              fromBackend("HTTP/1.1 429 Too Many Requests\r\nTransfer-Encoding: chunked\r\nRetry-After: 7\r\n\r\n4\r\nslow\r\n0\r\n\r\n"),
		"passed 500 to its end":   fromBackend("HTTP/1.1 500 Oh\r\nContent-Type: text/x\r\n\r\nno length"),
		"passed 503":              fromBackend("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"),
		"passed after hints":      fromBackend("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"),
		"passed and cut off":      fromBackend("HTTP/1.1 401 Unauthorized\r\nContent-Length: 100\r\n\r\nhalf"),
		"passed and cut, chunked": fromBackend("HTTP/1.1 401 Unauthorized\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"),
		"101":                     fromBackend(switching),
		"101 with fields":         fromBackend(switchingWith("sec-websocket-protocol: chat\r\nSec-WebSocket-Extensions: permessage-deflate\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-Own: v\r\nServer: s\r\n")),
		"101 hop by hop":          fromBackend(strings.Replace(switchingWith("Keep-Alive: 5\r\nProxy-Connection: x\r\nX-Hop: y\r\nContent-Length: 0\r\nOdd Name: z\r\n"), "Connection: Upgrade", "Connection: Upgrade, X-Hop", 1)),
		"101 after hints":         fromBackend("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + switching),
		"101 after its 100":       fromBackend("HTTP/1.1 100 Continue\r\n\r\n" + switching),
		"101 expected a 100":      {request: upgradeWith("Origin", "Expect: 100-continue\r\nOrigin"), serve: echo},
		"101 a 100 of both":       {request: upgradeWith("Origin", "Expect: 100-Continue\r\nOrigin"), serve: answer("HTTP/1.1 100 Continue\r\n\r\n" + switching)},
		"101 reason":              fromBackend(strings.Replace(switching, "Switching Protocols", "Welcome", 1)),
	}
}

// stopRouter stops the router while it holds the client.
func stopRouter(t *testing.T, r *goldenRouter, conn net.Conn) {
	r.metric(t, "router_pending_upgrades 1")
	go r.stop()
	r.log.wait(t, "draining", 1)
}

// All that a client gets for its request, as bytes, with what the metrics and the log
// say of it. The two ways of a handshake give the same, and so does the portable build.
func TestGoldenClientAnswers(t *testing.T) {
	cases := badRequests()
	maps.Copy(cases, refusals())
	answers, _ := playAll(t, cases)
	golden(t, "client_answers.txt", inNames(answers))
	var all strings.Builder
	for _, answer := range answers {
		all.WriteString(answer)
	}
	mustHaveRefusals(t, all.String())
}

// mustHaveRefusals looks for the words of each call of refuse in what was seen: a refusal
// that is new needs a case.
func mustHaveRefusals(t *testing.T, seen string) {
	t.Helper()
	notSeen := []string{
		"the client left", // nobody gets an answer
		"%s has refused the request, and its body cannot be sent again: %v",            // TestForwardRefusedByOwner
		"%s worked on the request when %v",                                             // forward_test.go moves it
		"%q was not handed over to %s within %s: /status says what the step waits for", // TestHoldEndsWhileHeld
		"the owner was not known within %s: %s",                                        // of a router that is no member: TestOwnerNotKnownHere
		"%q has more than %d upgrades per second, the limit of a namespace",            // for a moment: TestNamespaceRate
	}
	s, found := parseSources(t), 0
	for _, name := range s.names {
		ast.Inspect(s.files[name], func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || types.ExprString(call.Fun) != "refuse" {
				return true
			}
			found++
			format := literal(call.Args[1])
			pattern := regexp.MustCompile(`%(\\\.\d+)?[a-z]`).ReplaceAllString(regexp.QuoteMeta(format), ".*")
			if !slices.Contains(notSeen, format) && !regexp.MustCompile(pattern).MatchString(seen) {
				t.Errorf("%s: no case has the refusal %q", s.fset.Position(call.Pos()), format)
			}
			return true
		})
	}
	if found < 20 {
		t.Errorf("%d calls of refuse were found, want at least 20", found)
	}
	for r := range numUpgradeResults {
		isElsewhere := r == resultDraining || r == resultMaxUpgradesPerSecond // move_test.go drains, TestNamespaceRate
		if !isElsewhere && !strings.Contains(seen, fmt.Sprintf("result=%q", r.String())) {
			t.Errorf("no case has the result %s", r)
		}
	}
}

// literal is the text of a string literal.
func literal(e ast.Expr) string {
	if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING {
		text, _ := strconv.Unquote(lit.Value) // the parser has seen to it
		return text
	}
	return types.ExprString(e)
}

// heads are the requests whose fields end here, are changed or go on.
func heads() map[string]clientCase {
	cases := map[string]clientCase{}
	for name, request := range map[string]string{
		"as browsers send it":         upgradeRequest("/ws/ns-01"),
		"path and query":              upgradeRequest("/ws/ns-01/deep//er/%41?q=%2e%2e&x"),
		"an escaped namespace":        upgradeRequest("/ws/my%20r%6Fom/%41"),
		"query without a path":        upgradeRequest("/ws/ns-01?token=a%20b"),
		"through another proxy":       upgradeWith("Origin", "X-Forwarded-For: 203.0.113.9\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: outer.example\r\nX-Forwarded-Port: 443\r\nOrigin"),
		"through two proxies":         upgradeWith("Origin", "X-Forwarded-For: 203.0.113.9, 198.51.100.1\r\nx-forwarded-for: 198.51.100.2\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Proto: http\r\nOrigin"),
		"forged":                      upgradeWith("Origin", "X-Router-Pod: f\r\nX-Router-Table: f\r\nX-Router-Step: f\r\nX-Router-Backend: f\r\nx_router_pod: f\r\nX_Router_Backend: f\r\nX-Real-IP: f\r\nx_real_ip: f\r\nForwarded: for=f\r\nX_Forwarded_For: f\r\nOrigin"),
		"hop by hop":                  upgradeWith("Connection: keep-alive, Upgrade", "Connection: keep-alive, Upgrade, X-Hop\r\nConnection: Cookie\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\nTE: trailers\r\nX-Hop: y\r\nCookie: a=b"),
		"names what the router says":  upgradeWith("\r\n\r\n", "\r\nConnection: X-Forwarded-For, X-Forwarded-Proto, X-Forwarded-Host, X-Router-Pod, Host\r\nX-Forwarded-For: 203.0.113.9\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: h\r\n\r\n"),
		"of a WebSocket":              upgradeWith("Origin", "sec-websocket-protocol: chat, superchat\r\nSec-WebSocket-Protocol: third\r\nSec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\nOrigin"),
		"of applications":             upgradeWith("Origin", "Cookie: a=b\r\nCookie: c=d\r\nAuthorization: Bearer t\r\nuser-agent: u\r\nX-Empty:\r\nX-Spaces:   v  \r\nX_Own: v\r\nTraceparent: 00-1-2-3\r\nVia: 1.1 v\r\nOrigin"),
		"expects":                     upgradeWith("Origin", "Expect: 100-continue\r\nOrigin"),
		"a list of protocols":         upgradeWith("Upgrade: websocket", "Upgrade: h2c, WebSocket"),
		"two Connection":              upgradeWith("Connection: keep-alive, Upgrade", "connection: keep-alive\r\nCONNECTION: upgrade"),
		"Host with a port":            upgradeWith("www.mydomain.com\r\n", "www.mydomain.com:8443\r\n"),
		"after empty lines":           "\r\n\r\n" + upgradeRequest("/ws/ns-01"),
		"early bytes":                 upgradeRequest("/ws/ns-01") + "\x81\x80\x00\x00\x00\x00",
		"more than the fast path's":   upgradeWith("Origin", "X-Long: "+strings.Repeat("x", 5000)+"\r\nOrigin"),
		"another namespace in a part": upgradeRequest("/ws/ns-01/ws/ns-02"),
	} {
		cases[name] = clientCase{request: request, serve: answer(switching)}
	}
	host := cases["as browsers send it"]
	host.request, host.args = upgradeRequest("/any/path"), "-namespace-from host -pod-name another-router -statefulset db"
	cases["namespace in the host"] = host
	unix := cases["through another proxy"]
	unix.args = "-listen unix:"
	cases["through a Unix socket"] = unix
	unix.request = upgradeRequest("/ws/ns-01")
	cases["through a Unix socket, alone"] = unix
	return cases
}

// The head of a request as its backend gets it.
func TestGoldenBackendHeads(t *testing.T) {
	_, got := playAll(t, heads())
	golden(t, "backend_heads.txt", inNames(got))
}

// closeCase is a session and what ends it. finish is called with the two connections of
// the session, after both have carried a message.
type closeCase struct {
	args   string // flags of the router
	silent bool   // neither client nor backend answers a Close frame
	finish func(t *testing.T, r *goldenRouter, overrides string, client, backend net.Conn)
}

func closeCases() map[string]closeCase {
	move := func(t *testing.T, r *goldenRouter, overrides string, client, backend net.Conn) {
		if err := os.WriteFile(filepath.Join(overrides, "ns-01"), []byte("backend-1"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	drain := func(t *testing.T, r *goldenRouter, overrides string, client, backend net.Conn) { r.stop() }
	return map[string]closeCase{
		"another owner":                    {finish: move},
		"another owner, nobody answers":    {finish: move, silent: true},
		"the router stops":                 {finish: drain},
		"the router stops, nobody answers": {finish: drain, silent: true},
		"the client ends": {finish: func(t *testing.T, r *goldenRouter, overrides string, client, backend net.Conn) {
			client.(*net.TCPConn).CloseWrite()
		}},
		"the client resets": {finish: func(t *testing.T, r *goldenRouter, overrides string, client, backend net.Conn) {
			client.(*net.TCPConn).SetLinger(0)
			client.Close()
		}},
		"the backend ends": {finish: func(t *testing.T, r *goldenRouter, overrides string, client, backend net.Conn) {
			backend.(*net.TCPConn).CloseWrite()
		}},
		"the backend resets": {finish: func(t *testing.T, r *goldenRouter, overrides string, client, backend net.Conn) {
			backend.(*net.TCPConn).SetLinger(0)
			backend.Close()
		}},
		"it is as old as -max-age": {args: "-max-age 4s",
			finish: func(t *testing.T, r *goldenRouter, overrides string, client, backend net.Conn) {}},
		"nothing is sent": {args: "-idle-timeout 1s",
			finish: func(t *testing.T, r *goldenRouter, overrides string, client, backend net.Conn) {}},
	}
}

// readsToEnd reads frames until the connection ends. Unless it is silent, it answers a
// Close frame and then ends.
func readsToEnd(conn net.Conn, br io.Reader, masked, silent bool) string {
	var all strings.Builder
	for {
		first, payload, err := nextFrame(br, masked, nil)
		switch {
		case errors.Is(err, net.ErrClosed):
			return all.String() + "it has reset its connection\n"
		case err != nil:
			if !silent {
				conn.Close()
			}
			return all.String() + plainError(err) + "\n"
		}
		all.WriteString(describeFrame(first, payload) + "\n")
		if first&0xf == 8 && !silent {
			conn.Write(closeFrame(binary.BigEndian.Uint16(payload), "", !masked))
			conn.(*net.TCPConn).CloseWrite()
		}
	}
}

// play returns what client and backend read, and the end of the session in the log.
func (c *closeCase) play(t *testing.T) string {
	t.Helper()
	conns, toBackend := make(chan net.Conn, 1), make(chan string, 1)
	stub := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, switching)
		mustSend(t, conn, frameBytes(0x81, false, 2, []byte("hi")))
		if _, _, err := nextFrame(br, true, nil); err != nil {
			t.Error(err)
		}
		conns <- conn
		toBackend <- readsToEnd(conn, br, true, c.silent)
	})
	other := startStub(t, "127.0.0.1:0", func(net.Conn, *bufio.Reader) {})
	overrides := overridesDir(t, map[string]string{"ns-01": "backend-0"})
	r := startGolden(t, overrides, append([]string{"-backends", stub.addr + "," + other.addr}, strings.Fields(c.args)...)...)
	client := r.dial(t)
	mustWrite(t, client, upgradeRequest("/ws/ns-01"))
	br := bufio.NewReader(client)
	if _, err := http.ReadResponse(br, nil); err != nil {
		t.Fatal(err)
	}
	mustSend(t, client, frameBytes(0x81, true, 2, []byte("ho")))
	if _, _, err := nextFrame(br, false, nil); err != nil {
		t.Fatal(err)
	}
	backend, toClient := <-conns, make(chan string, 1)
	go func() { toClient <- readsToEnd(client, br, false, c.silent) }()
	c.finish(t, r, overrides, client, backend)
	ended := r.log.wait(t, "session ended", 1)
	return part("client: ", <-toClient) + part("backend: ", <-toBackend) +
		fmt.Sprintf("log: cause %v, cut %v\n", ended["cause"], ended["cut"])
}

// What client and backend read at the end of a session, for each of its causes that can
// be provoked from outside: the Close frames, and how the connections end.
func TestGoldenCloses(t *testing.T) {
	var mu sync.Mutex
	sections := map[string]string{}
	t.Run("all", func(t *testing.T) {
		for name, c := range closeCases() {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				seen := c.play(t)
				mu.Lock()
				defer mu.Unlock()
				sections[name] = "== " + name + "\n" + seen
			})
		}
	})
	golden(t, "closes.txt", inNames(sections))
}

// commandSeen runs the program as main does, and returns what a user sees of it. Variables of
// the environment stand before the arguments.
func commandSeen(t *testing.T, env map[string]string, args ...string) string {
	t.Helper()
	var all, out bytes.Buffer
	all.WriteString("$ ")
	for name, value := range env { // one at most
		fmt.Fprintf(&all, "%s=%s ", name, value)
	}
	fmt.Fprintf(&all, "router %s\n", strings.Join(args, " "))
	err := run(t.Context(), args, environment(env), &out)
	all.Write(out.Bytes())
	if err != nil && !errors.Is(err, flag.ErrHelp) { // as main writes it
		fmt.Fprintln(&all, "stderr: router:", err)
	}
	fmt.Fprintln(&all, "exit code", exitCode(err))
	return steady(all.String(),
		volatile{`127\.0\.0\.1:\d+`, "ADDRESS"}, volatile{os.TempDir() + `/\S*/`, "/DIRECTORY/"}, volatile{`dial tcp .*`, "dial tcp ERROR"})
}

// Every error of a flag, a variable of the environment and of what they name.
func TestGoldenUsage(t *testing.T) {
	sections := map[string]string{}
	for name, tt := range badUsage {
		sections[name] = "== " + name + "\n" + commandSeen(t, tt.env, strings.Fields(tt.args)...)
	}
	taken := httptest.NewServer(http.NotFoundHandler())
	defer taken.Close()
	addr := taken.Listener.Addr().String()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string]string{
		"the port of -listen is taken": "-listen " + addr,
		"the port of -admin is taken":  "-listen 127.0.0.1:0 -admin " + addr,
		"no address":                   "-listen 8000",
		"no folder of the socket":      "-listen unix:/nowhere/s",
		"no socket":                    "-listen unix:" + file,
		"no pod":                       "-kube in-cluster",
	} {
		sections[name] = "== " + name + "\n" + commandSeen(t, nil, append([]string{"-replicas", "1"}, strings.Fields(args)...)...)
	}
	golden(t, "usage.txt", inNames(sections))
}

// What the subcommands print, and fail with.
func TestGoldenCommands(t *testing.T) {
	tenants := map[string]string{"pinned": "backend-1", "bad": "bakend-0", "Upper": "backend-2", "under_score": "backend-2"}
	dir := overridesDir(t, tenants)
	configMap := filepath.Join(t.TempDir(), "map.json")
	if err := os.WriteFile(configMap, []byte(`{"kind": "ConfigMap", "metadata": {"name": "overwriting"}, "data": {"a": "backend-1"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	r := startGolden(t, dir, "-backends", echoBackends(t, 3))
	r.log.wait(t, "routing table updated", 1)
	for _, namespace := range []string{"pinned", "pinned", "b", "a", "a"} {
		r.runningRouter.open(t, namespace)
	}
	waiting := startGolden(t, filepath.Join(dir, "missing"), "-backends", "127.0.0.1:1")
	notARouter := httptest.NewServer(http.NotFoundHandler())
	defer notARouter.Close()
	none := "http://" + refusingAddr(t)
	offline := "owner -replicas 3 -overrides " + dir + " "
	var all strings.Builder
	for _, args := range []string{
		"-h", "plan -h", "owner -h", "status -h", "backends -h", "top -h", "move -h", "cordon -h", "uncordon -h", "wait -h",
		"status a", "status -o yaml", "top -by age", "move a", "cordon", "wait -timeout x", "plan cordon x", "plan cordon none2",
		"backends -admin " + r.admin, "backends -all=false -admin " + r.admin, "wait -admin " + r.admin,
		"move -admin " + r.admin + " pinned backend-2", "move -admin " + r.admin + " pinned backend-3", "cordon -admin " + r.admin + " backend-0",
		"plan", "plan a b", "plan -verbose", "owner", "owner -replicas x ns",
		offline + "pinned bad Upper a b c under_score ..data", offline + "-namespace-from host pinned Upper under_score",
		offline + "-statefulset db pinned a", offline + ".", offline + "n/s", offline + "n+s", offline + "-namespace-from header a",
		offline + "-namespace-from host n.s", "owner -replicas 0 -overrides " + dir + " a", "owner -replicas 10001 a", "owner -replicas 3 a",
		"owner -replicas 3 -overrides " + dir + "/missing a",
		"owner -admin " + r.admin + " pinned bad Upper a b", "owner -admin " + r.admin + "/ pinned", "owner -admin " + r.admin + " n+s",
		"owner -admin " + waiting.admin + " a", "owner -admin " + notARouter.URL + " a", "owner -admin " + none + " a", "owner -admin ::: a",
		"plan -admin " + r.admin + " 2", "plan -admin " + r.admin + " 3", "plan -admin " + r.admin + " 1", "plan -admin " + r.admin + " 0", "plan -admin " + r.admin + " 10001",
		"plan -admin " + r.admin + " " + configMap, "plan -admin " + r.admin + " " + configMap + ".missing", "plan -admin " + r.admin + " " + filepath.Join(dir, "pinned"),
		"plan -admin " + waiting.admin + " 2", "plan -admin " + notARouter.URL + " 2", "plan -admin " + none + " 2",
	} {
		fmt.Fprintln(&all, commandSeen(t, nil, strings.Fields(args)...))
	}
	golden(t, "commands.txt", []byte(all.String()))
}

// TestGoldenLog has each call that writes a line of the log: its level, its message and its
// keys in their order. A line that two calls write is there twice.
func TestGoldenLog(t *testing.T) {
	s := parseSources(t)
	var lines []string
	for _, name := range s.names {
		ast.Inspect(s.files[name], func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			method, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains([]string{"Debug", "Info", "Warn", "Error"}, method.Sel.Name) || len(call.Args) == 0 || !isLog(method.X) {
				return true
			}
			line := fmt.Sprintf("%q %s", literal(call.Args[0]), strings.ToUpper(method.Sel.Name))
			for i := 1; i < len(call.Args); i += 2 {
				line += " " + literal(call.Args[i])
			}
			lines = append(lines, line)
			return true
		})
	}
	slices.Sort(lines)
	golden(t, "log.txt", []byte(strings.Join(lines, "\n")+"\n"))
}

// isLog reports whether the expression is a logger, by its name.
func isLog(e ast.Expr) bool {
	name := types.ExprString(e)
	return strings.HasSuffix(strings.ToLower(name), "log") || strings.HasSuffix(strings.ToLower(name), "logger") || name == "slog"
}

// volatileOfAdmin is what is another in each run: ports, folders, times, and the build.
var volatileOfAdmin = []volatile{
	{`(127\.0\.0\.\d):\d+`, "$1:PORT"},
	{`/\S*/TestGolden[^/\s"]*/\d+`, "/FOLDER"},
	{regexp.QuoteMeta(`version="`+version()+`"`) + `,goversion="[^"]+"`, `version="VERSION",goversion="GO"`},
	{`"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d[^"]*"`, `"TIME"`},
	{`"version": "` + regexp.QuoteMeta(version()) + `"`, `"version": "VERSION"`},
	{`'sha256-[^']+'`, `'sha256-HASH'`},
	{`"step": \d{13}`, `"step": STEP`},
	{`"seconds": [\d.e-]+(,\s+"planned")`, `"seconds": SECONDS$1`},
	{`"held_seconds": [\d.e-]+`, `"held_seconds": SECONDS`},
	{`("name": "descriptors",\s+"used": \d+,\s+"max"): \d+`, "$1: LIMIT"},
	{`in \d+\.\d s, each namespace held for \d+\.\d s at most, \d+ cut`, "in SECONDS s, each namespace held for SECONDS s at most, COUNT cut"},
	{`("(?:window_seconds|bytes_per_second)": )[^,\n]+`, "${1}NUMBER"},
	{`clients wait for descriptors: \d+ of \d+`, "clients wait for descriptors: USED of LIMIT"},
}

// adminGolden collects what an admin port answers.
type adminGolden struct{ text strings.Builder }

func (g *adminGolden) compare(t *testing.T, name string) {
	t.Helper()
	golden(t, "admin/"+name, []byte(steady(g.text.String(), volatileOfAdmin...)))
}

// title begins a section.
func (g *adminGolden) title(format string, args ...any) {
	fmt.Fprintf(&g.text, "##### "+format+"\n\n", args...)
}

// ask sends a request as it is written, "\n" for "\r\n", to the admin port at addr,
// and notes the answer: all fields but Date and Content-Length, and JSON with a field a
// line. shown is the request for people, "" for its first line and body.
func (g *adminGolden) ask(t *testing.T, addr, request, shown string) {
	t.Helper()
	status, head, body := adminAnswer(t, addr, request)
	line, rest, _ := strings.Cut(request, "\n")
	if _, sent, ok := strings.Cut(rest, "\n\n"); ok && sent != "" {
		line += "\n" + sent
	}
	if b := new(bytes.Buffer); json.Indent(b, []byte(body), "", "  ") == nil {
		body = b.String()
	}
	fmt.Fprintf(&g.text, ">>> %s\n<<< %s\n%s\n%s\n\n", strings.ReplaceAll(cmp.Or(shown, line), " HTTP/1.1", ""),
		status, strings.Join(head, "\n"), strings.TrimSuffix(body, "\n"))
}

// get notes the answer to GET path.
func (g *adminGolden) get(t *testing.T, addr, path string) {
	t.Helper()
	g.ask(t, addr, "GET "+path+" HTTP/1.1\nHost: localhost\n\n", "")
}

// post notes the answer to POST path with the body.
func (g *adminGolden) post(t *testing.T, addr, path, body string) {
	t.Helper()
	g.ask(t, addr, fmt.Sprintf("POST %s HTTP/1.1\nHost: localhost\nContent-Length: %d\n\n%s", path, len(body), body), "")
}

// adminAnswer sends the request and returns what comes back.
func adminAnswer(t *testing.T, addr, request string) (status string, head []string, body string) {
	t.Helper()
	conn := dial(t, addr)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	start, rest, _ := strings.Cut(request, "\n\n")
	method, _, _ := strings.Cut(start, " ")
	mustWrite(t, conn, strings.ReplaceAll(start+"\n\n", "\n", "\r\n")+rest)
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%.100q: %v", request, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%.100q: %v", request, err)
	}
	for _, name := range slices.Sorted(maps.Keys(resp.Header)) {
		if name != "Date" && name != "Content-Length" {
			head = append(head, name+": "+strings.Join(resp.Header[name], ", "))
		}
	}
	if resp.Close {
		head = append(head, "Connection: close")
	}
	return resp.Status, head, string(b)
}

// until asks for path until the body has the pattern.
func (r *runningRouter) until(t *testing.T, path, pattern string) {
	t.Helper()
	eventually(t, path+" matches "+pattern, true, func() bool {
		_, body := r.get(t, path)
		return regexp.MustCompile(pattern).MatchString(body)
	})
}

// goldenProgram is a router as main wires it, whose sources do not run: nothing
// was heard yet, and nothing will be.
func goldenProgram(t *testing.T, args ...string) (*program, string) {
	t.Helper()
	c, err := parseConfig(append(slices.Clone(onFreePorts), args...), noEnvironment, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newProgram(c, noEnvironment, newLogQueue(io.Discard), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l, server := listenLocal(t), p.admin.server(p.log)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(newAdminListener(l, p.log)) }()
	t.Cleanup(func() { server.Close(); <-done; p.proxy.backends.close() })
	return p, l.Addr().String()
}

// goldenWorld is an API server with 5 pods, of which the last has no namespaces yet:
// backend-0 and backend-3 echo, backend-1 refuses connections, backend-2 is not ready.
// Its two ConfigMaps are of a first version.
type goldenWorld struct {
	*fakeKube
	url  string
	port string
}

func newGoldenWorld(t *testing.T) *goldenWorld {
	t.Helper()
	port := freePort(t)
	for _, l := range []net.Listener{listenAt(t, "127.0.0.1:"+port), listenAt(t, "127.0.0.4:"+port)} {
		s := httptest.NewUnstartedServer(websocket.Server{Handler: func(ws *websocket.Conn) { io.Copy(ws, ws) }})
		s.Listener.Close()
		s.Listener = l
		s.Start()
		t.Cleanup(s.Close)
	}
	w := &goldenWorld{fakeKube: newFakeKube(), port: port}
	w.setStatefulSet(func(s *fakeStatefulSet) { s.replicas, s.ready, s.generation = 4, 3, 1 })
	w.pods("pod-0")
	w.setMap("one", "1", map[string]string{"moves": "backend-0", "stays": "backend-0", "kept": "backend-0", "both": "backend-0",
		"down": "backend-1", "waits": "backend-2", "never": "backend-9"})
	w.setMap("two", "1", map[string]string{"both": "backend-0"})
	w.url = w.fakeKube.url(t)
	return w
}

// pods puts the EndpointSlice in force, with this pod as backend-0.
func (w *goldenWorld) pods(uid string) {
	one := func(ordinal int, uid string, ready bool) string {
		return fmt.Sprintf(`{"addresses":["127.0.0.%d"],"targetRef":{"kind":"Pod","name":"backend-%d","uid":%q},"conditions":{"ready":%t}}`,
			ordinal+1, ordinal, uid, ready)
	}
	w.setEndpoints("[" + strings.Join([]string{one(0, uid, true), one(1, "pod-1", true), one(2, "pod-2", false), one(3, "pod-3", true)}, ",") + "]")
}

// edit makes second versions: an override that moves, entries that can't be in force
// as written, a conflict.
func (w *goldenWorld) edit() {
	data := map[string]string{"moves": "backend-3", "stays": "backend-0", "kept": "bakend-0\n", "both": "backend-0",
		"down": "backend-1", "waits": "backend-2", "never": "backend-9"}
	for i := range maxExamples {
		data[fmt.Sprint("bad-", i)] = fmt.Sprint("junk ", i)
	}
	w.setMap("one", "2", data)
	w.setMap("two", "2", map[string]string{"both": "backend-3"})
}

// router starts a router of this world, and waits until it knows all of it. The last pod
// is added when it has started.
func (w *goldenWorld) router(t *testing.T, args ...string) *runningRouter {
	t.Helper()
	r := startRouter(t, append([]string{"-kube", w.url, "-kube-namespace", "edge", "-backend-port", w.port}, args...)...)
	r.until(t, "/readyz", "^ready\n$")
	r.until(t, "/metrics", `router_backend_ready{backend="backend-2"} 0`)
	w.setStatefulSet(func(s *fakeStatefulSet) { s.replicas = 5 })
	r.until(t, "/metrics", `router_statefulset_replicas 5`)
	return r
}

// TestGoldenAdmin: a router that its flags tell all but the overrides.
func TestGoldenAdmin(t *testing.T) {
	dir := overridesDir(t, map[string]string{"first": "backend-0", "down": "backend-1\n", "bad": "backend-9", "a b": "backend-0", "empty": ""})
	r := startRouter(t, "-backends", echoBackends(t, 1)+","+refusingAddr(t), "-overrides", dir)
	r.until(t, "/readyz", "^ready\n$")
	var g adminGolden
	for _, path := range []string{"/healthz", "/readyz", "/healthz?any=thing", "/healthz/", "//healthz", "/other", "/metrics/", "/owner/", "/debug/pprof/"} {
		g.get(t, r.adminAddr, path)
	}
	for _, method := range []string{"HEAD", "POST", "PUT", "DELETE", "OPTIONS"} {
		g.ask(t, r.adminAddr, method+" /healthz HTTP/1.1\nHost: localhost\n\n", "")
	}
	for _, path := range []string{"/readyz", "/metrics", "/owner", "/backends"} {
		g.post(t, r.adminAddr, path, "")
	}
	for _, path := range []string{"/metrics", "/"} {
		g.ask(t, r.adminAddr, "HEAD "+path+" HTTP/1.1\nHost: localhost\n\n", "")
	}
	g.post(t, r.adminAddr, "/", "")
	g.get(t, r.adminAddr, "/plan")
	g.title("requests that are not as they should be")
	g.ask(t, r.adminAddr, "GET /healthz HTTP/1.1\nHost: localhost\nContent-Length: 4\n\nbody", "")
	g.ask(t, r.adminAddr, "GET /owner?namespace=first HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\n\n4\r\nbody\r\n0\r\n\r\n", "GET /owner?namespace=first, with a chunked body")
	g.ask(t, r.adminAddr, "AMETHODTHATHASALONGNAME /healthz HTTP/1.1\nHost: localhost\nContent-Length: 4\n\nbody", "")
	g.ask(t, r.adminAddr, "GET /healthz HTTP/1.1\n\n", "GET /healthz, without Host")
	g.ask(t, r.adminAddr, "GET /healthz HTTP/1.1\nHost: localhost\nX: "+strings.Repeat("x", 20<<10)+"\n\n", "GET /healthz, with a head of 20 KiB")
	g.ask(t, r.adminAddr, "nonsense\n\n", "")
	g.compare(t, "requests.txt")

	g = adminGolden{}
	g.title("namespaces are in the path")
	for _, query := range []string{"", "?namespace=", "?namespace=first", "?namespace=down", "?namespace=free-3", "?namespace=..free-3", "?namespace=bad",
		"?namespace=empty", "?namespace=FIRST", "?namespace=a%20b", "?namespace=a/b", "?namespace=.", "?namespace=..", "?namespace=%22%0A%ff%C3%A9",
		"?namespace=first&namespace=down", "?Namespace=first", "?namespace=first;x", "?namespace=%zz", "?namespace=" + strings.Repeat("a", 253), "?namespace=" + strings.Repeat("a", 300)} {
		g.get(t, r.adminAddr, "/owner"+query)
	}
	host := startRouter(t, "-backends", echoBackends(t, 1)+","+refusingAddr(t), "-namespace-from", "host",
		"-overrides", overridesDir(t, map[string]string{"first": "backend-0", "Upper": "backend-0", "dotted.name": "backend-0", "upper": "backend-1"}))
	host.until(t, "/readyz", "^ready\n$")
	g.title("namespaces are in the host")
	for _, query := range []string{"", "?namespace=first", "?namespace=FIRST", "?namespace=Upper", "?namespace=dotted.name", "?namespace=" + strings.Repeat("a", 63), "?namespace=" + strings.Repeat("a", 64)} {
		g.get(t, host.adminAddr, "/owner"+query)
	}
	g.compare(t, "owner.txt")

	g = adminGolden{}
	g.get(t, r.adminAddr, "/backends")
	g.get(t, r.adminAddr, "/backends?any=thing")
	g.compare(t, "backends.txt")

	g = adminGolden{}
	g.get(t, r.adminAddr, "/status")
	g.compare(t, "status.txt")

	g = adminGolden{}
	g.title("overrides are in a directory")
	g.post(t, r.adminAddr, "/plan", `{"replicas": 3}`)
	g.post(t, r.adminAddr, "/plan", `{"kind": "ConfigMap", "metadata": {"name": "one"}}`)
	goldenMetrics(t, r.adminAddr, "static.txt")
	g.compare(t, "plan_directory.txt")
}

// goldenMetrics compares /metrics, with N for all numbers.
func goldenMetrics(t *testing.T, addr, name string) {
	t.Helper()
	status, head, body := adminAnswer(t, addr, "GET /metrics HTTP/1.1\nHost: localhost\n\n")
	body = regexp.MustCompile(`(?m)^([^#].*) \S+$`).ReplaceAllString(body, "$1 N")
	golden(t, "metrics/"+name, []byte(steady(status+"\n"+strings.Join(head, "\n")+"\n\n"+body, volatileOfAdmin...)))
}

// TestGoldenAdminTLS: what /metrics of a router that terminates TLS has more.
func TestGoldenAdminTLS(t *testing.T) {
	secret := newMountedSecret(t, newTestCA(t, "CA").sign(t, nil, nil, "a.test"))
	r := startRouter(t, "-backends", echoBackends(t, 1), "-overrides", overridesDir(t, nil), "-tls-cert", secret.path)
	_, _, body := adminAnswer(t, r.adminAddr, "GET /metrics HTTP/1.1\nHost: localhost\n\n")
	body = strings.ReplaceAll(body, secret.path, "/tls")
	lines := regexp.MustCompile(`(?m)^((?:# \w+ )?router_tls_.*) \S+$`).FindAllString(body, -1)
	text := regexp.MustCompile(`(?m)^([^#].*) \S+$`).ReplaceAllString(strings.Join(lines, "\n")+"\n", "$1 N")
	golden(t, "metrics/tls.txt", []byte(text))
}

// TestGoldenAdminFollowing: a router that finds all at the API server. Its sessions
// stay where they are, for the time of the test.
func TestGoldenAdminFollowing(t *testing.T) {
	w := newGoldenWorld(t)
	r := w.router(t, "-configmap", "one,two", "-move-settle", "1h", "-move-rate", "4")
	for _, namespace := range []string{"moves", "moves", "stays", "kept"} {
		r.open(t, namespace)
	}
	var g adminGolden
	goldenPreviews(t, &g, r.adminAddr)
	g.compare(t, "plan.txt")

	w.edit()
	r.until(t, "/metrics", `(?m)^router_table_conflicts 1$`)
	w.pods("pod-0-again")
	r.until(t, "/backends", `"sessions_on_old_pod":4`)
	g = adminGolden{}
	for _, namespace := range []string{"moves", "stays", "kept", "both", "down", "waits", "never", "bad-3", "free"} {
		g.get(t, r.adminAddr, "/owner?namespace="+namespace)
	}
	g.compare(t, "owner_following.txt")
	g = adminGolden{}
	g.get(t, r.adminAddr, "/backends")
	g.compare(t, "backends_following.txt")
	r.until(t, "/status", `"moving_out":2`)
	g = adminGolden{}
	g.get(t, r.adminAddr, "/status")
	g.compare(t, "status_following.txt")
	g = adminGolden{}
	g.post(t, r.adminAddr, "/plan", `{"replicas": 4}`)
	g.compare(t, "plan_conflict.txt")
	goldenMetrics(t, r.adminAddr, "following.txt")
}

// goldenPreviews asks for plans of each kind.
func goldenPreviews(t *testing.T, g *adminGolden, addr string) {
	t.Helper()
	configMap := func(metadata, data string) string {
		return `{"kind": "ConfigMap", "metadata": {` + metadata + `}, "data": ` + data + `}`
	}
	const one = `"name": "one", "namespace": "edge"`
	bad := map[string]string{}
	for i := range maxExamples + 2 {
		bad[fmt.Sprintf("bad-%02d", i)] = "junk"
	}
	many, err := json.Marshal(bad)
	if err != nil {
		t.Fatal(err)
	}
	for _, body := range []string{
		`{"replicas": 4}`, `{"replicas": 1}`, `{"replicas": 6}`, `{"replicas": 0}`, `{"replicas": -1}`, `{"replicas": 10001}`, `{"replicas": 1.5}`, `{"replicas": "3"}`,
		configMap(one, `{"moves": "backend-3", "stays": "backend-1", "kept": "bakend"}`),
		configMap(`"name": "one"`, `{"moves": "backend-0", "stays": "backend-0", "kept": "backend-0"}`),
		configMap(`"name": "two"`, `{"both": "backend-3", "moves": "backend-3"}`),
		configMap(one, string(many)), configMap(one, `null`),
		configMap(`"name": "three"`, `{}`), configMap(`"name": "one", "namespace": "other"`, `{}`), configMap(``, `{}`), configMap(one, `{"moves": 3}`), configMap(one, `[]`),
		`{"replicas": 3, "kind": "ConfigMap"}`, `{"kind": "Secret"}`, `{}`, `[]`, `null`, `3`, ``, `kind: ConfigMap`, `{"replicas": 3}{"replicas": 4}`, `{"replicas": 3`,
	} {
		g.post(t, addr, "/plan", body)
	}
	g.ask(t, addr, "POST /plan HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\n\nf\r\n{\"replicas\": 4}\r\n0\r\n\r\n", "POST /plan, chunked")
	g.ask(t, addr, fmt.Sprintf("POST /plan HTTP/1.1\nHost: localhost\nContent-Length: %d\n\n", maxPreviewBody+1), "POST /plan, of more than 8 MiB")
	size := maxPreviewBody + 1
	g.ask(t, addr, fmt.Sprintf("POST /plan HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\n\n%x\r\n%s\r\n0\r\n\r\n", size, strings.Repeat(" ", size)), "POST /plan, chunked, of more than 8 MiB")
	for range maxConcurrentPreviews { // which has its turn until its body is there
		conn := dial(t, addr)
		defer conn.Close()
		mustWrite(t, conn, "POST /plan HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n")
	}
	const plan = "POST /plan HTTP/1.1\nHost: localhost\nContent-Length: 15\n\n{\"replicas\": 4}"
	eventually(t, "the answer while another plan has the turn", "503 Service Unavailable", func() string {
		status, _, _ := adminAnswer(t, addr, plan)
		return status
	})
	g.ask(t, addr, plan, "POST /plan, while another has the turn")
}

// notReadyCase is a router that cannot be ready. ready is the pattern of its /readyz.
type notReadyCase struct {
	name  string
	args  []string
	lists map[string]http.HandlerFunc // of the API server, by kind; nil without one
	ready string
}

// notReadyCases are those in which the API server answers, or a directory.
func notReadyCases(t *testing.T) []notReadyCase {
	maps := listOf("ConfigMap", map[string]string{"overwriting": `"data":{}`})
	noMaps, noSets := listOf("ConfigMap", nil), listOf("StatefulSet", nil)
	slices := listOf("EndpointSlice", nil)
	scaled := func(set http.HandlerFunc) map[string]http.HandlerFunc {
		return map[string]http.HandlerFunc{"configmaps": maps, "statefulsets": set, "endpointslices": slices}
	}
	mapped := func(maps http.HandlerFunc) map[string]http.HandlerFunc {
		return map[string]http.HandlerFunc{"configmaps": maps}
	}
	no := func(code int, reason string) http.HandlerFunc {
		return respond(code, fmt.Sprintf(`{"kind":"Status","message":"the server's words","reason":%q,"code":%d}`, reason, code))
	}
	static := []string{"-backends", "127.0.0.1:1"}
	return []notReadyCase{
		{"no ConfigMap", static, mapped(noMaps), "kubectl"},
		{"another ConfigMap", append([]string{"-configmap", "other"}, static...), mapped(maps), "not a response"},
		{"no ConfigMap of two", append([]string{"-configmap", "one,other"}, static...), mapped(noMaps), "kubectl.*kubectl"},
		{"no ConfigMap has the label", append([]string{"-configmap-selector", "a=b,c"}, static...), mapped(noMaps), "kubectl"},
		{"no permission", static, mapped(nil), "403"},
		{"no permission at all", nil, map[string]http.HandlerFunc{}, "(?s)403.*403"},
		{"unauthorized", static, mapped(no(401, "Unauthorized")), "401"},
		{"a status of no name", static, mapped(no(499, "")), "499"},
		{"too many requests, in text", static, mapped(respond(429, "Too many requests, please try again later.\n", "Content-Type", "text/plain", "Retry-After", "3600")), "429"},
		{"an answer in HTML", static, mapped(respond(200, "<html>", "Content-Type", "text/html")), "html"},
		{"an answer that is no JSON", static, mapped(respond(200, "{no")), "invalid"},
		{"a list of another kind", static, mapped(listOf("Secret", nil)), "Secret"},
		{"an object of another type", static, mapped(listOf("ConfigMap", map[string]string{"overwriting": `"data":3`})), "number"},
		{"a list that is no list", static, mapped(respond(200, "[]")), "not a response"},
		{"an answer that is cut", static, mapped(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), "EOF"},
		{"no API server", append([]string{"-kube", "http://" + refusingAddr(t)}, static...), nil, "refused"},
		{"no StatefulSet", nil, scaled(noSets), "^the number.*exist"},
		{"another StatefulSet", []string{"-statefulset", "other", "-kube-namespace", "default"}, scaled(noSets), "^the number.*exist"},
		{"no replicas", nil, scaled(listOf("StatefulSet", map[string]string{"backend": `"spec":{"replicas":0}`})), "^the number.*replicas"},
		{"no permission of the StatefulSet", nil, map[string]http.HandlerFunc{"configmaps": maps, "endpointslices": slices}, "^the number.*403"},
		{"another failure of the StatefulSet", nil, scaled(no(500, "InternalError")), "^the number.*500"},
		{"neither", nil, map[string]http.HandlerFunc{"configmaps": noMaps, "statefulsets": noSets, "endpointslices": slices}, "(?s)kubectl.*StatefulSet.*exist"},
		{"no directory", append([]string{"-kube", "none", "-overrides", "/nowhere"}, static...), nil, "open /nowhere"},
		{"no directory, and no ConfigMap", append([]string{"-overrides", "/nowhere"}, static...), mapped(noMaps), "kubectl"},
	}
}

// TestGoldenTop: the namespaces with the most load, and the only metric with their names.
func TestGoldenTop(t *testing.T) {
	dir := overridesDir(t, map[string]string{"busy": "backend-1"})
	r := startRouter(t, "-backends", echoBackends(t, 2), "-overrides", dir)
	r.until(t, "/readyz", "^ready\n$")
	for range minTopSessions {
		r.open(t, "busy")
	}
	talks := r.open(t, "talks")
	for range minTopSessions {
		sayAndHear(t, talks, "more bytes than the sessions of the other one together")
	}
	eventually(t, "sessions", minTopSessions+1, func() int {
		return int(scrape(t, r).values[`router_sessions{backend="backend-0"}`] +
			scrape(t, r).values[`router_sessions{backend="backend-1"}`])
	})
	r.until(t, "/status", `"by_bytes": ?\[(.|\n)*"talks"(.|\n)*"busy"`)
	_, _, body := adminAnswer(t, r.adminAddr, "GET /metrics HTTP/1.1\nHost: localhost\n\n")
	family := regexp.MustCompile(`(?m)^.*router_top_sessions.*\n`).FindAllString(body, -1)
	golden(t, "metrics/top.txt", []byte(strings.Join(family, "")))
}

// TestGoldenAdminShared: a router that shares its hand-off, before the object exists, when
// the rights to it are missing, and as the only member.
func TestGoldenAdminShared(t *testing.T) {
	w := newGoldenWorld(t)
	w.setPod(fakePod{name: "router-a", uid: "u1"})
	r := startRouter(t, "-kube", w.url, "-kube-namespace", "edge", "-backend-port", w.port,
		"-configmap", "one,two", "-handoff", "all", "-pod-name", "router-a", "-pod-uid", "u1")
	var g adminGolden
	ask := func(title, ready string) {
		t.Helper()
		r.until(t, "/readyz", ready)
		g.title("%s", title)
		g.get(t, r.adminAddr, "/readyz")
	}
	ask("without the object", "^the number.*the object of the hand-off has not been read yet\nthe hand-off.*does not exist")
	w.forbid("PATCH", "configmaps")
	w.applyMap(handoffName, nil)
	ask("without the right to write it", "403 Forbidden")
	w.allow("PATCH", "configmaps")
	w.forbid("LIST", "pods")
	ask("without the right to list pods", "cannot list resource pods")
	w.allow("LIST", "pods")
	ask("as the only member", "^ready\n$")
	r.until(t, "/metrics", `router_table_backends 2`)
	g.get(t, r.adminAddr, "/owner?namespace=moves")
	g.compare(t, "shared.txt")
	goldenMetrics(t, r.adminAddr, "shared.txt")
}

// TestGoldenNotReady: why a router is not ready, and what its watches are in.
func TestGoldenNotReady(t *testing.T) {
	var g adminGolden
	for _, tt := range notReadyCases(t) {
		g.title("%s", tt.name)
		args := tt.args
		if tt.lists != nil {
			args = append([]string{"-kube", kindAnswers(t, tt.lists)}, args...)
		}
		r := startRouter(t, args...)
		r.until(t, "/readyz", tt.ready)
		g.get(t, r.adminAddr, "/readyz")
		_, body := r.get(t, "/metrics")
		for _, line := range regexp.MustCompile(`(?m)^router_(watch_failures_total\{.*\} [1-9]|(?:watch_object_absent|table_info|ready|statefulset_replicas)\b).*`).FindAllString(body, -1) {
			if !strings.Contains(line, "EndpointSlice") { // which may come later
				fmt.Fprintln(&g.text, line)
			}
		}
		g.text.WriteString("\n")
	}
	p, addr := goldenProgram(t, "-kube", "http://127.0.0.1:1")
	g.title("before anything was heard")
	for _, path := range []string{"/readyz", "/owner?namespace=a", "/owner?namespace=a/b", "/backends"} {
		g.get(t, addr, path)
	}
	g.post(t, addr, "/plan", `{"replicas": 4}`)
	goldenMetrics(t, addr, "unheard.txt")
	g.title("and it drains")
	p.announceDrain()
	g.get(t, addr, "/readyz")

	p, addr = goldenProgram(t, "-overrides", "/FOLDER", "-kube", "none", "-replicas", "4")
	g.title("before the directory was read")
	g.get(t, addr, "/readyz")
	g.title("a router that was ready and drains")
	p.proxy.tables.update(sourceContent{id: sourceID{name: "directory"}, version: "1"})
	p.announceDrain()
	g.get(t, addr, "/readyz")
	g.title("and has no descriptors for more clients")
	p.fdLimit.add(p.fdLimit.limit)
	g.get(t, addr, "/readyz")
	g.title("and does not drain")
	p.proxy.draining.Store(false)
	g.get(t, addr, "/readyz")
	g.get(t, addr, "/healthz")
	g.compare(t, "readyz.txt")
}

// TestGoldenErrorClasses: the label of router_watch_failures_total.
func TestGoldenErrorClasses(t *testing.T) {
	var out strings.Builder
	for _, tt := range []struct {
		name string
		err  error
	}{
		{"nil", nil}, {"400", &statusError{Code: 400}}, {"401", &statusError{Code: 401}}, {"403", &statusError{Code: 403}}, {"404", &statusError{Code: 404}}, {"409", &statusError{Code: 409}},
		{"410", &statusError{Code: 410}}, {"429", &statusError{Code: 429}}, {"500", &statusError{Code: 500}}, {"503", &statusError{Code: 503}}, {"504", &statusError{Code: 504}}, {"599", &statusError{Code: 599}},
		{errTooBig.Error(), errTooBig}, {errBadResponse.Error(), errBadResponse}, {"syntax", &json.SyntaxError{}}, {"type", &json.UnmarshalTypeError{}},
		{"dial", &net.OpError{Op: "dial", Err: io.EOF}}, {"dial, late", &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}}, {"read", &net.OpError{Op: "read", Err: io.EOF}},
		{"read, late", &net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}}, {"alert", &net.OpError{Op: "remote error", Err: tls.AlertError(42)}},
		{"certificate", &tls.CertificateVerificationError{Err: io.EOF}}, {"no TLS", tls.RecordHeaderError{}}, {"context", context.DeadlineExceeded},
		{"EOF", io.EOF}, {"any", errors.New("any")},
	} {
		fmt.Fprintf(&out, "%-40s %s\n", tt.name, errorClass(tt.err))
	}
	golden(t, "metrics/error_classes.txt", []byte(out.String()))
}

// TestGoldenEvents: the Events of a router that starts, of a change, of rejections, of
// a move, and of another number of backends.
func TestGoldenEvents(t *testing.T) {
	w := newGoldenWorld(t)
	r := w.router(t, "-configmap", "one,two", "-move-settle", "0s")
	var out strings.Builder
	step := func(title string, count int) {
		t.Helper()
		fmt.Fprintf(&out, "##### %s\n\n", title)
		w.takeEvents(t, count, &out)
	}
	step("a router starts", 3)
	ws := r.open(t, "moves")
	answered := make(chan struct{})
	go func() { // a client that answers a Close frame
		defer close(answered)
		io.Copy(io.Discard, ws)
		ws.Close()
	}()
	w.setMap("one", "2", map[string]string{"moves": "backend-3", "kept": "bakend-0\n", "new": "backend-1", "both": "backend-0", "down": "backend-1", "waits": "backend-2", "never": "backend-9"})
	step("another version, which moves a session", 3)
	<-answered
	w.setMap("two", "2", map[string]string{"both": "backend-3"})
	step("a conflict", 2)
	w.setMap("one", "3", map[string]string{})
	step("the end of overrides", 1)
	bad := map[string]string{}
	for i := range maxExamples + 2 {
		bad[fmt.Sprintf("bad-%02d", i)] = strings.Repeat("j", i*40)
	}
	w.setMap("one", "4", bad)
	step("more rejections than one Event names", 2)
	w.scale(3)
	step("fewer backends", 4)
	golden(t, "events.txt", []byte(steady(out.String(), volatileOfAdmin...)))
}

// takeEvents writes the next Events, of which there must be as many as count, in the
// order of their objects and reasons.
func (w *goldenWorld) takeEvents(t *testing.T, count int, out io.Writer) {
	t.Helper()
	var all []string
	eventually(t, fmt.Sprintf("%d Events have come", count), true, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		all = slices.Collect(maps.Values(w.events))
		if len(all) >= count {
			clear(w.events)
		}
		return len(all) >= count
	})
	slices.SortFunc(all, func(a, b string) int { return cmp.Compare(withoutName(a), withoutName(b)) })
	for _, one := range all {
		var b bytes.Buffer
		if err := json.Indent(&b, []byte(withoutName(one)), "", "  "); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(out, "%s\n\n", b.String())
	}
}

// withoutName replaces the hash in the name of an Event.
func withoutName(event string) string {
	return regexp.MustCompile(`("name":"\w+)\.[0-9a-f]{16}"`).ReplaceAllString(event, "$1.HASH\"")
}

// TestDocs: the documentation names what there is. docs/metrics.md has each family of
// /metrics with its type and labels, each result and each cause, and no other. Each
// router_* name, each flag at the beginning of a code span, and each quoted log message of
// the documentation exists.
func TestDocs(t *testing.T) {
	docs := map[string]string{}
	paths, err := filepath.Glob("docs/*.md")
	if err != nil || len(paths) == 0 {
		t.Fatalf("%d files in docs/: %v", len(paths), err)
	}
	for _, path := range append(paths, "README.md", "CONTRIBUTING.md") {
		docs[path] = readText(t, path)
	}
	families := goldenFamilies(t)
	wantDocumented(t, documentedFamilies(docs["docs/metrics.md"]), families)
	exposition := readText(t, "testdata/golden/metrics/following.txt")
	results := labelValues(exposition, "router_upgrades_total", "result")
	maps.Copy(results, labelValues(exposition, "router_http_requests_total", "result"))
	wantDocumented(t, documentedValues(docs["docs/metrics.md"], "Results"), results)
	wantDocumented(t, documentedValues(docs["docs/metrics.md"], "Causes"), labelValues(exposition, "router_sessions_ended_total", "cause"))
	usage, log := readText(t, "testdata/help.txt")+readText(t, "testdata/golden/commands.txt"), readText(t, "testdata/golden/log.txt")
	for path, text := range docs {
		for _, name := range regexp.MustCompile(`\brouter_[a-z_]+[a-z]\b`).FindAllString(text, -1) {
			if families[name] == "" && name != causeRouterError.String() {
				t.Errorf("%s names %s, which /metrics does not have", path, name)
			}
		}
		for _, span := range regexp.MustCompile("`-([a-z][a-z-]*)").FindAllStringSubmatch(text, -1) {
			if !regexp.MustCompile(`(?m)^  -` + span[1] + `( |$)`).MatchString(usage) {
				t.Errorf("%s names the flag -%s, which -h does not have", path, span[1])
			}
		}
		for _, span := range regexp.MustCompile(`msg="([^"]*)"`).FindAllStringSubmatch(text, -1) {
			if !strings.Contains(log, strconv.Quote(span[1])+" ") {
				t.Errorf("%s quotes the log message %q, which the router does not write", path, span[1])
			}
		}
	}
}

// TestDocLinks: each link from one document to another leads to a file, and to a heading in
// it.
func TestDocLinks(t *testing.T) {
	paths, _ := filepath.Glob("docs/*.md")
	paths = append(paths, "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "bench/README.md")
	links := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for _, path := range paths {
		for _, m := range links.FindAllStringSubmatch(readText(t, path), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			if to := filepath.Join(filepath.Dir(path), file); file == "" {
				file = path
			} else {
				file = to
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
			} else if anchor != "" && !slices.Contains(anchors(readText(t, file)), anchor) {
				t.Errorf("%s links to %s, and %s has no such heading", path, m[1], file)
			}
		}
	}
}

// anchors returns the anchors of a document's headings, as GitHub makes them.
func anchors(text string) (all []string) {
	other := regexp.MustCompile(`[^\pL\pN _-]`)
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		all = append(all, strings.ReplaceAll(other.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
	}
	return all
}

// wantDocumented compares names of docs/metrics.md, and what it says of each, with those
// of /metrics.
func wantDocumented(t *testing.T, got, want map[string]string) {
	t.Helper()
	for name := range want {
		switch text, ok := got[name]; {
		case !ok:
			t.Errorf("docs/metrics.md lacks %s", name)
		case text != want[name]:
			t.Errorf("docs/metrics.md has %q for %s, want %q", text, name, want[name])
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("docs/metrics.md has %s, which /metrics does not", name)
		}
	}
}

// documentedValues are the names in the first column of the table of that section.
func documentedValues(text, section string) map[string]string {
	_, text, _ = strings.Cut(text, "\n## "+section+"\n")
	text, _, _ = strings.Cut(text, "\n## ")
	values := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*) \\|").FindAllStringSubmatch(text, -1) {
		for _, value := range regexp.MustCompile("`(\\w+)`").FindAllStringSubmatch(row[1], -1) {
			values[value[1]] = ""
		}
	}
	return values
}

// labelValues are the values that the label has in the family's samples.
func labelValues(exposition, family, label string) map[string]string {
	values := map[string]string{}
	samples := regexp.MustCompile(`(?m)^` + family + `\{` + label + `="(\w+)"\} `)
	for _, sample := range samples.FindAllStringSubmatch(exposition, -1) {
		values[sample[1]] = ""
	}
	return values
}

// goldenFamilies are the families of /metrics in the golden files: of each, its type and
// its labels in alphabetical order, without the bounds of buckets.
func goldenFamilies(t *testing.T) map[string]string {
	paths, err := filepath.Glob("testdata/golden/metrics/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	types, labels := map[string]string{}, map[string]map[string]bool{}
	for _, path := range paths {
		text := readText(t, path)
		for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+) (\S+)$`).FindAllStringSubmatch(text, -1) {
			types[m[1]] = m[2]
		}
		for _, m := range regexp.MustCompile(`(?m)^(\w+)\{(.*)\} `).FindAllStringSubmatch(text, -1) {
			name := m[1]
			if types[name] == "" { // of a histogram
				name = name[:strings.LastIndex(name, "_")]
			}
			if labels[name] == nil {
				labels[name] = map[string]bool{}
			}
			for _, label := range regexp.MustCompile(`(\w+)="`).FindAllStringSubmatch(m[2], -1) {
				labels[name][label[1]] = true
			}
			delete(labels[name], "le") // of all histograms
		}
	}
	families := map[string]string{}
	for name, kind := range types {
		families[name] = kind + " " + strings.Join(slices.Sorted(maps.Keys(labels[name])), ",")
	}
	return families
}

// documentedFamilies are the same in the tables of docs/metrics.md.
func documentedFamilies(text string) map[string]string {
	families := map[string]string{}
	row := regexp.MustCompile("(?m)^\\| `(\\w+)` \\| (counter|gauge|histogram|summary) \\| ([^|]*?) ?\\|")
	for _, m := range row.FindAllStringSubmatch(text, -1) {
		var labels []string
		for _, label := range regexp.MustCompile("`(\\w+)`").FindAllStringSubmatch(m[3], -1) {
			labels = append(labels, label[1])
		}
		slices.Sort(labels)
		families[m[1]] = m[2] + " " + strings.Join(labels, ",")
	}
	return families
}

// readText returns what is in the file.
func readText(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
