package main

import (
	"fmt"
	"maps"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

// tableOf makes a table of one source.
func tableOf(backends int, data map[string]string, old *table) *table {
	return newTable("backend", ordinals{count: backends}, []entries{{source: "test", version: "1", data: pack(data)}}, old)
}

// overridesOf are the namespaces of which the table does not ask the hash.
func overridesOf(t *table) map[string]int {
	all := map[string]int{}
	for _, part := range t.index.parts {
		for r := range part.all() {
			if ordinal := t.pinned(r); ordinal != hashed {
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
	const junk = 1 << 20
	const bad = refused
	tests := map[string]struct {
		value string
		want  int
	}{
		"plain":                  {"backend-2", 2},
		"first":                  {"backend-0", 0},
		"last":                   {"backend-3", 3},
		"newline at the end":     {"backend-2\n", 2},
		"spaces around":          {" \t backend-2\r\n ", 2},
		"unknown name":           {"bakend-2", bad},
		"ordinal out of range":   {"backend-9", bad},
		"just out of range":      {"backend-4", bad},
		"leading zero":           {"backend-02", bad},
		"zero twice":             {"backend-00", bad},
		"plus sign":              {"backend-+1", bad},
		"minus sign":             {"backend--1", bad},
		"minus zero":             {"backend--0", bad},
		"no ordinal":             {"backend-", bad},
		"only the prefix":        {"backend", bad},
		"only the ordinal":       {"2", bad},
		"empty":                  {"", bad},
		"spaces only":            {" \n", bad},
		"space within":           {"backend- 2", bad},
		"two names":              {"backend-1 backend-2", bad},
		"upper case":             {"Backend-2", bad},
		"other prefix":           {"server-2", bad},
		"prefix of the prefix":   {"mybackend-2", bad},
		"address":                {"backend-2.headless:9000", bad},
		"hexadecimal":            {"backend-0x2", bad},
		"underscore":             {"backend-0_2", bad},
		"exponent":               {"backend-1e0", bad},
		"other digits":           {"backend-２", bad},
		"very long number":       {"backend-" + strings.Repeat("9", 400), bad},
		"long number around 2^n": {"backend-18446744073709551618", bad},
		"1 MiB of junk":          {strings.Repeat("<", junk), bad},
		"1 MiB of spaces":        {strings.Repeat(" ", junk), bad},
		"invalid UTF-8":          {"backend-\xff", bad},
		"NUL":                    {"backend-2\x00", bad},
		"JSON":                   {`"backend-2"`, bad},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			table := tableOf(4, map[string]string{"ns-01": tt.value}, nil)
			got, ok := table.owner("ns-01")
			if got != tt.want || ok != (tt.want != refused) {
				t.Errorf("owner %d, %v; want %d", got, ok, tt.want)
			}
			bad, rejected := rejectedOf(table)["ns-01"]
			if rejected != (tt.want == refused) {
				t.Errorf("rejected is %v with owner %d", rejected, tt.want)
			}
			if rejected && (bad.Want != "backend-0 to backend-3" || bad.Kept != "refused") {
				t.Errorf("rejected with want %q, kept %q", bad.Want, bad.Kept)
			}
			if !utf8.ValidString(bad.Value) || len(bad.Value) > 3*maxShownValue+len("…") {
				t.Errorf("the value is shown as %d bytes %.200q", len(bad.Value), bad.Value)
			}
		})
	}
}

// TestTableKeeps: what cannot be read changes nothing (invariant 3).
// TestTableReadsAll: entries are read by ranges of hashes, and none is left out.
func TestTableReadsAll(t *testing.T) {
	const each = 1000
	a, b := map[string]string{}, map[string]string{}
	for i := range each {
		a[fmt.Sprintf("a-%d", i)], b[fmt.Sprintf("b-%d", i)] = "backend-1", "backend-2"
	}
	table := newTable("backend", ordinals{count: 4}, []entries{{source: "a", data: pack(a)}, {source: "b", data: pack(b)}}, nil)
	if table.overrides != 2*each {
		t.Errorf("%d overrides, want %d", table.overrides, 2*each)
	}
	for want, data := range map[int]map[string]string{1: a, 2: b} {
		for namespace := range data {
			if owner, ok := table.owner(namespace); owner != want || !ok {
				t.Fatalf("%s belongs to %d, want %d", namespace, owner, want)
			}
		}
	}
}

func TestTableKeeps(t *testing.T) {
	hashed := bucket("hashed", 4)
	tests := map[string]struct {
		namespace string
		old       *table
		backends  int
		owner     int
		why, kept string
	}{
		"no old table":              {"hashed", nil, 4, refused, whyRefused, "refused"},
		"old override":              {"pinned-3", seed(t), 4, 3, whyKept, "backend-3"},
		"old hash":                  {"hashed", seed(t), 4, hashed, whyKept, "hash"},
		"old refused":               {"refused", seed(t), 4, refused, whyRefused, "refused"},
		"old override out of range": {"pinned-3", seed(t), 3, refused, whyRefused, "refused"},
		"old override in range":     {"pinned-0", seed(t), 3, 0, whyKept, "backend-0"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			data := map[string]string{tt.namespace: "bakend-2", "other": "backend-1"}
			next := tableOf(tt.backends, data, tt.old)
			owner, ok := next.owner(tt.namespace)
			if owner != tt.owner || ok != (tt.owner != refused) {
				t.Errorf("owner %d, %v; want %d", owner, ok, tt.owner)
			}
			if why := next.explain(tt.namespace); why != tt.why {
				t.Errorf("why %q, want %q", why, tt.why)
			}
			want := rejection{namespace: tt.namespace, Source: "test", Value: "bakend-2", Want: "backend-0 to " + next.name(tt.backends-1), Kept: tt.kept}
			if got := rejectedOf(next); got[tt.namespace] != want || len(got) != 1 {
				t.Errorf("rejected %v, want only %v", got, want)
			}
			if owner, _ := next.owner("other"); owner != 1 {
				t.Errorf("the owner of the good entry is %d, want 1", owner)
			}
			again := tableOf(tt.backends, data, next)
			if owner, _ := again.owner(tt.namespace); owner != tt.owner {
				t.Errorf("the owner is %d after the same entries again, want %d", owner, tt.owner)
			}
		})
	}
}

// TestTableForgets: an entry that was removed, or mended, is as if it had never
// been wrong.
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
	table := tableOf(4, map[string]string{"a/b": "backend-1", "..": "backend-2", "ok": "backend-3"}, nil)
	if got, want := overridesOf(table), map[string]int{"ok": 3}; !maps.Equal(got, want) || table.overrides != 1 {
		t.Errorf("%d overrides %v, want %v", table.overrides, got, want)
	}
	for _, namespace := range []string{"a/b", ".."} {
		if bad := rejectedOf(table)[namespace]; bad.Want != namespaceFault(namespace) || bad.Kept != "nothing" {
			t.Errorf("%q is rejected as %+v", namespace, bad)
		}
	}
}

