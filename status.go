package main

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"
)

// status is the answer of GET /status: what a router knows, without a dial. A list without
// elements is [] in JSON, and not null.
type status struct {
	Routers     []routerState      `json:"routers"`               // those that answered, by name
	Silent      []silentRouter     `json:"silent"`                // those that did not
	Agree       bool               `json:"agree"`                 // all that answered have the same table
	StatefulSet *statefulSetState  `json:"statefulset,omitempty"` // absent if flags give the backends
	Sources     []sourceState      `json:"sources"`               // of overrides
	Backends    []backendStatus    `json:"backends"`              // by ordinal
	Handoff     handoffStatus      `json:"handoff"`
	Top         topStatus          `json:"top"`
	Receipts    []moveReceipt      `json:"receipts"`   // of moves that are over, newest first
	Rejected    int                `json:"rejected"`   // overrides that are not in force
	Conflicts   int                `json:"conflicts"`  // namespaces whose overrides disagree
	Rejections  []rejectedOverride `json:"rejections"` // the first maxExamples
	Watches     []watchState       `json:"watches"`
	Limits      []limitState       `json:"limits"`
}

// routerState is one router in a status.
type routerState struct {
	Name             string   `json:"name"` // of its pod
	Ready            bool     `json:"ready"`
	WhyNot           []string `json:"why_not,omitempty"` // why it is not ready
	Version          string   `json:"version"`           // of the program
	OverridesVersion string   `json:"overrides_version"` // "" without a table
	Stamp            string   `json:"stamp"`
	Sessions         int      `json:"sessions"`
}

// statefulSetState is the StatefulSet of the backends.
type statefulSetState struct {
	KubeNamespace string `json:"kube_namespace"`
	Name          string `json:"name"`
	Replicas      int    `json:"replicas"`                // that it should have; 0 if that is not known
	FirstOrdinal  int    `json:"first_ordinal,omitempty"` // spec.ordinals.start
	// ReplicasDiffer says that routers see different numbers: Replicas and FirstOrdinal are the largest.
	ReplicasDiffer bool `json:"replicas_differ,omitempty"`
	// Cordon has the last valid list of its annotation, as that is written.
	Cordon string `json:"cordon"`
	// CordonUnknown says that there was no valid list yet: Cordon is empty.
	CordonUnknown bool `json:"cordon_unknown,omitempty"`
	// CordonsDiffer says that routers have different lists: Cordon is one of them.
	CordonsDiffer bool `json:"cordons_differ,omitempty"`
	// CordonRejected says why the annotation is not in force as it is now.
	CordonRejected string `json:"cordon_rejected,omitempty"`
}

// merged returns what s and other, of another router, know together. Each is nil if its router
// watches no StatefulSet.
func (s *statefulSetState) merged(other *statefulSetState) *statefulSetState {
	if s == nil || other == nil {
		return cmp.Or(s, other)
	}
	sum := *s
	sum.Replicas, sum.FirstOrdinal = max(s.Replicas, other.Replicas), max(s.FirstOrdinal, other.FirstOrdinal)
	sum.ReplicasDiffer = s.ReplicasDiffer || other.ReplicasDiffer ||
		min(s.Replicas, other.Replicas) > 0 &&
			(s.Replicas != other.Replicas || s.FirstOrdinal != other.FirstOrdinal)
	switch {
	case s.CordonUnknown:
		sum.Cordon, sum.CordonUnknown = other.Cordon, other.CordonUnknown
	case !other.CordonUnknown && s.Cordon != other.Cordon:
		sum.CordonsDiffer = true
	}
	sum.CordonsDiffer = sum.CordonsDiffer || other.CordonsDiffer
	sum.CordonRejected = cmp.Or(s.CordonRejected, other.CordonRejected)
	return &sum
}

// sourceState is an object with overrides.
type sourceState struct {
	Kind          string `json:"kind"` // as sourceID has it
	KubeNamespace string `json:"kube_namespace,omitempty"`
	Name          string `json:"name"`
	Version       string `json:"version"`
}

