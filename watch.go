package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"sync"
	"time"
)

const (
	// listTimeout bounds a LIST.
	listTimeout = 15 * time.Second
	// The timeoutSeconds of a WATCH is between these two. They are below the idle
	// timeouts of load balancers (Azure has 240 s: Azure/kars#456).
	minWatchTime = 150 * time.Second
	maxWatchTime = 210 * time.Second
	// A WATCH that outlives its timeoutSeconds by watchGrace is dead (python#1148).
	watchGrace = 15 * time.Second
	// A WATCH that lived for healthyWatch makes its cycle healthy.
	healthyWatch = 10 * time.Second
)

// The states of a watcher.
const (
	watchListing    = "listing"
	watchConnecting = "connecting"
	watchWatching   = "watching"
	watchBackoff    = "backoff"
)

// watcher follows one object, or a set of objects, of the API server. It repeats a
// cycle: a LIST returns the objects as they are now, and a WATCH from the LIST's
// resourceVersion returns each change after that. Whatever ends the WATCH, the next
// cycle starts with a LIST. The watcher never resumes a WATCH. For so few objects a LIST
// every three minutes is cheaper than what a resume can do: loop on 410
// (kubernetes-client/java#1533), wait for a resourceVersion from the future after etcd
// was restored (kubernetes#107457), and miss events that were lost (kubernetes#123072).
//
//	LISTING ──ok──> CONNECTING ──200──> WATCHING ──event──> WATCHING
//	   ^ any error       │ any error        │ end of stream, ERROR, anything unexpected
//	   └──── BACKOFF <───┴──────────────────┘
//
// No error is final, and no error changes the objects. An API server that is starting
// answers 403 to clients that have the permission (kubernetes#126038), and an API server
// that is down comes back.
type watcher[T any] struct {
	// Static after construction.
	kube          *kubeClient
	path          string // of the collection: "/apis/apps/v1/namespaces/edge/statefulsets"
	kind          string // "StatefulSet"
	kubeNamespace string // Kubernetes namespace
	name          string // of the one object to follow; "" if selector is set
	selector      string // a label selector; "" if name is set
	meta          func(*T) *apiObject
	// run calls apply with the objects, by name, after each change of them. apply must
	// not change the map, and must be quick: the API server drops a WATCH whose reader is
	// slow.
	apply func(objects map[string]*T)
	// run calls onFailure after each cycle that failed. It must not block. nil for none.
	onFailure func()
	noPause   bool // the cycle after a healthy one begins at once
	log       *slog.Logger

	relistWanted wakeup // of run, by relist

	// Owned by run.
	objects         map[string]*T // by name; nil before the first LIST
	changes         int           // of objects
	failureThrottle throttle      // of failures in the log

	mu      sync.Mutex
	status  watchStatus     // guarded by mu; written by run and by markHealthy
	relists []chan struct{} // that relist returned and that are open; guarded by mu
}

// watchStatus is the status of a watcher, for /readyz, the log and the metrics.
type watchStatus struct {
	state       string
	protocol    string    // of the last response: "HTTP/1.1" or "HTTP/2.0"
	confirmed   time.Time // of the last LIST, event or bookmark; zero before the first
	failures    int       // cycles in a row that were not healthy
	healthy     bool      // the current cycle is healthy: see markHealthy
	failure     error     // of the last cycle that failed; nil since a healthy cycle
	unconfirmed bool      // a cycle failed, and there was no LIST, event or bookmark since
	// failureCounts has the cycles that failed since the start, by errorClass.
	failureCounts map[string]int
}

// confirm notes a LIST, an event or a bookmark: what is known is up to date.
func (s *watchStatus) confirm() { s.confirmed, s.unconfirmed = time.Now(), false }

// countFailure counts a cycle that failed with an error of the class.
func (s *watchStatus) countFailure(class string) {
	if s.failureCounts == nil {
		s.failureCounts = map[string]int{}
	}
	s.failureCounts[class]++
}

// run repeats the cycle until ctx ends. When it returns, no connection is open.
func (w *watcher[T]) run(ctx context.Context) {
	for {
		err := w.listAndWatch(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == errRelist {
			continue
		}
		if sleep(ctx, w.finishCycle(err)) != nil {
			return
		}
	}
}

// errRelist says that relist has ended the WATCH.
var errRelist = errors.New("the objects are to be listed again")

// relist begins a new cycle at once, or after the BACKOFF that the watcher is in. It
// returns a channel that is closed when a LIST that began after the call was applied. The
// caller need not receive from it. relist does not block, and any goroutine may call it.
func (w *watcher[T]) relist() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.relistWanted.notify()
	if n := len(w.relists); n > 0 { // no LIST has begun since
		return w.relists[n-1]
	}
	done := make(chan struct{})
	w.relists = append(w.relists, done)
	return done
}

