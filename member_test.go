package main

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The tests of this file run whole groups of routers as a model: the decisions and the
// views are those of production, all around them is simulated. One event happens at a time,
// chosen at random: a router sees a version of the object or an edit, decides, opens or
// closes a session, dies, starts; a write arrives, late, or never; somebody deletes the
// object, empties it, or puts an old copy in its place. After each event each namespace has
// at most one owner. After the last fault all comes to rest.

// modelNamespaces are in the order of their places.
var modelNamespaces = func() (names []string) {
	for i := range 4 {
		names = append(names, fmt.Sprintf("ns-%d", i))
	}
	slices.SortFunc(names, func(a, b string) int {
		if placeOf(hash64(a)) < placeOf(hash64(b)) {
			return -1
		}
		return 1
	})
	return names
}()

// modelWorld is one run of the model.
type modelWorld struct {
	*rand.Rand
	rules modelRules
	calm  bool // no faults any more

	now     time.Time
	edits   []map[string]string // of the overrides, in their order
	sizes   []ordinalRange      // the backends of each edit
	object  *handoffObject      // nil: does not exist
	data    map[string]string   // of object
	old     []map[string]string // earlier data
	version int
	late    []*handoffWrite // that may arrive still
	pods    map[string]routerPod
	routers []*modelRouter // one for each name of a pod
	serial  int            // of UIDs and instances
	faults  int            // one event in so many is a fault
	kinds   [12]bool       // the faults of this run
	stale   bool           // an old copy may be in place of the object
	trace   []string
	seen    map[string]int // how often something happened
	lagger  *modelRouter   // lags behind the others; nil for none
}

// modelRouter is the container of a router's pod.
type modelRouter struct {
	*member           // nil: it does not run
	pod     string    // its name
	open    [4]uint64 // for each namespace, the backends with a session
	object  *handoffObject
	seenAt  time.Time
	inbox   []*handoffObject // versions that it will see
	list    *podList
	listing *podList // has begun
	edit    int      // of its table; -1: none
	limit   stepLimit
	leaving bool
	cut     bool // sees nothing for a while
	skew    time.Duration
}

// modelRules change what the model does: each takes a rule away.
type modelRules struct {
	situation func(*modelWorld, *modelRouter, *decisionInput)
	view      func(*modelRouter, *memberView)
	decision  func(*modelWorld, *modelRouter, *decision)
	write     func(*handoffWrite)
	listLate  bool   // a list of pods from before the object's version counts
	noEnd     bool   // a router that is not a member keeps its sessions
	keepAll   bool   // an unknown owner ends no session
	admitLast bool   // a router that leaves admits clients
	firstSeed uint64 // for TestModelNeedsRules: one soon after it finds something
	hostile   bool   // takes none away: more invalid entries, routers that lag, and resets by these
}

func (w *modelWorld) tell(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	w.trace = append(w.trace, line)
	w.seen[strings.Fields(line)[0]]++
}

// id returns a new name.
func (w *modelWorld) id(prefix string) string {
	w.serial++
	return prefix + strconv.Itoa(w.serial)
}

// chance is true once in n times.
func (w *modelWorld) chance(n int) bool { return w.IntN(n) == 0 }

func newModelWorld(seed uint64, rules modelRules) *modelWorld {
	w := &modelWorld{
		Rand: rand.New(rand.NewPCG(seed, 4)), rules: rules, now: time.UnixMilli(1000),
		pods: map[string]routerPod{}, seen: map[string]int{},
		faults: []int{8, 16, 32}[seed%3],
	}
	for kind := range w.kinds { // each seed has its own mix
		w.kinds[kind] = kind < 2 || w.chance(2)
	}
	n := 1 + w.IntN(3)
	if rules.hostile {
		n = 2 + w.IntN(3)
		w.faults = []int{5, 9, 16}[seed%3]
		for kind := range w.kinds {
			w.kinds[kind] = kind < 2 || !w.chance(4)
		}
	}
	w.addEdit()
	w.store("u", map[string]string{})
	for i := range n {
		w.routers = append(w.routers, &modelRouter{pod: fmt.Sprintf("r%d", i)})
		if !w.chance(4) {
			w.addPod(w.routers[i])
		}
	}
	return w
}

// addEdit adds an edit: of one namespace, of all, of the number of backends, or back to an
// earlier one.
func (w *modelWorld) addEdit() {
	data, size := map[string]string{}, ordinalRange{0, 3}
	if n := len(w.edits); n > 0 {
		i := n - 1
		if w.chance(3) {
			i = w.IntN(n)
		}
		data, size = maps.Clone(w.edits[i]), w.sizes[i]
		if w.rules.hostile && w.chance(3) { // exactly an earlier one, of the last three mostly
			i = max(0, n-1-w.IntN(3))
			w.edits, w.sizes = append(w.edits, maps.Clone(w.edits[i])), append(w.sizes, w.sizes[i])
			w.tell("edit: %d is %d again", n, i)
			return
		}
	}
	if w.rules.hostile {
		for range 1 + w.IntN(3) {
			value := fmt.Sprintf("backend-%d", w.IntN(4))
			if w.chance(2) {
				value = "unreadable"
			}
			data[modelNamespaces[w.IntN(4)]] = value
		}
		if w.chance(3) {
			size.count = 2 + w.IntN(3)
		}
		w.edits, w.sizes = append(w.edits, data), append(w.sizes, size)
		w.tell("edit: %d is %v with %s backends", len(w.edits)-1, data, size)
		return
	}
	for range 1 + w.IntN(4) {
		data[modelNamespaces[w.IntN(4)]] = fmt.Sprintf("backend-%d", w.IntN(4))
	}
	if w.chance(3) {
		delete(data, modelNamespaces[w.IntN(4)])
	}
	if w.chance(3) {
		size.count = 2 + w.IntN(3)
	}
	w.edits, w.sizes = append(w.edits, data), append(w.sizes, size)
	w.tell("edit: %d is %v with %s backends", len(w.edits)-1, data, size)
}

func (w *modelWorld) addPod(r *modelRouter) {
	w.pods[r.pod] = routerPod{uid: w.id("p"), scheduled: true}
	w.tell("pod %s is %s", r.pod, w.pods[r.pod].uid)
}

// store makes a new version of the object.
func (w *modelWorld) store(uid string, data map[string]string) {
	if w.object != nil {
		w.old = append(w.old, w.data)
	}
	w.version++
	w.object, w.data = readHandoffObject(uid, strconv.Itoa(w.version), data), data
	w.show()
}

// show has all routers see the object, sooner or later.
func (w *modelWorld) show() {
	for _, r := range w.routers {
		r.inbox = append(r.inbox, w.object)
	}
}

// apply applies a write as the API server does.
func (w *modelWorld) apply(write *handoffWrite) {
	o := w.object
	if o == nil || write.uid != "" && write.uid != o.uid || write.version != "" && write.version != o.version {
		w.tell("refused: %v", write.data)
		return
	}
	data := maps.Clone(w.data)
	maps.Copy(data, write.data)
	for _, key := range write.remove {
		delete(data, key)
	}
	if !maps.Equal(data, w.data) {
		w.tell("version %d: %v, without %v", w.version+1, write.data, write.remove)
		w.store(o.uid, data)
	}
}

// start starts the container of r's pod.
func (w *modelWorld) start(r *modelRouter) {
	*r = modelRouter{pod: r.pod, edit: -1, object: w.object, seenAt: w.now}
	r.member = newMember(r.pod, w.pods[r.pod].uid, w.id("i"))
	if w.chance(3) && !w.calm {
		r.skew = -time.Duration(w.IntN(5000)) * time.Millisecond
	}
	w.tell("start %s %s", r.pod, r.instance)
}

func (w *modelWorld) clock(r *modelRouter) time.Time { return w.now.Add(r.skew) }

// stop ends the container.
func (w *modelWorld) stop(r *modelRouter) {
	w.tell("stop %s", r.pod)
	r.member, r.open = nil, [4]uint64{}
}

// receive has r see the next version of the object.
func (w *modelWorld) receive(r *modelRouter) {
	if len(r.inbox) == 0 {
		return
	}
	if w.rules.hostile && w.chance(4) { // the inbox of production has the newest version alone
		r.inbox = r.inbox[len(r.inbox)-1:]
	}
	r.object, r.inbox, r.seenAt = r.inbox[0], r.inbox[1:], w.clock(r)
	if r.object != nil {
		r.expireOffers(r.object, w.clock(r))
	}
}

