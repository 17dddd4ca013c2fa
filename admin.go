package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

// admin answers operators and probes, off the data path.
type admin struct {
	// Static after construction.
	proxy          *proxy
	fdLimit        *descriptorLimit
	configMaps     *configMaps // nil without an API server
	logQueue       *logQueue
	replicaWatcher *replicaWatcher // nil if the flags say how many backends there are
	started        time.Time

	draining atomic.Bool
}

// newAdminListener returns the listener of the admin port, on l.
func newAdminListener(l net.Listener, log *slog.Logger) net.Listener {
	return &limitListener{Listener: retryListener{l, newAcceptRetry("-admin", log)}, maxConns: maxAdminConns}
}

// server returns the server of the admin port, for a newAdminListener. Whatever is
// asked of the others, a new /healthz and /readyz get an answer: connections make room
// for it, and what costs something has few turns.
func (a *admin) server(log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           a.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second, // with the body
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          serverLog(log),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, limitConnKey{}, c)
		},
	}
}

// How many requests are answered at once, for each of these. Those that dial make
// maxConcurrentOwners + maxConcurrentDials connections, which are maxAdminDials.
const (
	maxConcurrentPlans    = 1 // one plan takes up to 40 MiB
	maxConcurrentBackends = 1
	maxConcurrentOwners   = 8
	maxConcurrentDials    = maxAdminDials - maxConcurrentOwners // of one /backends
)

// handler serves the admin port. It has to be asked for once: the turns belong to it.
func (a *admin) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", a.readyz)
	mux.HandleFunc("GET /metrics", a.metrics)
	mux.HandleFunc("GET /owner", limitConcurrency(maxConcurrentOwners, maxAdminConns, a.owner))
	mux.HandleFunc("GET /backends", limitConcurrency(maxConcurrentBackends, maxAdminConns, a.backends))
	mux.HandleFunc("POST /plan", limitConcurrency(maxConcurrentPlans, maxWaitingPlans, a.plan))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := r.Context().Value(limitConnKey{}).(*limitConn); ok {
			c.setBusy(true)
			defer c.setBusy(false)
		}
		if r.Method != http.MethodPost && r.ContentLength != 0 {
			w.Header().Set("Connection", "close") // what is left of the body is not worth reading
			writeJSON(w, http.StatusBadRequest, map[string]string{"error": fmt.Sprintf("%.20s with a body, want none", r.Method)})
			return
		}
		mux.ServeHTTP(w, r)
	})
}

const (
	maxWaitingPlans = 4               // plans that wait for their turn, whose bodies the kernel has
	maxTurnWait     = 3 * time.Second // the longest that one waits
)

// limitConcurrency answers count requests at once with next. As many as waiting wait, without
// their bodies being read; the rest gets 503.
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
		timeout := time.NewTimer(maxTurnWait)
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

// writeBusy answers a request that gets no turn.
func writeBusy(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Retry-After", "1")
	w.Header().Set("Connection", "close") // not to read the body
	writeJSON(w, http.StatusServiceUnavailable, map[string]string{"error": "too many requests for " + r.URL.Path + " at once"})
}

// whyNotReady says why the router should get no new clients. Once there is a table
// the API server may be away for as long as it likes (invariant 5).
func (a *admin) whyNotReady() []string {
	var why []string
	if a.draining.Load() {
		why = append(why, errDraining.Error())
	}
	if a.proxy.router.table() == nil {
		why = append(why, a.whyNoTable()...)
	}
	if used, limit, full := a.fdLimit.usage(); full {
		why = append(why, fmt.Sprintf("clients wait for descriptors: %d of %d are used", used, limit))
	}
	return why
}

