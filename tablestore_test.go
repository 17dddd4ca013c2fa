package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
)

// fakeSource is a source of overrides that reads nothing: its test calls update.
type fakeSource struct {
	notReady string
	changes  []sourceChange // that it had to report
}

func (s *fakeSource) run(context.Context) {}
func (s *fakeSource) whyNotReady() string { return s.notReady }

// addFakeSource adds a fakeSource to the router, and returns its update function.
func (r *tableStore) addFakeSource(provisional bool) (s *fakeSource, update func(...sourceContent)) {
	s = &fakeSource{}
	r.addSource(provisional, func(u func(...sourceContent)) overrideSource {
		update = func(contents ...sourceContent) { u(withSets(contents)...) }
		r.reportChange = func(c sourceChange) { s.changes = append(s.changes, c) }
		return s
	})
	return s, update
}

// withSets gives those contents that have no overrides an empty set of them.
func withSets(contents []sourceContent) []sourceContent {
	for i := range contents {
		contents[i].overrides = cmp.Or(contents[i].overrides, &overrideSet{})
	}
	return contents
}

// update gives the router the contents of its first source. It adds a fakeSource if
// the router has no source.
func (r *tableStore) update(contents ...sourceContent) {
	if r.sources == nil {
		r.addFakeSource(false)
	}
	r.setContents(r.sources[0], withSets(contents))
}

// loggedRouter is a router of 4 backends and its log.
func loggedRouter(t *testing.T) (*tableStore, *logTail) {
	t.Helper()
	tail := newLogTail()
	log := newLogger(tail, "json", slog.LevelInfo)
	return &tableStore{statefulSet: "backend", backends: backendSet{ordinalRange: ordinalRange{count: 4}}, log: log, onSwap: func() {}}, tail
}

