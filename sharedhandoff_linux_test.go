package main

import (
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sharedProof is a proof with several routers, each in a pod of its own. All have the same
// API server, and with -handoff=all they share a hand-off.
type sharedProof struct {
	*proof
	flags []string // of each router
	pods  []*proofPod
	made  int // pods so far: each has a name of its own
}

// proofPod is the pod of a router. Its container is a process.
type proofPod struct {
	fakePod
	*routerProcess // the last container; nil before the first
	link           *kubeLink
	share          int // how many of the clients take it, as a weight
}

// newSharedProof starts four backends, and an API server with the object of the hand-off
// as the manifests make it. change is that of newProof.
func newSharedProof(t *testing.T, mode string, change func(*recordingBackend),
	flags ...string) *sharedProof {
	t.Helper()
	p := &sharedProof{proof: newProof(t, 4, change)}
	p.flags = append([]string{
		"-handoff", mode, "-kube-namespace", "edge", "-backend-port", p.port,
		"-hold", "1m", "-upgrade-timeout", "1m", "-header-timeout", "1m",
		"-move-settle", "100ms", "-drain-delay", "500ms", "-drain-duration", "500ms",
	}, flags...)
	p.kube.applyMap(handoffName, nil)
	p.follow(4, 0, 1, 2, 3)
	return p
}

// addPods makes so many pods. Their containers do not run yet.
func (p *sharedProof) addPods(t *testing.T, count int) []*proofPod {
	t.Helper()
	for range count {
		pod := &proofPod{share: 1, link: p.kube.link(t)}
		pod.fakePod = fakePod{name: fmt.Sprint("router-", p.made), uid: fmt.Sprint("pod-", p.made)}
		p.made++
		p.kube.setPod(pod.fakePod)
		p.pods = append(p.pods, pod)
	}
	return p.pods[len(p.pods)-count:]
}

// run starts so many routers in pods of their own, all at once, and waits until clients
// take them.
func (p *sharedProof) run(t *testing.T, count int) {
	t.Helper()
	pods := p.addPods(t, count)
	p.launch(t, pods...)
	p.admit(t, pods...)
}

// launch starts a container in each of the pods.
func (p *sharedProof) launch(t *testing.T, pods ...*proofPod) {
	t.Helper()
	for _, pod := range pods {
		p.note("%s starts", pod.name)
		pod.routerProcess = newRouterProcess(t, slices.Concat(p.flags, []string{
			"-kube", pod.link.url, "-pod-name", pod.name, "-pod-uid", pod.uid,
		})...)
		pod.start(t)
	}
	for _, pod := range pods {
		pod.await(t)
	}
}

// admit waits until the routers are ready, and has clients take them.
func (p *sharedProof) admit(t *testing.T, pods ...*proofPod) {
	t.Helper()
	begun := p.now()
	for _, pod := range pods {
		p.wait(t, "a router", pod.whyNotReady)
		p.note("%s is ready", pod.name)
		p.expose(pod)
	}
	t.Logf("%d routers ready after %v", len(pods), p.now()-begun)
}

// expose has clients take the router, whether it is ready or not.
func (p *sharedProof) expose(pod *proofPod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for range pod.share {
		p.routers = append(p.routers, &pod.runningRouter)
	}
}

// whyNotReady returns "" if the router is ready.
func (pod *proofPod) whyNotReady() string {
	resp, err := http.Get(pod.admin + "/readyz")
	if err != nil {
		return fmt.Sprintf("%s: %v; %s", pod.name, err, pod.stderr.String())
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "ready\n" {
		return fmt.Sprintf("%s is not ready: %s %v", pod.name, body, err)
	}
	return ""
}

// withdraw has no new clients take the routers.
func (p *sharedProof) withdraw(pods ...*proofPod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, pod := range pods {
		p.routers = slices.DeleteFunc(p.routers, func(r *runningRouter) bool {
			return r == &pod.runningRouter
		})
	}
}

// kill kills the containers, all at once.
func (p *sharedProof) kill(t *testing.T, pods ...*proofPod) {
	t.Helper()
	p.withdraw(pods...)
	for _, pod := range pods {
		p.note("%s is killed", pod.name)
		must(t, pod.cmd.Process.Kill())
	}
	for _, pod := range pods {
		pod.wait(t)
		if pod.stderr.Len() > 0 {
			t.Errorf("%s: %s", pod.name, pod.stderr.String())
		}
	}
}

// terminate ends the containers as Kubernetes does, all at once.
func (p *sharedProof) terminate(t *testing.T, pods ...*proofPod) {
	t.Helper()
	p.withdraw(pods...)
	for _, pod := range pods {
		p.note("%s gets SIGTERM", pod.name)
		must(t, pod.cmd.Process.Signal(syscall.SIGTERM))
	}
	for _, pod := range pods {
		pod.wantSuccess(t)
	}
}

// end ends the clients and then the routers, and checks that no namespace ever had two
// owners.
func (p *sharedProof) end(t *testing.T) {
	t.Helper()
	p.stop()
	t.Log(p.figures() + p.costs())
	p.terminate(t, p.pods...)
	p.wantOneOwner(t)
}

// costs describes what the hand-off has cost the API server.
func (p *sharedProof) costs() string {
	return fmt.Sprintf("\n  object: %d versions, %d conflicts, %d bytes to watches",
		p.kube.changesOf("configmaps", handoffName),
		p.kube.counted("PATCH configmaps 409"), p.kube.watchedBytes("configmaps"))
}

// object returns the object of the hand-off as it is now, nil if it does not exist.
func (p *sharedProof) object() *handoffObject {
	data, uid, version := p.kube.readMap(handoffName)
	if uid == "" {
		return nil
	}
	return readHandoffObject(uid, version, data)
}

// wantRest checks that the routers write nothing when nothing is to be done.
func (p *sharedProof) wantRest(t *testing.T) {
	t.Helper()
	last := -1
	p.wait(t, "a calm time", func() string {
		before := last
		last = p.kube.changesOf("configmaps", handoffName)
		p.pause(500 * time.Millisecond)
		if before != last {
			return fmt.Sprint("the object has version ", last)
		}
		return ""
	})
}

// Proof 1 with several routers: all namespaces change their owner.
func TestHandoffSharedByAll(t *testing.T) {
	t.Parallel()
	for _, routers := range []int{1, 2, 3} {
		for _, count := range proofSize([]int{30}, []int{1, 50, 500}) {
			t.Run(fmt.Sprintf("%d routers, %d namespaces", routers, count), func(t *testing.T) {
				t.Parallel()
				sessions, rate := proofSize(120, 3200), proofSize(100, 200)
				p := newSharedProof(t, "all", nil, "-move-rate", strconv.Itoa(rate))
				p.every = proofSize(2*time.Second, 10*time.Second)
				two := moveAll(t, p.proof, sessions, count, rate, func() { p.run(t, routers) })
				p.end(t)
				p.wantNoFailures(t)
				if len(two) > 0 {
					return // that is reported
				}
				// With more routers a client may be quicker than the watch of the next
				// router, which moves it again.
				if closes := p.allCloses(); closes < sessions || routers == 1 && closes > sessions {
					t.Errorf("%d Close frames to %d clients", closes, sessions)
				}
			})
		}
	}
}

// Proof 2: one router has 90 % of the clients. With routers that do not share a hand-off
// the same shows namespaces with two owners.
func TestHandoffSharedUnevenly(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"all", "single"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			sessions, rate := proofSize(150, 3200), proofSize(100, 200)
			p := newSharedProof(t, mode, nil, "-move-rate", strconv.Itoa(rate))
			two := moveAll(t, p.proof, sessions, proofSize(30, 500), rate, func() {
				pods := p.addPods(t, 2)
				pods[0].share = 9
				p.launch(t, pods...)
				p.admit(t, pods...)
			})
			if mode == "all" {
				p.end(t)
				p.wantNoFailures(t)
			} else if len(two) == 0 {
				t.Error("no namespace had two owners: the test has tested nothing")
			}
		})
	}
}