// whyNoTable says why there is none yet.
func (a *admin) whyNoTable() (why []string) {
	if missing := a.proxy.router.whyNoOverrides(); missing != "" {
		why = append(why, "no overrides were read yet: "+missing)
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

func (a *admin) metrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	b := bufio.NewWriter(w)
	a.writeMetrics(b)
	b.Flush() // a scraper that left is no error
}

// writeMetrics writes all families, in this order: each component writes its own.
func (a *admin) writeMetrics(w io.Writer) {
	m := metricsWriter{w}
	m.family("router_build_info", "gauge", "Always 1; the labels say which build this is.")
	m.sample("router_build_info", 1, "version", version(), "goversion", runtime.Version())
	m.single("router_ready", "gauge", "1 if /readyz says so.", boolToFloat(len(a.whyNotReady()) == 0))
	counts := a.proxy.relay.counts()
	a.proxy.relay.writeSessionMetrics(m, counts, a.backendOrdinals(counts))
	a.proxy.mover.writeMetrics(m)
	a.proxy.relay.writeByteMetrics(m)
	a.proxy.writeMetrics(m)
	a.fdLimit.writeMetrics(m)
	a.proxy.router.writeMetrics(m)
	if a.replicaWatcher != nil {
		var active ordinals
		if t := a.proxy.router.table(); t != nil {
			active = t.backends
		}
		a.replicaWatcher.writeMetrics(m, active)
	}
	if a.configMaps != nil {
		writeWatchMetrics(m, a.watchers())
		a.configMaps.writeMetrics(m)
	}
	a.logQueue.writeMetrics(m)
	m.single("go_goroutines", "gauge", "Goroutines.", float64(runtime.NumGoroutine()))
	m.single("process_start_time_seconds", "gauge", "Start of the process, in seconds since the epoch.",
		float64(a.started.UnixNano())/float64(time.Second))
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
	Owner     string      `json:"owner,omitempty"` // none if the namespace is refused
	Why       string      `json:"why"`             // one of the why constants
	PodUID    string      `json:"pod,omitempty"`   // uid of the owner's pod, if it is known
	Address   string      `json:"address,omitempty"`
	Ready     bool        `json:"ready"` // it takes a connection now
	Error     string      `json:"error,omitempty"`
	Note      string      `json:"note,omitempty"`
	Table     string      `json:"table"` // the version
	Stamp     string      `json:"stamp"` // what backends get as X-Router-Table
	Rejected  []rejection `json:"rejected,omitempty"`
}

// owner answers GET /owner, for a namespace as clients have it.
func (a *admin) owner(w http.ResponseWriter, r *http.Request) {
	host := a.proxy.router.fromHost
	namespace := r.URL.Query().Get("namespace") // FormValue would read a body
	if host {
		namespace = strings.ToLower(namespace) // as hostNamespace
	}
	if want := namespaceFault(namespace, host); want != "" {
		writeJSON(w, http.StatusBadRequest, map[string]string{
			"error": fmt.Sprintf("/owner?namespace= is %.260q, want %s", namespace, want)})
		return
	}
	t := a.proxy.router.table()
	if t == nil {
		writeJSON(w, http.StatusServiceUnavailable, map[string]string{"error": strings.Join(a.whyNoTable(), "\n")})
		return
	}
	writeJSON(w, http.StatusOK, a.ownership(r.Context(), t, namespace))
}

// ownership looks the namespace up as an upgrade would, and dials its owner.
func (a *admin) ownership(ctx context.Context, t *table, namespace string) ownership {
	o := ownership{Namespace: namespace, Why: t.explain(namespace), Note: overrideKeyFault(namespace), Table: t.version,
		Stamp: t.stamp, Rejected: t.rejectionsOf(namespace)}
	ordinal, ok := t.owner(namespace)
	if !ok {
		return o
	}
	o.Owner = t.name(ordinal)
	o.PodUID = a.proxy.backends.podUID(ordinal)
	o.Address, o.Ready, o.Error = a.probe(ctx, ordinal)
	return o
}

// backendState is one backend in the answer of /backends. One that has no
// namespaces and no sessions is safe to remove.
type backendState struct {
	Name       string `json:"name"`
	Ordinal    int    `json:"ordinal"`
	PodUID     string `json:"pod,omitempty"` // its uid, if that is known
	Address    string `json:"address,omitempty"`
	Ready      bool   `json:"ready"` // it takes a connection now
	Error      string `json:"error,omitempty"`
	Namespaces bool   `json:"namespaces"`         // it owns some
	Overrides  int    `json:"overrides"`          // of these, by overrides
	Sessions   int    `json:"sessions"`           // of this router
	Replaced   int    `json:"replaced,omitempty"` // of these, with a pod that is the backend no more
}

// backends lists the backends that own namespaces, and those that still have
// sessions.
func (a *admin) backends(w http.ResponseWriter, r *http.Request) {
	t := a.proxy.router.table()
	if t == nil {
		writeJSON(w, http.StatusServiceUnavailable, map[string]string{"error": strings.Join(a.whyNoTable(), "\n")})
		return
	}
	counts, overrides := a.proxy.relay.counts(), overridesByBackend(t)
	maps.DeleteFunc(counts, func(ordinal int, n backendCount) bool { return n.open == 0 })
	all := []backendState{}
	for _, ordinal := range a.backendOrdinals(counts) {
		all = append(all, backendState{Name: t.name(ordinal), Ordinal: ordinal, PodUID: a.proxy.backends.podUID(ordinal), Namespaces: t.backends.has(ordinal),
			Overrides: overrides[ordinal], Sessions: counts[ordinal].open, Replaced: counts[ordinal].onOldPod})
	}
	a.probeAll(r.Context(), all)
	writeJSON(w, http.StatusOK, map[string]any{"table": t.version, "stamp": t.stamp, "backends": all})
}

// probeTimeout bounds the dials of one /backends.
const probeTimeout = 10 * time.Second

// probeAll dials all backends, maxConcurrentDials of them at a time.
func (a *admin) probeAll(ctx context.Context, all []backendState) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var dialling sync.WaitGroup
	var next atomic.Int64
	for range min(maxConcurrentDials, len(all)) {
		dialling.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(all)); i = next.Add(1) - 1 {
				all[i].Address, all[i].Ready, all[i].Error = a.probe(ctx, all[i].Ordinal)
			}
		})
	}
	dialling.Wait()
}

