package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// handoffSim is a cluster in a synctest bubble: an API server that fails at random, and
// routers whose movers and shared hand-offs are the real ones. Sessions have no sockets. The
// backends note which sessions they have.
type handoffSim struct {
	*testing.T
	rng     *rand.Rand
	kube    *fakeKube
	began   time.Time
	rate    int  // of moves, all together
	clients int  // of all namespaces
	calm    bool // nobody is busy
	routers []*simRouter
	running sync.WaitGroup // clients
	seen    sync.Map       // *simSession by *session: what its backend has
	ended   context.Context

	mu        sync.Mutex
	events    []string                        // for the trace
	overrides map[string]string               // the newest
	version   int                             // of overrides
	backends  ordinalRange                    // the newest
	pods      map[int]string                  // the uids of the backends' pods
	replaced  int                             // how often one of these was replaced
	open      map[string]map[*simSession]bool // by namespace
	sessions  int
	stale     bool // an old copy may be in place of the object
}

// simSession is a session as its backend sees it: from when it reads the request.
type simSession struct {
	namespace string
	backend   int
	router    string
	ended     chan struct{} // closed when the router ends it
}

// simRouter is the pod of a router.
type simRouter struct {
	*handoffSim
	pod     fakePod
	link    *kubeLink
	network *pipeNetwork

	// Guarded by handoffSim.mu.
	container *simContainer // nil while none runs
	away      map[int]bool  // backends that accept no connection of it
}

// simContainer is a process of the router.
type simContainer struct {
	*mover
	pod       *simRouter
	alive     context.Context // ends when it is killed
	kill      context.CancelFunc
	running   sync.WaitGroup
	open      map[*simSession]bool // guarded by handoffSim.mu
	admits    bool                 // guarded by handoffSim.mu; false once it ends
	decisions atomic.Int64         // of its shared hand-off
	probes    atomic.Int64         // dials of new owners
	goesBy    atomic.Value         // the version of the object that its view is of; a string
}

// simBackends is how many backends there are at first and at the end. Between, there are
// minSimBackends to maxSimBackends.
const simBackends, minSimBackends, maxSimBackends = 4, 2, 5

var simNamespaces = []string{"ns-0", "ns-1", "ns-2", "ns-3", "ns-4", "ns-5", "ns-6", "ns-7"}

// note adds an event to the trace. The caller holds mu.
func (s *handoffSim) note(format string, args ...any) {
	event := fmt.Sprintf(format, args...)
	s.events = append(s.events, fmt.Sprintf("%9.3f %s", time.Since(s.began).Seconds(), event))
}

// fail fails the test, and adds why to the trace.
func (s *handoffSim) fail(format string, args ...any) {
	s.do(func() { s.note("FAILED: "+format, args...) })
	s.Errorf(format, args...)
}

