package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fakeKube is an API server. It has objects, which the test changes, and which clients
// list, watch, patch and create as those of a real one. Where it has a script, the
// script answers instead.
type fakeKube struct {
	arrived chan fakeRequest // what was requested; without what came when it was full

	// Guarded by mu.
	mu      sync.Mutex
	scripts map[string]script            // by verb, "LIST", or verb and kind, "LIST configmaps"
	objects map[string]map[string]string // JSON by kind, "configmaps", and name
	history []watchedChange              // its length is the server's resourceVersion
	changed chan struct{}                // closed at each change
	set     fakeStatefulSet              // the StatefulSet edge/backend
	events  map[string]string            // JSON of the Events that were created, by name
}

// script has one answer for each request, in order. The last one stays.
type script = []http.HandlerFunc

// watchedChange is a change of an object, as a WATCH of its kind sends it.
type watchedChange struct{ kind, name, event string }

// fakeRequest is a request as the server saw it.
type fakeRequest struct {
	*http.Request
	at   time.Time
	body []byte
}

// verb returns LIST, WATCH, or the method of what is neither.
func (r fakeRequest) verb() string {
	switch {
	case r.Method != http.MethodGet:
		return r.Method
	case r.URL.Query().Get("watch") == "1":
		return "WATCH"
	}
	return "LIST"
}

// selects reports whether the request is for the object, by its fieldSelector.
func (r fakeRequest) selects(name string) bool {
	field := r.FormValue("fieldSelector")
	return field == "" || field == "metadata.name="+name
}

func newFakeKube() *fakeKube {
	return &fakeKube{arrived: make(chan fakeRequest, 1000), scripts: map[string]script{}, objects: map[string]map[string]string{},
		changed: make(chan struct{}), events: map[string]string{}}
}

// scriptedKube answers each LIST and each WATCH by a script.
func scriptedKube(lists, watches script) *fakeKube {
	f := newFakeKube()
	f.scripts["LIST"], f.scripts["WATCH"] = lists, watches
	return f
}

// kubeAnswers is an API server that answers every LIST alike, and no WATCH.
func kubeAnswers(t *testing.T, list http.HandlerFunc) (url string) {
	return scriptedKube(script{list}, script{hang}).url(t)
}

// kindAnswers is an API server that answers LIST by kind, and WATCH where there is an
// answer for "WATCH <kind>". It forbids to list the other kinds.
func kindAnswers(t *testing.T, lists map[string]http.HandlerFunc) (url string) {
	f := newFakeKube()
	f.scripts["LIST"] = script{statusAnswer(403, "Forbidden", "not this")}
	for kind, answer := range lists {
		if strings.HasPrefix(kind, "WATCH ") {
			f.scripts[kind] = script{answer}
		} else if answer != nil {
			f.scripts["LIST "+kind] = script{answer}
		}
	}
	return f.url(t)
}

// url serves on a real socket until the test ends.
func (f *fakeKube) url(t *testing.T) string {
	l, host, port := listenHostPort(t)
	f.serve(t, l)
	return "http://" + net.JoinHostPort(host, port)
}

// serve serves on l, with TLS if there is a certificate, until the test ends.
func (f *fakeKube) serve(t *testing.T, l net.Listener, certificates ...tls.Certificate) *fakeKube {
	s := &http.Server{Handler: f, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo),
		TLSConfig: &tls.Config{Certificates: certificates}}
	var serving sync.WaitGroup
	serving.Go(func() {
		if certificates == nil {
			s.Serve(l)
		} else {
			s.ServeTLS(l, "", "")
		}
	})
	t.Cleanup(func() { s.Close(); serving.Wait() })
	return f
}

func (f *fakeKube) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	seen := fakeRequest{Request: r.Clone(context.Background()), at: time.Now()}
	seen.body, _ = io.ReadAll(r.Body)
	select {
	case f.arrived <- seen:
	default:
	}
	w.Header().Set("Content-Type", "application/json")
	f.answer(seen, r.Context())(w, r)
}

