package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/url"
	"reflect"
	"strconv"
	"sync"
	"time"
)

const (
	listTimeout  = 15 * time.Second  // bounds a LIST
	minWatchTime = 150 * time.Second // timeoutSeconds of a WATCH is between these:
	maxWatchTime = 210 * time.Second // below the idle limits of load balancers (Azure has 240 s: Azure/kars#456)
	watchGrace   = 15 * time.Second  // a WATCH that outlives its timeout by this is dead (python#1148)
	healthyWatch = 10 * time.Second  // a WATCH that lived this long was worth its LIST

	stateListing, stateConnecting, stateWatching, stateWaiting = "listing", "connecting", "watching", "waiting"
)

// watcher follows an object or a collection of the API server. Each cycle is a
// LIST, which tells what is so now, and a WATCH from the LIST's
// resourceVersion, which tells what comes after; whatever ends it, the next
// cycle starts from a LIST. Nothing is ever resumed: for so few objects a LIST
// every three minutes costs less than 410 loops (kubernetes-client/java#1533),
// resourceVersions from the future after a restored etcd (kubernetes#107457),
// and events that were lost on the way (kubernetes#123072).
//
//	LISTING ──ok──> CONNECTING ──200──> WATCHING ──event──> WATCHING
//	   ^ any error       │ any error        │ end of stream, ERROR, anything unexpected
//	   └──── WAITING <───┴──────────────────┘
//
// No error is final and none changes the set: an API server that is starting
// answers 403 to those who may (kubernetes#126038), and one that is gone comes
// back.
type watcher[T any] struct {
	// Static after construction.
	kube           *kubeClient
	path           string // of the collection: "/apis/apps/v1/namespaces/edge/statefulsets"
	kind           string // "StatefulSet"
	namespace      string // Kubernetes namespace
	name, selector string // of one object, or of labels: one of them
	meta           func(*T) *apiObject
	apply          func(set map[string]*T) // called by run only, must not change set; quick, or events are lost
	onFailure      func()                  // called by run after a cycle that failed; nil for nobody; must not block
	log            *slog.Logger

	// Owned by run.
	objects         map[string]*T // by name; nil before the first LIST
	changes         int           // how often it has changed
	failureThrottle throttle      // of failures in the log

	mu     sync.Mutex
	status watchStatus // guarded by mu; written by run and worthwhile
}

// watchStatus is what others may know of a watcher.
type watchStatus struct {
	state     string
	protocol  string    // of the last answer
	confirmed time.Time // when the API server last said how things are; zero if never
	failures  int       // cycles in a row that were not healthy
	healthy   bool      // the cycle was worth its LIST
	failure   error     // the last one, nil since a healthy cycle
	failing   bool      // a cycle failed, and nothing was confirmed since
}

// confirm takes note that the API server has said how things are.
func (s *watchStatus) confirm() { s.confirmed, s.failing = time.Now(), false }

// run cycles until ctx ends, and leaves no connection.
func (w *watcher[T]) run(ctx context.Context) {
	for {
		err := w.listAndWatch(ctx)
		if ctx.Err() != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(w.finishCycle(err)):
		}
	}
}

// String names the object or the selection for people.
func (w *watcher[T]) String() string { return w.kind + " " + w.namespace + "/" + w.name + w.selector }

// listAndWatch lists and watches once. Without an error the stream ended cleanly, which
// does not mean that nothing was missed; that makes the cycle healthy if the
// stream brought something, as does a life of healthyWatch. timeoutSeconds is
// the server's; the context is for a server, or a network, that no longer keeps
// it. The headers may take as long: some proxies hold them back until the first
// event (kubectl#628).
func (w *watcher[T]) listAndWatch(ctx context.Context) error {
	version, err := w.list(ctx)
	if err != nil {
		return err
	}
	w.setState(stateConnecting)
	timeout := minWatchTime + rand.N(maxWatchTime-minWatchTime)
	ctx, cancel := context.WithTimeout(ctx, timeout+watchGrace)
	defer cancel()
	body, err := w.get(ctx, url.Values{"watch": {"1"}, "resourceVersion": {version},
		"timeoutSeconds": {strconv.Itoa(int(timeout.Seconds()))}, "allowWatchBookmarks": {"true"}})
	if err != nil {
		return err
	}
	defer body.Close()
	w.setState(stateWatching)
	defer time.AfterFunc(healthyWatch, w.markHealthy).Stop()
	before := w.changes
	if err := w.readEvents(body); err != io.EOF {
		return cmp.Or(ctx.Err(), err)
	}
	if w.changes > before {
		w.markHealthy()
	}
	return nil
}