func (s *handoffSim) do(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// upTo returns a random time below limit.
func (s *handoffSim) upTo(limit time.Duration) time.Duration {
	return time.Duration(rand.Int64N(int64(limit)))
}

// begin notes that the backend has read the request of a session. It returns nil if the request
// is lost: the container was killed, or the backend's pod replaced.
func (c *simContainer) begin(namespace string, backend int, podUID string) (session *simSession) {
	s := c.pod.handoffSim
	s.do(func() {
		if c.alive.Err() != nil || podUID != s.pods[backend] {
			return
		}
		session = &simSession{namespace, backend, c.pod.pod.name, make(chan struct{})}
		for other := range s.open[namespace] {
			if other.backend != backend {
				s.note("TWO OWNERS of %s: backend-%d by %s, backend-%d by %s",
					namespace, other.backend, other.router, backend, session.router)
				s.Errorf("%s has two owners: backend-%d by %s, backend-%d by %s",
					namespace, other.backend, other.router, backend, session.router)
			}
		}
		if s.open[namespace] == nil {
			s.open[namespace] = map[*simSession]bool{}
		}
		s.open[namespace][session], c.open[session] = true, true
		s.sessions++
	})
	return session
}

// finish notes that the backend has ended the session.
func (c *simContainer) finish(session *simSession) {
	c.pod.do(func() {
		delete(c.pod.open[session.namespace], session)
		delete(c.open, session)
	})
}

// start starts a container in the pod. It waits until no router would start on an old copy
// of the object while others have not seen that: this is not promised.
func (r *simRouter) start() {
	for range 5 * 60 * 20 {
		if r.stale = r.stale && !r.allUpToDate(); !r.stale {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	log := slog.New(slog.DiscardHandler)
	relay := newRelay(func(i int) string { return backendName("backend", i) }, log)
	router := &tableStore{statefulSet: "backend", log: log, onSwap: func() {}}
	c := &simContainer{pod: r, open: map[*simSession]bool{}, admits: true}
	c.alive, c.kill = context.WithCancel(context.Background())
	probe := func(_ context.Context, backend int) error {
		c.probes.Add(1)
		if r.isAway(backend) {
			return errors.New("refused")
		}
		return nil
	}
	c.mover = newMover(router, relay, r.rate, probe, func() {}, log)
	c.settleTime = 50 * time.Millisecond
	client := r.network.kube(r.T)
	c.shareHandoff(newSharedHandoff(*client, "edge", handoffName, r.pod.name, r.pod.uid,
		"app.kubernetes.io/name=router", log))
	c.shared.wantedRange = func() *versionedRange {
		c.decisions.Add(1)
		if v := c.shared.member.view; v != nil {
			c.goesBy.Store(v.version)
		}
		return nil
	}
	router.onSwap = c.tableOrPodChanged
	c.closeSession = func(s *session, onEnd func(cut bool)) bool {
		return c.endSession(s, causeMoved, func() { onEnd(false) })
	}
	backends, replaced := ordinalRange{}, 0
	r.do(func() {
		backends, replaced = r.backends, r.replaced
		relay.setPods(r.pods)
	})
	router.backends.ordinalRange = backends
	c.running.Go(func() { c.run(c.alive) })
	c.running.Go(func() { c.shared.watcher.run(c.alive) })
	c.running.Go(func() { follow(c, "", c.newestOverrides) })
	c.running.Go(func() { follow(c, backends, c.newestBackends) })
	c.running.Go(func() { follow(c, replaced, c.newestPods) })
	r.do(func() { r.container = c; r.note("%s starts", r.pod.name) })
}

// follow has the router see the versions after seen, each one late. newest returns the newest
// version, and what makes the router see it. follow calls it with handoffSim.mu held.
func follow[T comparable](c *simContainer, seen T, newest func() (version T, apply func())) {
	for {
		var version T
		var apply func()
		c.pod.do(func() { version, apply = newest() })
		if version != seen {
			seen = version
			if sleep(c.alive, c.pod.upTo(300*time.Millisecond)) != nil {
				return
			}
			apply()
		}
		if sleep(c.alive, 20*time.Millisecond) != nil {
			return
		}
	}
}

func (c *simContainer) newestOverrides() (version string, apply func()) {
	data, version := c.pod.overrides, strconv.Itoa(c.pod.version)
	return version, func() {
		c.tables.update(sourceContent{
			id: sourceID{name: "test"}, version: version, overrides: newOverrideSet(data),
		})
	}
}

func (c *simContainer) newestBackends() (version ordinalRange, apply func()) {
	backends := c.pod.backends
	return backends, func() { c.tables.setBackends(backendSet{ordinalRange: backends}) }
}

func (c *simContainer) newestPods() (version int, apply func()) {
	pods := c.pod.pods
	return c.pod.replaced, func() {
		if c.relay.setPods(pods) {
			c.tableOrPodChanged()
		}
	}
}

// podUID returns the uid of the backend's pod, as far as the router knows.
func (c *simContainer) podUID(backend int) string { return (*c.relay.podUIDs.Load())[backend] }

// isAway reports whether the backend accepts no connection of the router.
func (r *simRouter) isAway(backend int) (away bool) {
	r.do(func() { away = r.away[backend] })
	return away
}

// setAway makes these backends, and no others, accept no connection of the router.
func (r *simRouter) setAway(backends ...int) {
	r.do(func() {
		r.away = map[int]bool{}
		for _, backend := range backends {
			r.away[backend] = true
		}
		r.note("away for %s: %v", r.pod.name, backends)
	})
}

// setAway makes these backends, and no others, accept no connection.
func (s *handoffSim) setAway(backends ...int) {
	for _, r := range s.routers {
		r.setAway(backends...)
	}
}

// endSession ends a session: its backend notes that a while later.
func (c *simContainer) endSession(s *session, why cause, onEnd func()) bool {
	if !s.setCause(why) {
		return false
	}
	value, _ := c.pod.seen.LoadAndDelete(s)
	seen := value.(*simSession)
	close(seen.ended)
	time.AfterFunc(c.pod.upTo(200*time.Millisecond), func() {
		c.finish(seen)
		c.relay.remove(s, [2]int64{})
		s.isOver.Store(true)
		c.relay.onBackendDone()
		onEnd()
	})
	return true
}

// crash kills the container, and all that it had: the backends find the end of its
// connections.
func (r *simRouter) crash() {
	var c *simContainer
	r.do(func() {
		if c = r.container; c == nil {
			return
		}
		r.container = nil
		r.note("%s is killed", r.pod.name)
		c.end()
	})
	if c != nil {
		c.running.Wait()
	}
}

// terminate ends the container as SIGTERM does.
func (r *simRouter) terminate() {
	var c *simContainer
	r.do(func() {
		if c = r.container; c != nil {
			c.admits = false
			r.note("%s gets SIGTERM", r.pod.name)
		}
	})
	if c == nil {
		return
	}
	for c.relay.size() > 0 || c.flights.any(func(*flight) bool { return true }) {
		for _, s := range c.relay.filter(func(*session) bool { return true }) {
			c.endSession(s, causeDrain, func() {})
		}
		if sleep(c.alive, 10*time.Millisecond) != nil {
			return
		}
	}
	ctx, cancel := context.WithTimeout(c.alive, leaveTime)
	c.leave(ctx)
	cancel()
	r.do(c.end)
	c.running.Wait()
	r.do(func() { r.container = nil; r.note("%s has ended", r.pod.name) })
}

// end ends the process: the backends find the end of its connections. The caller holds
// mu.
func (c *simContainer) end() {
	c.kill()
	for session := range c.open {
		delete(c.pod.open[session.namespace], session)
	}
}

// client opens sessions of one namespace, one after the other, through any router.
func (s *handoffSim) client(namespace string) {
	for s.ended.Err() == nil {
		if c := s.anyContainer(); c == nil || !c.serve(namespace, s.upTo(time.Second)) {
			sleep(s.ended, 20*time.Millisecond+s.upTo(20*time.Millisecond))
		}
	}
}

// anyContainer returns one that takes clients, or nil.
func (s *handoffSim) anyContainer() (c *simContainer) {
	s.do(func() {
		if r := s.routers[rand.IntN(len(s.routers))]; r.container != nil && r.container.admits {
			c = r.container
		}
	})
	return c
}

// serve is an upgrade and its session, as proxy does them, whose client leaves after this
// time. It reports whether there was a session.
func (c *simContainer) serve(namespace string, life time.Duration) bool {
	a := c.assignmentOf(namespace)
	podUID := c.podUID(a.backend)
	if a.state != stateOwned || c.relay.oldPodSessionsDone(namespace) != nil || c.pod.isAway(a.backend) {
		return false
	}
	pause := func(limit time.Duration) {
		if !c.pod.calm && rand.IntN(4) == 0 { // the network or the backend is busy
			limit *= 50
		}
		time.Sleep(c.pod.upTo(limit))
	}
	pause(20 * time.Millisecond) // the dial
	f, _, ok := c.startFlight(namespace, a.backend, podUID, nil)
	if !ok || c.alive.Err() != nil {
		return false
	}
	pause(30 * time.Millisecond)
	seen := c.begin(namespace, a.backend, podUID)
	if seen == nil {
		f.end()
		return false
	}
	pause(50 * time.Millisecond)
	if rand.IntN(10) == 0 { // the backend refuses
		c.finish(seen)
		f.end()
		return false
	}
	session := &session{namespace: namespace, backend: a.backend, podUID: podUID}
	c.pod.seen.Store(session, seen)
	c.relay.add(session)
	f.end()
	if c.shouldMove(session) {
		c.endSession(session, causeMoved, func() {})
	}
	select {
	case <-time.After(life):
		c.endSession(session, causeClient, func() {})
	case <-c.pod.ended.Done():
		c.endSession(session, causeClient, func() {})
	case <-seen.ended:
	case <-c.alive.Done():
	}
	return true
}

// happen does something that may happen to a cluster.
func (s *handoffSim) happen() {
	r := s.routers[s.rng.IntN(len(s.routers))]
	switch s.rng.IntN(14) {
	case 0, 1, 2, 3, 4:
		s.edit()
	case 5:
		r.crash()
		time.Sleep(s.upTo(2 * time.Second))
		r.start()
	case 6:
		r.terminate()
		s.kube.deleteObject("pods", r.pod.name)
		time.Sleep(s.upTo(time.Second))
		r.pod.uid += "a"
		s.kube.setPod(r.pod)
		r.start()
	case 7: // its node is lost, and the pod is deleted
		r.crash()
		s.kube.deleteObject("pods", r.pod.name)
		time.Sleep(s.upTo(3 * time.Second))
		r.pod.uid += "b"
		s.kube.setPod(r.pod)
		r.start()
	case 8:
		s.tell("the link of %s is cut", r.pod.name)
		r.link.cut()
		time.Sleep(s.upTo(5 * time.Second))
		r.link.heal()
	case 9:
		s.tell("the link of %s is frozen", r.pod.name)
		r.link.freeze()
		time.Sleep(s.upTo(5 * time.Second))
		r.link.heal()
	case 10:
		s.tell("the object is deleted")
		s.kube.deleteObject("configmaps", handoffName)
		time.Sleep(s.upTo(2 * time.Second))
		s.kube.applyMap(handoffName, nil)
	case 11:
		s.tell("the object is emptied")
		s.kube.replaceMap(handoffName, nil)
	case 12:
		old, _, _ := s.kube.readMap(handoffName)
		time.Sleep(s.upTo(2 * time.Second))
		if s.allUpToDate() { // who is not might go by the old copy
			s.tell("the object is as it was")
			s.kube.replaceMap(handoffName, old)
			s.stale = true
		}
	case 13:
		s.tell("all routers are killed")
		s.crashAll()
		s.startAll()
	}
}

func (s *handoffSim) tell(format string, args ...any) {
	s.do(func() { s.note(format, args...) })
}

// allUpToDate reports whether all routers that run go by the present version of the object.
func (s *handoffSim) allUpToDate() bool {
	_, _, version := s.kube.readMap(handoffName)
	all := true
	s.do(func() {
		for _, r := range s.routers {
			all = all && (r.container == nil || r.container.goesBy.Load() == version)
		}
	})
	return all
}

// edit changes the overrides: a value may be invalid.
func (s *handoffSim) edit() {
	s.do(func() {
		next := map[string]string{}
		for _, namespace := range simNamespaces {
			if value, ok := s.overrides[namespace]; ok && s.rng.IntN(2) == 0 {
				next[namespace] = value
			} else if n := s.rng.IntN(8); n <= simBackends {
				next[namespace] = backendName("backend", n)
			}
		}
		s.overrides = next
		s.version++
		s.note("edit %d: %v", s.version, next)
	})
}

// endTrouble ends all trouble, and takes back the overrides that are invalid at the end.
func (s *handoffSim) endTrouble() {
	s.kube.setFaults(nil)
	s.kube.applyMap(handoffName, nil)
	s.do(func() {
		s.overrides = maps.Clone(s.overrides) // routers may read it
		for namespace, value := range s.overrides {
			if value == backendName("backend", simBackends) {
				delete(s.overrides, namespace) // an invalid one has no owner on some routers
			}
		}
		s.version++
		s.note("all is well: %v", s.overrides)
	})
}

// settle ends all trouble, and checks that all routers come to rest and agree with the
// overrides.
func (s *handoffSim) settle() {
	s.endTrouble()
	s.await("rest", 5*time.Minute, s.whyUnsettled)
}

// await checks that why returns "" within this time.
func (s *handoffSim) await(what string, within time.Duration, why func() string) {
	for began := time.Now(); ; time.Sleep(time.Second) {
		switch reason, waited := why(), time.Since(began).Round(time.Millisecond); {
		case reason == "":
			s.tell("after %s: %s", waited, what)
			return
		case waited > within:
			s.fail("stuck: after %s still no %s: %s", waited, what, reason)
			return
		}
	}
}

// whyUnsettled says why not all routers are at rest, or "".
func (s *handoffSim) whyUnsettled() string {
	for _, r := range s.routers {
		c := r.container
		t := c.tables.table()
		v := c.current.Load()
		switch why := c.whyNotReady(); {
		case why != "":
			return r.pod.name + ": " + why
		case t == nil || v == nil || !v.hasOnlyTable(t.ownersHash) || !v.done:
			st := c.shared.snapshot()
			return fmt.Sprintf("%s: not at rest: %s, missing %v", r.pod.name, st.doing, st.missing)
		case strings.Fields(t.overridesVersion)[0] != strconv.Itoa(s.version):
			return r.pod.name + ": an old table: " + t.overridesVersion
		}
		for _, namespace := range simNamespaces {
			want, _ := t.ownerOf(namespace)
			if a := c.assignmentOf(namespace); a.state != stateOwned || a.backend != want {
				return fmt.Sprintf("%s: %s is with %d (state %d), want %d",
					r.pod.name, namespace, a.backend, a.state, want)
			}
		}
	}
	return ""
}

// startAll starts the containers of all routers.
func (s *handoffSim) startAll() {
	for _, r := range s.routers {
		r.start()
	}
}

// crashAll ends them.
func (s *handoffSim) crashAll() {
	for _, r := range s.routers {
		r.crash()
	}
}

// addRouters makes the pods of so many routers.
func (s *handoffSim) addRouters(count int) {
	for i := range count {
		r := &simRouter{handoffSim: s, network: newPipeNetwork(),
			pod: fakePod{name: fmt.Sprint("router-", i), uid: fmt.Sprint("pod-", i)}}
		r.link = s.kube.linkOn(s.T, r.network)
		s.kube.setPod(r.pod)
		s.routers = append(s.routers, r)
	}
}

// newHandoffSim returns a cluster of so many router pods. Their containers do not run yet.
// end ends the clients, and waits for them.
func newHandoffSim(t *testing.T, seed uint64, pods int) (s *handoffSim, end func()) {
	s = &handoffSim{T: t, rng: rand.New(rand.NewPCG(seed, 1)), kube: newFakeKube(), began: time.Now(),
		open: map[string]map[*simSession]bool{}, overrides: map[string]string{},
		backends: ordinalRange{count: simBackends}, pods: map[int]string{}}
	for backend := range maxSimBackends {
		s.pods[backend] = "first"
	}
	ended, cancel := context.WithCancel(t.Context())
	s.ended = ended
	s.kube.applyMap(handoffName, nil)
	s.addRouters(pods)
	return s, func() { cancel(); s.running.Wait() }
}

// simPlay is what is played in a cluster. The seed chooses among the rates, the faults, and after
// each event among the pauses.
type simPlay struct {
	rates   []int               // of moves
	faults  []int               // how many percent of the requests to the API server fail
	leaving int                 // clients of each namespace whose sessions last a second at most
	staying int                 // clients of each namespace whose sessions last until routers end them
	events  int                 // how many there are
	happen  func(s *handoffSim) // is one event
	pauses  []time.Duration     // the longest time until the next event
	settle  func(s *handoffSim) // ends all trouble, and checks what has to follow
}

// faultPlay has an API server that fails and routers that crash, while owners change.
var faultPlay = simPlay{
	rates: []int{0}, faults: []int{0, 3, 10, 25},
	leaving: 2, events: 12, happen: (*handoffSim).happen, pauses: []time.Duration{3 * time.Second},
	settle: (*handoffSim).settle,
}

// scalePlay has backends that come, go, get other pods, and accept no connections, of some
// routers or of all. It has fewer faults.
var scalePlay = simPlay{
	rates: []int{0, 2, 5, 20}, faults: []int{0, 0, 3, 10},
	leaving: 1, staying: 3, events: 24, happen: (*handoffSim).happenToBackends,
	pauses: []time.Duration{300 * time.Millisecond, 3 * time.Second, 8 * time.Second},
	settle: (*handoffSim).settleBackends,
}

// simulate plays in a cluster with this seed.
func (p *simPlay) simulate(t *testing.T, seed uint64) {
	pods := 1 + rand.New(rand.NewPCG(seed, 3)).IntN(3)
	s, end := newHandoffSim(t, seed, pods)
	s.rate = p.rates[s.rng.IntN(len(p.rates))]
	faults := rand.New(rand.NewPCG(seed, 2))
	s.kube.setFaults(randomFaults(faults, p.faults[s.rng.IntN(len(p.faults))], time.Second))
	for _, r := range s.routers {
		r.start()
	}
	s.clients = len(simNamespaces) * (p.leaving + p.staying)
	for _, namespace := range simNamespaces {
		for range p.leaving {
			s.running.Go(func() { s.client(namespace) })
		}
		for range p.staying {
			s.running.Go(func() { s.stay(namespace) })
		}
	}
	s.running.Go(s.checkRouters)
	time.Sleep(s.upTo(5 * time.Second))
	for range p.events {
		p.happen(s)
		time.Sleep(s.upTo(p.pauses[s.rng.IntN(len(p.pauses))]))
	}
	p.settle(s)
	time.Sleep(time.Second) // clients come, also if the object was away all the time
	end()
	for _, r := range s.routers {
		r.terminate()
	}
	if s.sessions == 0 {
		t.Error("no client had a session")
	}
	if t.Failed() {
		t.Logf("seed %d, %d moves per second\n%s", seed, s.rate, strings.Join(s.events, "\n"))
	}
}

// simulateSeeds plays with so many seeds, from 0. HANDOFF_SEEDS is another number of seeds, and
// HANDOFF_FIRST_SEED another first one.
func (p *simPlay) simulateSeeds(t *testing.T, seeds int) {
	setting := func(name string, otherwise int) int {
		text := os.Getenv(name)
		if text == "" {
			return otherwise
		}
		n, err := strconv.Atoi(text)
		must(t, err)
		return n
	}
	first, failed := setting("HANDOFF_FIRST_SEED", 0), []int{}
	for seed := first; seed < first+setting("HANDOFF_SEEDS", seeds); seed++ {
		if !t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			bubble(t, func(t *testing.T) { p.simulate(t, uint64(seed)) })
		}) {
			failed = append(failed, seed)
		}
	}
	if len(failed) > 0 {
		t.Logf("failed: %v", failed)
	}
}

// The real mover, shared hand-off, watcher and client of the API server, under random faults,
// crashes and changes: no namespace has two owners, and all comes to rest.
func TestHandoffSeeds(t *testing.T) {
	if !withoutRace(t) {
		faultPlay.simulateSeeds(t, 20)
	}
}

// The same with sessions that stay, while the number of backends changes, their pods are
// replaced, and routers cannot reach some of them.
func TestHandoffScaleSeeds(t *testing.T) {
	if !withoutRace(t) {
		scalePlay.simulateSeeds(t, 10)
	}
}

// happenToBackends does something that may happen to backends, or else to a cluster.
func (s *handoffSim) happenToBackends() {
	switch s.rng.IntN(8) {
	case 0, 1:
		s.scale(minSimBackends + s.rng.IntN(maxSimBackends-minSimBackends+1))
		if s.rng.IntN(2) == 0 {
			s.edit()
		}
	case 2, 3:
		s.loseBackends()
	case 4:
		s.replacePod(s.rng.IntN(maxSimBackends))
	case 5, 6:
		s.edit()
	case 7:
		s.happen()
	}
}

// scale makes so many backends.
func (s *handoffSim) scale(backends int) {
	s.do(func() { s.backends.count = backends; s.note("%d backends", backends) })
}

// replacePod gives the backend another pod. The one before is gone, and all that it had. But the
// routers still have their sessions with it: its node was lost.
func (s *handoffSim) replacePod(backend int) {
	s.do(func() {
		s.replaced++
		s.pods = maps.Clone(s.pods) // routers may read it
		s.pods[backend] = fmt.Sprint("replaced-", s.replaced)
		for _, sessions := range s.open {
			maps.DeleteFunc(sessions, func(session *simSession, _ bool) bool { return session.backend == backend })
		}
		s.note("the pod of backend-%d is replaced", backend)
	})
}

// loseBackends makes some backends accept no connection, of all routers, or others of each.
func (s *handoffSim) loseBackends() {
	some := func() (backends []int) {
		for backend := range maxSimBackends {
			if s.rng.IntN(3) == 0 {
				backends = append(backends, backend)
			}
		}
		return backends
	}
	if s.rng.IntN(2) == 0 {
		s.setAway(some()...)
		return
	}
	for _, r := range s.routers {
		r.setAway(some()...)
	}
}

// maxDecisions is how many decisions a router takes per second at most. It waits for events and
// for times: one that polls takes one each paceTick.
const maxDecisions = 150

// checkRouters checks what routers do at all times, until the play ends.
func (s *handoffSim) checkRouters() {
	decisions, replaced := map[*simContainer]int64{}, map[*session]time.Time{}
	for sleep(s.ended, time.Second) == nil {
		for _, c := range s.containers() {
			n := c.decisions.Load()
			if more := n - decisions[c]; more > maxDecisions {
				s.fail("%s takes %d decisions in a second", c.pod.pod.name, more)
			}
			decisions[c] = n
			c.checkOldPods(replaced)
		}
	}
}

// checkOldPods checks that sessions whose pod was replaced end in their turn: they wait for no
// step, nor for an owner that is away (setPods, leaveOldPods). replaced says when each was found.
// A router's part of the rate is small until its answer says how many sessions it has to move
// (positiveRateShare). All sessions may be with one router, and have their turns before.
func (c *simContainer) checkOldPods(replaced map[*session]time.Time) {
	const leastShare, jitter, settling = 0.1, 1.5, 2 * time.Second
	turn := jitter * float64(c.moveInterval) * float64(len(c.pod.routers)) / leastShare
	limit := settling + time.Duration(float64(c.pod.clients)*turn)
	for _, session := range c.movableSessions() {
		found, ok := replaced[session]
		switch waited := time.Since(found); {
		case !c.relay.isOnOldPod(session):
		case !ok:
			replaced[session] = time.Now()
		case waited > limit:
			c.pod.fail("%s: a session of %s has been with an old pod of backend-%d for %s",
				c.pod.pod.name, session.namespace, session.backend, waited)
		}
	}
}

// containers returns the containers that run.
func (s *handoffSim) containers() (all []*simContainer) {
	s.do(func() {
		for _, r := range s.routers {
			if r.container != nil {
				all = append(all, r.container)
			}
		}
	})
	return all
}

// maxFaultDelay is how late the API server carries out a request: see randomFaults.
const maxFaultDelay = 30 * time.Second

// moveTime returns how long it takes at most to move all sessions. TestHandoffCosts has the same
// factor.
func (s *handoffSim) moveTime() time.Duration {
	if s.rate == 0 {
		return 5 * time.Second
	}
	return 5*time.Second + 5*time.Duration(s.clients)*time.Second/time.Duration(2*s.rate)
}

// settleBackends ends all trouble, but some backends may still be away. It checks what is
// promised of a change (docs/operations.md, "What a change does"). A change has three tables at
// most. A further one waits until all namespaces have their owners of the newest of these. For
// each table, namespaces wait maxAwayTime at most for an owner that is away, and all others go
// on meanwhile. Then nothing is left to do.
func (s *handoffSim) settleBackends() {
	s.scale(simBackends)
	if s.rng.IntN(2) == 0 {
		s.setAway()
	}
	s.endTrouble()
	s.await("change to the newest table", maxFaultDelay+maxAwayTime+s.moveTime(), s.whyOldTable)
	s.await("namespaces with owners that are there", maxFaultDelay+s.moveTime(), s.whyHeldUp)
	s.await("rest", maxAwayTime+s.moveTime(), s.whyUnsettled)
	s.await("end of all moves", time.Duration(len(s.routers))*s.moveTime(), s.whyMoving)
	time.Sleep(maxFaultDelay)
	before, probes := s.mark(), s.probes()
	time.Sleep(30 * time.Second)
	if costs, more := s.since(before), s.probes()-probes; costs.writes > 0 || more > 0 {
		s.fail("at rest: %v; and %d dials of new owners", costs, more)
	}
}

// probes returns how often routers have dialled new owners.
func (s *handoffSim) probes() (n int64) {
	for _, c := range s.containers() {
		n += c.probes.Load()
	}
	return n
}

// whyOldTable says which router's plan does not have the newest table, or "".
func (s *handoffSim) whyOldTable() string {
	for _, c := range s.containers() {
		t, v := c.tables.table(), c.current.Load()
		if t == nil || strings.Fields(t.overridesVersion)[0] != strconv.Itoa(s.version) || t.backends != s.backends {
			return c.pod.pod.name + " does not have it"
		}
		if v == nil || v.newestRecord().ownersHash != t.ownersHash {
			return "the plan of " + c.pod.pod.name + " does not have it"
		}
	}
	return ""
}

// whyHeldUp says which namespace is not with its owner, though all routers reach that, or "".
func (s *handoffSim) whyHeldUp() string {
	for _, c := range s.containers() {
		for _, namespace := range simNamespaces {
			want, _ := c.tables.table().ownerOf(namespace)
			isAway := slices.ContainsFunc(s.routers, func(r *simRouter) bool { return r.isAway(want) })
			if a := c.assignmentOf(namespace); !isAway && (a.state != stateOwned || a.backend != want) {
				return fmt.Sprintf("%s: %s is with %d (state %d), want %d",
					c.pod.pod.name, namespace, a.backend, a.state, want)
			}
		}
	}
	return ""
}

// whyMoving says what a router at rest still has to move, or "".
func (s *handoffSim) whyMoving() string {
	for _, c := range s.containers() {
		for _, session := range c.movableSessions() {
			if c.shouldMove(session) {
				return fmt.Sprintf("%s: a session of %s is with backend-%d",
					c.pod.pod.name, session.namespace, session.backend)
			}
		}
		for _, namespace := range simNamespaces {
			if c.relay.oldPodSessionsDone(namespace) != nil {
				return fmt.Sprintf("%s: %s has sessions with an old pod", c.pod.pod.name, namespace)
			}
		}
		if n := c.queue.size.Load(); n > 0 || c.moving.Load() != nil {
			return fmt.Sprintf("%s: a move is under way, %d sessions wait", c.pod.pod.name, n)
		}
	}
	return ""
}

// What a change costs the API server, and how long it takes, with many routers. In the
// bubble each request takes 10 ms, and writes of one object are one at a time, 3 ms each.
// "make handoff" shows the figures.
func TestHandoffCosts(t *testing.T) {
	if withoutRace(t) {
		return
	}
	for _, count := range proofSize([]int{10}, []int{1, 3, 10, 30, 100}) {
		inBubble(t, fmt.Sprint(count, " routers"), func(t *testing.T) { measureCosts(t, count) })
	}
}

// simCosts are the costs of one change.
type simCosts struct {
	writes, conflicts, bytes int
	steps                    int
	took                     time.Duration
}

func measureCosts(t *testing.T, count int) {
	s, end := newHandoffSim(t, 1, count)
	s.rate, s.calm = 100, true
	var free time.Time // when the next write can be carried out
	s.kube.setFaults(func(r fakeRequest) kubeFault {
		fault := kubeFault{before: 5 * time.Millisecond, after: 5 * time.Millisecond}
		if now := time.Now(); r.verb() == "PATCH" {
			if free.Before(now) {
				free = now
			}
			free = free.Add(3 * time.Millisecond)
			fault.before += free.Sub(now)
		}
		return fault
	})
	for _, r := range s.routers {
		r.start()
	}
	namespaces, owners := []string{}, map[string]string{"quiet": "backend-0"}
	for i := range 100 {
		namespaces = append(namespaces, fmt.Sprint("ns-", i))
		owners[namespaces[i]] = backendName("backend", i%simBackends)
	}
	s.rest(owners, s.mark())
	sessions := proofSize(200, 600)
	for i := range sessions {
		s.running.Go(func() { s.stay(namespaces[i%len(namespaces)]) })
	}
	time.Sleep(3 * time.Second)
	owners["quiet"] = "backend-1"
	quiet := s.rest(owners, s.mark())
	for i, namespace := range namespaces {
		owners[namespace] = backendName("backend", (i+1)%simBackends)
	}
	all := s.rest(owners, s.mark())
	before := s.mark()
	time.Sleep(time.Minute)
	calm := s.since(before)
	end()
	for _, r := range s.routers {
		r.crash()
	}
	times := all.took.Seconds() * float64(s.rate) / float64(sessions)
	t.Logf("%d routers; an edit that moves no session: %v\n  %d sessions of 100 namespaces: %v, "+
		"%.2f times sessions/rate\n  a minute at rest: %v", count, quiet, sessions, all, times, calm)
	if limit := 2 + 3*count; quiet.writes > limit {
		t.Errorf("an edit that moves no session: %d writes, want at most %d", quiet.writes, limit)
	}
	if limit := (all.steps + 3) * (1 + count); all.writes > limit {
		t.Errorf("%d steps: %d writes, want at most %d", all.steps, all.writes, limit)
	}
	if count <= 10 && times > 2.5 {
		t.Errorf("a change takes %.2f times sessions/rate, want at most 2.5", times)
	}
	if calm.writes > 0 {
		t.Errorf("%d writes at rest", calm.writes)
	}
}

// stay is a client that opens a session again at once when it ends.
func (s *handoffSim) stay(namespace string) {
	for s.ended.Err() == nil {
		if c := s.anyContainer(); c == nil || !c.serve(namespace, time.Hour) {
			sleep(s.ended, 20*time.Millisecond)
		}
	}
}

// simMark is when costs begin to count.
type simMark struct {
	simCosts
	began   time.Time
	history int
}

// mark returns what has been spent so far.
func (s *handoffSim) mark() simMark {
	m := simMark{began: time.Now()}
	m.writes = s.kube.changesOf("configmaps", handoffName)
	m.conflicts = s.kube.counted("PATCH configmaps 409")
	m.bytes = s.kube.watchedBytes("configmaps")
	s.kube.mu.Lock()
	defer s.kube.mu.Unlock()
	m.history = len(s.kube.history)
	return m
}

// since returns the costs since m.
func (s *handoffSim) since(m simMark) simCosts {
	now, steps := s.mark(), map[string]bool{}
	for _, change := range s.kube.history[m.history:now.history] {
		for _, step := range regexp.MustCompile(`"step\\":(\d+)`).FindAllString(change.event, -1) {
			steps[step] = true
		}
	}
	return simCosts{
		writes: now.writes - m.writes, conflicts: now.conflicts - m.conflicts,
		bytes: now.bytes - m.bytes, steps: len(steps), took: now.began.Sub(m.began),
	}
}

func (c simCosts) String() string {
	return fmt.Sprintf("%d steps, %d writes, %d conflicts, %d bytes to watches, in %v",
		c.steps, c.writes, c.conflicts, c.bytes, c.took.Round(time.Millisecond))
}

// rest makes these the overrides, waits until all routers are at rest, and returns the
// costs since m.
func (s *handoffSim) rest(overrides map[string]string, m simMark) simCosts {
	s.do(func() {
		s.overrides = maps.Clone(overrides)
		s.version++
	})
	for range 10_000 {
		time.Sleep(20 * time.Millisecond)
		if s.atRest() {
			return s.since(m)
		}
	}
	s.Fatal("stuck")
	panic("unreachable")
}

// atRest reports whether all routers have the newest overrides, and are at rest.
func (s *handoffSim) atRest() bool {
	for _, r := range s.routers {
		c := r.container
		t, v := c.tables.table(), c.current.Load()
		if t == nil || v == nil || c.whyNotReady() != "" || !v.hasOnlyTable(t.ownersHash) || !v.done ||
			strings.Fields(t.overridesVersion)[0] != strconv.Itoa(s.version) {
			return false
		}
	}
	return true
}

// openLong opens a session that stays until it is moved.
func (c *simContainer) openLong(namespace string) {
	a := c.assignmentOf(namespace)
	podUID := c.podUID(a.backend)
	f, _, ok := c.startFlight(namespace, a.backend, podUID, nil)
	if a.state != stateOwned || !ok {
		c.pod.Fatalf("%s is not owned", namespace)
	}
	session := &session{namespace: namespace, backend: a.backend, podUID: podUID}
	c.pod.seen.Store(session, c.begin(namespace, a.backend, podUID))
	c.relay.add(session)
	f.end()
}

// A new owner that one router has sessions for, and that accepts no connection, holds up
// its own namespaces only. The other router, whose sessions are paced, has none for it.
func TestHandoffAwayForOneRouter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, end := newHandoffSim(t, 1, 2)
		names := inOrderOfPlaces(slices.Clone(simNamespaces))
		all := func(backend int) map[string]string {
			data := map[string]string{}
			for _, namespace := range names {
				data[namespace] = backendName("backend", backend)
			}
			return data
		}
		s.overrides = all(0)
		s.setAway(3)
		s.startAll()
		time.Sleep(20 * time.Second)
		first, second := s.routers[0].container, s.routers[1].container
		last := names[len(names)-1]
		for i, c := range []*simContainer{second, second, first} {
			c.openLong(names[i])
		}
		first.openLong(last)
		next := all(1)
		next[last] = "backend-3"
		s.do(func() { s.overrides = next; s.version++ })
		time.Sleep(10 * time.Second)
		for _, namespace := range names[:len(names)-1] {
			if a := first.assignmentOf(namespace); a.state != stateOwned || a.backend != 1 {
				t.Errorf("%s is with backend-%d (state %d), want backend-1", namespace, a.backend, a.state)
			}
		}
		if a := first.assignmentOf(last); a.backend != 0 {
			t.Errorf("%s is with backend-%d, which is away", last, a.backend)
		}
		time.Sleep(maxAwayTime)
		if a := first.assignmentOf(last); a.backend != 3 {
			t.Errorf("%s is with backend-%d after a minute, want backend-3", last, a.backend)
		}
		end()
		s.crashAll()
	})
}

