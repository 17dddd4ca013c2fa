package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
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
		ReadyReplicas int `json:"readyReplicas"`
	} `json:"status"`
	annotation string // the value of activeCountKey; "" if there is none
}

// activeCountKey is the StatefulSet's annotation in which the routers keep the active
// count: how many backends own namespaces.
const activeCountKey = "router/backends"

// UnmarshalJSON sets the default of spec.replicas, and keeps one annotation of all.
func (s *statefulSet) UnmarshalJSON(b []byte) error {
	type plain statefulSet
	var annotated struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	s.Spec.Replicas = 1
	err := cmp.Or(json.Unmarshal(b, (*plain)(s)), json.Unmarshal(b, &annotated))
	s.annotation = annotated.Metadata.Annotations[activeCountKey]
	return err
}

// activeCount returns the number in the annotation, at least 1, or 0 if there is none.
func (s *statefulSet) activeCount() int {
	n, err := strconv.Atoi(s.annotation)
	if err != nil || n < 1 {
		return 0
	}
	return n
}

// backends returns the backends that own namespaces. The result depends only on the
// object as it is now. So routers that have seen the same version agree, also a router
// that has just started and a router whose watch missed a version (invariant 2).
//
// The number of ready pods does not say how many backends own namespaces. With 5 of 6
// pods ready, a set may grow from 4 and wait for backend-5, or have 6 backends of which
// one restarts. The active count distinguishes the two. It grows when a backend is ready
// for the first time, and spec.replicas limits it at once:
//
//   - scaled in: the namespaces move before the pods are gone;
//   - scaled out: a backend gets namespaces when it can serve them;
//   - a pod that restarts, or fails for ever, changes nothing;
//   - scaled to zero: the active count stays. If there is none, there are no backends;
//   - no active count, as no router has the right to write it: all of spec.replicas.
func (s *statefulSet) backends() ordinals {
	count := s.Spec.Replicas
	if active := s.activeCount(); active > 0 && (count == 0 || active < count) {
		count = active
	}
	return ordinals{s.Spec.Ordinals.Start, count}
}

// revision identifies the spec. The API server increases the generation when the spec
// changes, not when annotations or the status change
// (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/object-meta/).
func (s *statefulSet) revision() string {
	return fmt.Sprintf("%s/%d", s.Metadata.UID, s.Metadata.Generation)
}

// nextActiveCount returns what the active count should be: the backends that own
// namespaces, and those after them that are ready, up to the first that is not.
func (s *statefulSet) nextActiveCount(ready func(ordinal int) bool) int {
	b := s.backends()
	for b.count < s.Spec.Replicas && ready(b.first+b.count) {
		b.count++
	}
	return b.count
}

// replicaWatcher follows the StatefulSet, which says how many backends own namespaces,
// and keeps its active count up to date.
type replicaWatcher struct {
	// Static after construction.
	watcher   *watcher[statefulSet]
	patcher   *kubeClient // writes the active count; used by keepActiveCount only
	endpoints *endpointWatcher
	onResize  func(backends ordinals, revision string) // see newReplicaWatcher
	log       *slog.Logger

	// Guarded by mu.
	mu     sync.Mutex
	latest *statefulSet // nil before the first LIST; if it is deleted, the last version
	absent bool         // it does not exist
}

// newReplicaWatcher returns a replicaWatcher of the StatefulSet of endpoints. The caller
// runs its watcher and keepActiveCount. The watcher calls onResize for each version of
// the StatefulSet that has at least one backend, one call at a time.
func newReplicaWatcher(client kubeClient, namespace string, endpoints *endpointWatcher,
	onResize func(backends ordinals, revision string), log *slog.Logger) *replicaWatcher {
	patcher := client
	patcher.patch = true
	r := &replicaWatcher{
		patcher: &patcher, endpoints: endpoints, onResize: onResize, log: log,
	}
	r.watcher = &watcher[statefulSet]{
		kube: &client, path: "/apis/apps/v1/namespaces/" + namespace + "/statefulsets",
		kind: "StatefulSet", namespace: namespace, name: endpoints.statefulSet,
		meta:  func(s *statefulSet) *apiObject { return &s.apiObject },
		apply: r.apply, log: log,
	}
	return r
}

// apply handles a new version of the StatefulSet. A StatefulSet that was deleted, or that
// has no backends, does not change the number of backends.
func (r *replicaWatcher) apply(set map[string]*statefulSet) {
	s := set[r.watcher.name]
	r.mu.Lock()
	r.absent = s == nil
	if s != nil {
		r.latest = s
	}
	r.mu.Unlock()
	if s == nil {
		r.log.Warn("StatefulSet not found; keeping the last number of backends",
			"object", r.watcher.String())
		return
	}
	if b := s.backends(); b.count > 0 {
		r.onResize(b, s.revision())
	}
	r.endpoints.changed.notify()
}