// get asks for the target. Only with this fieldSelector does a Role that names
// the object allow list and watch
// (https://kubernetes.io/docs/reference/access-authn-authz/rbac/#referring-to-resources).
func (w *watcher[T]) get(ctx context.Context, query url.Values) (io.ReadCloser, error) {
	if w.name != "" {
		query.Set("fieldSelector", "metadata.name="+w.name)
	} else {
		query.Set("labelSelector", w.selector)
	}
	return w.kube.do(ctx, w.path, query, nil)
}

// list asks without a resourceVersion, which is the consistent read
// (kubernetes#83520), makes what there is the set, and returns the
// resourceVersion to watch from. The answer must be a whole list: one that means
// nothing, such as {}, must not read as "there is none" (ingress-nginx#3043).
func (w *watcher[T]) list(ctx context.Context) (version string, err error) {
	w.setState(stateListing)
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	body, err := w.get(ctx, url.Values{})
	if err != nil {
		return "", err
	}
	defer body.Close()
	list, items, err := decodeList[T](body, maxList)
	if err != nil {
		return "", cmp.Or(ctx.Err(), err)
	}
	if list.Kind != w.kind+"List" || list.Metadata.ResourceVersion == "" || list.Metadata.Continue != "" {
		return "", fmt.Errorf("%w: kind %.60q, resourceVersion %.60q, continue %.60q, want a whole %sList",
			errBadResponse, list.Kind, list.Metadata.ResourceVersion, list.Metadata.Continue, w.kind)
	}
	set := map[string]*T{}
	for _, o := range items {
		w.meta(o).Kind = w.kind // items of a list have none
		if err := w.verify(o); err != nil {
			return "", err
		}
		set[w.meta(o).Metadata.Name] = o
	}
	if len(set) != len(items) {
		return "", fmt.Errorf("%w: %d items of %d names", errBadResponse, len(items), len(set))
	}
	w.setObjects(set)
	return list.Metadata.ResourceVersion, nil
}

// readEvents applies the events of a stream until its end, which is io.EOF if it is
// clean, and not if it was cut within an event. One decoder reads all of it:
// events come in pieces and several at a time (python#1325).
func (w *watcher[T]) readEvents(body io.Reader) error {
	capped := &cappedReader{r: body, limit: maxObject}
	d := json.NewDecoder(capped)
	for {
		if err := w.applyEvent(d); err != nil {
			return err
		}
		capped.limit = d.InputOffset() + maxObject
	}
}

// applyEvent applies one event. ADDED and MODIFIED mean the same. DELETED may mean that
// the object has left the selection only (python#2228).
func (w *watcher[T]) applyEvent(d *json.Decoder) error {
	event, o, err := decodeEvent[T](d)
	if err != nil {
		return err
	}
	if event == "BOOKMARK" {
		w.updateStatus((*watchStatus).confirm)
		return nil
	}
	if err := w.verify(o); err != nil {
		return err
	}
	set := maps.Clone(w.objects)
	set[w.meta(o).Metadata.Name] = o
	if event == "DELETED" {
		delete(set, w.meta(o).Metadata.Name)
	}
	w.setObjects(set)
	return nil
}

// verify checks that o is an object that was asked for.
func (w *watcher[T]) verify(o *T) error {
	kind, m := w.meta(o).Kind, w.meta(o).Metadata
	named := m.Namespace == w.namespace && m.Name != "" && (m.Name == w.name || w.name == "")
	if kind != w.kind || !named || m.UID == "" || m.ResourceVersion == "" {
		return fmt.Errorf("%w: %.60q %.260q/%.260q with uid %.60q and resourceVersion %.60q, want %s with both",
			errBadResponse, kind, m.Namespace, m.Name, m.UID, m.ResourceVersion, w.String())
	}
	return nil
}