// An owner that is away is waited for a minute, from when the first router has found that: a
// router that gets a session for it later waits no longer.
func TestHandoffWaitsOnceForWhoIsAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, end := newHandoffSim(t, 1, 2)
		s.overrides = map[string]string{"ns-0": "backend-0", "ns-1": "backend-0"}
		s.setAway(2, 3)
		s.startAll()
		time.Sleep(20 * time.Second)
		first, second := s.routers[0].container, s.routers[1].container
		first.openLong("ns-0")
		second.openLong("ns-1") // so the second one looks again for sessions that have to move
		s.do(func() { s.overrides = map[string]string{"ns-0": "backend-3", "ns-1": "backend-2"}; s.version++ })
		time.Sleep(35 * time.Second)
		second.openLong("ns-0")
		wantEqual(t, "owner after 35 s", first.assignmentOf("ns-0").backend, 0)
		time.Sleep(30 * time.Second)
		wantEqual(t, "owner after 65 s", first.assignmentOf("ns-0").backend, 3)
		end()
		s.crashAll()
	})
}

// An owner that only the other router cannot reach holds up its own namespaces only, takes no
// turns of others, and does not keep the router busy.
func TestHandoffAwayForTheOtherRouter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, end := newHandoffSim(t, 1, 2)
		s.rate = 10
		data, next := map[string]string{}, map[string]string{}
		names := inOrderOfPlaces(manyNamespaces(40))
		for i, namespace := range names {
			data[namespace], next[namespace] = "backend-0", "backend-3"
			if i >= 30 {
				next[namespace] = "backend-1"
			}
		}
		s.overrides = data
		s.startAll()
		time.Sleep(20 * time.Second)
		first, second := s.routers[0].container, s.routers[1].container
		second.pod.setAway(3)
		for _, namespace := range names {
			first.openLong(namespace)
		}
		second.openLong(names[0])
		s.do(func() { s.overrides = next; s.version++ })
		time.Sleep(3 * time.Second)
		before := first.decisions.Load()
		time.Sleep(7 * time.Second)
		if n := first.decisions.Load() - before; n > 7*50 {
			t.Errorf("the router has decided %d times in 7 seconds", n)
		}
		for _, namespace := range names[30:] {
			if a := first.assignmentOf(namespace); a.state != stateOwned || a.backend != 1 {
				t.Errorf("%s is with backend-%d (state %d), want backend-1", namespace, a.backend, a.state)
			}
		}
		end()
		s.crashAll()
	})
}

