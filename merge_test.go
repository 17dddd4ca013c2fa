package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"
)

// mergeModel says where namespaces are in plain words: hashed or not there,
// refused, or an ordinal.
type mergeModel map[string]int

// next is the model after the sources were read, in order, with so many
// backends; m is nil before the first.
func (m mergeModel) next(sources []map[string]string, backends int) (after mergeModel, conflicts int) {
	stays := func(namespace string) int {
		was, pinned := m[namespace]
		switch {
		case m == nil || pinned && (was == refused || was >= backends):
			return refused
		case !pinned:
			return hashed
		}
		return was
	}
	after = mergeModel{}
	odd := map[string]bool{} // stays where it was
	for _, data := range sources {
		for namespace, value := range data {
			ordinal := unreadable
			for n := range backends {
				if value == backendName("backend", n) {
					ordinal = n
				}
			}
			other, there := after[namespace]
			switch {
			case odd[namespace]:
			case ordinal == unreadable:
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
	maps.DeleteFunc(after, func(_ string, ordinal int) bool { return ordinal == hashed })
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
			changed := random.IntN(3)
			sources[changed] = map[string]string{}
			for range random.IntN(6) {
				sources[changed][fmt.Sprint("ns-", random.IntN(8))] = fmt.Sprint("backend-", random.IntN(6))
			}
			if random.IntN(5) == 0 {
				backends = 2 + random.IntN(4)
			}
			var all []entries
			for i, data := range sources {
				all = append(all, entries{source: fmt.Sprint("source-", i), version: fmt.Sprint(step), data: pack(data)})
			}
			before := model
			var conflicts int
			model, conflicts = model.next(sources, backends)
			next := newTable("backend", ordinals{count: backends}, all, old)
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
	for i := range next.index.cells {
		s := &next.index.cells[i]
		if s.part == 0 {
			continue
		}
		key := spread(string(next.index.record(s).namespace))
		if next.stays(s) {
			content, kept = content+key*weight(unreadable), kept+key*weight(next.means(s))
		} else {
			content += key * weight(next.means(s))
		}
	}
	content += spread(fmt.Sprintf("hash 1, backends %s", next.backends))
	if next.content != fmix64(content) || next.kept != fmix64(kept) {
		t.Fatalf("stamp %s, want %016x.%016x", next.stamp, fmix64(content), fmix64(kept))
	}
}

// wantCounts checks what a table says of its changes. With every source read
// anew a namespace of several sources may be counted more than once.
func wantCounts(t *testing.T, next, old *table, before, after mergeModel) {
	t.Helper()
	var sum change
	for _, c := range next.changes(old) {
		sum.added, sum.changed, sum.removed = sum.added+c.added, sum.changed+c.changed, sum.removed+c.removed
	}
	var want change
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
