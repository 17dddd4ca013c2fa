package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"
)

// statefulSet holds the fields that the router reads of a StatefulSet
// (https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/stateful-set-v1/).
type statefulSet struct {
	apiObject
	Spec struct {
		Replicas int `json:"replicas"` // 1 if it is not set
		Ordinals struct {
			Start int `json:"start"`
		} `json:"ordinals"`
	} `json:"spec"`
	Status struct {
		ObservedGeneration int64 `json:"observedGeneration"` // of the spec that the rest is about
		Replicas           int   `json:"replicas"`           // pods, also those that are to be deleted
		ReadyReplicas      int   `json:"readyReplicas"`
	} `json:"status"`
	Cordon string `json:"-"` // the annotation cordonAnnotation
}

// UnmarshalJSON sets the default of spec.replicas, and Cordon. More than maxReplicas count as
// maxReplicas.
func (s *statefulSet) UnmarshalJSON(b []byte) error {
	type plain statefulSet
	s.Spec.Replicas = 1
	if err := json.Unmarshal(b, (*plain)(s)); err != nil {
		return err
	}
	s.Spec.Replicas = min(s.Spec.Replicas, maxReplicas)
	var object struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	err := json.Unmarshal(b, &object)
	s.Cordon = object.Metadata.Annotations[cordonAnnotation]
	return err
}

// specID identifies the spec. The API server increases the generation when the spec
// changes, not when annotations or the status change
// (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/object-meta/).
func (s *statefulSet) specID() string {
	return fmt.Sprintf("%s/%d", s.Metadata.UID, s.Metadata.Generation)
}

// withoutScaledIn returns the backends without those that are scaled in. A StatefulSet that is
// scaled to zero limits nothing: its pods come back. Nor does one whose spec.ordinals.start has
// changed: see afterStart.
func (s *statefulSet) withoutScaledIn(b ordinalRange) ordinalRange {
	if s.Spec.Replicas > 0 && b.first == s.Spec.Ordinals.Start {
		b.count = min(b.count, s.Spec.Replicas)
	}
	return b
}

// grow returns the backends that own namespaces if those of b do: these, and after them all that
// are ready, up to the first one that is not.
func (s *statefulSet) grow(b ordinalRange, ready func(ordinal int) bool) ordinalRange {
	for b.count < s.Spec.Replicas && ready(b.first+b.count) {
		b.count++
	}
	return b
}

// afterStart returns the backends that own namespaces after those of b, if spec.ordinals.start has
// changed: from there on as many, and all of b that the StatefulSet keeps.
func (s *statefulSet) afterStart(b ordinalRange) ordinalRange {
	next := ordinalRange{first: s.Spec.Ordinals.Start}
	next.count = min(s.Spec.Replicas, max(b.count, b.first+b.count-next.first))
	return next
}

// versionedRange says which backends own namespaces, and for which version of the StatefulSet's
// spec. It is stored for other routers. The number of ready pods does not say that. With 5 of 6
// pods ready, a set may grow from 4 and wait for backend-5, or have 6 backends of which one
// restarts. It is immutable.
type versionedRange struct {
	First      int    `json:"first"` // ordinal; anyFirst if an earlier version of the router has stored it
	Count      int    `json:"count"`
	UID        string `json:"uid"`        // metadata.uid of the StatefulSet
	Generation int64  `json:"generation"` // its metadata.generation
}

// anyFirst is the First of a versionedRange without one: spec.ordinals.start.
const anyFirst = -1

// UnmarshalJSON sets First to anyFirst if there is none.
func (b *versionedRange) UnmarshalJSON(text []byte) error {
	type plain versionedRange
	b.First = anyFirst
	return json.Unmarshal(text, (*plain)(b))
}

// backends returns the backends of s that own namespaces.
func (b *versionedRange) backends(s *statefulSet) ordinalRange {
	count := min(b.Count, maxReplicas)
	if b.First == anyFirst {
		return ordinalRange{s.Spec.Ordinals.Start, count}
	}
	return ordinalRange{b.First, count}
}

// replaces reports whether b is newer than old, which may be nil. For one version of the
// StatefulSet's spec the first ordinal is that of the spec, and the count only grows, so a router
// that has seen only an older version replaces nothing. If b has another UID, the caller knows from
// a LIST that b is newer.
func (b *versionedRange) replaces(old *versionedRange) bool {
	switch {
	case old == nil || b.UID != old.UID:
		return true
	case b.Generation != old.Generation:
		return b.Generation > old.Generation
	}
	return b.First != old.First || b.Count > old.Count
}