// While an owner that is back catches up, the router that has its sessions gets all of the rate:
// the others have nothing that may move.
func TestHandoffCatchesUpAtTheRate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, end := newHandoffSim(t, 1, 2)
		s.rate = 10
		s.setAway(3)
		data, next := map[string]string{}, map[string]string{}
		names := inOrderOfPlaces(manyNamespaces(200))
		for i, namespace := range names {
			data[namespace], next[namespace] = "backend-0", "backend-1"
			if i < 10 {
				next[namespace] = "backend-3"
			}
		}
		s.overrides = data
		s.startAll()
		time.Sleep(20 * time.Second)
		first, second := s.routers[0].container, s.routers[1].container
		for i, namespace := range names {
			if i < 10 {
				first.openLong(namespace)
			} else {
				second.openLong(namespace)
			}
		}
		s.do(func() { s.overrides = next; s.version++ })
		began := time.Now()
		time.Sleep(5 * time.Second)
		s.setAway()
		for time.Since(began) < time.Minute && !first.current.Load().hasOnlyTable(first.tables.table().ownersHash) {
			time.Sleep(100 * time.Millisecond)
		}
		if took := time.Since(began); took > 26*time.Second {
			t.Errorf("200 sessions at 10 per second took %s", took)
		}
		end()
		s.crashAll()
	})
}