// keepActiveCount writes the active count whenever it should change, until ctx ends. All
// routers do the same.
func (r *replicaWatcher) keepActiveCount(ctx context.Context) {
	var failureThrottle throttle
	for failures := 0; ; {
		var retry <-chan time.Time
		changed := r.endpoints.changed
		err := r.writeActiveCount(ctx)
		if failures++; err == nil {
			failures = 0
		} else if ctx.Err() == nil {
			retry = time.After(retryDelay(failures, retryAfter(err), rand.Float64()))
			changed = nil // a change does not shorten the wait
			if omitted, ok := failureThrottle.allow(time.Minute); ok {
				r.log.Warn("cannot record the number of backends: the Role needs patch of statefulsets/status",
					"object", r.watcher.String(), "error", err.Error(), "omitted", omitted)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-retry:
		}
	}
}

// writeActiveCount writes the active count if it should change. The patch names the
// resourceVersion that the decision is based on. If the API server has a later version,
// it refuses the patch with 409, and the watch will bring that version. So a router with
// an old version of the StatefulSet writes nothing. The patch goes to the status, so that
// the Role does not allow a change of the spec.
func (r *replicaWatcher) writeActiveCount(ctx context.Context) error {
	s := r.lastStatefulSet()
	if s == nil {
		return nil
	}
	count := s.nextActiveCount(r.isServing(s))
	if count == s.activeCount() || count == 0 {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": s.Metadata.UID, "resourceVersion": s.Metadata.ResourceVersion,
		"annotations": map[string]string{activeCountKey: strconv.Itoa(count)}}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	body, err := r.patcher.do(ctx, r.watcher.path+"/"+r.watcher.name+"/status", nil, patch)
	if hasStatus(err, http.StatusConflict) {
		return nil
	}
	if err != nil {
		return err
	}
	body.Close()
	r.log.Info("number of backends recorded",
		"object", r.watcher.String(), "backends", count, "previous", s.activeCount())
	return nil
}

// isServing returns a function that reports whether a backend, which owns no namespaces
// yet, can serve them. If the EndpointSlices are not known, status.readyReplicas says how
// many backends can.
func (r *replicaWatcher) isServing(s *statefulSet) func(ordinal int) bool {
	return func(ordinal int) bool {
		if ready, known := r.endpoints.isReady(ordinal); known {
			return ready
		}
		return ordinal-s.Spec.Ordinals.Start < s.Status.ReadyReplicas
	}
}

// lastStatefulSet returns the last version of the StatefulSet, nil before the first LIST
// that has it.
func (r *replicaWatcher) lastStatefulSet() *statefulSet {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.latest
}

// writeMetrics writes spec.replicas, and for each backend that owns namespaces whether it
// is ready. active.count is 0 if there is no table.
func (r *replicaWatcher) writeMetrics(m metricsWriter, active ordinals) {
	if s := r.lastStatefulSet(); s != nil {
		m.single("router_statefulset_replicas", "gauge",
			"Replicas that the StatefulSet should have.", float64(s.Spec.Replicas))
	}
	if active.count == 0 {
		return
	}
	sample := m.family("router_backend_ready", "gauge",
		"1 if the backend is ready for new sessions, or if the router does not know.")
	for i := range active.count {
		ordinal := active.first + i
		ready, known := r.endpoints.isReady(ordinal)
		name := backendName(r.endpoints.statefulSet, ordinal)
		sample(boolToFloat(ready || !known), "backend", name)
	}
}

// whyNotReady returns, in words, why the number of backends is not known, or "" if it is.
func (r *replicaWatcher) whyNotReady() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch failure := r.watcher.snapshot().failure; {
	case r.latest != nil && r.latest.backends().count > 0:
		return ""
	case r.latest != nil:
		return r.watcher.String() + " has no replicas"
	case r.absent:
		return r.watcher.String() + " does not exist"
	case errorClass(failure) == "forbidden":
		return fmt.Sprintf("%s: %v; the Role needs list and watch of statefulsets "+
			"with resourceNames [%s]", r.watcher.String(), failure, r.watcher.name)
	case failure != nil:
		return r.watcher.String() + ": " + failure.Error()
	}
	return r.watcher.String() + ": no answer from the API server yet"
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

// usable reports whether the router may open new sessions at the endpoint. A terminating
// pod may serve its sessions, but a new session would end with it. ready is always true
// if the Service has publishNotReadyAddresses; serving is then the pod's readiness.
func (e *endpoint) usable() bool {
	c := e.Conditions
	isFalse := func(condition *bool) bool { return condition != nil && !*condition }
	terminating := c.Terminating != nil && *c.Terminating
	return !isFalse(c.Ready) && !isFalse(c.Serving) && !terminating
}

// podAddress holds the addresses of one backend's pod.
type podAddress struct {
	// Static after construction.
	ready bool   // the addresses are usable
	uid   string // of the pod, "" if not known

	// Guarded by the endpointWatcher's mu.
	addrs      []string // host:port, at least one; the first is dialled next
	dialFailed bool     // a dial of one of them failed
}

// usable reports whether the addresses are usable. It is false for nil, a backend that is
// in no EndpointSlice.
func (p *podAddress) usable() bool { return p != nil && p.ready }

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
			if known == nil || !known.ready && e.usable() {
				known = &podAddress{ready: e.usable(), uid: e.uid()}
				addresses[ordinal] = known
			}
			addr := net.JoinHostPort(e.Addresses[0], port)
			same := known.ready == e.usable() && known.uid == e.uid()
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
	changed     wakeup                    // of keepActiveCount: a pod or the StatefulSet changed
	log         *slog.Logger

	mu        sync.Mutex
	addresses map[int]*podAddress // by ordinal, nil before the first LIST; guarded by mu
}

