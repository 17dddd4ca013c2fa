package main

import (
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// proof is a run of routers between recording backends and a crowd of clients. An API
// server gives the routers their overrides.
type proof struct {
	*crowd
	kube     *fakeKube
	url      string // of the API server
	port     string // of all backends: backend-N is at 127.0.0.N+1
	backends []*recordingBackend
	edits    int
	sessions int              // of clients that stay
	routers  []*runningRouter // guarded by crowd.mu
}

// newProof starts this many backends. change, if not nil, sees each before it listens.
func newProof(t *testing.T, backends int, change func(*recordingBackend)) *proof {
	t.Helper()
	p := &proof{kube: newFakeKube()}
	p.url = p.kube.url(t)
	p.crowd = newCrowd(newRecorder(), p.addrs)
	p.port = freePort(t)
	for range backends {
		b := p.addBackend()
		if change != nil {
			change(b)
		}
		b.listen(t)
	}
	t.Cleanup(func() {
		p.stop()
		for _, b := range p.backends {
			b.die()
		}
	})
	return p
}

// addBackend adds a backend, which does not listen yet.
func (p *proof) addBackend() *recordingBackend {
	b := newRecordingBackend(p.recorder, len(p.backends), p.port)
	p.backends = append(p.backends, b)
	return b
}

// addrs returns where the routers are that serve.
func (p *proof) addrs() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var addrs []string
	for _, r := range p.routers {
		addrs = append(addrs, r.clientAddr)
	}
	return addrs
}

// args returns the flags of a router with these backends.
func (p *proof) args(mode string, more ...string) []string {
	var addrs []string
	for _, b := range p.backends {
		addrs = append(addrs, b.addr)
	}
	return append([]string{
		"-handoff", mode, "-backends", strings.Join(addrs, ","), "-move-settle", "100ms",
		"-hold", "1m", "-upgrade-timeout", "1m", "-header-timeout", "1m",
		"-kube", p.url, "-kube-namespace", "edge",
	}, more...)
}

// start starts a router in this process. The overrides must have been edited once.
func (p *proof) start(t *testing.T, args ...string) *runningRouter {
	t.Helper()
	r := startRouter(t, append(args, "-pod-name", fmt.Sprint("router-", len(p.routers)))...)
	p.add(t, r)
	return r
}

// startProcess starts a router in a process of its own.
func (p *proof) startProcess(t *testing.T, args ...string) *routerProcess {
	t.Helper()
	name := fmt.Sprint("router-", len(p.routers))
	r := newRouterProcess(t, slices.Concat(onFreePorts, args, []string{"-pod-name", name})...)
	r.start(t)
	r.await(t)
	p.add(t, &r.runningRouter)
	return r
}

// add waits until the router is ready, and has clients take it too.
func (p *proof) add(t *testing.T, r *runningRouter) {
	t.Helper()
	r.until(t, "/readyz", "^ready\n$")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.routers = append(p.routers, r)
}

// edit makes these the overrides.
func (p *proof) edit(data map[string]string) {
	p.edits++
	p.note("edit %d", p.edits)
	p.kube.setMap("overwriting", strconv.Itoa(p.edits), data)
}

// stays has sessions clients that stay, divided evenly among the namespaces, and waits
// until they are connected.
func (p *proof) stays(t *testing.T, sessions int, namespaces []string) {
	t.Helper()
	for i := range sessions {
		p.stay(namespaces[i%len(namespaces)])
	}
	p.sessions += sessions
	p.wait(t, "clients", p.disconnected)
	p.note("%d clients are connected", p.sessions)
}

// disconnected says how many clients that stay have no session; "" if all have.
func (p *proof) disconnected() string {
	if n := p.sessions - int(p.connected.Load()); n > 0 {
		return fmt.Sprint(n, " clients are not connected")
	}
	return ""
}

