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
	object
	Spec struct {
		Replicas *int `json:"replicas"` // nil is 1
		Ordinals struct {
			Start int `json:"start"`
		} `json:"ordinals"`
	} `json:"spec"`
	Status struct {
		ReadyReplicas int `json:"readyReplicas"`
	} `json:"status"`
	annotation string // noteKey's
}

// noteKey is the annotation of the StatefulSet in which routers note how many
// backends have namespaces.
const noteKey = "router/backends"

// UnmarshalJSON reads one annotation of all.
func (s *statefulSet) UnmarshalJSON(b []byte) error {
	type plain statefulSet
	var notes struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	err := cmp.Or(json.Unmarshal(b, (*plain)(s)), json.Unmarshal(b, &notes))
	s.annotation = notes.Metadata.Annotations[noteKey]
	return err
}

// noted is the number in the annotation, 0 if there is none.
func (s *statefulSet) noted() int {
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
	if noted := s.noted(); noted > 0 && (count == 0 || noted < count) {
		count = noted
	}
	return ordinals{s.Spec.Ordinals.Start, count}
}

// revision names the spec. The API server counts a StatefulSet's specs, not what
// changes in its annotations or status
// (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/object-meta/).
func (s *statefulSet) revision() string {
	return fmt.Sprintf("%s/%d", s.Metadata.UID, s.Metadata.Generation)
}

// note is what the note should be: the backends that there are, and those after
// them that are ready without a gap.
func (s *statefulSet) note(ready func(ordinal int) bool) int {
	b := s.backends()
	for b.count < s.replicas() && ready(b.first+b.count) {
		b.count++
	}
	return b.count
}

// scale follows the StatefulSet, which says how many backends there are.
type scale struct {
	// Static after construction.
	watcher *watcher[statefulSet]
	kube    *kube // writes the note
	pods    *pods
	resize  func(backends ordinals, revision string) // called in order, with one backend at least
	log     *slog.Logger

	changed chan struct{} // capacity 1; wakes keepNote, never closed

	// Guarded by mu.
	mu     sync.Mutex
	latest *statefulSet // nil before the first; one that was deleted stays
	absent bool
}

// followScale follows the StatefulSet of the pods while its watcher and keepNote
// run, and calls resize with what it says.
func followScale(client kube, namespace string, pods *pods, resize func(ordinals, string), log *slog.Logger) *scale {
	writer := client
	writer.patch = true
	c := &scale{kube: &writer, pods: pods, resize: resize, log: log, changed: make(chan struct{}, 1)}
	c.watcher = &watcher[statefulSet]{
		kube: &client, path: "/apis/apps/v1/namespaces/" + namespace + "/statefulsets", kind: "StatefulSet",
		namespace: namespace, name: pods.statefulSet,
		header: func(s *statefulSet) *object { return &s.object }, apply: c.apply, log: log,
	}
	pods.changed = c.change
	return c
}

// apply takes the StatefulSet. One that is deleted changes nothing, nor does one
// that has no backends.
func (c *scale) apply(set map[string]*statefulSet) {
	s := set[c.watcher.name]
	c.mu.Lock()
	c.absent = s == nil
	if s != nil {
		c.latest = s
	}
	c.mu.Unlock()
	if s == nil {
		c.log.Warn("there is no such object, the number of backends stays as it was", "object", c.watcher.what())
		return
	}
	if b := s.backends(); b.count > 0 {
		c.resize(b, s.revision())
	}
	c.change()
}