// A backend is cordoned under sessions with two routers: its hashed namespaces leave it, and
// come back when the cordon ends. No other namespace has a session that ends.
func TestHandoffSharedCordon(t *testing.T) {
	t.Parallel()
	namespaces := namespacesOf("ns", proofSize(40, 500))
	sessions := proofSize(120, 3200)
	hashed := ownersBy(namespaces, func(i int) int { return bucket(namespaces[i], 4) })
	cordoned := ownersBy(namespaces, func(i int) int {
		return bucketPast(hash64(namespaces[i]), cordonOf(4, 2))
	})
	p := newSharedProof(t, "all", nil, "-move-rate", "200")
	p.edit(nil)
	p.run(t, 2)
	p.stays(t, sessions, namespaces)
	p.waitOwners(t, hashed)
	begun := p.byNamespace()
	for _, step := range []struct {
		cordon string
		owners map[string]int
	}{{"2", cordoned}, {"2;3", cordoned}, {"", hashed}} {
		p.note("cordon %q", step.cordon)
		p.kube.annotate(step.cordon)
		p.wantSameOwners(t, step.owners)
		p.waitOwners(t, step.owners)
	}
	moved := 0
	for namespace, records := range p.byNamespace() {
		if hashed[namespace] == 2 {
			moved++
		} else if len(records) != len(begun[namespace]) {
			t.Errorf("%s has other sessions than before: %s", namespace, p.trace(namespace))
		}
	}
	if moved == 0 {
		t.Error("no namespace is hashed to backend-2")
	}
	p.end(t)
	p.wantNoFailures(t)
}

