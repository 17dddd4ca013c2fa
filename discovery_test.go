package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// countingRouter is a replicaWatcher that gets its objects from the test.
type countingRouter struct{ *replicaWatcher }

func newCountingRouter(shared bool) countingRouter {
	log := slog.New(slog.DiscardHandler)
	pods := newEndpointWatcher(kubeClient{}, "edge", "backend", "headless", 9000, func(map[int]string) {}, log)
	var onProposal func()
	if shared {
		onProposal = func() {}
	}
	return countingRouter{newReplicaWatcher(kubeClient{}, "edge", pods, func(backendSet) {}, onProposal, log)}
}

// see gives the router a version of the StatefulSet, whose UID is "u".
func (r countingRouter) see(t *testing.T, generation int64, spec string) {
	t.Helper()
	s := &statefulSet{}
	must(t, json.Unmarshal(fmt.Appendf(nil, `{"metadata":{"uid":"u","generation":%d},"spec":{%s},"status":{"readyReplicas":9}}`, generation, spec), s))
	r.apply(map[string]*statefulSet{"backend": s})
}

// seeReady makes exactly these backends ready, given as digits. Those after a "!" have a pod that is not
// ready, those after a "~" one that is being deleted.
func (r countingRouter) seeReady(t *testing.T, digits string) {
	t.Helper()
	all, conditions := []string{}, `"ready":true`
	for _, c := range digits {
		switch c {
		case '!':
			conditions = `"ready":false`
		case '~':
			conditions = `"ready":false,"terminating":true`
		default:
			all = append(all, fmt.Sprintf(`{"addresses":["10.0.0.%c"],"hostname":"backend-%c","conditions":{%s}}`, c, c, conditions))
		}
	}
	r.endpoints.apply(sliceSet(t, "IPv4 ["+strings.Join(all, ",")+"]"))
}

// inForceNow returns the backends that own namespaces.
func (r countingRouter) inForceNow() ordinalRange {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.backendRange()
}

// How many backends own namespaces, and what is proposed, by the StatefulSet, the stored range and
// what is ready.
func TestActiveCount(t *testing.T) {
	const unread = "-"
	stored := func(count int, uid string, generation int64) *versionedRange {
		return &versionedRange{0, count, uid, generation}
	}
	from := func(first, count int, generation int64) *versionedRange {
		return &versionedRange{first, count, "u", generation}
	}
	tests := map[string]struct {
		spec   string // of generation 5
		stored *versionedRange
		ready  string // ordinals
		want   ordinalRange
		next   *versionedRange
	}{
		"all are active":              {`"replicas":4`, stored(4, "u", 5), "", ordinalRange{0, 4}, stored(4, "u", 5)},
		"scaled in":                   {`"replicas":3`, stored(6, "u", 4), "012345", ordinalRange{0, 3}, stored(3, "u", 5)},
		"scaled out":                  {`"replicas":6`, stored(4, "u", 4), "", ordinalRange{0, 4}, stored(4, "u", 5)},
		"another generation only":     {`"replicas":4`, stored(4, "u", 3), "0", ordinalRange{0, 4}, stored(4, "u", 5)},
		"one is ready":                {`"replicas":6`, stored(4, "u", 5), "4", ordinalRange{0, 4}, stored(5, "u", 5)},
		"the wrong one is ready":      {`"replicas":6`, stored(4, "u", 5), "01235", ordinalRange{0, 4}, stored(4, "u", 5)},
		"all are ready":               {`"replicas":6`, stored(4, "u", 5), "012345", ordinalRange{0, 4}, stored(6, "u", 5)},
		"more than replicas":          {`"replicas":5`, stored(4, "u", 5), "0123456", ordinalRange{0, 4}, stored(5, "u", 5)},
		"readiness is not known":      {`"replicas":6`, stored(4, "u", 5), unread, ordinalRange{0, 4}, stored(4, "u", 5)},
		"zero":                        {`"replicas":0`, stored(4, "u", 4), "0123", ordinalRange{0, 4}, stored(4, "u", 5)},
		"replicas unset":              {``, stored(4, "u", 4), "", ordinalRange{0, 1}, stored(1, "u", 5)},
		"from another ordinal":        {`"replicas":3,"ordinals":{"start":5}`, from(5, 2, 5), "7", ordinalRange{5, 2}, from(5, 3, 5)},
		"from an earlier version":     {`"replicas":3,"ordinals":{"start":5}`, from(anyFirst, 2, 5), "7", ordinalRange{5, 2}, from(5, 3, 5)},
		"the same, nothing to change": {`"replicas":3,"ordinals":{"start":5}`, from(anyFirst, 3, 5), "567", ordinalRange{5, 3}, from(5, 3, 5)},
		"from another one, scaled in": {`"replicas":3,"ordinals":{"start":5}`, from(5, 4, 4), "5678", ordinalRange{5, 3}, from(5, 3, 5)},

		"another start, none ready":             {`"replicas":4,"ordinals":{"start":4}`, from(0, 4, 4), "0123", ordinalRange{0, 4}, from(0, 4, 4)},
		"another start, not all ready":          {`"replicas":4,"ordinals":{"start":4}`, from(0, 4, 4), "0123456", ordinalRange{0, 4}, from(0, 4, 4)},
		"another start, all ready":              {`"replicas":4,"ordinals":{"start":4}`, from(0, 4, 4), "01234567", ordinalRange{0, 4}, from(4, 4, 5)},
		"another start, old ones restart":       {`"replicas":4,"ordinals":{"start":4}`, from(0, 4, 4), "2456", ordinalRange{0, 4}, from(0, 4, 4)},
		"another start, old ones gone":          {`"replicas":4,"ordinals":{"start":4}`, from(0, 4, 4), "46", ordinalRange{0, 4}, from(4, 4, 5)},
		"another start, as many ready":          {`"replicas":6,"ordinals":{"start":2}`, from(0, 2, 4), "0123", ordinalRange{0, 2}, from(2, 2, 5)},
		"another start, more ready":             {`"replicas":6,"ordinals":{"start":2}`, from(0, 2, 4), "01235", ordinalRange{0, 2}, from(2, 2, 5)},
		"another start, and scaled in":          {`"replicas":2,"ordinals":{"start":4}`, from(0, 4, 4), "01234", ordinalRange{0, 4}, from(0, 4, 4)},
		"another start, and scaled in, ready":   {`"replicas":2,"ordinals":{"start":4}`, from(0, 4, 4), "012345", ordinalRange{0, 4}, from(4, 2, 5)},
		"another start, and scaled to zero":     {`"replicas":0,"ordinals":{"start":4}`, from(0, 4, 4), "0123", ordinalRange{0, 4}, from(0, 4, 4)},
		"scaled in before another start":        {`"replicas":3,"ordinals":{"start":2}`, from(0, 5, 3), "0124", ordinalRange{0, 5}, from(0, 5, 3)},
		"one before, not ready":                 {`"replicas":3,"ordinals":{"start":4}`, from(5, 2, 4), "56", ordinalRange{5, 2}, from(5, 2, 4)},
		"one before, ready, and one restarts":   {`"replicas":3,"ordinals":{"start":4}`, from(5, 2, 4), "45", ordinalRange{5, 2}, from(4, 3, 5)},
		"without the first":                     {`"replicas":3,"ordinals":{"start":1}`, from(0, 4, 4), "03", ordinalRange{0, 4}, from(1, 3, 5)},
		"without the first, which is gone":      {`"replicas":4,"ordinals":{"start":1}`, from(0, 4, 4), "12", ordinalRange{0, 4}, from(1, 4, 5)},
		"without the first, which is not ready": {`"replicas":4,"ordinals":{"start":1}`, from(0, 4, 4), "123!0", ordinalRange{0, 4}, from(0, 4, 4)},
		"without the first, which goes":         {`"replicas":4,"ordinals":{"start":1}`, from(0, 4, 4), "123~0", ordinalRange{0, 4}, from(1, 4, 5)},
		"another start, readiness is not known": {`"replicas":4,"ordinals":{"start":4}`, from(0, 4, 4), unread, ordinalRange{0, 4}, from(0, 4, 4)},
		"another start of the same generation":  {`"replicas":4`, from(4, 4, 5), "0123", ordinalRange{4, 4}, from(0, 4, 5)},
		"another start, an older StatefulSet":   {`"replicas":4`, from(4, 4, 6), "01234567", ordinalRange{4, 4}, nil},

		"an older StatefulSet":              {`"replicas":6`, stored(4, "u", 6), "012345", ordinalRange{0, 4}, nil},
		"an older one, and scaled in":       {`"replicas":3`, stored(6, "u", 6), "012345", ordinalRange{0, 3}, nil},
		"another StatefulSet":               {`"replicas":6`, stored(4, "other", 5), "01", ordinalRange{0, 2}, nil},
		"another one, none ready":           {`"replicas":6`, stored(4, "other", 5), "", ordinalRange{0, 1}, nil},
		"another one, not known":            {`"replicas":6`, stored(4, "other", 5), unread, ordinalRange{}, nil},
		"none stored":                       {`"replicas":6`, nil, "0123", ordinalRange{0, 4}, stored(4, "u", 5)},
		"none stored, a gap":                {`"replicas":6`, nil, "01345", ordinalRange{0, 2}, stored(2, "u", 5)},
		"none stored, none ready":           {`"replicas":6`, nil, "", ordinalRange{0, 1}, stored(1, "u", 5)},
		"none stored, more than replicas":   {`"replicas":2`, nil, "0123", ordinalRange{0, 2}, stored(2, "u", 5)},
		"none stored, from another ordinal": {`"replicas":3,"ordinals":{"start":5}`, nil, "0156", ordinalRange{5, 2}, from(5, 2, 5)},
		"none stored, zero":                 {`"replicas":0`, nil, "0123", ordinalRange{}, nil},
		"none stored, readiness not known":  {`"replicas":6`, nil, unread, ordinalRange{}, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := newCountingRouter(true)
			r.see(t, 5, tt.spec)
			if tt.ready != unread {
				r.seeReady(t, tt.ready)
			}
			if got, next := r.inForceNow(), r.wantedRange(); got.count != 0 || next != nil {
				t.Errorf("before the object was read: %+v, proposal %+v", got, next)
			}
			for _, b := range []*versionedRange{tt.stored, nil} { // one that is lost stays in force
				r.setStoredRange(b)
				got, next := r.inForceNow(), r.wantedRange()
				if got.count == 0 {
					got = ordinalRange{}
				}
				wantEqual(t, "backends", got, tt.want)
				wantEqual(t, "proposal", rangeText(next), rangeText(tt.next))
			}
		})
	}
}

