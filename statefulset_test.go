package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestStatefulSetBackends(t *testing.T) {
	all := func(int) bool { return true }
	none := func(int) bool { return false }
	only := func(ready ...int) func(int) bool {
		return func(ordinal int) bool { return slices.Contains(ready, ordinal) }
	}
	tests := map[string]struct {
		object string // of spec and the annotation
		ready  func(int) bool
		want   ordinals
		note   int
	}{
		"no note":                  {`{"spec":{"replicas":4}}`, none, ordinals{0, 4}, 4},
		"replicas unset":           {`{"spec":{}}`, none, ordinals{0, 1}, 1},
		"as noted":                 {`{"spec":{"replicas":4},"metadata":{"annotations":{"router/backends":"4"}}}`, none, ordinals{0, 4}, 4},
		"scaled in":                {`{"spec":{"replicas":3},"metadata":{"annotations":{"router/backends":"6"}}}`, all, ordinals{0, 3}, 3},
		"scaled out":               {`{"spec":{"replicas":6},"metadata":{"annotations":{"router/backends":"4"}}}`, none, ordinals{0, 4}, 4},
		"one is ready":             {`{"spec":{"replicas":6},"metadata":{"annotations":{"router/backends":"4"}}}`, only(4), ordinals{0, 4}, 5},
		"the wrong one is ready":   {`{"spec":{"replicas":6},"metadata":{"annotations":{"router/backends":"4"}}}`, only(0, 1, 2, 3, 5), ordinals{0, 4}, 4},
		"all are ready":            {`{"spec":{"replicas":6},"metadata":{"annotations":{"router/backends":"4"}}}`, all, ordinals{0, 4}, 6},
		"zero":                     {`{"spec":{"replicas":0},"metadata":{"annotations":{"router/backends":"4"}}}`, all, ordinals{0, 4}, 4},
		"zero, no note":            {`{"spec":{"replicas":0}}`, all, ordinals{0, 0}, 0},
		"from another ordinal":     {`{"spec":{"replicas":3,"ordinals":{"start":5}},"metadata":{"annotations":{"router/backends":"2"}}}`, only(7), ordinals{5, 2}, 3},
		"note that is no number":   {`{"spec":{"replicas":4},"metadata":{"annotations":{"router/backends":"four"}}}`, none, ordinals{0, 4}, 4},
		"note that cannot be":      {`{"spec":{"replicas":4},"metadata":{"annotations":{"router/backends":"0"}}}`, none, ordinals{0, 4}, 4},
		"note that is less than 0": {`{"spec":{"replicas":4},"metadata":{"annotations":{"router/backends":"-3"}}}`, none, ordinals{0, 4}, 4},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := &statefulSet{}
			if err := json.Unmarshal([]byte(tt.object), s); err != nil {
				t.Fatal(err)
			}
			if got := s.backends(); got != tt.want {
				t.Errorf("backends %+v, want %+v", got, tt.want)
			}
			if got := s.note(tt.ready); got != tt.note {
				t.Errorf("note %d, want %d", got, tt.note)
			}
		})
	}
}

