package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// releasingBackend is a backend that answers releases, and keeps what it was asked. On
// other paths it takes WebSockets, and sends back what it gets.
type releasingBackend struct {
	*httptest.Server
	upgrades atomic.Int64
	answer   atomic.Pointer[http.HandlerFunc] // nil: 204
	conns    atomic.Int64                     // that were accepted

	mu       sync.Mutex
	requests []releaseRequest // guarded by mu
}

// releaseRequest is one request as the backend has got it.
type releaseRequest struct {
	method, path, host  string
	step, backend, from string // the X-Router-* fields
	namespaces          []string
	bytes               int // of the body
}

func newReleasingBackend(t *testing.T) *releasingBackend {
	b := &releasingBackend{}
	b.Server = httptest.NewUnstartedServer(b)
	b.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			b.conns.Add(1)
		}
	}
	b.Start()
	t.Cleanup(b.Close)
	return b
}

func (b *releasingBackend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/release" {
		b.upgrades.Add(1)
		websocket.Server{Handler: func(ws *websocket.Conn) { io.Copy(ws, ws) }}.ServeHTTP(w, r)
		return
	}
	body, err := io.ReadAll(r.Body)
	var asked struct{ Namespaces []string }
	if err == nil {
		err = json.Unmarshal(body, &asked)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	b.mu.Lock()
	b.requests = append(b.requests, releaseRequest{
		r.Method, r.URL.Path, r.Host, r.Header.Get("X-Router-Step"),
		r.Header.Get("X-Router-Backend"), r.Header.Get("X-Router-Pod"),
		asked.Namespaces, len(body),
	})
	b.mu.Unlock()
	if answer := b.answer.Load(); answer != nil {
		(*answer)(w, r)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (b *releasingBackend) setAnswer(answer http.HandlerFunc) { b.answer.Store(&answer) }

// asked returns the requests so far.
func (b *releasingBackend) asked() []releaseRequest {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.requests)
}

// startReleaser returns a releaser of these backends, and what it logs.
func startReleaser(t *testing.T, backends ...*releasingBackend) (*releaser, *textLog) {
	var addrs []string
	for _, b := range backends {
		addrs = append(addrs, b.Listener.Addr().String())
	}
	return startReleaserAt(t, addrs...)
}

func startReleaserAt(t *testing.T, addrs ...string) (*releaser, *textLog) {
	log, logged := newTextLog()
	r := newReleaser("/release", "router-a", newStaticBackends("backend", addrs), log)
	t.Cleanup(r.close)
	return r, logged
}

// newTextLog returns a log, and what is written to it.
func newTextLog() (*slog.Logger, *textLog) {
	logged := &textLog{}
	return slog.New(slog.NewTextHandler(logged, nil)), logged
}

// makeNamespaces returns ns-0 and so on.
func makeNamespaces(count int) (names []string) {
	for i := range count {
		names = append(names, fmt.Sprintf("ns-%d", i))
	}
	return names
}

// setOf returns the set in which each backend has these namespaces.
func setOf(backends int, namespaces ...string) releaseSet {
	set := releaseSet{}
	for backend := range backends {
		for _, namespace := range namespaces {
			set.add(namespace, backend)
		}
	}
	return set
}

func TestReleaseRequest(t *testing.T) {
	b := newReleasingBackend(t)
	r, _ := startReleaser(t, b)
	left, err := r.release(t.Context(), 0, []string{"ns-01", "ns-02"}, 42)
	if left != nil || err != nil {
		t.Fatalf("left %v, error %v", left, err)
	}
	got := b.asked()[0]
	got.bytes = 0
	want := releaseRequest{"POST", "/release", "backend-0", "42", "backend-0", "router-a",
		[]string{"ns-01", "ns-02"}, 0}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the backend got\n%v, want\n%v", got, want)
	}
}