// wait polls until problem returns "".
func (p *proof) wait(t *testing.T, what string, problem func() string) {
	t.Helper()
	bound, every := proofSize(time.Minute, 5*time.Minute), proofSize(10, 50)
	for end := time.Now().Add(bound); ; p.pause(time.Duration(every) * time.Millisecond) {
		left := problem()
		if left == "" {
			return
		}
		if time.Now().After(end) {
			p.mu.Lock()
			defer p.mu.Unlock()
			first := p.failures[:min(3, len(p.failures))]
			for _, r := range p.routers {
				r.log.mu.Lock()
				t.Logf("%v", r.log.lines)
				r.log.mu.Unlock()
			}
			t.Fatalf("%s: %s; %d failures of clients: %.500v", what, left, len(p.failures), first)
		}
	}
}

// waitOwners waits until each namespace is open on its owner alone, and all clients that
// stay are connected, and returns how long it took.
func (p *proof) waitOwners(t *testing.T, owners map[string]int) time.Duration {
	t.Helper()
	begun := p.now()
	p.wait(t, "namespaces with their owners", func() string {
		wrong := []string{}
		for namespace, backends := range p.owners() {
			owner, known := owners[namespace]
			if known && !slices.Equal(backends, []int{owner}) {
				wrong = append(wrong,
					fmt.Sprintf("%s is open on %v, want %d", namespace, backends, owner))
			}
		}
		if len(wrong) == 0 {
			return p.disconnected()
		}
		slices.Sort(wrong)
		return strings.Join(wrong[:min(3, len(wrong))], "; ")
	})
	return p.now() - begun
}

// ownersBy returns the namespaces, each with the owner that next gives it.
func ownersBy(namespaces []string, next func(i int) int) map[string]int {
	owners := map[string]int{}
	for i, namespace := range namespaces {
		owners[namespace] = next(i)
	}
	return owners
}

// overridesOfOwners returns the overrides that give the namespaces these owners.
func overridesOfOwners(owners map[string]int) map[string]string {
	data := map[string]string{}
	for namespace, owner := range owners {
		data[namespace] = backendName("backend", owner)
	}
	return data
}

// namespacesOf returns names with the prefix.
func namespacesOf(prefix string, count int) (names []string) {
	for i := range count {
		names = append(names, fmt.Sprintf("%s-%03d", prefix, i))
	}
	return names
}

// moveAll has one edit move all namespaces while clients come and go. start starts routers
// that move so many sessions a second, all together. It returns for how long namespaces
// were open on two backends.
func moveAll(t *testing.T, p *proof, sessions, count, rate int,
	start func()) (two []time.Duration) {
	t.Helper()
	namespaces := namespacesOf("ns", count)
	before := ownersBy(namespaces, func(i int) int { return i % 4 })
	after := ownersBy(namespaces, func(i int) int { return (i + 1) % 4 })
	p.edit(overridesOfOwners(before))
	start()
	p.stays(t, sessions, namespaces)
	p.come(proofSize(50., 100.), namespaces)
	p.edit(overridesOfOwners(after))
	took := p.waitOwners(t, after)
	p.stop()
	two = slices.Collect(maps.Values(p.twoOwners()))
	times := took.Seconds() * float64(rate) / float64(sessions)
	t.Logf("%d sessions of %d namespaces in %v, %.2f times sessions/rate; two owners %s%s",
		sessions, count, took, times, spread(two), p.figures())
	return two
}

// Proof 1: all namespaces change their owner. None ever has two, no client gets an error,
// and each that stays is moved once.
func TestHandoffOfAll(t *testing.T) {
	for _, count := range proofSize([]int{50}, []int{1, 50, 500}) {
		t.Run(fmt.Sprint(count, " namespaces"), func(t *testing.T) {
			if !*wholeProof { // else the figures are those of one run
				t.Parallel()
			}
			p := newProof(t, 4, nil)
			sessions, rate := proofSize(300, 3200), 200
			p.every = proofSize(2*time.Second, 10*time.Second)
			moveAll(t, p, sessions, count, rate, func() {
				p.start(t, p.args("single", "-move-rate", strconv.Itoa(rate))...)
			})
			p.wantOneOwner(t)
			p.wantNoFailures(t)
			closes := 0
			for namespace, n := range p.closes {
				if closes += n; n > (sessions+count-1)/count {
					t.Fatalf("%s: %d Close frames to %d clients", namespace, n, sessions/count)
				}
			}
			if closes != sessions {
				t.Errorf("%d Close frames to %d clients", closes, sessions)
			}
		})
	}
}