// probe dials a backend, and returns its address as far as that is known, whether
// it takes a connection, and why not.
func (a *admin) probe(ctx context.Context, ordinal int) (address string, ready bool, why string) {
	address, err := a.proxy.backends.probe(ctx, ordinal)
	if err != nil {
		return address, false, err.Error()
	}
	return address, true, ""
}

// overridesByBackend returns how many namespaces each backend owns by overrides.
func overridesByBackend(t *table) map[int]int {
	all := map[int]int{}
	for i := range t.index.slots {
		if s := &t.index.slots[i]; s.set != 0 {
			all[t.ordinalOf(s)]++
		}
	}
	return all
}

// backendOrdinals returns the ordinals, in order, of the backends that have
// namespaces and of those that had sessions.
func (a *admin) backendOrdinals(counts map[int]backendCount) []int {
	all := slices.Collect(maps.Keys(counts))
	if t := a.proxy.router.table(); t != nil {
		for i := range t.backends.count {
			all = append(all, t.backends.first+i)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v) // a client that left is no error
}

// maxReplicas is the most backends that a plan may be for.
const maxReplicas = 10_000

// maxPlanBody is the most bytes of a plan's body. A ConfigMap has at most 1 MiB of data
// (https://kubernetes.io/docs/concepts/configuration/configmap/), which is 6.3 MB in
// JSON if each byte of it is escaped.
const maxPlanBody = 8 << 20

// proposal is what POST /plan takes: a ConfigMap as JSON, which need not say its
// Kubernetes namespace, or {"replicas": 6}.
type proposal struct {
	configMap
	Replicas *int `json:"replicas"`
}

// plan says what a change would do: which sessions of this router would move. A
// namespace without sessions is not in it.
type plan struct {
	Table      string        `json:"table"`      // the version that is in force
	Backends   int           `json:"backends"`   // after the change
	Sessions   int           `json:"sessions"`   // that would move
	Namespaces int           `json:"namespaces"` // of these
	Seconds    float64       `json:"seconds"`    // that it would take at least
	Moves      []plannedMove `json:"moves"`
	Rejected   int           `json:"rejected"`             // entries that would be rejected
	Rejections []string      `json:"rejections,omitempty"` // the first of them
}

// plannedMove is the sessions of one namespace that would go from a backend to
// another. There may be two of a namespace while it moves already.
type plannedMove struct {
	Namespace string `json:"namespace"`
	From      string `json:"from"`
	To        string `json:"to"`
	Sessions  int    `json:"sessions"`
}

// plan answers POST /plan, which changes nothing.
func (a *admin) plan(w http.ResponseWriter, r *http.Request) {
	t := a.proxy.router.table()
	if t == nil {
		writeJSON(w, http.StatusServiceUnavailable, map[string]string{"error": strings.Join(a.whyNoTable(), "\n")})
		return
	}
	next, err := a.readProposal(w, r, t)
	switch tooBig := (&http.MaxBytesError{}); {
	case errors.As(err, &tooBig):
		err = fmt.Errorf("a body of more than %d bytes", tooBig.Limit)
		writeJSON(w, http.StatusRequestEntityTooLarge, map[string]string{"error": err.Error()})
	case err != nil:
		writeJSON(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
	default:
		writeJSON(w, http.StatusOK, a.planMoves(t, next))
	}
}

// readProposal reads the proposal that r has, and returns the table that would be in
// force after it, now being the one that is.
func (a *admin) readProposal(w http.ResponseWriter, r *http.Request, current *table) (*table, error) {
	if r.ContentLength > maxPlanBody {
		w.Header().Set("Connection", "close") // not to read the body
		return nil, &http.MaxBytesError{Limit: maxPlanBody}
	}
	size := r.ContentLength
	if size < 0 { // not known
		size = maxPlanBody
	}
	body := bytes.NewBuffer(make([]byte, 0, size+bytes.MinRead)) // so that it never grows
	var p proposal
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, maxPlanBody))
	if err == nil {
		err = json.Unmarshal(body.Bytes(), &p)
	}
	if err != nil {
		err = fmt.Errorf("the body is no JSON of a ConfigMap or {\"replicas\": number}: %w", err)
	}
	return p.table(current, err)
}