// While a change waits for a router that is cut off, the others admit clients to a namespace
// whose session was with a pod that was replaced, whether its owner changes or not.
func TestHandoffOldPodsWaitForNobody(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, end := newHandoffSim(t, 1, 2)
		s.overrides = map[string]string{"ns-0": "backend-0", "ns-1": "backend-0"}
		s.startAll()
		time.Sleep(20 * time.Second)
		first := s.routers[0].container
		first.openLong("ns-0")
		first.openLong("ns-1")
		s.routers[1].link.cut()
		s.do(func() { s.overrides = map[string]string{"ns-0": "backend-0", "ns-1": "backend-1"}; s.version++ })
		time.Sleep(2 * time.Second)
		s.replacePod(0)
		time.Sleep(30 * time.Second)
		for _, namespace := range []string{"ns-0", "ns-1"} {
			if first.relay.oldPodSessionsDone(namespace) != nil {
				t.Errorf("no client of %s is admitted for 30 s", namespace)
			}
		}
		s.routers[1].link.heal()
		end()
		s.crashAll()
	})
}

// inOrderOfPlaces sorts namespaces by their places.
func inOrderOfPlaces(namespaces []string) []string {
	slices.SortFunc(namespaces, func(a, b string) int {
		return cmp.Compare(placeOf(hash64(a)), placeOf(hash64(b)))
	})
	return namespaces
}

