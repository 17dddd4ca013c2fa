package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
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

// statefulSet is what is read of a StatefulSet.
type statefulSet struct {
	apiObject
	Spec struct {
		Replicas *int `json:"replicas"` // nil is 1
		Ordinals struct {
			Start int `json:"start"`
		} `json:"ordinals"`
	} `json:"spec"`
	Status struct {
		ReadyReplicas int `json:"readyReplicas"`
	} `json:"status"`
	annotation string // activeCountKey's
}

// activeCountKey is the annotation of the StatefulSet in which routers note how many
// backends have namespaces.
const activeCountKey = "router/backends"

// UnmarshalJSON reads one annotation of all.
func (s *statefulSet) UnmarshalJSON(b []byte) error {
	type plain statefulSet
	var annotated struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	err := cmp.Or(json.Unmarshal(b, (*plain)(s)), json.Unmarshal(b, &annotated))
	s.annotation = annotated.Metadata.Annotations[activeCountKey]
	return err
}

// activeCount is the number in the annotation, 0 if there is none.
func (s *statefulSet) activeCount() int {
	n, err := strconv.Atoi(s.annotation)
	if err != nil || n < 1 {
		return 0
	}
	return n
}

func (s *statefulSet) replicas() int {
	if s.Spec.Replicas == nil {
		return 1
	}
	return *s.Spec.Replicas
}

// backends are those that have namespaces. It depends on nothing but the object
// as it is now, so that routers that have seen the same version agree, also one
// that has just started and one whose watch missed a state in between
// (invariant 2). How many are ready does not say how many there are: with 5 of 6
// ready a set grows from 4 and waits for backend-5, or has 6 of which one
// restarts. What tells these apart is the note, which grows when backends are
// ready for the first time, and which spec.replicas bounds at once:
//
//   - scaled in: the namespaces move before the pods are gone;
//   - scaled out: a backend gets namespaces when it can serve them;
//   - a pod that restarts, or fails for ever, changes nothing;
//   - scaled to zero: as before. With no note either, there are none;
//   - no note, since no router may write it: all of spec.replicas, at once.
func (s *statefulSet) backends() ordinals {
	count := s.replicas()
	if active := s.activeCount(); active > 0 && (count == 0 || active < count) {
		count = active
	}
	return ordinals{s.Spec.Ordinals.Start, count}
}

// revision names the spec. The API server counts a StatefulSet's specs, not what
// changes in its annotations or status
// (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/object-meta/).
func (s *statefulSet) revision() string {
	return fmt.Sprintf("%s/%d", s.Metadata.UID, s.Metadata.Generation)
}

// nextActiveCount is what the note should be: the backends that there are, and those after
// them that are ready without a gap.
func (s *statefulSet) nextActiveCount(ready func(ordinal int) bool) int {
	b := s.backends()
	for b.count < s.replicas() && ready(b.first+b.count) {
		b.count++
	}
	return b.count
}

// replicaWatcher follows the StatefulSet, which says how many backends there are.
type replicaWatcher struct {
	// Static after construction.
	watcher   *watcher[statefulSet]
	patcher   *kubeClient // writes the note
	endpoints *endpointWatcher
	onResize  func(backends ordinals, revision string) // called in order, with one backend at least
	log       *slog.Logger

	changed chan struct{} // capacity 1; wakes keepActiveCount, never closed

	// Guarded by mu.
	mu     sync.Mutex
	latest *statefulSet // nil before the first; one that was deleted stays
	absent bool
}

// newReplicaWatcher follows the StatefulSet of the pods while its watcher and keepActiveCount
// run, and calls resize with what it says.
func newReplicaWatcher(client kubeClient, namespace string, endpoints *endpointWatcher, onResize func(ordinals, string), log *slog.Logger) *replicaWatcher {
	writer := client
	writer.patch = true
	c := &replicaWatcher{patcher: &writer, endpoints: endpoints, onResize: onResize, log: log, changed: make(chan struct{}, 1)}
	c.watcher = &watcher[statefulSet]{
		kube: &client, path: "/apis/apps/v1/namespaces/" + namespace + "/statefulsets", kind: "StatefulSet",
		namespace: namespace, name: endpoints.statefulSet,
		meta: func(s *statefulSet) *apiObject { return &s.apiObject }, apply: c.apply, log: log,
	}
	endpoints.onChange = c.wake
	return c
}