// TestReleaseBatches: many namespaces go in several requests, on one connection. What was
// released before one of them fails is not asked for again.
func TestReleaseBatches(t *testing.T) {
	b := newReleasingBackend(t)
	b.setAnswer(func(w http.ResponseWriter, _ *http.Request) {
		if len(b.asked()) == 2 {
			http.Error(w, "not now", http.StatusServiceUnavailable)
		}
	})
	r, _ := startReleaser(t, b)
	names := makeNamespaces(2*maxReleaseBatch + 1)
	for i := range names {
		names[i] += strings.Repeat("x", 253-len(names[i]))
	}
	left, err := r.release(t.Context(), 0, names, 1)
	if err == nil || !slices.Equal(left, names[maxReleaseBatch:]) {
		t.Fatalf("%d namespaces left, error %v; want %d", len(left), err, maxReleaseBatch+1)
	}
	if left, err = r.release(t.Context(), 0, left, 1); err != nil {
		t.Fatal(left, err)
	}
	var released []string
	requests := b.asked()
	for _, request := range slices.Delete(requests, 1, 2) {
		released = append(released, request.namespaces...)
		if request.bytes > 1<<18 {
			t.Errorf("a request of %d bytes", request.bytes)
		}
	}
	if !slices.Equal(released, names) {
		t.Errorf("%d namespaces released, want each of %d once", len(released), len(names))
	}
	if conns := b.conns.Load(); conns != 1 {
		t.Errorf("%d connections, want 1", conns)
	}
}

// TestReleaseWaits: an answer that takes long is waited for.
func TestReleaseWaits(t *testing.T) {
	b := newReleasingBackend(t)
	flushed := make(chan struct{})
	b.setAnswer(func(http.ResponseWriter, *http.Request) { <-flushed })
	r, _ := startReleaser(t, b)
	done := make(chan struct{})
	run := r.start(r.lifetime, 1, setOf(1, "ns-01"), func() { close(done) })
	eventually(t, "requests", 1, func() int { return len(b.asked()) })
	if run.isDone() {
		t.Error("released before the backend has answered")
	}
	close(flushed)
	<-done
	if !run.isDone() || len(b.asked()) != 1 {
		t.Errorf("released: %v, after %d requests; want true after 1", run.isDone(), len(b.asked()))
	}
}

// TestReleaseTakesTwoSeconds: a backend that stores for two seconds has released its
// namespaces then, not before.
func TestReleaseTakesTwoSeconds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, _ := startReleaserAt(t, "unused")
		r.transport.RegisterProtocol("http", roundTripper(func(*http.Request) (*http.Response, error) {
			time.Sleep(2 * time.Second)
			return &http.Response{StatusCode: 204, Body: http.NoBody}, nil
		}))
		began, done := time.Now(), make(chan time.Duration)
		r.start(r.lifetime, 1, setOf(1, "ns-01"), func() { done <- time.Since(began) })
		if took := <-done; took != 2*time.Second {
			t.Errorf("released after %v, want 2s", took)
		}
	})
}

// roundTripper is an http.RoundTripper.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestReleaseErrors: nothing but 2xx is a release, and the error says whose it is and
// what was answered.
func TestReleaseErrors(t *testing.T) {
	b := newReleasingBackend(t)
	unreachable := newReleasingBackend(t)
	unreachable.Close()
	r, _ := startReleaser(t, b, unreachable)
	answer := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	for name, tt := range map[string]struct {
		backend int
		answer  http.HandlerFunc
		want    string // of the error, "" for none
	}{
		"200":          {0, answer(200, "done"), ""},
		"202":          {0, answer(202, ""), ""},
		"large answer": {0, answer(200, strings.Repeat("x", 1<<20)), ""},
		"404":          {0, answer(404, "no such page"), `404 Not Found: "no such page"`},
		"500":          {0, answer(500, "disk full\n"), `500 Internal Server Error: "disk full"`},
		"421":          {0, answer(421, "this is backend-7"), `421 Misdirected Request: "this is backend-7"`},
		"redirect":     {0, answer(307, ""), "307 Temporary Redirect"},
		"large error":  {0, answer(500, strings.Repeat("x", 1<<20)), strings.Repeat("x", 200) + `"`},
		"cut":          {0, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
		"nobody there": {1, nil, "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			b.setAnswer(tt.answer)
			left, err := r.release(t.Context(), tt.backend, []string{"ns-01"}, 1)
			if tt.want == "" {
				if left != nil || err != nil {
					t.Errorf("left %v, error %v", left, err)
				}
				return
			}
			start := fmt.Sprintf("backend-%d has not released 1 namespaces: POST /release: ", tt.backend)
			if err == nil || len(left) != 1 || !strings.HasPrefix(err.Error(), start) ||
				!strings.HasSuffix(err.Error(), tt.want) && !strings.Contains(err.Error(), tt.want+":") {
				t.Errorf("left %v, error %v; want %s%s", left, err, start, tt.want)
			}
		})
	}
}