// rangeText returns the stored range as text, "none" for nil.
func rangeText(b *versionedRange) string {
	if b == nil {
		return "none"
	}
	return fmt.Sprintf("%s of %s/%d", ordinalRange{b.First, b.Count}, b.UID, b.Generation)
}

// A stored range is replaced only by a newer one.
func TestActiveBackendsReplaces(t *testing.T) {
	old := &versionedRange{0, 4, "u", 7}
	for b, want := range map[versionedRange]bool{
		{0, 4, "u", 7}: false, {0, 3, "u", 7}: false, {0, 5, "u", 7}: true, {0, 9, "u", 6}: false,
		{0, 2, "u", 8}: true, {2, 2, "u", 8}: true, {4, 4, "u", 7}: true, {0, 1, "other", 1}: true,
	} {
		if b.replaces(old) != want || !b.replaces(nil) {
			t.Errorf("%v replaces %v: %t, want %t", b, *old, !want, want)
		}
	}
}

// Routers with the same stored range and the same StatefulSet have the same number of backends,
// whatever each of them finds ready, and whatever each saw before.
func TestActiveCountNeedsNoReadiness(t *testing.T) {
	rng := rand.New(rand.NewPCG(randomSeed(t), 1))
	one, other := newCountingRouter(true), newCountingRouter(true)
	for range 2000 {
		anySpec := func() string {
			return fmt.Sprintf(`"replicas":%d,"ordinals":{"start":%d}`, rng.IntN(9), rng.IntN(3))
		}
		anyRange := func() *versionedRange {
			return &versionedRange{rng.IntN(3), 1 + rng.IntN(9), "u", rng.Int64N(9)}
		}
		spec, stored := anySpec(), anyRange()
		for _, r := range []countingRouter{one, other} {
			if rng.IntN(3) == 0 {
				r.see(t, rng.Int64N(9), anySpec())
			}
			if rng.IntN(3) == 0 {
				r.setStoredRange(anyRange())
			}
			digits := ""
			for i := range 9 {
				if rng.IntN(2) == 0 {
					digits += strconv.Itoa(i)
				}
			}
			r.seeReady(t, digits)
			r.see(t, 5, spec)
			r.setStoredRange(stored)
		}
		if a, b := one.inForceNow(), other.inForceNow(); a != b || a.count < 1 {
			t.Fatalf("{%s} and %+v: one has %+v, the other %+v", spec, *stored, a, b)
		}
	}
}