// isOf reports whether b has backends of the StatefulSet. A nil b is of none.
func (b *versionedRange) isOf(s *statefulSet) bool {
	return b != nil && b.UID == s.Metadata.UID
}

// replicaWatcher follows the StatefulSet, and decides how many backends own namespaces:
//
//   - scaled in: the namespaces move before the pods are gone;
//   - scaled out: a backend gets namespaces when it is ready for the first time, and all
//     before it are;
//   - a pod that restarts, or fails for ever, changes nothing;
//   - scaled to zero: the number stays;
//   - spec.ordinals.start changes: they stay until the new ones are ready, or all old ones that go
//     are gone or being deleted.
//
// Routers that share a hand-off store the range in the same object. The range in
// force depends only on the stored one and on the StatefulSet as it is now. So all
// routers that have seen the same versions agree, also one that has just started and one
// whose watch missed a version (invariant 2). If no range is stored yet, what this router
// finds ready counts at once. Else it is only what the router wants to be stored. A
// stored range that is lost stays in force, and the router wants it again.
//
// A router that is alone keeps the range in its memory. It begins with all of
// spec.replicas, so that routers that start together agree.
//
// An annotation of the StatefulSet lists the backends that are cordoned. Text that is no
// such list changes nothing: the last list stays. A router that starts then does not know
// that list, which other routers may have (invariant 3). If all share the stored range, and
// so a hand-off, it begins without a cordon: it serves once no other router has the list.
// Else it knows no backends.
type replicaWatcher struct {
	// Static after construction.
	watcher           *watcher[statefulSet]
	endpoints         *endpointWatcher
	shared            bool             // routers share the stored range
	onBackendsChanged func(backendSet) // see newReplicaWatcher
	onWantedRange     func()           // see newReplicaWatcher
	confirmWakeup     wakeup           // of confirmStored
	log               *slog.Logger
	// onCordonRejected is called with each new reason why the annotation is not in force. It
	// must not block.
	onCordonRejected func(o apiObject, why string)

	// Owned by run.
	lastWantedRange *versionedRange // what wantedRange returned last
	cordonRejected  string          // what whyCordonRejected returned last; "" for nothing

	// Guarded by mu.
	mu                sync.Mutex
	latest            *statefulSet    // nil before the first LIST; if deleted, the last version
	absent            bool            // it does not exist
	storedRangeIsRead bool            // setStoredRange was called
	storedRange       *versionedRange // the last one that setStoredRange got, if it was not nil
	// inForce is the range in force: the last one of the StatefulSet latest, from
	// setStoredRange if routers share it, else this router's own. If there was none, it is nil
	// or that of another StatefulSet, which is not used.
	inForce      *versionedRange
	confirmation storedConfirmation
	// listedCordon is the last valid list of the annotation. If cordonIsRead is false, there
	// was none yet. cordonError says what is wrong with the annotation now; nil if nothing is.
	listedCordon cordon
	cordonIsRead bool
	cordonError  error
}

// backendSet says which backends own namespaces, and which are cordoned.
type backendSet struct {
	ordinalRange
	listedCordon cordon // also with others than these backends
	specID       string // of the StatefulSet
}

// isSame reports whether the backends are those of other, and the same are cordoned.
func (s *backendSet) isSame(other *backendSet) bool {
	return s.ordinalRange == other.ordinalRange && slices.Equal(s.listedCordon, other.listedCordon)
}

// storedConfirmation says that a LIST that began when stored was known returned the StatefulSet
// with this uid and generation.
type storedConfirmation struct {
	stored     versionedRange
	uid        string
	generation int64
}

// newReplicaWatcher returns a replicaWatcher of the StatefulSet of endpoints. The caller
// runs its watcher, run and confirmStored. run calls onBackendsChanged with the backends that own
// namespaces, at least one, each time that they or their cordon may have changed.
//
// If onWantedRange is nil, the router is alone. Else all routers share a stored range, which
// setStoredRange gives to this router: before that, no backends are known. run calls
// onWantedRange each time that wantedRange returns something else. One call of
// onBackendsChanged or onWantedRange ends before the next one. No lock is held then.
func newReplicaWatcher(client kubeClient, kubeNamespace string, endpoints *endpointWatcher,
	onBackendsChanged func(backendSet), onWantedRange func(), log *slog.Logger) *replicaWatcher {
	r := &replicaWatcher{
		endpoints: endpoints, shared: onWantedRange != nil,
		onBackendsChanged: onBackendsChanged, onWantedRange: onWantedRange, confirmWakeup: newWakeup(), log: log,
		onCordonRejected: func(apiObject, string) {},
	}
	r.watcher = &watcher[statefulSet]{
		kube: &client, path: "/apis/apps/v1/namespaces/" + kubeNamespace + "/statefulsets",
		kind: "StatefulSet", kubeNamespace: kubeNamespace, name: endpoints.statefulSet,
		meta:  func(s *statefulSet) *apiObject { return &s.apiObject },
		apply: r.apply, relistWanted: newWakeup(), log: log,
	}
	return r
}