// TestReleaseSilence: a backend that says nothing is given up after the timeout.
func TestReleaseSilence(t *testing.T) {
	b := newReleasingBackend(t)
	b.setAnswer(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	r, _ := startReleaser(t, b)
	r.timeout = 50 * time.Millisecond
	_, err := r.release(t.Context(), 0, []string{"ns-01"}, 1)
	if err == nil || !strings.HasSuffix(err.Error(), "no answer within 50ms") {
		t.Errorf("error %v, want no answer within 50ms", err)
	}
}

// TestReleaseKeptConnection: a kept connection that the backend has closed does not make
// a release fail, and one to a pod that was replaced is not used.
func TestReleaseKeptConnection(t *testing.T) {
	b := newReleasingBackend(t)
	r, _ := startReleaser(t, b)
	uid := "first"
	r.backends.podUID = func(int) string { return uid }
	mustRelease := func(conns int64) {
		t.Helper()
		if _, err := r.release(t.Context(), 0, []string{"ns-01"}, 1); err != nil {
			t.Error(err)
		}
		if got := b.conns.Load(); got != conns {
			t.Errorf("%d connections so far, want %d", got, conns)
		}
	}
	mustRelease(1)
	mustRelease(1)
	b.CloseClientConnections()
	mustRelease(2)
	uid = "second"
	mustRelease(3)
}

// TestReleaseGoesOn: a step waits for the backend that cannot release its namespaces, and
// says so; all others have theirs released meanwhile.
func TestReleaseGoesOn(t *testing.T) {
	good, bad := newReleasingBackend(t), newReleasingBackend(t)
	bad.setAnswer(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "disk full", 500) })
	r, log := startReleaser(t, good, bad)
	done := make(chan struct{})
	run := r.start(r.lifetime, 7, setOf(2, "ns-01", "ns-02"), func() { close(done) })
	eventually(t, "tries", true, func() bool { return len(bad.asked()) >= 3 })
	if run.isDone() || len(good.asked()) != 1 {
		t.Errorf("released: %v, and %d requests to the good backend; want false and 1",
			run.isDone(), len(good.asked()))
	}
	waits := r.waits()
	if wait := waits[1]; len(waits) != 1 || wait.namespaces != 2 ||
		!strings.Contains(fmt.Sprint(wait.err), "disk full") {
		t.Errorf("waits %v, want for two namespaces of backend 1: disk full", waits)
	}
	bad.answer.Store(nil)
	<-done
	if len(r.waits()) != 0 || !run.isDone() {
		t.Errorf("waits %v, released: %v", r.waits(), run.isDone())
	}
	if text := log.String(); strings.Count(text, "hand-off waits") != 1 ||
		!strings.Contains(text, "hand-off no longer waits") {
		t.Errorf("log:\n%s\nwant one line for each of the beginning and the end", text)
	}
}

