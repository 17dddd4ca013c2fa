package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxReleaseBatch is how many namespaces one request has: 520 kB of JSON at most, as
	// a quote in a name takes two bytes.
	maxReleaseBatch = 1000
	// releaseTimeout bounds one request: a backend ends sessions, and stores state.
	releaseTimeout = 20 * time.Second
	// maxReleaseAnswer bounds what is read of an answer, in bytes.
	maxReleaseAnswer = 4 << 10
	// The waits between the tries of one backend.
	minReleaseRetry = 500 * time.Millisecond
	maxReleaseRetry = 5 * time.Second
	// maxRemembered is how many namespaces each half of a releaseMemory has: some 10 MB.
	maxRemembered = 1 << 17
)

// releaser asks backends to give namespaces away (-release PATH): to end all sessions of
// these, and to store their state, before the next owner begins. It sends
//
//	POST PATH
//	X-Router-Step: 1795871234567
//	X-Router-Backend: backend-2
//	{"namespaces":["ns-01","ns-02"]}
//
// and 2xx is the answer that this was done. From then on the backend refuses upgrades of
// these namespaces with a lower step. It may get the same request several times, from
// each router. All methods are safe for concurrent use.
type releaser struct {
	// Static after construction.
	path      string
	podName   string // of this router, for the backend's log
	backends  *backends
	timeout   time.Duration // of one request
	transport *http.Transport
	log       *slog.Logger
	lifetime  context.Context // of connections and runs, until close
	cancel    context.CancelFunc
	running   sync.WaitGroup // runs

	mu      sync.Mutex
	waiting map[int]*releaseWait // by ordinal; guarded by mu, with what it points to
}

// releaseWait is a backend that has not released its namespaces yet.
type releaseWait struct {
	namespaces int // that are left
	since      time.Time
	err        error // of the last try that failed; nil before
}

// newReleaser returns a releaser that POSTs path. A backend without a pod need not
// release anything. The caller closes the releaser.
func newReleaser(path, podName string, backends *backends, log *slog.Logger) *releaser {
	r := &releaser{path: path, podName: podName, backends: backends,
		timeout: releaseTimeout, log: log, waiting: map[int]*releaseWait{}}
	r.lifetime, r.cancel = context.WithCancel(context.Background())
	r.transport = &http.Transport{
		DialContext:            r.dial,
		DisableCompression:     true,
		MaxConnsPerHost:        2,
		MaxIdleConnsPerHost:    1,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 16 << 10,
	}
	return r
}

// close ends all runs and connections, and waits for the runs.
func (r *releaser) close() {
	r.cancel()
	r.running.Wait()
	r.transport.CloseIdleConnections()
}

// host returns the host of the URL to the backend. It has the pod's uid, so that the
// connections to a pod that was replaced are not used any more.
func (r *releaser) host(ordinal int) string {
	return strconv.Itoa(ordinal) + "." + r.backends.podUID(ordinal)
}

// dial connects to a backend, as for a session. addr has what host returned. The
// transport's context can outlive the request, so dial uses lifetime, which ends with
// close.
func (r *releaser) dial(_ context.Context, _, addr string) (net.Conn, error) {
	digits, _, _ := strings.Cut(addr, ".")
	ordinal, err := strconv.Atoi(digits)
	if err != nil {
		return nil, err
	}
	return r.backends.dial(r.lifetime, ordinal)
}

// release asks the backend to release the namespaces as of this step, once. It returns
// those that are not released, and why. ctx bounds it, and timeout each of its requests.
func (r *releaser) release(ctx context.Context, ordinal int, namespaces []string,
	step int64) (left []string, err error) {
	for len(namespaces) > 0 {
		n := min(len(namespaces), maxReleaseBatch)
		if err := r.post(ctx, ordinal, namespaces[:n], step); err != nil {
			return namespaces, fmt.Errorf("%s has not released %d namespaces: POST %s: %w",
				r.backends.name(ordinal), len(namespaces), r.path, err)
		}
		namespaces = namespaces[n:]
	}
	return nil, nil
}