// Proof 0: a first install of several routers, and a restart of all of them with an entry
// that cannot be read. They are ready, and the next edit ends.
func TestHandoffSharedFromNothing(t *testing.T) {
	t.Parallel()
	for _, routers := range []int{1, 2, 3} {
		t.Run(fmt.Sprint(routers), func(t *testing.T) {
			t.Parallel()
			namespaces := namespacesOf("ns", 12)
			owners := ownersBy(namespaces, func(i int) int { return i % 4 })
			data := overridesOfOwners(owners)
			p := newSharedProof(t, "all", nil, "-move-rate", "100")
			p.edit(data)
			p.run(t, routers)
			p.stays(t, 24, namespaces)
			data = maps.Clone(data)
			data["bad"] = "junk"
			p.edit(data)
			p.terminate(t, p.pods...)
			p.launch(t, p.pods...)
			p.admit(t, p.pods...)
			p.waitOwners(t, owners)
			p.kill(t, p.pods...)
			p.launch(t, p.pods...)
			p.admit(t, p.pods...)
			p.waitOwners(t, owners)
			next := ownersBy(namespaces, func(i int) int { return (i + 1) % 4 })
			data = overridesOfOwners(next)
			data["bad"] = "junk"
			p.edit(data)
			p.waitOwners(t, next)
			p.wantRest(t)
			p.end(t)
		})
	}
}

// TestHandoffSharedOtherVersion: routers that find the plan of another version are not
// ready and say why, and change nothing in the object. Once it is emptied, they begin.
func TestHandoffSharedOtherVersion(t *testing.T) {
	t.Parallel()
	p := newSharedProof(t, "all", nil)
	p.edit(map[string]string{"ns-0": "backend-1"})
	other := map[string]string{planKey: `{"version":5}`, answerKeyPrefix + "router-x": "v2"}
	p.kube.replaceMap(handoffName, other)
	pods := p.addPods(t, 2)
	p.launch(t, pods...)
	for _, pod := range pods {
		p.wait(t, "a router", func() string {
			if why := pod.whyNotReady(); !strings.Contains(why, "ConfigMap edge/"+handoffName+
				" is of another version of the router: stop all routers, and empty it") {
				return "want what is wrong with the object, got " + why
			}
			return ""
		})
	}
	if data, _, _ := p.kube.readMap(handoffName); !maps.Equal(data, other) {
		t.Errorf("the object has %v now, want %v", data, other)
	}
	p.kube.replaceMap(handoffName, nil)
	p.admit(t, pods...)
	p.waitOwners(t, map[string]int{"ns-0": 1})
	p.end(t)
}

// phase is a moment of a change.
type phase struct {
	name    string
	reached func(p *sharedProof, c *change) bool
}

// change is an edit under way.
type change struct {
	before, after map[string]int    // owners
	closes        int               // that clients had got before it
	object        map[string]string // the data of the object before it
	version       string            // of the object before it
}