// answer returns the next answer of the script, or that of the objects.
func (f *fakeKube) answer(r fakeRequest, ctx context.Context) http.HandlerFunc {
	f.mu.Lock()
	defer f.mu.Unlock()
	parts := strings.Split(strings.TrimSuffix(r.URL.Path, "/backend/status"), "/")
	kind := parts[len(parts)-1]
	for _, key := range []string{r.verb() + " " + kind, r.verb()} {
		if answers := f.scripts[key]; len(answers) > 0 {
			f.scripts[key] = answers[min(1, len(answers)-1):]
			return answers[0]
		}
	}
	switch r.verb() {
	case "PATCH":
		return f.patch(r)
	case "POST":
		return f.create(r)
	case "WATCH":
		return f.watch(kind, r)
	}
	items := []string{}
	for _, name := range slices.Sorted(maps.Keys(f.objects[kind])) {
		if r.selects(name) {
			items = append(items, f.objects[kind][name])
		}
	}
	kinds := map[string]string{"configmaps": "ConfigMap", "statefulsets": "StatefulSet", "endpointslices": "EndpointSlice"}
	return listAnswer(kinds[kind], strconv.Itoa(len(f.history)), items...)
}

// watch sends the changes since the request's resourceVersion until the client is gone.
func (f *fakeKube) watch(kind string, asked fakeRequest) http.HandlerFunc {
	sent, err := strconv.Atoi(asked.FormValue("resourceVersion"))
	if err != nil || sent > len(f.history) {
		sent = len(f.history)
	}
	return func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			f.mu.Lock()
			news, changed := f.history[sent:], f.changed
			f.mu.Unlock()
			sent += len(news)
			for _, change := range news {
				if change.kind == kind && asked.selects(change.name) {
					io.WriteString(w, change.event)
				}
			}
			w.(http.Flusher).Flush()
			select {
			case <-changed:
			case <-r.Context().Done():
			}
		}
	}
}

// patch writes the active count of the StatefulSet, if the client knows its last version.
func (f *fakeKube) patch(r fakeRequest) http.HandlerFunc {
	var patch struct {
		Metadata struct {
			UID, ResourceVersion string
			Annotations          map[string]string
		}
	}
	switch err := json.Unmarshal(r.body, &patch); {
	case err != nil || r.Header.Get("Content-Type") != "application/merge-patch+json" || patch.Metadata.UID != "u-backend" ||
		r.URL.Path != "/apis/apps/v1/namespaces/edge/statefulsets/backend/status":
		return statusAnswer(400, "BadRequest", "what?")
	case patch.Metadata.ResourceVersion != f.set.version:
		return statusAnswer(409, "Conflict", "the object has been modified")
	}
	f.set.activeCount = patch.Metadata.Annotations[activeCountKey]
	f.putStatefulSet()
	return respond(200, "{}")
}

// create takes an Event, unless there is one of its name.
func (f *fakeKube) create(r fakeRequest) http.HandlerFunc {
	var e kubeEvent
	switch err := json.Unmarshal(r.body, &e); {
	case err != nil || r.URL.Path != "/api/v1/namespaces/edge/events":
		return statusAnswer(400, "BadRequest", "what?")
	case f.events[e.Metadata.Name] != "":
		return statusAnswer(409, "AlreadyExists", "there is one")
	}
	f.events[e.Metadata.Name] = string(r.body)
	return respond(201, "{}")
}

// put makes o an object of its kind, or deletes the one of its name. The caller holds mu.
func (f *fakeKube) put(kind, event string, o fakeObject) {
	if f.objects[kind] == nil {
		f.objects[kind] = map[string]string{}
	}
	if f.objects[kind][o.name] = o.json(); event == "DELETED" {
		delete(f.objects[kind], o.name)
	}
	f.history = append(f.history, watchedChange{kind, o.name, watchEvent(event, o.json())})
	close(f.changed)
	f.changed = make(chan struct{})
}

// fakeStatefulSet is the StatefulSet edge/backend.
type fakeStatefulSet struct {
	replicas, start, ready int
	activeCount            string // its annotation; "" if it has none
	version                string
	generation             int
}

// setStatefulSet changes the StatefulSet.
func (f *fakeKube) setStatefulSet(change func(*fakeStatefulSet)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.set)
	f.putStatefulSet()
}

