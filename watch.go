package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
	"unicode"
)

const (
	listTime     = 15 * time.Second  // bounds a LIST
	watchMin     = 150 * time.Second // timeoutSeconds of a WATCH is between these:
	watchMax     = 210 * time.Second // below the idle limits of load balancers (Azure has 240 s: Azure/kars#456)
	watchGrace   = 15 * time.Second  // a WATCH that outlives its timeout by this is dead
	healthyWatch = 10 * time.Second  // a WATCH that lived this long was worth its LIST
	backoffFirst = 500 * time.Millisecond
	backoffMost  = 15 * time.Second
	maxObject    = 16 << 20 // bytes of a LIST or of one event: 1 MiB of "<" is 6.3 MB of JSON
)

// The states of a watcher.
const (
	stateListing    = "listing"
	stateConnecting = "connecting"
	stateWatching   = "watching"
	stateWaiting    = "waiting"
)

// meta is what is read of an object's metadata.
type meta struct {
	Name            string `json:"name"`
	Namespace       string `json:"namespace"`
	UID             string `json:"uid"`
	ResourceVersion string `json:"resourceVersion"`
	Continue        string `json:"continue"` // lists only
}

// object is what every API object has.
type object struct {
	Kind     string `json:"kind"`
	Metadata meta   `json:"metadata"`
}

// configMap is what is read of a ConfigMap.
type configMap struct {
	object
	Data map[string]string `json:"data"`
}

// watcher follows one object of the API server. Each cycle is a LIST, which
// tells what is so now, and a WATCH from the LIST's resourceVersion, which
// tells what comes after; whatever ends it, the next cycle starts from a LIST.
// Nothing is ever resumed: for one object a LIST every three minutes costs less
// than 410 loops, resourceVersions from the future after a restored etcd, and
// events that were lost on the way (kubernetes#107457, #123072).
//
//	LISTING ──ok──> CONNECTING ──200──> WATCHING ──event──> WATCHING
//	   ^ any error       │ any error        │ end of stream, ERROR, anything unexpected
//	   └──── WAITING <───┴──────────────────┘
//
// No error is final and none changes what was applied: an API server that is
// starting answers 403 to those who may, and one that is gone comes back.
type watcher[T any] struct {
	// Static after construction.
	kube      *kube
	path      string // of the collection
	kind      string
	namespace string // Kubernetes namespace
	name      string
	header    func(*T) *object
	apply     func(*T) // called by run only, in order; must be quick: a slow reader loses events
	log       *slog.Logger

	// Owned by run.
	applied    meta      // of the object that was applied last
	complained time.Time // when the last failure was logged
	omitted    int       // failures since, which were not

	mu     sync.Mutex
	status watchStatus // guarded by mu
}

// watchStatus is what others may know of a watcher.
type watchStatus struct {
	state     string
	confirmed time.Time // when the API server last said how things are; zero if never
	fails     int       // cycles in a row that were not healthy
	healthy   bool      // the cycle was worth its LIST
	failure   string    // the class of the last error, "" since a healthy cycle
	problem   string    // the last error, "" since the API server was heard
	absent    bool      // the last LIST or event said that there is no such object
	version   string    // the resourceVersion that was applied last
}

func newConfigMapWatcher(k *kube, namespace, name string, apply func(*configMap), log *slog.Logger) *watcher[configMap] {
	return &watcher[configMap]{
		kube: k, path: "/api/v1/namespaces/" + namespace + "/configmaps",
		kind: "ConfigMap", namespace: namespace, name: name,
		header: func(c *configMap) *object { return &c.object }, apply: apply, log: log,
	}
}

// run cycles until ctx ends, and leaves no connection.
func (w *watcher[T]) run(ctx context.Context) {
	defer w.kube.close()
	for {
		err := w.cycle(ctx)
		if ctx.Err() != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(w.settle(err)):
		}
	}
}