// Without the hand-off, and with two routers of which each is careful by itself, the same
// shows namespaces with two owners, or it proves nothing.
func TestHandoffRecorded(t *testing.T) {
	t.Parallel()
	for mode, routers := range map[string]int{"off": 1, "single": 2} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := newProof(t, 4, nil)
			sessions, count := proofSize(100, 3200), proofSize(25, 500)
			rate := proofSize(100, 200)
			two := moveAll(t, p, sessions, count, rate, func() {
				for range routers {
					p.startProcess(t, p.args(mode, "-move-rate", strconv.Itoa(rate/routers))...)
				}
			})
			if len(two) == 0 {
				t.Error("no namespace had two owners: the test has tested nothing")
			}
		})
	}
}

// Owners change again and again while sessions, plain requests and streams of the same
// namespaces go on: none has two backends at once. Without the hand-off they do, or this
// proves nothing.
func TestHandoffOfRequests(t *testing.T) {
	for _, mode := range []string{"single", "off"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := newProof(t, 3, nil)
			namespaces := namespacesOf("ns", 9)
			owners := func(edit int) map[string]int {
				return ownersBy(namespaces, func(i int) int { return (i + edit) % 3 })
			}
			p.edit(overridesOfOwners(owners(0)))
			p.start(t, p.args(mode, "-move-rate", "0", "-http-move-timeout", requestMoveTime.String())...)
			p.stays(t, 12, namespaces[:6])
			for _, namespace := range namespaces {
				p.ask(namespace, "")
				p.ask(namespace, "?stream")
			}
			for edit := range proofSize(6, 60) {
				before := p.answers.Load()
				p.edit(overridesOfOwners(owners(edit + 1)))
				p.waitOwners(t, owners(edit+1))
				p.wait(t, "answers", func() string {
					if p.answers.Load() < before+int64(len(namespaces)) {
						return "few plain requests were answered"
					}
					return ""
				})
			}
			p.stop()
			two := spread(slices.Collect(maps.Values(p.twoOwners())))
			t.Logf("%d answers; two owners %s", p.answers.Load(), two)
			if mode == "off" {
				if len(p.twoOwners()) == 0 {
					t.Error("no namespace had two owners: the test has tested nothing")
				}
				return
			}
			p.wantOneOwner(t)
			p.wantNoFailures(t)
		})
	}
}

// edits are random edits of the overrides of some namespaces. The others are never edited.
type edits struct {
	rng    *rand.Rand
	edited []string
	data   map[string]string       // in force
	may    map[string]map[int]bool // owners that a namespace may have now
}

// change returns overrides like before with some others, some of which are invalid.
func (e *edits) change() map[string]string {
	data := maps.Clone(e.data)
	for _, namespace := range e.edited {
		switch value := e.rng.IntN(14); value {
		case 0, 1, 2, 3, 4: // backend-4 is not there
			data[namespace] = backendName("backend", value)
		case 5:
			data[namespace] = "junk"
		case 6:
			delete(data, namespace)
		}
	}
	return data
}

// apply puts data in force: the edited namespaces may get the owners that it gives too.
func (e *edits) apply(data map[string]string) {
	e.data = data
	for namespace, owner := range e.owners() {
		e.may[namespace][owner] = true
	}
}

// owners returns the owners of the namespaces whose override is not invalid.
func (e *edits) owners() map[string]int {
	owners := map[string]int{}
	for _, namespace := range e.edited {
		value, hasValue := e.data[namespace]
		owner, valid := backendOrdinal("backend", value)
		if !hasValue {
			owner, valid = bucket(namespace, 4), true
		}
		if valid && owner < 4 {
			owners[namespace] = owner
		}
	}
	return owners
}

// settle has the namespaces keep these owners, until the next edit.
func (e *edits) settle(owners map[string]int) {
	for namespace, owner := range owners {
		e.may[namespace] = map[int]bool{owner: true}
	}
}

