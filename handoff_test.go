package main

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// randomTable returns the table after old with one to four backends, from the first on,
// some of them cordoned, and random overrides of a few namespaces, some of them invalid.
func randomTable(r *rand.Rand, old *table, namespaces []string) *table {
	data := map[string]string{}
	for _, ns := range namespaces {
		if r.IntN(3) == 0 {
			data[ns] = fmt.Sprintf("backend-%d", r.IntN(6)) // invalid from the number of backends on
		}
	}
	sources := []sourceContent{{id: sourceID{name: "a"}, overrides: newOverrideSet(data)}}
	var cordoned cordon
	for ordinal := range 5 {
		if r.IntN(5) == 0 {
			cordoned = append(cordoned, ordinal)
		}
	}
	return newTable("backend", false, ordinalRange{r.IntN(2), 1 + r.IntN(4)}, cordoned, sources, old)
}

// randomLimit returns a limit with a random place, and any owners away.
func randomLimit(r *rand.Rand) stepLimit {
	l := stepLimit{upto: []uint64{0, allPlaces, allPlaces, r.Uint64() >> 1}[r.IntN(4)]}
	for ordinal := range 5 {
		if r.IntN(8) == 0 {
			l.away = append(l.away, ordinal)
		}
	}
	return l
}

// A namespace changes its owner only while it is held: at each step it has the owner of
// before, or is held until the step is done and has the new owner then. Whatever the
// tables, the marks and their order are.
func TestViewChangesOwnersOnlyWhileHeld(t *testing.T) {
	namespaces := make([]string, 24)
	for i := range namespaces {
		namespaces[i] = fmt.Sprintf("ns-%02d", i)
	}
	held, moved, kept := 0, 0, 0
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 1))
		seen := []*table{randomTable(r, nil, namespaces)}
		v := newView(seen[0], nil, time.UnixMilli(0))
		for range 12 {
			newest := seen[len(seen)-1]
			switch r.IntN(4) {
			case 0:
				newest = randomTable(r, newest, namespaces)
			case 1:
				newest = seen[r.IntN(len(seen))] // an edit is taken back
			}
			seen = append(seen, newest)
			next := v.next(newest, randomLimit(r), time.UnixMilli(0))
			if next.step <= v.step {
				t.Fatalf("seed %d: step %d follows %d", seed, next.step, v.step)
			}
			done := *next
			done.done = true
			for _, ns := range namespaces {
				before, _, _ := v.owner(ns)
				during, _, state := next.owner(ns)
				after, _, _ := done.owner(ns)
				if _, isKept := newest.lookup(ns, hash64(ns)); isKept {
					kept++
				}
				switch {
				case state == stateHeld && after != before && during == after:
					held++
				case state != stateHeld && during == before && after == before:
				case state == stateUnresolved && after == unresolved: // nobody is admitted
				default:
					t.Fatalf("seed %d: %s was with %d, is with %d (%d), then with %d",
						seed, ns, before, during, state, after)
				}
				if before != after {
					moved++
				}
				if next.before(ns) != next.after(ns) && !next.mayChange(hash64(ns)) {
					t.Fatalf("seed %d: %s changes its owner, and mayChange says that it does not", seed, ns)
				}
			}
			v = &done
		}
	}
	if held < 1000 || moved < 1000 || kept < 1000 {
		t.Errorf("%d held, %d moved, %d kept: the test has tested little", held, moved, kept)
	}
}

// A namespace that has moved stays with its new owner, also when that accepts no connection any
// more while the change is under way, for example as its pod restarts (invariant 7). Only
// another table gives the namespace another owner. As long as an owner is away, it gets nothing,
// and all others get theirs.
func TestStepTakesNothingBack(t *testing.T) {
	namespaces := manyNamespaces(24)
	moved, stayed, waited := 0, 0, 0
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 6))
		first := newTable("backend", false, ordinalRange{0, 5}, nil, nil, nil)
		second := newTable("backend", false, ordinalRange{0, 5 - r.IntN(2)}, nil,
			[]sourceContent{contentOf("test", "1", pinnedAnywhere(r, namespaces))}, first)
		v := newView(first, nil, time.UnixMilli(0))
		for range 12 {
			limit := randomLimit(r)
			next := *v.next(second, limit, time.UnixMilli(0))
			next.done = true
			for _, ns := range namespaces {
				before, after := v.after(ns), next.after(ns)
				owner, isKept := second.lookup(ns, hash64(ns))
				if isKept { // its override is invalid
					continue
				}
				switch isAway := slices.Contains(limit.away, owner); {
				case before == owner && after != owner:
					t.Fatalf("seed %d: %s had moved to %d, and is with %d: %v", seed, ns, owner, after, next.records)
				case before != owner && isAway && after == owner:
					t.Fatalf("seed %d: %s moves to %d, which is away: %v", seed, ns, owner, next.records)
				case before != owner && !isAway && limit.upto == allPlaces && after != owner:
					t.Fatalf("seed %d: %s does not move to %d: %v", seed, ns, owner, next.records)
				case before != owner && after == owner:
					moved++
				case before == owner && isAway:
					stayed++
				case isAway:
					waited++
				}
			}
			v = &next
		}
	}
	if moved < 1000 || stayed < 1000 || waited < 1000 {
		t.Errorf("%d moved, %d stayed with an owner that was away, %d waited for it: the test has tested little", moved, stayed, waited)
	}
}