// The table that several goroutines read while it is updated is never nil, never older
// than before, and never of two updates. onSwap sees each.
func TestRouterSwaps(t *testing.T) {
	const updates = 1000
	namespaces := []string{"a", "b", "c", "d", "e"}
	r, tail := loggedRouter(t)
	var versions []string // of the tables that onSwap saw
	put := func(version int) {
		data := map[string]string{}
		for _, namespace := range namespaces {
			data[namespace] = backendName("backend", version%4)
		}
		r.update(contentOf("test", strconv.Itoa(version), data))
	}
	r.onSwap = func() { versions = append(versions, r.table().overridesVersion) }
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
	if got := r.swaps.Load(); got != updates || len(versions) != updates || versions[0] != "1" || versions[1] != "2" || versions[updates-1] != "1000" {
		t.Errorf("%d swaps of the versions %v, want each of %d", got, versions, updates)
	}
	if got := len(tail.all("routing table updated")); got != updates {
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
	version, err := strconv.Atoi(table.overridesVersion)
	if err != nil || version < last {
		t.Errorf("version %s after %d", table.overridesVersion, last)
	}
	for _, namespace := range namespaces {
		if owner, ok := table.ownerOf(namespace); !ok || owner != version%4 {
			t.Errorf("owner of %s is %d in version %d, want %d", namespace, owner, version, version%4)
		}
	}
	return version
}

// A copy counts only until its source has given its contents.
func TestRouterProvisionalSource(t *testing.T) {
	r, _ := loggedRouter(t)
	_, live := r.addFakeSource(false)
	_, provisional := r.addFakeSource(true)
	steps := []struct {
		version string
		update  func(...sourceContent)
		want    string
	}{{"copy-1", provisional, "copy-1"}, {"copy-2", provisional, "copy-2"}, {"7", live, "7"}, {"copy-3", provisional, "7"}, {"8", live, "8"}}
	for _, step := range steps {
		step.update(sourceContent{version: step.version})
		if got := r.table().overridesVersion; got != step.want {
			t.Errorf("after %q the table is of %q, want %q", step.version, got, step.want)
		}
	}
}

// The table is of all sources in the order in which they were added, once each has given
// its contents. A later update of one keeps the others'.
func TestRouterMergesSources(t *testing.T) {
	r, _ := loggedRouter(t)
	first, updateFirst := r.addFakeSource(false)
	second, updateSecond := r.addFakeSource(false)
	content := func(name, data string) sourceContent { return contentOf(name, data, pairs(data)) }
	first.notReady, second.notReady = "a is missing", "b is missing"
	if why := r.whyNoOverrides(); why != "a is missing; b is missing" {
		t.Errorf("why %q", why)
	}
	updateSecond(content("b", "x=backend-2"))
	if r.table() != nil {
		t.Fatal("there is a table before the first source has given its contents")
	}
	updateFirst(content("a", "y=backend-1"))
	wantTable(t, r, "x=2 y=1")
	updateFirst(content("a", "y=backend-3"), content("c", "z=backend-0"))
	wantTable(t, r, "x=2 y=3 z=0")
	if got := sourceNames(r.table().sources); got != "a, c, b" {
		t.Errorf("the sources are %s, want a, c, b", got)
	}
}

func TestRouterReports(t *testing.T) {
	r, tail := loggedRouter(t)
	data := map[string]string{"good": "backend-1"}
	for i := range 25 {
		data[fmt.Sprintf("bad-%02d", i)] = "bakend-" + strconv.Itoa(i)
	}
	r.update(contentOf("test", "41", data))
	wantLine(t, tail.all("routing table updated"), 1, map[string]any{"level": "INFO", "source": "test", "overrides_version": "41", "backends": 4.0,
		"overrides": 26.0, "added": 26.0, "changed": 0.0, "removed": 0.0, "invalid": 25.0})
	wantLine(t, tail.all("override rejected"), 10, map[string]any{"level": "WARN", "source": "test", "source_version": "41",
		"namespace": "bad-09", "value": "bakend-9", "expected": "backend-0 to backend-3", "in_force": "unresolved"})
	wantLine(t, tail.all("more overrides rejected"), 1, map[string]any{"level": "WARN", "count": 15.0})

	data["bad-00"], data["bad-01"], data["good"] = "still wrong", "backend-3", "backend-2"
	r.update(contentOf("test", "42", data))
	wantLine(t, tail.all("routing table updated"), 2, map[string]any{"overrides_version": "42", "added": 0.0, "changed": 2.0, "removed": 0.0, "invalid": 24.0})
	wantLine(t, tail.all("override rejected"), 11, map[string]any{"source_version": "42", "namespace": "bad-00", "value": "still wrong"})
	wantLine(t, tail.all("more overrides rejected"), 1, nil)
}

// There is a table when overrides and backends are both known. Each number of backends
// reads the same overrides anew.
func TestRouterResizes(t *testing.T) {
	r, tail := loggedRouter(t)
	r.backends = backendSet{}
	swapped := 0
	r.onSwap = func() { swapped++ }
	r.update(contentOf("test", "1", pairs("a=backend-1 late=backend-5")))
	if r.table() != nil || swapped > 0 {
		t.Fatal("there is a table before the number of backends is known")
	}
	steps := []struct {
		backends ordinalRange
		a, late  int // owners
		hashed   int // owner of another namespace
		swaps    int
	}{
		{ordinalRange{0, 4}, 1, unresolved, bucket("another", 4), 1},
		{ordinalRange{0, 4}, 1, unresolved, bucket("another", 4), 1},
		{ordinalRange{0, 6}, 1, 5, bucket("another", 6), 2},
		{ordinalRange{0, 1}, unresolved, unresolved, 0, 3},
		{ordinalRange{0, 6}, 1, 5, bucket("another", 6), 4},
		{ordinalRange{3, 4}, unresolved, 5, 3 + bucket("another", 4), 5},
		{ordinalRange{1, 1}, 1, unresolved, 1, 6},
	}
	for _, step := range steps {
		r.setBackends(backendSet{ordinalRange: step.backends})
		owner := func(namespace string) int { owner, _ := r.table().ownerOf(namespace); return owner }
		if a, late, hashed := owner("a"), owner("late"), owner("another"); a != step.a || late != step.late || hashed != step.hashed || swapped != step.swaps {
			t.Errorf("with %+v owners %d, %d, %d after %d swaps, want %+v", step.backends, a, late, hashed, swapped, step)
		}
	}
	wantLine(t, tail.all("routing table updated"), 6, map[string]any{"source": "test", "overrides_version": "1", "backends": 1.0, "invalid": 1.0})
	wantLine(t, tail.all("override rejected"), 5, map[string]any{"namespace": "late", "value": "backend-5", "expected": "backend-1 to backend-1", "in_force": "unresolved"})
}

// A namespace whose entry cannot be read stays on its backend for as long as that exists.
func TestRouterKeepsAcrossResizes(t *testing.T) {
	r, _ := loggedRouter(t)
	r.update(contentOf("test", "1", pairs("a=backend-3")))
	r.update(contentOf("test", "2", pairs("a=bakend-3")))
	for _, step := range []struct {
		backends ordinalRange
		want     int
	}{{ordinalRange{0, 6}, 3}, {ordinalRange{2, 4}, 3}, {ordinalRange{0, 3}, unresolved}, {ordinalRange{0, 6}, unresolved}} {
		r.setBackends(backendSet{ordinalRange: step.backends})
		if got, _ := r.table().ownerOf("a"); got != step.want {
			t.Errorf("with %+v the owner is %d, want %d", step.backends, got, step.want)
		}
	}
}

// What the copy of a source had, and the source has too, did not change.
func TestRouterReportsTheEndOfACopy(t *testing.T) {
	r, tail := loggedRouter(t)
	_, live := r.addFakeSource(false)
	_, provisional := r.addFakeSource(true)
	provisional(contentOf("directory", "1", pairs("a=backend-1 b=backend-2")))
	live(contentOf("ConfigMap", "2", pairs("a=backend-1 c=backend-3")))
	wantLine(t, tail.all("routing table updated"), 2, map[string]any{"source": "ConfigMap", "overrides": 2.0, "added": 1.0, "changed": 0.0, "removed": 1.0})
}

// A source that is read again with the same entries, as after a change of its
// labels, is no swap and is reported to nobody, but the table says its version.
func TestRouterOtherVersionOfTheSame(t *testing.T) {
	r, tail := loggedRouter(t)
	fake, _ := r.addFakeSource(false)
	a, b := map[string]string{"a": "backend-1", "x": "backend-1"}, map[string]string{"b": "junk", "x": "backend-2"}
	r.update(contentOf("a", "1", a), contentOf("b", "2", b))
	first := r.table()
	swapped := 0
	r.onSwap = func() { swapped++ }
	fake.changes = nil
	r.update(contentOf("a", "3", a), contentOf("b", "2", b))
	next := r.table()
	if next.overridesVersion == first.overridesVersion || next.sources[0].version != "3" || next.stamp != first.stamp {
		t.Errorf("version %s of %+v, stamp %s, after %s, %s", next.overridesVersion, next.sources, next.stamp, first.overridesVersion, first.stamp)
	}
	if first.sources[0].version != "1" {
		t.Error("the table before was changed")
	}
	if swapped != 0 || len(fake.changes) != 0 || r.swaps.Load() != 1 || len(tail.all("routing table updated")) != 1 {
		t.Errorf("%d swaps, %d changes reported, %d lines of tables, want that of the first only", swapped, len(fake.changes), len(tail.all("routing table updated")))
	}
	if got := next.rejectionsOf("x"); len(got) != 2 || next.explain("b") != whyUnresolved {
		t.Errorf("x: %v; b: %s", got, next.explain("b"))
	}

	b["b"] = "backend-3"
	r.update(contentOf("a", "4", a), contentOf("b", "5", b)) // one has other labels, one other entries
	if all := fake.changes; swapped != 1 || len(all) != 1 || all[0].id.name != "b" || all[0].changed != 1 || r.table().sources[0].version != "4" {
		t.Errorf("%d swaps, reported %+v of %+v, want one of b", swapped, all, r.table().sources)
	}
	r.setBackends(backendSet{ordinalRange: ordinalRange{count: 3}})
	r.update(contentOf("a", "6", a), contentOf("b", "5", b))
	if swapped != 2 || r.table().backends.count != 3 || r.table().sources[0].version != "6" {
		t.Errorf("%d swaps, %+v", swapped, r.table())
	}
	r.update(contentOf("a", "6", a)) // one source less is more than a version
	if swapped != 3 || len(r.table().sources) != 1 {
		t.Errorf("%d swaps, %+v", swapped, r.table().sources)
	}
}

// stampWorld is what the routers of TestStampsAgree see: some ConfigMaps, a number of
// backends and a cordon, at one moment.
type stampWorld struct {
	data     [3]map[string]string
	backends ordinalRange
	cordon   cordon
}

// next changes one thing.
func (w stampWorld) next(random *rand.Rand) stampWorld {
	if random.IntN(4) == 0 {
		w.backends.count = 2 + random.IntN(4)
		return w
	}
	if random.IntN(6) == 0 {
		w.cordon = newCordon([]int{random.IntN(6), random.IntN(6)}[:random.IntN(3)])
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
func (w stampWorld) show(r *tableStore, version int, odd bool, random *rand.Rand) {
	r.setBackends(backendSet{ordinalRange: w.backends, listedCordon: w.cordon})
	var all []sourceContent
	for i, data := range w.data {
		src := contentOf(fmt.Sprint("source-", i), fmt.Sprint(version), data)
		if odd {
			spelled := map[string]string{}
			for namespace, value := range data {
				spelled[namespace] = " " + value + "\n"
			}
			src = contentOf(fmt.Sprint("other-", i), fmt.Sprint("v", version), spelled)
		}
		all = append(all, src)
	}
	if odd {
		random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	}
	r.update(all...)
}

// Two routers see one history of edits, of which each misses some versions, or starts
// later. Whenever their stamps are equal, so are their owners of
// all namespaces; what they see last alone decides the content.
func TestStampsAgree(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	seen := map[string]int{}
	quiet := slog.New(slog.DiscardHandler)
	for range 400 {
		w := stampWorld{backends: ordinalRange{count: 4}}
		for i := range w.data {
			w.data[i] = map[string]string{}
		}
		start := func() *tableStore {
			return &tableStore{statefulSet: "backend", log: quiet, onSwap: func() {}}
		}
		routers := []*tableStore{start(), start()}
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
		ownerA, okA := a.ownerOf(namespace)
		ownerB, okB := b.ownerOf(namespace)
		owners = owners && ownerA == ownerB && okA == okB
	}
	if same && a.ownersHash != b.ownersHash {
		t.Fatalf("of the same sources and backends the stamps are %s and %s", a.stamp, b.stamp)
	}
	if stays := a.keptHash != 0; a.stamp == b.stamp {
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
	} else if a.ownersHash == b.ownersHash && !owners {
		seen["other kept, other owners"]++
	}
}

// largeMap is the JSON of the n-th ConfigMap of overrides, in edge. Its version
// gives all namespaces another backend of 16 than the version before.
func largeMap(n, overrides, version int) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"kind":"ConfigMap","metadata":{"name":"routes-%02d","namespace":"edge","uid":"u%d","resourceVersion":"%d"},"data":{`, n, n, version)
	for i := range overrides {
		fmt.Fprintf(&b, `"tenant-%07d":"backend-%d",`, n*overrides+i, (i+version)%16)
	}
	b.Truncate(b.Len() - 1)
	b.WriteString("}}")
	return b.Bytes()
}

// largeList is a LIST of them.
func largeList(objects, overrides int) []byte {
	var items [][]byte
	for n := range objects {
		items = append(items, largeMap(n, overrides, 1))
	}
	return fmt.Appendf(nil, `{"kind":"ConfigMapList","metadata":{"resourceVersion":"1"},"items":[%s]}`, bytes.Join(items, []byte(",")))
}

// largeMaps is a router with the overrides of that many ConfigMaps. It has 16
// backends.
func largeMaps(t testing.TB, objects, overrides int) (*configMaps, *tableStore) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	r := &tableStore{statefulSet: "backend", backends: backendSet{ordinalRange: ordinalRange{count: 16}}, log: log, onSwap: func() {}}
	var c *configMaps
	r.addSource(false, func(update func(...sourceContent)) overrideSource {
		c = newConfigMaps(kubeClient{}, "edge", nil, "a=b", "", "", update, log)
		r.reportChange = c.reportChange
		return c
	})
	_, items, err := decodeList[configMap](bytes.NewReader(largeList(objects, overrides)), maxList)
	if err != nil {
		t.Fatal(err)
	}
	c.watchers[0].setObjects(fakeSet(items...))
	if got := r.table().overrides; got != objects*overrides {
		t.Fatalf("%d overrides, want %d", got, objects*overrides)
	}
	return c, r
}

// BenchmarkSwap is what an event takes that changes the backends of all
// overrides of one ConfigMap, from its bytes to the newest table, with what
// the log and the Events say.
func BenchmarkSwap(b *testing.B) {
	for _, size := range []struct{ objects, overrides int }{{1, 10}, {1, 10_000}, {1, 40_000}, {30, 33_334}} {
		b.Run(fmt.Sprintf("objects=%d/overrides=%d", size.objects, size.objects*size.overrides), func(b *testing.B) {
			c, r := largeMaps(b, size.objects, size.overrides)
			var events [2][]byte
			for i := range events {
				events[i] = fmt.Appendf(nil, `{"type":"MODIFIED","object":%s}`, largeMap(0, size.overrides, i+2))
			}
			b.ReportAllocs()
			swaps := r.swaps.Load()
			n := 0
			for b.Loop() {
				if err := c.watchers[0].applyEvent(json.NewDecoder(bytes.NewReader(events[n%2]))); err != nil {
					b.Fatal(err)
				}
				n++
			}
			if got := r.swaps.Load() - swaps; got != int64(n) {
				b.Fatalf("%d swaps of %d events", got, n)
			}
		})
	}
}

func TestTableChanges(t *testing.T) {
	type counts struct{ added, changed, removed int }
	for name, tt := range map[string]struct {
		old, new string // old is "-" for no table
		want     counts
	}{
		"first":          {"-", "a=backend-0 b=backend-1", counts{added: 2}},
		"same":           {"a=backend-0", "a=backend-0", counts{}},
		"one of each":    {"a=backend-0 b=backend-1 c=backend-2", "b=backend-2 c=backend-2 d=backend-3", counts{1, 1, 1}},
		"all removed":    {"a=backend-0 b=backend-1", "", counts{removed: 2}},
		"kept":           {"a=backend-1", "a=junk", counts{}},
		"bad, was hash":  {"", "a=junk", counts{}},
		"mended":         {"a=junk", "a=backend-1", counts{changed: 1}},
		"first, refused": {"-", "a=junk", counts{added: 1}},
	} {
		var old *table
		if tt.old != "-" {
			old = tableOf(4, pairs(tt.old), nil)
		}
		var got counts
		for _, c := range tableOf(4, pairs(tt.new), old).changes(old) {
			got = counts{got.added + c.added, got.changed + c.changed, got.removed + c.removed}
		}
		if got != tt.want {
			t.Errorf("%s: %+v, want %+v", name, got, tt.want)
		}
	}
}