// TestScaleFollows: one router, from state to state.
func TestScaleFollows(t *testing.T) {
	type step struct {
		what   string
		change func(f *fakeScale)
		want   ordinals
	}
	from, to := func(count int) ordinals { return ordinals{0, count} }, func(replicas int) func(*fakeScale) {
		return func(f *fakeScale) { f.scale(replicas) }
	}
	ready := func(ordinals ...int) func(*fakeScale) { return func(f *fakeScale) { f.setReady(ordinals...) } }
	forbid := func(what, note string) func(*fakeScale) {
		return func(f *fakeScale) { f.change("statefulsets", func() { f.forbidden[what], f.set.note = true, note }) }
	}
	tests := map[string][]step{
		"out and in": {
			{"scale to 6", to(6), from(4)},
			{"backend-5 is ready first", ready(0, 1, 2, 3, 5), from(4)},
			{"backend-4 is ready", ready(0, 1, 2, 3, 4, 5), from(6)},
			{"backend-1 restarts", ready(0, 2, 3, 4, 5), from(6)},
			{"all restart", ready(), from(6)},
			{"and are back", ready(0, 1, 2, 3, 4, 5), from(6)},
			{"scale to 3", to(3), from(3)},
			{"pods are gone", ready(0, 1, 2), from(3)},
			{"scale to 4", to(4), from(3)},
			{"backend-3 is ready", ready(0, 1, 2, 3), from(4)},
		},
		"zero": {
			{"scale to 0", to(0), from(4)},
			{"pods are gone", ready(), from(4)},
			{"scale to 6", to(6), from(4)},
			{"four are ready", ready(0, 1, 2, 3), from(4)},
			{"six are ready", ready(0, 1, 2, 3, 4, 5), from(6)},
		},
		"one that never is ready": {
			{"scale to 6", to(6), from(4)},
			{"backend-4 starts", ready(0, 1, 2, 3, 4), from(5)},
			{"backend-4 crashes", ready(0, 1, 2, 3), from(5)},
			{"backend-4 is back", ready(0, 1, 2, 3, 4), from(5)},
		},
		"deleted": {
			{"deleted", func(f *fakeScale) { f.change("statefulsets", func() { f.set = nil }) }, from(4)},
			{"made anew", func(f *fakeScale) { f.change("statefulsets", func() { f.set = &fakeStateful{replicas: 5} }) }, from(5)},
		},
		"other ordinals": {
			{"start at 2", func(f *fakeScale) { f.change("statefulsets", func() { f.set.start = 2 }) }, ordinals{2, 4}},
		},
		"only the StatefulSet may be read": {
			{"forbidden", forbid("LIST endpointslices", "4"), from(4)},
			{"scale to 6", to(6), from(4)},
			{"five are ready", func(f *fakeScale) { f.change("statefulsets", func() { f.set.ready = 5 }) }, from(5)},
			{"six are ready", func(f *fakeScale) { f.change("statefulsets", func() { f.set.ready = 6 }) }, from(6)},
		},
		"no note may be written": {
			{"forbidden", forbid("PATCH statefulsets", ""), from(4)},
			{"scale to 6", to(6), from(6)},
			{"scale to 5", to(5), from(5)},
			{"scale to 0", to(0), from(5)},
		},
	}
	for name, steps := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFakeScale(fakeStateful{replicas: 4, ready: 4, note: "4"})
				f.slices["one"] = fakeEndpoints(0, 1, 2, 3)
				n := serveScale(t, f)
				if steps[0].what == "forbidden" { // from the start
					steps[0].change(f)
				}
				r := startScale(t, n)
				for _, s := range steps {
					s.change(f)
					time.Sleep(30 * time.Second) // until a watch that lost its object lists
					synctest.Wait()
					if got := r.now(); got != s.want {
						t.Fatalf("%s: %+v, want %+v; log:\n%s", s.what, got, s.want, r.logged)
					}
				}
			})
		})
	}
}

// TestScaleAgrees: whatever the StatefulSet goes through, and whenever a router
// starts, is cut off or comes back, all routers that have seen its last version
// have the same backends: never more than it is to have, and more than before
// only if these are ready.
func TestScaleAgrees(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { scaleAtRandom(t, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
}

func scaleAtRandom(t *testing.T, rng *rand.Rand) {
	f := newFakeScale(fakeStateful{replicas: 4, ready: 4})
	f.slices["one"] = fakeEndpoints(0, 1, 2, 3)
	net := serveScale(t, f)
	away := serveScale(t, f) // of routers whose watches stand still now and then
	routers := []*fakeRouter{startScale(t, net), startScale(t, away)}
	replicas := 4
	for range 30 {
		ready := []int{}
		switch rng.IntN(4) {
		case 0:
			replicas = 1 + rng.IntN(8)
			f.scale(replicas)
		case 1:
			away.freeze()
		case 2:
			routers = append(routers, startScale(t, net))
		default:
			for i := range replicas {
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
		synctest.Wait()
		want := routers[0].now()
		for i, r := range routers {
			if got := r.now(); got != want && (i != 1 || away.frozen.Load() == 0) {
				t.Errorf("router %d has %+v, the first %+v", i, got, want)
			}
		}
		if want.count > replicas {
			t.Errorf("%d backends, of %d that there are to be", want.count, replicas)
		}
	}
	time.Sleep(10 * time.Minute) // the router that stood still lists again
	synctest.Wait()
	for i, r := range routers {
		if got := r.now(); got != routers[0].now() {
			t.Errorf("at the end router %d has %+v, the first %+v", i, got, routers[0].now())
		}
	}
}