// Proof 6: an edit, another one, and one that takes both back or not, soon after each
// other, with entries that cannot be read. Only owners that a table gave get a namespace,
// one at a time, and what no edit changes stays.
func TestHandoffOfEdits(t *testing.T) {
	t.Parallel()
	for world := range proofSize(1, 4) {
		t.Run(strconv.Itoa(world), func(t *testing.T) {
			t.Parallel()
			p := newProof(t, 4, nil)
			editAndEdit(t, p, proofSize(4, 50), func() {
				p.start(t, p.args("single", "-move-rate", "150", "-move-settle", "50ms")...)
			}, func(*rand.Rand, bool) {})
		})
	}
}

// editAndEdit makes three edits so many times, soon after each other. start starts the
// routers. after is called after each edit, and once more, with true, after the third.
func editAndEdit(t *testing.T, p *proof, times int, start func(),
	after func(rng *rand.Rand, last bool)) {
	t.Helper()
	maxPause := proofSize(400*time.Millisecond, 4*time.Second)
	namespaces, sessions := namespacesOf("ns", 32), 96
	quiet := namespacesOf("quiet", 8)
	e := &edits{edited: namespaces, may: map[string]map[int]bool{}}
	e.rng = rand.New(rand.NewPCG(randomSeed(t), 6))
	all := ownersBy(slices.Concat(namespaces, quiet), func(i int) int { return i % 4 })
	e.data = overridesOfOwners(all)
	e.settle(all)
	p.edit(e.data)
	start()
	p.stays(t, sessions, namespaces)
	p.stays(t, sessions/4, quiet)
	p.come(20, namespaces)
	for range times {
		began, before := p.now(), e.data
		first := e.change()
		for _, data := range []map[string]string{first, e.change(), nil} {
			if data == nil {
				data = []map[string]string{before, first, e.change()}[e.rng.IntN(3)]
			}
			p.edit(data)
			e.apply(data)
			after(e.rng, false)
			p.pause(time.Duration(e.rng.Int64N(int64(maxPause))))
		}
		after(e.rng, true)
		owners := e.owners()
		p.waitOwners(t, owners)
		p.wantOwners(t, began, e.may)
		e.settle(owners)
		p.wantSameOwners(t, owners)
	}
	p.stop()
	t.Log(p.figures())
	p.wantOneOwner(t)
	p.wantNoFailures(t)
	for _, namespace := range quiet {
		if closes := p.closes[namespace]; closes > 0 {
			t.Errorf("%s: %d Close frames, though it was never edited", namespace, closes)
		}
	}
}

// wantSameOwners waits until all routers give the namespaces these owners.
func (p *proof) wantSameOwners(t *testing.T, owners map[string]int) {
	t.Helper()
	p.mu.Lock()
	routers := slices.Clone(p.routers)
	p.mu.Unlock()
	for _, r := range routers {
		for namespace, owner := range owners {
			r.until(t, "/owner?namespace="+namespace, fmt.Sprintf(`"owner": ?"backend-%d"`, owner))
		}
		r.until(t, "/status", `"in_progress": ?false`) // else namespaces may yet pass by an edit of before
	}
}

// wantOwners fails the test if a record that began since then is of another backend than
// its namespace may have.
func (p *proof) wantOwners(t *testing.T, since time.Duration, may map[string]map[int]bool) {
	t.Helper()
	for namespace, records := range p.byNamespace() {
		for _, s := range records {
			if may[namespace] != nil && s.start > since && !may[namespace][s.backend] {
				t.Fatalf("backend-%d, want one of %v; %s",
					s.backend, may[namespace], p.trace(namespace))
			}
		}
	}
}

// follow puts an EndpointSlice in force in which exactly these backends are ready, each
// with a pod that has its number of listens in its UID, and the StatefulSet.
func (p *proof) follow(replicas int, ready ...int) {
	var endpoints []string
	for _, i := range ready {
		endpoints = append(endpoints, fmt.Sprintf(`{"addresses":["127.0.0.%d"],`+
			`"targetRef":{"kind":"Pod","name":"backend-%d","uid":"uid-%d-%d"},`+
			`"conditions":{"ready":true}}`,
			i+1, i, i, p.backends[i].listens))
	}
	p.note("%d replicas, ready: %v", replicas, ready)
	p.kube.scale(replicas)
	p.kube.setEndpoints("[" + strings.Join(endpoints, ",") + "]")
	p.kube.setStatefulSet(func(s *fakeStatefulSet) { s.ready = len(ready) })
}