// An owner that is back gets its namespaces in the order of their places, as far as each step
// goes, though others are ahead of it.
func TestOwnerThatIsBackCatchesUp(t *testing.T) {
	m := mark{}
	for i, c := range []struct {
		limit stepLimit
		want  mark
	}{
		{stepLimit{upto: 10}, mark{upto: 10}},
		{stepLimit{upto: 20, away: []int{3}}, mark{upto: 20, behind: map[int]uint64{3: 10}}},
		{stepLimit{upto: 30, away: []int{3, 4}}, mark{upto: 30, behind: map[int]uint64{3: 10, 4: 20}}},
		{stepLimit{upto: 15, away: []int{4}}, mark{upto: 30, behind: map[int]uint64{3: 15, 4: 20}}},
		{stepLimit{upto: 25}, mark{upto: 30, behind: map[int]uint64{3: 25, 4: 25}}},
		{stepLimit{upto: 12}, mark{upto: 30, behind: map[int]uint64{3: 25, 4: 25}}},
		{stepLimit{upto: 40, away: []int{4}}, mark{upto: 40, behind: map[int]uint64{4: 25}}},
		{stepLimit{upto: 40}, mark{upto: 40}},
		{stepLimit{upto: allPlaces, away: []int{5}}, mark{upto: allPlaces, behind: map[int]uint64{5: 40}}},
		{stepLimit{upto: allPlaces}, mark{upto: allPlaces}},
	} {
		if m = m.advanced(c.limit); !m.equal(&c.want) {
			t.Fatalf("step %d, %v: %v, want %v", i, c.limit, m, c.want)
		}
	}
	if !m.isComplete() {
		t.Errorf("%v is not complete", m)
	}
}

// The namespaces of an owner that was scaled in move in the first step, however short it is,
// but for those whose new owner is away.
func TestScaledInMovesFirst(t *testing.T) {
	namespaces := manyNamespaces(100)
	first := newTable("backend", false, ordinalRange{0, 4}, nil, nil, nil)
	second := newTable("backend", false, ordinalRange{0, 3}, nil, nil, first)
	v := newView(first, nil, time.UnixMilli(0))
	next := v.next(second, stepLimit{upto: 1, away: []int{0}}, time.UnixMilli(0))
	moved, waits := 0, 0
	for _, ns := range namespaces {
		before, _ := first.ownerOf(ns)
		owner, _ := second.ownerOf(ns)
		want := before
		if before == 3 && owner != 0 {
			want, moved = owner, moved+1
		} else if before == 3 {
			waits++
		}
		if got := next.after(ns); got != want {
			t.Errorf("%s goes from %d to %d, want %d", ns, before, got, want)
		}
		if changes := next.mayChange(hash64(ns)); want != before && !changes {
			t.Errorf("%s changes its owner, and mayChange says that it does not", ns)
		}
	}
	if moved == 0 || waits == 0 {
		t.Errorf("%d move and %d wait: the test has tested little", moved, waits)
	}
}