// readEdit has r make a table of a later edit.
func (w *modelWorld) readEdit(r *modelRouter) {
	last := len(w.edits) - 1
	if r.edit == last {
		return
	}
	r.edit += 1 + w.IntN(last-r.edit)
	if w.calm || r.edit < 0 {
		r.edit = last
	}
	sources := []sourceContent{{id: sourceID{name: "a"}, overrides: newOverrideSet(w.edits[r.edit])}}
	r.setNewest(newTable("backend", false, w.sizes[r.edit], nil, sources, r.newest), w.clock(r))
	w.tell("reads: %s has edit %d, %016x", r.pod, r.edit, r.newest.ownersHash)
}

// misplaced returns the backends of r's sessions of a namespace that have to end.
func (w *modelWorld) misplaced(r *modelRouter, i int) (set uint64) {
	for backend := range 8 {
		s := &session{namespace: modelNamespaces[i], backend: backend}
		if r.open[i]&(1<<backend) == 0 || r.view == nil || !r.view.mustLeave(s.namespace, s.backend) {
			continue
		}
		if w.rules.keepAll && r.view.after(s.namespace) == ownerNotKnown {
			continue
		}
		set |= 1 << backend
	}
	return set
}

// situationOf returns what r decides by.
func (w *modelWorld) situationOf(r *modelRouter) *decisionInput {
	s := &decisionInput{
		now: w.clock(r), object: r.object, seenAt: r.seenAt, list: r.list, leaving: r.leaving,
		gone: func(uid string) bool {
			return !slices.ContainsFunc(slices.Collect(maps.Values(w.pods)), func(pod routerPod) bool { return pod.uid == uid })
		},
	}
	s.doneHere = true
	for i := range r.open {
		s.hasWork = s.hasWork || r.open[i] != 0
		s.doneHere = s.doneHere && w.misplaced(r, i) == 0
	}
	s.limit = r.limit
	if w.rules.situation != nil {
		w.rules.situation(w, r, s)
	}
	return s
}

// act has r decide, and does what it decides. It reports whether there was something.
func (w *modelWorld) act(r *modelRouter) bool {
	if w.chance(10) {
		r.limit = w.randomLimit()
	}
	d := r.decide(w.situationOf(r))
	if w.rules.decision != nil {
		w.rules.decision(w, r, &d)
	}
	if d.view != nil && w.rules.view != nil {
		w.rules.view(r, d.view)
	}
	r.commit(d, w.clock(r))
	switch d.action {
	case actAdopt:
		w.tell("adopts: %s step %d of %s, done %t, outside %t", r.pod, d.view.step, d.view.plan.epoch, d.view.done, d.view.servesNone)
	case actList:
		r.inbox = []*handoffObject{w.object}
		w.receive(r)
		if r.listing = nil; r.object != nil {
			r.listing = &podList{uid: r.object.uid, version: r.object.version}
			if w.rules.listLate {
				r.listing.pods = maps.Clone(w.pods)
			}
		}
	case actEndAll:
		if w.tell("endall: %s", r.pod); !w.rules.noEnd {
			r.open = [4]uint64{}
		}
	case actWrite:
		w.tell("%s: %s", strings.Fields(strings.TrimPrefix(d.doing, "this router is "))[0], r.pod)
		w.count(d.write)
		w.send(d.write)
	}
	return d.action != actWait
}

// count counts what a written plan has.
func (w *modelWorld) count(write *handoffWrite) {
	p, err := parsePlan(write.data[planKey])
	if err != nil {
		return
	}
	w.seen[fmt.Sprintf("plan of %d", len(p.records))]++
	if p.allHeld {
		w.seen["plan held"]++
	}
	if p.allHeld && p.oldestSince == (planStep{p.epoch, p.step}) {
		w.seen["plan without kept"]++
	}
	for i := range p.records {
		if p.records[i].after.upto > p.records[i].before.upto {
			w.seen["plan moves"]++
		}
	}
}

// send sends a write, which may be lost or late.
func (w *modelWorld) send(write *handoffWrite) {
	if w.rules.write != nil {
		w.rules.write(write)
	}
	switch {
	case w.calm || !w.chance(4):
		w.apply(write)
	case w.chance(2):
		w.late = append(w.late, write)
	}
}

// randomLimit returns any proposal.
func (w *modelWorld) randomLimit() stepLimit {
	if w.calm || w.chance(2) {
		return stepLimit{upto: allPlaces}
	}
	l := stepLimit{upto: []uint64{0, allPlaces, placeOf(hash64(modelNamespaces[w.IntN(4)])) + 1}[w.IntN(3)]}
	if w.rules.hostile && w.chance(2) {
		l = stepLimit{upto: 1} // only what was scaled in
	}
	for ordinal := range 4 {
		if w.chance(10) {
			l.away = append(l.away, ordinal)
		}
	}
	return l
}

// finishList gives r the pods that exist now.
func (w *modelWorld) finishList(r *modelRouter) {
	if r.listing == nil {
		return
	}
	r.list, r.listing = r.listing, nil
	if r.list.pods == nil {
		r.list.pods = maps.Clone(w.pods)
	}
	r.list.at = w.clock(r)
}

// openSession opens a session if the view has an owner.
func (w *modelWorld) openSession(r *modelRouter) {
	i := w.IntN(4)
	if r.view == nil || r.leaving && !w.rules.admitLast {
		return
	}
	if owner, _, state := r.view.owner(modelNamespaces[i]); state == stateOwned {
		if r.open[i]&(1<<owner) == 0 {
			w.tell("opens: %s %s with %d, step %d", r.pod, modelNamespaces[i], owner, r.view.step)
		}
		r.open[i] |= 1 << owner
	}
}

// closeSession ends the sessions of one namespace: those that have to, or all, since their
// clients leave.
func (w *modelWorld) closeSession(r *modelRouter) {
	i := w.IntN(4)
	set := w.misplaced(r, i)
	if w.chance(4) {
		set = r.open[i]
	}
	if set != 0 {
		w.tell("closes: %s %s with %b", r.pod, modelNamespaces[i], set)
	}
	r.open[i] &^= set
}

// fault does something to the routers, their pods, or the object.
func (w *modelWorld) fault() {
	r := w.routers[w.IntN(len(w.routers))]
	_, exists := w.pods[r.pod]
	kind := max(0, w.IntN(len(w.kinds)+6)-6)
	if !w.kinds[kind] {
		return
	}
	switch kind {
	case 0, 1, 2:
		w.addEdit()
	case 3, 4:
		if r.member != nil {
			w.stop(r)
		}
	case 5:
		if exists && w.chance(2) {
			if r.member != nil {
				w.stop(r)
			}
			delete(w.pods, r.pod)
			w.tell("pod %s is gone", r.pod)
		}
	case 6:
		if !exists {
			w.addPod(r)
		}
	case 7:
		r.cut = !r.cut
	case 8:
		w.now = w.now.Add(time.Duration(w.IntN(200)) * time.Second)
	case 9:
		if r.member != nil && w.chance(3) {
			r.leaving = true
			w.tell("leaves: %s", r.pod)
		}
	default:
		w.spoil()
	}
}

// spoil does something to the object.
func (w *modelWorld) spoil() {
	if w.object == nil {
		w.tell("made: anew")
		w.store(w.id("u"), map[string]string{})
		return
	}
	data := maps.Clone(w.data)
	switch w.IntN(8) {
	case 0:
		w.tell("deleted: object")
		w.old, w.object, w.data = append(w.old, w.data), nil, nil
		w.show()
		return
	case 1:
		clear(data)
	case 2:
		delete(data, planKey)
	case 3:
		data[planKey] = "{"
	case 4, 5:
		data[answerKeyPrefix+w.routers[w.IntN(len(w.routers))].pod] = "?"
	default:
		w.putOld()
		return
	}
	w.tell("spoiled: %v", data)
	w.store(w.object.uid, data)
}

// putOld puts an old copy in place of the object, if all routers go by the last version. One
// that does not might go by the old copy: all have to be restarted after a restored backup.
func (w *modelWorld) putOld() {
	if len(w.old) == 0 || !w.allUpToDate() {
		return
	}
	w.stale = true
	uid := w.object.uid
	if w.chance(2) {
		uid = w.id("u")
	}
	data := w.old[w.IntN(len(w.old))]
	w.tell("old copy: %v", data)
	w.store(uid, data)
}

// allUpToDate reports whether all routers that run go by the present version.
func (w *modelWorld) allUpToDate() bool {
	return !slices.ContainsFunc(w.routers, func(r *modelRouter) bool {
		return r.member != nil && (r.view == nil || r.view.version != w.object.version)
	})
}

// mayStart reports whether no router would go by an old copy beside one that knows better.
func (w *modelWorld) mayStart() bool {
	w.stale = w.stale && w.object != nil && !w.allUpToDate()
	return !w.stale
}

