package main

import (
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestSourceID: only a ConfigMap has a Kubernetes namespace.
func TestSourceID(t *testing.T) {
	for want, id := range map[string]sourceID{
		"ConfigMap edge/routes": {"ConfigMap", "edge", "routes"},
		"directory /overrides":  {kind: "directory", name: "/overrides"},
		"database overrides":    {kind: "database", name: "overrides"},
	} {
		wantEqual(t, "the name of a source", id.String(), want)
	}
}

// contentOf is the content of a source of overrides.
func contentOf(source, version string, data map[string]string) sourceContent {
	return sourceContent{id: sourceID{name: source}, version: version, overrides: newOverrideSet(data)}
}

// tableOf makes a table of one source.
func tableOf(backends int, data map[string]string, old *table) *table {
	return newTable("backend", false, ordinalRange{count: backends}, nil, []sourceContent{contentOf("test", "1", data)}, old)
}

// overridesOf are the namespaces of which the table does not ask the hash.
func overridesOf(t *table) map[string]int {
	all := map[string]int{}
	for _, part := range t.index.sets {
		for r := range part.all() {
			if ordinal := t.overrideOrdinal(r); ordinal != byHash {
				all[string(r.namespace)] = ordinal
			}
		}
	}
	return all
}

// rejectedOf are the entries that the table has rejected, by namespace.
func rejectedOf(t *table) map[string]rejection {
	all := map[string]rejection{}
	for i := range t.sources {
		for bad := range t.rejections(i) {
			all[bad.namespace] = bad
		}
	}
	return all
}

// seed is the table before an update: 4 backends, each namespace named for how
// it is served.
func seed(t *testing.T) *table {
	t.Helper()
	return tableOf(4, map[string]string{"pinned-0": "backend-0", "pinned-3": "backend-3", "refused": "junk"}, nil)
}

func TestTableReadsEntries(t *testing.T) {
	valid := map[string]int{"backend-2": 2, "backend-0": 0, "backend-3": 3, "backend-2\n": 2, " \t backend-2\r\n ": 2}
	invalid := []string{"bakend-2", "backend-9", "backend-4", "backend-02", "backend-00", "backend-+1", "backend--1", "backend--0", "backend-",
		"backend", "2", "", " \n", "backend- 2", "backend-1 backend-2", "Backend-2", "server-2", "mybackend-2", "backend-2.headless:9000",
		"backend-0x2", "backend-0_2", "backend-1e0", "backend-２", "backend-" + strings.Repeat("9", 400), "backend-18446744073709551618",
		strings.Repeat("<", 1<<20), strings.Repeat(" ", 1<<20), "backend-\xff", "backend-2\x00", `"backend-2"`}
	for value, want := range valid {
		table := tableOf(4, map[string]string{"ns-01": value}, nil)
		if got, ok := table.ownerOf("ns-01"); got != want || !ok || len(rejectedOf(table)) != 0 {
			t.Errorf("%q: owner %d, %v, rejected %v; want %d", value, got, ok, rejectedOf(table), want)
		}
	}
	for _, value := range invalid {
		table := tableOf(4, map[string]string{"ns-01": value}, nil)
		bad, rejected := rejectedOf(table)["ns-01"]
		if got, ok := table.ownerOf("ns-01"); got != unresolved || ok || !rejected {
			t.Errorf("%.100q: owner %d, %v, rejected: %v; want it rejected", value, got, ok, rejected)
		}
		if bad.Expected != "backend-0 to backend-3" || bad.InForce != "unresolved" {
			t.Errorf("%.100q is rejected with %+v", value, bad)
		}
		if !utf8.ValidString(bad.Value) || len(bad.Value) > 3*maxQuotedValue+len("…") {
			t.Errorf("the value is shown as %d bytes %.200q", len(bad.Value), bad.Value)
		}
	}
}

// Entries are read by ranges of hashes, and none is left out.
func TestTableReadsAll(t *testing.T) {
	const each = 1000
	a, b := map[string]string{}, map[string]string{}
	for i := range each {
		a[fmt.Sprintf("a-%d", i)], b[fmt.Sprintf("b-%d", i)] = "backend-1", "backend-2"
	}
	table := newTable("backend", false, ordinalRange{count: 4}, nil, []sourceContent{contentOf("a", "1", a), contentOf("b", "1", b)}, nil)
	if table.overrides != 2*each {
		t.Errorf("%d overrides, want %d", table.overrides, 2*each)
	}
	for want, data := range map[int]map[string]string{1: a, 2: b} {
		for namespace := range data {
			if owner, ok := table.ownerOf(namespace); owner != want || !ok {
				t.Fatalf("%s belongs to %d, want %d", namespace, owner, want)
			}
		}
	}
}

// An entry that cannot be read changes nothing (invariant 3).
func TestTablePinsToPrevious(t *testing.T) {
	hashed := bucket("hashed", 4)
	tests := map[string]struct {
		namespace string
		old       *table
		backends  int
		owner     int
		why, kept string
	}{
		"no old table":              {"hashed", nil, 4, unresolved, whyUnresolved, "unresolved"},
		"old override":              {"pinned-3", seed(t), 4, 3, whyPrevious, "backend-3"},
		"old hash":                  {"hashed", seed(t), 4, hashed, whyPrevious, "hash"},
		"old refused":               {"refused", seed(t), 4, unresolved, whyUnresolved, "unresolved"},
		"old override out of range": {"pinned-3", seed(t), 3, unresolved, whyUnresolved, "unresolved"},
		"old override in range":     {"pinned-0", seed(t), 3, 0, whyPrevious, "backend-0"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			data := map[string]string{tt.namespace: "bakend-2", "other": "backend-1"}
			next := tableOf(tt.backends, data, tt.old)
			owner, ok := next.ownerOf(tt.namespace)
			if owner != tt.owner || ok != (tt.owner != unresolved) {
				t.Errorf("owner %d, %v; want %d", owner, ok, tt.owner)
			}
			if why := next.explain(tt.namespace); why != tt.why {
				t.Errorf("why %q, want %q", why, tt.why)
			}
			want := rejection{namespace: tt.namespace, Source: "test", Value: "bakend-2", Expected: "backend-0 to " + next.name(tt.backends-1), InForce: tt.kept}
			if got := rejectedOf(next); got[tt.namespace] != want || len(got) != 1 {
				t.Errorf("rejected %v, want only %v", got, want)
			}
			if owner, _ := next.ownerOf("other"); owner != 1 {
				t.Errorf("the owner of the good entry is %d, want 1", owner)
			}
			again := tableOf(tt.backends, data, next)
			if owner, _ := again.ownerOf(tt.namespace); owner != tt.owner {
				t.Errorf("the owner is %d after the same entries again, want %d", owner, tt.owner)
			}
		})
	}
}