// A router that cannot read the EndpointSlices goes by status.readyReplicas, but not before
// it has tried: a backend that fails would be taken for ready.
func TestActiveCountWithoutEndpoints(t *testing.T) {
	for name, know := range map[string]func(r countingRouter){
		"not tried": func(countingRouter) {},
		"failed":    func(r countingRouter) { r.endpoints.watcher.finishCycle(errBadResponse) },
		"none":      func(r countingRouter) { r.endpoints.apply(nil) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newCountingRouter(true)
			know(r)
			r.see(t, 5, `"replicas":6`)
			r.setStoredRange(&versionedRange{0, 4, "u", 5})
			want := "6 of u/5"
			if name == "not tried" {
				want = "4 of u/5"
			}
			wantEqual(t, "proposal", rangeText(r.wantedRange()), want)
		})
	}
}

// A router that cannot read the EndpointSlices changes the first ordinal when the status says that
// the old pods are gone and the new ones ready: until then it counts the old ones.
func TestStartWithoutEndpoints(t *testing.T) {
	for status, want := range map[string]string{
		`"observedGeneration":4,"replicas":4,"readyReplicas":4`: "4 of u/4",
		`"observedGeneration":5,"replicas":8,"readyReplicas":8`: "4 of u/4",
		`"observedGeneration":5,"replicas":4,"readyReplicas":3`: "4 of u/4",
		`"observedGeneration":5,"replicas":4,"readyReplicas":4`: "4+4 of u/5",
	} {
		r := newCountingRouter(true)
		r.endpoints.watcher.finishCycle(errBadResponse)
		s := &statefulSet{}
		must(t, json.Unmarshal(fmt.Appendf(nil,
			`{"metadata":{"uid":"u","generation":5},"spec":{"replicas":4,"ordinals":{"start":4}},"status":{%s}}`, status), s))
		r.apply(map[string]*statefulSet{"backend": s})
		r.setStoredRange(&versionedRange{0, 4, "u", 4})
		wantEqual(t, status, rangeText(r.wantedRange()), want)
	}
}

// After etcd was restored, the stored range is ahead. Then another first ordinal is a change too.
func TestStartOfRestoredStatefulSet(t *testing.T) {
	r := newCountingRouter(true)
	r.see(t, 3, `"replicas":4`)
	r.seeReady(t, "0123")
	r.setStoredRange(&versionedRange{4, 4, "u", 7})
	wantEqual(t, "before the LIST", rangeText(r.wantedRange()), "none")
	r.mu.Lock()
	r.confirmation = r.wantedConfirmation()
	r.mu.Unlock()
	wantEqual(t, "after it", rangeText(r.wantedRange()), "4 of u/8")
}

// A range that an earlier version of the router has stored has no first ordinal.
func TestCountOfEarlierVersion(t *testing.T) {
	for text, want := range map[string]versionedRange{
		`{"count":3,"uid":"u","generation":5}`:           {anyFirst, 3, "u", 5},
		`{"first":0,"count":3,"uid":"u","generation":5}`: {0, 3, "u", 5},
		`{"first":2,"count":3,"uid":"u","generation":5}`: {2, 3, "u", 5},
	} {
		var got versionedRange
		must(t, json.Unmarshal([]byte(text), &got))
		wantEqual(t, text, got, want)
	}
}

// Why a router that shares a hand-off does not know the number of backends.
func TestWhyNoActiveCount(t *testing.T) {
	r := newCountingRouter(true)
	want := func(text string) {
		t.Helper()
		wantEqual(t, "why not ready", r.whyNotReady(), text)
	}
	want("StatefulSet edge/backend: no answer from the API server yet")
	r.see(t, 1, `"replicas":4`)
	want("the object of the hand-off has not been read yet")
	r.setStoredRange(nil)
	want("EndpointSlice edge/kubernetes.io/service-name=headless: no answer from the API server yet")
	r.see(t, 2, `"replicas":0`)
	want("StatefulSet edge/backend has no replicas")
	r.setStoredRange(&versionedRange{0, 4, "u", 1})
	want("")
}

// sharedRange is the stored range in the object of a hand-off, as the routers of a test share it.
type sharedRange struct {
	mu      sync.Mutex
	stored  *versionedRange
	routers []*followingRouter
	writes  []string // that were, each as text
}

// settle shows the routers the stored range, and lets them write what they propose if that replaces
// it, until nobody does: see member.storeRange.
func (o *sharedRange) settle() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for again := true; again; {
		again = false
		for _, r := range o.routers {
			r.setStoredRange(o.stored)
			if b := r.wantedRange(); b != nil && b.replaces(o.stored) {
				o.stored, again = b, true
				o.writes = append(o.writes, rangeText(b))
			}
		}
		if len(o.writes) > 1000 {
			panic(fmt.Sprintf("the routers do not agree on the stored range: %v", o.writes[990:]))
		}
	}
}

// set makes b the stored range, as another router or an operator does.
func (o *sharedRange) set(b *versionedRange) {
	o.mu.Lock()
	o.stored = b
	o.mu.Unlock()
	o.settle()
}

// wantWrites checks what was written since the last call.
func (o *sharedRange) wantWrites(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	if !slices.Equal(o.writes, want) {
		t.Errorf("written: %q, want %q", o.writes, want)
	}
	o.writes = nil
}

// followingRouter is the part of a router that follows the StatefulSet.
type followingRouter struct {
	*replicaWatcher
	last      atomic.Value // ordinals
	cordon    atomic.Value // a text
	proposals atomic.Int64 // calls of onWantedRange
	logged    *textLog
}