// A write that is not answered does not keep the router busy.
func TestHandoffWaitsForWrite(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, end := newHandoffSim(t, 1, 2)
		s.overrides = map[string]string{"ns-0": "backend-0"}
		s.startAll()
		time.Sleep(20 * time.Second)
		r := s.routers[0]
		r.link.cut()
		s.do(func() { s.overrides = map[string]string{"ns-0": "backend-1"}; s.version++ })
		time.Sleep(3 * time.Second)
		r.link.heal()
		r.link.freeze()
		for range 20 {
			r.container.tableOrPodChanged()
			before := r.container.decisions.Load()
			time.Sleep(time.Second)
			if n := r.container.decisions.Load() - before; n > 50 {
				t.Errorf("%d decisions in a second", n)
			}
		}
		r.link.heal()
		end()
		s.crashAll()
	})
}

// A router that does not know the cordon of another one admits nobody, and the other goes on
// as before: a change waits on both, until they have the same cordon.
func TestHandoffWaitsForCordon(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, end := newHandoffSim(t, 1, 2)
		s.overrides = map[string]string{"ns-0": "backend-0"}
		set := func(c *simContainer, list cordon) {
			c.tables.setBackends(backendSet{ordinalRange: ordinalRange{count: simBackends}, listedCordon: list})
		}
		for _, r := range s.routers {
			r.start()
			set(r.container, cordon{2})
		}
		time.Sleep(20 * time.Second)
		s.routers[1].crash()
		s.routers[1].start() // without a cordon
		time.Sleep(20 * time.Second)
		first, second := s.routers[0].container, s.routers[1].container
		s.do(func() { s.overrides = map[string]string{"ns-0": "backend-1"}; s.version++ })
		time.Sleep(10 * time.Minute)
		wantEqual(t, "why the first one is not ready", first.whyNotReady(), "")
		wantEqual(t, "owner while the cordons differ", first.assignmentOf("ns-0").backend, 0)
		if second.whyNotReady() == "" {
			t.Error("the router without the cordon is ready")
		}
		set(second, cordon{2})
		time.Sleep(20 * time.Second)
		for _, c := range []*simContainer{first, second} {
			wantEqual(t, "why not ready", c.whyNotReady(), "")
			wantEqual(t, "owner", c.assignmentOf("ns-0").backend, 1)
		}
		end()
		s.crashAll()
	})
}

