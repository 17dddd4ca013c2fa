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
	"net/http/httptest"
	"net/url"
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

// fakeKube is an API server of the ConfigMap edge/routes. The n-th LIST is
// answered by lists[n], the n-th WATCH by watches[n], the n-th POST by posts[n];
// the last of each stays.
type fakeKube struct {
	lists, watches, posts []http.HandlerFunc
	arrived               chan fakeKubeRequest

	mu                      sync.Mutex
	listed, watched, posted int // guarded by mu
}

func (f *fakeKube) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	seen := fakeKubeRequest{r.Clone(context.Background()), time.Now()}
	if body, _ := io.ReadAll(r.Body); len(body) > 0 {
		seen.Body = io.NopCloser(bytes.NewReader(body))
	}
	f.arrived <- seen
	w.Header().Set("Content-Type", "application/json")
	f.mu.Lock()
	script, n := f.lists, &f.listed
	switch seen.verb() {
	case "WATCH":
		script, n = f.watches, &f.watched
	case "POST":
		script, n = f.posts, &f.posted
	}
	answer := script[min(*n, len(script)-1)]
	*n++
	f.mu.Unlock()
	answer(w, r)
}

// verbs returns what was asked since the last call, such as "LIST WATCH LIST".
func (f *fakeKube) verbs() string {
	var verbs []string
	for {
		select {
		case r := <-f.arrived:
			verbs = append(verbs, r.verb())
		default:
			return strings.Join(verbs, " ")
		}
	}
}

// request returns the next request.
func (f *fakeKube) request(t *testing.T) fakeKubeRequest {
	t.Helper()
	select {
	case r := <-f.arrived:
		return r
	case <-time.After(fakeKubePatience()):
		t.Fatal("no request came")
		panic("unreachable")
	}
}

// fakeKubeRequest is a request as the server saw it.
type fakeKubeRequest struct {
	*http.Request
	at time.Time
}

func (r fakeKubeRequest) verb() string {
	if r.Method == http.MethodPost {
		return "POST"
	}
	if r.URL.Query().Get("watch") == "1" {
		return "WATCH"
	}
	return "LIST"
}

// newFakeKube serves on l, with TLS if it has a certificate, until the test ends.
func newFakeKube(t *testing.T, l net.Listener, lists, watches []http.HandlerFunc, certificates ...tls.Certificate) *fakeKube {
	f := &fakeKube{lists: lists, watches: watches, posts: []http.HandlerFunc{fakeKubeSay(201, "{}")}, arrived: make(chan fakeKubeRequest, 1000)}
	s := &http.Server{Handler: f, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo),
		TLSConfig: &tls.Config{Certificates: certificates}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if certificates == nil {
			s.Serve(l)
		} else {
			s.ServeTLS(l, "", "")
		}
	}()
	t.Cleanup(func() { s.Close(); <-done })
	return f
}

// fakeKubePatience is how long a test waits for what must come. In synctest,
// where the year is 2000, waiting costs nothing.
func fakeKubePatience() time.Duration {
	if time.Now().Year() == 2000 {
		return 4 * time.Minute
	}
	return 15 * time.Second
}

// fakeKubeScript is what a fakeKube answers, in order.
type fakeKubeScript = []http.HandlerFunc

func fakeKubeV(n int) string {
	return fakeKubeObject("u1", strconv.Itoa(n), "backend-"+strconv.Itoa(n))
}

// fakeKubeLists answers with version 1, then 2...
func fakeKubeLists(n int) (lists fakeKubeScript) {
	for i := 1; i <= n; i++ {
		lists = append(lists, fakeKubeList(strconv.Itoa(100+i), fakeKubeV(i)))
	}
	return lists
}

const (
	fakeKube1 = "1 map[ns-01:backend-1]"
	fakeKube2 = "2 map[ns-01:backend-2]"
	fakeKube3 = "3 map[ns-01:backend-3]"
)

// fakeKubeObject is the ConfigMap edge/routes with ns-01 on the backend.
func fakeKubeObject(uid, version, backend string) string {
	return fmt.Sprintf(`{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"routes","namespace":"edge","uid":%q,`+
		`"resourceVersion":%q,"managedFields":[{"manager":"kubectl"}]},"data":{"ns-01":%q}}`, uid, version, backend)
}