// String names the object or the selector, for people.
func (w *watcher[T]) String() string {
	return w.kind + " " + w.kubeNamespace + "/" + w.name + w.selector
}

// whyNotListed says, before the first LIST, why the objects are not known.
func (w *watcher[T]) whyNotListed() string {
	if failure := w.snapshot().failure; failure != nil {
		return w.String() + ": " + failure.Error()
	}
	return w.String() + ": no answer from the API server yet"
}

// listAndWatch is one cycle, without its BACKOFF. It returns nil if the WATCH ended
// cleanly, which does not mean that no event was lost.
//
// The API server ends a WATCH after timeoutSeconds. The deadline of the context is for a
// server or a network that does not. It bounds the wait for the response's headers too:
// some proxies hold them back until the first event (kubectl#628).
func (w *watcher[T]) listAndWatch(ctx context.Context) error {
	w.updateStatus(func(s *watchStatus) { s.healthy = false })
	version, err := w.list(ctx)
	if err != nil {
		return err
	}
	timeout := minWatchTime + rand.N(maxWatchTime-minWatchTime)
	ctx, cancel := context.WithTimeout(ctx, timeout+watchGrace)
	wanted := false
	var relist sync.WaitGroup
	relist.Go(func() {
		select {
		case <-w.relistWanted:
			wanted = true
			cancel()
		case <-ctx.Done():
		}
	})
	err = w.watch(ctx, version, timeout)
	cancel()
	if relist.Wait(); wanted {
		return errRelist
	}
	return err
}

// list is LISTING. It makes the objects that there are the watcher's objects, and returns
// the resourceVersion to watch from. It sends no resourceVersion, which asks for a
// consistent read (kubernetes#83520). The response must be a whole list: a response
// without a meaning, such as {}, must not be read as "there are no objects"
// (ingress-nginx#3043).
func (w *watcher[T]) list(ctx context.Context) (version string, err error) {
	w.setState(watchListing)
	asked := w.takeRelists()
	defer func() { w.endRelists(asked, err) }()
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
	m := list.Metadata
	if list.Kind != w.kind+"List" || m.ResourceVersion == "" || m.Continue != "" {
		return "", fmt.Errorf("%w: kind %.60q, resourceVersion %.60q, continue %.60q, "+
			"expected a whole %sList",
			errBadResponse, list.Kind, m.ResourceVersion, m.Continue, w.kind)
	}
	objects := map[string]*T{}
	for _, o := range items {
		w.meta(o).Kind = w.kind // the items of a list have no kind
		if err := w.verify(o); err != nil {
			return "", err
		}
		objects[w.meta(o).Metadata.Name] = o
	}
	if len(objects) != len(items) {
		return "", fmt.Errorf("%w: %d items of %d names",
			errBadResponse, len(items), len(objects))
	}
	w.setObjects(objects)
	return m.ResourceVersion, nil
}

// takeRelists returns the channels of all calls of relist so far.
func (w *watcher[T]) takeRelists() []chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.relistWanted:
	default:
	}
	asked := w.relists
	w.relists = nil
	return asked
}

// endRelists closes the channels if the LIST was applied (err is nil), and else leaves
// them to the next LIST.
func (w *watcher[T]) endRelists(asked []chan struct{}, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		w.relists = append(asked, w.relists...)
		return
	}
	for _, done := range asked {
		close(done)
	}
}

// watch is CONNECTING and WATCHING. It applies the events of a WATCH, which begins after the
// resourceVersion version, until that ends, and returns nil if it ended cleanly. The cycle is
// healthy if the stream lived for healthyWatch, or brought a change and ended cleanly.
func (w *watcher[T]) watch(ctx context.Context, version string, timeout time.Duration) error {
	w.setState(watchConnecting)
	stream, err := w.get(ctx, url.Values{
		"watch":               {"1"},
		"resourceVersion":     {version},
		"timeoutSeconds":      {strconv.Itoa(int(timeout.Seconds()))},
		"allowWatchBookmarks": {"true"},
	})
	if err != nil {
		return err
	}
	defer stream.Close()
	w.setState(watchWatching)
	defer time.AfterFunc(healthyWatch, w.markHealthy).Stop()
	before := w.changes
	if err := w.readEvents(stream); err != io.EOF {
		return cmp.Or(ctx.Err(), err)
	}
	if w.changes > before {
		w.markHealthy()
	}
	return nil
}

// get sends a GET for the object or the selector, and returns the body of the response.
// The caller closes it. A Role that names the object in resourceNames allows list and
// watch only with this fieldSelector
// (https://kubernetes.io/docs/reference/access-authn-authz/rbac/#referring-to-resources).
func (w *watcher[T]) get(ctx context.Context, query url.Values) (io.ReadCloser, error) {
	if w.name != "" {
		query.Set("fieldSelector", "metadata.name="+w.name)
	} else {
		query.Set("labelSelector", w.selector)
	}
	return w.kube.do(ctx, w.path, query, nil)
}