// backendStatus is one backend in a status.
type backendStatus struct {
	Name             string `json:"name"`
	Ordinal          int    `json:"ordinal"`
	Ready            bool   `json:"ready"`     // for new sessions, as far as is known
	InTable          bool   `json:"in_table"`  // it is one of the table's backends, also while cordoned
	Cordoned         bool   `json:"cordoned"`  // the hash gives it no namespaces
	Overrides        int    `json:"overrides"` // how many namespaces it has by an override, or keeps
	Sessions         int    `json:"sessions"`
	SessionsOnOldPod int    `json:"sessions_on_old_pod,omitempty"` // of these, with an earlier pod
	MovingIn         int    `json:"moving_in"`                     // sessions that get it as owner
	MovingOut        int    `json:"moving_out"`                    // of its sessions, to others
	// SafeToRemove says that nothing is left that needs the backend, as far as all routers
	// know: see probedBackend.
	SafeToRemove bool `json:"safe_to_remove"`
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
	Seconds    float64        `json:"window_seconds"` // over which bytes are counted
	BySessions []topNamespace `json:"by_sessions"`
	ByBytes    []topNamespace `json:"by_bytes"`
}

// rejectedOverride is a rejected override in a status.
type rejectedOverride struct {
	Namespace string `json:"namespace"` // or the key, if no namespace has this key
	rejection
}

// watchState is a watch of one router.
type watchState struct {
	Router    string    `json:"router"`
	Object    string    `json:"object"`
	State     string    `json:"state"`
	Confirmed time.Time `json:"confirmed,omitzero"` // by the last LIST, event or bookmark
	Failures  int       `json:"failures"`           // cycles in a row
	Error     string    `json:"error,omitempty"`    // of the last cycle, if it failed
}

// limitState is a limit of one router.
type limitState struct {
	Router string `json:"router"`
	Name   string `json:"name"`
	Used   int    `json:"used"`
	Max    int    `json:"max"`
}

// newStatus returns the status of this router, without StatefulSet, Watches and Top, and
// without the limit of descriptors: admin.status adds these. why says why the router is not
// ready.
func newStatus(p *proxy, why []string, summary *tableSummary) *status {
	t, router := summary.table, routerState{
		Name: p.podName, Ready: len(why) == 0, WhyNot: why, Version: version(),
		Sessions: p.relay.size(),
	}
	s := &status{
		Silent: []silentRouter{}, Agree: true, Sources: []sourceState{},
		Handoff: p.mover.status(), Receipts: []moveReceipt{},
		Rejections: []rejectedOverride{}, Watches: []watchState{}, Limits: []limitState{},
	}
	if t != nil {
		router.OverridesVersion, router.Stamp = t.overridesVersion, t.stamp
		s.Rejected, s.Conflicts, s.Rejections = summary.rejected, t.conflicts, summary.examples
		for _, src := range t.sources {
			s.Sources = append(s.Sources, sourceState{
				src.id.kind, src.id.kubeNamespace, src.id.name, src.version})
		}
	}
	s.Routers = []routerState{router}
	s.Receipts = append(s.Receipts, p.mover.finishedMoves()...)
	s.Backends = newBackendStatuses(p, summary, s.Handoff.InProgress)
	s.addLimit("sessions", router.Sessions, p.limits.sessions)
	s.addLimit("pending upgrades", p.pending.inUse(), p.limits.pendingRequests)
	return s
}

// addLimit adds a limit of the router.
func (s *status) addLimit(name string, used, limit int) {
	s.Limits = append(s.Limits, limitState{s.Routers[0].Name, name, used, limit})
}

// addWatches adds the watches of the router.
func (s *status) addWatches(watchers []objectWatcher) {
	for _, w := range watchers {
		now := w.snapshot()
		state := watchState{
			Router: s.Routers[0].Name, Object: w.String(), State: now.state,
			Confirmed: now.confirmed, Failures: now.failures,
		}
		if now.failure != nil {
			state.Error = now.failure.Error()
		}
		s.Watches = append(s.Watches, state)
	}
}

