package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// fakeScale is an API server of the StatefulSet edge/backend, of the
// EndpointSlices of its Service, and of ConfigMaps, which change when a test says so.
// It takes Events.
type fakeScale struct {
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
	note                   string
}

func newFakeScale(set fakeStateful) *fakeScale {
	return &fakeScale{version: 10, generation: 1, set: &set, slices: map[string]string{}, maps: map[string]string{}, events: map[string]string{}, seen: map[string]int{}, more: make(chan struct{}),
		forbidden: map[string]bool{}}
}

// change changes an object of the kind, and the version.
func (f *fakeScale) change(kind string, change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	f.version++
	f.seen[kind] = f.version
	close(f.more)
	f.more = make(chan struct{})
}

func (f *fakeScale) scale(replicas int) {
	f.change("statefulsets", func() { f.set.replicas = replicas; f.generation++ })
}

// setMap makes the ConfigMap another version.
func (f *fakeScale) setMap(name, version string, data map[string]string) {
	f.change("configmaps", func() {
		entries, _ := json.Marshal(data)
		f.maps[name] = fmt.Sprintf(`{"kind":"ConfigMap","metadata":{"name":%q,"namespace":"edge","uid":"u-%s","resourceVersion":%q},"data":%s}`,
			name, name, version, entries)
	})
}

// setReady makes exactly these backends ready.
func (f *fakeScale) setReady(ordinals ...int) {
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
func (f *fakeScale) objects(kind string, r *http.Request) (all []string, seen int) {
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
		if f.set.note != "" {
			note = fmt.Sprintf(`,"annotations":{"other":"x","router/backends":%q}`, f.set.note)
		}
		all = append(all, fmt.Sprintf(`{"kind":"StatefulSet",%s,"spec":{"replicas":%d,"ordinals":{"start":%d}},"status":{"readyReplicas":%d}}`,
			meta("backend", note+fmt.Sprintf(`,"generation":%d`, f.generation)), f.set.replicas, f.set.start, f.set.ready))
	}
	return all, f.seen[kind]
}

func (f *fakeScale) ServeHTTP(w http.ResponseWriter, r *http.Request) {
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
func (f *fakeScale) watch(w http.ResponseWriter, r *http.Request, kind string, sent int) {
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
func (f *fakeScale) patch(w http.ResponseWriter, r *http.Request) {
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
		f.set.note = patch.Metadata.Annotations[noteKey]
		f.version++
		f.seen["statefulsets"] = f.version
		close(f.more)
		f.more = make(chan struct{})
		io.WriteString(w, `{}`)
	}
}

// post takes an Event, unless there is one of its name. mu is held.
func (f *fakeScale) post(w http.ResponseWriter, r *http.Request) {
	var e event
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

// fakeRouter is what follows a fakeScale.
type fakeRouter struct {
	*scale
	last   atomic.Pointer[ordinals]
	logged *fakeKubeLog
	stop   func()
}

// serveScale starts the API server in a network of pipes, for synctest.
func serveScale(t *testing.T, f http.Handler) *fakeKubeNet {
	n := newFakeKubeNet()
	s := &http.Server{Handler: f, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(net.Listener(n)) }()
	t.Cleanup(func() { s.Close(); <-done })
	return n
}

// startScale starts a router's half that follows the StatefulSet.
func startScale(t *testing.T, n *fakeKubeNet) *fakeRouter {
	t.Helper()
	return startScaleFor(t, n, func(ordinals, string) {})
}

// startScaleFor is startScale with another that gets what the StatefulSet says.
func startScaleFor(t *testing.T, n *fakeKubeNet, resize func(ordinals, string)) *fakeRouter {
	r := &fakeRouter{logged: &fakeKubeLog{}}
	log := slog.New(slog.NewTextHandler(r.logged, nil))
	client := *n.kube(t)
	pods := followPods(client, "edge", "backend", "headless", 9000, log)
	r.scale = followScale(client, "edge", pods, func(b ordinals, revision string) {
		r.last.Store(&b)
		resize(b, revision)
	}, log)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, run := range []func(context.Context){pods.watcher.run, r.watcher.run, r.keepNote} {
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