// attack has one router lag, and the object be emptied then.
func (w *modelWorld) attack() {
	switch l := w.routers[w.IntN(len(w.routers))]; w.IntN(8) {
	case 0, 1:
		w.lagger = l
	case 2:
		w.lagger = nil
	case 3, 4: // the lagging one sees the empty object alone, and resets the plan
		if w.object == nil || w.lagger == nil || w.lagger.member == nil {
			return
		}
		l = w.lagger
		data := map[string]string{}
		if w.chance(3) {
			data = maps.Clone(w.data)
			delete(data, planKey)
		}
		w.tell("attack: %s resets", l.pod)
		w.store(w.object.uid, data)
		l.inbox = l.inbox[len(l.inbox)-1:]
		w.receive(l)
		for range 6 {
			w.act(l)
			w.finishList(l)
			if w.chance(2) {
				w.now = w.now.Add(200 * time.Millisecond)
			}
		}
	case 5: // backends have seen a step
		if l.member != nil && l.view != nil {
			step := w.now.UnixMilli() + int64(w.IntN(4000))
			if w.chance(2) {
				for _, r := range w.routers {
					if r.member != nil && r.view != nil {
						step = max(step, r.view.step)
					}
				}
			}
			l.noteBackendStep(step)
		}
	case 6:
		l.skew = time.Duration(w.IntN(10000)-5000) * time.Millisecond
	case 7: // all but the lagging one come to rest
		for range 6 {
			for _, r := range w.routers {
				if r != w.lagger && r.member != nil {
					w.catchUp(r)
				}
			}
			w.now = w.now.Add(100 * time.Millisecond)
		}
	}
}

// event does one thing.
func (w *modelWorld) event() {
	if w.rules.hostile && w.chance(20) {
		w.attack()
		return
	}
	w.now = w.now.Add(time.Duration(w.IntN(100)) * time.Millisecond)
	r := w.routers[w.IntN(len(w.routers))]
	switch {
	case !w.calm && w.chance(w.faults):
		w.fault()
	case len(w.late) > 0 && w.chance(10):
		i := w.IntN(len(w.late))
		write := w.late[i]
		w.late = slices.Delete(w.late, i, i+1)
		w.tell("late: %v", write.data)
		w.apply(write)
	case r.member == nil:
		if pod, exists := w.pods[r.pod]; exists && pod.scheduled && w.chance(3) && w.mayStart() {
			w.start(r)
		}
	default:
		if r == w.lagger && w.chance(3) {
			w.openSession(r)
			return
		}
		if r == w.lagger && !w.chance(8) {
			return
		}
		w.step(r)
	}
}

// step has one router do something.
func (w *modelWorld) step(r *modelRouter) {
	switch w.IntN(12) {
	case 0, 1:
		w.openSession(r)
	case 2, 3:
		w.closeSession(r)
	case 4:
		w.readEdit(r)
	case 5:
		w.finishList(r)
	case 6, 7, 8:
		for range 1 + w.IntN(3) {
			if !r.cut {
				w.receive(r)
			}
		}
	default:
		w.act(r)
	}
}

// owners returns for each namespace the backends that have a session, or that a router
// would give one.
func (w *modelWorld) owners() (sets [4]uint64) {
	for _, r := range w.routers {
		if r.member == nil {
			continue
		}
		for i, ns := range modelNamespaces {
			sets[i] |= r.open[i]
			if r.view == nil || r.leaving && !w.rules.admitLast {
				continue
			}
			if owner, _, state := r.view.owner(ns); state == stateOwned {
				sets[i] |= 1 << owner
			}
		}
	}
	return sets
}

// violation says which namespace has two owners, or "".
func (w *modelWorld) violation() string {
	for i, set := range w.owners() {
		if set&(set-1) != 0 {
			return fmt.Sprintf("%s has the owners %b", modelNamespaces[i], set)
		}
	}
	if w.rules.hostile {
		return w.disagreement()
	}
	return ""
}

// disagreement says which routers do not agree on a kept namespace of the same oldest table.
func (w *modelWorld) disagreement() string {
	for i, a := range w.routers {
		for _, b := range w.routers[:i] {
			if a.member == nil || b.member == nil || a.view == nil || b.view == nil ||
				a.view.plan.oldestSince != b.view.plan.oldestSince ||
				a.view.tables[0] == nil || b.view.tables[0] == nil {
				continue
			}
			if a.view.records[0].ownersHash != b.view.records[0].ownersHash {
				return fmt.Sprintf("DISAGREE %s and %s have other oldest tables since %v", a.pod, b.pod, a.view.plan.oldestSince)
			}
			for _, ns := range modelNamespaces {
				x, _ := a.view.tables[0].lookup(ns, hash64(ns))
				y, _ := b.view.tables[0].lookup(ns, hash64(ns))
				if x != y && x != unresolved && y != unresolved {
					return fmt.Sprintf("DISAGREE %s and %s: %s is with %d and %d since %v", a.pod, b.pod, ns, x, y, a.view.plan.oldestSince)
				}
			}
		}
	}
	return ""
}

// settle ends all faults, and lets all routers go on until all is at rest. It returns what
// is missing after a long time, or a violation, or "".
func (w *modelWorld) settle() string {
	w.calm, w.late, w.lagger = true, nil, nil
	w.tell("calm")
	if w.object == nil {
		w.store(w.id("u"), map[string]string{})
	}
	for _, r := range w.routers {
		if r.cut = false; r.leaving && r.member != nil {
			w.stop(r)
			delete(w.pods, r.pod)
		}
		if len(w.pods) == 0 || w.chance(2) && w.pods[r.pod].uid == "" {
			w.addPod(r)
		}
	}
	why := ""
	for range 300 {
		for _, r := range w.routers {
			w.round(r)
			if bad := w.violation(); bad != "" {
				return bad
			}
		}
		if why = w.restless(); why == "" {
			return ""
		}
		w.now = w.now.Add(100 * time.Millisecond)
	}
	return "not at rest: " + why
}

// round has one router do all that it can do now.
func (w *modelWorld) round(r *modelRouter) {
	if r.member == nil {
		if w.pods[r.pod].uid != "" && w.mayStart() {
			w.start(r)
		}
		return
	}
	w.readEdit(r)
	w.catchUp(r)
}

// catchUp has a router do all that it can do now with the table that it has.
func (w *modelWorld) catchUp(r *modelRouter) {
	for len(r.inbox) > 0 {
		w.receive(r)
	}
	r.limit = w.randomLimit()
	for range 3 {
		w.openSession(r)
		for i := range r.open {
			r.open[i] &^= w.misplaced(r, i)
		}
		w.finishList(r)
		if !w.act(r) {
			return
		}
	}
}

// restless says what is not as it has to be in the end, or "".
func (w *modelWorld) restless() string {
	o := w.object
	if o.plan == nil || len(o.plan.members) != len(w.pods) {
		return "no plan, or other members than pods"
	}
	for _, r := range w.routers {
		if w.pods[r.pod].uid == "" {
			continue
		}
		switch {
		case r.member == nil:
			return r.pod + " does not run"
		case r.whyNotServing() != "":
			return r.pod + ": " + r.whyNotServing()
		case r.object != o || !r.view.done:
			return r.pod + " is behind"
		case !o.plan.hasOnlyTable(r.newest.ownersHash) || r.edit != len(w.edits)-1:
			return r.pod + " has another table"
		}
		for _, ns := range modelNamespaces {
			want, kept := r.newest.lookup(ns, hash64(ns))
			if got, _, state := r.view.owner(ns); !kept && (state != stateOwned || got != want) {
				return fmt.Sprintf("%s has %s with %d, want %d", r.pod, ns, got, want)
			}
		}
	}
	return ""
}

// run runs one seed, and returns what went wrong, or "".
func (w *modelWorld) run(events int) string {
	if !w.chance(4) { // begin with a plan
		if bad := w.settle(); bad != "" {
			return "at the start: " + bad
		}
		w.calm = false
		w.tell("begin")
	}
	for range events {
		w.event()
		if bad := w.violation(); bad != "" {
			return bad
		}
	}
	return w.settle()
}

// modelSeeds returns how many seeds to run: HANDOFF_SEEDS, or the default.
func modelSeeds(short int) uint64 {
	if n, err := strconv.Atoi(os.Getenv("HANDOFF_SEEDS")); err == nil {
		return uint64(n)
	}
	return uint64(short)
}

// runModel runs so many seeds, and returns how often each thing happened.
func runModel(t *testing.T, rules modelRules, seeds uint64) map[string]int {
	seen := map[string]int{}
	for seed := range seeds {
		w := newModelWorld(seed, rules)
		if bad := w.run(400); bad != "" {
			t.Fatalf("seed %d:\n%s\n%s", seed, strings.Join(w.trace, "\n"), bad)
		}
		for what, n := range w.seen {
			seen[what] += n
		}
	}
	return seen
}