// TestReleaseGoesOnWithTheRest: what was released is not asked for again.
func TestReleaseGoesOnWithTheRest(t *testing.T) {
	b := newReleasingBackend(t)
	b.setAnswer(func(w http.ResponseWriter, _ *http.Request) {
		if len(b.asked()) == 2 {
			http.Error(w, "not now", http.StatusServiceUnavailable)
		}
	})
	r, _ := startReleaser(t, b)
	done := make(chan struct{})
	r.start(r.lifetime, 7, setOf(1, makeNamespaces(maxReleaseBatch+1)...), func() { close(done) })
	<-done
	var sizes []int
	for _, request := range b.asked() {
		sizes = append(sizes, len(request.namespaces))
	}
	if want := []int{maxReleaseBatch, 1, 1}; !slices.Equal(sizes, want) {
		t.Errorf("requests with %v namespaces, want %v", sizes, want)
	}
}

// TestReleaseOfGonePod: what a pod that does not exist has had counts as released.
func TestReleaseOfGonePod(t *testing.T) {
	gone := newReleasingBackend(t)
	gone.Close()
	r, log := startReleaser(t, gone)
	var exists atomic.Bool
	exists.Store(true)
	r.backends.podIsGone = func(_ context.Context, ordinal int) (bool, error) { return ordinal == 0 && !exists.Load(), nil }
	done := make(chan struct{})
	r.start(r.lifetime, 1, setOf(1, "ns-01"), func() { close(done) })
	eventually(t, "waits", 1, func() int { return len(r.waits()) })
	exists.Store(false)
	<-done
	if !strings.Contains(log.String(), "backend is gone") {
		t.Errorf("log:\n%s", log)
	}
}

// TestReleaseOfPodThatMayNotBeRead: if the API server does not say whether the pod is gone, the wait
// goes on, and says that too.
func TestReleaseOfPodThatMayNotBeRead(t *testing.T) {
	gone := newReleasingBackend(t)
	gone.Close()
	r, log := startReleaser(t, gone)
	var readable atomic.Bool
	r.backends.podIsGone = func(context.Context, int) (bool, error) {
		if !readable.Load() {
			return false, errors.New("403 Forbidden: pods is forbidden")
		}
		return true, nil
	}
	done := make(chan struct{})
	r.start(r.lifetime, 1, setOf(1, "ns-01"), func() { close(done) })
	eventually(t, "the reason in the wait", true, func() bool {
		wait := r.waits()[0]
		return wait.err != nil && strings.Contains(wait.err.Error(), "pods is forbidden")
	})
	if !strings.Contains(log.String(), "pods is forbidden") {
		t.Errorf("log:\n%s", log)
	}
	readable.Store(true)
	<-done
}

// TestReleaseOfNothing is done at once.
func TestReleaseOfNothing(t *testing.T) {
	r, _ := startReleaserAt(t, "unused")
	if !r.start(r.lifetime, 1, releaseSet{}, func() { t.Error("onDone called") }).isDone() {
		t.Error("nothing to release, and not done")
	}
}

// TestReleaseEnds: a run ends with its context, or with close, and is not done then.
func TestReleaseEnds(t *testing.T) {
	b := newReleasingBackend(t)
	b.setAnswer(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	r, _ := startReleaser(t, b)
	ctx, cancel := context.WithCancel(r.lifetime)
	runs := []*releaseRun{
		r.start(ctx, 1, setOf(1, "ns-01"), func() { t.Error("onDone called") }),
		r.start(r.lifetime, 2, setOf(1, "ns-01"), func() { t.Error("onDone called") }),
	}
	eventually(t, "requests", 2, func() int { return len(b.asked()) })
	cancel()
	r.close()
	for i, run := range runs {
		if run.isDone() {
			t.Errorf("run %d is done", i)
		}
	}
}

// TestStepReleases: a step is done when the backends have released what the memory has of
// it. The next step begins anew, also if the one before is not done.
func TestStepReleases(t *testing.T) {
	b := newReleasingBackend(t)
	r, log := startReleaser(t, b, newReleasingBackend(t))
	s := newStepReleases(r, newReleaseMemory(time.Minute, r.log))
	done := newWakeup()
	isDone := func(step int64, backend int) bool {
		return s.releaseAll(step, func(_ string, of int) bool { return of == backend }, done.notify)
	}
	notAtOnce := func(step int64) { // the backend answers only when that was seen
		t.Helper()
		seen := make(chan struct{})
		b.setAnswer(func(http.ResponseWriter, *http.Request) { <-seen })
		if isDone(step, 0) {
			t.Errorf("step %d is done at once", step)
		}
		close(seen)
		<-done
	}
	s.memory.note("ns-01", 0)
	s.memory.note("ns-02", 1)
	s.startStep()
	notAtOnce(1)
	for range 2 { // once more changes nothing
		if !isDone(1, 0) || len(b.asked()) != 1 {
			t.Errorf("step 1 is not done after %d requests; log:\n%s", len(b.asked()), log)
		}
	}
	b.setAnswer(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "disk full", 500) })
	s.startStep()
	isDone(2, 0)
	eventually(t, "waits", 1, func() int { return len(r.waits()) })
	s.startStep()
	eventually(t, "waits after step 2 was given up", 0, func() int { return len(r.waits()) })
	notAtOnce(3)
	if !isDone(3, 0) {
		t.Error("step 3 is not done")
	}
	for _, request := range b.asked() {
		if fmt.Sprint(request.namespaces) != "[ns-01]" {
			t.Errorf("step %s: %v released, want ns-01", request.step, request.namespaces)
		}
	}
	var none *stepReleases
	if none.startStep(); !none.releaseAll(1, nil, nil) {
		t.Error("without -release, a step is not done")
	}
}