// apply handles a new version of the StatefulSet. A StatefulSet that was deleted does not
// change the number of backends.
func (r *replicaWatcher) apply(set map[string]*statefulSet) {
	s := set[r.watcher.name]
	r.mu.Lock()
	r.absent = s == nil
	if s != nil {
		r.latest = s
		r.readCordon()
		r.updateInForce()
	}
	r.mu.Unlock()
	if s == nil {
		r.log.Warn("StatefulSet not found; keeping the last number of backends",
			"object", r.watcher.String())
		return
	}
	r.wake()
}

// readCordon reads the annotation of the latest StatefulSet. The caller holds r.mu.
func (r *replicaWatcher) readCordon() {
	list, err := parseCordon(r.latest.Cordon)
	if r.cordonError = err; err == nil {
		r.listedCordon, r.cordonIsRead = list, true
	}
}

// lastCordon returns the last valid list of the annotation. known is false if there was none.
func (r *replicaWatcher) lastCordon() (list cordon, known bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.listedCordon, r.cordonIsRead
}

// whyCordonRejected says in words why the annotation is not in force, or "".
func (r *replicaWatcher) whyCordonRejected() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	inForce, all := r.listedCordon.among(r.backendRange())
	switch {
	case r.cordonError != nil && !r.cordonIsRead:
		return fmt.Sprintf("the annotation %s is %v", cordonAnnotation, r.cordonError)
	case r.cordonError != nil && len(inForce) == 0:
		return fmt.Sprintf("the annotation %s is %v; no backend is cordoned",
			cordonAnnotation, r.cordonError)
	case r.cordonError != nil:
		return fmt.Sprintf("the annotation %s is %v; in force: %.200s",
			cordonAnnotation, r.cordonError, inForce.String())
	case all:
		return fmt.Sprintf("the annotation %s has all backends; no backend is cordoned",
			cordonAnnotation)
	}
	return ""
}

// setStoredRange says which range the object of the hand-off has, that all routers share; nil
// if it has none. It does not block, and any goroutine may call it.
func (r *replicaWatcher) setStoredRange(b *versionedRange) {
	r.mu.Lock()
	same := r.storedRangeIsRead && (b == nil || r.storedRange != nil && *b == *r.storedRange)
	r.storedRangeIsRead = true
	if b != nil && !same {
		r.storedRange = b
		r.updateInForce()
	}
	r.mu.Unlock()
	if !same {
		r.wake()
	}
}

// wake wakes run and confirmStored.
func (r *replicaWatcher) wake() {
	r.endpoints.changed.notify()
	r.confirmWakeup.notify()
}

// updateInForce makes the newest range the one in force. The caller holds r.mu.
func (r *replicaWatcher) updateInForce() {
	switch {
	case r.latest == nil:
	case r.shared && r.storedRange.isOf(r.latest):
		r.inForce = r.storedRange
	case !r.shared:
		if next := r.nextRange(); next != nil {
			r.inForce = next
		}
	}
}

// backendRange returns the backends that own namespaces. The count is 0 if it is not known,
// or if a StatefulSet without a stored range has no replicas. The caller holds r.mu.
func (r *replicaWatcher) backendRange() (b ordinalRange) {
	s := r.latest
	if s == nil || r.shared && !r.storedRangeIsRead {
		return ordinalRange{}
	}
	switch {
	case r.inForce.isOf(s):
		return s.withoutScaledIn(r.inForce.backends(s))
	case !r.shared:
		b.count = s.Spec.Replicas
	case r.endpoints.hasAnswer():
		ready := s.grow(ordinalRange{first: s.Spec.Ordinals.Start}, r.readyToOwn)
		b.count = min(s.Spec.Replicas, max(1, ready.count))
	}
	b.first = s.Spec.Ordinals.Start
	return b
}

