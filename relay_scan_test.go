package main

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
	"testing"
	"time"
)

// scanSessions is how many sessions a router is to look through.
const scanSessions = 100_000

// scanFactor is how much longer than of a slice a scan may take: that of a map took
// 10 times as long.
const scanFactor = 4

// scanned returns a relay with scanSessions sessions that are with their owners,
// and a mover for it. They have no sockets, which no process could have for so
// many: they are in the relay's set, and nothing else of them is looked at.
func scanned(t testing.TB, overrides int) (*relay, *mover, []*session) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	router := lookupTable(t, 4, overrides)
	r := newRelay(func(i int) string { return backendName("backend", i) }, log)
	all := make([]*session, scanSessions)
	for i, namespace := range shuffled(manyNamespaces(scanSessions)) {
		owner, _ := router.table().owner(namespace)
		all[i] = &session{namespace: namespace, backend: owner}
		all[i].count[client].Store(int64(i))
		all[i].count[server].Store(1)
	}
	rng := rand.New(rand.NewPCG(5, 6)) // in memory, sessions are not in the order of the set
	rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, s := range all {
		r.add(s)
	}
	return r, newMover(router, r, 0, nil, log), all
}

// raced reports whether the race detector is on.
func raced() bool {
	info, _ := debug.ReadBuildInfo() // a test binary has it
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// A scan finds exactly the sessions it is to find, also when others have ended
// meanwhile, and takes little more of the processor than to look at them takes.
//
// It fails if a session is left out or comes twice, if another than the one that
// ended is taken out, if the bytes of an ended session are forgotten, and if the
// set is one that takes long to go through, as a map of so many did.
func TestRelayScan(t *testing.T) {
	r, m, all := scanned(t, 1000)
	want := map[*session]bool{}
	for i, s := range all {
		if i%1000 < 2 {
			s.backend = (s.backend + 1) % 4
			want[s] = true
		}
	}
	for i := 1; i < scanSessions; i += 2 {
		r.remove(all[i], all[i].bytes())
		delete(want, all[i])
	}
	if got := r.size(); got != scanSessions/2 {
		t.Errorf("%d sessions, want %d", got, scanSessions/2)
	}
	for _, s := range r.where(m.misplaced) {
		if !want[s] {
			t.Errorf("%s was found, and is with its owner, has ended, or was found before", s.namespace)
		}
		delete(want, s)
	}
	if len(want) > 0 {
		t.Errorf("%d sessions were not found", len(want))
	}
	if got, want := r.bytes(), [2]int64{scanSessions * (scanSessions - 1) / 2, scanSessions}; got != want {
		t.Errorf("bytes = %d, want %d", got, want)
	}
	for i := 1; i < scanSessions; i += 2 {
		r.add(all[i])
	}
	wantScanTime(t, r, m, all)
}

// wantScanTime compares what a processor needs for scans with what it needs for the
// same sessions in a slice, in turns, so that other programs have the same part in
// both: in each turn that is more for one, and in the best of them little.
func wantScanTime(t *testing.T, r *relay, m *mover, all []*session) {
	t.Helper()
	each := func(look func(*session)) func() {
		return func() {
			for _, s := range all {
				look(s)
			}
		}
	}
	scans := map[string]struct{ scan, plain func() }{
		"where one flag is set":           {func() { r.where((*session).ending) }, each(func(s *session) { s.ending() })},
		"where the owner is another":      {func() { r.where(m.misplaced) }, each(func(s *session) { m.misplaced(s) })},
		"the sum of what they have taken": {func() { r.bytes() }, each(func(s *session) { s.bytes() })},
	}
	for name, tt := range scans {
		best := [2]time.Duration{time.Hour, time.Hour}
		for range 15 {
			for i, scan := range []func(){tt.scan, tt.plain} {
				begun := processorTime(t)
				scan()
				best[i] = min(best[i], processorTime(t)-begun)
			}
		}
		t.Logf("%s: %s, of a slice %s", name, best[0], best[1])
		if best[0] > scanFactor*best[1]+time.Millisecond {
			t.Errorf("%s: a scan takes %s of processor time, want %d times the %s of a slice at most", name, best[0], scanFactor, best[1])
		}
	}
}

// Nothing is computed under the relay's lock: sessions start and end while others
// are matched. Each of those that were there at one moment is matched once.
func TestRelayScanHoldsNoLock(t *testing.T) {
	r := newRelay(func(int) string { return "backend-0" }, slog.New(slog.DiscardHandler))
	var all []*session
	for range 10 {
		all = append(all, &session{})
		r.add(all[len(all)-1])
	}
	matched := map[*session]int{}
	found := r.where(func(s *session) bool {
		if !r.mu.TryLock() {
			t.Fatal("match is called with the relay's lock held")
		}
		r.mu.Unlock()
		if len(matched) == 0 { // the last takes the place of the first
			r.remove(all[0], [2]int64{})
			r.add(&session{})
		}
		matched[s]++
		return s == all[0] || s == all[9]
	})
	for i, s := range all {
		if matched[s] != 1 {
			t.Errorf("session %d was matched %d times, want once", i, matched[s])
		}
	}
	if len(matched) != len(all) || !slices.Equal(found, []*session{all[0], all[9]}) {
		t.Errorf("%d were matched, %d found; want the 10 that were there and the 2 that match", len(matched), len(found))
	}
}

// The sum of the bytes is right at every time while sessions end: each of them
// counts once, as open or as ended.
func TestRelayBytesWhileSessionsEnd(t *testing.T) {
	r := newRelay(func(int) string { return "backend-0" }, slog.New(slog.DiscardHandler))
	const sessions, each = 5000, 1000
	all := make([]*session, sessions)
	for i := range all {
		all[i] = &session{}
		all[i].count[client].Store(each)
		all[i].count[server].Store(2 * each)
		r.add(all[i])
	}
	var ending sync.WaitGroup
	ending.Go(func() {
		for _, s := range all {
			r.remove(s, s.bytes())
		}
	})
	want := [2]int64{sessions * each, 2 * sessions * each}
	for open := sessions; open > 0; open = r.size() {
		if got := r.bytes(); got != want {
			t.Errorf("bytes = %d with about %d sessions open, want %d", got, open, want)
		}
	}
	ending.Wait()
	if got := r.bytes(); got != want {
		t.Errorf("bytes = %d at the end, want %d", got, want)
	}
}

// BenchmarkRelayScan is what a table's swap costs for scanSessions sessions that
// stay, by how many overrides the table has, and what the set alone does.
func BenchmarkRelayScan(b *testing.B) {
	for _, overrides := range []int{0, 1_000, 100_000} {
		r, m, _ := scanned(b, overrides)
		b.Run(fmt.Sprintf("misplaced/overrides=%d", overrides), func(b *testing.B) {
			for b.Loop() {
				r.where(m.misplaced)
			}
		})
	}
	r, _, _ := scanned(b, 0)
	b.Run("ending", func(b *testing.B) {
		for b.Loop() {
			r.where((*session).ending)
		}
	})
	b.Run("bytes", func(b *testing.B) {
		for b.Loop() {
			r.bytes()
		}
	})
}