// apply takes the StatefulSet. One that is deleted changes nothing, nor does one
// that has no backends.
func (c *replicaWatcher) apply(set map[string]*statefulSet) {
	s := set[c.watcher.name]
	c.mu.Lock()
	c.absent = s == nil
	if s != nil {
		c.latest = s
	}
	c.mu.Unlock()
	if s == nil {
		c.log.Warn("there is no such object, the number of backends stays as it was", "object", c.watcher.String())
		return
	}
	if b := s.backends(); b.count > 0 {
		c.onResize(b, s.revision())
	}
	c.wake()
}

// wake wakes keepActiveCount.
func (c *replicaWatcher) wake() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// keepActiveCount keeps the note of the StatefulSet up to date, with all other routers,
// until ctx ends.
func (c *replicaWatcher) keepActiveCount(ctx context.Context) {
	var limit throttle
	for fails := 0; ; {
		var again <-chan time.Time
		changed := c.changed
		err := c.writeActiveCount(ctx)
		if fails++; err == nil {
			fails = 0
		} else if ctx.Err() == nil {
			again, changed = time.After(backoff(fails, retryAfter(err), rand.Float64())), nil
			if omitted, ok := limit.allow(time.Minute); ok {
				c.log.Warn("cannot note the number of backends: the Role needs patch of statefulsets/status",
					"object", c.watcher.String(), "error", err.Error(), "omitted", omitted)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-again:
		}
	}
}

// writeActiveCount writes the note if it should be another. The patch is for the very
// version that was judged: if there is a later one, the API server refuses it,
// and the watch brings that. So a router with an old picture of the StatefulSet
// writes nothing. It goes to the status, whose patch may not change the spec.
func (c *replicaWatcher) writeActiveCount(ctx context.Context) error {
	c.mu.Lock()
	s := c.latest
	c.mu.Unlock()
	if s == nil {
		return nil
	}
	count := s.nextActiveCount(c.isServing(s))
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
	body, err := c.patcher.do(ctx, c.watcher.path+"/"+c.watcher.name+"/status", nil, patch)
	if statusErr := (&statusError{}); errors.As(err, &statusErr) && statusErr.Code == http.StatusConflict {
		return nil
	}
	if err != nil {
		return err
	}
	body.Close()
	c.log.Info("number of backends noted", "object", c.watcher.String(), "backends", count, "before", s.activeCount())
	return nil
}

// isServing says whether a backend that has no namespaces yet can serve them. Where
// only the StatefulSet may be read, as many are ready as it says.
func (c *replicaWatcher) isServing(s *statefulSet) func(ordinal int) bool {
	return func(ordinal int) bool {
		ready, known := c.endpoints.isReady(ordinal)
		if !known {
			return ordinal-s.Spec.Ordinals.Start < s.Status.ReadyReplicas
		}
		return ready
	}
}

// specReplicas returns how many backends the StatefulSet is to have, if it is known.
func (c *replicaWatcher) specReplicas() (count int, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.latest == nil {
		return 0, false
	}
	return c.latest.replicas(), true
}

// writeMetrics writes how many backends the StatefulSet is to have, and which of those
// that own namespaces are ready. active has a count of 0 while there is no table.
func (c *replicaWatcher) writeMetrics(m metricsWriter, active ordinals) {
	if replicas, known := c.specReplicas(); known {
		m.single("router_statefulset_replicas", "gauge", "Backends that the StatefulSet is to have, with namespaces or not yet.",
			float64(replicas))
	}
	if active.count == 0 {
		return
	}
	m.family("router_backend_ready", "gauge", "1 if the backend is ready for new sessions, as far as is known.")
	for i := range active.count {
		ordinal := active.first + i
		ready, known := c.endpoints.isReady(ordinal)
		m.sample("router_backend_ready", boolToFloat(ready || !known), "backend", backendName(c.endpoints.statefulSet, ordinal))
	}
}

// whyNotReady says, in words, why the number of backends is not known, or "".
func (c *replicaWatcher) whyNotReady() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch failure := c.watcher.snapshot().failure; {
	case c.latest != nil && c.latest.backends().count > 0:
		return ""
	case c.latest != nil:
		return c.watcher.String() + " has no replicas"
	case c.absent:
		return c.watcher.String() + " does not exist"
	case errorClass(failure) == "forbidden":
		return fmt.Sprintf("%s: %v; the Role needs list and watch of statefulsets with resourceNames [%s]",
			c.watcher.String(), failure, c.watcher.name)
	case failure != nil:
		return c.watcher.String() + ": " + failure.Error()
	}
	return c.watcher.String() + " was asked for"
}