// nextRange returns the backends that can own namespaces now: what afterStart and grow make of
// those that do. It is nil if these are not known. The caller holds r.mu.
func (r *replicaWatcher) nextRange() *versionedRange {
	s, b := r.latest, r.backendRange()
	if b.count == 0 {
		return nil
	}
	if b.first != s.Spec.Ordinals.Start {
		next := s.afterStart(b)
		if !r.mayChangeStart(b, next) {
			return r.inForce // as long as nothing changes, also its generation
		}
		b = next
	}
	b = s.grow(b, r.readyToOwn)
	return &versionedRange{b.first, b.count, s.Metadata.UID, s.Metadata.Generation}
}

// mayChangeStart reports whether the backends of next may own namespaces in place of those of
// old, since spec.ordinals.start has changed: they are ready, or all old ones that the
// StatefulSet drops are gone or being deleted. With podManagementPolicy: Parallel it deletes these at
// once, else when the new ones are ready. The caller holds r.mu.
func (r *replicaWatcher) mayChangeStart(old, next ordinalRange) bool {
	s := r.latest
	if _, known := r.endpoints.isReady(next.first); !known {
		return r.endpoints.hasAnswer() && next.count > 0 &&
			s.Status.ObservedGeneration >= s.Metadata.Generation && // else the status is that of the old pods
			s.Status.Replicas <= s.Spec.Replicas && s.Status.ReadyReplicas >= next.count
	}
	isReady := func(ordinal int) bool { ready, _ := r.endpoints.isReady(ordinal); return ready }
	allReady, drops, oldLives := true, false, false
	for ordinal := next.first; ordinal < next.first+next.count; ordinal++ {
		isOld := old.has(ordinal) && ordinal < old.first+s.Spec.Replicas // else it may have been scaled in
		allReady = allReady && (isOld || isReady(ordinal))
	}
	for ordinal := old.first; ordinal < old.first+old.count; ordinal++ {
		if !next.has(ordinal) {
			drops, oldLives = true, oldLives || r.endpoints.hasPod(ordinal)
		}
	}
	return next.count > 0 && (allReady || drops && !oldLives)
}

// wantedRange returns the range that should be stored, which may be the one that is. It is
// nil if this router does not know. Any goroutine may call it.
//
// The stored range may be newer than what this router sees, or belong to something that
// is lost: to a StatefulSet that was deleted, or to a spec from before etcd was restored.
// Only a LIST can tell (confirmStored), and before it the router wants nothing. While the stored
// range has a newer generation than the spec that this router sees, only one with a still
// newer generation replaces it.
func (r *replicaWatcher) wantedRange() *versionedRange {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.nextRange()
	if next == nil || !r.isStoredAhead() {
		return next
	}
	switch {
	case r.confirmation != r.wantedConfirmation():
		return nil
	case r.storedRange.UID != next.UID:
		return next
	case r.storedRange.backends(r.latest) != next.backends(r.latest):
		return &versionedRange{next.First, next.Count, next.UID, r.storedRange.Generation + 1}
	}
	return r.storedRange
}

// isStoredAhead reports whether the stored range is of another StatefulSet than the
// latest, or of a later spec. The caller holds r.mu.
func (r *replicaWatcher) isStoredAhead() bool {
	return r.latest != nil && r.storedRange != nil &&
		(!r.storedRange.isOf(r.latest) || r.storedRange.Generation > r.latest.Metadata.Generation)
}

// wantedConfirmation returns the confirmation that the latest StatefulSet is not older than the
// stored range. The caller holds r.mu.
func (r *replicaWatcher) wantedConfirmation() storedConfirmation {
	m := r.latest.Metadata
	return storedConfirmation{*r.storedRange, m.UID, m.Generation}
}

// run calls onBackendsChanged and onWantedRange until ctx ends: see newReplicaWatcher.
func (r *replicaWatcher) run(ctx context.Context) {
	for {
		if next, known := r.nextBackendSet(); known {
			r.onBackendsChanged(next)
		}
		r.announceCordonRejected()
		if r.shared {
			r.announceWantedRange()
		}
		select {
		case <-ctx.Done():
			return
		case <-r.endpoints.changed:
		}
	}
}

// nextBackendSet returns the backends that own namespaces now. known is false if they, or
// which are cordoned, are not known.
func (r *replicaWatcher) nextBackendSet() (s backendSet, known bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.updateInForce()
	if s.ordinalRange = r.backendRange(); s.count == 0 || !r.cordonIsRead && !r.shared {
		return s, false
	}
	s.listedCordon, s.specID = r.listedCordon, r.latest.specID()
	return s, true
}