// An entry that was removed, or mended, is as if it had never been wrong.
func TestTableForgets(t *testing.T) {
	bad := tableOf(4, map[string]string{"a": "junk", "b": "junk"}, nil)
	next := tableOf(4, map[string]string{"b": "backend-1"}, bad)
	want := tableOf(4, map[string]string{"b": "backend-1"}, nil)
	if !reflect.DeepEqual(next, want) {
		t.Errorf("table %+v, want %+v", next, want)
	}
	for namespace, why := range map[string]string{"a": whyHash, "b": whyOverride} {
		if got := next.explain(namespace); got != why {
			t.Errorf("why of %s is %q, want %q", namespace, got, why)
		}
	}
}

func TestTableRejectsNamespaces(t *testing.T) {
	table := tableOf(4, pairs("a/b=backend-1 ..=backend-2 ok=backend-3"), nil)
	if got, want := overridesOf(table), map[string]int{"ok": 3}; !maps.Equal(got, want) || table.overrides != 1 {
		t.Errorf("%d overrides %v, want %v", table.overrides, got, want)
	}
	for _, namespace := range []string{"a/b", ".."} {
		if bad := rejectedOf(table)[namespace]; bad.Expected != expectedPathNamespace(namespace) || bad.InForce != "none" {
			t.Errorf("%q is rejected as %+v", namespace, bad)
		}
	}
}

