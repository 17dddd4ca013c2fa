package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// volatileOfAdmin is what is another in each run: ports, folders, times, and the build.
var volatileOfAdmin = []volatile{
	{`(127\.0\.0\.\d):\d+`, "$1:PORT"},
	{`/\S*/TestGolden[^/\s"]*/\d+`, "/FOLDER"},
	{regexp.QuoteMeta(`version="`+version()+`"`) + `,goversion="[^"]+"`, `version="VERSION",goversion="GO"`},
	{`"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"`, `"TIME"`},
	{`in \d+\.\d s, \d+ cut`, "in SECONDS s, COUNT cut"},
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
	g.ask(t, addr, "GET "+path+" HTTP/1.1\nHost: router\n\n", "")
}

// post notes the answer to POST path with the body.
func (g *adminGolden) post(t *testing.T, addr, path, body string) {
	t.Helper()
	g.ask(t, addr, fmt.Sprintf("POST %s HTTP/1.1\nHost: router\nContent-Length: %d\n\n%s", path, len(body), body), "")
}

// adminAnswer sends the request and returns what comes back.
func adminAnswer(t *testing.T, addr, request string) (status string, head []string, body string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	start, rest, _ := strings.Cut(request, "\n\n")
	method, _, _ := strings.Cut(start, " ")
	if _, err := io.WriteString(conn, strings.ReplaceAll(start+"\n\n", "\n", "\r\n")+rest); err != nil {
		t.Fatal(err)
	}
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
func (r *runningRouter) until(t *testing.T, path, pattern string) (body string) {
	t.Helper()
	for end := time.Now().Add(patience); ; <-time.After(5 * time.Millisecond) {
		_, body := r.get(t, path)
		if regexp.MustCompile(pattern).MatchString(body) {
			return body
		}
		if time.Now().After(end) {
			t.Fatalf("%s is\n%s\nwant %s", path, body, pattern)
		}
	}
}

// goldenProgram is a router as main wires it, whose sources do not run: nothing
// was heard yet, and nothing will be.
func goldenProgram(t *testing.T, args ...string) (*program, string) {
	t.Helper()
	c, err := parseConfig(append(slices.Clone(onFreePorts), args...), noEnvironment, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newProgram(c, noEnvironment, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	p.admin.logQueue = newLogQueue(io.Discard)
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
	*fakeReplicas
	url  string
	port string
}

func newGoldenWorld(t *testing.T) *goldenWorld {
	t.Helper()
	first := listenLocal(t)
	_, port, err := net.SplitHostPort(first.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []net.Listener{first, listenAt(t, "127.0.0.4:"+port)} {
		s := httptest.NewUnstartedServer(websocket.Server{Handler: func(ws *websocket.Conn) { io.Copy(ws, ws) }})
		s.Listener.Close()
		s.Listener = l
		s.Start()
		t.Cleanup(s.Close)
	}
	w := &goldenWorld{fakeReplicas: newFakeReplicas(fakeStateful{replicas: 5, ready: 3, activeCount: "4"}), port: port}
	w.pods("pod-0")
	w.setMap("one", "1", map[string]string{"moves": "backend-0", "stays": "backend-0", "kept": "backend-0", "both": "backend-0",
		"down": "backend-1", "waits": "backend-2", "never": "backend-9"})
	w.setMap("two", "1", map[string]string{"both": "backend-0"})
	s := httptest.NewServer(w)
	t.Cleanup(s.Close)
	w.url = s.URL
	return w
}

// pods puts the EndpointSlice in force, with this pod as backend-0.
func (w *goldenWorld) pods(uid string) {
	one := func(ordinal int, uid string, ready bool) string {
		return fmt.Sprintf(`{"addresses":["127.0.0.%d"],"targetRef":{"kind":"Pod","name":"backend-%d","uid":%q},"conditions":{"ready":%t}}`,
			ordinal+1, ordinal, uid, ready)
	}
	w.change("endpointslices", func() {
		w.slices["one"] = "[" + strings.Join([]string{one(0, uid, true), one(1, "pod-1", true), one(2, "pod-2", false), one(3, "pod-3", true)}, ",") + "]"
	})
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

// router starts a router of this world, and waits until it knows all of it.
func (w *goldenWorld) router(t *testing.T, args ...string) *runningRouter {
	t.Helper()
	r := startRouter(t, append([]string{"-kube", w.url, "-kube-namespace", "edge", "-backend-port", w.port}, args...)...)
	r.until(t, "/readyz", "^ready\n$")
	r.until(t, "/metrics", `router_backend_ready{backend="backend-2"} 0`)
	return r
}

// TestGoldenAdmin: a router that its flags tell all but the overrides.
func TestGoldenAdmin(t *testing.T) {
	dir := overridesDir(t, map[string]string{"first": "backend-0", "down": "backend-1\n", "bad": "backend-9", "a b": "backend-0", "empty": ""})
	r := startRouter(t, "-backends", echoBackends(t, 1)+","+refusingAddr(t), "-overrides", dir)
	r.until(t, "/readyz", "^ready\n$")
	var g adminGolden
	for _, path := range []string{"/healthz", "/readyz", "/healthz?any=thing", "/healthz/", "//healthz", "/", "/other", "/metrics/", "/owner/", "/debug/pprof/"} {
		g.get(t, r.adminAddr, path)
	}
	for _, method := range []string{"HEAD", "POST", "PUT", "DELETE", "OPTIONS"} {
		g.ask(t, r.adminAddr, method+" /healthz HTTP/1.1\nHost: router\n\n", "")
	}
	for _, path := range []string{"/readyz", "/metrics", "/owner", "/backends"} {
		g.post(t, r.adminAddr, path, "")
	}
	g.ask(t, r.adminAddr, "HEAD /metrics HTTP/1.1\nHost: router\n\n", "")
	g.get(t, r.adminAddr, "/plan")
	g.title("requests that are not as they should be")
	g.ask(t, r.adminAddr, "GET /healthz HTTP/1.1\nHost: router\nContent-Length: 4\n\nbody", "")
	g.ask(t, r.adminAddr, "GET /owner?namespace=first HTTP/1.1\nHost: router\nTransfer-Encoding: chunked\n\n4\r\nbody\r\n0\r\n\r\n", "GET /owner?namespace=first, with a chunked body")
	g.ask(t, r.adminAddr, "AMETHODTHATHASALONGNAME /healthz HTTP/1.1\nHost: router\nContent-Length: 4\n\nbody", "")
	g.ask(t, r.adminAddr, "GET /healthz HTTP/1.1\n\n", "GET /healthz, without Host")
	g.ask(t, r.adminAddr, "GET /healthz HTTP/1.1\nHost: router\nX: "+strings.Repeat("x", 20<<10)+"\n\n", "GET /healthz, with a head of 20 KiB")
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
	g.title("overrides are in a directory")
	g.post(t, r.adminAddr, "/plan", `{"replicas": 3}`)
	g.post(t, r.adminAddr, "/plan", `{"kind": "ConfigMap", "metadata": {"name": "one"}}`)
	goldenMetrics(t, r.adminAddr, "static.txt")
	g.compare(t, "plan_directory.txt")
}

// goldenMetrics compares /metrics, with N for all numbers.
func goldenMetrics(t *testing.T, addr, name string) {
	t.Helper()
	status, head, body := adminAnswer(t, addr, "GET /metrics HTTP/1.1\nHost: router\n\n")
	body = regexp.MustCompile(`(?m)^([^#].*) \S+$`).ReplaceAllString(body, "$1 N")
	golden(t, "metrics/"+name, []byte(steady(status+"\n"+strings.Join(head, "\n")+"\n\n"+body, volatileOfAdmin...)))
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
	goldenPlans(t, &g, r.adminAddr)
	g.compare(t, "plan.txt")

	w.edit()
	r.until(t, "/metrics", `(?m)^router_watch_object_info\{object="ConfigMap edge/one".*version="2"} 1$`)
	r.until(t, "/metrics", `(?m)^router_table_conflicts 1$`)
	w.pods("pod-0-again")
	r.until(t, "/backends", `"replaced":4`)
	g = adminGolden{}
	for _, namespace := range []string{"moves", "stays", "kept", "both", "down", "waits", "never", "bad-3", "free"} {
		g.get(t, r.adminAddr, "/owner?namespace="+namespace)
	}
	g.compare(t, "owner_following.txt")
	g = adminGolden{}
	g.get(t, r.adminAddr, "/backends")
	g.compare(t, "backends_following.txt")
	g = adminGolden{}
	g.post(t, r.adminAddr, "/plan", `{"replicas": 4}`)
	g.compare(t, "plan_conflict.txt")
	goldenMetrics(t, r.adminAddr, "following.txt")
}

// goldenPlans asks for plans of each kind.
func goldenPlans(t *testing.T, g *adminGolden, addr string) {
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
	g.ask(t, addr, "POST /plan HTTP/1.1\nHost: router\nTransfer-Encoding: chunked\n\nf\r\n{\"replicas\": 4}\r\n0\r\n\r\n", "POST /plan, chunked")
	g.ask(t, addr, fmt.Sprintf("POST /plan HTTP/1.1\nHost: router\nContent-Length: %d\n\n", maxPlanBody+1), "POST /plan, of more than 8 MiB")
	size := maxPlanBody + 1
	g.ask(t, addr, fmt.Sprintf("POST /plan HTTP/1.1\nHost: router\nTransfer-Encoding: chunked\n\n%x\r\n%s\r\n0\r\n\r\n", size, strings.Repeat(" ", size)), "POST /plan, chunked, of more than 8 MiB")
	for range maxConcurrentPlans { // which has its turn until its body is there
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST /plan HTTP/1.1\r\nHost: router\r\nContent-Length: 15\r\n\r\n")
	}
	const plan = "POST /plan HTTP/1.1\nHost: router\nContent-Length: 15\n\n{\"replicas\": 4}"
	for end := time.Now().Add(patience); ; {
		if status, _, _ := adminAnswer(t, addr, plan); status == "503 Service Unavailable" {
			break
		} else if time.Now().After(end) {
			t.Fatalf("%s while another plan has the turn", status)
		}
	}
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
		return fakeKubeSay(code, fmt.Sprintf(`{"kind":"Status","message":"the server's words","reason":%q,"code":%d}`, reason, code))
	}
	static := []string{"-backends", "127.0.0.1:1"}
	return []notReadyCase{
		{"no ConfigMap", static, mapped(noMaps), "kubectl"},
		{"another ConfigMap", append([]string{"-configmap", "other"}, static...), mapped(maps), "not what"},
		{"no ConfigMap of two", append([]string{"-configmap", "one,other"}, static...), mapped(noMaps), "kubectl.*kubectl"},
		{"no ConfigMap has the label", append([]string{"-configmap-selector", "a=b,c"}, static...), mapped(noMaps), "kubectl"},
		{"no permission", static, mapped(nil), "403"},
		{"no permission at all", nil, map[string]http.HandlerFunc{}, "(?s)403.*403"},
		{"unauthorized", static, mapped(no(401, "Unauthorized")), "401"},
		{"a status of no name", static, mapped(no(499, "")), "499"},
		{"too many requests, in text", static, mapped(fakeKubeSay(429, "Too many requests, please try again later.\n", "Content-Type", "text/plain", "Retry-After", "3600")), "429"},
		{"an answer in HTML", static, mapped(fakeKubeSay(200, "<html>", "Content-Type", "text/html")), "html"},
		{"an answer that is no JSON", static, mapped(fakeKubeSay(200, "{no")), "invalid"},
		{"a list of another kind", static, mapped(listOf("Secret", nil)), "Secret"},
		{"an object of another type", static, mapped(listOf("ConfigMap", map[string]string{"overwriting": `"data":3`})), "number"},
		{"a list that is no list", static, mapped(fakeKubeSay(200, "[]")), "not what"},
		{"an answer that is cut", static, mapped(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), "EOF"},
		{"no API server", append([]string{"-kube", "http://" + refusingAddr(t)}, static...), nil, "refused"},
		{"no StatefulSet", nil, scaled(noSets), "^the number.*exist"},
		{"another StatefulSet", []string{"-statefulset", "other", "-kube-namespace", "default"}, scaled(noSets), "^the number.*exist"},
		{"no replicas", nil, scaled(listOf("StatefulSet", map[string]string{"backend": `"spec":{"replicas":0}`})), "^the number.*replicas"},
		{"no permission of the StatefulSet", nil, map[string]http.HandlerFunc{"configmaps": maps, "endpointslices": slices}, "^the number.*403"},
		{"another failure of the StatefulSet", nil, scaled(no(500, "InternalError")), "^the number.*500"},
		{"neither", nil, map[string]http.HandlerFunc{"configmaps": noMaps, "statefulsets": noSets, "endpointslices": slices}, "(?s)kubectl.*StatefulSet"},
		{"no directory", append([]string{"-kube", "none", "-overrides", "/nowhere"}, static...), nil, "nowhere"},
		{"no directory, and no ConfigMap", append([]string{"-overrides", "/nowhere"}, static...), mapped(noMaps), "kubectl"},
	}
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
		for _, line := range regexp.MustCompile(`(?m)^router_(watch_last_error|watch_object_absent|watch_object_info|table_info|ready|statefulset_replicas)\b.*`).FindAllString(body, -1) {
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
	p.proxy.router.update(sourceContent{source: "directory", version: "1"})
	p.announceDrain()
	g.get(t, addr, "/readyz")
	g.title("and has no descriptors for more clients")
	p.fdLimit.add(p.fdLimit.limit)
	g.get(t, addr, "/readyz")
	g.title("and does not drain")
	p.admin.draining.Store(false)
	g.get(t, addr, "/readyz")
	g.get(t, addr, "/healthz")
	g.compare(t, "readyz.txt")
}

// TestGoldenErrorClasses: the label of router_watch_last_error.
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
	for end := time.Now().Add(patience); ; <-time.After(5 * time.Millisecond) {
		w.mu.Lock()
		all = slices.Collect(maps.Values(w.events))
		if len(all) >= count {
			clear(w.events)
		}
		w.mu.Unlock()
		if len(all) >= count {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d Events, want %d: %s", len(all), count, all)
		}
	}
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