// announceCordonRejected logs why the annotation is not in force, and calls
// onCordonRejected, if that is another reason than before.
func (r *replicaWatcher) announceCordonRejected() {
	why := r.whyCordonRejected()
	if why == r.cordonRejected {
		return
	}
	if r.cordonRejected = why; why != "" {
		r.log.Warn("cordon rejected", "object", r.watcher.String(), "error", why)
		r.onCordonRejected(r.lastStatefulSet().apiObject, why)
	}
}

// announceWantedRange calls onWantedRange if the router wants another range.
func (r *replicaWatcher) announceWantedRange() {
	p := r.wantedRange()
	same := p == r.lastWantedRange || p != nil && r.lastWantedRange != nil && *p == *r.lastWantedRange
	if r.lastWantedRange = p; !same {
		r.onWantedRange()
	}
}

// confirmDelay is how long a stored range may be ahead of the StatefulSet before
// confirmStored lists it. Mostly the watch is only a moment behind.
const confirmDelay = 5 * time.Second

// confirmStored runs until ctx ends. For each stored range that is ahead of the StatefulSet,
// it makes sure by a LIST that the StatefulSet itself is behind, and not only this router's
// copy of it.
func (r *replicaWatcher) confirmStored(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.confirmWakeup:
		}
		for r.missingConfirmation() != (storedConfirmation{}) {
			if sleep(ctx, confirmDelay) != nil {
				return
			}
			r.confirm(ctx)
		}
	}
}

// missingConfirmation returns the confirmation that wantedRange needs and that is missing; zero
// if none is missing. A StatefulSet that does not exist cannot be newer than the stored range.
func (r *replicaWatcher) missingConfirmation() storedConfirmation {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.absent || !r.isStoredAhead() || r.confirmation == r.wantedConfirmation() {
		return storedConfirmation{}
	}
	return r.wantedConfirmation()
}

// confirm lists the StatefulSet, if a confirmation is missing. The LIST confirms if it brings
// the same StatefulSet and the stored range is still the same.
func (r *replicaWatcher) confirm(ctx context.Context) {
	wanted := r.missingConfirmation()
	if wanted == (storedConfirmation{}) {
		return
	}
	select {
	case <-ctx.Done():
	case <-r.watcher.relist():
		if r.missingConfirmation() == wanted {
			r.mu.Lock()
			r.confirmation = wanted
			r.mu.Unlock()
			r.endpoints.changed.notify()
		}
	}
}

// readyToOwn reports whether a backend that owns no namespaces yet can serve them. If the
// EndpointSlices cannot be read, status.readyReplicas says how many backends can. The
// caller holds r.mu.
func (r *replicaWatcher) readyToOwn(ordinal int) bool {
	ready, known := r.endpoints.isReady(ordinal)
	if known || !r.endpoints.hasAnswer() {
		return ready
	}
	return ordinal-r.latest.Spec.Ordinals.Start < r.latest.Status.ReadyReplicas
}

// lastStatefulSet returns the last version of the StatefulSet, nil before the first LIST
// that has it.
func (r *replicaWatcher) lastStatefulSet() *statefulSet {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.latest
}

// writeMetrics writes spec.replicas, and for each backend that owns namespaces whether it
// is ready, and whether it has no namespaces. backends.count is 0 if there is no table.
func (r *replicaWatcher) writeMetrics(m metricsWriter, backends ordinalRange,
	hasNoNamespaces func(ordinal int) bool) {
	if s := r.lastStatefulSet(); s != nil {
		m.single("router_statefulset_replicas", "gauge",
			"Replicas that the StatefulSet should have.", float64(s.Spec.Replicas))
		m.single("router_cordon_rejected", "gauge",
			"1 while the list of cordoned backends is not in force as it is written.",
			boolToFloat(r.whyCordonRejected() != ""))
	}
	if backends.count == 0 {
		return
	}
	family := func(name, help string, is func(ordinal int) bool) {
		sample := m.family(name, "gauge", help)
		for i := range backends.count {
			ordinal := backends.first + i
			sample(boolToFloat(is(ordinal)), "backend", backendName(r.endpoints.statefulSet, ordinal))
		}
	}
	family("router_backend_ready",
		"1 if the backend is ready for new sessions, or if the router does not know.",
		func(ordinal int) bool {
			ready, known := r.endpoints.isReady(ordinal)
			return ready || !known
		})
	family("router_backend_without_namespaces",
		"1 if the backend is cordoned, no override names it, and it keeps no namespace.", hasNoNamespaces)
}