// post sends one request. It returns nil if the answer is 2xx. It follows no redirect: to
// release is this backend's own work.
func (r *releaser) post(ctx context.Context, ordinal int, namespaces []string,
	step int64) error {
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false) // which would take six bytes for one
	if err := encoder.Encode(map[string][]string{"namespaces": namespaces}); err != nil {
		return err
	}
	body.Truncate(body.Len() - len("\n"))
	ctx, cancel := context.WithTimeoutCause(ctx, r.timeout,
		fmt.Errorf("no answer within %s", r.timeout))
	defer cancel()
	target := "http://" + r.host(ordinal) + r.path
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, &body)
	if err != nil {
		return err
	}
	req.Host = r.backends.name(ordinal)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set(headerPod, r.podName)
	req.Header.Set(headerStep, strconv.FormatInt(step, 10))
	req.Header.Set(headerBackend, r.backends.name(ordinal))
	// It may be sent twice: net/http does so if a kept connection turns out to be closed.
	// A key without a value is not sent (http.Transport).
	req.Header["Idempotency-Key"] = nil
	resp, err := r.transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxReleaseAnswer))
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s: %.200q", resp.Status, bytes.TrimSpace(answer))
	}
	return err
}

// releaseSet has the namespaces that backends have to release in a step, by backend.
type releaseSet map[int]map[string]struct{}

// add adds a namespace of a backend. It may be there already.
func (s releaseSet) add(namespace string, backend int) {
	if s[backend] == nil {
		s[backend] = map[string]struct{}{}
	}
	s[backend][namespace] = struct{}{}
}

// releaseRun is the release of one step by all backends of a releaseSet.
type releaseRun struct {
	waiting atomic.Int64 // backends that have not released their namespaces
}

// isDone reports whether all backends have released their namespaces.
func (run *releaseRun) isDone() bool { return run.waiting.Load() == 0 }

// start asks all backends of the set to release their namespaces, each again and again
// until it has done so or is gone. It calls onDone when all have, unless there are none.
// It does not block, and set must not change any more. The run ends with ctx, which is
// lifetime or one below it, and is not done then.
func (r *releaser) start(ctx context.Context, step int64, set releaseSet,
	onDone func()) *releaseRun {
	run := &releaseRun{}
	run.waiting.Store(int64(len(set)))
	for ordinal, namespaces := range set {
		names := slices.Sorted(maps.Keys(namespaces))
		r.running.Go(func() {
			if r.keepReleasing(ctx, ordinal, names, step) && run.waiting.Add(-1) == 0 {
				onDone()
			}
		})
	}
	return run
}

// keepReleasing asks the backend until it has released the namespaces, or is gone, and
// reports true then. It reports false if ctx ended before.
func (r *releaser) keepReleasing(ctx context.Context, ordinal int, namespaces []string,
	step int64) bool {
	name := r.backends.name(ordinal)
	wait := r.startWait(ordinal, len(namespaces))
	defer r.endWait(ordinal, wait)
	retry := backoff{minReleaseRetry, maxReleaseRetry}
	for failures := 1; ; failures++ {
		left, err := r.release(ctx, ordinal, namespaces, step)
		if err == nil {
			return true
		}
		gone, podErr := r.backends.podIsGone(ctx, ordinal)
		if podErr != nil {
			err = fmt.Errorf("%w; it is not known whether its pod is gone: %w", err, podErr)
		}
		switch {
		case ctx.Err() != nil:
			return false
		case gone:
			r.log.Warn("backend is gone; its namespaces count as released",
				"backend", name, "namespaces", len(left), "step", step)
			return true
		case failures == 1:
			r.log.Warn("backend has not released its namespaces; hand-off waits",
				"backend", name, "step", step, "error", err.Error())
		}
		namespaces = left
		r.noteFailure(wait, len(left), err)
		if sleep(ctx, retry.jittered(failures, rand.Float64())) != nil {
			return false
		}
	}
}

