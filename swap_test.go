package main

import (
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
)

// loggedRouter is a router of 4 backends and its log.
func loggedRouter(t *testing.T) (*router, *logTail) {
	t.Helper()
	tail := newLogTail()
	log, err := newLogger(tail, "json", slog.LevelInfo)
	if err != nil {
		t.Fatal(err)
	}
	return &router{statefulSet: "backend", backends: ordinals{count: 4}, log: log, swapped: func() {}}, tail
}

// TestRouterSwaps reads the table in several goroutines while it is updated: it
// is never nil, never older than before, and never of two updates.
func TestRouterSwaps(t *testing.T) {
	const updates = 1000
	namespaces := []string{"a", "b", "c", "d", "e"}
	r, tail := loggedRouter(t)
	put := func(version int) {
		data := map[string]string{}
		for _, namespace := range namespaces {
			data[namespace] = backendName("backend", version%4)
		}
		r.update(entries{version: strconv.Itoa(version), data: pack(data)})
	}
	put(1)
	var done atomic.Bool
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for last := 1; !done.Load(); {
				last = wantWhole(t, r.table(), namespaces, last)
			}
		})
	}
	for version := 2; version <= updates; version++ {
		put(version)
	}
	done.Store(true)
	readers.Wait()
	if got := r.swaps.Load(); got != updates {
		t.Errorf("%d swaps, want %d", got, updates)
	}
	if got := len(tail.all("table")); got != updates {
		t.Errorf("%d tables in the log, want %d", got, updates)
	}
}

// wantWhole checks that the table is one that put has made, not before last, and
// returns its version.
func wantWhole(t *testing.T, table *table, namespaces []string, last int) int {
	t.Helper()
	if table == nil {
		t.Error("the table is nil")
		return last
	}
	version, err := strconv.Atoi(table.version)
	if err != nil || version < last {
		t.Errorf("version %s after %d", table.version, last)
	}
	for _, namespace := range namespaces {
		if owner, ok := table.owner(namespace); !ok || owner != version%4 {
			t.Errorf("owner of %s is %d in version %d, want %d", namespace, owner, version, version%4)
		}
	}
	return version
}

func TestRouterTellsEachSwap(t *testing.T) {
	r, _ := loggedRouter(t)
	var versions []string
	r.swapped = func() { versions = append(versions, r.table().version) }
	for _, version := range []string{"1", "2", "3"} {
		r.update(entries{version: version, data: pack(map[string]string{"a": "backend-" + version})})
	}
	if want := []string{"1", "2", "3"}; !slices.Equal(versions, want) {
		t.Errorf("swapped saw the tables %v, want %v", versions, want)
	}
}

// TestRouterStaleEntries: a copy counts only until the source was heard.
func TestRouterStaleEntries(t *testing.T) {
	r, _ := loggedRouter(t)
	steps := []struct {
		version string
		stale   bool
		want    string
	}{{"copy-1", true, "copy-1"}, {"copy-2", true, "copy-2"}, {"7", false, "7"}, {"copy-3", true, "7"}, {"8", false, "8"}}
	for _, step := range steps {
		r.update(entries{version: step.version, stale: step.stale})
		if got := r.table().version; got != step.want {
			t.Errorf("after %q the table is of %q, want %q", step.version, got, step.want)
		}
	}
}

func TestRouterReports(t *testing.T) {
	r, tail := loggedRouter(t)
	data := map[string]string{"good": "backend-1"}
	for i := range 25 {
		data[fmt.Sprintf("bad-%02d", i)] = "bakend-" + strconv.Itoa(i)
	}
	r.update(entries{source: "test", version: "41", data: pack(data)})
	wantLine(t, tail.all("table"), 1, map[string]any{"level": "INFO", "source": "test", "version": "41", "backends": 4.0,
		"overrides": 26.0, "added": 26.0, "changed": 0.0, "removed": 0.0, "rejected": 25.0})
	wantLine(t, tail.all("entry rejected"), 10, map[string]any{"level": "WARN", "source": "test", "version": "41",
		"namespace": "bad-09", "value": "bakend-9", "want": "backend-0 to backend-3", "kept": "refused"})
	wantLine(t, tail.all("more entries rejected"), 1, map[string]any{"level": "WARN", "count": 15.0})

	data["bad-00"], data["bad-01"], data["good"] = "still wrong", "backend-3", "backend-2"
	r.update(entries{source: "test", version: "42", data: pack(data)})
	wantLine(t, tail.all("table"), 2, map[string]any{"version": "42", "added": 0.0, "changed": 2.0, "removed": 0.0, "rejected": 24.0})
	wantLine(t, tail.all("entry rejected"), 11, map[string]any{"version": "42", "namespace": "bad-00", "value": "still wrong"})
	wantLine(t, tail.all("more entries rejected"), 1, nil)
}

// wantLine checks how many lines there are, and fields of the last.
func wantLine(t *testing.T, lines []map[string]any, count int, want map[string]any) {
	t.Helper()
	if len(lines) != count {
		t.Fatalf("%d lines, want %d: %v", len(lines), count, lines)
	}
	for key, value := range want {
		if got := lines[count-1][key]; got != value {
			t.Errorf("%s=%v in the log, want %v", key, got, value)
		}
	}
}