// Proof 8: backends are scaled from 4 to 6, 3 and 4. Those that are scaled in die at once,
// or serve until their namespaces have left.
func TestHandoffScales(t *testing.T) {
	t.Parallel()
	for _, dies := range []bool{true, false} {
		t.Run(fmt.Sprintf("dies=%t", dies), func(t *testing.T) {
			t.Parallel()
			scale(t, dies)
		})
	}
}

func scale(t *testing.T, dies bool) {
	namespaces := namespacesOf("ns", proofSize(40, 200))
	sessions := proofSize(120, 1200)
	hashed := func(count int) map[string]int {
		return ownersBy(namespaces, func(i int) int { return bucket(namespaces[i], count) })
	}
	p := newProof(t, 4, nil)
	p.edit(nil)
	p.follow(4, 0, 1, 2, 3)
	p.start(t, "-handoff", "single", "-kube", p.url, "-kube-namespace", "edge",
		"-backend-port", p.port, "-hold", "1m", "-move-settle", "100ms",
		"-move-rate", strconv.Itoa(sessions))
	p.stays(t, sessions, namespaces)
	p.waitOwners(t, hashed(4))
	p.come(20, namespaces)
	for range 2 {
		p.addBackend().listen(t)
	}
	p.follow(6, 0, 1, 2, 3, 4, 5)
	out := p.waitOwners(t, hashed(6))
	scaledIn := p.now()
	die := func() {
		for _, b := range p.backends[3:] {
			b.die()
		}
	}
	if dies { // before the router has heard
		die()
	}
	p.follow(3, 0, 1, 2)
	if !dies { // until the end of the preStop hook
		p.waitOwners(t, hashed(3))
		die()
	}
	p.waitOwners(t, hashed(3))
	in := p.now() - scaledIn
	p.backends[3].listen(t)
	p.follow(4, 0, 1, 2, 3)
	again := p.waitOwners(t, hashed(4))
	p.stop()
	t.Logf("4 to 6 in %v, to 3 in %v, to 4 in %v%s", out, in, again, p.figures())
	p.wantOneOwner(t)
	for _, failure := range p.failures {
		if !dies || !strings.Contains(failure, "502 ") { // of a backend that died meanwhile
			t.Error(failure)
		}
	}
	if lost := len(p.lost); !dies && lost > 0 || dies && lost == 0 {
		t.Errorf("%d sessions ended without a Close frame, with dies=%t", lost, dies)
	}
}

// Proof 9: the new owner is away. Its namespaces stay with the old owner and lose nothing,
// other edits go on meanwhile, and when it is back they follow.
func TestHandoffToWhoIsAway(t *testing.T) {
	t.Parallel()
	p := newProof(t, 3, nil)
	away := p.addBackend()
	moveToWhoIsAway(t, p, func() { p.start(t, p.args("single", "-move-rate", "200")...) },
		func() { away.listen(t) })
	p.wantOneOwner(t)
	p.wantNoFailures(t)
}

