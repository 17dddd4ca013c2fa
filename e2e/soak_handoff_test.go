//go:build controlplane

package e2e

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// handoffSoak is the routers as deployed, tenants whose clients come back, a writer of
// overrides, and faults.
type handoffSoak struct {
	*system
	plane   *plane
	tenants *tenants
	random  *rand.Rand
	half    routerFigures              // after half of the time
	rests   map[string][]time.Duration // from the end of a fault to the end of all changes, by fault
	changes int
}

// routerFigures are what the routers have used so far, in all.
type routerFigures struct {
	memory                  map[string]int // bytes, anonymous and resident, by pod
	goroutines, descriptors float64
	writes, steps           float64 // of the object of the hand-off
	changes                 int
}

// TestSoakHandoff changes owners every few seconds and has a random fault every half a
// minute, for E2E_SOAK. After each fault, all changes end by themselves, all routers agree,
// each client is with the owner of its namespace, and by what the backends wrote down no
// namespace ever had two owners. In the first half faults end routers too. In the second
// half they do not: then memory, goroutines and descriptors must not grow, and routers
// write no more than each step needs.
func TestSoakHandoff(t *testing.T) {
	d := span(t, "E2E_SOAK", 30*time.Minute)
	seed := number(t, "E2E_SEED", int(time.Now().UnixNano()%1e6)+1)
	t.Logf("soak of the hand-off: %s with E2E_SEED=%d", d, seed)
	s, p := newDeployed(t)
	t.Cleanup(func() { // a kubelet that has lost the API server twice connects again late
		p.kill("kubelet")
		p.component("start", "kubelet")
	})
	s.keepOverrides()
	s.keepWorkloads()
	k := &handoffSoak{
		system: s, plane: p, tenants: s.newTenantsOf(s.writtenByAll, "soak", 100, 300),
		random: rand.New(rand.NewPCG(uint64(seed), 0)), rests: map[string][]time.Duration{},
	}
	began := time.Now()
	for time.Since(began) < d/2 {
		k.undergo(append(k.faults(), k.routerFaults()...))
	}
	k.half = k.figures()
	for time.Since(began) < d {
		k.undergo(k.faults())
	}
	for _, name := range slices.Sorted(maps.Keys(k.rests)) {
		t.Logf("soak of the hand-off: %-30s all changes ended within %s", name, newDistribution(k.rests[name]))
	}
	k.compare(k.figures())
}

// faults are those that end no router.
func (k *handoffSoak) faults() []handoffFault {
	component := func(name, verb, undo string) func() func() {
		return func() func() {
			k.plane.component(verb, name)
			return func() { k.plane.component(undo, name) }
		}
	}
	killed := func(name string) func() func() {
		return func() func() {
			k.plane.kill(name)
			return func() { k.plane.component("start", name) }
		}
	}
	return []handoffFault{
		{"none", false, func() func() { return func() {} }, 5 * time.Second},
		{"API server killed", true, killed("apiserver"), 6 * time.Second},
		{"API server paused", true, component("apiserver", "pause", "resume"), 15 * time.Second},
		{"etcd killed", true, killed("etcd"), 5 * time.Second},
		{"etcd paused", true, component("etcd", "pause", "resume"), 10 * time.Second},
		{"router stopped", true, func() func() { return k.signalRouter(syscall.SIGSTOP, syscall.SIGCONT) }, 10 * time.Second},
		{"object emptied", true, func() func() {
			k.replaceHandoff(nil)
			return func() {}
		}, time.Second},
		{"object deleted", true, func() func() {
			k.mustKubectl("", "delete", "configmap", handoffObject)
			return k.applyHandoff
		}, 3 * time.Second},
	}
}

// routerFaults are those that end a router.
func (k *handoffSoak) routerFaults() []handoffFault {
	return []handoffFault{
		{"router killed", true, func() func() { return k.signalRouter(syscall.SIGKILL, 0) }, time.Second},
		{"router deleted", true, func() func() {
			k.mustKubectl("", "delete", "pod", k.routers(k.t.Context())[0].pod, "--wait=false")
			return func() {}
		}, 5 * time.Second},
		{"three routers", true, func() func() {
			k.mustKubectl("", "scale", "deployment", "router", "--replicas=3")
			return func() { k.mustKubectl("", "scale", "deployment", "router", "--replicas=2") }
		}, 15 * time.Second},
	}
}