// addStatefulSet adds the StatefulSet that r watches, if r is not nil.
func (s *status) addStatefulSet(r *replicaWatcher) {
	if r == nil {
		return
	}
	list, known := r.lastCordon()
	s.StatefulSet = &statefulSetState{
		KubeNamespace: r.watcher.kubeNamespace, Name: r.watcher.name,
		Cordon: list.String(), CordonUnknown: !known, CordonRejected: r.whyCordonRejected(),
	}
	if set := r.lastStatefulSet(); set != nil {
		s.StatefulSet.Replicas, s.StatefulSet.FirstOrdinal = set.Spec.Replicas, set.Spec.Ordinals.Start
	}
}

// newBackendStatuses returns the backends of the table, and those that still have sessions,
// requests, or namespaces that they were asked to release. changing says that a change of owners
// was under way just before.
func newBackendStatuses(p *proxy, summary *tableSummary, changing bool) []backendStatus {
	// In this order: a flight may become a session, and after a change none begins. With
	// -handoff=off upgrades have no flight, but are pending, until just before they are sessions.
	busy := map[int]bool{} // with other than sessions
	for f := range p.mover.flights.each {
		busy[f.backend] = true
	}
	for ordinal := range p.pending.backends() {
		busy[ordinal] = true
	}
	for ordinal := range p.mover.releases.waits() {
		busy[ordinal] = true
	}
	t, counts := summary.table, p.relay.counts()
	maps.DeleteFunc(counts, func(_ int, n sessionCounts) bool { return n.open == 0 })
	for ordinal := range busy {
		if _, ok := counts[ordinal]; !ok && ordinal >= 0 {
			counts[ordinal] = sessionCounts{}
		}
	}
	in, out := map[int]int{}, map[int]int{}
	if t != nil && (changing || p.mover.queue.size.Load() > 0) { // there are no changes with -handoff=off
		in, out = movingSessions(p.relay, t)
	}
	all := []backendStatus{}
	for _, ordinal := range backendOrdinals(t, counts) {
		n, overrides := counts[ordinal], summary.overrides[ordinal]
		all = append(all, backendStatus{
			Name: p.relay.backendName(ordinal), Ordinal: ordinal,
			Ready:     p.backends.queues.seemsReady(ordinal),
			InTable:   t != nil && t.backends.has(ordinal),
			Cordoned:  t != nil && slices.Contains(t.cordon, ordinal),
			Overrides: overrides, Sessions: n.open, SessionsOnOldPod: n.onOldPod,
			MovingIn: in[ordinal], MovingOut: out[ordinal],
			SafeToRemove: t != nil && !t.isHashedTo(ordinal) && overrides == 0 &&
				n.open == 0 && !busy[ordinal] && !changing,
		})
	}
	return all
}