// table returns the table that would be in force after the proposal, now being
// the one that is.
func (p *proposal) table(current *table, err error) (*table, error) {
	backends, sources := current.backends, slices.Clone(current.sources)
	switch {
	case err != nil:
		return nil, err
	case p.Replicas != nil && p.Kind != "":
		return nil, fmt.Errorf("a %.60s and replicas %d, want one of them", p.Kind, *p.Replicas)
	case p.Replicas != nil && (*p.Replicas < 1 || *p.Replicas > maxReplicas):
		return nil, fmt.Errorf("replicas %d, want 1 to %d", *p.Replicas, maxReplicas)
	case p.Replicas != nil:
		backends.count = *p.Replicas
	case p.Kind != "ConfigMap":
		return nil, fmt.Errorf("kind %.60q, want ConfigMap, or {\"replicas\": number}", p.Kind)
	default:
		i := slices.IndexFunc(sources, p.matches)
		if i < 0 {
			return nil, fmt.Errorf("%s is not among the sources of overrides: %s", p.id(), sourceNames(sources))
		}
		sources[i] = sourceContent{id: sources[i].id, version: "proposed", overrides: &p.Data}
	}
	return current.with(backends, sources), nil
}

// matches reports whether the ConfigMap that is proposed is of this source.
func (p *proposal) matches(src sourceContent) bool {
	id := p.id()
	if id.namespace == "" {
		id.namespace = src.id.namespace
	}
	return id == src.id
}

// sourceNames names the sources.
func sourceNames(sources []sourceContent) string {
	var all []string
	for _, src := range sources {
		all = append(all, src.id.String())
	}
	return strings.Join(all, ", ")
}

// planMoves says what next would do to the sessions.
func (a *admin) planMoves(current, next *table) *plan {
	p := &plan{Table: current.version, Backends: next.backends.count, Moves: []plannedMove{}}
	moving := a.proxy.relay.filter(func(s *session) bool {
		owner, ok := next.owner(s.namespace)
		return ok && owner != s.backend
	})
	p.Sessions = len(moving)
	slices.SortFunc(moving, func(a, b *session) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.backend, b.backend))
	})
	for i, s := range moving {
		if i > 0 && s.namespace == moving[i-1].namespace && s.backend == moving[i-1].backend {
			p.Moves[len(p.Moves)-1].Sessions++
			continue
		}
		if i == 0 || s.namespace != moving[i-1].namespace {
			p.Namespaces++
		}
		owner, _ := next.owner(s.namespace)
		p.Moves = append(p.Moves, plannedMove{Namespace: s.namespace, From: next.name(s.backend), To: next.name(owner), Sessions: 1})
	}
	p.Seconds = float64(p.Sessions) * a.proxy.mover.pace.interval.Seconds()
	for i := range next.sources {
		for bad := range next.rejections(i) {
			if p.Rejected++; p.Rejected <= maxExamples {
				p.Rejections = append(p.Rejections, fmt.Sprintf("%s, keeps %s", bad, bad.Previous))
			}
		}
	}
	return p
}