// putStatefulSet makes set the StatefulSet's next version. The caller holds mu.
func (f *fakeKube) putStatefulSet() {
	s := &f.set
	s.version = strconv.Itoa(len(f.history) + 1)
	o := fakeObject{kind: "StatefulSet", name: "backend", uid: "u-backend", version: s.version, meta: fmt.Sprintf(`,"generation":%d`, s.generation),
		rest: fmt.Sprintf(`"spec":{"replicas":%d,"ordinals":{"start":%d}},"status":{"readyReplicas":%d}`, s.replicas, s.start, s.ready)}
	if s.activeCount != "" {
		o.meta += fmt.Sprintf(`,"annotations":{"other":"x","router/backends":%q}`, s.activeCount)
	}
	f.put("statefulsets", "MODIFIED", o)
}

// scale changes the spec of the StatefulSet.
func (f *fakeKube) scale(replicas int) {
	f.setStatefulSet(func(s *fakeStatefulSet) { s.replicas = replicas; s.generation++ })
}

// deleteStatefulSet deletes the StatefulSet.
func (f *fakeKube) deleteStatefulSet() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.put("statefulsets", "DELETED", fakeObject{kind: "StatefulSet", name: "backend", uid: "u-backend", version: f.set.version, rest: `"spec":{}`})
}

// setMap makes the ConfigMap edge/name another version.
func (f *fakeKube) setMap(name, version string, data map[string]string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	entries, _ := json.Marshal(data)
	f.put("configmaps", "MODIFIED", fakeObject{kind: "ConfigMap", name: name, uid: "u-" + name, version: version, rest: `"data":` + string(entries)})
}

// setEndpoints makes these the endpoints of the one EndpointSlice.
func (f *fakeKube) setEndpoints(endpoints string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.put("endpointslices", "MODIFIED", fakeObject{kind: "EndpointSlice", name: "one", uid: "u-one", version: strconv.Itoa(len(f.history) + 1),
		rest: `"addressType":"IPv4","endpoints":` + endpoints})
}

// setReady makes exactly these backends ready.
func (f *fakeKube) setReady(ordinals ...int) {
	f.setEndpoints(readyEndpoints(ordinals...))
	f.setStatefulSet(func(s *fakeStatefulSet) { s.ready = len(ordinals) })
}

// readyEndpoints are the endpoints of pods that are ready, at 10.0.0.<ordinal>.
func readyEndpoints(ordinals ...int) string {
	all := []string{}
	for _, i := range ordinals {
		all = append(all, fmt.Sprintf(`{"addresses":["10.0.0.%d"],"hostname":"backend-%d","conditions":{"ready":true}}`, i, i))
	}
	return "[" + strings.Join(all, ",") + "]"
}

// forbid answers requests of this verb and kind with 403.
func (f *fakeKube) forbid(verb, kind string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.scripts[verb+" "+kind] = script{statusAnswer(403, "Forbidden", "cannot "+strings.ToLower(verb)+" resource "+kind)}
}

// allow takes forbid back.
func (f *fakeKube) allow(verb, kind string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.scripts, verb+" "+kind)
}

// verbs returns what was requested since the last call, such as "LIST WATCH LIST".
func (f *fakeKube) verbs() string {
	var verbs []string
	for len(f.arrived) > 0 {
		verbs = append(verbs, (<-f.arrived).verb())
	}
	return strings.Join(verbs, " ")
}

// request returns the next request.
func (f *fakeKube) request(t *testing.T) fakeRequest {
	t.Helper()
	select {
	case r := <-f.arrived:
		return r
	case <-time.After(kubePatience()):
		t.Fatal("no request came")
		panic("unreachable")
	}
}

// kubePatience is how long a test waits for what must come. In synctest, where the year
// is 2000, waiting costs nothing.
func kubePatience() time.Duration {
	if time.Now().Year() == 2000 {
		return 4 * time.Minute
	}
	return 15 * time.Second
}

// fakeObject is an API object. Its zero fields are those of a ConfigMap in edge.
type fakeObject struct {
	kind, namespace, name string
	uid, version          string
	meta                  string // more of its metadata, such as `,"generation":1`
	rest                  string // what it has beside its metadata, such as `"data":{}`
}