// TestModelUnderAttack: the same in a world that is worse than any. There members that have
// the same oldest table must also agree on the owners that it keeps.
func TestModelUnderAttack(t *testing.T) {
	seen := runModel(t, modelRules{hostile: true}, modelSeeds(500))
	if seen["attack:"] < 500 || seen["resetting:"] < 500 {
		t.Errorf("%v: the test has tested little", seen)
	}
}

func TestModelIsSafeAndLive(t *testing.T) {
	seen := runModel(t, modelRules{}, modelSeeds(1000))
	for what, n := range map[string]int{
		"plan moves": 1500, "plan held": 1000, "plan of 3": 300, "plan without kept": 50,
		"closes:": 1000, "resetting:": 200, "making:": 500, "removing:": 200, "leaving:": 10,
	} {
		if t.Logf("%6d %s", seen[what], what); seen[what] < n {
			t.Errorf("%d %s, want %d: the test has tested little", seen[what], what, n)
		}
	}
}

// otherAnswers has the router see other answers than the object has.
func otherAnswers(s *decisionInput, change func(pod string, a stepAnswer) stepAnswer) {
	if s.object == nil || s.object.plan == nil {
		return
	}
	o := *s.object
	o.answers = map[string]stepAnswer{}
	for pod := range o.plan.members {
		o.answers[pod] = change(pod, s.object.answers[pod])
	}
	s.object = &o
}

// asAnswered returns the answer that o's plan waits for.
func asAnswered(o *handoffObject, pod string, a stepAnswer) stepAnswer {
	a.instance = o.plan.members[pod].Instance
	a.epoch, a.step = o.plan.epoch, o.plan.step
	return a
}

// changePlan has a router write another plan than it has decided to.
func changePlan(d *decision, change func(*sharedPlan)) {
	if d.write == nil {
		return
	}
	p, err := parsePlan(d.write.data[planKey])
	if err != nil {
		return
	}
	next := *p
	next.records = slices.Clone(p.records)
	change(&next)
	d.write.data[planKey] = next.String()
}

// TestModelNeedsRules: without a rule, a seed of the model finds two owners, or something
// that never comes to rest.
func TestModelNeedsRules(t *testing.T) {
	const twoOwners, stuck = "has the owners", "not at rest"
	for _, c := range []struct {
		name, want string
		rules      modelRules
	}{
		{"what changes is held", twoOwners, modelRules{
			decision: func(_ *modelWorld, _ *modelRouter, d *decision) {
				changePlan(d, func(p *sharedPlan) {
					for i := range p.records {
						p.records[i].before = p.records[i].after
					}
				})
			}}},
		{"a step waits for all answers to the one before", twoOwners, modelRules{
			situation: func(w *modelWorld, r *modelRouter, s *decisionInput) {
				otherAnswers(s, func(pod string, a stepAnswer) stepAnswer {
					if pod == r.pod || r.newest == nil {
						return a
					}
					a.ownersHash, a.lacksTables = r.newest.ownersHash, false
					return asAnswered(s.object, pod, a)
				})
			},
			view: func(r *modelRouter, v *memberView) { v.done = len(r.object.missing()) == 0 },
		}},
		{"an entry that cannot be read says nothing", twoOwners, modelRules{
			view: func(r *modelRouter, v *memberView) {
				if t := r.table(v.records[0].ownersHash); t != nil {
					v.tables[0] = t
				}
			}}},
		{"only members admit", twoOwners, modelRules{
			view: func(_ *modelRouter, v *memberView) { v.servesNone = false }}},
		{"an answer waits for the end of sessions", twoOwners, modelRules{
			situation: func(_ *modelWorld, _ *modelRouter, s *decisionInput) { s.doneHere = true }}},
		{"a step is done when all have answered", twoOwners, modelRules{
			view: func(_ *modelRouter, v *memberView) { v.done = true }}},
		{"only a pod that is gone is removed", twoOwners, modelRules{
			situation: func(_ *modelWorld, _ *modelRouter, s *decisionInput) {
				s.gone = func(string) bool { return true }
			}}},
		{"a pod that is gone is removed", stuck, modelRules{
			situation: func(_ *modelWorld, _ *modelRouter, s *decisionInput) {
				s.gone = func(string) bool { return false }
			}}},
		{"an answer that was overwritten is sent again", stuck, modelRules{
			situation: func(w *modelWorld, r *modelRouter, s *decisionInput) {
				otherAnswers(s, func(pod string, a stepAnswer) stepAnswer {
					if pod == r.pod && r.answerWrite != nil && r.answerWrite.uid == s.object.uid {
						return r.lastAnswer
					}
					return a
				})
			}}},
		{"a plan whose tables nobody knows is replaced", stuck, modelRules{
			decision: func(_ *modelWorld, r *modelRouter, d *decision) {
				if strings.Contains(d.doing, "is writing step") && !r.view.knowsAll() {
					*d = decision{}
				}
			}}},
		{"a step that nobody can judge is held", twoOwners, modelRules{
			decision: func(_ *modelWorld, r *modelRouter, d *decision) {
				if strings.Contains(d.doing, "is writing step") {
					changePlan(d, func(p *sharedPlan) { p.allHeld = false })
				}
			}}},
		{"a plan that does not follow is not gone by", twoOwners, modelRules{
			situation: func(_ *modelWorld, r *modelRouter, s *decisionInput) {
				if r.view != nil && s.object != nil && s.object.plan != nil && !r.follows(s.object) {
					r.highestStep = 0
					v := *r.view
					v.plan = &sharedPlan{members: v.plan.members}
					r.view = &v
				}
			}}},
		{"a reset is held", twoOwners, modelRules{
			decision: func(_ *modelWorld, _ *modelRouter, d *decision) {
				if strings.Contains(d.doing, "resetting the plan") {
					changePlan(d, func(p *sharedPlan) { p.allHeld = false })
				}
			}}},
		{"all have to say that there is no plan", twoOwners, modelRules{
			situation: func(_ *modelWorld, r *modelRouter, s *decisionInput) {
				if r.view == nil && s.list != nil {
					l := *s.list
					l.pods = map[string]routerPod{r.pod: l.pods[r.pod]}
					s.list = &l
				}
			}}},
		{"all plans are written on the version that was seen", twoOwners, modelRules{
			write: func(write *handoffWrite) { write.version = "" }, firstSeed: 3900}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			seeds := modelSeeds(5000)
			for n := range seeds {
				seed := c.rules.firstSeed + n
				w := newModelWorld(seed, c.rules)
				if bad := w.run(400); strings.Contains(bad, c.want) {
					t.Logf("%s: seed %d: %s", c.name, seed, bad)
					return
				}
			}
			t.Errorf("%s: %d seeds find nothing that is wrong", c.name, seeds)
		})
	}
}

// newScene returns a world in which n routers run and are members of a plan at rest, and
// nothing happens by chance.
func newScene(n int, rules modelRules, overrides map[string]string) *modelWorld {
	w := newModelWorld(0, rules)
	w.calm, w.pods, w.routers = true, map[string]routerPod{}, nil
	w.edit(overrides)
	for range n {
		w.addRouter()
	}
	w.drive(w.routers...)
	return w
}

// edit edits the overrides. There are three backends.
func (w *modelWorld) edit(overrides map[string]string) {
	w.edits, w.sizes = append(w.edits, overrides), append(w.sizes, ordinalRange{0, 3})
}

// addRouter starts a router.
func (w *modelWorld) addRouter() *modelRouter {
	r := &modelRouter{pod: fmt.Sprintf("r%d", len(w.routers))}
	w.routers = append(w.routers, r)
	w.addPod(r)
	w.start(r)
	return r
}

// drive lets these routers go on for some seconds, while the others do nothing.
func (w *modelWorld) drive(routers ...*modelRouter) {
	for range 50 {
		for _, r := range routers {
			w.round(r)
		}
		w.now = w.now.Add(100 * time.Millisecond)
	}
}

// openAll has r open a session of each namespace.
func (w *modelWorld) openAll(r *modelRouter) {
	for i, ns := range modelNamespaces {
		if owner, _, state := r.view.owner(ns); state == stateOwned {
			r.open[i] |= 1 << owner
		}
	}
}

// to returns overrides that give all namespaces to one backend.
func to(backend string) map[string]string {
	data := map[string]string{}
	for _, ns := range modelNamespaces {
		data[ns] = backend
	}
	return data
}