// startWait notes that a step waits for the backend. The caller calls endWait.
func (r *releaser) startWait(ordinal, namespaces int) *releaseWait {
	r.mu.Lock()
	defer r.mu.Unlock()
	wait := &releaseWait{namespaces: namespaces, since: time.Now()}
	r.waiting[ordinal] = wait
	return wait
}

// noteFailure notes how many namespaces are left, and why.
func (r *releaser) noteFailure(wait *releaseWait, left int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	wait.namespaces, wait.err = left, err
}

// endWait ends a wait. It logs that if there was a failure.
func (r *releaser) endWait(ordinal int, wait *releaseWait) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if wait.err != nil {
		r.log.Info("hand-off no longer waits for backend",
			"backend", r.backends.name(ordinal), "seconds", time.Since(wait.since).Seconds())
	}
	if r.waiting[ordinal] == wait { // else that of the next step
		delete(r.waiting, ordinal)
	}
}

// waits returns which backends have not released their namespaces yet, by ordinal.
func (r *releaser) waits() map[int]releaseWait {
	r.mu.Lock()
	defer r.mu.Unlock()
	waits := map[int]releaseWait{}
	for ordinal, wait := range r.waiting {
		waits[ordinal] = *wait
	}
	return waits
}

// stepReleases releases what the steps of a hand-off need, one step after the other. Of a
// nil *stepReleases, as without -release, each step is done. The goroutine of mover.run owns it.
type stepReleases struct {
	releaser *releaser
	memory   *releaseMemory

	current *releaseRun // of the step; nil from startStep to the first releaseAll
	cancel  context.CancelFunc
}

func newStepReleases(r *releaser, memory *releaseMemory) *stepReleases {
	return &stepReleases{releaser: r, memory: memory, cancel: func() {}}
}

// waits is that of the releaser. Any goroutine may call it.
func (s *stepReleases) waits() map[int]releaseWait {
	if s == nil {
		return nil
	}
	return s.releaser.waits()
}

// close ends the releaseRun of the step, and closes the releaser. mover.run has ended.
func (s *stepReleases) close() {
	if s != nil {
		s.releaser.close()
	}
}

// startStep begins a step, before its view is in force. It ends the step before, if that
// is not done.
func (s *stepReleases) startStep() {
	if s == nil {
		return
	}
	s.cancel()
	s.current = nil
	s.memory.freeze()
}

// endStep ends the step: it is done, perhaps without this router, which the others have removed.
func (s *stepReleases) endStep() {
	if s != nil {
		s.cancel()
		s.memory.unfreeze()
	}
}

// releaseAll is called when all sessions and flights of the step are over, and then again
// whenever onDone was called. It asks the backends, the first time. It reports whether
// each has released its namespaces: those that this router had with it in the step, or within
// -release-retention before, and for which match returns true: the backend is not their owner
// after the step.
func (s *stepReleases) releaseAll(step int64, match func(namespace string, backend int) bool,
	onDone func()) bool {
	if s == nil {
		return true
	}
	if s.current == nil {
		var ctx context.Context
		ctx, s.cancel = context.WithCancel(s.releaser.lifetime)
		s.current = s.releaser.start(ctx, step, s.memory.namespaces(match), onDone)
	}
	return s.current.isDone()
}

// releaseMemory knows which namespaces this router had lately, and with which backend:
// their state may not be stored yet (-release-retention).
//
// It forgets a namespace between retention and 2*retention after its last session or request is
// over, and nothing during a step, except what exceeds max: see note. To have it too long does
// no harm: a release has nothing to do then.
type releaseMemory struct {
	// Static after construction.
	retention time.Duration
	max       int // namespaces of each half
	log       *slog.Logger

	// Guarded by mu.
	mu     sync.Mutex
	recent []backendNamespaces // noted since began, in one of them each; all but the last are never changed
	older  []backendNamespaces // noted before, in at most retention; never changed
	began  time.Time
	frozen bool // a step is under way: only what exceeds max is forgotten
}