// undergo has one of the faults while the writer writes, and looks at everything when all
// changes have ended.
func (k *handoffSoak) undergo(faults []handoffFault) {
	k.t.Helper()
	fault := faults[k.random.IntN(len(faults))]
	before, lead := k.changes, time.Duration(3+k.random.IntN(8))*time.Second
	ctx, stop := context.WithCancel(k.t.Context())
	var writing sync.WaitGroup
	writing.Go(func() { k.write(ctx) })
	until(k.t.Context(), lead)
	end := fault.begin()
	until(k.t.Context(), fault.lasts)
	end()
	until(k.t.Context(), 3*time.Second)
	stop()
	writing.Wait()
	ended := time.Now()
	k.plane.reconnect()
	k.client = k.plane.client
	k.awaitWhole()
	k.awaitDrained()
	k.awaitRest("", 120*time.Second)
	rest := time.Since(ended)
	k.rests[fault.name] = append(k.rests[fault.name], rest)
	k.tenants.awaitOwners(k.owners(), 60*time.Second)
	k.tenants.wantOneOwner("soak of the hand-off, " + fault.name)
	k.t.Logf("soak of the hand-off: %s after %s, for %s, %d changes: all ended after %.1f s",
		fault.name, lead, fault.lasts, k.changes-before, rest.Seconds())
}

// write changes the owners of some namespaces, or of all, every few seconds until ctx ends.
// A write that fails is left out: the fault is meant to do that.
func (k *handoffSoak) write(ctx context.Context) {
	for ctx.Err() == nil {
		data, some := map[string]any{}, 1+k.random.IntN(10)
		if k.random.IntN(5) == 0 {
			some = len(k.tenants.names)
		}
		for _, i := range k.random.Perm(len(k.tenants.names))[:some] {
			owner := k.random.IntN(5)
			if data[k.tenants.names[i]] = nil; owner < 4 { // else its hash gives the owner
				data[k.tenants.names[i]] = fmt.Sprintf("backend-%d", owner)
			}
		}
		pause := time.Duration(1000+k.random.IntN(4000)) * time.Millisecond
		once, cancel := context.WithTimeout(ctx, 5*time.Second)
		if _, err := k.patch(once, data); err == nil {
			k.changes++
		}
		cancel()
		until(ctx, pause)
	}
}

// owners returns who owns each namespace, as a router says.
func (k *handoffSoak) owners() map[string]any {
	k.t.Helper()
	var mu sync.Mutex
	owners, first := map[string]any{}, k.routers(k.t.Context())[0]
	err := forEach(len(k.tenants.names), 8, func(i int) error {
		o, err := first.owner(k.t.Context(), k.tenants.names[i])
		mu.Lock()
		defer mu.Unlock()
		owners[k.tenants.names[i]] = o.Owner
		return err
	})
	if err != nil {
		k.t.Fatal(err)
	}
	return owners
}

// figures reads what the routers have used.
func (k *handoffSoak) figures() routerFigures {
	k.t.Helper()
	routers := k.routers(k.t.Context())
	now := routerFigures{
		memory:      map[string]int{},
		goroutines:  k.mustSum(routers, "go_goroutines"),
		descriptors: k.mustSum(routers, "router_client_descriptors"),
		writes:      k.mustSum(routers, "router_handoff_writes_total"),
		steps:       k.mustSum(routers, "router_handoff_steps_total"),
		changes:     k.changes,
	}
	for _, r := range routers {
		pid, err := processOf(r.pod, "/router")
		if err != nil {
			k.t.Fatal(err)
		}
		now.memory[r.pod] = memory(pid)
	}
	return now
}

// compare fails the test if the routers have grown since half of the time, or have written
// more than their steps need: for each change 2 + 3R, for each step 1 + 2R, and as much
// again for what faults undo.
func (k *handoffSoak) compare(end routerFigures) {
	k.t.Helper()
	routers := float64(len(end.memory))
	steps := (end.steps - k.half.steps) / routers // each router counts a step
	writes, changes := end.writes-k.half.writes, float64(end.changes-k.half.changes)
	allowed := 2 * ((2+3*routers)*changes + (1+2*routers)*steps)
	k.t.Logf("soak of the hand-off: %d changes; in the second half %.0f changes, %.0f steps and %.0f writes, at most %.0f are allowed; "+
		"at half of the time and at the end: goroutines %.0f and %.0f, descriptors of clients and sessions %.0f and %.0f",
		end.changes, changes, steps, writes, allowed, k.half.goroutines, end.goroutines, k.half.descriptors, end.descriptors)
	if writes > allowed || steps == 0 {
		k.t.Errorf("%.0f writes for %.0f changes and %.0f steps, want at most %.0f", writes, changes, steps, allowed)
	}
	most := soakCount * routers // the figures are those of all routers
	if end.goroutines > k.half.goroutines+most || end.descriptors > k.half.descriptors+most {
		k.t.Errorf("goroutines or descriptors have grown by more than %.0f", most)
	}
	for pod, now := range end.memory {
		then, there := k.half.memory[pod]
		k.t.Logf("soak of the hand-off: memory of %s: %.1f and %.1f MiB", pod, mib(then), mib(now))
		if !there || now > then+soakMemory {
			k.t.Errorf("%s is another router than before, or has grown by more than %d MiB", pod, soakMemory>>20)
		}
	}
}
