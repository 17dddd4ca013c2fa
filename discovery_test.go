package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
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
			if got := s.nextActiveCount(tt.ready); got != tt.note {
				t.Errorf("note %d, want %d", got, tt.note)
			}
		})
	}
}

// TestReplicasFollow: one router, from state to state.
func TestReplicasFollow(t *testing.T) {
	type step struct {
		what   string
		change func(f *fakeReplicas)
		want   ordinals
	}
	from, to := func(count int) ordinals { return ordinals{0, count} }, func(replicas int) func(*fakeReplicas) {
		return func(f *fakeReplicas) { f.scale(replicas) }
	}
	ready := func(ordinals ...int) func(*fakeReplicas) { return func(f *fakeReplicas) { f.setReady(ordinals...) } }
	forbid := func(what, note string) func(*fakeReplicas) {
		return func(f *fakeReplicas) {
			f.change("statefulsets", func() { f.forbidden[what], f.set.activeCount = true, note })
		}
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
			{"deleted", func(f *fakeReplicas) { f.change("statefulsets", func() { f.set = nil }) }, from(4)},
			{"made anew", func(f *fakeReplicas) { f.change("statefulsets", func() { f.set = &fakeStateful{replicas: 5} }) }, from(5)},
		},
		"other ordinals": {
			{"start at 2", func(f *fakeReplicas) { f.change("statefulsets", func() { f.set.start = 2 }) }, ordinals{2, 4}},
		},
		"only the StatefulSet may be read": {
			{"forbidden", forbid("LIST endpointslices", "4"), from(4)},
			{"scale to 6", to(6), from(4)},
			{"five are ready", func(f *fakeReplicas) { f.change("statefulsets", func() { f.set.ready = 5 }) }, from(5)},
			{"six are ready", func(f *fakeReplicas) { f.change("statefulsets", func() { f.set.ready = 6 }) }, from(6)},
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
				f := newFakeReplicas(fakeStateful{replicas: 4, ready: 4, activeCount: "4"})
				f.slices["one"] = fakeEndpoints(0, 1, 2, 3)
				n := serveReplicas(t, f)
				if steps[0].what == "forbidden" { // from the start
					steps[0].change(f)
				}
				r := startReplicas(t, n)
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

// TestReplicasAgree: whatever the StatefulSet goes through, and whenever a router
// starts, is cut off or comes back, all routers that have seen its last version
// have the same backends: never more than it is to have, and more than before
// only if these are ready.
func TestReplicasAgree(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { changeReplicasAtRandom(t, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
}

func changeReplicasAtRandom(t *testing.T, rng *rand.Rand) {
	f := newFakeReplicas(fakeStateful{replicas: 4, ready: 4})
	f.slices["one"] = fakeEndpoints(0, 1, 2, 3)
	net := serveReplicas(t, f)
	away := serveReplicas(t, f) // of routers whose watches stand still now and then
	routers := []*fakeRouter{startReplicas(t, net), startReplicas(t, away)}
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
			routers = append(routers, startReplicas(t, net))
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

// sliceSet is a set of EndpointSlices, from the address type and the endpoints in
// JSON of each.
func sliceSet(t *testing.T, all map[string]string) map[string]*endpointSlice {
	t.Helper()
	set := map[string]*endpointSlice{}
	for name, endpoints := range all {
		family, list, _ := strings.Cut(endpoints, " ")
		s := &endpointSlice{AddressType: family}
		s.Metadata.Name = name
		if err := json.Unmarshal([]byte(list), &s.Endpoints); err != nil {
			t.Fatal(err)
		}
		set[name] = s
	}
	return set
}

func TestPodAddresses(t *testing.T) {
	pod := func(address, hostname, conditions string) string {
		return fmt.Sprintf(`{"addresses":[%q],"hostname":%q,"conditions":{%s}}`, address, hostname, conditions)
	}
	const ready, not = `"ready":true,"serving":true,"terminating":false`, `"ready":false,"serving":false,"terminating":false`
	tests := map[string]struct {
		slices map[string]string
		want   string // "ordinal ready addresses", joined
	}{
		"several slices": {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", ready) + "," + pod("10.0.0.2", "backend-10", ready) + "]",
			"b": "IPv4 [" + pod("10.0.0.3", "backend-2", ready) + "]"},
			"0 true [10.0.0.1:9000], 2 true [10.0.0.3:9000], 10 true [10.0.0.2:9000]"},
		"no endpoints":     {map[string]string{"a": "IPv4 null", "b": "IPv4 []"}, ""},
		"no conditions":    {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", "") + "]"}, "0 true [10.0.0.1:9000]"},
		"not ready":        {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", not) + "]"}, "0 false [10.0.0.1:9000]"},
		"not serving":      {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", `"ready":true,"serving":false`) + "]"}, "0 false [10.0.0.1:9000]"},
		"terminating":      {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", `"ready":false,"serving":true,"terminating":true`) + "]"}, "0 false [10.0.0.1:9000]"},
		"published anyway": {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", `"ready":true,"serving":true,"terminating":true`) + "]"}, "0 false [10.0.0.1:9000]"},
		"IPv6":             {map[string]string{"a": "IPv6 [" + pod("fd00::1", "backend-0", ready) + "]"}, "0 true [[fd00::1]:9000]"},
		"both families":    {map[string]string{"a": "IPv6 [" + pod("fd00::1", "backend-0", ready) + "]", "b": "IPv4 [" + pod("10.0.0.1", "backend-0", ready) + "]"}, "0 true [10.0.0.1:9000 [fd00::1]:9000]"},
		"one family ready": {map[string]string{"a": "IPv6 [" + pod("fd00::1", "backend-0", ready) + "]", "b": "IPv4 [" + pod("10.0.0.1", "backend-0", not) + "]"}, "0 true [[fd00::1]:9000]"},
		"in two slices":    {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", ready) + "]", "b": "IPv4 [" + pod("10.0.0.1", "backend-0", ready) + "]"}, "0 true [10.0.0.1:9000]"},
		"last life first":  {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", not) + "]", "b": "IPv4 [" + pod("10.0.0.2", "backend-0", ready) + "]"}, "0 true [10.0.0.2:9000]"},
		"last life last":   {map[string]string{"a": "IPv4 [" + pod("10.0.0.2", "backend-0", ready) + "," + pod("10.0.0.1", "backend-0", not) + "]"}, "0 true [10.0.0.2:9000]"},
		"address moved on": {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "backend-0", not) + "," + pod("10.0.0.1", "backend-1", ready) + "]"}, "0 false [10.0.0.1:9000], 1 true [10.0.0.1:9000]"},
		"no hostname":      {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"],"targetRef":{"kind":"Pod","name":"backend-3"}}]`}, "3 true [10.0.0.1:9000]"},
		"a copy of a pod": {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.9"],"hostname":"backend-3","targetRef":{"kind":"Pod","name":"dbg"}},
			{"addresses":["10.0.0.1"],"hostname":"backend-3","targetRef":{"kind":"Pod","name":"backend-3"},"conditions":{"ready":false}}]`}, "3 false [10.0.0.1:9000]"},
		"only a copy":       {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.9"],"hostname":"backend-3","targetRef":{"kind":"Pod","name":"dbg"}}]`}, ""},
		"other hostname":    {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"],"hostname":"backend-2","targetRef":{"kind":"Pod","name":"backend-3"}}]`}, "3 true [10.0.0.1:9000]"},
		"written by hand":   {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"],"hostname":"backend-3","targetRef":{"kind":"Pod"}}]`}, "3 true [10.0.0.1:9000]"},
		"no name":           {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"]}]`}, ""},
		"other target":      {map[string]string{"a": `IPv4 [{"addresses":["10.0.0.1"],"targetRef":{"kind":"Node","name":"backend-3"}}]`}, ""},
		"other pods":        {map[string]string{"a": "IPv4 [" + pod("10.0.0.1", "front-0", ready) + "," + pod("10.0.0.2", "backend-x", ready) + "," + pod("10.0.0.3", "backend-01", ready) + "]"}, ""},
		"no address":        {map[string]string{"a": `IPv4 [{"hostname":"backend-0","addresses":[]}]`}, ""},
		"names for address": {map[string]string{"a": "FQDN [" + pod("backend-0.example", "backend-0", ready) + "]"}, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			places := podAddresses(sliceSet(t, tt.slices), "backend", "9000")
			var got []string
			for _, ordinal := range slices.Sorted(maps.Keys(places)) {
				got = append(got, fmt.Sprintln(ordinal, places[ordinal].ready, places[ordinal].addrs))
			}
			if got := strings.TrimSuffix(strings.ReplaceAll(strings.Join(got, ""), "\n", ", "), ", "); got != tt.want {
				t.Errorf("places %s, want %s", got, tt.want)
			}
		})
	}
}

// TestEndpointsWatchFails: while the EndpointSlices cannot be followed, DNS is asked for
// what is not ready by them or was no good, and for nothing else.
func TestEndpointsWatchFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeReplicas(fakeStateful{replicas: 4, ready: 4, activeCount: "4"})
		f.slices["one"] = fakeEndpoints(0, 1, 2)
		n := serveReplicas(t, f)
		p := startReplicas(t, n).endpoints
		var asked atomic.Int64
		byDNS := error(nil)
		p.dnsBackends.resolve = func(ctx context.Context, ordinal int) (string, error) {
			asked.Add(1)
			return fmt.Sprintf("10.9.9.%d:9000", ordinal), byDNS
		}
		want := func(ordinal int, addr, err string) {
			t.Helper()
			got, gotErr := p.resolve(t.Context(), ordinal)
			if got != addr || fmt.Sprint(gotErr) != err {
				t.Errorf("backend-%d is at %q, %v; want %q, %s", ordinal, got, gotErr, addr, err)
			}
		}
		p.invalidate(1)
		want(1, "10.0.0.1:9000", "<nil>")
		want(3, "", "backend-3 is not ready")
		waited := make(chan error, 1)
		go func() { waited <- p.queues.wait(t.Context(), p.queues.newWaiter(), 3, 0) }()
		synctest.Wait()
		if n := asked.Load(); n != 0 {
			t.Fatalf("DNS was asked %d times while the watch works", n)
		}

		f.change("endpointslices", func() { f.forbidden["LIST endpointslices"] = true })
		time.Sleep(10 * time.Minute)     // the stream that there is goes on for some
		if err := <-waited; err != nil { // it need not be ready any more to be dialled
			t.Error(err)
		}
		p.queues.dialDone(3, nil, false)
		want(3, "10.9.9.3:9000", "<nil>")
		want(0, "10.0.0.0:9000", "<nil>")
		p.invalidate(0)
		want(0, "10.9.9.0:9000", "<nil>")
		byDNS = errors.New("no such host")
		want(0, "10.0.0.0:9000", "<nil>")
		want(3, "10.9.9.3:9000", "no such host")

		before := asked.Load()
		f.change("endpointslices", func() { delete(f.forbidden, "LIST endpointslices") })
		time.Sleep(90 * time.Second)
		want(0, "10.0.0.0:9000", "<nil>")
		want(3, "", "backend-3 is not ready")
		if n := asked.Load(); n != before {
			t.Errorf("DNS was asked %d times since the watch works again", n-before)
		}
	})
}