// backendNamespace is a namespace that was with a backend.
type backendNamespace struct {
	backend   int
	namespace string
}

// backendNamespaces is a set of them.
type backendNamespaces map[backendNamespace]struct{}

func newReleaseMemory(retention time.Duration, log *slog.Logger) *releaseMemory {
	return &releaseMemory{retention: retention, max: maxRemembered, log: log,
		recent: []backendNamespaces{{}}, began: time.Now()}
}

// note notes that the backend has a session or a request of the namespace, which is
// about to be over. It comes before the mover can see that it is over.
func (m *releaseMemory) note(namespace string, backend int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forget(time.Now())
	key := backendNamespace{backend, namespace}
	isNoted := func(set backendNamespaces) bool { _, ok := set[key]; return ok }
	if slices.ContainsFunc(m.recent, isNoted) {
		return
	}
	if countNamespaces(m.recent) >= m.max {
		if lost := countNamespaces(m.older); lost > 0 {
			m.log.Warn("too many namespaces to remember; the oldest will not be released",
				"namespaces", lost, "max", m.max)
		}
		m.startHalf(time.Now())
	}
	m.recent[len(m.recent)-1][key] = struct{}{}
}

// freeze makes the memory forget nothing until unfreeze, except what exceeds max: what the
// router had in the last retention is there until the step is done, however long that takes.
func (m *releaseMemory) freeze() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forget(time.Now())
	m.frozen = true
}

// unfreeze ends freeze. What was noted in the last retention stays for at least as long again.
func (m *releaseMemory) unfreeze() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now := time.Now(); now.Sub(m.began) > m.retention {
		m.startHalf(now)
	}
	m.frozen = false
}

// namespaces returns what it has, of which match returns true.
func (m *releaseMemory) namespaces(match func(namespace string, backend int) bool) releaseSet {
	m.mu.Lock()
	m.forget(time.Now())
	last := len(m.recent) - 1
	if len(m.recent[last]) > 0 {
		m.recent = append(mergeSmall(m.recent), backendNamespaces{})
		last = len(m.recent) - 1
	}
	known := slices.Concat(m.older, m.recent[:last]) // these do not change any more
	m.mu.Unlock()
	set := releaseSet{}
	for _, part := range known {
		for key := range part {
			if match(key.namespace, key.backend) {
				set.add(key.namespace, key.backend)
			}
		}
	}
	return set
}

// forget drops what is older than 2*retention, and nothing that is younger than retention. The
// caller holds mu.
func (m *releaseMemory) forget(now time.Time) {
	switch age := now.Sub(m.began); {
	case m.frozen:
	case age > 2*m.retention:
		m.recent = nil
		m.startHalf(now)
	case age > m.retention:
		m.startHalf(m.began.Add(m.retention))
	}
}

// startHalf makes the recent half the older one. The caller holds mu.
func (m *releaseMemory) startHalf(began time.Time) {
	m.older, m.recent, m.began = m.recent, []backendNamespaces{{}}, began
}

// mergeSmall merges the last sets, while one has less than twice as many entries as all after
// it: so there are few, however many steps there were. It changes none of the sets.
func mergeSmall(sets []backendNamespaces) []backendNamespaces {
	for last := len(sets) - 1; last > 0 && len(sets[last-1]) < 2*len(sets[last]); last-- {
		merged := maps.Clone(sets[last-1])
		maps.Copy(merged, sets[last])
		sets = append(sets[:last-1], merged)
	}
	return sets
}

// countNamespaces returns how many entries the sets have, which have none in common.
func countNamespaces(sets []backendNamespaces) (count int) {
	for _, set := range sets {
		count += len(set)
	}
	return count
}