// change wakes keepNote.
func (c *scale) change() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// keepNote keeps the note of the StatefulSet up to date, with all other routers,
// until ctx ends.
func (c *scale) keepNote(ctx context.Context) {
	var limit throttle
	for fails := 0; ; {
		var again <-chan time.Time
		changed := c.changed
		err := c.writeNote(ctx)
		if fails++; err == nil {
			fails = 0
		} else if ctx.Err() == nil {
			again, changed = time.After(pause(fails, retryAfter(err), rand.Float64())), nil
			if omitted, ok := limit.allow(time.Minute); ok {
				c.log.Warn("cannot note the number of backends: the Role needs patch of statefulsets/status",
					"object", c.watcher.what(), "error", err.Error(), "omitted", omitted)
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

// writeNote writes the note if it should be another. The patch is for the very
// version that was judged: if there is a later one, the API server refuses it,
// and the watch brings that. So a router with an old picture of the StatefulSet
// writes nothing. It goes to the status, whose patch may not change the spec.
func (c *scale) writeNote(ctx context.Context) error {
	c.mu.Lock()
	s := c.latest
	c.mu.Unlock()
	if s == nil {
		return nil
	}
	count := s.note(c.grown(s))
	if count == s.noted() || count == 0 {
		return nil
	}
	note, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": s.Metadata.UID, "resourceVersion": s.Metadata.ResourceVersion,
		"annotations": map[string]string{noteKey: strconv.Itoa(count)}}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	body, err := c.kube.ask(ctx, c.watcher.path+"/"+c.watcher.name+"/status", nil, note)
	if no := (&status{}); errors.As(err, &no) && no.Code == http.StatusConflict {
		return nil
	}
	if err != nil {
		return err
	}
	body.Close()
	c.log.Info("number of backends noted", "object", c.watcher.what(), "backends", count, "before", s.noted())
	return nil
}

// grown says whether a backend that has no namespaces yet can serve them. Where
// only the StatefulSet may be read, as many are ready as it says.
func (c *scale) grown(s *statefulSet) func(ordinal int) bool {
	return func(ordinal int) bool {
		ready, known := c.pods.ready(ordinal)
		if !known {
			return ordinal-s.Spec.Ordinals.Start < s.Status.ReadyReplicas
		}
		return ready
	}
}

// replicas returns how many backends the StatefulSet is to have, if it is known.
func (c *scale) replicas() (count int, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.latest == nil {
		return 0, false
	}
	return c.latest.replicas(), true
}

// missing says, in words, why the number of backends is not known, or "".
func (c *scale) missing() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch failure := c.watcher.now().failure; {
	case c.latest != nil && c.latest.backends().count > 0:
		return ""
	case c.latest != nil:
		return c.watcher.what() + " has no replicas"
	case c.absent:
		return c.watcher.what() + " does not exist"
	case errorClass(failure) == "forbidden":
		return fmt.Sprintf("%s: %v; the Role needs list and watch of statefulsets with resourceNames [%s]",
			c.watcher.what(), failure, c.watcher.name)
	case failure != nil:
		return c.watcher.what() + ": " + failure.Error()
	}
	return c.watcher.what() + " was asked for"
}

// endpointSlice is what is read of an EndpointSlice
// (https://kubernetes.io/docs/reference/kubernetes-api/service-resources/endpoint-slice-v1/).
type endpointSlice struct {
	object
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
	is := func(condition *bool, unset bool) bool {
		if condition == nil {
			return unset
		}
		return *condition
	}
	c := e.Conditions
	return is(c.Ready, true) && is(c.Serving, true) && !is(c.Terminating, false)
}

// place is where a backend is.
type place struct {
	ready bool
	uid   string // of the pod, "" if not known

	// Guarded by the mu of pods.
	addrs []string // host:port; those that are usable if any is
	stale bool     // what was dialled there was no good
}

// usable is nil-safe: a backend that is in no EndpointSlice has no place.
func (p *place) usable() bool { return p != nil && p.ready }

// placesOf joins all slices. A pod may be in several: for a moment when it goes
// from one to the other, or with an address of each family. What is not usable
// counts only for a pod that nothing else is known of: an entry that is left over
// from its last life, whose address may be another pod's by now, must not be
// dialled. A place is of one pod: while slices disagree, of the first.
func placesOf(set map[string]*endpointSlice, statefulSet, port string) map[int]*place {
	all := slices.SortedFunc(maps.Values(set), func(a, b *endpointSlice) int {
		return cmp.Or(cmp.Compare(a.AddressType, b.AddressType), cmp.Compare(a.Metadata.Name, b.Metadata.Name))
	})
	places := map[int]*place{}
	for _, slice := range all {
		for _, e := range slice.Endpoints {
			ordinal, ok := backendOrdinal(statefulSet, e.pod())
			if !ok || len(e.Addresses) == 0 || slice.AddressType == "FQDN" {
				continue
			}
			known := places[ordinal]
			if known == nil || !known.ready && e.usable() {
				known = &place{ready: e.usable(), uid: e.uid()}
				places[ordinal] = known
			}
			addr := net.JoinHostPort(e.Addresses[0], port)
			if known.ready == e.usable() && known.uid == e.uid() && !slices.Contains(known.addrs, addr) {
				known.addrs = append(known.addrs, addr)
			}
		}
	}
	return places
}

// pods follows the EndpointSlices of a headless Service, which say where each
// backend is and whether it is ready, without DNS's caches: CoreDNS keeps for up
// to 30 s that there is no such name. Until they were heard, and where they may
// not be read, DNS says where a backend is. So it does while they cannot be
// followed any more (the rights were taken away, the API server is gone), for what
// is not ready by them, or was no good when it was dialled.
type pods struct {
	// Static after construction.
	statefulSet string
	port        string
	watcher     *watcher[endpointSlice]
	dns         *backends
	holds       *holds
	replaced    func(uids map[int]string) // gets the pods that are usable, by ordinal, before they are dialled
	changed     func()                    // called after the places changed
	log         *slog.Logger

	mu     sync.Mutex
	places map[int]*place // by ordinal, nil before the first. Guarded by mu.
}

// followPods follows the EndpointSlices while the watcher of the result runs.
func followPods(client kube, namespace, statefulSet, service string, port int, log *slog.Logger) *pods {
	p := &pods{
		statefulSet: statefulSet, port: strconv.Itoa(port), dns: dnsBackends(0, statefulSet, service, port),
		replaced: func(map[int]string) {}, changed: func() {}, log: log,
	}
	p.holds = newHolds(p.unready)
	p.watcher = &watcher[endpointSlice]{
		kube: &client, path: "/apis/discovery.k8s.io/v1/namespaces/" + namespace + "/endpointslices", kind: "EndpointSlice",
		namespace: namespace, selector: "kubernetes.io/service-name=" + service,
		header: func(s *endpointSlice) *object { return &s.object }, apply: p.apply, failed: p.holds.look, log: log,
	}
	return p
}

// backends are the pods to be dialled.
func (p *pods) backends() *backends {
	return &backends{statefulSet: p.statefulSet, holds: p.holds, locate: p.locate, forget: p.forget, pod: p.pod, close: p.dns.close}
}

// apply takes the EndpointSlices. None at all, not even an empty one, means that
// the Service is gone, which says nothing about the pods: they stay where they
// were.
func (p *pods) apply(set map[string]*endpointSlice) {
	if len(set) == 0 {
		p.log.Warn("there is no such object, backends stay where they were", "object", p.watcher.what())
		return
	}
	places, uids := placesOf(set, p.statefulSet, p.port), map[int]string{}
	for ordinal, at := range places {
		if at.usable() && at.uid != "" {
			uids[ordinal] = at.uid
		}
	}
	p.replaced(uids)
	p.mu.Lock()
	p.places = places
	p.mu.Unlock()
	p.holds.look()
	p.changed()
}

// ready reports whether a backend is, if that is known.
func (p *pods) ready(ordinal int) (ready, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.places[ordinal].usable(), p.places != nil
}

// failing reports whether what is known of the places may be of the past.
func (p *pods) failing() bool { return p.watcher.now().failing }

// unready says why a backend must not be dialled now, or nil.
func (p *pods) unready(ordinal int) error {
	if ready, known := p.ready(ordinal); known && !ready && !p.failing() {
		return p.notReady(ordinal)
	}
	return nil
}

func (p *pods) notReady(ordinal int) error {
	return fmt.Errorf("%s is not ready", backendName(p.statefulSet, ordinal))
}

// locate returns the address of a backend that is ready.
func (p *pods) locate(ctx context.Context, ordinal int) (string, error) {
	p.mu.Lock()
	known, at, addr, stale := p.places != nil, p.places[ordinal], "", true
	if at.usable() {
		addr, stale = at.addrs[0], at.stale
	}
	p.mu.Unlock()
	switch {
	case !known:
		return p.dns.locate(ctx, ordinal)
	case stale && p.failing():
		return p.locateAnew(ctx, ordinal, addr)
	case addr == "":
		return "", p.notReady(ordinal)
	}
	return addr, nil
}

// pod returns the uid of the pod that locate finds, "" if it is not known.
func (p *pods) pod(ordinal int) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := p.places[ordinal]
	if !at.usable() || at.stale && p.failing() {
		return ""
	}
	return at.uid
}

// locateAnew asks DNS where a backend is. Where it does not say, in half of the
// time of a dial, the address before is tried again, if there was one: a container
// that restarts keeps it.
func (p *pods) locateAnew(ctx context.Context, ordinal int, before string) (string, error) {
	bound, cancel := context.WithTimeout(ctx, dialTime/2)
	defer cancel()
	addr, err := p.dns.locate(bound, ordinal)
	if err != nil && before != "" && ctx.Err() == nil {
		return before, nil
	}
	return addr, err
}

// forget makes another address of the backend be dialled next, if there is one.
func (p *pods) forget(ordinal int) {
	p.dns.forget(ordinal)
	p.mu.Lock()
	defer p.mu.Unlock()
	if at := p.places[ordinal]; at != nil {
		at.addrs, at.stale = append(at.addrs[1:], at.addrs[0]), true
	}
}