// A step that is done without this router, which the others have removed, ends here too: the memory
// may forget again.
func TestReleaseOfAStepThatIsDoneWithoutUs(t *testing.T) {
	r := lookupTable(t, 4, 10)
	m, now := restingMover(r), time.Now()
	memory := newReleaseMemory(time.Minute, slog.New(slog.DiscardHandler))
	m.releases = newStepReleases(nil, memory)
	other := newTable("backend", false, ordinalRange{count: 5}, nil, nil, r.table())
	v := m.current.Load()
	step := v.next(other, stepLimit{upto: allPlaces / 2}, now)
	m.adopt(v, step, now)
	wantEqual(t, "frozen in the step", memory.frozen, true)
	over := *step
	over.done = true
	m.adopt(step, &over, now)
	wantEqual(t, "frozen after it", memory.frozen, false)
}

// had returns what the memory has, as "backend/namespace", sorted.
func had(m *releaseMemory) string {
	var all []string
	for backend, namespaces := range m.namespaces(func(string, int) bool { return true }) {
		for namespace := range namespaces {
			all = append(all, fmt.Sprintf("%d/%s", backend, namespace))
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

// TestReleaseMemory: what was noted is there for a minute, and gone after two.
func TestReleaseMemory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		log, _ := newTextLog()
		m := newReleaseMemory(time.Minute, log)
		m.note("ns-01", 0)
		time.Sleep(59 * time.Second)
		m.note("ns-02", 0)
		m.note("ns-01", 1)
		time.Sleep(time.Second)
		for _, step := range []struct {
			wait time.Duration
			want string
		}{
			{0, "0/ns-01 0/ns-02 1/ns-01"},
			{59 * time.Second, "0/ns-01 0/ns-02 1/ns-01"}, // 119 s: the first may be gone
			{2 * time.Second, ""},                         // 121 s: it is, with all of its minute
		} {
			time.Sleep(step.wait)
			if got := had(m); got != step.want {
				t.Errorf("%v: %q, want %q", time.Now(), got, step.want)
			}
		}
		m.note("ns-01", 0)
		time.Sleep(5 * time.Minute)
		if got := had(m); got != "" {
			t.Errorf("after 5 minutes: %q", got)
		}
		m.note("ns-01", 0)
		m.note("ns-01", 1)
		set := m.namespaces(func(namespace string, backend int) bool { return backend == 1 })
		if fmt.Sprint(set) != "map[1:map[ns-01:{}]]" {
			t.Errorf("of backend 1: %v", set)
		}
	})
}