// followReplicas starts one, which shares the stored range, if that is not nil. It calls resize for
// the backends that own namespaces, if that is not nil.
func followReplicas(t *testing.T, n *pipeNetwork, shared *sharedRange, resize func(backendSet)) *followingRouter {
	t.Helper()
	r := &followingRouter{logged: &textLog{}}
	log := slog.New(slog.NewTextHandler(r.logged, nil))
	client := *n.kube(t)
	pods := newEndpointWatcher(client, "edge", "backend", "headless", 9000, func(map[int]string) {}, log)
	r.last.Store(ordinalRange{})
	r.cordon.Store("")
	onBackendsChanged := func(s backendSet) {
		r.last.Store(s.ordinalRange)
		r.cordon.Store(s.listedCordon.String())
		if resize != nil {
			resize(s)
		}
	}
	var onProposal func()
	if shared != nil {
		onProposal = func() {
			r.proposals.Add(1)
			shared.settle()
		}
	}
	r.replicaWatcher = newReplicaWatcher(client, "edge", pods, onBackendsChanged, onProposal, log)
	if shared != nil {
		shared.mu.Lock()
		shared.routers = append(shared.routers, r)
		shared.mu.Unlock()
		shared.settle()
	}
	inBackground(t, pods.watcher.run, r.watcher.run, r.run, r.confirmStored)
	synctest.Wait()
	return r
}

// kubeOfFour has 4 backends, which are ready.
func kubeOfFour() *fakeKube {
	f := newFakeKube()
	f.setReady(0, 1, 2, 3)
	f.setStatefulSet(func(s *fakeStatefulSet) { s.replicas, s.generation = 4, 1 })
	return f
}

// One router, from state to state: alone, and one that shares the stored range.
func TestReplicasFollowed(t *testing.T) {
	type step struct {
		what          string
		change        func(f *fakeKube)
		alone, shared ordinalRange
	}
	from := func(count int) ordinalRange { return ordinalRange{0, count} }
	both := func(what string, change func(f *fakeKube), count int) step {
		return step{what, change, from(count), from(count)}
	}
	to := func(replicas int) func(*fakeKube) { return func(f *fakeKube) { f.scale(replicas) } }
	ready := func(ordinals ...int) func(*fakeKube) { return func(f *fakeKube) { f.setReady(ordinals...) } }
	set := func(change func(*fakeStatefulSet)) func(*fakeKube) {
		return func(f *fakeKube) { f.setStatefulSet(change) }
	}
	tests := map[string][]step{
		"out and in": {
			both("scale to 6", to(6), 4),
			both("backend-5 is ready first", ready(0, 1, 2, 3, 5), 4),
			both("backend-4 is ready", ready(0, 1, 2, 3, 4, 5), 6),
			both("backend-1 restarts", ready(0, 2, 3, 4, 5), 6),
			both("all restart", ready(), 6),
			both("and are back", ready(0, 1, 2, 3, 4, 5), 6),
			both("scale to 3", to(3), 3),
			both("pods are gone", ready(0, 1, 2), 3),
			both("scale to 4", to(4), 3),
			both("backend-3 is ready", ready(0, 1, 2, 3), 4),
		},
		"zero": {
			both("scale to 0", to(0), 4),
			both("pods are gone", ready(), 4),
			both("scale to 6", to(6), 4),
			both("four are ready", ready(0, 1, 2, 3), 4),
			both("six are ready", ready(0, 1, 2, 3, 4, 5), 6),
		},
		"one that never is ready": {
			both("scale to 6", to(6), 4),
			both("backend-4 starts", ready(0, 1, 2, 3, 4), 5),
			both("kubectl replace", set(func(s *fakeStatefulSet) { s.generation++ }), 5),
			both("backend-4 crashes", ready(0, 1, 2, 3), 5),
			both("kubectl replace again", set(func(s *fakeStatefulSet) { s.generation++ }), 5),
			both("backend-4 is back", ready(0, 1, 2, 3, 4), 5),
		},
		"deleted": {
			both("deleted", (*fakeKube).deleteStatefulSet, 4),
			{"made anew", set(func(s *fakeStatefulSet) { *s = fakeStatefulSet{replicas: 5, generation: 1, uid: "new"} }), from(5), from(4)},
			{"backend-3 restarts", ready(0, 1, 2), from(5), from(4)},
			both("all are ready", ready(0, 1, 2, 3, 4), 5),
		},
		"other ordinals": {
			both("start at 2", set(func(s *fakeStatefulSet) { s.start, s.generation = 2, 2 }), 4),
			both("one is ready", ready(0, 1, 2, 3, 4), 4),
			{"both are ready", ready(0, 1, 2, 3, 4, 5), ordinalRange{2, 4}, ordinalRange{2, 4}},
			{"start at 0", set(func(s *fakeStatefulSet) { s.start, s.generation = 0, 3 }), ordinalRange{0, 4}, ordinalRange{0, 4}},
		},
		"only the StatefulSet may be read": {
			both("forbidden", func(f *fakeKube) { f.forbid("LIST", "endpointslices") }, 4),
			both("scale to 6", to(6), 4),
			both("five are ready", set(func(s *fakeStatefulSet) { s.ready = 5 }), 5),
			both("six are ready", set(func(s *fakeStatefulSet) { s.ready = 6 }), 6),
		},
	}
	for name, steps := range tests {
		for _, alone := range []bool{true, false} {
			inBubble(t, fmt.Sprintf("%s, alone=%t", name, alone), func(t *testing.T) {
				f, n := kubeOfFour(), newPipeNetwork()
				f.serve(t, n)
				if steps[0].what == "forbidden" { // from the start
					steps[0].change(f)
				}
				var shared *sharedRange
				if !alone {
					shared = &sharedRange{stored: &versionedRange{0, 4, "u-backend", 1}}
				}
				r := followReplicas(t, n, shared, nil)
				for _, s := range steps {
					s.change(f)
					time.Sleep(30 * time.Second)
					synctest.Wait()
					want := s.shared
					if alone {
						want = s.alone
					}
					if got := r.last.Load(); got != want {
						t.Fatalf("%s: %+v, want %+v; log:\n%s", s.what, got, want, r.logged)
					}
				}
				if alone && strings.Contains(f.verbs(), "PATCH") {
					t.Error("a router that is alone writes")
				}
			})
		}
	}
}

// A router that starts alone counts all of spec.replicas: it cannot know which backends
// were ready once. A number with some digits too many does not cost it its memory.
func TestReplicasAloneBegin(t *testing.T) {
	for replicas, want := range map[int]int{6: 6, maxReplicas: maxReplicas, math.MaxInt32: maxReplicas} {
		bubble(t, func(t *testing.T) {
			f, n := kubeOfFour(), newPipeNetwork()
			f.serve(t, n)
			f.scale(replicas)
			wantEqual(t, "backends", followReplicas(t, n, nil, nil).last.Load().(ordinalRange), ordinalRange{0, want})
		})
	}
}

