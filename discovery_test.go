package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestStatefulSetBackends(t *testing.T) {
	tests := map[string]struct {
		spec      string
		annotated string // the active count; "" for none
		ready     string // ordinals
		want      ordinals
		next      int // active count
	}{
		"no active count":         {`"replicas":4`, "", "", ordinals{0, 4}, 4},
		"replicas unset":          {``, "", "", ordinals{0, 1}, 1},
		"all are active":          {`"replicas":4`, "4", "", ordinals{0, 4}, 4},
		"scaled in":               {`"replicas":3`, "6", "012345", ordinals{0, 3}, 3},
		"scaled out":              {`"replicas":6`, "4", "", ordinals{0, 4}, 4},
		"one is ready":            {`"replicas":6`, "4", "4", ordinals{0, 4}, 5},
		"the wrong one is ready":  {`"replicas":6`, "4", "01235", ordinals{0, 4}, 4},
		"all are ready":           {`"replicas":6`, "4", "012345", ordinals{0, 4}, 6},
		"zero":                    {`"replicas":0`, "4", "0123", ordinals{0, 4}, 4},
		"zero, no active count":   {`"replicas":0`, "", "", ordinals{0, 0}, 0},
		"from another ordinal":    {`"replicas":3,"ordinals":{"start":5}`, "2", "7", ordinals{5, 2}, 3},
		"count that is no number": {`"replicas":4`, "four", "", ordinals{0, 4}, 4},
		"count that cannot be":    {`"replicas":4`, "0", "", ordinals{0, 4}, 4},
		"count that is negative":  {`"replicas":4`, "-3", "", ordinals{0, 4}, 4},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			object, s := fmt.Sprintf(`{"spec":{%s},"metadata":{"annotations":{"router/backends":%q}}}`, tt.spec, tt.annotated), &statefulSet{}
			if tt.annotated == "" {
				object = fmt.Sprintf(`{"spec":{%s}}`, tt.spec)
			}
			must(t, json.Unmarshal([]byte(object), s))
			isReady := func(ordinal int) bool { return strings.Contains(tt.ready, strconv.Itoa(ordinal)) }
			if got, next := s.backends(), s.nextActiveCount(isReady); got != tt.want || next != tt.next {
				t.Errorf("backends %+v, next active count %d; want %+v, %d", got, next, tt.want, tt.next)
			}
		})
	}
}

// followingRouter is the part of a router that follows the StatefulSet.
type followingRouter struct {
	*replicaWatcher
	last   atomic.Value // ordinals
	logged *textLog
}

// followReplicas starts one. It calls resize for what the StatefulSet says, if that is not
// nil.
func followReplicas(t *testing.T, n *pipeNetwork, resize func(ordinals, string)) *followingRouter {
	t.Helper()
	r := &followingRouter{logged: &textLog{}}
	log := slog.New(slog.NewTextHandler(r.logged, nil))
	client := *n.kube(t)
	pods := newEndpointWatcher(client, "edge", "backend", "headless", 9000, func(map[int]string) {}, log)
	r.last.Store(ordinals{})
	r.replicaWatcher = newReplicaWatcher(client, "edge", pods, func(b ordinals, revision string) {
		r.last.Store(b)
		if resize != nil {
			resize(b, revision)
		}
	}, log)
	inBackground(t, pods.watcher.run, r.watcher.run, r.keepActiveCount)
	synctest.Wait()
	return r
}

// kubeOfFour has 4 backends, which are ready.
func kubeOfFour(activeCount string) *fakeKube {
	f := newFakeKube()
	f.setReady(0, 1, 2, 3)
	f.setStatefulSet(func(s *fakeStatefulSet) { s.replicas, s.generation, s.activeCount = 4, 1, activeCount })
	return f
}