// TestReleaseMemoryKeepsAMinute notes a namespace at each second of some minutes. Each is
// there for a minute and gone after two, whenever somebody looks, and however rarely.
func TestReleaseMemoryKeepsAMinute(t *testing.T) {
	for _, pause := range []int{1, 7, 61, 119, 121, 300} {
		bubble(t, func(t *testing.T) {
			log, _ := newTextLog()
			m := newReleaseMemory(time.Minute, log)
			noted := map[int]string{}
			for second := range 600 {
				noted[second] = fmt.Sprintf("0/%d", second)
				if second%pause == 0 {
					m.note(fmt.Sprint(second), 0)
					checkMemory(t, m, second, pause)
				}
				time.Sleep(time.Second)
			}
		})
	}
}

// checkMemory fails the test if the memory has something that is too old, or lacks what is
// not, when a namespace was noted at each second that pause divides.
func checkMemory(t *testing.T, m *releaseMemory, now, pause int) {
	t.Helper()
	has := map[string]bool{}
	for _, key := range strings.Fields(had(m)) {
		has[key] = true
	}
	for second := 0; second <= now; second += pause {
		age, key := now-second, fmt.Sprintf("0/%d", second)
		if age <= 60 && !has[key] || age > 120 && has[key] {
			t.Errorf("after %d s it has a namespace noted at %d s: %v", now, second, has[key])
		}
	}
}

// TestReleaseMemoryHolds: nothing is forgotten during a step, however long it takes. After
// it, what was noted in it is there for a minute.
func TestReleaseMemoryHolds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		log, _ := newTextLog()
		m := newReleaseMemory(time.Minute, log)
		m.note("before", 0)
		time.Sleep(59 * time.Second)
		m.freeze()
		for range 5 {
			time.Sleep(time.Minute)
			m.note("during", 0)
		}
		if got := had(m); got != "0/before 0/during" {
			t.Errorf("during the step: %q", got)
		}
		m.unfreeze()
		m.unfreeze()
		time.Sleep(59 * time.Second)
		if got := had(m); !strings.Contains(got, "0/during") {
			t.Errorf("59 s after the step: %q", got)
		}
		time.Sleep(62 * time.Second)
		if got := had(m); got != "" {
			t.Errorf("121 s after the step: %q", got)
		}
	})
}

// TestReleaseMemoryHoldsShortly: a short step costs nothing of the minute.
func TestReleaseMemoryHoldsShortly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		log, _ := newTextLog()
		m := newReleaseMemory(time.Minute, log)
		time.Sleep(59 * time.Second)
		m.note("ns-01", 0)
		time.Sleep(2 * time.Second)
		m.note("ns-02", 0) // ns-01 is in the older half
		for range 57 {
			m.freeze()
			time.Sleep(time.Second)
			m.unfreeze()
		}
		if got := had(m); got != "0/ns-01 0/ns-02" {
			t.Errorf("after 57 steps, and 59 s: %q", got)
		}
	})
}

// TestReleaseMemoryIsBounded: of too many namespaces the newest stay, and the log says so.
func TestReleaseMemoryIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		log, logged := newTextLog()
		m := newReleaseMemory(time.Minute, log)
		m.max = 10
		for _, namespace := range makeNamespaces(25) {
			m.note(namespace, 0)
			m.note(namespace, 0)
		}
		got := strings.Fields(had(m))
		if len(got) != 15 || !slices.Contains(got, "0/ns-10") || !slices.Contains(got, "0/ns-24") {
			t.Errorf("%d namespaces: %v; want the last 15", len(got), got)
		}
		if log := logged.String(); strings.Count(log, "too many namespaces") != 1 || !strings.Contains(log, "namespaces=10") {
			t.Errorf("log:\n%s\nwant one line: the first 10 are forgotten, and nothing else was", log)
		}
	})
}