// endpointSlice is what is read of an EndpointSlice
// (https://kubernetes.io/docs/reference/kubernetes-api/service-resources/endpoint-slice-v1/).
type endpointSlice struct {
	apiObject
	AddressType string     `json:"addressType"` // IPv4, IPv6 or FQDN
	Endpoints   []endpoint `json:"endpoints"`
}

// endpoint is one address of a pod.
type endpoint struct {
	Addresses []string `json:"addresses"` // the first is meant
	Hostname  string   `json:"hostname"`  // of a pod that the Service governs; its copies have it too
	TargetRef struct {
		Kind string `json:"kind"`
		Name string `json:"name"`
		UID  string `json:"uid"`
	} `json:"targetRef"`
	Conditions struct {
		Ready       *bool `json:"ready"`       // nil is true
		Serving     *bool `json:"serving"`     // nil is as ready
		Terminating *bool `json:"terminating"` // nil is false
	} `json:"conditions"`
}

// pod is the name of the endpoint's pod: that of its targetRef, which the API
// server keeps unique. The hostname is a field of the pod's spec, which a copy of
// the pod has too (kubectl debug --copy-to): it counts only where no pod is named,
// in an EndpointSlice that somebody has written by hand.
func (e *endpoint) pod() string {
	if e.TargetRef.Kind == "Pod" && e.TargetRef.Name != "" {
		return e.TargetRef.Name
	}
	return e.Hostname
}

// uid is that of the endpoint's pod, "" if no pod is named.
func (e *endpoint) uid() string {
	if e.TargetRef.Kind == "Pod" {
		return e.TargetRef.UID
	}
	return ""
}

// usable reports whether new sessions may go there. A pod that terminates may
// serve what it has, but a new session would end with it. With
// publishNotReadyAddresses ready is always true, and serving is what it was.
func (e *endpoint) usable() bool {
	valueOr := func(condition *bool, unset bool) bool {
		if condition == nil {
			return unset
		}
		return *condition
	}
	c := e.Conditions
	return valueOr(c.Ready, true) && valueOr(c.Serving, true) && !valueOr(c.Terminating, false)
}

// podAddress is where a backend is.
type podAddress struct {
	ready bool
	uid   string // of the pod, "" if not known

	// Guarded by the mu of pods.
	addrs      []string // host:port; those that are usable if any is
	dialFailed bool     // what was dialled there was no good
}

// usable is nil-safe: a backend that is in no EndpointSlice has no place.
func (p *podAddress) usable() bool { return p != nil && p.ready }

// podAddresses joins all slices. A pod may be in several: for a moment when it goes
// from one to the other, or with an address of each family. What is not usable
// counts only for a pod that nothing else is known of: an entry that is left over
// from its last life, whose address may be another pod's by now, must not be
// dialled. A place is of one pod: while slices disagree, of the first.
func podAddresses(set map[string]*endpointSlice, statefulSet, port string) map[int]*podAddress {
	all := slices.SortedFunc(maps.Values(set), func(a, b *endpointSlice) int {
		return cmp.Or(cmp.Compare(a.AddressType, b.AddressType), cmp.Compare(a.Metadata.Name, b.Metadata.Name))
	})
	addresses := map[int]*podAddress{}
	for _, slice := range all {
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
			if known.ready == e.usable() && known.uid == e.uid() && !slices.Contains(known.addrs, addr) {
				known.addrs = append(known.addrs, addr)
			}
		}
	}
	return addresses
}

// endpointWatcher follows the EndpointSlices of a headless Service, which say where each
// backend is and whether it is ready, without DNS's caches: CoreDNS keeps for up
// to 30 s that there is no such name. Until they were heard, and where they may
// not be read, DNS says where a backend is. So it does while they cannot be
// followed any more (the rights were taken away, the API server is gone), for what
// is not ready by them, or was no good when it was dialled.
type endpointWatcher struct {
	// Static after construction.
	statefulSet string
	port        string
	watcher     *watcher[endpointSlice]
	dns         *backends
	queues      *dialQueues
	onPods      func(uids map[int]string) // gets the pods that are usable, by ordinal, before they are dialled
	onChange    func()                    // called after the places changed
	log         *slog.Logger

	mu        sync.Mutex
	addresses map[int]*podAddress // by ordinal, nil before the first. Guarded by mu.
}