// cycle lists and watches once. Without an error the stream ended cleanly.
func (w *watcher[T]) cycle(ctx context.Context) error {
	w.tell(func(s *watchStatus) { s.state, s.healthy = stateListing, false })
	version, err := w.list(ctx)
	if err != nil {
		return fmt.Errorf("list %s: %w", w.what(), err)
	}
	if err := w.watch(ctx, version); err != nil {
		return fmt.Errorf("watch %s: %w", w.what(), err)
	}
	return nil
}

// worthwhile notes that the cycle is healthy: it was worth its LIST. Nothing
// less ends a row of failures. A load balancer that cuts every stream after
// seconds makes this polling with a growing pause, not a hot loop
// (kubespray#655), and a server that allows the LIST only does not fill the log.
func (w *watcher[T]) worthwhile() {
	failure, version := "", ""
	w.tell(func(s *watchStatus) {
		failure, version = s.failure, s.version
		s.healthy, s.fails, s.failure = true, 0, ""
	})
	if failure != "" {
		w.log.Info("watch works again", "object", w.what(), "version", version)
	}
}

// settle takes note of how a cycle ended, and returns how long to wait. A
// transport that failed is replaced, one that brought the server's refusal is
// not.
func (w *watcher[T]) settle(err error) time.Duration {
	fails, failure := 0, ""
	w.tell(func(s *watchStatus) {
		failure, s.state = s.failure, stateWaiting
		if !s.healthy {
			s.fails++
		}
		if err != nil {
			s.failure, s.problem = errorClass(err), err.Error()
		}
		fails = s.fails
	})
	no := &status{}
	if err != nil {
		if !errors.As(err, &no) {
			w.kube.renew()
		}
		w.complain(err, errorClass(err) != failure)
	}
	return pause(fails, no.retryAfter(), rand.Float64())
}

// pause returns how long to wait after the fails-th cycle in a row that was not
// healthy: exponential, jittered by half of itself in both directions, at least
// what the server asked for. random is in [0, 1).
func pause(fails int, asked time.Duration, random float64) time.Duration {
	wait := time.Duration(random * float64(backoffFirst)) // replicas that were cut together come back apart
	if fails > 0 {
		backoff := min(backoffMost, backoffFirst<<min(fails-1, 10))
		wait = time.Duration((0.5 + random) * float64(backoff))
	}
	if asked > wait {
		wait = asked + time.Duration(random*0.2*float64(asked))
	}
	return wait
}

// complain logs a failure if it is another than the last, and at most once a
// minute otherwise.
func (w *watcher[T]) complain(err error, another bool) {
	if !another && time.Since(w.complained) < time.Minute {
		w.omitted++
		return
	}
	w.log.Warn("watch failed, what was applied stays in force", "error", err.Error(), "omitted", w.omitted)
	w.complained, w.omitted = time.Now(), 0
}

// errorClass is the innermost error's text without digits: ports, times and
// resourceVersions are others each time.
func errorClass(err error) string {
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return strings.Join(strings.FieldsFunc(err.Error(), unicode.IsDigit), "")
}

// what names the object for people.
func (w *watcher[T]) what() string { return w.kind + " " + w.namespace + "/" + w.name }

func (w *watcher[T]) enter(state string) { w.tell(func(s *watchStatus) { s.state = state }) }

// confirm notes that the API server has just said how things are.
func (w *watcher[T]) confirm(f func(*watchStatus)) {
	w.tell(func(s *watchStatus) {
		s.confirmed, s.problem = time.Now(), ""
		f(s)
	})
}

func (w *watcher[T]) tell(f func(*watchStatus)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(&w.status)
}

// now returns the status.
func (w *watcher[T]) now() (s watchStatus) {
	w.tell(func(status *watchStatus) { s = *status })
	return s
}

// missing says, in words, why nothing was applied yet.
func (w *watcher[T]) missing() string {
	s := w.now()
	switch {
	case s.absent:
		return fmt.Sprintf("%s does not exist: kubectl -n %s create %s %s", w.what(), w.namespace, strings.ToLower(w.kind), w.name)
	case s.problem != "":
		return s.problem
	}
	return w.what() + " was asked for"
}