// readEvents applies the events of a stream until it ends. It returns io.EOF for a clean
// end, and another error for an end within an event. One decoder reads the whole stream:
// a read may return a part of an event, or several events (python#1325).
func (w *watcher[T]) readEvents(stream io.Reader) error {
	capped := &cappedReader{r: stream, limit: maxObject}
	d := json.NewDecoder(capped)
	for {
		if err := w.applyEvent(d); err != nil {
			return err
		}
		capped.limit = d.InputOffset() + maxObject
	}
}

// applyEvent reads and applies one event. ADDED and MODIFIED mean the same: this is the
// object now. DELETED also means that the object exists but no longer matches the
// selector (python#2228).
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
	objects := maps.Clone(w.objects)
	objects[w.meta(o).Metadata.Name] = o
	if event == "DELETED" {
		delete(objects, w.meta(o).Metadata.Name)
	}
	w.setObjects(objects)
	return nil
}

// verify returns an error if o is not an object that the watcher follows.
func (w *watcher[T]) verify(o *T) error {
	kind, m := w.meta(o).Kind, w.meta(o).Metadata
	named := m.Namespace == w.kubeNamespace && m.Name != "" && (m.Name == w.name || w.name == "")
	if kind != w.kind || !named || m.UID == "" || m.ResourceVersion == "" {
		return fmt.Errorf("%w: %.60q %.260q/%.260q with uid %.60q and resourceVersion %.60q, "+
			"expected %s with both",
			errBadResponse, kind, m.Namespace, m.Name, m.UID, m.ResourceVersion, w.String())
	}
	return nil
}

// setObjects replaces the objects, and calls apply if any of them changed. It compares
// the contents too, not only the resourceVersions. After etcd was restored, a smaller
// resourceVersion may be newer, and the same resourceVersion may be of another content,
// which a router that starts then would have.
func (w *watcher[T]) setObjects(objects map[string]*T) {
	w.updateStatus((*watchStatus).confirm)
	for name, old := range w.objects {
		if o := objects[name]; o != nil && reflect.DeepEqual(o, old) {
			objects[name] = old
		}
	}
	if w.objects == nil || !maps.Equal(objects, w.objects) {
		w.objects = objects
		w.changes++
		w.apply(objects)
	}
}

// markHealthy makes the cycle a healthy one, which ends the row of failures. A response
// of 200 alone does not. So a load balancer that cuts every stream after seconds makes
// the watcher poll with growing waits and not in a hot loop (kubespray#655), and a server
// that allows only the LIST does not fill the log.
func (w *watcher[T]) markHealthy() {
	w.updateStatus(func(s *watchStatus) {
		if s.failure != nil {
			w.log.Info("watch recovered", "object", w.String(), "failures", s.failures)
		}
		s.healthy, s.failures, s.failure = true, 0, nil
	})
}

// finishCycle is the beginning of BACKOFF. It notes how the cycle ended, and returns how
// long to wait before the next one. It logs a failure if its class is not that of the
// failure before, and else once a minute.
func (w *watcher[T]) finishCycle(err error) time.Duration {
	before, every := w.snapshot(), time.Minute
	w.setState(watchBackoff)
	w.updateStatus(func(s *watchStatus) {
		if !s.healthy {
			s.failures++
		}
		if err != nil {
			s.countFailure(errorClass(err))
		}
		s.failure, s.unconfirmed = cmp.Or(err, s.failure), s.unconfirmed || err != nil
	})
	if err != nil {
		if w.onFailure != nil {
			w.onFailure()
		}
		if errorClass(err) != errorClass(before.failure) {
			every = 0
		}
		if omitted, ok := w.failureThrottle.allow(every); ok {
			w.log.Warn("watch failed; keeping the last state",
				"object", w.String(), "state", before.state, "class", errorClass(err),
				"error", err.Error(), "failures", before.failures+1, "omitted", omitted)
		}
	}
	if w.noPause && err == nil && before.healthy {
		return 0
	}
	return retryDelay(w.snapshot().failures, retryAfter(err), rand.Float64())
}

// setState sets and logs the state.
func (w *watcher[T]) setState(state string) {
	w.updateStatus(func(s *watchStatus) { s.state, s.protocol = state, w.kube.protocol })
	w.log.Debug("watch state changed", "object", w.String(), "state", state)
}

// updateStatus calls update with the status, under mu.
func (w *watcher[T]) updateStatus(update func(*watchStatus)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	update(&w.status)
}