// moveToWhoIsAway has edits move namespaces to backend-3, which is away, and to others.
// start starts the routers. comeBack has backend-3 come back.
func moveToWhoIsAway(t *testing.T, p *proof, start, comeBack func()) {
	t.Helper()
	namespaces, away := namespacesOf("ns", 30), p.backends[3]
	to := func(first, second, third int) map[string]int { // those of a third of the namespaces
		return ownersBy(namespaces, func(i int) int { return []int{first, second, third}[i%3] })
	}
	part := func(owners map[string]int) map[string]int { // without those that wait
		owners = maps.Clone(owners)
		maps.DeleteFunc(owners, func(_ string, owner int) bool { return owner == away.ordinal })
		return owners
	}
	p.edit(overridesOfOwners(to(0, 1, 2)))
	start()
	p.stays(t, 90, namespaces)
	p.come(20, namespaces)
	next := to(3, 2, 1)
	p.edit(overridesOfOwners(next))
	p.waitOwners(t, part(next))
	next = to(3, 0, 2)
	p.edit(overridesOfOwners(next))
	p.waitOwners(t, part(next))
	p.routers[0].log.wait(t, "new owner unreachable; move delayed", 1)
	p.waitOwners(t, ownersBy(namespaces, func(i int) int { return []int{0, 0, 2}[i%3] }))
	waiting := slices.DeleteFunc(slices.Clone(namespaces), func(namespace string) bool {
		return next[namespace] != away.ordinal
	})
	p.waitEchoes(t, waiting, 2*3) // two to each of the three clients
	for _, namespace := range waiting {
		if closes := p.closed(namespace); closes > 0 {
			t.Errorf("%s: %d Close frames, though its new owner is away", namespace, closes)
		}
	}
	p.note("the new owner is back")
	comeBack()
	took := p.waitOwners(t, next)
	p.stop()
	t.Logf("it followed %v after the new owner was back%s", took, p.figures())
}

// Proof 10: how long backends and clients take to close. A backend that never answers a
// Close frame is reset in its time. A client that does not answer delays nobody.
func TestHandoffOfSlowPeers(t *testing.T) {
	t.Parallel()
	tests := map[string]func(*recordingBackend){
		"backends close in 1 s": func(b *recordingBackend) {
			b.closeDelay = func() time.Duration { return time.Second }
		},
		"backends never close": func(b *recordingBackend) {
			b.ignoresClose, b.resetEnds = true, true
		},
		"clients never answer": nil,
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			namespaces := namespacesOf("ns", 8)
			before := ownersBy(namespaces, func(int) int { return 0 })
			after := ownersBy(namespaces, func(int) int { return 1 })
			p := newProof(t, 2, change)
			p.edit(overridesOfOwners(before))
			p.start(t, p.args("single", "-move-rate", "0")...)
			p.stays(t, 24, namespaces)
			var silent sync.WaitGroup
			ends := make([]time.Duration, len(namespaces))
			for i, namespace := range namespaces {
				if change == nil {
					p.waitSilent(t, &silent, namespace, &ends[i])
				}
			}
			p.come(20, namespaces)
			p.edit(overridesOfOwners(after))
			took := p.waitOwners(t, after)
			silent.Wait()
			p.stop()
			t.Logf("moved in %v%s", took, p.figures())
			p.wantOneOwner(t)
			p.wantNoFailures(t)
			if change == nil && !p.anyOpenBefore(1, namespaces, ends) {
				t.Errorf("all namespaces waited for clients, which ended at %v", ends)
			}
		})
	}
}

// waitSilent has a client of the namespace that answers no Close frame. It sets end when
// the router ends its session.
func (p *proof) waitSilent(t *testing.T, running *sync.WaitGroup, namespace string,
	end *time.Duration) {
	t.Helper()
	k, err := p.open(namespace)
	if err != nil {
		t.Fatal(err)
	}
	running.Go(func() {
		defer k.Close()
		k.SetReadDeadline(time.Now().Add(2 * patience))
		io.Copy(io.Discard, k.br)
		*end = p.now()
	})
}

// anyOpenBefore reports whether one of the namespaces was open on the backend before its
// time in ends.
func (p *proof) anyOpenBefore(backend int, namespaces []string, ends []time.Duration) bool {
	all := p.byNamespace()
	for i, namespace := range namespaces {
		for _, s := range all[namespace] {
			if s.backend == backend && s.start < ends[i] {
				return true
			}
		}
	}
	return false
}

// Proof 10: a backend that never answers an upgrade keeps its namespace until it ends its
// side, though its client has got a 504; or until -handoff-proof-timeout.
func TestHandoffOfStuckUpgrade(t *testing.T) {
	t.Parallel()
	for name, unproven := range map[string]string{"ends": "0", "is given up": "300ms"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stuckUpgrade(t, unproven)
		})
	}
}