func (o fakeObject) json() string {
	return fmt.Sprintf(`{"kind":%q,"apiVersion":"v1","metadata":{"name":%q,"namespace":%q,"uid":%q,"resourceVersion":%q,"managedFields":[{"manager":"kubectl"}]%s},%s}`,
		cmp.Or(o.kind, "ConfigMap"), o.name, cmp.Or(o.namespace, "edge"), o.uid, o.version, o.meta, o.rest)
}

// routesMap is the ConfigMap edge/routes with ns-01 on the backend.
func routesMap(uid, version, backend string) string {
	return fakeObject{name: "routes", uid: uid, version: version, rest: fmt.Sprintf(`"data":{"ns-01":%q}`, backend)}.json()
}

// routesV is version n of edge/routes.
func routesV(n int) string { return routesMap("u1", strconv.Itoa(n), "backend-"+strconv.Itoa(n)) }

// What a watcher applies of these versions.
const (
	applied1 = "1 map[ns-01:backend-1]"
	applied2 = "2 map[ns-01:backend-2]"
	applied3 = "3 map[ns-01:backend-3]"
)

// listsTo answers with version 1 of edge/routes, then with each up to n.
func listsTo(n int) (lists script) {
	for i := 1; i <= n; i++ {
		lists = append(lists, listAnswer("ConfigMap", strconv.Itoa(100+i), routesV(i)))
	}
	return lists
}

// listAnswer answers a LIST, whose resourceVersion is not that of an item. The items of
// a real one have no kind.
func listAnswer(kind, version string, items ...string) http.HandlerFunc {
	itemKind := fmt.Sprintf(`"kind":%q,"apiVersion":"v1",`, kind)
	return respond(200, fmt.Sprintf(`{"kind":"%sList","apiVersion":"v1","metadata":{"resourceVersion":%q},"items":[%s]}`,
		kind, version, strings.ReplaceAll(strings.Join(items, ","), itemKind, "")))
}

// mapList answers a LIST of ConfigMaps.
func mapList(version string, items ...string) http.HandlerFunc {
	return listAnswer("ConfigMap", version, items...)
}

// listOf answers with objects of the kind in the Kubernetes namespace "default", by name,
// each with what it has beside its metadata.
func listOf(kind string, objects map[string]string) http.HandlerFunc {
	items := []string{}
	for name, rest := range objects {
		items = append(items, fakeObject{kind: kind, namespace: "default", name: name, uid: "u", version: "5", rest: rest}.json())
	}
	return listAnswer(kind, "7", items...)
}

// oneMap answers with the one override of ns-01 that a router without flags looks for.
func oneMap() http.HandlerFunc {
	return listOf("ConfigMap", map[string]string{"overwriting": `"data":{"ns-01":"backend-0"}`})
}

// forbidden answers that the client may not list ConfigMaps, and is to wait a minute.
func forbidden() http.HandlerFunc {
	return respond(403, `{"kind":"Status","message":"configmaps is forbidden","reason":"Forbidden","code":403,"details":{"retryAfterSeconds":60}}`)
}

// statusAnswer answers with a Status.
func statusAnswer(code int, reason, message string) http.HandlerFunc {
	return respond(code, fmt.Sprintf(`{"kind":"Status","message":%q,"reason":%q,"code":%d}`, message, reason, code))
}

// respond answers with a body and headers given as name, value, name...
func respond(code int, body string, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
		io.WriteString(w, body)
	}
}

// hang sends nothing, not even a head.
func hang(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// watchEvent is an event as a WATCH sends it.
func watchEvent(kind, object string) string {
	return `{"type":"` + kind + `","object":` + object + "}\n"
}

// stream sends each part with a write of its own and ends cleanly.
func stream(parts ...string) http.HandlerFunc { return streamFor(0, false, parts...) }

// cutStream is a stream whose connection is cut after its parts.
func cutStream(parts ...string) http.HandlerFunc { return streamFor(0, true, parts...) }

// openStream stays open after its parts, for the timeoutSeconds of the request.
func openStream(parts ...string) http.HandlerFunc { return streamFor(-1, false, parts...) }

// streamFor sends the parts, waits for d, or for timeoutSeconds if d is negative, and
// ends, by a cut or cleanly.
func streamFor(d time.Duration, cut bool, parts ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for _, part := range append([]string{""}, parts...) {
			io.WriteString(w, part)
			w.(http.Flusher).Flush()
		}
		life := d
		if d < 0 {
			life, _ = time.ParseDuration(r.URL.Query().Get("timeoutSeconds") + "s")
			life = cmp.Or(life, time.Hour) // of a LIST
		}
		select {
		case <-time.After(life):
		case <-r.Context().Done():
		}
		if cut {
			panic(http.ErrAbortHandler)
		}
	}
}