func phases() []phase {
	return []phase{
		{"before the plan", func(*sharedProof, *change) bool { return true }},
		{"planned", func(p *sharedProof, _ *change) bool {
			o := p.object()
			return o != nil && o.plan != nil && len(o.plan.records) > 1
		}},
		{"closing", func(p *sharedProof, c *change) bool { return p.allCloses() > c.closes }},
		{"answered", func(p *sharedProof, c *change) bool {
			o := p.object()
			return o != nil && o.plan != nil && len(o.plan.records) > 1 &&
				slices.ContainsFunc(o.pods, o.hasAnswered)
		}},
		{"opened", func(p *sharedProof, c *change) bool {
			for namespace, backends := range p.owners() {
				if slices.Contains(backends, c.after[namespace]) {
					return true
				}
			}
			return false
		}},
	}
}

// allCloses returns how many Close frames clients that stay have got.
func (p *sharedProof) allCloses() (count int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.closes {
		count += n
	}
	return count
}

// begin edits the overrides, and waits until the change has come to the phase, or is over.
func (p *sharedProof) begin(t *testing.T, c *change, ph phase) {
	t.Helper()
	c.closes = p.allCloses()
	c.object, _, c.version = p.kube.readMap(handoffName)
	p.edit(overridesOfOwners(c.after))
	p.wait(t, ph.name, func() string {
		if ph.reached(p, c) {
			return ""
		}
		return "not yet"
	})
	p.note("%s", ph.name)
}

// disturbance is what goes wrong during a change.
type disturbance struct {
	name string
	do   func(t *testing.T, p *sharedProof, c *change)
}

// disturb has each of the disturbances happen in some phase of a change, or in each of
// them so many times. After each, the change ends. Each world has so many routers.
func disturb(t *testing.T, routers, times int, fails bool, all ...disturbance) {
	if *wholeProof {
		for _, d := range all {
			for _, ph := range phases() {
				t.Run(d.name+", "+ph.name, func(t *testing.T) {
					t.Parallel()
					disturbOne(t, routers, fails, slices.Repeat([]disturbance{d}, times), &ph)
				})
			}
		}
		return
	}
	disturbOne(t, routers, fails, all, nil)
}

// disturbOne has the disturbances happen one after the other, in this phase, or if it is
// nil in any. fails says that clients may fail.
func disturbOne(t *testing.T, routers int, fails bool, all []disturbance, in *phase) {
	rng := rand.New(rand.NewPCG(randomSeed(t), 11))
	namespaces := namespacesOf("ns", 24)
	owners := func(round int) map[string]int {
		return ownersBy(namespaces, func(i int) int { return (i + round) % 4 })
	}
	p := newSharedProof(t, "all", nil, "-move-rate", proofSize("144", "24"))
	p.every = 300 * time.Millisecond
	p.edit(overridesOfOwners(owners(0)))
	p.run(t, routers)
	p.stays(t, 72, namespaces)
	p.come(10, namespaces)
	for i, d := range all {
		ph := in
		if ph == nil {
			ph = &phases()[rng.IntN(len(phases()))]
		}
		c := &change{before: owners(i), after: owners(i + 1)}
		p.note("%s, %s", d.name, ph.name)
		p.begin(t, c, *ph)
		begun := p.now()
		d.do(t, p, c)
		p.waitOwners(t, c.after)
		t.Logf("%s, %s: the change ends %v after that", d.name, ph.name, p.now()-begun)
	}
	last := owners(len(all) + 1)
	p.edit(overridesOfOwners(last))
	p.waitOwners(t, last)
	p.wantRest(t)
	p.end(t)
	if !fails {
		p.wantNoFailures(t)
	}
}

// Proof 3 and 7: a router is stopped, its link to the API server is cut, or the API server
// is away. The change waits, and ends when that is over; no client gets an error.
func TestHandoffSharedWithoutContact(t *testing.T) {
	t.Parallel()
	hurt := func(d time.Duration, begin, end func(*proofPod), all bool,
	) func(*testing.T, *sharedProof, *change) {
		return func(t *testing.T, p *sharedProof, _ *change) {
			pods := p.pods[:1]
			if all {
				pods = p.pods
			}
			for _, pod := range pods {
				begin(pod)
			}
			p.pause(d) // as long as it takes
			for _, pod := range pods {
				end(pod)
			}
			p.note("it is over")
		}
	}
	cut, freeze := func(pod *proofPod) { pod.link.cut() }, func(pod *proofPod) { pod.link.freeze() }
	heal := func(pod *proofPod) { pod.link.heal() }
	short := proofSize(time.Second, 15*time.Second)
	disturb(t, 3, 2, false,
		disturbance{"a router stops", func(t *testing.T, p *sharedProof, _ *change) {
			pod := p.pods[0]
			p.withdraw(pod)
			must(t, pod.cmd.Process.Signal(syscall.SIGSTOP))
			p.pause(short) // as long as it takes
			must(t, pod.cmd.Process.Signal(syscall.SIGCONT))
			p.note("it goes on")
			p.admit(t, pod)
		}},
		disturbance{"a router is cut off", hurt(short, cut, heal, false)},
		disturbance{"a router is not heard", hurt(short, freeze, heal, false)},
		disturbance{"the API server is away",
			hurt(proofSize(time.Second, 6*time.Second), cut, heal, true)},
	)
}