// whyNotReady returns, in words, why the number of backends is not known, or "" if it is.
func (r *replicaWatcher) whyNotReady() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch failure := r.watcher.snapshot().failure; {
	case r.latest != nil && !r.cordonIsRead && !r.shared:
		return fmt.Sprintf("%s: the annotation %s is %v",
			r.watcher.String(), cordonAnnotation, r.cordonError)
	case r.backendRange().count > 0:
		return ""
	case r.latest != nil && r.shared && !r.storedRangeIsRead:
		return "the object of the hand-off has not been read yet"
	case r.latest != nil && r.latest.Spec.Replicas == 0:
		return r.watcher.String() + " has no replicas"
	case r.latest != nil:
		return r.endpoints.watcher.whyNotListed()
	case r.absent:
		return r.watcher.String() + " does not exist"
	case errorClass(failure) == "forbidden":
		return fmt.Sprintf("%s: %v; the Role needs list and watch of statefulsets "+
			"with resourceNames [%s]", r.watcher.String(), failure, r.watcher.name)
	}
	return r.watcher.whyNotListed()
}

// endpointSlice holds the fields that the router reads of an EndpointSlice
// (https://kubernetes.io/docs/reference/kubernetes-api/service-resources/endpoint-slice-v1/).
type endpointSlice struct {
	apiObject
	AddressType string     `json:"addressType"` // IPv4, IPv6 or FQDN
	Endpoints   []endpoint `json:"endpoints"`
}

// endpoint is one address of a pod.
type endpoint struct {
	Addresses []string `json:"addresses"` // all of one pod; the router uses the first
	Hostname  string   `json:"hostname"`  // of the pod; see pod
	TargetRef struct {
		Kind string `json:"kind"`
		Name string `json:"name"`
		UID  string `json:"uid"`
	} `json:"targetRef"`
	Conditions struct {
		Ready       *bool `json:"ready"`       // nil is true
		Serving     *bool `json:"serving"`     // nil is the same as ready
		Terminating *bool `json:"terminating"` // nil is false
	} `json:"conditions"`
}

// pod returns the name of the endpoint's pod: the name in its targetRef, which is unique.
// The hostname comes from the pod's spec, and a copy of the pod has the same one (kubectl
// debug --copy-to). So it counts only if the targetRef names no pod, as in an
// EndpointSlice that somebody has written by hand.
func (e *endpoint) pod() string {
	if e.TargetRef.Kind == "Pod" && e.TargetRef.Name != "" {
		return e.TargetRef.Name
	}
	return e.Hostname
}

// uid returns the uid of the endpoint's pod, or "" if the targetRef names no pod.
func (e *endpoint) uid() string {
	if e.TargetRef.Kind == "Pod" {
		return e.TargetRef.UID
	}
	return ""
}

// isUsable reports whether the router may open new sessions at the endpoint. A
// terminating pod may serve its sessions, but a new session would end with it. ready is
// always true if the Service has publishNotReadyAddresses; serving is then the pod's
// readiness.
func (e *endpoint) isUsable() bool {
	c := e.Conditions
	isFalse := func(condition *bool) bool { return condition != nil && !*condition }
	return !isFalse(c.Ready) && !isFalse(c.Serving) && !e.isTerminating()
}

// isTerminating reports whether the pod is being deleted.
func (e *endpoint) isTerminating() bool {
	return e.Conditions.Terminating != nil && *e.Conditions.Terminating
}

// podAddress holds the addresses of one backend's pod.
type podAddress struct {
	// Static after construction.
	usable      bool   // new sessions may be opened there: see endpoint.isUsable
	terminating bool   // the pod is being deleted
	uid         string // of the pod, "" if not known

	// Guarded by the endpointWatcher's mu.
	addrs      []string // host:port, at least one; the first is dialled next
	dialFailed bool     // a dial of one of them failed
}

// isUsable reports whether new sessions may be opened at the addresses. It is false for nil, a
// backend that is in no EndpointSlice.
func (p *podAddress) isUsable() bool { return p != nil && p.usable }