// A router that lacks some tables, or does not know who has the kept namespaces, takes no other
// owner than one that knows all, and ends whatever that one ends.
func TestViewOfRouterThatKnowsLess(t *testing.T) {
	namespaces := manyNamespaces(16)
	moved, owned := 0, 0
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 8))
		first := randomTable(r, nil, namespaces)
		first = first.withKept(func(string) int { return first.backends.first + r.IntN(first.backends.count) })
		seen, v := []*table{first}, newView(first, nil, time.UnixMilli(0))
		for range 12 {
			newest := seen[len(seen)-1]
			if r.IntN(3) == 0 {
				newest = randomTable(r, newest, namespaces)
			}
			seen = append(seen, newest)
			next := *v.next(v.nextTable(newest), randomLimit(r), time.UnixMilli(0))
			less := next
			less.tables = slices.Clone(next.tables)
			for i, t := range less.tables {
				if r.IntN(4) == 0 {
					less.tables[i] = nil
				} else if i == 0 && r.IntN(2) == 0 {
					less.tables[0] = t.withKept(func(string) int { return unresolved })
				}
			}
			for _, done := range []bool{false, true} {
				next.done, less.done = done, done
				for _, ns := range namespaces {
					before, after := v.after(ns), next.after(ns)
					owner, _, state := next.owner(ns)
					got, _, gotState := less.owner(ns)
					switch {
					case gotState == stateOwned && (state != stateOwned || got != owner):
						t.Fatalf("seed %d: %s is with %d for a router that knows less, want %d (%d)", seed, ns, got, owner, state)
					case before == after && after >= 0 && next.mustLeave(ns, after):
						t.Fatalf("seed %d: %s must leave its owner %d", seed, ns, after)
					case before != after && after >= 0 && before >= 0 && !(next.mustLeave(ns, before) && less.mustLeave(ns, before)):
						t.Fatalf("seed %d: %s goes from %d to %d, and need not leave: %v", seed, ns, before, after, next.records)
					case before != after:
						moved++
					case gotState == stateOwned:
						owned++
					}
				}
			}
			v = &next
		}
	}
	if moved < 1000 || owned < 1000 {
		t.Errorf("%d moved, %d had an owner: the test has tested little", moved, owned)
	}
}

// No owner that fails, and none that is back, makes an edit wait: only a table too many does.
func TestAwayOwnersBlockNoEdit(t *testing.T) {
	for seed := range uint64(1000) {
		r := rand.New(rand.NewPCG(seed, 7))
		p := &handoffPlan{step: 1, records: []planRecord{{ownersHash: 1}}}
		for i := range 12 {
			limit := randomLimit(r)
			if limit.upto = uint64(10 * i); p.isFull() {
				t.Fatalf("seed %d: an edit has to wait: %v", seed, p.records)
			}
			p = p.next(planRecord{ownersHash: 2}, limit, time.UnixMilli(0))
		}
		if p = p.next(planRecord{ownersHash: 3}, stepLimit{upto: 1}, time.UnixMilli(0)); p.newestRecord().ownersHash != 3 {
			t.Fatalf("seed %d: the edit is not in the plan: %v", seed, p.records)
		}
	}
}

// A plan has a bounded number of tables, whatever the edits and the owners that are away, and
// comes to rest when all is there.
func TestPlanIsBounded(t *testing.T) {
	var tables []*table
	for count := range 4 {
		tables = append(tables, newTable("backend", false, ordinalRange{0, 1 + count}, nil, nil, nil))
	}
	full := 0
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 5))
		v := newView(tables[0], nil, time.UnixMilli(0))
		step := func(t *table, limit stepLimit) {
			next := *v.next(v.nextTable(t), limit, time.UnixMilli(0))
			next.done = true
			v = &next
		}
		for range 30 {
			limit := randomLimit(r)
			if r.IntN(2) == 0 {
				limit.upto = uint64(r.IntN(100))
			}
			step(tables[r.IntN(4)], limit)
			if len(v.records) > maxRecords {
				t.Fatalf("seed %d: %d records", seed, len(v.records))
			}
			if v.isFull() {
				full++
			}
		}
		for range 6 {
			step(tables[0], stepLimit{upto: allPlaces})
		}
		if !v.hasOnlyTable(tables[0].ownersHash) {
			t.Fatalf("seed %d: not at rest: %v", seed, v.records)
		}
	}
	if full < 1000 {
		t.Errorf("%d full plans: the test has tested little", full)
	}
}

// pinnedAnywhere gives each namespace one of five backends.
func pinnedAnywhere(r *rand.Rand, namespaces []string) map[string]string {
	data := map[string]string{}
	for _, ns := range namespaces {
		data[ns] = fmt.Sprintf("backend-%d", r.IntN(5))
	}
	return data
}