// watchTest is a watcher of edge/routes that runs, its API server and their network.
type watchTest struct {
	*watcher[fakeConfigMap]
	server  *fakeKube
	network *pipeNetwork
	applied chan string // "<resourceVersion> <data>" each time, of several in order; "none"
	logged  *textLog
	stop    func() // ends run and waits for it
}

// fakeConfigMap is a ConfigMap as it comes.
type fakeConfigMap struct {
	apiObject
	Data map[string]string `json:"data"`
}

// routesWatcher follows edge/routes, or what the selector chooses in edge.
func routesWatcher(k *kubeClient, selector string, log *slog.Logger, apply func(map[string]*fakeConfigMap)) *watcher[fakeConfigMap] {
	w := &watcher[fakeConfigMap]{kube: k, path: "/api/v1/namespaces/edge/configmaps", kind: "ConfigMap", namespace: "edge",
		selector: selector, meta: func(m *fakeConfigMap) *apiObject { return &m.apiObject }, apply: apply, log: log}
	if selector == "" {
		w.name = "routes"
	}
	return w
}

// startWatch runs a watcher of a server that answers by these scripts, over HTTP/1.1, in
// a synctest bubble.
func startWatch(t *testing.T, lists, watches script) *watchTest {
	return startWatchOver(t, "HTTP/1.1", newPipeNetwork(), lists, watches)
}

// startWatchOver is startWatch over "HTTP/1.1" or "HTTP/2.0".
func startWatchOver(t *testing.T, proto string, network *pipeNetwork, lists, watches script) *watchTest {
	k, server := network.kube(t), scriptedKube(lists, watches)
	if proto == "HTTP/1.1" {
		server.serve(t, network)
	} else {
		ca, certificate := makeCA(t)
		k = podClient(t, "127.0.0.1", "6443", ca)
		k.dial = network.dial
		server.serve(t, network, certificate)
	}
	c := watchWith(t, k, "")
	c.server, c.network = server, network
	return c
}

// watchWith runs a watcher with this client, of edge/routes or of what the selector
// chooses.
func watchWith(t *testing.T, k *kubeClient, selector string) *watchTest {
	c := &watchTest{applied: make(chan string, 1000), logged: &textLog{}}
	c.watcher = routesWatcher(k, selector, slog.New(slog.NewTextHandler(c.logged, nil)), func(set map[string]*fakeConfigMap) {
		all := []string{}
		for _, name := range slices.Sorted(maps.Keys(set)) {
			all = append(all, fmt.Sprint(set[name].Metadata.ResourceVersion, " ", set[name].Data))
		}
		c.applied <- cmp.Or(strings.Join(all, ", "), "none")
	})
	c.stop = inBackground(t, c.run)
	return c
}

// inBackground starts the functions. stop ends their context and waits for them; the end
// of the test does too.
func inBackground(t *testing.T, functions ...func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range functions {
		running.Go(func() { run(ctx) })
	}
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return stop
}

// inBubble is a subtest in a synctest bubble.
func inBubble(t *testing.T, name string, test func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, test) })
}

// want checks what is applied next, in order.
func (c *watchTest) want(t *testing.T, contents ...string) {
	t.Helper()
	for _, want := range contents {
		select {
		case got := <-c.applied:
			if got != want {
				t.Fatalf("applied %.200s, want %.200s", got, want)
			}
		case <-time.After(kubePatience()):
			t.Fatalf("nothing was applied, want %.200s; log:\n%s", want, c.logged)
		}
	}
}

// wantNothing checks that nothing more was applied.
func (c *watchTest) wantNothing(t *testing.T) {
	t.Helper()
	if len(c.applied) > 0 {
		t.Errorf("applied %.200s, want nothing", <-c.applied)
	}
}