// podAddresses returns the address of each backend, by ordinal, from all slices. A pod
// may be in several slices: for a moment when Kubernetes moves it from one to another, or
// with an address of each family. An endpoint that is not usable counts only if the
// backend has no usable one: it may be left from the pod's predecessor, and its address
// may belong to another pod by now. All addresses of a backend are those of one pod:
// while slices disagree about the pod, of the first one.
func podAddresses(set map[string]*endpointSlice, statefulSet, port string) (
	addresses map[int]*podAddress) {
	sorted := slices.SortedFunc(maps.Values(set), func(a, b *endpointSlice) int {
		return cmp.Or(cmp.Compare(a.AddressType, b.AddressType),
			cmp.Compare(a.Metadata.Name, b.Metadata.Name))
	})
	addresses = map[int]*podAddress{}
	for _, slice := range sorted {
		for _, e := range slice.Endpoints {
			ordinal, ok := backendOrdinal(statefulSet, e.pod())
			if !ok || len(e.Addresses) == 0 || slice.AddressType == "FQDN" {
				continue
			}
			known := addresses[ordinal]
			if known == nil || !known.usable && e.isUsable() {
				known = &podAddress{usable: e.isUsable(), terminating: e.isTerminating(), uid: e.uid()}
				addresses[ordinal] = known
			}
			addr := net.JoinHostPort(e.Addresses[0], port)
			same := known.usable == e.isUsable() && known.uid == e.uid()
			if same && !slices.Contains(known.addrs, addr) {
				known.addrs = append(known.addrs, addr)
			}
		}
	}
	return addresses
}

// endpointWatcher follows the EndpointSlices of a headless Service. They give the address
// and the readiness of each backend without the caches of DNS: CoreDNS caches for up to
// 30 s that a name does not exist.
//
// DNS gives the addresses before the first LIST of the EndpointSlices, and for ever if
// the router has no right to read them. If the watch fails later (the right was taken
// away, or the API server is down), DNS gives the address of each backend that the
// EndpointSlices call not ready, or whose dial failed.
type endpointWatcher struct {
	// Static after construction.
	client      kubeClient // to copy: a client is for one goroutine
	statefulSet string
	port        string
	watcher     *watcher[endpointSlice]
	dnsBackends *backends
	queues      *dialQueues
	onPods      func(uids map[int]string) // see newEndpointWatcher
	changed     wakeup                    // of replicaWatcher.run
	log         *slog.Logger

	// Guarded by mu.
	mu        sync.Mutex
	addresses map[int]*podAddress // by ordinal, nil before the first LIST that has any
	listed    bool                // a LIST was answered
}

// newEndpointWatcher returns an endpointWatcher of the Service. The caller runs its
// watcher. The watcher calls onPods with the uids of the usable pods, by ordinal, before
// any of them is dialled; a pod without a uid is left out. onPods must not block.
func newEndpointWatcher(client kubeClient, kubeNamespace, statefulSet, service string, port int,
	onPods func(uids map[int]string), log *slog.Logger) *endpointWatcher {
	e := &endpointWatcher{
		client: client, statefulSet: statefulSet, port: strconv.Itoa(port),
		// The pods may be in another Kubernetes namespace than this router. ".svc" keeps the name
		// from being one of the internet (Kubernetes namespaces may be called "dev" or "app").
		dnsBackends: newDNSBackends(0, statefulSet, service+"."+kubeNamespace+".svc", port),
		onPods:      onPods, changed: newWakeup(), log: log,
	}
	e.queues = newDialQueues(e.checkReady)
	e.watcher = &watcher[endpointSlice]{
		kube: &client,
		path: "/apis/discovery.k8s.io/v1/namespaces/" + kubeNamespace + "/endpointslices",
		kind: "EndpointSlice", kubeNamespace: kubeNamespace,
		selector: "kubernetes.io/service-name=" + service,
		meta:     func(s *endpointSlice) *apiObject { return &s.apiObject },
		apply:    e.apply, onFailure: e.readinessChanged, log: log,
	}
	return e
}

// readinessChanged says to all whom it concerns that backends may have become ready, or
// that their addresses may be out of date.
func (e *endpointWatcher) readinessChanged() {
	e.queues.readinessChanged()
	e.changed.notify()
}

// backends returns the backends at the addresses of the pods.
func (e *endpointWatcher) backends() *backends {
	return &backends{
		statefulSet: e.statefulSet,
		queues:      e.queues,
		resolve:     e.resolve,
		invalidate:  e.invalidate,
		podUID:      e.podUID,
		podIsGone:   e.podIsGone,
		close:       e.dnsBackends.close,
	}
}

