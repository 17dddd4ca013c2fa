package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// admin answers operators and probes on the admin port, which clients do not use.
type admin struct {
	// Static after construction.
	proxy          *proxy
	fdLimit        *descriptorLimit
	logQueue       *logQueue
	configMaps     *configMaps     // nil without an API server
	replicaWatcher *replicaWatcher // nil if flags give the number of backends
	started        time.Time

	lastSummary   atomic.Pointer[tableSummary] // see summary
	topNamespaces topNamespaces
}

// newAdminListener returns a listener that accepts from l, keeps at most maxAdminConns
// connections open, and goes on after errors. It closes l.
func newAdminListener(l net.Listener, log *slog.Logger) net.Listener {
	retry := retryListener{l, newAcceptRetry("-admin", log)}
	return &limitListener{Listener: retry, maxConns: maxAdminConns}
}

// server returns the server of the admin port, for a newAdminListener. A new /healthz or
// /readyz always gets an answer, whatever others request: older connections make room
// for it, and few requests that cost much run at once.
func (a *admin) server(log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           a.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second, // including the body
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          serverLog(log),
		ConnState:         noteConnState,
	}
}

// How many requests of each kind run at once. Together they dial at most maxAdminDials
// connections: one for each /owner, maxConcurrentDials for a /backends.
const (
	maxConcurrentPlans    = 1 // a plan takes up to 40 MiB
	maxConcurrentBackends = 1
	maxConcurrentOwners   = 8
	maxConcurrentDials    = maxAdminDials - maxConcurrentOwners
)

// handler returns the handler of the admin port. Its limits are its own, so a server has
// one handler.
func (a *admin) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", healthz)
	mux.HandleFunc("GET /readyz", a.readyz)
	mux.HandleFunc("GET /metrics", a.metrics)
	mux.HandleFunc("GET /owner",
		limitConcurrency(maxConcurrentOwners, maxAdminConns, a.owner))
	mux.HandleFunc("GET /status", a.status)
	mux.HandleFunc("GET /top", a.top)
	mux.HandleFunc("GET /backends",
		limitConcurrency(maxConcurrentBackends, maxAdminConns, a.backends))
	mux.HandleFunc("POST /plan",
		limitConcurrency(maxConcurrentPlans, maxWaitingPlans, a.preview))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost && r.ContentLength != 0 {
			w.Header().Set("Connection", "close") // so that net/http does not read the body
			writeError(w, http.StatusBadRequest,
				fmt.Sprintf("%.20s must not have a body", r.Method))
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func healthz(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }

const (
	maxWaitingPlans = 4               // plans that wait; their bodies stay in the kernel
	maxQueueTime    = 3 * time.Second // how long a request waits until it runs
)

// limitConcurrency returns a handler that runs next for count requests at once. Up to
// waiting more requests wait, for at most maxQueueTime, and their bodies are not read.
// All others get 503.
func limitConcurrency(count, waiting int, next http.HandlerFunc) http.HandlerFunc {
	admitted := make(chan struct{}, count+waiting)
	running := make(chan struct{}, count)
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case admitted <- struct{}{}:
			defer func() { <-admitted }()
		default:
			writeBusy(w, r)
			return
		}
		timeout := time.NewTimer(maxQueueTime)
		defer timeout.Stop()
		select {
		case running <- struct{}{}:
			defer func() { <-running }()
			next(w, r)
		case <-timeout.C:
			writeBusy(w, r)
		case <-r.Context().Done(): // the client is gone
		}
	}
}

// writeBusy answers a request that may not run now with 503.
func writeBusy(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Retry-After", "1")
	w.Header().Set("Connection", "close") // so that net/http does not read the body
	writeError(w, http.StatusServiceUnavailable,
		"too many requests for "+r.URL.Path+" at once")
}