// A router has joined, and the object is emptied before the other one has seen that. The
// other one must not reset the plan without it.
func TestResetCountsAllPods(t *testing.T) {
	for name, rules := range map[string]modelRules{
		"": {},
		"members of the view only": {decision: func(_ *modelWorld, r *modelRouter, d *decision) {
			if strings.Contains(d.doing, "resetting the plan") {
				changePlan(d, func(p *sharedPlan) { p.members = r.view.plan.members })
			}
		}},
		"pods that were listed before the object": {
			situation: func(_ *modelWorld, r *modelRouter, s *decisionInput) {
				if s.list != nil && r.pod == "r0" {
					l := *s.list
					l.pods = map[string]routerPod{"r0": l.pods["r0"]}
					s.list = &l
				}
			}},
	} {
		w := newScene(1, rules, to("backend-0"))
		first, second := w.routers[0], w.addRouter()
		w.drive(second)
		w.openAll(second)
		w.store(w.object.uid, map[string]string{})
		w.edit(to("backend-1"))
		w.drive(first)
		if bad := w.violation(); (bad == "") != (name == "") {
			t.Errorf("%q: %q after\n%s", name, bad, strings.Join(w.trace, "\n"))
		}
		if name == "" && w.restless() == "" {
			t.Error("the first router went on without the second")
		}
		w.drive(first, second)
		if why := w.restless(); name == "" && why != "" {
			t.Errorf("not at rest: %s", why)
		}
	}
}

// toOneOf lets both routers go on, one after the other, until the plan has so many tables,
// and then only seer, so that the other one goes by the plan before.
func (w *modelWorld) toOneOf(seer, other *modelRouter, tables int) {
	for i := 0; len(w.object.plan.records) != tables; i++ {
		w.catchUp([]*modelRouter{seer, other}[i%2])
		w.now = w.now.Add(100 * time.Millisecond)
	}
	for len(seer.inbox) > 0 {
		w.receive(seer)
	}
	w.act(seer)
}

// resetBy empties the object, and has resetter reset the plan before the others do. It
// returns the first violation after that, or "".
func (w *modelWorld) resetBy(resetter *modelRouter) (bad string) {
	w.store(w.object.uid, map[string]string{})
	for range 5 {
		w.catchUp(resetter)
		w.now = w.now.Add(time.Second)
	}
	for range 20 {
		for _, r := range slices.Backward(w.routers) { // who had come furthest is the last
			w.openAll(r)
			w.catchUp(r)
			bad = cmp.Or(bad, w.violation())
		}
		w.now = w.now.Add(time.Second)
	}
	return bad
}

// sinceTheStepBefore has a reset say that its oldest table has become the oldest only after
// the last step of the resetter's view. Who has seen the next step takes that for the end of
// it.
func sinceTheStepBefore(_ *modelWorld, r *modelRouter, d *decision) {
	if strings.Contains(d.doing, "resetting the plan") {
		changePlan(d, func(p *sharedPlan) { p.oldestSince = planStep{r.view.plan.epoch, p.step} })
	}
}

// A step that moves a namespace, which the table before keeps, has come to one member and
// not to the other, which resets the plan to the table before. The one that had seen the
// step must not take the next owner for the previous one.
func TestResetByLaggingMember(t *testing.T) {
	for _, forgets := range []bool{false, true} {
		rules := modelRules{}
		if forgets {
			rules.decision = sinceTheStepBefore
		}
		w := newScene(2, rules, to("backend-0"))
		a, b := w.routers[0], w.routers[1]
		w.edit(to("unreadable"))
		w.drive(a, b)
		w.openAll(b)
		w.edit(to("backend-1"))
		w.readEdit(a)
		w.readEdit(b)
		w.toOneOf(a, b, 2)
		if len(a.view.records) != 2 || len(b.view.records) != 1 {
			t.Fatalf("%d and %d records, want that one has seen the step", len(a.view.records), len(b.view.records))
		}
		b.inbox = nil // it was cut off
		if bad := w.resetBy(b); (bad != "") != forgets {
			t.Errorf("forgets %t: %q after\n%s", forgets, bad, strings.Join(w.trace, "\n"))
		}
	}
}

// A router that never joined resets the plan to an old table with an invalid entry. One
// member still has that table as its oldest one, and the other has moved the namespace. They
// do not agree on the owner that it had, so nobody may say it.
func TestResetByOutsider(t *testing.T) {
	for _, forgets := range []bool{false, true} {
		rules := modelRules{}
		if forgets {
			rules.decision = func(_ *modelWorld, r *modelRouter, d *decision) {
				if strings.Contains(d.doing, "resetting the plan") {
					changePlan(d, func(p *sharedPlan) { p.oldestSince = r.view.plan.oldestSince })
				}
			}
		}
		w := newScene(2, rules, to("backend-0"))
		a, b := w.routers[0], w.routers[1]
		w.edit(to("unreadable"))
		w.drive(a, b)
		outsider := w.addRouter() // it sees the plan, and has no table yet, so it does not join
		w.catchUp(outsider)
		w.edit(to("backend-1"))
		w.readEdit(a)
		w.readEdit(b)
		w.toOneOf(a, b, 2)
		w.toOneOf(a, b, 1)
		w.openAll(a)
		if len(a.view.records) != 1 || len(b.view.records) != 2 {
			t.Fatalf("%d and %d records, want that one has seen the end", len(a.view.records), len(b.view.records))
		}
		outsider.inbox = nil // it was cut off
		if bad := w.resetBy(outsider); (bad != "") != forgets {
			t.Errorf("forgets %t: %q after\n%s", forgets, bad, strings.Join(w.trace, "\n"))
		}
	}
}

// A member that does not know a table of a reset cannot say which of its sessions may stay:
// it ends those that it does not know an owner for, before it answers.
func TestUnknownTableEndsSessions(t *testing.T) {
	for _, keeps := range []bool{false, true} {
		w := newScene(1, modelRules{keepAll: keeps}, to("backend-0"))
		a, outsider := w.routers[0], w.addRouter()
		w.receive(outsider)
		w.readEdit(outsider)
		w.act(outsider) // it sees the plan, and does not get as far as to join
		if outsider.view == nil || !outsider.view.servesNone {
			t.Fatal("the second router is a member")
		}
		w.edit(to("backend-1"))
		w.drive(a)
		w.openAll(a)
		for range 2 {
			w.now = w.now.Add(offerTime)
			a.expireOffers(w.object, w.clock(a))
		}
		w.store(w.object.uid, map[string]string{})
		for i := range 20 { // the second one does not read the edit, and resets the plan first
			w.catchUp(outsider)
			if i > 4 {
				w.catchUp(a)
			}
			w.now = w.now.Add(time.Second)
		}
		if keeps == (w.violation() == "") {
			t.Errorf("keeps %t: %q after\n%s", keeps, w.violation(), strings.Join(w.trace, "\n"))
		}
	}
}

// A router that leaves admits nobody, from before it decides to leave: the others may go on
// before it sees that it has left.
func TestLeaverAdmitsNobody(t *testing.T) {
	for _, admits := range []bool{false, true} {
		w := newScene(2, modelRules{admitLast: admits}, to("backend-0"))
		stays, leaves := w.routers[0], w.routers[1]
		leaves.leaving, leaves.open = true, [4]uint64{}
		w.act(leaves)
		w.edit(to("backend-1"))
		w.drive(stays)
		if len(w.object.plan.members) != 1 || admits == (w.violation() == "") {
			t.Errorf("admits %t: %q after\n%s", admits, w.violation(), strings.Join(w.trace, "\n"))
		}
	}
}

// rested returns a world with n members at rest, and what the first one decides by.
func rested(n int) (*modelWorld, *modelRouter, *decisionInput) {
	w := newScene(n, modelRules{}, to("backend-0"))
	r := w.routers[0]
	return w, r, w.situationOf(r)
}

// A member without a session that has not done its step waits for a release, and does not say
// that sessions are left.
func TestMemberSaysWhatItsStepWaitsFor(t *testing.T) {
	_, r, s := rested(2)
	s.hasWork, s.doneHere = false, false
	if d := r.decide(s); d.action != actWait || !strings.Contains(d.doing, "not released") {
		t.Errorf("it decides to %d: %s", d.action, d.doing)
	}
}

// Who was removed ends its sessions, also if the object is gone, and joins again then: not
// before the backends have released what it had.
func TestRemovedMemberEndsSessions(t *testing.T) {
	w, r, s := rested(2)
	next := r.view.plan.withMember(r.pod, nil)
	next.writes++
	w.store(w.object.uid, map[string]string{planKey: next.String()})
	s.object, s.hasWork = w.object, true
	d := r.decide(s)
	r.commit(d, s.now)
	if _, _, state := r.view.owner("ns-0"); d.action != actAdopt || state != stateNotKnown {
		t.Errorf("it decides to %d, and its view says %d", d.action, state)
	}
	for _, o := range []*handoffObject{w.object, nil} {
		if s.object = o; r.decide(s).action != actEndAll {
			t.Errorf("with the object %v it decides to %d", o, r.decide(s).action)
		}
	}
	s.object, s.hasWork, s.doneHere = w.object, false, false
	if d := r.decide(s); d.action != actWait {
		t.Errorf("before the release it decides to %d: %s", d.action, d.doing)
	}
	s.doneHere = true
	if d := r.decide(s); d.action != actWrite || d.doing != "this router is joining" {
		t.Errorf("without sessions it decides to %d: %s", d.action, d.doing)
	}
}