// TestRouterResizes: a table comes when overrides and backends are both known,
// and each number of backends judges the same overrides anew.
func TestRouterResizes(t *testing.T) {
	r, tail := loggedRouter(t)
	r.backends = ordinals{}
	swapped := 0
	r.swapped = func() { swapped++ }
	r.update(entries{source: "test", version: "1", data: pack(map[string]string{"a": "backend-1", "late": "backend-5"})})
	if r.table() != nil || swapped > 0 {
		t.Fatal("there is a table before the number of backends is known")
	}
	steps := []struct {
		backends ordinals
		a, late  int // owners
		hashed   int // owner of another namespace
		swaps    int
	}{
		{ordinals{0, 4}, 1, refused, bucket("another", 4), 1},
		{ordinals{0, 4}, 1, refused, bucket("another", 4), 1},
		{ordinals{0, 6}, 1, 5, bucket("another", 6), 2},
		{ordinals{0, 1}, refused, refused, 0, 3},
		{ordinals{0, 6}, 1, 5, bucket("another", 6), 4},
		{ordinals{3, 4}, refused, 5, 3 + bucket("another", 4), 5},
		{ordinals{1, 1}, 1, refused, 1, 6},
	}
	for _, step := range steps {
		r.resize(step.backends, "")
		owner := func(namespace string) int { owner, _ := r.table().owner(namespace); return owner }
		if a, late, hashed := owner("a"), owner("late"), owner("another"); a != step.a || late != step.late || hashed != step.hashed || swapped != step.swaps {
			t.Errorf("with %+v owners %d, %d, %d after %d swaps, want %+v", step.backends, a, late, hashed, swapped, step)
		}
	}
	wantLine(t, tail.all("table"), 6, map[string]any{"source": "test", "version": "1", "backends": 1.0, "rejected": 1.0})
	wantLine(t, tail.all("entry rejected"), 5, map[string]any{"namespace": "late", "value": "backend-5", "want": "backend-1 to backend-1", "kept": "refused"})
}

// TestRouterKeepsAcrossResizes: a namespace whose entry cannot be read stays on
// its backend for as long as that is there.
func TestRouterKeepsAcrossResizes(t *testing.T) {
	r, _ := loggedRouter(t)
	r.update(entries{source: "test", version: "1", data: pack(map[string]string{"a": "backend-3"})})
	r.update(entries{source: "test", version: "2", data: pack(map[string]string{"a": "bakend-3"})})
	for _, step := range []struct {
		backends ordinals
		want     int
	}{{ordinals{0, 6}, 3}, {ordinals{2, 4}, 3}, {ordinals{0, 3}, refused}, {ordinals{0, 6}, refused}} {
		r.resize(step.backends, "")
		if got, _ := r.table().owner("a"); got != step.want {
			t.Errorf("with %+v the owner is %d, want %d", step.backends, got, step.want)
		}
	}
}

// TestRouterReportsTheEndOfACopy: what the copy of one source had and the real
// one has too did not change.
func TestRouterReportsTheEndOfACopy(t *testing.T) {
	r, tail := loggedRouter(t)
	r.update(entries{source: "directory", version: "1", data: pack(map[string]string{"a": "backend-1", "b": "backend-2"}), stale: true})
	r.update(entries{source: "ConfigMap", version: "2", data: pack(map[string]string{"a": "backend-1", "c": "backend-3"})})
	wantLine(t, tail.all("table"), 2, map[string]any{"source": "ConfigMap", "overrides": 2.0, "added": 1.0, "changed": 0.0, "removed": 1.0})
}

// A source that is read again with the same entries, as after a change of its
// labels, is no swap and is told to nobody, but the table says its version.
func TestRouterOtherVersionOfTheSame(t *testing.T) {
	r, tail := loggedRouter(t)
	var told []change
	r.told = func(c change) { told = append(told, c) }
	a, b := map[string]string{"a": "backend-1", "x": "backend-1"}, map[string]string{"b": "junk", "x": "backend-2"}
	source := func(name, version string, data map[string]string) entries {
		return entries{source: name, version: version, data: pack(data)}
	}
	r.update(source("a", "1", a), source("b", "2", b))
	first := r.table()
	swapped := 0
	r.swapped = func() { swapped++ }
	told = nil
	r.update(source("a", "3", a), source("b", "2", b))
	next := r.table()
	if next.version == first.version || next.sources[0].version != "3" || next.stamp != first.stamp {
		t.Errorf("version %s of %+v, stamp %s, after %s, %s", next.version, next.sources, next.stamp, first.version, first.stamp)
	}
	if first.sources[0].version != "1" {
		t.Error("the table before was changed")
	}
	if swapped != 0 || len(told) != 0 || r.swaps.Load() != 1 || len(tail.all("table")) != 1 {
		t.Errorf("%d swaps, %d changes told, %d lines of tables, want that of the first only", swapped, len(told), len(tail.all("table")))
	}
	if got := next.rejectionsOf("x"); len(got) != 2 || next.explain("b") != whyRefused {
		t.Errorf("x: %v; b: %s", got, next.explain("b"))
	}

	b["b"] = "backend-3"
	r.update(source("a", "4", a), source("b", "5", b)) // one has other labels, one other entries
	if swapped != 1 || len(told) != 1 || told[0].source != "b" || told[0].changed != 1 || r.table().sources[0].version != "4" {
		t.Errorf("%d swaps, told %+v of %+v, want one of b", swapped, told, r.table().sources)
	}
	r.resize(ordinals{count: 3}, "")
	r.update(source("a", "6", a), source("b", "5", b))
	if swapped != 2 || r.table().backends.count != 3 || r.table().sources[0].version != "6" {
		t.Errorf("%d swaps, %+v", swapped, r.table())
	}
	r.update(source("a", "6", a)) // one source less is more than a version
	if swapped != 3 || len(r.table().sources) != 1 {
		t.Errorf("%d swaps, %+v", swapped, r.table().sources)
	}
}