// whyNotReady returns why the router should get no new clients, or nothing if it should.
// Once there is a table, the API server may be down for any time (invariant 5).
func (a *admin) whyNotReady() []string {
	var why []string
	if a.proxy.draining.Load() {
		why = append(why, errDraining.Error())
	}
	if a.proxy.router.table() == nil {
		why = append(why, a.whyNoTable()...)
	}
	if missing := a.proxy.mover.whyNotReady(); missing != "" {
		why = append(why, missing)
	}
	if used, limit, full := a.fdLimit.usage(); full {
		why = append(why,
			fmt.Sprintf("clients wait for descriptors: %d of %d are used", used, limit))
	}
	return why
}

// whyNoTable returns why there is no table yet.
func (a *admin) whyNoTable() (why []string) {
	if missing := a.proxy.router.whyNoOverrides(); missing != "" {
		why = append(why, "no overrides have been read yet: "+missing)
	}
	if a.replicaWatcher == nil {
		return why
	}
	if missing := a.replicaWatcher.whyNotReady(); missing != "" {
		why = append(why, "the number of backends is not known yet: "+missing)
	}
	return why
}

func (a *admin) readyz(w http.ResponseWriter, _ *http.Request) {
	if why := a.whyNotReady(); len(why) > 0 {
		http.Error(w, strings.Join(why, "\n"), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ready")
}

func (a *admin) metrics(w http.ResponseWriter, r *http.Request) {
	openMetrics, contentType := metricsFormat(r.Header["Accept"])
	w.Header().Set("Content-Type", contentType)
	b := bufio.NewWriter(w)
	a.writeMetrics(metricsWriter{b, openMetrics})
	b.Flush() // it fails only if the client is gone
}

// writeMetrics writes all metric families. Each component writes its own; here is their
// order.
func (a *admin) writeMetrics(m metricsWriter) {
	m.family("router_build_info", "gauge", "Always 1. The labels have the versions of the router and of Go.")
	m.sample("router_build_info", 1, "version", version(), "goversion", runtime.Version())
	m.single("router_ready", "gauge", "1 if /readyz answers ready.",
		boolToFloat(len(a.whyNotReady()) == 0))
	counts := a.proxy.relay.counts()
	a.proxy.relay.writeSessionMetrics(m, counts, a.backendOrdinals(counts))
	a.proxy.mover.writeMetrics(m)
	a.writeTopMetrics(m)
	a.proxy.relay.writeByteMetrics(m)
	a.proxy.writeMetrics(m)
	a.fdLimit.writeMetrics(m)
	a.proxy.router.writeMetrics(m)
	if a.replicaWatcher != nil {
		var active ordinalRange
		if t := a.proxy.router.table(); t != nil {
			active = t.active
		}
		a.replicaWatcher.writeMetrics(m, active)
	}
	if a.configMaps != nil {
		writeWatchMetrics(m, a.watchers())
		a.configMaps.writeMetrics(m)
	}
	a.logQueue.writeMetrics(m)
	writeProcessMetrics(m, a.started)
	writeRuntimeMetrics(m)
	m.end()
}

// watchers returns the watchers of all objects.
func (a *admin) watchers() (all []objectWatcher) {
	for _, w := range a.configMaps.watchers {
		all = append(all, w)
	}
	if a.replicaWatcher != nil {
		all = append(all, a.replicaWatcher.watcher, a.replicaWatcher.endpoints.watcher)
	}
	return all
}

// ownership is the answer of /owner.
type ownership struct {
	Namespace string      `json:"namespace"`
	Key       string      `json:"key,omitempty"`          // of its overrides, if it is another text
	Owner     string      `json:"owner,omitempty"`        // "" if the namespace is refused
	HeldBy    int64       `json:"held_by_step,omitempty"` // clients wait until previous is over
	Previous  string      `json:"previous,omitempty"`     // owner until the step is done
	Next      string      `json:"next,omitempty"`         // owner when its turn in a hand-off has come
	Why       string      `json:"why"`                    // one of the why constants
	HashOwner string      `json:"hash_owner,omitempty"`   // its owner if that were not cordoned
	PodUID    string      `json:"pod,omitempty"`          // of the owner's pod, if known
	Address   string      `json:"address,omitempty"`
	Ready     bool        `json:"ready"` // the owner takes a connection now
	Error     string      `json:"error,omitempty"`
	Note      string      `json:"note,omitempty"`
	Table     string      `json:"table"` // the table's version
	Stamp     string      `json:"stamp"` // what backends get as X-Router-Table
	Rejected  []rejection `json:"rejected,omitempty"`
}

// owner answers GET /owner: it looks the namespace up as an upgrade would, and dials its
// owner.
func (a *admin) owner(w http.ResponseWriter, r *http.Request) {
	asked := r.URL.Query().Get("namespace") // FormValue would read a body
	namespace, want := clientNamespace(asked, a.proxy.router.fromHost)
	if want != "" {
		writeError(w, http.StatusBadRequest,
			fmt.Sprintf("/owner?namespace= must be %s (got %.260q)", want, asked))
		return
	}
	t := a.tableOrError(w)
	if t == nil {
		return
	}
	o, ordinal := newOwnership(t, namespace)
	ordinal = a.addHandoff(&o, ordinal, namespace)
	if o.Owner != "" {
		o.PodUID = a.proxy.backends.podUID(ordinal)
		o.Address, o.Ready, o.Error = a.probe(r.Context(), ordinal)
	}
	writeJSON(w, http.StatusOK, o)
}

// status answers GET /status: what this router knows, whether or not it is ready.
func (a *admin) status(w http.ResponseWriter, _ *http.Request) {
	counts := a.proxy.relay.counts()
	maps.DeleteFunc(counts, func(_ int, n sessionCounts) bool { return n.open == 0 })
	s := newStatus(a.proxy, a.whyNotReady(), a.summary(), a.backendOrdinals(counts))
	used, limit, _ := a.fdLimit.usage()
	s.addLimit("descriptors", used, limit)
	s.addStatefulSet(a.replicaWatcher)
	if a.configMaps != nil {
		s.addWatches(a.watchers())
	}
	writeJSON(w, http.StatusOK, s)
}

// summary returns the summary of the table in force. It makes one only if the table is
// another than at the last call.
func (a *admin) summary() *tableSummary {
	t, last := a.proxy.router.table(), a.lastSummary.Load()
	if last == nil || last.table != t {
		last = newTableSummary(t)
		a.lastSummary.Store(last)
	}
	return last
}

// tableOrError returns the table in force. Without one it answers 503 and returns nil.
func (a *admin) tableOrError(w http.ResponseWriter) *table {
	t := a.proxy.router.table()
	if t == nil {
		writeError(w, http.StatusServiceUnavailable, strings.Join(a.whyNoTable(), "\n"))
	}
	return t
}

// clientNamespace returns the namespace that a client has with this name in its request.
// If no request can have it, want says what a namespace may be; else want is "".
func clientNamespace(name string, fromHost bool) (namespace, want string) {
	if fromHost {
		name = strings.ToLower(name) // as hostNamespace does
	}
	return name, expectedNamespace(name, fromHost)
}

// newOwnership returns who owns the namespace in t, without the state of the owner, and
// the owner's ordinal. Owner is "" if t refuses the namespace.
func newOwnership(t *table, namespace string) (o ownership, ordinal int) {
	o = ownership{
		Namespace: namespace, Why: t.explain(namespace),
		Table: t.version, Stamp: t.stamp, Rejected: t.rejectionsOf(namespace),
	}
	switch key := namespaceKey(namespace); {
	case len(key) > maxNameBytes:
		o.Note = fmt.Sprintf("it cannot have an override: its key would have %d characters, "+
			"and at most %d are allowed", len(key), maxNameBytes)
	case key != namespace:
		o.Key = key
	}
	ordinal, ok := t.owner(namespace)
	if ok {
		o.Owner = t.name(ordinal)
	}
	if o.Why == whyCordoned {
		hashed, _ := t.cordonedOwner(namespace)
		o.HashOwner = t.name(hashed)
	}
	return o, ordinal
}

// addHandoff adds what the hand-off under way says of the namespace, which has this owner
// in the newest table. It returns the owner's ordinal now.
func (a *admin) addHandoff(o *ownership, inTable int, namespace string) (ordinal int) {
	m := a.proxy.mover
	switch now := m.assign(namespace); {
	case now.state == stateHeld:
		o.HeldBy, o.Owner = now.step, m.relay.backendName(now.owner)
		if before := m.current.Load().before(namespace); before >= 0 {
			o.Previous = m.relay.backendName(before)
		}
		return now.owner
	case now.state == stateOwned && now.owner != inTable:
		o.Next, o.Owner = o.Owner, m.relay.backendName(now.owner)
		return now.owner
	}
	return inTable
}

// topNamespace is one of the namespaces with the most load in this router.
type topNamespace struct {
	Namespace      string  `json:"namespace"`
	Owner          string  `json:"owner,omitempty"` // as in /owner
	Sessions       int64   `json:"sessions"`        // open
	BytesPerSecond float64 `json:"bytes_per_second"`
}

// topStatus has the namespaces with the most load in this router, topSize at most in each
// list, largest first. Those with the most bytes all have some.
type topStatus struct {
	Seconds    float64        `json:"bytes_over_seconds"` // over which bytes are counted
	BySessions []topNamespace `json:"by_sessions"`
	ByBytes    []topNamespace `json:"by_bytes"`
}

// topStatus looks for the namespaces with the most load, but not more often than each
// topInterval.
func (a *admin) topStatus() topStatus {
	look := a.topNamespaces.look(a.proxy.relay)
	list := func(loads []namespaceLoad) []topNamespace {
		all := []topNamespace{}
		for _, load := range loads {
			n := topNamespace{
				Namespace: load.namespace, Sessions: load.sessions,
				BytesPerSecond: float64(load.bytes) / look.over.Seconds(),
			}
			if owner := a.proxy.mover.assign(load.namespace).owner; owner >= 0 {
				n.Owner = a.proxy.relay.backendName(owner)
			}
			all = append(all, n)
		}
		return all
	}
	return topStatus{look.over.Seconds(), list(look.bySessions), list(look.byBytes)}
}

// top answers GET /top: the namespaces with the most sessions, or with ?by=bytes those
// with the most bytes.
func (a *admin) top(w http.ResponseWriter, r *http.Request) {
	by, all := cmp.Or(r.URL.Query().Get("by"), "sessions"), a.topStatus()
	list := map[string][]topNamespace{"sessions": all.BySessions, "bytes": all.ByBytes}[by]
	if list == nil {
		writeError(w, http.StatusBadRequest,
			fmt.Sprintf("/top?by= must be sessions or bytes (got %.60q)", by))
		return
	}
	writeJSON(w, http.StatusOK, struct {
		By         string         `json:"by"`
		Seconds    float64        `json:"bytes_over_seconds"`
		Namespaces []topNamespace `json:"namespaces"`
	}{by, all.Seconds, list})
}

// Which namespaces router_top_sessions has: few, or each tenant would be a series.
const (
	maxTopMetrics  = 10
	minTopSessions = 100 // of this router
)

// writeTopMetrics writes the sessions of the namespaces that have the most.
func (a *admin) writeTopMetrics(m metricsWriter) {
	top := a.topNamespaces.look(a.proxy.relay).bySessions
	small := func(load namespaceLoad) bool { return load.sessions < minTopSessions }
	if i := slices.IndexFunc(top, small); i >= 0 {
		top = top[:i]
	}
	if len(top) == 0 {
		return
	}
	sample := m.family("router_top_sessions", "gauge",
		"Open sessions of the namespaces that have the most of them.")
	for _, load := range top[:min(len(top), maxTopMetrics)] {
		sample(float64(load.sessions), "ns", load.namespace)
	}
}

// backendState is one backend in the answer of /backends. A backend is safe to remove if it
// has no sessions, requests and namespaces, and no change of owners is under way.
type backendState struct {
	Name             string `json:"name"`
	Ordinal          int    `json:"ordinal"`
	PodUID           string `json:"pod,omitempty"` // of its pod, if known
	Address          string `json:"address,omitempty"`
	Ready            bool   `json:"ready"` // it takes a connection now
	Error            string `json:"error,omitempty"`
	OwnsNamespaces   bool   `json:"owns_namespaces"`               // it owns namespaces
	Cordoned         bool   `json:"cordoned,omitempty"`            // but none by the hash
	Overrides        int    `json:"overrides"`                     // how many it owns by overrides
	Sessions         int    `json:"sessions"`                      // open in this router
	SessionsOnOldPod int    `json:"sessions_on_old_pod,omitempty"` // of these, with an earlier pod
	SafeToRemove     bool   `json:"safe_to_remove"`                // as far as this router knows
}

// backends answers GET /backends: the backends that own namespaces, and those that still
// have sessions.
func (a *admin) backends(w http.ResponseWriter, r *http.Request) {
	t := a.tableOrError(w)
	if t == nil {
		return
	}
	// In this order: a flight may become a session, and after a change none begins.
	inFlight, changing := map[int]bool{}, a.proxy.mover.status().InProgress
	a.proxy.mover.flights.each(func(f *flight) { inFlight[f.backend] = true })
	counts, overrides := a.proxy.relay.counts(), a.summary().overrides
	maps.DeleteFunc(counts, func(ordinal int, n sessionCounts) bool { return n.open == 0 })
	all := []backendState{}
	for _, ordinal := range a.backendOrdinals(counts) {
		all = append(all, backendState{
			Name: t.name(ordinal), Ordinal: ordinal,
			PodUID:         a.proxy.backends.podUID(ordinal),
			OwnsNamespaces: t.active.has(ordinal), Overrides: overrides[ordinal],
			Cordoned: slices.Contains(t.cordon, ordinal),
			Sessions: counts[ordinal].open, SessionsOnOldPod: counts[ordinal].onOldPod,
			SafeToRemove: !t.isHashedTo(ordinal) && overrides[ordinal] == 0 &&
				counts[ordinal].open == 0 && !inFlight[ordinal] && !changing,
		})
	}
	a.probeAll(r.Context(), all)
	answer := map[string]any{"table": t.version, "stamp": t.stamp, "backends": all}
	writeJSON(w, http.StatusOK, answer)
}

// probeTimeout bounds all dials of one /backends.
const probeTimeout = 10 * time.Second

// probeAll dials all backends, maxConcurrentDials at a time, and sets their Address,
// Ready and Error.
func (a *admin) probeAll(ctx context.Context, all []backendState) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var dials sync.WaitGroup
	var next atomic.Int64
	for range min(maxConcurrentDials, len(all)) {
		dials.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(all)); i = next.Add(1) - 1 {
				all[i].Address, all[i].Ready, all[i].Error = a.probe(ctx, all[i].Ordinal)
			}
		})
	}
	dials.Wait()
}