// A router joins only if its pod is one of the router pods, under its name: others would take its
// pod for gone, and a reset would forget it.
func TestJoinNeedsOwnPod(t *testing.T) {
	w, r, s := rested(2)
	next := r.view.plan.withMember(r.pod, nil)
	next.writes++
	w.store(w.object.uid, map[string]string{planKey: next.String()})
	s.object = w.object
	r.commit(r.decide(s), s.now)
	s.hasWork, s.doneHere = false, true
	pods := func(pods map[string]routerPod) *podList { return &podList{at: s.now, pods: pods} }
	for name, tt := range map[string]struct {
		list   *podList
		action action
		doing  string
	}{
		"no list":                  {nil, actList, "listing"},
		"it is there":              {pods(w.pods), actWrite, "joining"},
		"not there":                {pods(map[string]routerPod{"r1": w.pods["r1"]}), actWait, `name "r0" (-pod-name)`},
		"another pod has its name": {pods(map[string]routerPod{"r0": w.pods["r1"]}), actWait, `name "r0" (-pod-name)`},
		"not there some time ago":  {&podList{at: s.now.Add(-maxPodListAge)}, actList, "listing"},
	} {
		if s.list = tt.list; r.decide(s).action != tt.action || !strings.Contains(r.decide(s).doing, tt.doing) {
			t.Errorf("%s: it decides to %d: %s", name, r.decide(s).action, r.decide(s).doing)
		}
	}
}

// Without an object, and without news, a member writes nothing.
func TestMemberWaits(t *testing.T) {
	_, r, s := rested(2)
	for _, o := range []*handoffObject{s.object, nil} {
		if s.object = o; r.decide(s).action != actWait {
			t.Errorf("with the object %v it decides to %d", o, r.decide(s).action)
		}
	}
}

// TestPlanOfAnotherVersion: routers with that version may run, so nothing is written,
// neither by a member nor by a router that starts or was removed, and what is in force
// stays. The members go on when their plan is back.
func TestPlanOfAnotherVersion(t *testing.T) {
	w, r, s := rested(2)
	own, view := maps.Clone(w.data), r.view
	data := maps.Clone(w.data)
	data[planKey] = `{"version":5,"records":"of another kind"}`
	w.store(w.object.uid, data)
	s.object = w.object
	starts := newMember("r9", "u9", "i9")
	starts.setNewest(r.newest, time.Time{})
	for _, m := range []*member{r.member, starts} {
		for _, s.leaving = range []bool{false, true} {
			d := m.decide(s)
			if d.action != actWait || !strings.Contains(d.doing, `version of the plan is "5", want 4`) {
				t.Errorf("%s decides to %d: %s", m.name, d.action, d.doing)
			}
		}
	}
	w.store(w.object.uid, own)
	s.object, s.leaving = w.object, false
	if d := r.decide(s); r.view != view || d.action != actAdopt {
		t.Errorf("it decides to %d: %s", d.action, d.doing)
	}
}

// Members write a step in the order of their names.
func TestMembersTakeTurns(t *testing.T) {
	w, first, _ := rested(2)
	second := w.routers[1]
	w.edit(to("backend-1"))
	data := maps.Clone(w.data)
	for _, r := range w.routers {
		w.readEdit(r)
		a := r.answer(&decisionInput{stepProgress: stepProgress{limit: stepLimit{upto: allPlaces}}})
		data[r.key()] = a.String()
	}
	w.store(w.object.uid, data)
	w.now = w.now.Add(time.Second)
	for _, r := range []*modelRouter{first, second} {
		for len(r.inbox) > 0 {
			w.receive(r)
		}
		r.limit = stepLimit{upto: allPlaces}
		r.commit(r.decide(w.situationOf(r)), w.now) // it adopts that
		s := w.situationOf(r)
		s.seenAt, r.stepAdoptedAt = s.now, s.now.Add(-time.Minute)
		d := r.decide(s)
		if r == first && (d.action != actWrite || !strings.Contains(d.doing, "is writing step")) {
			t.Errorf("the first decides to %d: %s", d.action, d.doing)
		}
		if r == second && (d.action != actWait || d.again != s.now.Add(turnInterval)) {
			t.Errorf("the second decides to %d: %s, again in %s", d.action, d.doing, d.again.Sub(s.now))
		}
		if s.now = s.now.Add(turnInterval); r.decide(s).action != actWrite {
			t.Errorf("after its turn it decides to %d", r.decide(s).action)
		}
		s.now, r.stepAdoptedAt = s.seenAt.Add(time.Hour), s.seenAt.Add(time.Hour)
		if d := r.decide(s); d.action != actWait || d.again.Sub(s.now) != stepTime(2) {
			t.Errorf("right after a step it decides to %d: %s", d.action, d.doing)
		}
	}
}

// The last answer that a step waits for is part of its write. The first router waits for the
// others, the others for nobody.
func TestLastAnswerMakesTheStep(t *testing.T) {
	w, first, _ := rested(2)
	second := w.routers[1]
	first.open = [4]uint64{}
	w.edit(to("backend-1"))
	began := w.now
	for _, r := range w.routers {
		w.readEdit(r)
		r.limit = stepLimit{upto: allPlaces}
	}
	isAlone := func(d decision) bool {
		return d.action == actWrite && d.write.version == "" && len(d.write.data) == 1 && d.answer != nil
	}
	isBoth := func(d decision, r *modelRouter) bool {
		return d.action == actWrite && d.write.version == r.object.version && d.answer != nil &&
			d.write.data[planKey] != "" && d.write.data[r.key()] == d.answer.String()
	}
	if d := first.decide(w.situationOf(first)); d.action != actWait || d.again != began.Add(answerWait) {
		t.Errorf("the first decides to %d: %s, again in %s", d.action, d.doing, d.again.Sub(began))
	}
	w.now = began.Add(answerWait)
	if d := first.decide(w.situationOf(first)); !isAlone(d) {
		t.Errorf("after that time it decides to %d: %s, %v", d.action, d.doing, d.write)
	}
	w.now = began
	d := second.decide(w.situationOf(second))
	if !isAlone(d) {
		t.Errorf("the second decides to %d: %s, %v", d.action, d.doing, d.write)
	}
	second.commit(d, w.now)
	w.apply(d.write)
	for first.object != w.object {
		w.receive(first)
	}
	d = first.decide(w.situationOf(first))
	if d.action != actAdopt {
		t.Fatalf("with the answer of the other it decides to %d: %s", d.action, d.doing)
	}
	first.commit(d, w.now)
	d = first.decide(w.situationOf(first))
	if !isBoth(d, first) {
		t.Fatalf("with all answers but its own it decides to %d: %s, %v", d.action, d.doing, d.write)
	}
	writes := first.conditionalWrites
	first.commit(d, w.now)
	if first.conditionalWrites != writes+1 || first.offered[first.newest.ownersHash] == nil {
		t.Error("it does not note that it has written a plan, and named its table in an answer")
	}
	if again := first.decide(w.situationOf(first)); again.action != actWait {
		t.Errorf("while that is under way it decides to %d: %s", again.action, again.doing)
	}
	elsewhere := maps.Clone(w.data) // somebody was faster: that write fails
	elsewhere["note"] = "of another"
	w.store(w.object.uid, elsewhere)
	w.receive(first)
	first.commit(first.decide(w.situationOf(first)), w.now)
	if d = first.decide(w.situationOf(first)); !isBoth(d, first) {
		t.Fatalf("after a conflict it decides to %d: %s, %v", d.action, d.doing, d.write)
	}
	step := first.view.step
	w.apply(d.write)
	w.receive(first)
	w.now = w.now.Add(time.Second)
	if d = first.decide(w.situationOf(first)); d.action != actAdopt || d.view.step <= step {
		t.Errorf("with the step in the object it decides to %d: %s", d.action, d.doing)
	}
	first.commit(d, w.now)
	if d = first.decide(w.situationOf(first)); d.action != actWait || d.again != w.now.Add(answerWait) {
		t.Errorf("in that step it decides to %d: %s, again in %s", d.action, d.doing, d.again.Sub(w.now))
	}
}

