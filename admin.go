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
	"net/url"
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
	peers          *peers
	certificates   *certificates // nil: clients do not speak TLS
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
		ErrorLog:          httpLog(log),
		ConnState:         noteConnState,
	}
}

// How many requests of each kind run at once. Together they dial at most maxAdminDials
// connections: one for each /owner, maxConcurrentDials for a /backends.
const (
	maxConcurrentPreviews = 1 // a preview takes up to 40 MiB
	maxConcurrentBackends = 1
	maxConcurrentOwners   = 8
	maxConcurrentDials    = maxAdminDials - maxConcurrentOwners

	// Of requests that ask all routers. None of them waits, while it holds a slot of the
	// kinds above, for another router: so routers that ask each other do not wait for
	// each other.
	maxConcurrentAsks        = 8
	maxConcurrentPreviewAsks = 1 // the body of POST /plan is kept meanwhile
)

// handler returns the handler of the admin port. Its limits are its own, so a server has
// one handler.
func (a *admin) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", newPage())
	mux.HandleFunc("GET /healthz", healthz)
	mux.HandleFunc("GET /readyz", a.readyz)
	mux.HandleFunc("GET /metrics", a.metrics)
	owner := limitConcurrency(maxConcurrentOwners, maxAdminConns, a.owner)
	backends := limitConcurrency(maxConcurrentBackends, maxAdminConns, a.backends)
	preview := limitConcurrency(maxConcurrentPreviews, maxWaitingPreviews, a.preview)
	mux.HandleFunc("GET /owner", chooseByAll(owner, a.ownerOfAll, maxConcurrentAsks, maxAdminConns))
	mux.HandleFunc("GET /status", chooseByAll(a.status, a.statusOfAll, maxConcurrentAsks, maxAdminConns))
	mux.HandleFunc("GET /backends", chooseByAll(backends, a.backendsOfAll, maxConcurrentAsks, maxAdminConns))
	mux.HandleFunc("POST /plan",
		chooseByAll(preview, a.previewOfAll, maxConcurrentPreviewAsks, maxWaitingPreviews))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost && r.ContentLength != 0 {
			w.Header().Set("Connection", "close") // so that net/http does not read the body
			writeError(w, http.StatusBadRequest,
				fmt.Sprintf("%.20s must not have a body", r.Method))
			return
		}
		if isProbe := r.URL.Path == "/healthz" || r.URL.Path == "/readyz"; !isProbe && isRebound(r) {
			writeError(w, http.StatusForbidden,
				"the host must be localhost or an address, when it is reached at a loopback address")
			return
		}
		if a.peers.isAskedByUs(r) {
			writeError(w, http.StatusLoopDetected, errOwnAnswer.Error())
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// allRoutersHandler answers a request for all routers. one answers it for this router.
type allRoutersHandler func(w http.ResponseWriter, r *http.Request, one http.HandlerFunc)

// chooseByAll returns a handler that calls all if the query has all=1, else one. count and
// waiting limit the calls of all, as limitConcurrency takes them.
func chooseByAll(one http.HandlerFunc, all allRoutersHandler, count, waiting int) http.HandlerFunc {
	limited := limitConcurrency(count, waiting,
		func(w http.ResponseWriter, r *http.Request) { all(w, r, one) })
	return func(w http.ResponseWriter, r *http.Request) {
		switch value := r.URL.Query().Get("all"); value {
		case "", "0":
			one(w, r)
		case "1":
			limited(w, r)
		default:
			w.Header().Set("Connection", "close") // so that net/http does not read the body
			writeError(w, http.StatusBadRequest,
				fmt.Sprintf("?all= must be 0 or 1 (got %.20q)", value))
		}
	}
}

// askAll asks the other routers q, and meanwhile this one by calling one with r, in this
// goroutine, since only there net/http survives a panic of a handler. It returns their
// answers, this router's first if it has one, and those without one: see decodeReplies. If
// r itself is wrong, or no router has an answer, it answers r as one did, and ok is false.
func askAll[T any](
	a *admin, w http.ResponseWriter, r *http.Request, one http.HandlerFunc, q question,
	isWhole func(*T) bool,
) (all []*T, silent []silentRouter, ok bool) {
	var own responseRecorder
	var others []reply
	var asking sync.WaitGroup
	asking.Go(func() { others = a.peers.ask(r.Context(), q) })
	one(&own, r)
	asking.Wait()
	all, silent = decodeReplies(append([]reply{own.reply(a.proxy.podName)}, others...), isWhole)
	isWrong := own.status >= 400 && own.status < 500
	if isWrong || len(all) == 0 {
		own.writeTo(w)
		return nil, nil, false
	}
	return all, silent, true
}

// responseRecorder is an answer that is kept, and not sent. The zero value has none yet.
type responseRecorder struct {
	header http.Header
	status int // 0 before the first Write or WriteHeader
	body   bytes.Buffer
}

func (m *responseRecorder) Header() http.Header {
	if m.header == nil {
		m.header = http.Header{}
	}
	return m.header
}

// WriteHeader sets the status. Only the first call counts.
func (m *responseRecorder) WriteHeader(status int) { m.status = cmp.Or(m.status, status) }

func (m *responseRecorder) Write(b []byte) (int, error) {
	m.WriteHeader(http.StatusOK)
	return m.body.Write(b)
}

// reply returns the answer as the reply of the router with this name.
func (m *responseRecorder) reply(name string) reply {
	body := m.body.Bytes()
	return reply{name: name, body: body, err: answerError(m.status, body)}
}

// writeTo sends the answer.
func (m *responseRecorder) writeTo(w http.ResponseWriter) {
	maps.Copy(w.Header(), m.header)
	w.WriteHeader(cmp.Or(m.status, http.StatusServiceUnavailable))
	w.Write(m.body.Bytes()) // it fails only if the client is gone
}

func healthz(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }

const (
	maxWaitingPreviews = 4               // previews that wait; their bodies stay in the kernel
	maxQueueTime       = 3 * time.Second // how long a request waits until it runs
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
		select {
		case running <- struct{}{}:
			defer func() { <-running }()
			next(w, r)
		case <-time.After(maxQueueTime):
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
	if a.proxy.tables.table() == nil {
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

// whyNoTable returns why there is no table yet: at least one reason.
func (a *admin) whyNoTable() (why []string) {
	if missing := a.proxy.tables.whyNoOverrides(); missing != "" {
		why = append(why, "no overrides have been read yet: "+missing)
	}
	if a.replicaWatcher != nil {
		if missing := a.replicaWatcher.whyNotReady(); missing != "" {
			why = append(why, "the number of backends is not known yet: "+missing)
		}
	}
	if len(why) == 0 {
		why = append(why, "there is no routing table yet")
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
	m.single("router_build_info", "gauge", "Always 1. The labels have the versions of the router and of Go.",
		1, "version", version(), "goversion", runtime.Version())
	m.single("router_ready", "gauge", "1 if /readyz answers ready.",
		boolToFloat(len(a.whyNotReady()) == 0))
	counts := a.proxy.relay.counts()
	a.proxy.relay.writeSessionMetrics(m, counts, backendOrdinals(a.proxy.tables.table(), counts))
	a.proxy.mover.writeMetrics(m)
	a.writeTopMetrics(m)
	a.proxy.relay.writeByteMetrics(m)
	a.proxy.writeMetrics(m)
	a.fdLimit.writeMetrics(m)
	a.certificates.writeMetrics(m)
	a.proxy.tables.writeMetrics(m)
	if a.replicaWatcher != nil {
		var backends ordinalRange
		if t := a.proxy.tables.table(); t != nil {
			backends = t.backends
		}
		a.replicaWatcher.writeMetrics(m, backends, a.hasNoNamespaces)
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

// watchers returns the watchers of the ConfigMaps with overrides, of the StatefulSet and its
// EndpointSlices, and with -handoff=all of the object of the hand-off.
func (a *admin) watchers() (all []objectWatcher) {
	for _, w := range a.configMaps.watchers {
		all = append(all, w)
	}
	if a.replicaWatcher != nil {
		all = append(all, a.replicaWatcher.watcher, a.replicaWatcher.endpoints.watcher)
	}
	if shared := a.proxy.mover.shared; shared != nil {
		all = append(all, shared.watcher)
	}
	return all
}

// ownership is the answer of /owner.
type ownership struct {
	Namespace        string      `json:"namespace"`
	Key              string      `json:"key,omitempty"`          // of its overrides, if it is another text
	Owner            string      `json:"owner,omitempty"`        // "" if the namespace is refused, or the owner not known
	HeldByStep       int64       `json:"held_by_step,omitempty"` // clients wait until previous is over
	Previous         string      `json:"previous,omitempty"`     // owner until the step is done
	Next             string      `json:"next,omitempty"`         // in the newest table, if it is not the owner yet
	Why              string      `json:"why"`                    // one of the why constants
	HashOwner        string      `json:"hash_owner,omitempty"`   // its owner if that were not cordoned
	PodUID           string      `json:"pod_uid,omitempty"`      // of the owner's pod, if known
	Address          string      `json:"address,omitempty"`
	Ready            bool        `json:"ready"` // the owner takes a connection now
	Error            string      `json:"error,omitempty"`
	Note             string      `json:"note,omitempty"`
	OverridesVersion string      `json:"overrides_version"`
	Stamp            string      `json:"stamp"` // what backends get as X-Router-Table
	Rejected         []rejection `json:"rejected,omitempty"`
	Source           string      `json:"source,omitempty"`       // of the override that is in force
	OverridesIn      []string    `json:"overrides_in,omitempty"` // the sources that have overrides of it, valid or not
	Router           string      `json:"router"`                 // that answers; "" for none
	Sessions         int         `json:"sessions"`               // open, in this router, or with all=1 in all

	// With all=1 only.
	Agree   *bool          `json:"agree,omitempty"` // all that know the owner have the same one
	Routers []routerOwner  `json:"routers,omitempty"`
	Silent  []silentRouter `json:"silent,omitzero"`
}

// routerOwner is the owner of a namespace as one router knows it: see ownership.
type routerOwner struct {
	Name       string `json:"name"` // of the router
	Owner      string `json:"owner,omitempty"`
	HeldByStep int64  `json:"held_by_step,omitempty"`
	Previous   string `json:"previous,omitempty"`
	Next       string `json:"next,omitempty"`
	Why        string `json:"why"`
	Sessions   int    `json:"sessions"`
	Stamp      string `json:"stamp"`
}

// owner answers GET /owner: it looks the namespace up as an upgrade would, and dials its
// owner.
func (a *admin) owner(w http.ResponseWriter, r *http.Request) {
	asked := r.URL.Query().Get("namespace") // FormValue would read a body
	namespace, want := clientNamespace(asked, a.proxy.tables.fromHost)
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
	o.Router, o.Sessions = a.proxy.podName, a.proxy.relay.countOf(namespace)
	if o.Owner != "" {
		o.PodUID = a.proxy.backends.podUID(ordinal)
	}
	if o.Owner != "" && r.URL.Query().Get("dial") != "0" {
		o.Address, o.Ready, o.Error = a.probe(r.Context(), ordinal)
	}
	writeJSON(w, http.StatusOK, o)
}

// isWhole reports whether o has what each router answers.
func (o *ownership) isWhole() bool { return o.Router != "" && o.Namespace != "" }

// ownerOfAll answers GET /owner?all=1. The other routers do not dial the owner.
func (a *admin) ownerOfAll(w http.ResponseWriter, r *http.Request, one http.HandlerFunc) {
	query := url.Values{"namespace": {r.URL.Query().Get("namespace")}, "dial": {"0"}}
	all, silent, ok := askAll(a, w, r, one,
		question{method: http.MethodGet, path: "/owner?" + query.Encode()}, (*ownership).isWhole)
	if !ok {
		return
	}
	known := max(0, slices.IndexFunc(all, func(o *ownership) bool { return o.Owner != "" }))
	sum := *all[known]
	sum.Sessions, sum.Silent = 0, silent
	if sum.Owner != "" && sum.Router != a.proxy.podName && sum.Error == "" {
		sum.Error = "not dialled, as this router does not know the owner"
	}
	owners := map[string]bool{}
	for _, o := range all {
		sum.Sessions += o.Sessions
		if o.Owner != "" || o.Error == "" { // else it does not know the owner, and admits nobody
			owners[o.Owner] = true
		}
		sum.Routers = append(sum.Routers, routerOwner{
			o.Router, o.Owner, o.HeldByStep, o.Previous, o.Next, o.Why, o.Sessions, o.Stamp})
	}
	agree := len(owners) <= 1
	sum.Agree = &agree
	writeJSON(w, http.StatusOK, sum)
}

// status answers GET /status: what this router knows, whether or not it is ready.
func (a *admin) status(w http.ResponseWriter, _ *http.Request) {
	s := newStatus(a.proxy, a.whyNotReady(), a.summary())
	used, limit, _ := a.fdLimit.usage()
	s.addLimit("descriptors", used, limit)
	s.addStatefulSet(a.replicaWatcher)
	if a.configMaps != nil {
		s.addWatches(a.watchers())
	}
	s.Top = a.topStatus()
	writeJSON(w, http.StatusOK, s)
}

// statusOfAll answers GET /status?all=1.
func (a *admin) statusOfAll(w http.ResponseWriter, r *http.Request, one http.HandlerFunc) {
	all, silent, ok := askAll(a, w, r, one,
		question{method: http.MethodGet, path: "/status"}, (*status).isWhole)
	if ok { // always: this router answers
		writeJSON(w, http.StatusOK, sumStatus(all, silent))
	}
}

// summary returns the summary of the newest table. It makes one only if the table is
// another than at the last call.
func (a *admin) summary() *tableSummary {
	t, last := a.proxy.tables.table(), a.lastSummary.Load()
	if last == nil || last.table != t {
		last = newTableSummary(t)
		a.lastSummary.Store(last)
	}
	return last
}

// hasNoNamespaces reports whether the backend is cordoned, no override names it, and it keeps no
// namespace.
func (a *admin) hasNoNamespaces(ordinal int) bool {
	t := a.proxy.tables.table()
	return t != nil && t.backends.has(ordinal) && !t.isHashedTo(ordinal) &&
		a.summary().overrides[ordinal] == 0
}

// tableOrError returns the newest table. Without one it answers 503 and returns nil.
func (a *admin) tableOrError(w http.ResponseWriter) *table {
	t := a.proxy.tables.table()
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
		OverridesVersion: t.overridesVersion, Stamp: t.stamp, Rejected: t.rejectionsOf(namespace),
		OverridesIn: t.sourcesWith(namespace),
	}
	switch key := namespaceKey(namespace); {
	case len(key) > maxNameBytes:
		o.Note = fmt.Sprintf("it cannot have an override: its key would have %d characters, "+
			"and at most %d are allowed", len(key), maxNameBytes)
	case key != namespace:
		o.Key = key
	}
	if source := t.sourceOf(namespace); source != nil {
		o.Source = source.id.String()
	}
	ordinal, ok := t.ownerOf(namespace)
	if ok {
		o.Owner = t.name(ordinal)
	}
	if o.Why == whyCordoned {
		hashed, _ := t.uncordonedOwner(namespace)
		o.HashOwner = t.name(hashed)
	}
	return o, ordinal
}

// addHandoff adds what the hand-off under way says of the namespace, which has this owner
// in the newest table. It returns the owner's ordinal now.
func (a *admin) addHandoff(o *ownership, inTable int, namespace string) (ordinal int) {
	m := a.proxy.mover
	switch now := m.assignmentOf(namespace); {
	case now.state == stateHeld:
		o.HeldByStep, o.Owner = now.step, m.relay.backendName(now.backend)
		if before := m.current.Load().before(namespace); before >= 0 {
			o.Previous = m.relay.backendName(before)
		}
		return now.backend
	case now.state == stateOwned && now.backend != inTable:
		o.Next, o.Owner = o.Owner, m.relay.backendName(now.backend)
		return now.backend
	case now.state == stateNotKnown || now.state == stateNoView:
		o.Next, o.Owner = o.Owner, ""
		o.Error = cmp.Or(m.whyNotReady(), "this router does not know the owner yet")
		return unresolved
	case now.state == stateUnresolved && o.Owner != "":
		o.Next, o.Owner = o.Owner, ""
		o.Error = "its owner is not known until it has moved: clients get 503"
		return unresolved
	}
	return inTable
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
				BytesPerSecond: float64(load.bytes) / look.window.Seconds(),
			}
			if owner := a.proxy.mover.assignmentOf(load.namespace).backend; owner >= 0 {
				n.Owner = a.proxy.relay.backendName(owner)
			}
			all = append(all, n)
		}
		return all
	}
	return topStatus{look.window.Seconds(), list(look.bySessions), list(look.byBytes)}
}

// Which namespaces router_top_sessions has: few, or each tenant would be a series.
const (
	maxTopMetrics  = 10
	minTopSessions = 100 // of this router
)

// writeTopMetrics writes the sessions of the namespaces that have the most.
func (a *admin) writeTopMetrics(m metricsWriter) {
	top := a.topNamespaces.look(a.proxy.relay).bySessions
	if len(top) == 0 || top[0].sessions < minTopSessions {
		return
	}
	sample := m.family("router_top_sessions", "gauge",
		"Open sessions of the namespaces that have the most of them.")
	for _, load := range top[:min(len(top), maxTopMetrics)] {
		if load.sessions >= minTopSessions {
			sample(float64(load.sessions), "ns", load.namespace)
		}
	}
}

// probedBackend is one backend in the answer of /backends. A backend is safe to remove if it
// has no sessions, requests and namespaces, and no change of owners is under way.
type probedBackend struct {
	Name             string `json:"name"`
	Ordinal          int    `json:"ordinal"`
	PodUID           string `json:"pod_uid,omitempty"` // of its pod, if known
	Address          string `json:"address,omitempty"`
	Ready            bool   `json:"ready"` // it takes a connection now
	Error            string `json:"error,omitempty"`
	InTable          bool   `json:"in_table"`                      // it is one of the table's backends, also while cordoned
	Cordoned         bool   `json:"cordoned,omitempty"`            // the hash gives it no namespaces
	Overrides        int    `json:"overrides"`                     // how many namespaces it has by an override, or keeps
	Sessions         int    `json:"sessions"`                      // open in this router
	SessionsOnOldPod int    `json:"sessions_on_old_pod,omitempty"` // of these, with an earlier pod
	SafeToRemove     bool   `json:"safe_to_remove"`                // as far as this router knows
}

// setStatus sets what the status has too, but not Ready: there, nobody has dialled the backend.
func (b *probedBackend) setStatus(s backendStatus) {
	b.Name, b.Ordinal, b.InTable, b.Cordoned = s.Name, s.Ordinal, s.InTable, s.Cordoned
	b.Overrides, b.Sessions, b.SessionsOnOldPod = s.Overrides, s.Sessions, s.SessionsOnOldPod
	b.SafeToRemove = s.SafeToRemove
}

// backends answers GET /backends: the backends of the table, and those that still have sessions,
// requests, or namespaces to release.
func (a *admin) backends(w http.ResponseWriter, r *http.Request) {
	t := a.tableOrError(w)
	if t == nil {
		return
	}
	all := []probedBackend{}
	changing := a.proxy.mover.status().InProgress
	for _, s := range newBackendStatuses(a.proxy, a.summary(), changing) {
		b := probedBackend{PodUID: a.proxy.backends.podUID(s.Ordinal)}
		b.setStatus(s)
		all = append(all, b)
	}
	a.probeAll(r.Context(), all)
	writeJSON(w, http.StatusOK, backendsAnswer{
		Router: a.proxy.podName, OverridesVersion: t.overridesVersion, Stamp: t.stamp, Backends: all})
}

// backendsAnswer is the answer of /backends.
type backendsAnswer struct {
	Router           string          `json:"router"` // that answers
	OverridesVersion string          `json:"overrides_version"`
	Stamp            string          `json:"stamp"`
	Backends         []probedBackend `json:"backends"`

	// With all=1 only.
	Agree   *bool          `json:"agree,omitempty"`   // all that answered have the same table
	Routers []routerState  `json:"routers,omitempty"` // whose sessions are added up
	Silent  []silentRouter `json:"silent,omitzero"`
}

// backendsOfAll answers GET /backends?all=1: as this router does, with the sessions of all.
// The other routers do not dial the backends.
func (a *admin) backendsOfAll(w http.ResponseWriter, r *http.Request, one http.HandlerFunc) {
	var own responseRecorder
	both := func(w http.ResponseWriter, r *http.Request) {
		one(&own, r)
		a.status(w, r)
	}
	all, silent, ok := askAll(a, w, r, both,
		question{method: http.MethodGet, path: "/status"}, (*status).isWhole)
	if !ok {
		return
	}
	answer := backendsAnswer{Router: a.proxy.podName}
	err := answerError(own.status, own.body.Bytes())
	if err == nil {
		err = json.Unmarshal(own.body.Bytes(), &answer)
	}
	if err != nil {
		silent = append(silent, silentRouter{a.proxy.podName, err.Error()})
	}
	if err != nil && len(all) == 1 { // that of this router
		own.writeTo(w)
		return
	}
	if err != nil { // it is silent, and not one that has answered too
		all = all[1:]
	}
	sum := sumStatus(all, silent)
	answer.Agree, answer.Routers, answer.Silent = &sum.Agree, sum.Routers, sum.Silent
	for _, s := range sum.Backends {
		i := slices.IndexFunc(answer.Backends, func(b probedBackend) bool {
			return b.Ordinal == s.Ordinal
		})
		if i < 0 { // only others have sessions of it, or give it namespaces
			i = len(answer.Backends)
			answer.Backends = append(answer.Backends, probedBackend{Ready: s.Ready})
		}
		answer.Backends[i].setStatus(s)
	}
	writeJSON(w, http.StatusOK, answer)
}

// probeTimeout bounds all dials of one /backends.
const probeTimeout = 10 * time.Second

// probeAll dials all backends, maxConcurrentDials at a time, and sets their Address,
// Ready and Error.
func (a *admin) probeAll(ctx context.Context, all []probedBackend) {
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
	next, err := readPreviewRequest(w, r, t)
	if err != nil {
		writePreviewError(w, err)
		return
	}
	next = next.withPrevious(a.proxy.mover.previousOwners())
	writeJSON(w, http.StatusOK, newPreview(a.proxy, t, next))
}

// previewOfAll answers POST /plan?all=1.
func (a *admin) previewOfAll(w http.ResponseWriter, r *http.Request, one http.HandlerFunc) {
	body, err := readPreviewBody(w, r)
	if err != nil {
		writePreviewError(w, err)
		return
	}
	r = r.Clone(r.Context())
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	all, silent, ok := askAll(a, w, r, one,
		question{method: http.MethodPost, path: "/plan", body: body}, (*preview).isWhole)
	if ok {
		writeJSON(w, http.StatusOK, sumPreviews(all, silent, a.proxy.mover.shared != nil))
	}
}

// writePreviewError answers a POST /plan with what is wrong in it.
func writePreviewError(w http.ResponseWriter, err error) {
	status, text := http.StatusBadRequest, err.Error()
	if tooBig, ok := errors.AsType[*http.MaxBytesError](err); ok {
		status = http.StatusRequestEntityTooLarge
		text = fmt.Sprintf("the body has more than %d bytes", tooBig.Limit)
	}
	writeError(w, status, text)
}