// While a scale-out is stuck, nothing but a pod that becomes ready gives the new backends
// namespaces: not kubectl replace of the StatefulSet, not the loss of the stored range, not a
// router that starts.
func TestReplicasStuckScaleOut(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, n := kubeOfFour(), newPipeNetwork()
		f.serve(t, n)
		shared := &sharedRange{}
		first := followReplicas(t, n, shared, nil)
		shared.wantWrites(t, "4 of u-backend/1")
		for _, step := range []struct {
			what   string
			change func()
			writes []string
		}{
			{"scale to 6, and backend-4 fails", func() { f.scale(6); f.setReady(0, 1, 2, 3, 5) }, []string{"4 of u-backend/2"}},
			{"kubectl replace", func() { f.scale(6) }, []string{"4 of u-backend/3"}},
			{"backend-1 restarts", func() { f.setReady(0, 2, 3, 5) }, nil},
			{"the stored range is lost", func() { shared.set(nil) }, []string{"4 of u-backend/3"}},
			{"kubectl replace again", func() { f.scale(6) }, []string{"4 of u-backend/4"}},
			{"a router starts", func() { followReplicas(t, n, shared, nil) }, nil},
		} {
			step.change()
			time.Sleep(time.Minute)
			shared.wantWrites(t, step.writes...)
			for _, r := range shared.routers {
				wantEqual(t, "backends after: "+step.what, r.last.Load().(ordinalRange), ordinalRange{0, 4})
			}
		}
		f.setReady(0, 1, 2, 3, 4, 5)
		shared.wantWrites(t, "6 of u-backend/4")
		wantEqual(t, "backends", first.last.Load().(ordinalRange), ordinalRange{0, 6})
		before := first.proposals.Load()
		time.Sleep(time.Hour)
		wantEqual(t, "calls of onProposal at rest", first.proposals.Load()-before, 0)
		shared.wantWrites(t)
	})
}

// A router whose watches stand still writes nothing. It lists the StatefulSet when the stored range
// shows that.
func TestReplicasOldPicture(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, network, frozen := kubeOfFour(), newPipeNetwork(), newPipeNetwork()
		f.serve(t, network)
		f.serve(t, frozen)
		f.scale(6)
		f.setReady(0, 1, 2, 3, 4, 5)
		shared := &sharedRange{stored: &versionedRange{0, 6, "u-backend", 2}}
		old := followReplicas(t, frozen, shared, nil)
		followReplicas(t, network, shared, nil)
		shared.wantWrites(t)
		frozen.freeze()
		f.setReady(0, 1, 2)
		f.scale(3)
		shared.wantWrites(t, "3 of u-backend/3")
		f.scale(5)
		shared.wantWrites(t, "3 of u-backend/4") // the old picture has six backends, which are ready
		wantEqual(t, "what the old picture proposes", rangeText(old.wantedRange()), "none")
		wantEqual(t, "backends by the old picture", old.last.Load().(ordinalRange), ordinalRange{0, 3})
		wantEqual(t, "the generation of the old picture", old.lastStatefulSet().Metadata.Generation, 2)
		time.Sleep(confirmDelay + time.Second)
		wantEqual(t, "the generation that it sees then", old.lastStatefulSet().Metadata.Generation, 4)
	})
}

// A StatefulSet with another UID begins anew, when a LIST shows it. A router with a picture
// of the one before does not bring that back.
func TestReplicasOfAnotherStatefulSet(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, network, frozen := kubeOfFour(), newPipeNetwork(), newPipeNetwork()
		f.serve(t, network)
		f.serve(t, frozen)
		shared := &sharedRange{}
		old := followReplicas(t, frozen, shared, nil)
		shared.wantWrites(t, "4 of u-backend/1")
		f.setReady(0, 1)
		synctest.Wait()
		frozen.freeze()
		f.setStatefulSet(func(s *fakeStatefulSet) { *s = fakeStatefulSet{replicas: 6, generation: 1, uid: "new"} })
		r := followReplicas(t, network, shared, nil) // which has not seen the one before
		wantEqual(t, "backends", r.last.Load().(ordinalRange), ordinalRange{0, 2})
		shared.wantWrites(t)
		time.Sleep(confirmDelay + time.Second)
		shared.wantWrites(t, "2 of new/1")
		wantEqual(t, "backends by the old picture", old.last.Load().(ordinalRange), ordinalRange{0, 4})
		wantEqual(t, "what it proposes", rangeText(old.wantedRange()), "none")
		time.Sleep(confirmDelay + time.Second)
		shared.wantWrites(t)
		wantEqual(t, "backends when it is seen", old.last.Load().(ordinalRange), ordinalRange{0, 2})
	})
}

// A StatefulSet that does not exist is not listed again and again, whatever the stored range is.
func TestReplicasDeletedRest(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, n := kubeOfFour(), newPipeNetwork()
		f.serve(t, n)
		shared := &sharedRange{}
		r := followReplicas(t, n, shared, nil)
		f.deleteStatefulSet()
		synctest.Wait()
		shared.set(&versionedRange{0, 6, "new", 1})
		f.verbs()
		time.Sleep(2 * time.Minute)
		wantEqual(t, "requests", f.verbs(), "")
		wantEqual(t, "backends", r.last.Load().(ordinalRange), ordinalRange{0, 4})
		wantEqual(t, "proposal", rangeText(r.wantedRange()), "none")
	})
}

// After a restored etcd the generation may be lower than the one of the stored range. A LIST shows
// that, and the number follows the StatefulSet again.
func TestReplicasOfRestoredStatefulSet(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, n := kubeOfFour(), newPipeNetwork()
		f.serve(t, n)
		shared := &sharedRange{stored: &versionedRange{0, 4, "u-backend", 90}}
		r := followReplicas(t, n, shared, nil)
		followReplicas(t, n, shared, nil)
		time.Sleep(time.Minute)
		shared.wantWrites(t)
		for _, step := range []struct {
			replicas, count int
			write           string
		}{{6, 6, "6 of u-backend/91"}, {3, 3, "3 of u-backend/92"}} {
			f.setReady(0, 1, 2, 3, 4, 5)
			f.scale(step.replicas)
			time.Sleep(time.Minute)
			shared.wantWrites(t, step.write)
			wantEqual(t, "backends", r.last.Load().(ordinalRange), ordinalRange{0, step.count})
		}
	})
}

