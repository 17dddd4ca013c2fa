package main

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// lookupTable is a router of which the table has the given number of backends
// and of overrides, for namespaces as manyNamespaces makes them.
func lookupTable(t testing.TB, backends, overrides int) *router {
	t.Helper()
	data := make(map[string]string, overrides)
	for i, namespace := range manyNamespaces(overrides) {
		data[namespace] = backendName("backend", i%backends)
	}
	r := &router{statefulSet: "backend", backends: ordinals{count: backends}, log: slog.New(slog.DiscardHandler), swapped: func() {}}
	r.update(entries{data: pack(data)})
	return r
}

// shuffled returns the namespaces in random order, in memory of their own that
// is in this order too: when a request is routed, its own bytes were just read,
// and those of the table's keys were not.
func shuffled(namespaces []string) []string {
	namespaces = slices.Clone(namespaces)
	rng := rand.New(rand.NewPCG(3, 4))
	rng.Shuffle(len(namespaces), func(i, j int) { namespaces[i], namespaces[j] = namespaces[j], namespaces[i] })
	all := strings.Join(namespaces, "")
	for i, namespace := range namespaces {
		namespaces[i], all = all[:len(namespace)], all[len(namespace):]
	}
	return namespaces
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
			if got := testing.AllocsPerRun(1000, func() { r.table().owner(namespace) }); got != 0 {
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
		}
	}
}

// lookUp asks for the owners of the namespaces in random order.
func lookUp(b *testing.B, r *router, namespaces []string) {
	namespaces = shuffled(namespaces)
	b.ReportAllocs()
	sum, next := 0, 0
	for b.Loop() {
		owner, _ := r.table().owner(namespaces[next])
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
	f.Add("\xff", "backend-\xff", "", strings.Repeat("x", 100), "backend-3", byte(2))
	f.Fuzz(func(t *testing.T, a, valueA, b, valueB, before string, more byte) {
		count := 1 + int(more)
		old := tableOf(4, map[string]string{a: before}, nil)
		data := map[string]string{a: valueA, b: valueB}
		for _, old := range []*table{nil, old} {
			table := tableOf(count, data, old)
			for namespace, value := range data {
				wantInForceOrRejected(t, table, namespace, value)
			}
			for _, namespace := range []string{a, b, "another"} {
				if owner, ok := table.owner(namespace); ok != (owner != refused) || ok && (owner < 0 || owner >= count) {
					t.Errorf("owner of %q is %d, %v with %d backends", namespace, owner, ok, count)
				}
			}
		}
	})
}

func wantInForceOrRejected(t *testing.T, table *table, namespace, value string) {
	t.Helper()
	ordinal, pinned := overridesOf(table)[namespace]
	bad, rejected := rejectedOf(table)[namespace[:min(maxName, len(namespace))]]
	switch {
	case !rejected && (!pinned || table.name(ordinal) != strings.TrimSpace(value)):
		t.Errorf("%q: %q is in force as %d, %v", namespace, value, ordinal, pinned)
	case !rejected:
		return
	case pinned != (bad.Kept != "hash" && bad.Kept != "nothing"):
		t.Errorf("%q: %q is rejected as %+v and in the table is %v", namespace, value, bad, pinned)
	case !utf8.ValidString(bad.Value) || bad.Want == "":
		t.Errorf("%q: %q is rejected as %+v", namespace, value, bad)
	case namespaceFault(namespace) == "" && table.name(0) == strings.TrimSpace(value):
		t.Errorf("%q: %q is rejected as %+v, want it in force", namespace, value, bad)
	}
}
