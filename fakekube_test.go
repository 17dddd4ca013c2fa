package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
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

// fakeKubePatience is how long a test waits for what must come. In synctest,
// where the year is 2000, waiting costs nothing.
func fakeKubePatience() time.Duration {
	if time.Now().Year() == 2000 {
		return 4 * time.Minute
	}
	return 15 * time.Second
}

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
	object
	Data map[string]string `json:"data"`
}

// fakeKubeWatcher follows edge/routes, or what the selector chooses in edge.
func fakeKubeWatcher(k *kube, selector string, log *slog.Logger, apply func(map[string]*fakeConfigMap)) *watcher[fakeConfigMap] {
	w := &watcher[fakeConfigMap]{kube: k, path: "/api/v1/namespaces/edge/configmaps", kind: "ConfigMap", namespace: "edge",
		selector: selector, header: func(m *fakeConfigMap) *object { return &m.object }, apply: apply, log: log}
	if selector == "" {
		w.name = "routes"
	}
	return w
}

func fakeKubeFollow(t *testing.T, k *kube) *fakeKubeClient { return fakeKubeSelect(t, k, "") }

func fakeKubeSelect(t *testing.T, k *kube, selector string) *fakeKubeClient {
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