// An answer does not wait if the next step has to wait for something else than answers.
func TestAnswerWaitsOnlyForAnswers(t *testing.T) {
	w, first, _ := rested(2)
	w.edit(to("backend-1"))
	w.readEdit(first)
	half := placeOf(hash64(modelNamespaces[0])) + 1
	first.limit, first.stepAdoptedAt = stepLimit{upto: half}, w.now
	d := first.decide(w.situationOf(first))
	if at := w.now.Add(stepTime(2)); d.action != actWrite || d.write.version != "" {
		t.Errorf("before the time of a step that moves some, %s, it decides to %d: %s", at, d.action, d.doing)
	}
	first.stepAdoptedAt = w.now.Add(-stepTime(2))
	if d = first.decide(w.situationOf(first)); d.action != actWait || d.again != w.now.Add(answerWait) {
		t.Errorf("at its time it decides to %d: %s", d.action, d.doing)
	}
}

// A table that is made anew and has the same content does not let an answer wait longer.
func TestSameTableDoesNotWaitAgain(t *testing.T) {
	w, first, _ := rested(2)
	w.edit(to("backend-1"))
	w.readEdit(first)
	first.limit = stepLimit{upto: allPlaces}
	for range 4 {
		same := *first.newest
		w.now = w.now.Add(answerWait / 2)
		first.setNewest(&same, w.now)
	}
	if d := first.decide(w.situationOf(first)); d.action != actWrite {
		t.Errorf("with the same table, made anew, it decides to %d: %s", d.action, d.doing)
	}
}

// While a step holds namespaces, its last answer waits for nobody: neither for others that
// have answered and have another table, nor if this router has none of the step's tables.
func TestMissingAnswerDoesNotWait(t *testing.T) {
	for _, blank := range []bool{false, true} {
		w, first, _ := rested(2)
		second := w.routers[1]
		w.openAll(first)
		second.open = [4]uint64{}
		w.edit(to("backend-1"))
		w.readEdit(first)
		w.readEdit(second)
		for len(w.object.plan.records) == 1 { // until the step is in the object
			for _, r := range w.routers {
				w.drain(r)
			}
			w.now = w.now.Add(stepTime(2))
		}
		for _, r := range w.routers {
			w.drain(r)
		}
		if missing := w.object.missing(); !slices.Equal(missing, []string{first.pod}) {
			t.Fatalf("%v have not answered, want the first, which has sessions", missing)
		}
		w.edit(to("backend-2"))
		w.readEdit(first) // and the second does not
		if blank {
			first.view.tables[1], first.offered = nil, map[uint64]*offeredTable{}
		}
		first.open, first.stepAdoptedAt = [4]uint64{}, w.now.Add(-stepTime(2))
		if d := first.decide(w.situationOf(first)); d.action != actWrite || d.answer == nil || d.answer.lacksTables != blank {
			t.Errorf("blank %t: it decides to %d: %s, again in %s", blank, d.action, d.doing, d.again.Sub(w.now))
		}
	}
}

// drain has r see all versions of the object, and act on each.
func (w *modelWorld) drain(r *modelRouter) {
	r.limit = stepLimit{upto: allPlaces}
	for again := true; again; {
		again = len(r.inbox) > 0
		w.receive(r)
		for range 3 { // to adopt it, to write, and to see that there is no more
			if !w.act(r) {
				break
			}
		}
	}
}

// An answer that may still arrive is not sent again, until it ought to be there. One to an
// object that was made anew is.
func TestAnswerIsSentOnce(t *testing.T) {
	w, _, _ := rested(2)
	second := w.routers[1]
	w.edit(to("backend-1"))
	w.readEdit(second)
	d := second.decide(w.situationOf(second))
	second.commit(d, w.now)
	if again := second.decide(w.situationOf(second)); again.action != actWait || again.again != w.now.Add(objectShowTime) {
		t.Errorf("after %q it decides to %d: %s", d.doing, again.action, again.doing)
	}
	other := *second.object
	other.uid, second.object = "another", &other
	second.view.uid = other.uid
	if again := second.decide(w.situationOf(second)); again.action != actWrite || again.doing != d.doing {
		t.Errorf("with another object it decides to %d: %s", again.action, again.doing)
	}
	second.object = w.object
	second.view.uid = w.object.uid
	w.now = w.now.Add(objectShowTime)
	if again := second.decide(w.situationOf(second)); again.action != actWrite || again.doing != d.doing {
		t.Errorf("when it ought to be there it decides to %d: %s", again.action, again.doing)
	}
}

func TestMemberPodIsGone(t *testing.T) {
	id := memberID{"u", "i"}
	for pod, want := range map[routerPod]bool{
		{uid: "other"}: true, {uid: "u", provenEnded: true}: true, {uid: "u"}: false,
		{uid: "u", scheduled: true}: false,
	} {
		if id.isGone(pod) != want {
			t.Errorf("%+v: gone %t, want %t", pod, !want, want)
		}
	}
}

func TestBackendsNote(t *testing.T) {
	old := &versionedRange{0, 4, "u", 7}
	_, r, s := rested(1)
	s.wantedRange = old
	d := r.decide(s)
	p, err := parsePlan(d.write.data[planKey])
	if err != nil || *p.backendRange != *old || p.step != r.view.step || p.writes != r.view.plan.writes+1 {
		t.Errorf("it writes %v: %v", p, err)
	}
}

// A reset names all that may have sessions. If it is not sure which process a pod has, any
// may answer.
func TestResetMembers(t *testing.T) {
	w, r, s := rested(2)
	other := r.view.plan.withMember("r1", &memberID{w.pods["r1"].uid, "another"})
	other = other.withMember("r2", &memberID{"u2", "i2"}).withMember("r3", &memberID{"old", "i3"})
	o := *s.object
	o.plan, s.object = other, &o
	s.list = &podList{pods: map[string]routerPod{
		"r0": w.pods["r0"], "r1": w.pods["r1"], "r3": {uid: "new", scheduled: true},
		"r4": {uid: "u4", scheduled: true}, "r5": {uid: "u5"}, "r6": {uid: "u6", scheduled: true, provenEnded: true},
	}}
	want := map[string]memberID{
		"r0": {r.uid, r.instance}, "r1": {w.pods["r1"].uid, unknownInstance}, "r2": {"u2", "i2"},
		"r3": {"new", unknownInstance}, "r4": {"u4", unknownInstance},
	}
	if got := r.mergeMembers(s); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// A table that an answer promised stays known until the object has had an answer with
// another one for offerTime.
func TestPromisedTables(t *testing.T) {
	w, r, _ := rested(1)
	promised := r.newest.ownersHash
	w.edit(to("backend-1"))
	w.drive(r)
	if r.view.recordOf(promised) >= 0 || r.table(promised) == nil {
		t.Fatal("the table is in the plan, or is not known any more")
	}
	r.expireOffers(w.object, w.now)
	if r.expireOffers(w.object, w.now.Add(offerTime/2)); r.table(promised) == nil {
		t.Error("the table is not known any more")
	}
	late := *w.object
	late.answers = map[string]stepAnswer{"r0": {instance: r.instance, epoch: "e", step: 1, ownersHash: promised}}
	r.expireOffers(&late, w.now.Add(offerTime))
	if r.expireOffers(w.object, w.now.Add(offerTime)); r.table(promised) == nil {
		t.Error("the table is not known any more, although a late answer named it again")
	}
	if r.expireOffers(w.object, w.now.Add(2*offerTime)); r.table(promised) != nil {
		t.Error("the table is known for ever")
	}
}

// The rate of moves is shared by the sessions that are left.
func TestShareOfTheRate(t *testing.T) {
	_, r, s := rested(2)
	if got := r.rateShare(s.object); got != 0.5 {
		t.Errorf("with no session to move its share is %g, want 0.5", got)
	}
	o := *s.object
	o.answers = map[string]stepAnswer{"r0": {toMove: 9}, "r1": {toMove: 1}, "r2": {toMove: 90}}
	if got := r.rateShare(&o); got != 0.9 {
		t.Errorf("with 9 of 10 sessions its share is %g, want 0.9", got)
	}
	m := &mover{moveInterval: time.Second}
	wantEqual(t, "time between two moves of a router by itself", m.ownInterval(), time.Second)
	m.shared = &sharedHandoff{member: r.member}
	m.shared.inbox.object = s.object
	wantEqual(t, "time between two moves with half of the rate", m.ownInterval(), 2*time.Second)
}

// An old copy of the object, from before a router joined, is put back, and a router that
// starts goes on with it. Members that have seen the copy do not follow what that router
// wrote, though it counts as many writes as theirs: the router that joined since would be
// forgotten.
func TestOldCopyIsNotContinued(t *testing.T) {
	for starts := 1; starts <= 2; starts++ {
		w := newScene(2, modelRules{}, to("backend-0"))
		first, second := w.routers[0], w.routers[1]
		old := maps.Clone(w.data)
		joined := w.addRouter()
		w.drive(joined, first, second)
		w.openAll(joined)
		w.store(w.object.uid, old)
		for _, r := range []*modelRouter{first, second} {
			w.receive(r)
			w.act(r) // it lists, and has not written anything yet
		}
		live := []*modelRouter{first, second}
		for range starts {
			starting := w.addRouter()
			w.receive(starting)
			w.readEdit(starting)
			for range 3 {
				w.act(starting)
			}
			live = append(live, starting)
		}
		w.edit(to("backend-1"))
		w.drive(live...)
		if bad := w.violation(); bad != "" {
			t.Errorf("%d start: %s\n%s", starts, bad, strings.Join(w.trace, "\n"))
		}
	}
}

// An old copy of the object, from before the first plan, is put back: in it all routers say
// that there is none. A router that starts makes one. The other one has sessions, and has
// not seen the copy: it has to be asked before anything opens. Without either part of the
// rule, there are two owners.
func TestOldCopyBeforeTheFirstPlan(t *testing.T) {
	firstPlan := func(change func(*modelRouter, *sharedPlan)) modelRules {
		return modelRules{decision: func(_ *modelWorld, r *modelRouter, d *decision) {
			if strings.Contains(d.doing, "is making the first plan") {
				changePlan(d, func(p *sharedPlan) { change(r, p) })
			}
		}}
	}
	for name, c := range map[string]struct {
		rules modelRules
		want  string
	}{
		"all rules": {modelRules{}, ""},
		"the first plan is not held": {
			firstPlan(func(_ *modelRouter, p *sharedPlan) { p.allHeld = false }), "has the owners"},
		"not all pods are members of the first plan": {
			firstPlan(func(r *modelRouter, p *sharedPlan) {
				p.members = map[string]memberID{r.pod: p.members[r.pod]}
			}), "has the owners"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newScene(2, modelRules{}, to("backend-0"))
			w.rules = c.rules
			knows, starts := w.routers[0], w.routers[1]
			w.openAll(knows)
			w.stop(starts)
			w.start(starts)
			old := map[string]string{}
			for _, r := range w.routers {
				said := stepAnswer{instance: r.instance, lacksTables: true, ownersHash: knows.newest.ownersHash}
				old[r.key()] = said.String()
			}
			w.store(w.object.uid, old)
			starts.inbox = []*handoffObject{w.object}
			w.edit(to("backend-1"))
			w.drive(starts)
			if bad := w.violation(); !strings.Contains(bad, c.want) || c.want == "" && bad != "" {
				t.Errorf("%q, want %q\n%s", bad, c.want, strings.Join(w.trace, "\n"))
			}
			if c.want != "" {
				return
			}
			if why := w.settle(); why != "" {
				t.Errorf("%s\n%s", why, strings.Join(w.trace, "\n"))
			}
		})
	}
}