// Proof 4: routers are killed, one or all, and start again.
func TestHandoffSharedKilled(t *testing.T) {
	t.Parallel()
	killed := func(count int) func(*testing.T, *sharedProof, *change) {
		return func(t *testing.T, p *sharedProof, _ *change) {
			p.kill(t, p.pods[:count]...)
			p.launch(t, p.pods[:count]...)
			p.admit(t, p.pods[:count]...)
		}
	}
	disturb(t, 2, 20, true, disturbance{"one is killed", killed(1)},
		disturbance{"all are killed", killed(2)},
		disturbance{"one is killed, and its pod is gone", func(t *testing.T, p *sharedProof, _ *change) {
			pod := p.pods[1]
			p.kill(t, pod)
			p.kube.deleteObject("pods", pod.name)
			pod.uid += "a"
			p.kube.setPod(pod.fakePod)
			p.launch(t, pod)
			p.admit(t, pod)
		}},
		disturbance{"one starts on an empty object, and the other is not heard",
			func(t *testing.T, p *sharedProof, _ *change) {
				starts, late := p.pods[0], p.pods[1]
				p.kill(t, starts)
				late.link.freeze()
				p.kube.replaceMap(handoffName, nil)
				p.launch(t, starts)
				p.expose(starts)
				p.pause(time.Second) // the time that a router would need to get it wrong
				late.link.heal()
				p.note("all are heard")
				p.wait(t, "the router", starts.whyNotReady)
			}})
}

// Proof 5: routers start during a change, and all are replaced in turn.
func TestHandoffSharedStarted(t *testing.T) {
	t.Parallel()
	started := func(count int) func(*testing.T, *sharedProof, *change) {
		return func(t *testing.T, p *sharedProof, _ *change) {
			pods := p.addPods(t, count)
			p.launch(t, pods...)
			p.admit(t, pods...)
			p.pause(300 * time.Millisecond) // some clients take them
			p.terminate(t, pods...)
			for _, pod := range pods {
				p.kube.deleteObject("pods", pod.name)
			}
			p.pods = p.pods[:len(p.pods)-count]
		}
	}
	disturb(t, 2, 3, false, disturbance{"1 starts", started(1)},
		disturbance{"3 start", started(3)},
		disturbance{"a rollout", func(t *testing.T, p *sharedProof, _ *change) {
			for i, old := range p.pods {
				pod := p.addPods(t, 1)[0]
				p.launch(t, pod)
				p.admit(t, pod)
				p.terminate(t, old)
				p.kube.deleteObject("pods", old.name)
				p.pods[i] = pod
				p.pods = p.pods[:len(p.pods)-1]
			}
		}})
}

// Proof 11: somebody changes the object of the hand-off.
func TestHandoffSharedObject(t *testing.T) {
	t.Parallel()
	kube := func(do func(f *fakeKube, c *change)) func(*testing.T, *sharedProof, *change) {
		return func(_ *testing.T, p *sharedProof, c *change) { do(p.kube, c) }
	}
	disturb(t, 2, 3, false,
		disturbance{"deleted", func(_ *testing.T, p *sharedProof, c *change) {
			p.kube.deleteObject("configmaps", handoffName)
			p.pause(proofSize(time.Second, 10*time.Second)) // until somebody applies it again
			p.kube.applyMap(handoffName, nil)
		}},
		disturbance{"emptied", kube(func(f *fakeKube, _ *change) { f.replaceMap(handoffName, nil) })},
		disturbance{"replaced by an old copy", kube(func(f *fakeKube, c *change) {
			f.replaceMap(handoffName, c.object)
		})},
		disturbance{"made anew from an old copy", kube(func(f *fakeKube, c *change) {
			f.deleteObject("configmaps", handoffName)
			f.applyMap(handoffName, c.object)
		})},
		disturbance{"restored", kube(func(f *fakeKube, c *change) {
			f.restoreMap(handoffName, c.version, c.object)
			f.endWatches("configmaps")
		})},
		// The last router is a step behind when the others write a plan anew.
		disturbance{"emptied while a router is not heard",
			func(_ *testing.T, p *sharedProof, _ *change) {
				late := p.pods[len(p.pods)-1]
				late.link.freeze()
				p.pause(300 * time.Millisecond) // for the next step
				p.kube.replaceMap(handoffName, nil)
				p.pause(time.Second) // the time that a router would need to get it wrong
				late.link.heal()
				p.note("all are heard")
			}},
	)
}