// newEndpointWatcher follows the EndpointSlices while the watcher of the result runs.
func newEndpointWatcher(client kubeClient, namespace, statefulSet, service string, port int, log *slog.Logger) *endpointWatcher {
	p := &endpointWatcher{
		statefulSet: statefulSet, port: strconv.Itoa(port), dns: newDNSBackends(0, statefulSet, service, port),
		onPods: func(map[int]string) {}, onChange: func() {}, log: log,
	}
	p.queues = newDialQueues(p.checkReady)
	p.watcher = &watcher[endpointSlice]{
		kube: &client, path: "/apis/discovery.k8s.io/v1/namespaces/" + namespace + "/endpointslices", kind: "EndpointSlice",
		namespace: namespace, selector: "kubernetes.io/service-name=" + service,
		meta: func(s *endpointSlice) *apiObject { return &s.apiObject }, apply: p.apply, onFailure: p.queues.readinessChanged, log: log,
	}
	return p
}

// backends are the pods to be dialled.
func (p *endpointWatcher) backends() *backends {
	return &backends{statefulSet: p.statefulSet, queues: p.queues, resolve: p.resolve, invalidate: p.invalidate, podUID: p.podUID, close: p.dns.close}
}

// apply takes the EndpointSlices. None at all, not even an empty one, means that
// the Service is gone, which says nothing about the pods: they stay where they
// were.
func (p *endpointWatcher) apply(set map[string]*endpointSlice) {
	if len(set) == 0 {
		p.log.Warn("there is no such object, backends stay where they were", "object", p.watcher.String())
		return
	}
	addresses, uids := podAddresses(set, p.statefulSet, p.port), map[int]string{}
	for ordinal, address := range addresses {
		if address.usable() && address.uid != "" {
			uids[ordinal] = address.uid
		}
	}
	p.onPods(uids)
	p.mu.Lock()
	p.addresses = addresses
	p.mu.Unlock()
	p.queues.readinessChanged()
	p.onChange()
}

// ready reports whether a backend is, if that is known.
func (p *endpointWatcher) isReady(ordinal int) (ready, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addresses[ordinal].usable(), p.addresses != nil
}

// isOutdated reports whether what is known of the places may be of the past.
func (p *endpointWatcher) isOutdated() bool { return p.watcher.snapshot().failing }

// checkReady says why a backend must not be dialled now, or nil.
func (p *endpointWatcher) checkReady(ordinal int) error {
	if ready, known := p.isReady(ordinal); known && !ready && !p.isOutdated() {
		return p.notReadyError(ordinal)
	}
	return nil
}

func (p *endpointWatcher) notReadyError(ordinal int) error {
	return fmt.Errorf("%s is not ready", backendName(p.statefulSet, ordinal))
}

// resolve returns the address of a backend that is ready.
func (p *endpointWatcher) resolve(ctx context.Context, ordinal int) (string, error) {
	p.mu.Lock()
	known, address, addr, dialFailed := p.addresses != nil, p.addresses[ordinal], "", true
	if address.usable() {
		addr, dialFailed = address.addrs[0], address.dialFailed
	}
	p.mu.Unlock()
	switch {
	case !known:
		return p.dns.resolve(ctx, ordinal)
	case dialFailed && p.isOutdated():
		return p.resolveByDNS(ctx, ordinal, addr)
	case addr == "":
		return "", p.notReadyError(ordinal)
	}
	return addr, nil
}

// podUID returns the uid of the pod that locate finds, "" if it is not known.
func (p *endpointWatcher) podUID(ordinal int) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	address := p.addresses[ordinal]
	if !address.usable() || address.dialFailed && p.isOutdated() {
		return ""
	}
	return address.uid
}

// resolveByDNS asks DNS where a backend is. Where it does not say, in half of the
// time of a dial, the address before is tried again, if there was one: a container
// that restarts keeps it.
func (p *endpointWatcher) resolveByDNS(ctx context.Context, ordinal int, before string) (string, error) {
	bound, cancel := context.WithTimeout(ctx, dialTimeout/2)
	defer cancel()
	addr, err := p.dns.resolve(bound, ordinal)
	if err != nil && before != "" && ctx.Err() == nil {
		return before, nil
	}
	return addr, err
}

// invalidate makes another address of the backend be dialled next, if there is one.
func (p *endpointWatcher) invalidate(ordinal int) {
	p.dns.invalidate(ordinal)
	p.mu.Lock()
	defer p.mu.Unlock()
	if address := p.addresses[ordinal]; address != nil {
		address.addrs, address.dialFailed = append(address.addrs[1:], address.addrs[0]), true
	}
}