func stuckUpgrade(t *testing.T, unproven string) {
	end := make(chan struct{})
	resume := sync.OnceFunc(func() { close(end) })
	defer resume()
	p := newProof(t, 2, func(b *recordingBackend) {
		b.answer = func(string) bool {
			if b.ordinal == 0 {
				<-end
			}
			return b.ordinal != 0
		}
	})
	ways := map[string]string{"ns-0": "simple", "ns-1": "net/http"}
	namespaces := slices.Collect(maps.Keys(ways))
	before := ownersBy(namespaces, func(int) int { return 0 })
	after := ownersBy(namespaces, func(int) int { return 1 })
	p.edit(overridesOfOwners(before))
	r := p.start(t, p.args("single", "-upgrade-timeout", "2s", "-hold", "15s",
		"-handoff-proof-timeout", unproven)...)
	for _, namespace := range namespaces {
		k, err := p.request(namespace, ways[namespace])
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		if err := k.switched(); err == nil || !strings.HasPrefix(err.Error(), "504 ") {
			t.Fatalf("the client got %v, want 504", err)
		}
	}
	p.edit(overridesOfOwners(after))
	r.log.wait(t, "routing table updated", 2)
	p.sessions = len(namespaces)
	for _, namespace := range namespaces {
		p.stay(namespace)
	}
	if unproven == "0" {
		r.until(t, "/status", `"backend": ?"backend-0",[^}]*"upgrades": ?2\b`)
		p.pause(300 * time.Millisecond) // the time that a router would need to get it wrong
		p.note("the upgrades end")
		resume()
		p.waitOwners(t, after)
		p.stop()
		p.wantOneOwner(t)
		return
	}
	p.wait(t, "clients", p.disconnected)
	r.until(t, "/metrics", "\nrouter_handoff_unproven_total 2\n")
	p.stop()
}

// A session is over for its namespace when its backend has seen the end, not when its
// client has left.
func TestHandoffOfLeavers(t *testing.T) {
	t.Parallel()
	end := make(chan struct{})
	resume := sync.OnceFunc(func() { close(end) })
	defer resume()
	p := newProof(t, 2, func(b *recordingBackend) {
		if b.ordinal == 0 {
			b.stall = func() { <-end }
		}
	})
	ways := map[string]func(*crowdConn){
		"resets": func(k *crowdConn) { reset(k.TCPConn) },
		"fins":   func(k *crowdConn) { k.Close() },
		"closes": func(k *crowdConn) { k.Write(frameBytes(0x88, true, 0, nil)); k.CloseWrite() },
		"tears":  func(k *crowdConn) { k.Write(frameBytes(0x82, true, 9, nil)); k.CloseWrite() },
	}
	namespaces := slices.Collect(maps.Keys(ways))
	after := ownersBy(namespaces, func(int) int { return 1 })
	p.edit(overridesOfOwners(ownersBy(namespaces, func(int) int { return 0 })))
	r := p.start(t, p.args("single")...)
	for namespace, leave := range ways {
		k, err := p.open(namespace)
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		leave(k)
	}
	r.log.wait(t, "session ended", 1) // that of the client that resets
	p.edit(overridesOfOwners(after))
	r.log.wait(t, "routing table updated", 2)
	p.sessions = len(namespaces)
	for _, namespace := range namespaces {
		p.stay(namespace)
	}
	p.pause(300 * time.Millisecond) // the time that a router would need to get it wrong
	p.note("the backend goes on")
	resume()
	p.waitOwners(t, after)
	p.stop()
	p.wantOneOwner(t)
	p.wantNoFailures(t)
}

// flightCase is an upgrade that is in flight during a step.
type flightCase struct {
	backend    int    // 0 sends its 101 late; 1 has the request in its backlog
	fallsBack  bool   // so late that the fast path does not wait for it
	way, leave string // how the client asks, of bothWays, and leaves
}

func (c flightCase) namespace() string {
	name := fmt.Sprintf("%d-%t-%s-%s", c.backend, c.fallsBack, c.way, c.leave)
	return strings.ReplaceAll(name, "/", "-")
}

func flightCases() (all []flightCase) {
	for _, way := range []string{"simple", "net/http"} {
		for _, leave := range []string{"stays", "FIN", "RST"} {
			all = append(all, flightCase{0, false, way, leave}, flightCase{0, true, way, leave},
				flightCase{1, true, way, leave})
		}
	}
	return all
}