// onBackendsChanged has one call at a time, whoever changes what.
func TestReplicasResizeInTurn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, n := kubeOfFour(), newPipeNetwork()
		f.serve(t, n)
		f.scale(1000)
		var calls atomic.Int32
		shared := &sharedRange{stored: &versionedRange{0, 4, "u-backend", 2}}
		r := followReplicas(t, n, shared, func(backendSet) {
			if calls.Add(1) != 1 {
				t.Error("a call of onBackendsChanged within another")
			}
			time.Sleep(time.Millisecond)
			calls.Add(-1)
		})
		var others sync.WaitGroup
		for i := range 10 {
			others.Go(func() {
				for j := range 50 {
					shared.set(&versionedRange{0, 1 + 50*i + j, "u-backend", 2})
					time.Sleep(time.Duration(1+(7*i+j)%5) * time.Millisecond)
				}
			})
		}
		others.Wait()
		shared.set(&versionedRange{0, 777, "u-backend", 2})
		time.Sleep(time.Second)
		wantEqual(t, "the last of onBackendsChanged", r.last.Load().(ordinalRange), ordinalRange{0, 777})
	})
}

// Whatever the StatefulSet and the stored range go through, and whenever a router starts, is
// cut off or comes back, all routers that have seen their last versions have the same
// backends: never more than there are to be, and none that never was ready.
func TestReplicasAgree(t *testing.T) {
	if withoutRace(t) {
		return
	}
	for seed := range uint64(40) {
		inBubble(t, fmt.Sprint(seed), func(t *testing.T) { changeReplicasAtRandom(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func changeReplicasAtRandom(t *testing.T, rng *rand.Rand) {
	const broken = 6                                                       // and those after it
	f, network, frozen := kubeOfFour(), newPipeNetwork(), newPipeNetwork() // watches through frozen stand still now and then
	f.serve(t, network)
	f.serve(t, frozen)
	shared := &sharedRange{}
	followReplicas(t, network, shared, nil)
	followReplicas(t, frozen, shared, nil)
	replicas := 4
	wantAlike := func() {
		t.Helper()
		synctest.Wait()
		want := shared.routers[0].last.Load().(ordinalRange)
		for i, r := range shared.routers {
			if got := r.last.Load(); got != want && (i != 1 || frozen.frozen.Load() == 0) {
				t.Errorf("router %d has %+v, the first %+v", i, got, want)
			}
		}
		if want.count > min(replicas, broken) {
			t.Errorf("%d backends, of %d that there are to be and %d that work", want.count, replicas, broken)
		}
	}
	for range 30 {
		switch rng.IntN(6) {
		case 0:
			replicas = 1 + rng.IntN(8)
			f.scale(replicas)
		case 1:
			frozen.freeze()
		case 2:
			followReplicas(t, network, shared, nil)
		case 3:
			shared.set(nil)
		default:
			ready := []int{}
			for i := range min(replicas, broken) {
				if rng.IntN(4) > 0 {
					ready = append(ready, i)
				}
			}
			f.setReady(ready...)
		}
		if rng.IntN(3) == 0 { // the next state comes before this one is seen
			time.Sleep(time.Duration(rng.IntN(3)) * time.Millisecond)
			continue
		}
		time.Sleep(time.Second)
		wantAlike()
	}
	time.Sleep(10 * time.Minute) // the router that stood still lists again
	frozen.frozen.Store(0)
	wantAlike()
}

// sliceSet is a set of EndpointSlices, each of an address type and endpoints in JSON.
func sliceSet(t *testing.T, all ...string) map[string]*endpointSlice {
	t.Helper()
	set := map[string]*endpointSlice{}
	for i, endpoints := range all {
		family, list, _ := strings.Cut(endpoints, " ")
		s := &endpointSlice{AddressType: family}
		s.Metadata.Name = fmt.Sprint("slice-", i)
		must(t, json.Unmarshal([]byte(list), &s.Endpoints))
		set[s.Metadata.Name] = s
	}
	return set
}

func TestPodAddresses(t *testing.T) {
	v4 := func(endpoints ...string) string { return "IPv4 [" + strings.Join(endpoints, ",") + "]" }
	v6 := func(endpoints ...string) string { return "IPv6 [" + strings.Join(endpoints, ",") + "]" }
	pod := func(address, hostname, conditions string) string {
		return fmt.Sprintf(`{"addresses":[%q],"hostname":%q,"conditions":{%s}}`, address, hostname, conditions)
	}
	of := func(address, hostname, target string) string {
		return fmt.Sprintf(`{"addresses":[%q],"hostname":%q,"targetRef":{%s}}`, address, hostname, target)
	}
	const ready, not = `"ready":true,"serving":true,"terminating":false`, `"ready":false,"serving":false,"terminating":false`
	const ip, ip2, ip3 = "10.0.0.1", "10.0.0.2", "10.0.0.3"
	all := func(slices ...string) []string { return slices }
	tests := map[string]struct {
		slices []string
		want   string // "ordinal ready addresses", joined
	}{
		"several slices": {all(v4(pod(ip, "backend-0", ready), pod(ip2, "backend-10", ready)), v4(pod(ip3, "backend-2", ready))),
			"0 true [10.0.0.1:9000], 2 true [10.0.0.3:9000], 10 true [10.0.0.2:9000]"},
		"no endpoints":     {all("IPv4 null", "IPv4 []"), ""},
		"no conditions":    {all(v4(pod(ip, "backend-0", ""))), "0 true [10.0.0.1:9000]"},
		"not ready":        {all(v4(pod(ip, "backend-0", not))), "0 false [10.0.0.1:9000]"},
		"not serving":      {all(v4(pod(ip, "backend-0", `"ready":true,"serving":false`))), "0 false [10.0.0.1:9000]"},
		"terminating":      {all(v4(pod(ip, "backend-0", `"ready":false,"serving":true,"terminating":true`))), "0 false [10.0.0.1:9000]"},
		"published anyway": {all(v4(pod(ip, "backend-0", `"ready":true,"serving":true,"terminating":true`))), "0 false [10.0.0.1:9000]"},
		"IPv6":             {all(v6(pod("fd00::1", "backend-0", ready))), "0 true [[fd00::1]:9000]"},
		"both families":    {all(v6(pod("fd00::1", "backend-0", ready)), v4(pod(ip, "backend-0", ready))), "0 true [10.0.0.1:9000 [fd00::1]:9000]"},
		"one family ready": {all(v6(pod("fd00::1", "backend-0", ready)), v4(pod(ip, "backend-0", not))), "0 true [[fd00::1]:9000]"},
		"in two slices":    {all(v4(pod(ip, "backend-0", ready)), v4(pod(ip, "backend-0", ready))), "0 true [10.0.0.1:9000]"},
		"last life first":  {all(v4(pod(ip, "backend-0", not)), v4(pod(ip2, "backend-0", ready))), "0 true [10.0.0.2:9000]"},
		"last life last":   {all(v4(pod(ip2, "backend-0", ready), pod(ip, "backend-0", not))), "0 true [10.0.0.2:9000]"},
		"address moved on": {all(v4(pod(ip, "backend-0", not), pod(ip, "backend-1", ready))), "0 false [10.0.0.1:9000], 1 true [10.0.0.1:9000]"},
		"no hostname":      {all(v4(of(ip, "", `"kind":"Pod","name":"backend-3"`))), "3 true [10.0.0.1:9000]"},
		"a copy of a pod":  {all(v4(of(ip2, "backend-3", `"kind":"Pod","name":"dbg"`), of(ip, "backend-3", `"kind":"Pod","name":"backend-3"},"conditions":{"ready":false`))), "3 false [10.0.0.1:9000]"},
		"only a copy":      {all(v4(of(ip, "backend-3", `"kind":"Pod","name":"dbg"`))), ""},
		"other hostname":   {all(v4(of(ip, "backend-2", `"kind":"Pod","name":"backend-3"`))), "3 true [10.0.0.1:9000]"},
		"written by hand":  {all(v4(of(ip, "backend-3", `"kind":"Pod"`))), "3 true [10.0.0.1:9000]"},
		"no name":          {all(v4(pod(ip, "", ""))), ""},
		"other target":     {all(v4(of(ip, "", `"kind":"Node","name":"backend-3"`))), ""},
		"other pods":       {all(v4(pod(ip, "front-0", ready), pod(ip2, "backend-x", ready), pod(ip3, "backend-01", ready))), ""},
		"no address":       {all(v4(`{"hostname":"backend-0","addresses":[]}`)), ""},
		"names as address": {all("FQDN [" + pod("backend-0.example", "backend-0", ready) + "]"), ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			addresses := podAddresses(sliceSet(t, tt.slices...), "backend", "9000")
			var got []string
			for _, ordinal := range slices.Sorted(maps.Keys(addresses)) {
				got = append(got, fmt.Sprint(ordinal, " ", addresses[ordinal].usable, " ", addresses[ordinal].addrs))
			}
			wantEqual(t, "addresses", strings.Join(got, ", "), tt.want)
		})
	}
}

// wantResolved checks where a backend is.
func wantResolved(t *testing.T, w *endpointWatcher, ordinal int, addr, err string) {
	t.Helper()
	got, gotErr := w.resolve(t.Context(), ordinal)
	if got != addr || fmt.Sprint(gotErr) != err {
		t.Errorf("backend-%d is at %q, %v; want %q, %s", ordinal, got, gotErr, addr, err)
	}
}

// While the EndpointSlices cannot be watched, DNS is asked for the backends that they say
// are not ready or whose address was wrong, and for no others.
func TestEndpointsWatchFailsAsksDNS(t *testing.T) {
	bubble(t, func(t *testing.T) {
		f, n := kubeOfFour(), newPipeNetwork()
		f.setEndpoints(readyEndpoints(0, 1, 2))
		f.serve(t, n)
		p := followReplicas(t, n, nil, nil).endpoints
		var asked atomic.Int64
		byDNS := error(nil)
		p.dnsBackends.resolve = func(ctx context.Context, ordinal int) (string, error) {
			asked.Add(1)
			return fmt.Sprintf("10.9.9.%d:9000", ordinal), byDNS
		}
		p.invalidate(1)
		wantResolved(t, p, 1, "10.0.0.1:9000", "<nil>")
		wantResolved(t, p, 3, "", "backend-3 is not ready")
		waited := make(chan error, 1)
		go func() {
			waited <- p.queues.wait(t.Context(), p.queues.newWaiter("ns"), 3, func(string) int { return 3 })
		}()
		synctest.Wait()
		if n := asked.Load(); n != 0 {
			t.Fatalf("DNS was asked %d times while the watch works", n)
		}

		f.forbid("LIST", "endpointslices")
		time.Sleep(10 * time.Minute)     // the stream that there is goes on for some
		if err := <-waited; err != nil { // it need not be ready any more to be dialled
			t.Error(err)
		}
		p.queues.dialDone(3, nil, false)
		wantResolved(t, p, 3, "10.9.9.3:9000", "<nil>")
		wantResolved(t, p, 0, "10.0.0.0:9000", "<nil>")
		p.invalidate(0)
		wantResolved(t, p, 0, "10.9.9.0:9000", "<nil>")
		byDNS = errors.New("no such host")
		wantResolved(t, p, 0, "10.0.0.0:9000", "<nil>")
		wantResolved(t, p, 3, "10.9.9.3:9000", "no such host")

		before := asked.Load()
		f.allow("LIST", "endpointslices")
		time.Sleep(90 * time.Second)
		wantResolved(t, p, 0, "10.0.0.0:9000", "<nil>")
		wantResolved(t, p, 3, "", "backend-3 is not ready")
		wantEqual(t, "requests to DNS since the watch recovered", asked.Load()-before, 0)
	})
}

// DNS is asked for a pod in the Kubernetes namespace of the StatefulSet, which need not be that of
// the router: there may be pods of the same name there.
func TestEndpointsAskDNSInNamespace(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	e := newEndpointWatcher(kubeClient{}, "tenants", "backend", "headless", 9000, func(map[int]string) {}, log)
	defer e.dnsBackends.close()
	const want = "look up backend-0.headless.tenants.svc: "
	if _, err := e.resolve(t.Context(), 0); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("the error is %v, want one with %q", err, want)
	}
}

// A pod is gone if the API server says that there is none of that name, and only then: others on
// the way to it may also answer 404.
func TestPodIsGone(t *testing.T) {
	pod := func(namespace, name string) http.HandlerFunc {
		return respond(200, fmt.Sprintf(`{"kind":"Pod","metadata":{"namespace":%q,"name":%q,"uid":"u"}}`, namespace, name), "Content-Type", "application/json")
	}
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		want   bool
	}{
		"the pod":                  {pod("edge", "backend-3"), false},
		"another pod":              {pod("edge", "backend-33"), false},
		"a pod of another place":   {pod("other", "backend-3"), false},
		"no pod":                   {respond(200, "{}"), false},
		"forbidden":                {forbidden(), false},
		"an error":                 {respond(500, "{}"), false},
		"not found":                {notFound("pods", "backend-3"), true},
		"another pod not found":    {notFound("pods", "backend-33"), false},
		"something else not found": {notFound("namespaces", "edge"), false},
		"a path not found":         {respond(404, `{"kind":"Status","reason":"NotFound","message":"the server could not find the requested resource","code":404,"details":{}}`), false},
		"404 in text":              {respond(404, "404 page not found\n", "Content-Type", "text/plain"), false},
		"404 with nothing":         {respond(404, "{}"), false},
	} {
		path := ""
		server := newFakeKube()
		server.scripts["GET pods"] = script{func(w http.ResponseWriter, r *http.Request) {
			path = r.URL.Path
			tt.answer(w, r)
		}}
		client, err := newKubectlProxyClient(server.url(t))
		must(t, err)
		p := newEndpointWatcher(*client, "edge", "backend", "headless", 9000, func(map[int]string) {}, slog.New(slog.DiscardHandler))
		got, err := p.backends().podIsGone(t.Context(), 3)
		if wantErr := !tt.want && name != "the pod"; got != tt.want || wantErr != (err != nil) {
			t.Errorf("%s: gone is %t (%v), want %t", name, got, err, tt.want)
		}
		wantEqual(t, "path", path, "/api/v1/namespaces/edge/pods/backend-3")
		uids, err := (&sharedHandoff{client: *client, watcher: &watcher[handoffConfigMap]{kubeNamespace: "edge"}}).
			findGone(t.Context(), map[string]memberID{"backend-3": {UID: "u"}})
		if gone := len(uids) == 1; gone != tt.want || gone == (err != nil) && name != "the pod" {
			t.Errorf("%s: the routers' pods that are gone are %q (%v), want that one: %t", name, uids, err, tt.want)
		}
	}
	client, err := newKubectlProxyClient("http://" + refusingAddr(t))
	must(t, err)
	p := newEndpointWatcher(*client, "edge", "backend", "headless", 9000, func(map[int]string) {}, slog.New(slog.DiscardHandler))
	if gone, err := p.backends().podIsGone(t.Context(), 3); gone || err == nil {
		t.Errorf("without an API server a pod is gone: %t (%v)", gone, err)
	}
}

// onPods gets the uids of the usable pods before they are dialled.
func TestEndpointsReplacePods(t *testing.T) {
	got := ""
	var p *endpointWatcher
	p = newEndpointWatcher(kubeClient{}, "edge", "backend", "headless", 9000,
		func(uids map[int]string) { got = fmt.Sprint(uids, " after ", p.podUID(0)) },
		slog.New(slog.DiscardHandler))
	pod := func(addr, uid string, ready bool) string {
		return fmt.Sprintf(`[{"addresses":[%q],"targetRef":{"kind":"Pod","name":"backend-0","uid":%q},"conditions":{"ready":%v}}]`, addr, uid, ready)
	}
	for _, step := range []struct {
		slices []string
		want   string
	}{
		{[]string{"IPv4 " + pod("10.0.0.1", "a", true)}, "map[0:a] after "},
		{[]string{"IPv4 " + pod("10.0.0.1", "a", false)}, "map[] after a"},
		{[]string{"IPv4 " + pod("10.0.0.2", "b", false)}, "map[] after "},
		{[]string{"IPv4 " + pod("10.0.0.2", "b", true)}, "map[0:b] after "},
		{[]string{"IPv4 " + pod("10.0.0.3", "c", true), "IPv6 " + pod("fd00::2", "b", true)}, "map[0:c] after b"},
		{[]string{"IPv4 " + readyEndpoints(0)}, "map[] after c"},
	} {
		p.apply(sliceSet(t, step.slices...))
		wantEqual(t, fmt.Sprint("what onPods got after ", step.slices), got, step.want)
		wantEqual(t, fmt.Sprint("addresses of the one pod after ", step.slices), len(p.addresses[0].addrs), 1)
	}
}

// Where a backend is, by the EndpointSlices.
func TestEndpointsResolve(t *testing.T) {
	p := newEndpointWatcher(kubeClient{}, "edge", "backend", "headless", 9000,
		func(map[int]string) {}, slog.New(slog.DiscardHandler))
	asked := 0
	p.dnsBackends.resolve = func(context.Context, int) (string, error) { asked++; return "by DNS", nil }
	apply := func(all ...string) { p.apply(sliceSet(t, all...)) }
	wantResolved(t, p, 0, "by DNS", "<nil>")
	apply()
	wantResolved(t, p, 0, "by DNS", "<nil>")
	apply("IPv4 "+readyEndpoints(0, 1), `IPv6 [{"addresses":["fd00::1"],"hostname":"backend-0"}]`)
	wantResolved(t, p, 0, "10.0.0.0:9000", "<nil>")
	wantResolved(t, p, 2, "", "backend-2 is not ready")
	p.invalidate(0)
	wantResolved(t, p, 0, "[fd00::1]:9000", "<nil>")
	p.invalidate(0)
	p.invalidate(1)
	wantResolved(t, p, 0, "10.0.0.0:9000", "<nil>")
	wantResolved(t, p, 1, "10.0.0.1:9000", "<nil>")
	apply() // the Service is gone: that says nothing about the pods
	wantResolved(t, p, 0, "10.0.0.0:9000", "<nil>")
	apply("IPv4 " + readyEndpoints(1))
	wantResolved(t, p, 0, "", "backend-0 is not ready")
	waited := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() { waited <- p.queues.wait(ctx, p.queues.newWaiter("ns"), 0, always0) }()
	for len(p.queues.waitersOf(0)) == 0 {
		<-time.After(time.Millisecond)
	}
	apply("IPv4 " + readyEndpoints(0))
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if asked != 2 {
		t.Errorf("DNS was asked %d times, want 2", asked)
	}
}