// However a change was begun, two steps that cover everything end it: each namespace has
// the owner that the newest table gives it, and each kept one the owner that it had.
func TestViewComesToRest(t *testing.T) {
	namespaces := []string{"a", "b", "c", "d", "e", "f", "g", "h"}
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 2))
		newest := randomTable(r, nil, namespaces)
		v := newView(newest, nil, time.UnixMilli(0))
		step := func(limit stepLimit) {
			next := *v.next(newest, limit, time.UnixMilli(0))
			next.done = true
			v = &next
		}
		for range r.IntN(8) {
			if r.IntN(2) == 0 && !v.isFull() {
				newest = randomTable(r, newest, namespaces)
			}
			step(randomLimit(r))
		}
		before := map[string]int{}
		for _, ns := range namespaces {
			before[ns] = v.after(ns)
		}
		for range 3 {
			step(stepLimit{upto: allPlaces})
		}
		if !v.hasOnlyTable(newest.ownersHash) {
			t.Fatalf("seed %d: %d records are left", seed, len(v.records))
		}
		for _, ns := range namespaces {
			want, isKept := newest.lookup(ns, hash64(ns))
			if isKept {
				want = before[ns]
			}
			if isKept && !newest.backends.has(want) {
				want = unresolved
			}
			if got := v.after(ns); got != want {
				t.Fatalf("seed %d: %s is with %d, want %d (kept: %t)", seed, ns, got, want, isKept)
			}
		}
	}
}

// restingMover returns a mover of the router, at rest with its table.
func restingMover(r *tableStore) *mover {
	log := slog.New(slog.DiscardHandler)
	m := newMover(r, newRelay(func(i int) string { return backendName("backend", i) }, log), 0, nil, func() {}, log)
	m.tableOrPodChanged()
	return m
}

// Nobody who asks for an owner allocates, be a change under way or not.
func TestAssignAllocatesNothing(t *testing.T) {
	r := lookupTable(t, 4, 1000)
	m := restingMover(r)
	wantNone := func(when string) {
		t.Helper()
		for _, namespace := range []string{"ns-00000007", "another"} {
			if n := testing.AllocsPerRun(1000, func() { m.assignmentOf(namespace) }); n != 0 {
				t.Errorf("%s: %v allocations to ask for the owner of %s, want none", when, n, namespace)
			}
		}
	}
	wantNone("at rest")
	other := newTable("backend", false, ordinalRange{count: 5}, nil, nil, r.table())
	m.current.Store(m.current.Load().next(other, stepLimit{upto: allPlaces / 2}, time.Now()))
	wantNone("in a step")
}

// BenchmarkMustLeave asks whether a namespace has to leave its owner, while owners are behind.
func BenchmarkMustLeave(b *testing.B) {
	first := newTable("backend", false, ordinalRange{0, 500}, nil, nil, nil)
	second := newTable("backend", false, ordinalRange{0, 501}, nil, nil, first)
	for _, owners := range []int{0, 10, 500} {
		b.Run(fmt.Sprintf("behind=%d", owners), func(b *testing.B) {
			b.ReportAllocs()
			limit := stepLimit{upto: 1 << 61}
			for owner := range owners {
				limit.away = append(limit.away, owner)
			}
			v := newView(first, nil, time.UnixMilli(0)).next(second, stepLimit{upto: 1 << 60}, time.UnixMilli(0))
			v.done = true
			v = v.next(second, limit, time.UnixMilli(0))
			for b.Loop() {
				v.mustLeave("ns-000001", 3)
			}
		})
	}
}

// BenchmarkAssign compares who asks the view for an owner with who asks the table.
func BenchmarkAssign(b *testing.B) {
	tables := map[string]*tableStore{"overrides=100000": lookupTable(b, 4, 100_000)}
	_, tables["overrides=1000000"] = largeMaps(b, 30, 33_334)
	for size, r := range tables {
		m := restingMover(r)
		names := make([]string, 100_000)
		for i := range names {
			names[i] = fmt.Sprintf("tenant-%07d", i)
		}
		names = shuffled(names)
		ask := func(name string, owner func(namespace string) int) {
			b.Run(size+"/"+name, func(b *testing.B) {
				b.ReportAllocs()
				sum, next := 0, 0
				for b.Loop() {
					sum += owner(names[next])
					if next++; next == len(names) {
						next = 0
					}
				}
				if sum < 0 {
					b.Fatal("no owners")
				}
			})
		}
		ask("table", func(namespace string) int { owner, _ := r.table().ownerOf(namespace); return owner })
		ask("view", func(namespace string) int { return m.assignmentOf(namespace).backend })
	}
}