// A step counts, with the time for which it held namespaces, also if its last answer comes
// with the next step: here the first router is the last that is done with it.
func TestStepEndsWithTheNext(t *testing.T) {
	for routers := 1; routers <= 3; routers++ {
		inBubble(t, fmt.Sprint(routers, " routers"), func(t *testing.T) { checkHeldTime(t, routers) })
	}
}

func checkHeldTime(t *testing.T, routers int) {
	const unit = 40 * time.Millisecond
	s, end := newHandoffSim(t, 1, routers)
	s.overrides = map[string]string{"ns-0": "backend-0"}
	for _, r := range s.routers {
		r.start()
	}
	time.Sleep(20 * time.Second)
	for i, r := range s.routers {
		c := r.container
		c.openLong("ns-0")
		c.closeSession = func(x *session, onEnd func(bool)) bool {
			if !x.setCause(causeMoved) {
				return false
			}
			value, _ := c.pod.seen.LoadAndDelete(x)
			seen := value.(*simSession)
			close(seen.ended)
			time.AfterFunc(time.Duration(3-i)*unit, func() {
				c.finish(seen)
				c.relay.remove(x, [2]int64{})
				x.isOver.Store(true)
				c.relay.onBackendDone()
				onEnd(false)
			})
			return true
		}
	}
	s.do(func() { s.overrides = map[string]string{"ns-0": "backend-1"}; s.version++ })
	var began time.Time
	var held time.Duration
	for range 5000 {
		time.Sleep(time.Millisecond)
		switch state := s.routers[0].container.assignmentOf("ns-0").state; {
		case state == stateHeld && began.IsZero():
			began = time.Now()
		case state == stateOwned && !began.IsZero() && held == 0:
			held = time.Since(began)
		}
	}
	for _, r := range s.routers {
		moves := r.container.finishedMoves()
		if len(moves) != 1 || moves[0].HeldSeconds < (3*unit).Seconds() || moves[0].HeldSeconds > (held+5*time.Millisecond).Seconds() {
			t.Errorf("%s: ns-0 was held for %s, the receipts are %+v", r.pod.name, held, moves)
		}
	}
	end()
	for _, r := range s.routers {
		r.crash()
	}
}