// A stamp is the same for what means the same, and another for what may not.
func TestStamp(t *testing.T) {
	of := func(first, count int, sources ...string) *table {
		var all []entries
		for i, data := range sources {
			all = append(all, entries{source: fmt.Sprint(i), version: data, data: pack(pairs(data))})
		}
		return newTable("backend", ordinals{first, count}, all, nil)
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
		newTable("backend", ordinals{0, 4}, []entries{{data: pack(map[string]string{"a": " backend-1\n", "b": "backend-2\t"})}}, nil),
	} {
		if other.stamp != same.stamp {
			t.Errorf("the stamp of %+v is %s, want %s", other.sources, other.stamp, same.stamp)
		}
	}
	host := &table{statefulSet: "backend", host: true, backends: ordinals{0, 4}}
	host.fill([]entries{{data: pack(pairs("a=backend-1 A=backend-2 b=backend-2 b.c=backend-3 D=junk"))}}, nil)
	if host.stamp != same.stamp || host.rejected[0] != 3 {
		t.Errorf("with keys that no host name has the stamp is %s, want %s; %d rejected", host.stamp, same.stamp, host.rejected[0])
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
	if junk.stamp != conflict.stamp || junk.kept == 0 {
		t.Errorf("the stamps are %s and %s, want the same: a stays in both", junk.stamp, conflict.stamp)
	}
	next := same.with(same.backends, conflict.sources)
	if next.content != junk.content || next.kept == junk.kept {
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
		content := tableOf(4, data, nil).content
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
	if owner, _ := next.owner("pinned-0"); owner != 1 {
		t.Errorf("the owner is %d after the source's map changed, want 1", owner)
	}
}

func TestTableChanges(t *testing.T) {
	type counts struct{ added, changed, removed int }
	tests := map[string]struct {
		old, new map[string]string
		want     counts
	}{
		"first":          {nil, map[string]string{"a": "backend-0", "b": "backend-1"}, counts{added: 2}},
		"same":           {map[string]string{"a": "backend-0"}, map[string]string{"a": "backend-0\n"}, counts{}},
		"one of each":    {map[string]string{"a": "backend-0", "b": "backend-1", "c": "backend-2"}, map[string]string{"b": "backend-2", "c": "backend-2", "d": "backend-3"}, counts{1, 1, 1}},
		"all removed":    {map[string]string{"a": "backend-0", "b": "backend-1"}, map[string]string{}, counts{removed: 2}},
		"kept":           {map[string]string{"a": "backend-1"}, map[string]string{"a": "junk"}, counts{}},
		"bad, was hash":  {map[string]string{}, map[string]string{"a": "junk"}, counts{}},
		"mended":         {map[string]string{"a": "junk"}, map[string]string{"a": "backend-1"}, counts{changed: 1}},
		"first, refused": {nil, map[string]string{"a": "junk"}, counts{added: 1}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var old *table
			if tt.old != nil {
				old = tableOf(4, tt.old, nil)
			}
			var got counts
			for _, c := range tableOf(4, tt.new, old).changes(old) {
				got = counts{got.added + c.added, got.changed + c.changed, got.removed + c.removed}
			}
			if got != tt.want {
				t.Errorf("%+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestNamespaceFault(t *testing.T) {
	tests := map[string]struct {
		namespace string
		ok        bool
	}{
		"one letter":     {"a", true},
		"all kinds":      {"a-Z_0.9", true},
		"dots":           {"...", true},
		"hidden":         {".a", true},
		"253":            {strings.Repeat("a", 253), true},
		"empty":          {"", false},
		"254":            {strings.Repeat("a", 254), false},
		"dot":            {".", false},
		"dot dot":        {"..", false},
		"slash":          {"a/b", false},
		"escaped":        {"a%2Fb", false},
		"space":          {"a b", false},
		"colon":          {"a:b", false},
		"at":             {"a@b", false},
		"letter, not us": {"ä", false},
		"NUL":            {"a\x00", false},
		"newline":        {"a\n", false},
		"invalid UTF-8":  {"a\xff", false},
		"below 0":        {"/", false},
		"above z":        {"{", false},
		"above Z":        {"[", false},
		"below a":        {"`", false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := namespaceFault(tt.namespace); (got == "") != tt.ok {
				t.Errorf("namespaceFault(%q) = %q", tt.namespace, got)
			}
		})
	}
}