// backendOrdinals returns the sorted ordinals of the backends of t, which may be nil, and of
// those in counts.
func backendOrdinals(t *table, counts map[int]sessionCounts) []int {
	all := slices.Collect(maps.Keys(counts))
	if t != nil {
		for i := range t.backends.count {
			all = append(all, t.backends.first+i)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// movingSessions returns how many open sessions will go to each backend, and leave it,
// because t gives their namespaces to others.
func movingSessions(r *relay, t *table) (in, out map[int]int) {
	in, out = map[int]int{}, map[int]int{}
	open, _ := r.snapshot()
	for _, s := range open {
		if owner, ok := t.ownerOf(s.namespace); ok && owner != s.backend {
			in[owner]++
			out[s.backend]++
		}
	}
	return in, out
}

// tableSummary has what operators ask of a table, as far as that takes a look at all of its
// overrides. It is immutable.
type tableSummary struct {
	table     *table
	overrides map[int]int // by ordinal: namespaces that each backend has by an override, or keeps
	rejected  int         // overrides
	examples  []rejectedOverride
}

// newTableSummary returns the summary of t, which may be nil.
func newTableSummary(t *table) *tableSummary {
	s := &tableSummary{table: t, overrides: map[int]int{}, examples: []rejectedOverride{}}
	if t == nil {
		return s
	}
	for i := range t.index.slots {
		if slot := &t.index.slots[i]; slot.set != 0 {
			s.overrides[t.ordinalOf(slot)]++
		}
	}
	var examples []rejection
	for i := range t.sources {
		for bad := range t.rejections(i) {
			s.rejected++
			examples = addExample(examples, bad)
		}
	}
	for _, bad := range examples {
		s.examples = append(s.examples, rejectedOverride{bad.namespace, bad})
	}
	return s
}

// handoffStatus says how far a change of owners has come, for /status.
type handoffStatus struct {
	Mode    string   `json:"mode"`              // of -handoff
	Members []string `json:"members,omitempty"` // pods of the routers that share it
	Doing   string   `json:"doing,omitempty"`   // what this router does or waits for
	Step    int64    `json:"step"`              // the last one, in Unix milliseconds or above
	// NoOwners says that this router has no table or no view yet, so that it knows no owners.
	NoOwners bool `json:"no_owners,omitempty"`
	// InProgress says that not all namespaces have the owner of the newest table, or that
	// the last step is not done.
	InProgress bool       `json:"in_progress"`
	Progress   float64    `json:"progress"`         // about the share of namespaces that have it
	ToMove     int64      `json:"sessions_to_move"` // of this router
	Unproven   int64      `json:"unproven"`         // not seen to end in time: router_handoff_unproven_total
	WaitingFor []stepWait `json:"waiting_for"`

	Moving      *moveReceipt `json:"moving,omitempty"` // the move that goes on
	Rate        float64      `json:"rate"`             // sessions per second, 0: no limit
	SecondsLeft float64      `json:"seconds_left"`     // at least, for those of ToMove that the rate counts
}

// stepWait is what a step waits for: a backend, of which this router waits, or a router that has not
// answered, which may be this one. The next step waits for a router that has another table.
type stepWait struct {
	Backend  string  `json:"backend,omitempty"` // "" for a router
	Router   string  `json:"router,omitempty"`  // its pod; "" for a backend
	Sessions int     `json:"sessions"`          // that have not ended yet
	Upgrades int     `json:"upgrades"`          // that it may have, and ended sessions that it has not ended
	Requests int     `json:"requests"`          // plain requests that it may have
	Releases int     `json:"releases"`          // namespaces that it has not released (-release)
	Error    string  `json:"error,omitempty"`   // of the last release, or why the next step waits
	Seconds  float64 `json:"seconds"`           // since the step began, or the router has another table
}

// status returns how far a change of owners has come.
func (m *mover) status() handoffStatus {
	s := handoffStatus{
		Mode: "single", Progress: 1, ToMove: m.queue.size.Load(),
		Unproven:   m.flights.unproven.Load() + m.relay.unproven.Load(),
		WaitingFor: []stepWait{}, Moving: m.moving.Load(),
	}
	if m.moveInterval > 0 {
		s.Rate = 1 / m.moveInterval.Seconds()
	}
	s.SecondsLeft = m.minMoveTime(m.queue.paced.Load()).Seconds()
	switch {
	case m.handoffOff:
		s.Mode = "off"
	case m.shared != nil:
		shared := m.shared.snapshot()
		s.Mode, s.Members, s.Doing = "all", shared.members, shared.doing
		if shared.podErr != nil {
			s.Doing = strings.TrimPrefix(s.Doing+"; "+shared.podErr.Error(), "; ")
		}
	}
	v, t := m.current.Load(), m.tables.table()
	if v == nil || t == nil {
		s.NoOwners = true
		return s
	}
	s.Step = v.step
	if s.InProgress = !v.hasOnlyTable(t.ownersHash) || !v.done; !s.InProgress {
		return s
	}
	s.Progress = v.progress(t)
	s.WaitingFor = append(m.waitingFor(v), m.routerWaits(v)...)
	return s
}

// progress returns about the share of namespaces that have their owner in t, from 0 to 1.
func (v *view) progress(t *table) (share float64) {
	newest := v.newestRecord()
	switch {
	case newest.ownersHash != t.ownersHash, v.allHeld && !v.done:
		return 0
	case len(v.records) == 1:
		return 1
	}
	moved := &newest.before
	if v.done {
		moved = &newest.after
	}
	for i := range t.backends.count {
		share += float64(moved.bound(t.backends.first+i)) / allPlaces / float64(t.backends.count)
	}
	return share
}

// waitingFor returns the backends that v's step waits for, sorted by ordinal.
func (m *mover) waitingFor(v *view) []stepWait {
	waits := []stepWait{}
	if v.done {
		return waits
	}
	count := map[int]*stepWait{}
	of := func(backend int) *stepWait {
		if count[backend] == nil {
			count[backend] = &stepWait{
				Backend: m.relay.backendName(backend), Seconds: time.Since(v.began).Seconds()}
		}
		return count[backend]
	}
	for f := range m.flights.each {
		switch {
		case !m.blocks(v, f):
		case f.cut == nil:
			of(f.backend).Upgrades++
		default:
			of(f.backend).Requests++
		}
	}
	for _, s := range m.misplacedSessions(v) {
		of(s.backend).Sessions++
	}
	for backend, wait := range m.releases.waits() {
		of(backend).Releases = wait.namespaces
		if wait.err != nil {
			of(backend).Error = wait.err.Error()
		}
	}
	for _, backend := range slices.Sorted(maps.Keys(count)) {
		waits = append(waits, *count[backend])
	}
	return waits
}

// routerWaits returns the routers that v's step waits for, sorted by name, and those that the next
// one waits for.
func (m *mover) routerWaits(v *view) (waits []stepWait) {
	if m.shared == nil {
		return nil
	}
	shared := m.shared.snapshot()
	for _, pod := range shared.missing {
		waits = append(waits, stepWait{Router: pod, Seconds: time.Since(v.began).Seconds()})
	}
	for _, pod := range shared.withOtherTable {
		waits = append(waits, stepWait{
			Router: pod, Error: "it has another table", Seconds: time.Since(shared.otherTableSince).Seconds()})
	}
	return waits
}

// writeWaits writes for how long the step of s has waited for each backend and member: 0 if it
// does not wait for it.
func (m *mover) writeWaits(w metricsWriter, s handoffStatus) {
	seconds := map[string]float64{}
	for _, ordinal := range backendOrdinals(m.tables.table(), nil) {
		seconds[m.relay.backendName(ordinal)] = 0
	}
	for _, member := range s.Members {
		seconds[member] = 0
	}
	for _, wait := range s.WaitingFor {
		seconds[wait.Backend+wait.Router] = wait.Seconds
	}
	if len(seconds) == 0 {
		return
	}
	sample := w.family("router_handoff_waiting_seconds", "gauge",
		"For how many seconds a hand-off has waited for this backend, which has to end its "+
			"sessions and requests or to answer a release, or for this router, which has to answer or to get the newest table.")
	for _, name := range slices.Sorted(maps.Keys(seconds)) {
		sample(seconds[name], "for", name)
	}
}

// writeMetrics writes how far a change of owners has come.
func (m *mover) writeMetrics(w metricsWriter) {
	w.single("router_sessions_to_move", "gauge",
		"Open sessions whose owner, or its pod, changed and which have not been closed yet.",
		float64(m.queue.size.Load()))
	w.single("router_moved_sessions_total", "counter",
		"Sessions that the router closed because their owner, or its pod, changed, or because "+
			"it was removed from the hand-off.",
		float64(m.moved.Load()))
	w.single("router_move_cancelled_total", "counter",
		"Sessions that were to move and stayed, because a later change moved them back.",
		float64(m.cancelled.Load()))
	s := m.status()
	w.single("router_handoff_info", "gauge",
		"Always 1. The label has the mode of -handoff.", 1, "mode", s.Mode)
	w.single("router_handoff_in_progress", "gauge",
		"1 while not all namespaces have the owner of the newest table, or a step is not done.",
		boolToFloat(s.InProgress))
	w.single("router_handoff_steps_total", "counter",
		"Steps of hand-offs that are done and have handed over namespaces.", float64(m.stepsDone.Load()))
	m.stepDurations.write(w, "router_handoff_step_duration_seconds",
		"How long the steps of hand-offs that are done held their namespaces.")
	m.writeWaits(w, s)
	w.single("router_handoff_unproven_total", "counter",
		"Upgrades, plain requests and sessions whose end at the backend was not seen in time: "+
			"the backend may still serve them.",
		float64(s.Unproven))
	if m.shared != nil {
		m.shared.writeMetrics(w)
	}
}

// isWhole reports whether s has what each router answers.
func (s *status) isWhole() bool { return len(s.Routers) == 1 && s.Routers[0].Name != "" }

// sumStatus returns the status of all routers: all has the status of each, at least one. It
// adds them to the first one. All of them know the same objects and backends, unless they do
// not agree; so what comes from a table counts once, and what comes from sessions adds up.
func sumStatus(all []*status, silent []silentRouter) *status {
	sum := all[0]
	sum.Silent = silent
	for _, s := range all[1:] {
		sum.Agree = sum.Agree && s.Routers[0].Stamp == sum.Routers[0].Stamp
		sum.Routers = append(sum.Routers, s.Routers...)
		sum.Watches = append(sum.Watches, s.Watches...)
		sum.Limits = append(sum.Limits, s.Limits...)
		sum.StatefulSet = sum.StatefulSet.merged(s.StatefulSet)
		sum.Rejected = max(sum.Rejected, s.Rejected)
		sum.Conflicts = max(sum.Conflicts, s.Conflicts)
		if len(sum.Sources) == 0 {
			sum.Sources = s.Sources
		}
		if len(sum.Rejections) == 0 {
			sum.Rejections = s.Rejections
		}
		sum.Backends = mergeLists(sum.Backends, s.Backends, backendStatus.isSame, (*backendStatus).add)
		sum.Handoff.add(&s.Handoff)
		sum.Receipts = mergeLists(sum.Receipts, s.Receipts, moveReceipt.isSame, (*moveReceipt).add)
		sum.Top.add(&s.Top)
	}
	for i := range sum.Backends {
		sum.Backends[i].SafeToRemove = sum.Backends[i].SafeToRemove && len(silent) == 0
	}
	slices.SortFunc(sum.Backends, func(a, b backendStatus) int { return cmp.Compare(a.Ordinal, b.Ordinal) })
	slices.SortStableFunc(sum.Routers, func(a, b routerState) int {
		return cmp.Compare(a.Name, b.Name)
	})
	slices.SortStableFunc(sum.Receipts, func(a, b moveReceipt) int {
		return b.Began.Compare(a.Began)
	})
	sum.Receipts = sum.Receipts[:min(len(sum.Receipts), maxReceipts)]
	sum.Top.BySessions = sum.Top.BySessions[:min(len(sum.Top.BySessions), topSize)]
	sum.Top.ByBytes = sum.Top.ByBytes[:min(len(sum.Top.ByBytes), topSize)]
	return sum
}

// add adds the namespaces with the most load in another router. One that is in the list of
// only one router counts with what it has there. The lists become longer than topSize: a
// namespace that is small in two routers may be large in a third.
func (t *topStatus) add(other *topStatus) {
	t.Seconds = max(t.Seconds, other.Seconds)
	t.BySessions = mergeLists(t.BySessions, other.BySessions, topNamespace.isSame, (*topNamespace).add)
	slices.SortStableFunc(t.BySessions, func(a, b topNamespace) int {
		return cmp.Compare(b.Sessions, a.Sessions)
	})
	t.ByBytes = mergeLists(t.ByBytes, other.ByBytes, topNamespace.isSame, (*topNamespace).add)
	slices.SortStableFunc(t.ByBytes, func(a, b topNamespace) int {
		return cmp.Compare(b.BytesPerSecond, a.BytesPerSecond)
	})
}

func (n topNamespace) isSame(other topNamespace) bool { return n.Namespace == other.Namespace }

// add adds the load of the same namespace in another router.
func (n *topNamespace) add(other topNamespace) {
	n.Sessions += other.Sessions
	n.BytesPerSecond += other.BytesPerSecond
}

// mergeLists appends the elements of list to sum, or adds them to those of sum that are the
// same.
func mergeLists[T any](sum, list []T, isSame func(a, b T) bool, add func(sum *T, other T)) []T {
	for _, other := range list {
		same := func(one T) bool { return isSame(one, other) }
		if i := slices.IndexFunc(sum, same); i >= 0 {
			add(&sum[i], other)
		} else {
			sum = append(sum, other)
		}
	}
	return sum
}

func (s backendStatus) isSame(other backendStatus) bool { return s.Ordinal == other.Ordinal }

// add adds what another router says of the same backend.
func (s *backendStatus) add(other backendStatus) {
	s.Ready = s.Ready && other.Ready
	s.InTable = s.InTable || other.InTable
	s.Cordoned = s.Cordoned || other.Cordoned
	s.SafeToRemove = s.SafeToRemove && other.SafeToRemove
	s.Overrides = max(s.Overrides, other.Overrides)
	s.Sessions += other.Sessions
	s.SessionsOnOldPod += other.SessionsOnOldPod
	s.MovingIn += other.MovingIn
	s.MovingOut += other.MovingOut
}

// add adds what another router says of its hand-off. A change is under way while it is on
// any router. It has come only as far as on the slowest one.
func (s *handoffStatus) add(other *handoffStatus) {
	for _, member := range other.Members {
		if !slices.Contains(s.Members, member) {
			s.Members = append(s.Members, member)
		}
	}
	s.Doing = cmp.Or(s.Doing, other.Doing)
	s.Step = max(s.Step, other.Step)
	s.NoOwners = s.NoOwners || other.NoOwners
	s.InProgress = s.InProgress || other.InProgress
	s.Progress = min(s.Progress, other.Progress)
	s.ToMove += other.ToMove
	s.Unproven += other.Unproven
	s.WaitingFor = mergeLists(s.WaitingFor, other.WaitingFor, stepWait.isSame, (*stepWait).add)
	if s.Mode == "all" { // they share the rate
		s.SecondsLeft += other.SecondsLeft
	} else {
		s.Rate += other.Rate
		s.SecondsLeft = max(s.SecondsLeft, other.SecondsLeft)
	}
	switch {
	case other.Moving == nil:
	case s.Moving == nil:
		s.Moving = other.Moving
	default:
		s.Moving.add(*other.Moving)
	}
}

func (w stepWait) isSame(other stepWait) bool {
	return w.Backend == other.Backend && w.Router == other.Router
}

// add adds what another router waits for at the same backend or router.
func (w *stepWait) add(other stepWait) {
	w.Sessions += other.Sessions
	w.Upgrades += other.Upgrades
	w.Requests += other.Requests
	w.Releases += other.Releases
	w.Error = cmp.Or(w.Error, other.Error)
	w.Seconds = max(w.Seconds, other.Seconds)
}

// sameMoveTime is how far apart routers may begin and end the same move: their clocks
// differ, and so do their shares of it.
const sameMoveTime = 5 * time.Second

// isSame reports whether r and other are receipts of two routers' moves to the same table.
func (r moveReceipt) isSame(other moveReceipt) bool {
	first, second := r, other
	if second.Began.Before(first.Began) {
		first, second = second, first
	}
	ended := first.Began.Add(time.Duration(first.Seconds * float64(time.Second)))
	return r.OverridesVersion == other.OverridesVersion && r.OwnersHash == other.OwnersHash &&
		!second.Began.After(ended.Add(sameMoveTime))
}

// add adds the receipt of another router's move to the same table. A namespace with sessions
// of both counts once if both have all their namespaces in Examples, else twice.
func (r *moveReceipt) add(other moveReceipt) {
	isWhole := len(r.Examples) == r.Namespaces && len(other.Examples) == other.Namespaces
	if other.Began.Before(r.Began) {
		r.Began = other.Began
	}
	r.Planned += other.Planned
	r.Moved += other.Moved
	r.Namespaces += other.Namespaces
	r.Examples = slices.Concat(r.Examples, other.Examples)
	slices.Sort(r.Examples)
	r.Examples = slices.Compact(r.Examples)
	if isWhole {
		r.Namespaces = len(r.Examples)
	}
	r.Examples = r.Examples[:min(len(r.Examples), maxMovedNames)]
	r.Cut += other.Cut
	r.Cancelled += other.Cancelled
	r.Seconds = max(r.Seconds, other.Seconds)
	r.HeldSeconds = max(r.HeldSeconds, other.HeldSeconds)
}