// stampWorld is what the routers of TestStampsAgree see: some ConfigMaps and a
// number of backends, at one moment.
type stampWorld struct {
	data     [3]map[string]string
	backends ordinals
}

// next changes one thing.
func (w stampWorld) next(random *rand.Rand) stampWorld {
	if random.IntN(4) == 0 {
		w.backends.count = 2 + random.IntN(4)
		return w
	}
	changed := random.IntN(len(w.data))
	data := maps.Clone(w.data[changed])
	for range 1 + random.IntN(2) {
		namespace := fmt.Sprint("ns-", random.IntN(6))
		data[namespace] = fmt.Sprint("backend-", random.IntN(7)) // some of them beyond the last
		if random.IntN(3) == 0 {
			delete(data, namespace)
		}
	}
	w.data[changed] = data
	return w
}

// show has the router see it: with shuffled sources of other names if it is odd,
// and with values that are spelled otherwise.
func (w stampWorld) show(r *router, version int, odd bool, random *rand.Rand) {
	r.resize(w.backends, "")
	var all []entries
	for i, data := range w.data {
		e := entries{source: fmt.Sprint("source-", i), version: fmt.Sprint(version), data: pack(data)}
		if odd {
			spelled := map[string]string{}
			for namespace, value := range data {
				spelled[namespace] = " " + value + "\n"
			}
			e = entries{source: fmt.Sprint("other-", i), version: fmt.Sprint("v", version), data: pack(spelled)}
		}
		all = append(all, e)
	}
	if odd {
		random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	}
	r.update(all...)
}

// TestStampsAgree: two routers see one history of edits, of which each misses some
// versions, or starts later. Whenever their stamps are equal, so are their owners of
// all namespaces; what they see last alone decides the content.
func TestStampsAgree(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	seen := map[string]int{}
	quiet := slog.New(slog.DiscardHandler)
	for range 400 {
		w := stampWorld{backends: ordinals{count: 4}}
		for i := range w.data {
			w.data[i] = map[string]string{}
		}
		start := func() *router {
			return &router{statefulSet: "backend", log: quiet, swapped: func() {}}
		}
		routers := []*router{start(), start()}
		last := [2]int{-1, -2}
		for version := range 30 {
			w = w.next(random)
			for i := range routers {
				if random.IntN(40) == 0 {
					routers[i] = start()
				}
				if routers[i].table() == nil || random.IntN(3) > 0 {
					w.show(routers[i], version, i == 1, random)
					last[i] = version
				}
			}
			wantStampsAgree(t, routers[0].table(), routers[1].table(), last[0] == last[1], seen)
		}
	}
	t.Logf("%v", seen)
	for _, what := range []string{"equal", "equal, some stay", "other kept, other owners", "equal after other versions"} {
		if seen[what] < 50 {
			t.Errorf("%s: seen %d times, want more", what, seen[what])
		}
	}
}

// wantStampsAgree checks what the stamps of two tables say of their owners.
func wantStampsAgree(t *testing.T, a, b *table, same bool, seen map[string]int) {
	t.Helper()
	owners := true
	for i := range 6 {
		namespace := fmt.Sprint("ns-", i)
		ownerA, okA := a.owner(namespace)
		ownerB, okB := b.owner(namespace)
		owners = owners && ownerA == ownerB && okA == okB
	}
	if same && a.content != b.content {
		t.Fatalf("of the same sources and backends the stamps are %s and %s", a.stamp, b.stamp)
	}
	if stays := a.kept != 0; a.stamp == b.stamp {
		if !owners {
			t.Fatalf("the stamp of both is %s, and their owners differ:\n%v %s\n%v %s", a.stamp, overridesOf(a), a.backends, overridesOf(b), b.backends)
		}
		seen["equal"]++
		if stays {
			seen["equal, some stay"]++
		}
		if !same {
			seen["equal after other versions"]++
		}
	} else if a.content == b.content && !owners {
		seen["other kept, other owners"]++
	}
}