func fakeKubeEvent(kind, object string) string {
	return `{"type":"` + kind + `","object":` + object + "}\n"
}

// fakeKubeList answers a LIST whose own resourceVersion is larger than that of
// its item, as on a real server.
func fakeKubeList(version string, items ...string) http.HandlerFunc {
	for i := range items {
		items[i] = strings.Replace(items[i], `"kind":"ConfigMap","apiVersion":"v1",`, "", 1)
	}
	return fakeKubeSay(200, `{"kind":"ConfigMapList","apiVersion":"v1","metadata":{"resourceVersion":"`+version+`"},"items":[`+
		strings.Join(items, ",")+`]}`)
}

// fakeKubeSay answers with a body and headers given as name, value, name...
func fakeKubeSay(status int, body string, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// fakeKubeStream sends each part with a write of its own and ends cleanly.
func fakeKubeStream(parts ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for _, part := range append([]string{""}, parts...) {
			io.WriteString(w, part)
			w.(http.Flusher).Flush()
		}
	}
}

// fakeKubeOpen is a stream that stays open after its parts, for timeoutSeconds.
func fakeKubeOpen(parts ...string) http.HandlerFunc { return fakeKubeLast(0, false, parts...) }

// fakeKubeCut is a stream whose connection is cut after its parts.
func fakeKubeCut(parts ...string) http.HandlerFunc { return fakeKubeLast(1, true, parts...) }