// TestReleaseMemoryCountsOnce: a namespace that is noted in each step counts once, and does not
// make the memory forget others.
func TestReleaseMemoryCountsOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		log, logged := newTextLog()
		m := newReleaseMemory(time.Hour, log)
		m.max = 10
		m.note("quiet", 0)
		for range 100 {
			m.freeze()
			for _, namespace := range makeNamespaces(3) {
				m.note(namespace, 0)
			}
			if got := had(m); got != "0/ns-0 0/ns-1 0/ns-2 0/quiet" {
				t.Fatalf("it has %s", got)
			}
			m.unfreeze()
			time.Sleep(100 * time.Millisecond)
		}
		wantEqual(t, "the log", logged.String(), "")
	})
}

// startReleasingProxy starts a proxy to the two backends, which asks them for releases.
// ns-01 and ns-02 are with backend 0.
func startReleasingProxy(t *testing.T, hold time.Duration) (p *testProxy, old, next *releasingBackend) {
	old, next = newReleasingBackend(t), newReleasingBackend(t)
	addrs := []string{old.Listener.Addr().String(), next.Listener.Addr().String()}
	data := map[string]string{"ns-01": "backend-0", "ns-02": "backend-0"}
	p = startProxy(t, addrs, data, func(p *proxy) {
		p.limits.holdTimeout = hold
		followReleases(&config{release: "/release", releaseRetention: time.Minute}, p.mover, p.backends)
	})
	return p, old, next
}

// TestHandoffWaitsForRelease: the next owner gets no upgrade before the old one has stored
// the state, of the namespaces that the router has, and of those that it had.
func TestHandoffWaitsForRelease(t *testing.T) {
	p, old, next := startReleasingProxy(t, patience)
	flushed := make(chan struct{})
	old.setAnswer(func(http.ResponseWriter, *http.Request) { <-flushed })
	gone := p.open(t, "ns-02")
	gone.Close()
	p.waitSessions(t, 0)
	p.open(t, "ns-01")
	p.override("42", map[string]string{"ns-01": "backend-1", "ns-02": "backend-1", "other": "backend-1"})
	eventually(t, "requests", 1, func() int { return len(old.asked()) })
	if got := fmt.Sprint(old.asked()[0].namespaces); got != "[ns-01 ns-02]" {
		t.Errorf("%s were asked for, want [ns-01 ns-02]", got)
	}
	held := []net.Conn{p.send(t, "ns-01"), p.send(t, "ns-02")}
	p.waitPending(t, 2)
	if n := next.upgrades.Load(); n != 0 {
		t.Errorf("the next owner has %d upgrades before the release", n)
	}
	close(flushed)
	for _, conn := range held {
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 101 {
			t.Errorf("a client that waited got %v, %v", resp, err)
		}
	}
	if asked := len(next.asked()); asked != 0 {
		t.Errorf("the next owner was asked for %d releases", asked)
	}
}

// TestHandoffWithoutRelease: a backend that cannot store keeps its namespaces, and the
// router says so. Their clients get 503, those of others are served.
func TestHandoffWithoutRelease(t *testing.T) {
	p, old, next := startReleasingProxy(t, 2*time.Second) // also of who is served, on a busy machine
	old.setAnswer(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "disk full", 500) })
	p.open(t, "ns-01")
	p.override("42", map[string]string{"ns-01": "backend-1", "other": "backend-1"})
	eventually(t, "requests", true, func() bool { return len(old.asked()) >= 2 })
	resp, err := http.ReadResponse(bufio.NewReader(p.send(t, "ns-01")), nil)
	if err != nil || resp.StatusCode != 503 || next.upgrades.Load() != 0 {
		t.Errorf("a client got %v, %v, and the next owner %d upgrades; want 503 and none",
			resp, err, next.upgrades.Load())
	}
	p.open(t, "other-02") // by its hash
	waits := p.mover.status().WaitingFor
	if len(waits) != 1 || waits[0].Backend != "backend-0" || waits[0].Releases != 1 ||
		!strings.Contains(waits[0].Error, "disk full") {
		t.Errorf("status: waits for %+v, want backend-0 with one release: disk full", waits)
	}
	lines := p.tail.all("backend has not released its namespaces; hand-off waits")
	wantLine(t, lines, 1, map[string]any{"level": "WARN", "backend": "backend-0"})
}