// One router, from state to state.
func TestReplicasFollowed(t *testing.T) {
	type step struct {
		what   string
		change func(f *fakeKube)
		want   ordinals
	}
	from, to := func(count int) ordinals { return ordinals{0, count} }, func(replicas int) func(*fakeKube) {
		return func(f *fakeKube) { f.scale(replicas) }
	}
	ready := func(ordinals ...int) func(*fakeKube) { return func(f *fakeKube) { f.setReady(ordinals...) } }
	set := func(change func(*fakeStatefulSet)) func(*fakeKube) {
		return func(f *fakeKube) { f.setStatefulSet(change) }
	}
	forbid := func(verb, kind, activeCount string) func(*fakeKube) {
		return func(f *fakeKube) {
			f.forbid(verb, kind)
			f.setStatefulSet(func(s *fakeStatefulSet) { s.activeCount = activeCount })
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
			{"deleted", (*fakeKube).deleteStatefulSet, from(4)},
			{"made anew", set(func(s *fakeStatefulSet) { *s = fakeStatefulSet{replicas: 5} }), from(5)},
		},
		"other ordinals": {
			{"start at 2", set(func(s *fakeStatefulSet) { s.start = 2 }), ordinals{2, 4}},
		},
		"only the StatefulSet may be read": {
			{"forbidden", forbid("LIST", "endpointslices", "4"), from(4)},
			{"scale to 6", to(6), from(4)},
			{"five are ready", set(func(s *fakeStatefulSet) { s.ready = 5 }), from(5)},
			{"six are ready", set(func(s *fakeStatefulSet) { s.ready = 6 }), from(6)},
		},
		"no active count may be written": {
			{"forbidden", forbid("PATCH", "statefulsets", ""), from(4)},
			{"scale to 6", to(6), from(6)},
			{"scale to 5", to(5), from(5)},
			{"scale to 0", to(0), from(5)},
		},
	}
	for name, steps := range tests {
		inBubble(t, name, func(t *testing.T) {
			f, n := kubeOfFour("4"), newPipeNetwork()
			f.serve(t, n)
			if steps[0].what == "forbidden" { // from the start
				steps[0].change(f)
			}
			r := followReplicas(t, n, nil)
			for _, s := range steps {
				s.change(f)
				time.Sleep(30 * time.Second)
				synctest.Wait()
				if got := r.last.Load(); got != s.want {
					t.Fatalf("%s: %+v, want %+v; log:\n%s", s.what, got, s.want, r.logged)
				}
			}
		})
	}
}

// Whatever the StatefulSet goes through, and whenever a router starts, is cut off or
// comes back, all routers that have seen its last version have the same backends: never
// more than it is to have, and more than before only if these are ready.
func TestReplicasAgree(t *testing.T) {
	for seed := range uint64(40) {
		inBubble(t, fmt.Sprint(seed), func(t *testing.T) { changeReplicasAtRandom(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func changeReplicasAtRandom(t *testing.T, rng *rand.Rand) {
	f, network, frozen := kubeOfFour(""), newPipeNetwork(), newPipeNetwork() // watches through frozen stand still now and then
	f.serve(t, network)
	f.serve(t, frozen)
	routers := []*followingRouter{followReplicas(t, network, nil), followReplicas(t, frozen, nil)}
	wantAlike := func() {
		t.Helper()
		synctest.Wait()
		for i, r := range routers {
			if got, want := r.last.Load(), routers[0].last.Load(); got != want && (i != 1 || frozen.frozen.Load() == 0) {
				t.Errorf("router %d has %+v, the first %+v", i, got, want)
			}
		}
	}
	replicas := 4
	for range 30 {
		switch rng.IntN(4) {
		case 0:
			replicas = 1 + rng.IntN(8)
			f.scale(replicas)
		case 1:
			frozen.freeze()
		case 2:
			routers = append(routers, followReplicas(t, network, nil))
		default:
			ready := []int{}
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
		wantAlike()
		if got := routers[0].last.Load().(ordinals); got.count > replicas {
			t.Errorf("%d backends, of %d that there are to be", got.count, replicas)
		}
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
				got = append(got, fmt.Sprint(ordinal, " ", addresses[ordinal].ready, " ", addresses[ordinal].addrs))
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
	synctest.Test(t, func(t *testing.T) {
		f, n := kubeOfFour("4"), newPipeNetwork()
		f.setEndpoints(readyEndpoints(0, 1, 2))
		f.serve(t, n)
		p := followReplicas(t, n, nil).endpoints
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

// A pod is gone if the API server says that there is none of that name, and only then.
func TestPodIsGone(t *testing.T) {
	for status, want := range map[int]bool{200: false, 403: false, 404: true, 500: false} {
		path := ""
		server := kubeAnswers(t, func(w http.ResponseWriter, r *http.Request) {
			path = r.URL.Path
			respond(status, "{}")(w, r)
		})
		client, err := newKubectlProxyClient(server)
		must(t, err)
		p := newEndpointWatcher(*client, "edge", "backend", "headless", 9000, func(map[int]string) {}, slog.New(slog.DiscardHandler))
		if got := p.backends().podIsGone(t.Context(), 3); got != want {
			t.Errorf("%d: gone is %t, want %t", status, got, want)
		}
		wantEqual(t, "path", path, "/api/v1/namespaces/edge/pods/backend-3")
	}
	client, err := newKubectlProxyClient("http://" + refusingAddr(t))
	must(t, err)
	p := newEndpointWatcher(*client, "edge", "backend", "headless", 9000, func(map[int]string) {}, slog.New(slog.DiscardHandler))
	if p.backends().podIsGone(t.Context(), 3) {
		t.Error("without an API server a pod is gone")
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