// TestTableReadsKeys: an override counts for the namespace that its key means, and only if
// the key is the one of that namespace.
func TestTableReadsKeys(t *testing.T) {
	table := tableOf(4, map[string]string{
		"my_x20room": "backend-3", "caf_xC3_xA9": "backend-3", "_x2E.data": "backend-3", "_x5Fx20": "backend-3", "_xc3": "backend-3",
		"_x41": "backend-1", "a b": "backend-1", "_xC3": "backend-1", "a_x2Fb": "backend-1", "a_x00": "backend-1", "a_x5Fb": "backend-1", "a_x2Eb": "backend-1",
		"doc_x3A42": "bakend-1",
	}, nil)
	for _, namespace := range []string{"my room", "café", "..data", "_x20", "_xc3"} {
		if owner, ok := table.ownerOf(namespace); owner != 3 || !ok || table.explain(namespace) != whyOverride {
			t.Errorf("%q has owner %d, %t by %s, want 3 by its override", namespace, owner, ok, table.explain(namespace))
		}
	}
	for namespace, want := range map[string]string{
		"A": "the key A", "a b": "the key a_x20b", "a_b": "the key a_b", "a.b": "the key a.b",
		"_xC3": expectedPathNamespace(""), "a_x2Fb": expectedPathNamespace(""), "a_x00": expectedPathNamespace(""),
	} {
		all := table.rejectionsOf(namespace)
		if len(all) != 1 || all[0].Expected != want || all[0].InForce != "none" || all[0].Key == "" {
			t.Errorf("%q: rejected are %+v, want one, expected %s", namespace, all, want)
		}
		if why := table.explain(namespace); why != whyHash {
			t.Errorf("why of %q is %s, want hash", namespace, why)
		}
	}
	text := table.rejectionsOf("doc:42")[0].String()
	if text != `doc:42: "bakend-1", expected backend-0 to backend-3` || len(rejectedOf(table)) != 8 {
		t.Errorf("%s; all rejected are %v", text, rejectedOf(table))
	}
}

// A stamp is the same for what means the same, and another for what may not.
func TestStamp(t *testing.T) {
	of := func(first, count int, sources ...string) *table {
		var all []sourceContent
		for i, data := range sources {
			all = append(all, contentOf(fmt.Sprint(i), data, pairs(data)))
		}
		return newTable("backend", false, ordinalRange{first, count}, nil, all, nil)
	}
	const want = "ecafc8b9dee0470d.0000000000000000" // changed only with hashVersion, or with what a stamp is of
	same := of(0, 4, "a=backend-1 b=backend-2")
	if same.stamp != want {
		t.Errorf("the stamp is %s, want %s", same.stamp, want)
	}
	for _, other := range []*table{
		of(0, 4, "b=backend-2", "", "a=backend-1"),
		of(0, 4, "a=backend-1 b=backend-2", "a=backend-1", "b=backend-2 a=backend-1"), // told twice
		of(0, 4, "a=backend-1 b=backend-2 ..=backend-3 a/b=junk"),                     // no namespaces
		newTable("backend", false, ordinalRange{0, 4}, nil, []sourceContent{{overrides: newOverrideSet(map[string]string{"a": " backend-1\n", "b": "backend-2\t"})}}, nil),
	} {
		if other.stamp != same.stamp {
			t.Errorf("the stamp of %+v is %s, want %s", other.sources, other.stamp, same.stamp)
		}
	}
	host := newTable("backend", true, ordinalRange{0, 4}, nil, []sourceContent{{overrides: newOverrideSet(pairs("a=backend-1 A=backend-2 b=backend-2 b.c=backend-3 D=junk"))}}, nil)
	if host.stamp != same.stamp || host.invalid[0] != 3 {
		t.Errorf("with keys that no host name has the stamp is %s, want %s; %d rejected", host.stamp, same.stamp, host.invalid[0])
	}
	all := map[string]bool{same.stamp: true}
	byHash := backendName("backend", bucket("c", 4))
	others := []*table{
		of(0, 4, "a=backend-2 b=backend-1"), of(0, 4, "a=backend-1"), of(0, 4, "b=backend-2"), of(0, 4), of(0, 5), of(1, 4), of(0, 1), of(0, 14),
		of(0, 5, "a=backend-1 b=backend-2"), of(1, 4, "a=backend-1 b=backend-2"),
		of(0, 4, "a=backend-1 b=backend-2 c="+byHash), // with other backends it would not be the hash
		of(0, 4, "a=backend-1 b=backend-2 c=junk"),
	}
	for _, other := range others {
		if all[other.stamp] {
			t.Errorf("the stamp %s is that of another", other.stamp)
		}
		all[other.stamp] = true
	}
	junk, conflict := of(0, 4, "a=junk b=backend-2"), of(0, 4, "a=backend-1 b=backend-2", "a=backend-3")
	if junk.stamp != conflict.stamp || junk.keptHash == 0 {
		t.Errorf("the stamps are %s and %s, want the same: a stays in both", junk.stamp, conflict.stamp)
	}
	next := newTable(same.statefulSet, same.fromHost, same.backends, nil, conflict.sources, same)
	if next.ownersHash != junk.ownersHash || next.keptHash == junk.keptHash {
		t.Errorf("the stamps are %s and %s, want the same content, and a kept where it is by one only", next.stamp, junk.stamp)
	}
}