// apply handles new EndpointSlices. If there is not even an empty one, the Service was
// deleted. That says nothing about the pods, so their addresses stay.
func (e *endpointWatcher) apply(set map[string]*endpointSlice) {
	if len(set) == 0 {
		e.mu.Lock()
		e.listed = true
		e.mu.Unlock()
		e.changed.notify()
		e.log.Warn("EndpointSlices not found; keeping the last addresses",
			"object", e.watcher.String())
		return
	}
	addresses, uids := podAddresses(set, e.statefulSet, e.port), map[int]string{}
	for ordinal, address := range addresses {
		if address.isUsable() && address.uid != "" {
			uids[ordinal] = address.uid
		}
	}
	e.onPods(uids)
	e.mu.Lock()
	e.addresses, e.listed = addresses, true
	e.mu.Unlock()
	e.readinessChanged()
}

// hasAnswer reports whether the API server has said which EndpointSlices there are, or
// failed to.
func (e *endpointWatcher) hasAnswer() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.listed || e.isOutdated()
}

// isReady reports whether the backend is ready. known is false before the first LIST that
// has an EndpointSlice.
func (e *endpointWatcher) isReady(ordinal int) (ready, known bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.addresses[ordinal].isUsable(), e.addresses != nil
}

// hasPod reports whether the backend has a pod that is not being deleted, ready or not.
func (e *endpointWatcher) hasPod(ordinal int) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	address := e.addresses[ordinal]
	return address != nil && !address.terminating
}

// isOutdated reports whether addresses may be out of date, as the watch fails.
func (e *endpointWatcher) isOutdated() bool { return e.watcher.snapshot().unconfirmed }

// checkReady returns why the backend must not be dialled now, or nil if it may be.
func (e *endpointWatcher) checkReady(ordinal int) error {
	if ready, known := e.isReady(ordinal); known && !ready && !e.isOutdated() {
		return e.notReadyError(ordinal)
	}
	return nil
}

func (e *endpointWatcher) notReadyError(ordinal int) error {
	return fmt.Errorf("%s is not ready", backendName(e.statefulSet, ordinal))
}

// resolve returns the host:port of the backend, or an error if the backend is not ready.
func (e *endpointWatcher) resolve(ctx context.Context, ordinal int) (string, error) {
	e.mu.Lock()
	known, address, addr, isDoubtful := e.addresses != nil, e.addresses[ordinal], "", true
	if address.isUsable() {
		addr, isDoubtful = address.addrs[0], address.dialFailed
	}
	e.mu.Unlock()
	switch {
	case !known:
		return e.dnsBackends.resolve(ctx, ordinal)
	case isDoubtful && e.isOutdated():
		return e.resolveByDNS(ctx, ordinal, addr)
	case addr == "":
		return "", e.notReadyError(ordinal)
	}
	return addr, nil
}

// podIsGone asks the API server for the pod with the backend's name, and reports whether
// the answer is that there is none. With an error it does not know. It returns false if there is a
// pod, which may be another one: that has no sessions of the one before.
func (e *endpointWatcher) podIsGone(ctx context.Context, ordinal int) (bool, error) {
	client := e.client
	pod, err := getPod(ctx, &client, e.watcher.kubeNamespace, backendName(e.statefulSet, ordinal))
	return pod == nil && err == nil, err
}

// podUID returns the uid of the pod that resolve finds, or "" if it is not known.
func (e *endpointWatcher) podUID(ordinal int) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	address := e.addresses[ordinal]
	if !address.isUsable() || address.dialFailed && e.isOutdated() {
		return ""
	}
	return address.uid
}

// resolveByDNS returns the host:port of the backend from DNS. If DNS does not answer
// within half of dialTimeout, it returns last, the address from the EndpointSlices,
// unless that is "": a container that restarts keeps its address.
func (e *endpointWatcher) resolveByDNS(ctx context.Context, ordinal int,
	last string) (string, error) {
	dnsCtx, cancel := context.WithTimeout(ctx, dialTimeout/2)
	defer cancel()
	addr, err := e.dnsBackends.resolve(dnsCtx, ordinal)
	if err != nil && last != "" && ctx.Err() == nil {
		return last, nil
	}
	return addr, err
}

// invalidate notes that a dial of the backend failed. The next dial uses its next
// address, if it has several.
func (e *endpointWatcher) invalidate(ordinal int) {
	e.dnsBackends.invalidate(ordinal)
	e.mu.Lock()
	defer e.mu.Unlock()
	if address := e.addresses[ordinal]; address != nil {
		address.addrs = append(address.addrs[1:], address.addrs[0])
		address.dialFailed = true
	}
}