// Proof 12: a router that missed an edit, and one that saw it, agree on the owner of an
// entry that cannot be read, and it does not block the next change.
func TestHandoffSharedHistories(t *testing.T) {
	t.Parallel()
	p := newSharedProof(t, "all", nil, "-move-rate", "100")
	owners := map[string]int{"typo": 0, "other": 1, "third": 2}
	data := overridesOfOwners(owners)
	p.edit(data)
	p.run(t, 2)
	p.stays(t, 12, slices.Collect(maps.Keys(owners)))
	for round := range proofSize(2, 20) {
		p.pods[round%2].link.cut()
		seen := p.pods[1-round%2]
		updates := len(seen.log.all("routing table updated"))
		data = maps.Clone(data)
		data["typo"] = backendName("backend", 3)
		p.edit(data)
		p.wait(t, "the edit", func() string {
			if len(seen.log.all("routing table updated")) > updates {
				return ""
			}
			return "not seen"
		})
		data = maps.Clone(data)
		data["typo"] = "bakend-0"
		p.edit(data)
		p.pods[round%2].link.heal()
		owners["other"], owners["third"] = (owners["other"]+1)%4, (owners["third"]+1)%4
		data = overridesOfOwners(owners)
		data["typo"] = "bakend-0"
		p.edit(data)
		p.waitOwners(t, owners)
		p.wantSameOwners(t, owners)
	}
	p.end(t)
	p.wantNoFailures(t)
}

// Proof 6 with several routers: edits, edits and edits back. With faults, links of routers
// to the API server are cut meanwhile, or its requests go wrong.
func TestHandoffSharedEdits(t *testing.T) {
	t.Parallel()
	cut := func(p *sharedProof) func(*rand.Rand, bool) {
		return func(rng *rand.Rand, last bool) {
			for _, pod := range p.pods {
				pod.link.heal()
			}
			pod := p.pods[rng.IntN(len(p.pods))]
			switch what := rng.IntN(3); {
			case last:
			case what == 0:
				pod.link.cut()
			case what == 1:
				pod.link.freeze()
			}
		}
	}
	fail := func(p *sharedProof) func(*rand.Rand, bool) {
		unit := proofSize(100*time.Millisecond, time.Second)
		return func(rng *rand.Rand, last bool) {
			p.kube.setFaults(nil)
			if !last {
				p.kube.setFaults(randomFaults(rand.New(rand.NewPCG(rng.Uint64(), 1)), 30, unit))
			}
		}
	}
	for name, hurt := range map[string]func(*sharedProof) func(*rand.Rand, bool){
		"calm": nil, "links are cut": cut, "requests fail": fail,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newSharedProof(t, "all", nil, "-move-rate", "150", "-move-settle", "50ms")
			after := func(*rand.Rand, bool) {}
			if hurt != nil {
				after = hurt(p)
			}
			editAndEdit(t, p.proof, proofSize(2, 50), func() { p.run(t, 2) }, after)
			p.end(t)
		})
	}
}

// Proof 9 with several routers: the new owner is away.
func TestHandoffSharedToWhoIsAway(t *testing.T) {
	t.Parallel()
	p := newSharedProof(t, "all", nil, "-move-rate", "200")
	moveToWhoIsAway(t, p.proof, func() {
		p.run(t, 2)
		p.backends[3].die()
		p.follow(4, 0, 1, 2)
	}, func() {
		p.backends[3].listen(t)
		p.follow(4, 0, 1, 2, 3)
	})
	p.end(t)
	p.wantNoFailures(t)
}