// TestEndpointsReplacePods: onPods gets the uids of the usable pods before they are
// dialled.
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
		slices map[string]string
		want   string
	}{
		{map[string]string{"x": "IPv4 " + pod("10.0.0.1", "a", true)}, "map[0:a] after "},
		{map[string]string{"x": "IPv4 " + pod("10.0.0.1", "a", false)}, "map[] after a"},
		{map[string]string{"x": "IPv4 " + pod("10.0.0.2", "b", false)}, "map[] after "},
		{map[string]string{"x": "IPv4 " + pod("10.0.0.2", "b", true)}, "map[0:b] after "},
		{map[string]string{"x": "IPv4 " + pod("10.0.0.3", "c", true), "y": "IPv6 " + pod("fd00::2", "b", true)}, "map[0:c] after b"},
		{map[string]string{"x": "IPv4 " + fakeEndpoints(0)}, "map[] after c"},
	} {
		p.apply(sliceSet(t, step.slices))
		if got != step.want {
			t.Errorf("after %v onPods got %s, want %s", step.slices, got, step.want)
		}
		if n := len(p.addresses[0].addrs); n != 1 {
			t.Errorf("after %v it has %d addresses, want one pod's", step.slices, n)
		}
	}
}

// TestEndpointsResolve: where a backend is, from what is known of the EndpointSlices.
func TestEndpointsResolve(t *testing.T) {
	p := newEndpointWatcher(kubeClient{}, "edge", "backend", "headless", 9000,
		func(map[int]string) {}, slog.New(slog.DiscardHandler))
	asked := 0
	p.dnsBackends.resolve = func(context.Context, int) (string, error) { asked++; return "by DNS", nil }
	want := func(ordinal int, addr, err string) {
		t.Helper()
		got, gotErr := p.resolve(t.Context(), ordinal)
		if got != addr || fmt.Sprint(gotErr) != err {
			t.Errorf("backend-%d is at %q, %v; want %q, %s", ordinal, got, gotErr, addr, err)
		}
	}
	apply := func(all map[string]string) { p.apply(sliceSet(t, all)) }
	want(0, "by DNS", "<nil>")
	apply(nil)
	want(0, "by DNS", "<nil>")
	apply(map[string]string{"a": "IPv4 " + fakeEndpoints(0, 1), "b": `IPv6 [{"addresses":["fd00::1"],"hostname":"backend-0"}]`})
	want(0, "10.0.0.0:9000", "<nil>")
	want(2, "", "backend-2 is not ready")
	p.invalidate(0)
	want(0, "[fd00::1]:9000", "<nil>")
	p.invalidate(0)
	p.invalidate(1)
	want(0, "10.0.0.0:9000", "<nil>")
	want(1, "10.0.0.1:9000", "<nil>")
	apply(nil) // the Service is gone: that says nothing about the pods
	want(0, "10.0.0.0:9000", "<nil>")
	apply(map[string]string{"a": "IPv4 " + fakeEndpoints(1)})
	want(0, "", "backend-0 is not ready")
	waited := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	go func() { waited <- p.queues.wait(ctx, p.queues.newWaiter(), 0, 0) }()
	for len(p.queues.waitersOf(0)) == 0 {
		<-time.After(time.Millisecond)
	}
	apply(map[string]string{"a": "IPv4 " + fakeEndpoints(0)})
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if asked != 2 {
		t.Errorf("DNS was asked %d times, want 2", asked)
	}
}