// setObjects makes what is there now the set, and applies it if it is new.
// The content is compared too: after a restored etcd a smaller resourceVersion may be
// newer, and the same one may be of another content, which a router that starts has.
func (w *watcher[T]) setObjects(now map[string]*T) {
	w.updateStatus((*watchStatus).confirm)
	for name, old := range w.objects {
		if o := now[name]; o != nil && reflect.DeepEqual(o, old) {
			now[name] = old
		}
	}
	if w.objects == nil || !maps.Equal(now, w.objects) {
		w.objects = now
		w.changes++
		w.apply(now)
	}
}

// markHealthy notes that the cycle is healthy: it was worth its LIST. Nothing
// less ends a row of failures. A load balancer that cuts every stream after
// seconds makes this polling with a growing pause, not a hot loop
// (kubespray#655), and a server that allows the LIST only does not fill the log.
func (w *watcher[T]) markHealthy() {
	w.updateStatus(func(s *watchStatus) {
		if s.failure != nil {
			w.log.Info("watch works again", "object", w.String(), "fails", s.failures)
		}
		s.healthy, s.failures, s.failure = true, 0, nil
	})
}

// finishCycle takes note of how a cycle ended, and returns how long to wait. A
// failure is logged if it is of another class than the last, or after a minute.
func (w *watcher[T]) finishCycle(err error) time.Duration {
	before, every := w.snapshot(), time.Minute
	w.setState(stateWaiting)
	w.updateStatus(func(s *watchStatus) {
		if !s.healthy {
			s.failures++
		}
		s.healthy, s.failure, s.failing = false, cmp.Or(err, s.failure), s.failing || err != nil
	})
	if err != nil && w.onFailure != nil {
		w.onFailure()
	}
	if err != nil {
		if errorClass(err) != errorClass(before.failure) {
			every = 0
		}
		if omitted, ok := w.failureThrottle.allow(every); ok {
			w.log.Warn("watch failed, what was applied stays in force", "object", w.String(), "state", before.state,
				"class", errorClass(err), "error", err.Error(), "fails", before.failures+1, "omitted", omitted)
		}
	}
	return backoff(w.snapshot().failures, retryAfter(err), rand.Float64())
}

// setState changes the state.
func (w *watcher[T]) setState(state string) {
	w.updateStatus(func(s *watchStatus) { s.state, s.protocol = state, w.kube.protocol })
	w.log.Debug("watch", "object", w.String(), "state", state)
}

func (w *watcher[T]) updateStatus(f func(*watchStatus)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(&w.status)
}

// snapshot returns the status.
func (w *watcher[T]) snapshot() (s watchStatus) {
	w.updateStatus(func(status *watchStatus) { s = *status })
	return s
}

// objectWatcher is a watcher of any kind of object.
type objectWatcher interface {
	String() string
	snapshot() watchStatus
}

// writeWatchMetrics writes the state of the watchers.
func writeWatchMetrics(m metricsWriter, watchers []objectWatcher) {
	gauge := func(name, help string, write func(object string, s watchStatus)) {
		m.family(name, "gauge", help)
		for _, w := range watchers {
			write(w.String(), w.snapshot())
		}
	}
	gauge("router_watch_state", "1 for the state that the watch is in.", func(object string, s watchStatus) {
		for _, state := range []string{stateListing, stateConnecting, stateWatching, stateWaiting} {
			m.sample("router_watch_state", boolToFloat(s.state == state), "object", object, "state", state)
		}
	})
	gauge("router_watch_staleness_seconds", "Time since the API server last said how things are, +Inf if it never did.",
		func(object string, s watchStatus) {
			age := math.Inf(1)
			if !s.confirmed.IsZero() {
				age = time.Since(s.confirmed).Seconds()
			}
			m.sample("router_watch_staleness_seconds", age, "object", object)
		})
	gauge("router_watch_failures_in_row", "LIST and WATCH cycles that failed since the last good one.",
		func(object string, s watchStatus) {
			m.sample("router_watch_failures_in_row", float64(s.failures), "object", object)
		})
	gauge("router_watch_last_error", "Always 1; the label says what failed since the last good cycle.",
		func(object string, s watchStatus) {
			m.sample("router_watch_last_error", 1, "object", object, "class", errorClass(s.failure))
		})
	gauge("router_watch_info", "Always 1; the label says what the API server last answered with.",
		func(object string, s watchStatus) {
			m.sample("router_watch_info", 1, "object", object, "protocol", s.protocol)
		})
}