// snapshot returns a copy of the status.
func (w *watcher[T]) snapshot() (s watchStatus) {
	w.updateStatus(func(status *watchStatus) {
		s = *status
		s.failureCounts = maps.Clone(status.failureCounts)
	})
	return s
}

// objectWatcher is a watcher of objects of any kind.
type objectWatcher interface {
	String() string
	snapshot() watchStatus
}

// writeWatchMetrics writes the metrics of the watchers.
func writeWatchMetrics(m metricsWriter, watchers []objectWatcher) {
	type sampler = func(value float64, labels ...string)
	family := func(name, kind, help string, write func(s watchStatus, sample sampler)) {
		sample := m.family(name, kind, help)
		for _, w := range watchers {
			write(w.snapshot(), func(value float64, labels ...string) {
				sample(value, append([]string{"object", w.String()}, labels...)...)
			})
		}
	}
	family("router_watch_state", "gauge", "1 for the state of the watch.",
		func(s watchStatus, sample sampler) {
			states := []string{watchListing, watchConnecting, watchWatching, watchBackoff}
			for _, state := range states {
				sample(boolToFloat(s.state == state), "state", state)
			}
		})
	family("router_watch_confirmed_timestamp_seconds", "gauge",
		"When the API server last confirmed the object, in seconds since 1970; 0 if it never did.",
		func(s watchStatus, sample sampler) { sample(unixSeconds(s.confirmed)) })
	family("router_watch_consecutive_failures", "gauge",
		"Cycles of LIST and WATCH since the last good one that failed or ended too soon.",
		func(s watchStatus, sample sampler) { sample(float64(s.failures)) })
	family("router_watch_failures_total", "counter",
		"Failed cycles of LIST and WATCH, by class of the error.",
		func(s watchStatus, sample sampler) {
			counts := map[string]int{} // rates need a 0 before the first failure
			for _, class := range connectionClasses() {
				counts[class] = 0
			}
			maps.Copy(counts, s.failureCounts)
			for _, class := range slices.Sorted(maps.Keys(counts)) {
				sample(float64(counts[class]), "class", class)
			}
		})
	family("router_watch_info", "gauge",
		"Always 1. The label has the HTTP version of the API server's last response.",
		func(s watchStatus, sample sampler) { sample(1, "protocol", s.protocol) })
}

// cappedReader fails with errTooBig once it has read limit bytes. Its user raises limit
// for each object, so that it bounds one object and not the stream.
type cappedReader struct {
	r           io.Reader
	read, limit int64 // bytes
}

func (c *cappedReader) Read(b []byte) (int, error) {
	if c.read >= c.limit {
		return 0, errTooBig
	}
	n, err := c.r.Read(b[:min(int64(len(b)), c.limit-c.read)])
	c.read += int64(n)
	return n, err
}

// decodeList reads a list of at most maxBytes to its end. It decodes one item after the
// other: thirty items of 1 MiB each would take 100 MiB as one text.
func decodeList[T any](body io.Reader, maxBytes int64) (
	list apiObject, items []*T, err error) {
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

// decodeEvent reads one event of a WATCH
// (https://kubernetes.io/docs/reference/using-api/api-concepts/, "Efficient detection of
// changes"). The type comes before the object and says how to decode it. So the object is
// decoded in one pass: to find its end first and decode it then takes twice as long. An ERROR
// event is returned as a *statusError, also the 410 of a WATCH, which is an event in a response
// of 200 (kubernetes#35068). io.EOF is the end of the stream before an event.
func decodeEvent[T any](d *json.Decoder) (event string, o *T, err error) {
	o = new(T)
	statusErr := &statusError{}
	targets := map[string]any{
		"ADDED": o, "MODIFIED": o, "DELETED": o,
		"ERROR": statusErr, "BOOKMARK": new(json.RawMessage),
	}
	err = decodeElements(d, '{', func() error {
		key, err := d.Token()
		switch target := targets[event]; {
		case key == "type":
			return d.Decode(&event)
		case key == "object" && target != nil:
			return d.Decode(target)
		}
		return cmp.Or(err, d.Decode(new(json.RawMessage)))
	})
	switch {
	case err != nil:
		return event, nil, err
	case event == "ERROR":
		return event, nil, statusErr
	case targets[event] == nil: // if it were skipped, its change would be lost (vector#5846)
		return event, nil, fmt.Errorf("%w: event of type %.60q", errBadResponse, event)
	}
	return event, o, nil
}

// decodeElements calls each before every element of a JSON array, or before every member
// of a JSON object. null has none. It returns io.EOF only for an end of the input before
// the array or object.
func decodeElements(d *json.Decoder, open json.Delim, each func() error) error {
	begin, err := d.Token()
	if err != nil || begin == nil {
		return err
	}
	if begin != open {
		return fmt.Errorf("%w: %v, expected %v", errBadResponse, begin, open)
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