// fakeKubeLast is a stream that lasts for d after its parts, or timeoutSeconds if
// d is 0, and then ends, by a cut or cleanly.
func fakeKubeLast(d time.Duration, cut bool, parts ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		fakeKubeStream(parts...)(w, r)
		life := d
		if life == 0 {
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

// fakeKubeHang sends nothing, not even a head.
func fakeKubeHang(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// fakeKubeClient is a watcher under test, running.
type fakeKubeClient struct {
	*watcher[fakeConfigMap]
	applied chan string // "<resourceVersion> <data>" each time, of several in order; "none"
	logged  *fakeKubeLog
	stop    func() // ends run and waits for it
}

// fakeConfigMap is a ConfigMap as it comes.
type fakeConfigMap struct {
	apiObject
	Data map[string]string `json:"data"`
}

// fakeKubeWatcher follows edge/routes, or what the selector chooses in edge.
func fakeKubeWatcher(k *kubeClient, selector string, log *slog.Logger, apply func(map[string]*fakeConfigMap)) *watcher[fakeConfigMap] {
	w := &watcher[fakeConfigMap]{kube: k, path: "/api/v1/namespaces/edge/configmaps", kind: "ConfigMap", namespace: "edge",
		selector: selector, meta: func(m *fakeConfigMap) *apiObject { return &m.apiObject }, apply: apply, log: log}
	if selector == "" {
		w.name = "routes"
	}
	return w
}

func fakeKubeFollow(t *testing.T, k *kubeClient) *fakeKubeClient { return fakeKubeSelect(t, k, "") }

func fakeKubeSelect(t *testing.T, k *kubeClient, selector string) *fakeKubeClient {
	c := &fakeKubeClient{applied: make(chan string, 1000), logged: &fakeKubeLog{}}
	c.watcher = fakeKubeWatcher(k, selector, slog.New(slog.NewTextHandler(c.logged, nil)), func(set map[string]*fakeConfigMap) {
		all := []string{}
		for _, name := range slices.Sorted(maps.Keys(set)) {
			all = append(all, fmt.Sprint(set[name].Metadata.ResourceVersion, " ", set[name].Data))
		}
		c.applied <- cmp.Or(strings.Join(all, ", "), "none")
	})
	c.stop = fakeKubeRun(c.run)
	t.Cleanup(c.stop)
	return c
}

// fakeKubeRun starts run; stop ends it and waits for it.
func fakeKubeRun(run func(context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); run(ctx) }()
	return func() { cancel(); <-done }
}

// want checks what is applied next, in order.
func (c *fakeKubeClient) want(t *testing.T, contents ...string) {
	t.Helper()
	for _, want := range contents {
		select {
		case got := <-c.applied:
			if got != want {
				t.Fatalf("applied %.200s, want %.200s", got, want)
			}
		case <-time.After(fakeKubePatience()):
			t.Fatalf("nothing was applied, want %.200s; log:\n%s", want, c.logged)
		}
	}
}

// wantNothing checks that nothing more was applied.
func (c *fakeKubeClient) wantNothing(t *testing.T) {
	t.Helper()
	if len(c.applied) > 0 {
		t.Errorf("applied %.200s, want nothing", <-c.applied)
	}
}

// fakeKubeLog holds a log.
type fakeKubeLog struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *fakeKubeLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *fakeKubeLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *fakeKubeLog) count(text string) int { return strings.Count(l.String(), text) }

// fakeKubeNet is a network of pipes with one server: for synctest, where real
// sockets would hold time up.
type fakeKubeNet struct {
	conns  chan net.Conn
	closed chan struct{}
	dials  atomic.Int32
	open   atomic.Int32
	down   atomic.Bool  // connections are refused
	hole   atomic.Bool  // and not even that
	frozen atomic.Int32 // connections up to this dial take bytes and bring none, as those to a stopped host do
}

func newFakeKubeNet() *fakeKubeNet {
	return &fakeKubeNet{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (n *fakeKubeNet) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

func (n *fakeKubeNet) Close() error   { close(n.closed); return nil }
func (n *fakeKubeNet) Addr() net.Addr { return &net.TCPAddr{} }

func (n *fakeKubeNet) dial(ctx context.Context, _, _ string) (net.Conn, error) {
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
		return &fakeKubeConn{Conn: client, net: n, born: born}, nil
	case <-n.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// freeze stops what goes over the connections that are open.
func (n *fakeKubeNet) freeze() { n.frozen.Store(n.dials.Load()) }

// kube returns a client over HTTP/1.1.
func (n *fakeKubeNet) kube(t *testing.T) *kubeClient {
	k, err := newKubectlProxyClient("http://127.0.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	k.dial = n.dial
	return k
}

// fakeKubeConn is the client's end of a connection.
type fakeKubeConn struct {
	net.Conn
	net  *fakeKubeNet
	born int32
	once sync.Once // for Close
}

func (c *fakeKubeConn) Close() error {
	c.once.Do(func() { c.net.open.Add(-1) })
	return c.Conn.Close()
}

func (c *fakeKubeConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if err != nil || c.born > c.net.frozen.Load() {
			return n, err
		}
	}
}

func (c *fakeKubeConn) Write(b []byte) (int, error) {
	if c.born <= c.net.frozen.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// fakeKubeCA makes a CA and a server certificate for the hosts, which are
// valid in synctest's year 2000 too.
func fakeKubeCA(t *testing.T, hosts ...string) (ca []byte, server tls.Certificate) {
	t.Helper()
	return fakeKubeCASince(t, 1990, hosts...)
}

// fakeKubeCASince is not valid before the year.
func fakeKubeCASince(t *testing.T, year int, hosts ...string) (ca []byte, server tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
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
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// fakeKubeFile writes a file of a service account as the kubelet does: it is
// there as a whole or not at all.
func fakeKubeFile(t *testing.T, dir, name, content string) {
	t.Helper()
	next := filepath.Join(dir, "."+name)
	if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// fakeKubePod returns a client as in a pod, with the token "first".
func fakeKubePod(t *testing.T, host, port string, ca []byte) *kubeClient {
	t.Helper()
	dir := t.TempDir()
	fakeKubeFile(t, dir, "ca.crt", string(ca))
	fakeKubeFile(t, dir, "token", " first\n")
	k, err := newInClusterClient(func(name string) string {
		return map[string]string{"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}[name]
	}, dir)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// fakeKubeListen returns a listener on a real socket and its host and port.
func fakeKubeListen(t *testing.T) (l net.Listener, host, port string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ = net.SplitHostPort(l.Addr().String())
	return l, host, port
}

// fakeKubeGet asks for the ConfigMaps and returns the error.
func fakeKubeGet(t *testing.T, k *kubeClient) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context()) // which ends the connection
	defer cancel()
	body, err := k.do(ctx, "/api/v1/namespaces/edge/configmaps", url.Values{"fieldSelector": {"metadata.name=routes"}}, nil)
	if err == nil {
		body.Close()
	}
	return err
}

// kubeAnswers is an API server that gives the same answer to each request;
// status 0 is no answer for as long as the client waits.
func kubeAnswers(t *testing.T, status int, body string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status == 0 || r.URL.Query().Get("watch") != "" {
			<-r.Context().Done()
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

const (
	oneConfigMap = `{"kind":"ConfigMapList","metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"overwriting",` +
		`"namespace":"default","uid":"u","resourceVersion":"5"},"data":{"ns-01":"backend-0"}}]}`
	noConfigMap = `{"kind":"ConfigMapList","metadata":{"resourceVersion":"7"},"items":[]}`
	forbidden   = `{"kind":"Status","message":"configmaps is forbidden","reason":"Forbidden","code":403,"details":{"retryAfterSeconds":60}}`
)

// kindAnswers is an API server that lists each kind as is told, by the last part
// of the path; watches bring what is told for "watch <part>", or nothing.
func kindAnswers(t *testing.T, lists map[string]http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		kind := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		answer := lists[kind]
		if r.FormValue("watch") != "" {
			answer = lists["watch "+kind]
		}
		switch {
		case r.FormValue("watch") != "" && answer == nil:
			w.Header().Set("Content-Type", "application/json")
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		case answer == nil:
			fakeKubeSay(403, `{"kind":"Status","message":"not this","reason":"Forbidden","code":403}`, "Content-Type", "application/json")(w, r)
		default:
			w.Header().Set("Content-Type", "application/json")
			answer(w, r)
		}
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// listOf answers with a list of objects of the kind in the Kubernetes namespace
// "default", each named, with the rest of its JSON.
func listOf(kind string, objects map[string]string) http.HandlerFunc {
	items := []string{}
	for name, rest := range objects {
		items = append(items, fmt.Sprintf(`{"metadata":{"name":%q,"namespace":"default","uid":"u","resourceVersion":"5"},%s}`, name, rest))
	}
	return fakeKubeSay(200, fmt.Sprintf(`{"kind":"%sList","metadata":{"resourceVersion":"7"},"items":[%s]}`, kind, strings.Join(items, ",")))
}

// fakeReplicas is an API server of the StatefulSet edge/backend, of the
// EndpointSlices of its Service, and of ConfigMaps, which change when a test says so.
// It takes Events.
type fakeReplicas struct {
	mu         sync.Mutex
	version    int
	set        *fakeStateful
	slices     map[string]string // endpoints in JSON, by name
	seen       map[string]int    // version of the last change, by kind
	generation int               // of the StatefulSet's spec
	more       chan struct{}     // closed at each change
	forbidden  map[string]bool   // by verb and kind: "PATCH statefulsets"
	conflicts  int               // patches of a version that was not the last
	maps       map[string]string // ConfigMaps in JSON, by name
	events     map[string]string // in JSON as they were posted, by name; the first of a name
}

// fakeStateful is the StatefulSet.
type fakeStateful struct {
	replicas, start, ready int
	activeCount            string
}

func newFakeReplicas(set fakeStateful) *fakeReplicas {
	return &fakeReplicas{version: 10, generation: 1, set: &set, slices: map[string]string{}, maps: map[string]string{}, events: map[string]string{}, seen: map[string]int{}, more: make(chan struct{}),
		forbidden: map[string]bool{}}
}

// change changes an object of the kind, and the version.
func (f *fakeReplicas) change(kind string, change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	f.version++
	f.seen[kind] = f.version
	close(f.more)
	f.more = make(chan struct{})
}

func (f *fakeReplicas) scale(replicas int) {
	f.change("statefulsets", func() { f.set.replicas = replicas; f.generation++ })
}

// setMap makes the ConfigMap another version.
func (f *fakeReplicas) setMap(name, version string, data map[string]string) {
	f.change("configmaps", func() {
		entries, _ := json.Marshal(data)
		f.maps[name] = fmt.Sprintf(`{"kind":"ConfigMap","metadata":{"name":%q,"namespace":"edge","uid":"u-%s","resourceVersion":%q},"data":%s}`,
			name, name, version, entries)
	})
}

// setReady makes exactly these backends ready.
func (f *fakeReplicas) setReady(ordinals ...int) {
	f.change("endpointslices", func() { f.slices["one"] = fakeEndpoints(ordinals...) })
	f.change("statefulsets", func() { f.set.ready = len(ordinals) })
}

// fakeEndpoints are the endpoints of pods that are ready, at 10.0.0.<ordinal>.
func fakeEndpoints(ordinals ...int) string {
	all := []string{}
	for _, i := range ordinals {
		all = append(all, fmt.Sprintf(`{"addresses":["10.0.0.%d"],"hostname":"backend-%d","conditions":{"ready":true}}`, i, i))
	}
	return "[" + strings.Join(all, ",") + "]"
}

// objects are those of a kind as JSON, and the version of the last change: of
// ConfigMaps those that the selector of r means.
func (f *fakeReplicas) objects(kind string, r *http.Request) (all []string, seen int) {
	meta := func(name, more string) string {
		return fmt.Sprintf(`"metadata":{"name":%q,"namespace":"edge","uid":"u-%s","resourceVersion":"%d"%s}`, name, name, f.seen[kind], more)
	}
	switch {
	case kind == "configmaps":
		for name, one := range f.maps {
			if selector := r.FormValue("fieldSelector"); selector == "" || selector == "metadata.name="+name {
				all = append(all, one)
			}
		}
	case kind == "endpointslices":
		for name, endpoints := range f.slices {
			all = append(all, `{"kind":"EndpointSlice",`+meta(name, "")+`,"addressType":"IPv4","endpoints":`+endpoints+`}`)
		}
	case f.set != nil:
		note := ""
		if f.set.activeCount != "" {
			note = fmt.Sprintf(`,"annotations":{"other":"x","router/backends":%q}`, f.set.activeCount)
		}
		all = append(all, fmt.Sprintf(`{"kind":"StatefulSet",%s,"spec":{"replicas":%d,"ordinals":{"start":%d}},"status":{"readyReplicas":%d}}`,
			meta("backend", note+fmt.Sprintf(`,"generation":%d`, f.generation)), f.set.replicas, f.set.start, f.set.ready))
	}
	return all, f.seen[kind]
}

func (f *fakeReplicas) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.TrimSuffix(r.URL.Path, "/backend/status"), "/")
	kind, verb := parts[len(parts)-1], "LIST"
	if r.Method == http.MethodPatch || r.Method == http.MethodPost {
		verb = r.Method
	} else if r.FormValue("watch") != "" {
		verb = "WATCH"
	}
	w.Header().Set("Content-Type", "application/json")
	f.mu.Lock()
	defer f.mu.Unlock()
	all, seen := f.objects(kind, r)
	switch {
	case f.forbidden[verb+" "+kind]:
		fakeKubeSay(403, `{"kind":"Status","message":"cannot `+strings.ToLower(verb)+` resource \"`+kind+`\"","reason":"Forbidden","code":403}`)(w, r)
	case verb == "PATCH":
		f.patch(w, r)
	case verb == "POST":
		f.post(w, r)
	case verb == "LIST":
		name := map[string]string{"statefulsets": "StatefulSet", "endpointslices": "EndpointSlice", "configmaps": "ConfigMap"}[kind]
		fmt.Fprintf(w, `{"kind":"%sList","metadata":{"resourceVersion":"%d"},"items":[%s]}`, name, f.version, strings.Join(all, ","))
	default:
		f.watch(w, r, kind, seen)
	}
}

// watch sends all objects of the kind after each change. mu is held.
func (f *fakeReplicas) watch(w http.ResponseWriter, r *http.Request, kind string, sent int) {
	if version := r.FormValue("resourceVersion"); version != fmt.Sprint(f.version) {
		sent = 0
	}
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	for r.Context().Err() == nil {
		if all, seen := f.objects(kind, r); seen != sent {
			sent = seen
			for _, object := range all {
				io.WriteString(w, fakeKubeEvent("MODIFIED", object))
			}
			w.(http.Flusher).Flush()
		}
		more := f.more
		f.mu.Unlock()
		select {
		case <-more:
		case <-r.Context().Done():
		}
		f.mu.Lock()
	}
}

// patch changes the annotation, as of a version. mu is held.
func (f *fakeReplicas) patch(w http.ResponseWriter, r *http.Request) {
	var patch struct {
		Metadata struct {
			UID, ResourceVersion string
			Annotations          map[string]string
		}
	}
	err := json.NewDecoder(r.Body).Decode(&patch)
	switch {
	case err != nil || r.Header.Get("Content-Type") != "application/merge-patch+json" || patch.Metadata.UID != "u-backend" ||
		!strings.HasSuffix(r.URL.Path, "/apis/apps/v1/namespaces/edge/statefulsets/backend/status"):
		fakeKubeSay(400, `{"kind":"Status","message":"what?","code":400}`)(w, r)
	case patch.Metadata.ResourceVersion != fmt.Sprint(f.seen["statefulsets"]):
		f.conflicts++
		fakeKubeSay(409, `{"kind":"Status","message":"the object has been modified","reason":"Conflict","code":409}`)(w, r)
	default:
		f.set.activeCount = patch.Metadata.Annotations[activeCountKey]
		f.version++
		f.seen["statefulsets"] = f.version
		close(f.more)
		f.more = make(chan struct{})
		io.WriteString(w, `{}`)
	}
}

// post takes an Event, unless there is one of its name. mu is held.
func (f *fakeReplicas) post(w http.ResponseWriter, r *http.Request) {
	var e kubeEvent
	b, err := io.ReadAll(r.Body)
	switch err := cmp.Or(err, json.Unmarshal(b, &e)); {
	case err != nil || r.URL.Path != "/api/v1/namespaces/edge/events":
		fakeKubeSay(400, `{"kind":"Status","message":"what?","code":400}`)(w, r)
	case f.events[e.Metadata.Name] != "":
		fakeKubeSay(409, `{"kind":"Status","message":"there is one","reason":"AlreadyExists","code":409}`)(w, r)
	default:
		f.events[e.Metadata.Name] = string(b)
		w.WriteHeader(http.StatusCreated)
		io.WriteString(w, `{}`)
	}
}

// fakeRouter is what follows a fakeReplicas.
type fakeRouter struct {
	*replicaWatcher
	last   atomic.Pointer[ordinals]
	logged *fakeKubeLog
	stop   func()
}

// serveReplicas starts the API server in a network of pipes, for synctest.
func serveReplicas(t *testing.T, f http.Handler) *fakeKubeNet {
	n := newFakeKubeNet()
	s := &http.Server{Handler: f, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(net.Listener(n)) }()
	t.Cleanup(func() { s.Close(); <-done })
	return n
}

// startReplicas starts a router's half that follows the StatefulSet.
func startReplicas(t *testing.T, n *fakeKubeNet) *fakeRouter {
	t.Helper()
	return startScaleFor(t, n, func(ordinals, string) {})
}

// startScaleFor is startReplicas with another that gets what the StatefulSet says.
func startScaleFor(t *testing.T, n *fakeKubeNet, resize func(ordinals, string)) *fakeRouter {
	r := &fakeRouter{logged: &fakeKubeLog{}}
	log := slog.New(slog.NewTextHandler(r.logged, nil))
	client := *n.kube(t)
	pods := newEndpointWatcher(client, "edge", "backend", "headless", 9000, func(map[int]string) {}, log)
	r.replicaWatcher = newReplicaWatcher(client, "edge", pods, func(b ordinals, revision string) {
		r.last.Store(&b)
		resize(b, revision)
	}, log)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range []func(context.Context){pods.watcher.run, r.watcher.run, r.keepActiveCount} {
		running.Go(func() { run(ctx) })
	}
	r.stop = func() { cancel(); running.Wait() }
	t.Cleanup(r.stop)
	synctest.Wait()
	return r
}

// now is the backends that the router has.
func (r *fakeRouter) now() ordinals {
	if b := r.last.Load(); b != nil {
		return *b
	}
	return ordinals{}
}