// What the API server says is read from a stream: an object at a
// time, each of a bounded size, and decoded once.

// cappedReader fails once limit bytes were read. Its reader moves the limit on
// with each object, so that it bounds one object and not the stream.
type cappedReader struct {
	r           io.Reader
	read, limit int64
}

func (c *cappedReader) Read(b []byte) (int, error) {
	if c.read >= c.limit {
		return 0, errTooBig
	}
	n, err := c.r.Read(b[:min(int64(len(b)), c.limit-c.read)])
	c.read += int64(n)
	return n, err
}

// decodeList reads a list to its end, of at most most bytes, one item after the
// other: thirty of 1 MiB each would take 100 MiB as one text.
func decodeList[T any](body io.Reader, maxBytes int64) (list apiObject, items []*T, err error) {
	capped := &cappedReader{r: body, limit: maxObject}
	d := json.NewDecoder(capped)
	err = decodeElements(d, '{', func() (err error) {
		key, err := d.Token()
		switch key {
		case "kind":
			return d.Decode(&list.Kind)
		case "metadata":
			return d.Decode(&list.Metadata)
		case "items":
			return decodeElements(d, '[', func() error {
				items = append(items, new(T))
				capped.limit = min(d.InputOffset()+maxObject, maxBytes)
				return d.Decode(items[len(items)-1])
			})
		}
		return cmp.Or(err, d.Decode(new(json.RawMessage)))
	})
	if _, end := d.Token(); err == nil && end != io.EOF {
		err = fmt.Errorf("%w: more than a list", errBadResponse)
	}
	return list, items, err
}

// decodeEvent reads one event of a watch, whose type comes first and says as what
// the object is decoded: at once, since to find its end and then decode it takes
// twice as long. An ERROR is an error, also the 410 of a watch, which is an event in
// a 200 (kubernetes#35068). io.EOF is the end of the stream before an event.
func decodeEvent[T any](d *json.Decoder) (event string, o *T, err error) {
	o = new(T)
	statusErr := &statusError{}
	as := map[string]any{"ADDED": o, "MODIFIED": o, "DELETED": o, "ERROR": statusErr, "BOOKMARK": new(json.RawMessage)}
	err = decodeElements(d, '{', func() error {
		key, err := d.Token()
		switch to := as[event]; {
		case key == "type":
			return d.Decode(&event)
		case key == "object" && to != nil:
			return d.Decode(to)
		}
		return cmp.Or(err, d.Decode(new(json.RawMessage)))
	})
	switch {
	case err != nil:
		return event, nil, err
	case event == "ERROR":
		return event, nil, statusErr
	case as[event] == nil: // passed over, it would be lost for good (vector#5846)
		return event, nil, fmt.Errorf("%w: event of type %.60q", errBadResponse, event)
	}
	return event, o, nil
}

// decodeElements calls each for the elements of a JSON array or the members of an
// object. null has none. io.EOF is an end before it only.
func decodeElements(d *json.Decoder, open json.Delim, each func() error) error {
	begin, err := d.Token()
	if err != nil || begin == nil {
		return err
	}
	if begin != open {
		return fmt.Errorf("%w: %v, want %v", errBadResponse, begin, open)
	}
	for err == nil && d.More() {
		err = each()
	}
	if err == nil {
		_, err = d.Token()
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}