// TestHandoffObjectRefusesWrites: 422 says also that the object may not be changed, or is too large.
// Then the router says so, and does not take it for an object that was made anew.
func TestHandoffObjectRefusesWrites(t *testing.T) {
	t.Parallel()
	w := newGoldenWorld(t)
	w.applyMap(handoffName, nil)
	w.setPod(fakePod{name: "router-a", uid: "u1"})
	w.setFaults(func(r fakeRequest) kubeFault {
		if r.verb() != "PATCH" {
			return kubeFault{}
		}
		return kubeFault{skip: true, answer: statusAnswer(422, "Invalid",
			"data: Forbidden: field is immutable when `immutable` is set")}
	})
	r := startRouter(t, "-kube", w.url, "-kube-namespace", "edge", "-backend-port", w.port,
		"-configmap", "one,two", "-handoff", "all", "-pod-name", "router-a", "-pod-uid", "u1")
	line := r.log.wait(t, "cannot write or list for the hand-off; will retry", 1)
	if text, _ := line["error"].(string); !strings.Contains(text, "immutable") {
		t.Errorf("the log has %q, want why the object takes no write", text)
	}
	r.until(t, "/readyz", "field is immutable when `immutable` is set")
	r.until(t, "/metrics", `router_handoff_writes_total\{result="error"\} [1-9]`)
	w.setFaults(nil)
	r.until(t, "/readyz", "^ready\n$")
}

// TestHandoffPodsMayNotBeRead: a change waits for a router whose pod is gone, because the others may
// not ask for it. The log, /status and the metrics say so, also after the last step was answered.
func TestHandoffPodsMayNotBeRead(t *testing.T) {
	t.Parallel()
	w := newGoldenWorld(t)
	w.applyMap(handoffName, nil)
	var routers []*runningRouter
	for i, name := range []string{"router-a", "router-b"} {
		w.setPod(fakePod{name: name, uid: name, ip: fmt.Sprint("127.0.0.", 5+i)})
		routers = append(routers, startRouter(t, "-kube", w.url, "-kube-namespace", "edge", "-backend-port", w.port,
			"-configmap", "one,two", "-handoff", "all", "-pod-name", name, "-pod-uid", name))
	}
	for _, r := range routers { // both have answered the last step
		r.until(t, "/readyz", "^ready\n$")
		r.until(t, "/status", `"in_progress":false`)
	}
	w.forbid("GET", "pods")
	w.forbid("PATCH", "configmaps")
	routers[1].stop() // it cannot leave, as if it had been killed
	w.allow("PATCH", "configmaps")
	w.deleteObject("pods", "router-b")
	w.edit()
	a := routers[0]
	a.log.wait(t, "cannot ask whether the pod of a router is there; a change of owners may wait", 1)
	a.until(t, "/status", `"doing":"[^"]*403 Forbidden`)
	a.until(t, "/status", `"router":"router-b"[^}]*"error":"it has another table"`)
	a.until(t, "/metrics", `router_handoff_waiting_seconds\{for="router-b"\} ([1-9]|0\.)`)
	w.allow("GET", "pods")
	a.until(t, "/status", `"in_progress":false`)
	if _, status := a.get(t, "/status"); strings.Contains(status, "403 Forbidden") {
		t.Errorf("the error is still there when nothing waits: %s", status)
	}
}

// TestOtherTableSince: members have another table since this router has seen so, and has its newest one.
func TestOtherTableSince(t *testing.T) {
	h := &sharedHandoff{member: newMember("router-a", "u", "1")}
	at := func(seconds int) time.Time { return time.Unix(int64(seconds), 0) }
	h.member.newestAt = at(1)
	for _, step := range []struct {
		late      bool
		now, want time.Time
	}{
		{false, at(5), time.Time{}}, {true, at(10), at(10)}, {true, at(20), at(10)},
		{false, at(30), time.Time{}}, {true, at(40), at(40)},
	} {
		wantEqual(t, step.now.String(), h.noteOtherTable(step.late, step.now), step.want)
	}
	h.member.newestAt = at(50)
	wantEqual(t, "with a newer table", h.noteOtherTable(true, at(60)), at(50))
}