// Proof 13: upgrades in flight across a step. Their backend answers late, or still has the
// request in its backlog; their client stays or leaves meanwhile. The namespace is open on
// the old owner from when it reads the request.
func TestHandoffOfFlights(t *testing.T) {
	t.Parallel()
	late, later := make(chan struct{}), make(chan struct{})
	endLate := sync.OnceFunc(func() { close(late) })
	endLater := sync.OnceFunc(func() { close(later) })
	defer endLater()
	defer endLate()
	p := newProof(t, 3, func(b *recordingBackend) {
		b.answer = func(namespace string) bool {
			switch {
			case b.ordinal == 0 && strings.Contains(namespace, "true"):
				<-later
			case b.ordinal == 0:
				<-late
			}
			return true
		}
	})
	before, after, conns := map[string]int{}, map[string]int{}, map[flightCase]*crowdConn{}
	for _, c := range flightCases() {
		before[c.namespace()], after[c.namespace()] = c.backend, 2
	}
	p.edit(overridesOfOwners(before))
	r := p.start(t, p.args("single", "-move-rate", "0")...)
	p.backends[1].hold()
	for _, c := range flightCases() {
		k, err := p.request(c.namespace(), c.way)
		if err != nil {
			t.Fatal(err)
		}
		conns[c] = k
	}
	p.wait(t, "requests in flight", func() string { return p.notInFlight(t, before) })
	p.edit(overridesOfOwners(after))
	r.log.wait(t, "routing table updated", 2)
	for c, k := range conns {
		p.leave(c, k)
	}
	p.sessions = len(after)
	for namespace := range after {
		p.stay(namespace)
	}
	for _, next := range []func(){endLate, endLater, p.backends[1].resume} {
		p.pause(300 * time.Millisecond) // the time that a router would need to get it wrong
		p.note("more answers")
		next()
	}
	p.waitOwners(t, after)
	p.wait(t, "the old owners read their requests", func() string {
		for namespace, records := range p.byNamespace() {
			if !slices.ContainsFunc(records, func(s record) bool { return s.backend < 2 }) {
				return "not that of " + namespace
			}
		}
		return ""
	})
	p.stop()
	p.wantOneOwner(t)
	p.wantNoFailures(t)
}

// notInFlight says which of the backends have not got all their requests yet.
func (p *proof) notInFlight(t *testing.T, owners map[string]int) string {
	t.Helper()
	inBacklog := 0
	for namespace, owner := range owners {
		if owner == 0 && !p.isOpen(namespace, 0) {
			return namespace
		}
		inBacklog += owner
	}
	if got := unreadSockets(t, p.backends[1].addr); got < inBacklog {
		return fmt.Sprintf("%d requests are in the backlog, want %d", got, inBacklog)
	}
	return ""
}

// leave has the client leave, or stay until the crowd stops.
func (p *proof) leave(c flightCase, k *crowdConn) {
	switch c.leave {
	case "RST":
		reset(k.TCPConn)
		k.Close()
	case "FIN":
		k.Close()
	default:
		p.running.Go(func() {
			defer k.Close()
			if err := k.switched(); err != nil {
				p.fail("%s: %v", k.namespace, err)
				return
			}
			p.talk(k)
		})
	}
}

// unreadSockets returns how many connections to addr, an IPv4 address, have bytes that
// nobody has read: also those that nobody has accepted (proc(5), /proc/net/tcp).
// Of this thread: a test may have put another one into a network of its own, even the
// first one, of which /proc/net is.
func unreadSockets(t *testing.T, addr string) (count int) {
	t.Helper()
	to := netip.MustParseAddrPort(addr)
	b := to.Addr().As4()
	local := fmt.Sprintf("%02X%02X%02X%02X:%04X", b[3], b[2], b[1], b[0], to.Port())
	table, err := os.ReadFile("/proc/thread-self/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		fields := strings.Fields(line)
		if len(fields) > 4 && fields[1] == local && fields[3] == "01" && // ESTABLISHED
			!strings.HasSuffix(fields[4], ":00000000") {
			count++
		}
	}
	return count
}