// newEndpointWatcher returns an endpointWatcher of the Service. The caller runs its
// watcher. The watcher calls onPods with the uids of the usable pods, by ordinal, before
// any of them is dialled; a pod without a uid is left out. onPods must not block.
func newEndpointWatcher(client kubeClient, namespace, statefulSet, service string, port int,
	onPods func(uids map[int]string), log *slog.Logger) *endpointWatcher {
	e := &endpointWatcher{
		client: client, statefulSet: statefulSet, port: strconv.Itoa(port),
		dnsBackends: newDNSBackends(0, statefulSet, service, port),
		onPods:      onPods, changed: newWakeup(), log: log,
	}
	e.queues = newDialQueues(e.checkReady)
	e.watcher = &watcher[endpointSlice]{
		kube: &client,
		path: "/apis/discovery.k8s.io/v1/namespaces/" + namespace + "/endpointslices",
		kind: "EndpointSlice", namespace: namespace,
		selector: "kubernetes.io/service-name=" + service,
		meta:     func(s *endpointSlice) *apiObject { return &s.apiObject },
		apply:    e.apply, onFailure: e.queues.readinessChanged, log: log,
	}
	return e
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
		e.log.Warn("EndpointSlices not found; keeping the last addresses",
			"object", e.watcher.String())
		return
	}
	addresses, uids := podAddresses(set, e.statefulSet, e.port), map[int]string{}
	for ordinal, address := range addresses {
		if address.usable() && address.uid != "" {
			uids[ordinal] = address.uid
		}
	}
	e.onPods(uids)
	e.mu.Lock()
	e.addresses = addresses
	e.mu.Unlock()
	e.queues.readinessChanged()
	e.changed.notify()
}

// isReady reports whether the backend is ready; known is false before the first LIST.
func (e *endpointWatcher) isReady(ordinal int) (ready, known bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.addresses[ordinal].usable(), e.addresses != nil
}

// isOutdated reports whether addresses may be out of date, as the watch fails.
func (e *endpointWatcher) isOutdated() bool { return e.watcher.snapshot().failing }

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
	known, address, addr, dialFailed := e.addresses != nil, e.addresses[ordinal], "", true
	if address.usable() {
		addr, dialFailed = address.addrs[0], address.dialFailed
	}
	e.mu.Unlock()
	switch {
	case !known:
		return e.dnsBackends.resolve(ctx, ordinal)
	case dialFailed && e.isOutdated():
		return e.resolveByDNS(ctx, ordinal, addr)
	case addr == "":
		return "", e.notReadyError(ordinal)
	}
	return addr, nil
}

// podIsGone asks the API server for the pod with the backend's name, and reports whether
// the answer is that there is none. Another pod of that name has no sessions of the one
// before. It returns false if there is no answer.
func (e *endpointWatcher) podIsGone(ctx context.Context, ordinal int) bool {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	client := e.client
	path := "/api/v1/namespaces/" + e.watcher.namespace + "/pods/" +
		backendName(e.statefulSet, ordinal)
	body, err := client.do(ctx, path, nil, nil)
	if err == nil {
		body.Close()
	}
	return hasStatus(err, http.StatusNotFound)
}

// podTimeout bounds the request for a pod.
const podTimeout = 5 * time.Second

// podUID returns the uid of the pod that resolve finds, or "" if it is not known.
func (e *endpointWatcher) podUID(ordinal int) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	address := e.addresses[ordinal]
	if !address.usable() || address.dialFailed && e.isOutdated() {
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