// wantVerbs checks what was requested since the last call.
func (c *watchTest) wantVerbs(t *testing.T, want string) {
	t.Helper()
	wantEqual(t, "requests", c.server.verbs(), want)
}

// textLog holds a log.
type textLog struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *textLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *textLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *textLog) count(text string) int { return strings.Count(l.String(), text) }

// pipeNetwork is a network of pipes with one server: for synctest, where real sockets
// would hold time up.
type pipeNetwork struct {
	conns  chan net.Conn
	closed chan struct{}
	dials  atomic.Int32
	open   atomic.Int32
	down   atomic.Bool  // connections are refused
	hole   atomic.Bool  // and not even that
	frozen atomic.Int32 // connections up to this dial take bytes and bring none, as those to a stopped host do
}

func newPipeNetwork() *pipeNetwork {
	return &pipeNetwork{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (n *pipeNetwork) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

func (n *pipeNetwork) Close() error   { close(n.closed); return nil }
func (n *pipeNetwork) Addr() net.Addr { return &net.TCPAddr{} }

func (n *pipeNetwork) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	born := n.dials.Add(1)
	if n.down.Load() {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
	}
	if n.hole.Load() {
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Second): // as long as dialAPIServer
		}
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded}
	}
	client, server := net.Pipe()
	select {
	case n.conns <- server:
		n.open.Add(1)
		return &pipeConn{Conn: client, net: n, born: born}, nil
	case <-n.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// freeze stops what goes over the connections that are open.
func (n *pipeNetwork) freeze() { n.frozen.Store(n.dials.Load()) }

// kube returns a client over HTTP/1.1.
func (n *pipeNetwork) kube(t *testing.T) *kubeClient {
	k := proxyClient(t, "http://127.0.0.1:8080")
	k.dial = n.dial
	return k
}

// pipeConn is the client's end of a connection.
type pipeConn struct {
	net.Conn
	net  *pipeNetwork
	born int32
	once sync.Once // for Close
}

func (c *pipeConn) Close() error {
	c.once.Do(func() { c.net.open.Add(-1) })
	return c.Conn.Close()
}

func (c *pipeConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if err != nil || c.born > c.net.frozen.Load() {
			return n, err
		}
	}
}

func (c *pipeConn) Write(b []byte) (int, error) {
	if c.born <= c.net.frozen.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// makeCA makes a CA and a server certificate for the hosts, which are valid in
// synctest's year 2000 too.
func makeCA(t *testing.T, hosts ...string) (ca []byte, server tls.Certificate) {
	t.Helper()
	return makeCASince(t, 1990, hosts...)
}

// makeCASince is makeCA, not valid before the year.
func makeCASince(t *testing.T, year int, hosts ...string) (ca []byte, server tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: t.Name()},
		NotBefore: time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
		IsCA: true, BasicConstraintsValid: true,
	}
	for _, host := range append(hosts, "127.0.0.1") {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// writeAccountFile writes a file of a service account as the kubelet does: it is there
// as a whole or not at all.
func writeAccountFile(t *testing.T, dir, name, content string) {
	t.Helper()
	next := filepath.Join(dir, "."+name)
	must(t, errors.Join(os.WriteFile(next, []byte(content), 0o600), os.Rename(next, filepath.Join(dir, name))))
}

// podClient returns a client as in a pod, with the token "first".
func podClient(t *testing.T, host, port string, ca []byte) *kubeClient {
	t.Helper()
	dir := t.TempDir()
	writeAccountFile(t, dir, "ca.crt", string(ca))
	writeAccountFile(t, dir, "token", " first\n")
	k, err := newInClusterClient(environment(map[string]string{"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}), dir)
	must(t, err)
	return k
}

// proxyClient returns a client of a kubectl proxy.
func proxyClient(t *testing.T, base string) *kubeClient {
	t.Helper()
	k, err := newKubectlProxyClient(base)
	must(t, err)
	return k
}

// listenHostPort returns a listener on a real socket and its host and port.
func listenHostPort(t *testing.T) (l net.Listener, host, port string) {
	t.Helper()
	l = listenLocal(t)
	host, port, _ = net.SplitHostPort(l.Addr().String())
	return l, host, port
}
