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

// randomMark returns a mark with random bounds.
func randomMark(r *rand.Rand) mark {
	m := mark{upto: []uint64{0, allPlaces, allPlaces, r.Uint64() >> 1}[r.IntN(4)]}
	for ordinal := range 5 {
		switch r.IntN(8) {
		case 0:
			m.away = append(m.away, ordinal)
		case 1:
			m.scaledIn = append(m.scaledIn, ordinal)
		}
	}
	return m
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
			next := v.next(newest, randomMark(r), time.UnixMilli(0))
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
// another table gives the namespace another owner.
func TestStepTakesNothingBack(t *testing.T) {
	namespaces := manyNamespaces(24)
	at := time.UnixMilli(0)
	for name, next := range map[string]func(v *view, t *table, m mark) *handoffPlan{
		"single": func(v *view, t *table, m mark) *handoffPlan { return v.handoffPlan.next(t.ownersHash, m, at) },
		"all":    func(v *view, t *table, m mark) *handoffPlan { return v.nextBounded(t.ownersHash, m, at) },
	} {
		t.Run(name, func(t *testing.T) {
			moved, stayed := 0, 0
			for seed := range uint64(3000) {
				r := rand.New(rand.NewPCG(seed, 6))
				first := newTable("backend", false, ordinalRange{0, 5}, nil, nil, nil)
				second := newTable("backend", false, ordinalRange{0, 5}, nil,
					[]sourceContent{contentOf("test", "1", pinnedAnywhere(r, namespaces))}, first)
				v := newView(first, nil, at)
				for range 12 {
					m := randomMark(r)
					m.scaledIn = nil // nothing is
					following := &view{handoffPlan: next(v, second, m), done: true}
					for _, record := range following.records {
						following.tables = append(following.tables, map[uint64]*table{
							first.ownersHash: first, second.ownersHash: second}[record.ownersHash])
					}
					for _, ns := range namespaces {
						before, after, owner := v.after(ns), following.after(ns), 0
						if owner, _ = second.wantedOwner(ns); before != owner {
							if after == owner {
								moved++
							}
							continue
						}
						if after != owner {
							t.Fatalf("seed %d: %s had moved to %d, and is with %d: %v", seed, ns, owner, after, following.records)
						}
						if slices.Contains(m.away, owner) {
							stayed++
						}
					}
					if len(following.records) > maxRecords {
						t.Fatalf("seed %d: %d records", seed, len(following.records))
					}
					v = following
				}
			}
			if moved < 1000 || stayed < 1000 {
				t.Errorf("%d moved, %d stayed with an owner that was away: the test has tested little", moved, stayed)
			}
		})
	}
}

// No owner that fails, and none that is back, makes an edit wait: only further tables do.
func TestAwayOwnersBlockNoEdit(t *testing.T) {
	for seed := range uint64(1000) {
		r := rand.New(rand.NewPCG(seed, 7))
		p := &handoffPlan{step: 1, records: []planRecord{{ownersHash: 1}}}
		for i := range 12 {
			m := randomMark(r)
			if m.upto = uint64(10 * i); p.isFull() {
				t.Fatalf("seed %d: an edit has to wait: %v", seed, p.records)
			}
			p = p.next(2, m, time.UnixMilli(0))
		}
		if p = p.next(3, mark{upto: 1}, time.UnixMilli(0)); p.newestRecord().ownersHash != 3 || len(p.records) > maxRecords {
			t.Fatalf("seed %d: the edit is not in the plan, or has no room: %v", seed, p.records)
		}
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
		step := func(m mark) {
			next := *v.next(newest, m, time.UnixMilli(0))
			next.done = true
			v = &next
		}
		for range r.IntN(8) {
			if r.IntN(2) == 0 {
				newest = randomTable(r, newest, namespaces)
			}
			step(randomMark(r))
		}
		before := map[string]int{}
		for _, ns := range namespaces {
			before[ns] = v.after(ns)
		}
		for range 3 {
			step(mark{upto: allPlaces})
		}
		if !v.isAtRest(newest.ownersHash) {
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
			if n := testing.AllocsPerRun(1000, func() { m.ownerNow(namespace) }); n != 0 {
				t.Errorf("%s: %v allocations to ask for the owner of %s, want none", when, n, namespace)
			}
		}
	}
	wantNone("at rest")
	other := newTable("backend", false, ordinalRange{count: 5}, nil, nil, r.table())
	m.current.Store(m.current.Load().next(other, mark{upto: allPlaces / 2}, time.Now()))
	wantNone("in a step")
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
		ask("table", func(namespace string) int { owner, _ := r.table().wantedOwner(namespace); return owner })
		ask("view", func(namespace string) int { return m.ownerNow(namespace).owner })
	}
}