// Of all ways to give six namespaces, named alike, to four backends, to none, or an
// entry that cannot be read, no two have the same content; nor the same lower half of
// it, but for as many as chance has.
func TestStampTellsAssignmentsApart(t *testing.T) {
	values := []string{"", "junk", "backend-0", "backend-1", "backend-2", "backend-3"}
	const namespaces, total = 6, 6 * 6 * 6 * 6 * 6 * 6
	whole, halves := map[uint64]bool{}, map[uint32]bool{}
	for n := range total {
		data := map[string]string{}
		for i, rest := 0, n; i < namespaces; i, rest = i+1, rest/len(values) {
			if value := values[rest%len(values)]; value != "" {
				data[fmt.Sprint("tenant-", i)] = value
			}
		}
		content := tableOf(4, data, nil).ownersHash
		whole[content], halves[uint32(content)] = true, true
	}
	if len(whole) != total || total-len(halves) > 5 { // chance has a quarter of a pair
		t.Errorf("%d contents and %d halves of %d", len(whole), len(halves), total)
	}
}

func TestTableIsImmutable(t *testing.T) {
	old := seed(t)
	data := map[string]string{"pinned-0": "backend-1", "pinned-3": "junk", "refused": "backend-2", "new": "x"}
	next := tableOf(2, data, old)
	data["pinned-0"] = "backend-3" // the source's map is not the table's
	if !reflect.DeepEqual(old, seed(t)) {
		t.Errorf("the old table is now %+v, want %+v", old, seed(t))
	}
	if owner, _ := next.ownerOf("pinned-0"); owner != 1 {
		t.Errorf("the owner is %d after the source's map changed, want 1", owner)
	}
}

// lookupTable is a router of which the table has the given number of backends
// and of overrides, for namespaces as manyNamespaces makes them.
func lookupTable(t testing.TB, backends, overrides int) *tableStore {
	t.Helper()
	data := make(map[string]string, overrides)
	for i, namespace := range manyNamespaces(overrides) {
		data[namespace] = backendName("backend", i%backends)
	}
	r := &tableStore{statefulSet: "backend", backends: backendSet{ordinalRange: ordinalRange{count: backends}}, log: slog.New(slog.DiscardHandler), onSwap: func() {}}
	r.update(sourceContent{overrides: newOverrideSet(data)})
	return r
}

// missing returns as many namespaces that no table has.
func missing(namespaces []string) []string {
	others := make([]string, len(namespaces))
	for i, namespace := range namespaces {
		others[i] = "no-" + strings.TrimPrefix(namespace, "ns-")
	}
	return others
}

func TestOwnerAllocatesNothing(t *testing.T) {
	r := lookupTable(t, 4, 1000)
	for name, namespace := range map[string]string{"hit": "ns-000500", "miss": "no-000500", "long": strings.Repeat("x", 253)} {
		t.Run(name, func(t *testing.T) {
			if got := testing.AllocsPerRun(1000, func() { r.table().ownerOf(namespace) }); got != 0 {
				t.Errorf("a lookup allocates %v times, want 0", got)
			}
		})
	}
}

// BenchmarkOwner is what a request's lookup costs. A miss is hashed, which takes
// longer the more backends there are.
func BenchmarkOwner(b *testing.B) {
	misses := missing(manyNamespaces(100_000)) // so many that the processor cannot learn their branches
	for _, backends := range []int{4, 16} {
		for _, overrides := range []int{0, 1_000, 100_000} {
			r := lookupTable(b, backends, overrides)
			name := fmt.Sprintf("backends=%d/overrides=%d/", backends, overrides)
			if hits := manyNamespaces(overrides); overrides > 0 {
				b.Run(name+"hit", func(b *testing.B) { lookUp(b, r, hits) })
			}
			b.Run(name+"miss", func(b *testing.B) { lookUp(b, r, misses) })
			r.setBackends(backendSet{ordinalRange: ordinalRange{count: backends}, listedCordon: cordon{2}})
			b.Run(name+"miss, one cordoned", func(b *testing.B) { lookUp(b, r, misses) })
		}
	}
}