// probe dials a backend once. It returns the backend's address, "" if not known, whether
// the backend takes a connection, and if not, why.
func (a *admin) probe(ctx context.Context, ordinal int) (string, bool, string) {
	address, err := a.proxy.backends.probe(ctx, ordinal)
	if err != nil {
		return address, false, err.Error()
	}
	return address, true, ""
}

// backendOrdinals returns the sorted ordinals of the backends that own namespaces and of
// those in counts.
func (a *admin) backendOrdinals(counts map[int]sessionCounts) []int {
	all := slices.Collect(maps.Keys(counts))
	if t := a.proxy.router.table(); t != nil {
		for i := range t.active.count {
			all = append(all, t.active.first+i)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// writeError answers with {"error": text}.
func writeError(w http.ResponseWriter, status int, text string) {
	writeJSON(w, status, map[string]string{"error": text})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v) // it fails only if the client is gone
}

// preview answers POST /plan. It changes nothing.
func (a *admin) preview(w http.ResponseWriter, r *http.Request) {
	t := a.tableOrError(w)
	if t == nil {
		return
	}
	next, err := readPlanRequest(w, r, t)
	switch tooBig := (&http.MaxBytesError{}); {
	case errors.As(err, &tooBig):
		writeError(w, http.StatusRequestEntityTooLarge,
			fmt.Sprintf("the body has more than %d bytes", tooBig.Limit))
	case err != nil:
		writeError(w, http.StatusBadRequest, err.Error())
	default:
		writeJSON(w, http.StatusOK, newPreview(a.proxy, t, next))
	}
}