// Two plans with the same number of writes are two branches: only one of them follows.
func TestBranchDoesNotFollow(t *testing.T) {
	w, r, s := rested(3)
	branch := *r.view.plan
	branch.members = maps.Clone(branch.members)
	delete(branch.members, "r2")
	branch.members["r9"] = memberID{"u9", "i9"}
	data := maps.Clone(w.data)
	data[planKey] = branch.String()
	w.store(w.object.uid, data)
	s.object = w.object
	if d := r.decide(s); d.action == actAdopt {
		t.Errorf("goes by a plan with other members: %v", d.view.plan.members)
	}
}

// A router leaves once it has released the step, which is later than its last session with
// -release.
func TestLeaveAfterRelease(t *testing.T) {
	for _, released := range []bool{false, true} {
		_, r, s := rested(2)
		s.leaving, s.hasWork, s.doneHere = true, false, released
		if left := r.decide(s).doing == "this router is leaving"; left != released {
			t.Errorf("released %t: leaves %t", released, left)
		}
	}
}

// unknownHere returns a world with two members. After a reset by the second one, which was
// one step behind, the first one does not know that the backend has the namespaces, which the
// oldest table keeps, and has sessions of them with it.
func unknownHere(t *testing.T, backend string) (w *modelWorld, a, b *modelRouter) {
	w = newScene(2, modelRules{}, to(backend))
	a, b = w.routers[0], w.routers[1]
	kept := to("unreadable")
	w.edit(kept)
	w.drive(a, b)
	w.openAll(a)
	kept = maps.Clone(kept)
	kept["another"] = "backend-0"
	w.edit(kept)
	w.readEdit(a)
	w.readEdit(b)
	w.toOneOf(a, b, 2)
	w.toOneOf(a, b, 1)
	if len(a.view.records) != 1 || len(b.view.records) != 2 {
		t.Fatalf("%d and %d records, want that one has seen the end", len(a.view.records), len(b.view.records))
	}
	b.inbox = nil // it was cut off
	if bad := w.resetBy(b); bad != "" {
		t.Fatalf("%s after\n%s", bad, strings.Join(w.trace, "\n"))
	}
	if owner := a.view.after("ns-0"); owner != unresolved || a.open[0] == 0 {
		t.Fatalf("a has %v open, and %d as the owner, want sessions without a known owner", a.open, owner)
	}
	return w, a, b
}

// Backend-2 is scaled in, and its namespaces move first, whatever their place. The step must
// not be done before the sessions with it have ended, also those of a member that does not
// know it for the owner. Its sessions with another backend stay.
func TestRemovedOwnerOfUnknownNamespace(t *testing.T) {
	for backend, stays := range map[string]bool{"backend-2": false, "backend-1": true} {
		w, a, b := unknownHere(t, backend)
		before, edit := a.open, to("backend-0")
		if stays {
			edit = w.edits[len(w.edits)-1]
		}
		w.edits, w.sizes = append(w.edits, edit), append(w.sizes, ordinalRange{0, 2})
		for range 20 {
			for _, r := range w.routers {
				w.readEdit(r)
				for len(r.inbox) > 0 {
					w.receive(r)
				}
				r.limit = stepLimit{upto: 1} // only what was scaled in
				for i := range r.open {
					r.open[i] &^= w.misplaced(r, i)
				}
				w.act(r)
				w.openAll(r)
				if bad := w.violation(); bad != "" {
					t.Fatalf("%s: %s after\n%s", backend, bad, strings.Join(w.trace, "\n"))
				}
			}
			w.now = w.now.Add(100 * time.Millisecond)
		}
		if stays && a.open != before {
			t.Errorf("%s: a has %b open, want %b as before", backend, a.open, before)
		}
		if !stays && (a.open != [4]uint64{} || b.open[0] != 1<<0) {
			t.Errorf("%s: a has %b open and b %b, want that the namespaces have moved", backend, a.open, b.open)
		}
	}
}

// A router makes the first plan, and does not see it: an old copy of the object is put back,
// and the router makes another one. Its clock is behind a step in that copy, so both plans
// have the same step. An answer to the first plan, which comes late, must not count for the
// second one.
func TestFirstPlansHaveOwnEpochs(t *testing.T) {
	w := newScene(0, modelRules{}, to("backend-0"))
	w.store("u", map[string]string{answerKeyPrefix + "gone": "x e 9000000 - blank 0"})
	makes, knows := w.addRouter(), w.addRouter()
	for _, r := range []*modelRouter{knows, makes} {
		w.readEdit(r)
		w.act(r) // it says that it has no view
	}
	old := maps.Clone(w.data)
	makePlan := func() {
		makes.inbox = []*handoffObject{w.object}
		for i := 0; w.object.plan == nil; i++ {
			if w.catchUp(makes); i > 20 {
				t.Fatalf("no plan after\n%s", strings.Join(w.trace, "\n"))
			}
			makes.inbox = []*handoffObject{w.object}
			if w.object.plan != nil {
				return
			}
			w.now = w.now.Add(time.Second)
		}
	}
	makePlan()
	if makes.view != nil {
		t.Fatal("it has seen its plan")
	}
	w.catchUp(knows)
	w.catchUp(knows)
	w.openAll(knows)
	if knows.open[0] == 0 {
		t.Fatalf("the first plan is not done after\n%s", strings.Join(w.trace, "\n"))
	}
	first := w.object.plan
	w.store("u", old)
	w.edit(to("backend-1"))
	w.readEdit(makes)
	makePlan()
	if second := w.object.plan; second.step != first.step {
		t.Fatalf("the steps are %d and %d, want the same one", first.step, second.step)
	}
	w.apply(knows.answerWrite)
	w.drive(makes)
	if bad := w.violation(); bad != "" {
		t.Errorf("%s after\n%s", bad, strings.Join(w.trace, "\n"))
	}
	w.drive(makes, knows)
	if why := w.restless(); why != "" {
		t.Errorf("%s after\n%s", why, strings.Join(w.trace, "\n"))
	}
}