// lookUp asks for the owners of the namespaces in random order.
func lookUp(b *testing.B, r *tableStore, namespaces []string) {
	namespaces = shuffled(namespaces)
	b.ReportAllocs()
	sum, next := 0, 0
	for b.Loop() {
		owner, _ := r.table().ownerOf(namespaces[next])
		sum += owner
		if next++; next == len(namespaces) {
			next = 0
		}
	}
	if sum < 0 {
		b.Fatal("an owner below 0")
	}
}

// FuzzTable: whatever the entries are, each is in force as it was written or
// rejected, and each namespace has an owner in range or is refused.
func FuzzTable(f *testing.F) {
	f.Add("ns-01", "backend-2", "ns-02", "bakend-2", "backend-1", byte(3))
	f.Add("..", "backend-0", "a/b", "backend-00", "", byte(0))
	f.Add("ns-01", "backend-9\n", "ns-01", "", "junk", byte(255))
	f.Add("a_x20b", "backend-1", "_x41", "backend-1", "backend-3", byte(4))
	f.Add("_x41", "backend-1", "_x5Fx41", "backend-1", "backend-3", byte(4))
	f.Add("\xff", "backend-\xff", "", strings.Repeat("x", 100), "backend-3", byte(2))
	f.Fuzz(func(t *testing.T, a, valueA, b, valueB, before string, more byte) {
		count := 1 + int(more)
		old := tableOf(4, map[string]string{a: before}, nil)
		data := map[string]string{a: valueA, b: valueB}
		for _, old := range []*table{nil, old} {
			table := tableOf(count, data, old)
			for key, value := range data {
				wantInForceOrRejected(t, table, key, value)
			}
			for _, namespace := range []string{a, b, "another"} {
				if owner, ok := table.ownerOf(namespace); ok != (owner != unresolved) || ok && (owner < 0 || owner >= count) {
					t.Errorf("owner of %q is %d, %v with %d backends", namespace, owner, ok, count)
				}
			}
		}
	})
}

func wantInForceOrRejected(t *testing.T, table *table, key, value string) {
	t.Helper()
	name, invalid := overrideNamespace([]byte(key))
	namespace := string(name)
	ordinal, pinned := -1, false
	var bad rejection
	if invalid != invalidForPath {
		ordinal, pinned = overridesOf(table)[namespace]
	}
	for one := range table.rejections(0) {
		if one.namespace == namespace && (one.InForce == "none") == (invalid == invalidForPath) {
			bad = one
		}
	}
	rejected := bad.Expected != ""
	switch {
	case !rejected && (!pinned || table.name(ordinal) != strings.TrimSpace(value)):
		t.Errorf("%q: %q is in force as %d, %v", namespace, value, ordinal, pinned)
	case !rejected:
		return
	case pinned != (bad.InForce != "hash" && bad.InForce != "none"):
		t.Errorf("%q: %q is rejected as %+v and in the table is %v", namespace, value, bad, pinned)
	case !utf8.ValidString(bad.Value) || bad.Expected == "":
		t.Errorf("%q: %q is rejected as %+v", namespace, value, bad)
	case expectedKey(key, false) == "" && table.name(0) == strings.TrimSpace(value):
		t.Errorf("%q: %q is rejected as %+v, want it in force", namespace, value, bad)
	}
}

// mergeModel says where namespaces are in plain words: hashed or not there,
// refused, or an ordinal.
type mergeModel map[string]int

// next is the model after the sources were read, in order, with so many
// backends, and with oldBackends before; m is nil before the first.
func (m mergeModel) next(sources []map[string]string, oldBackends, backends int) (after mergeModel, conflicts int) {
	stays := func(namespace string) int {
		was, pinned := m[namespace]
		if !pinned && m != nil {
			was = bucket(namespace, oldBackends)
		}
		switch {
		case m == nil || was == unresolved || was >= backends:
			return unresolved
		case was == bucket(namespace, backends):
			return byHash
		}
		return was
	}
	after = mergeModel{}
	odd := map[string]bool{} // stays where it was
	for _, data := range sources {
		for namespace, value := range data {
			ordinal := invalidValue
			for n := range backends {
				if value == backendName("backend", n) {
					ordinal = n
				}
			}
			other, there := after[namespace]
			switch {
			case odd[namespace]:
			case ordinal == invalidValue:
				odd[namespace] = true
			case there && other != ordinal:
				odd[namespace] = true
				conflicts++
			default:
				after[namespace] = ordinal
			}
			if odd[namespace] {
				after[namespace] = stays(namespace)
			}
		}
	}
	maps.DeleteFunc(after, func(_ string, ordinal int) bool { return ordinal == byHash })
	return after, conflicts
}

// TestMergeModel holds tables of three sources against the model, through many
// updates of one source each, and sometimes of the number of backends.
func TestMergeModel(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		var model mergeModel
		var old *table
		backends := 4
		sources := make([]map[string]string, 3)
		for step := range 20 {
			changed, oldBackends := random.IntN(3), backends
			sources[changed] = map[string]string{}
			for range random.IntN(6) {
				sources[changed][fmt.Sprint("ns-", random.IntN(8))] = fmt.Sprint("backend-", random.IntN(6))
			}
			if random.IntN(5) == 0 {
				backends = 2 + random.IntN(4)
			}
			var all []sourceContent
			for i, data := range sources {
				all = append(all, contentOf(fmt.Sprint("source-", i), fmt.Sprint(step), data))
			}
			before := model
			var conflicts int
			model, conflicts = model.next(sources, oldBackends, backends)
			next := newTable("backend", false, ordinalRange{count: backends}, nil, all, old)
			got := mergeModel(overridesOf(next))
			if !maps.Equal(got, model) || next.conflicts != conflicts || next.overrides != len(model) {
				t.Fatalf("step %d, %d backends, sources %v after %v:\n%d overrides %v, %d conflicts; want\n%v, %d",
					step, backends, sources, before, next.overrides, got, next.conflicts, model, conflicts)
			}
			wantCounts(t, next, old, before, model)
			wantSums(t, next)
			old = next
		}
	}
}

// wantSums holds content and kept against sums over all namespaces.
func wantSums(t *testing.T, next *table) {
	t.Helper()
	var content, kept uint64
	for i := range next.index.slots {
		s := &next.index.slots[i]
		if s.set == 0 {
			continue
		}
		key := hash64(string(next.index.overrideAt(s).namespace))
		if next.isKept(s) {
			content, kept = content+key*weight(invalidValue), kept+key*weight(next.ordinalOf(s))
		} else {
			content += key * weight(next.ordinalOf(s))
		}
	}
	content += hash64(fmt.Sprintf("hash 1, backends %s", next.backends))
	if next.ownersHash != fmix64(content) || next.keptHash != fmix64(kept) {
		t.Fatalf("stamp %s, want %016x.%016x", next.stamp, fmix64(content), fmix64(kept))
	}
}

// wantCounts checks what a table says of its changes. With every source read
// anew a namespace of several sources may be counted more than once.
func wantCounts(t *testing.T, next, old *table, before, after mergeModel) {
	t.Helper()
	var sum sourceChange
	for _, c := range next.changes(old) {
		sum.added, sum.changed, sum.removed = sum.added+c.added, sum.changed+c.changed, sum.removed+c.removed
	}
	var want sourceChange
	for namespace, ordinal := range after {
		if was, ok := before[namespace]; !ok {
			want.added++
		} else if was != ordinal {
			want.changed++
		}
	}
	for namespace := range before {
		if _, ok := after[namespace]; !ok {
			want.removed++
		}
	}
	for _, n := range [][2]int{{sum.added, want.added}, {sum.changed, want.changed}, {sum.removed, want.removed}} {
		if n[0] < n[1] || n[0] > 3*n[1] {
			t.Fatalf("%d added, %d changed, %d removed; want %d, %d, %d or up to three times that",
				sum.added, sum.changed, sum.removed, want.added, want.changed, want.removed)
		}
	}
}

// BenchmarkOwnerOfAMillion is a lookup among a million overrides.
func BenchmarkOwnerOfAMillion(b *testing.B) {
	_, r := largeMaps(b, 30, 33_334)
	names := make([]string, 1_000_000)
	for i := range names {
		names[i] = fmt.Sprintf("tenant-%07d", i)
	}
	b.Run("hit", func(b *testing.B) { lookUp(b, r, names) })
	for i := range names {
		names[i] = fmt.Sprintf("nobody-%07d", i)
	}
	b.Run("miss", func(b *testing.B) { lookUp(b, r, names) })
}
