package main

import (
	"fmt"
	"hash/fnv"
	"math"
	"os"
	"strconv"
	"strings"
	"testing"
)

// ownersFile pins the owner of 1,000 namespaces for several numbers of backends.
// It is never written again: a release with other owners would move tenants, and
// routers of two releases would give a namespace two owners (invariant 2).
const ownersFile = "testdata/owners.txt"

func TestOwnersArePinned(t *testing.T) {
	counts := []int{1, 2, 3, 4, 5, 8, 16, 100}
	b, err := os.ReadFile(ownersFile)
	must(t, err)
	pinned := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if strings.HasPrefix(line, "#") {
			continue
		}
		if len(fields) != 1+len(counts) || expectedPathNamespace(fields[0]) != "" {
			t.Fatalf("line %q, want a namespace and %d owners", line, len(counts))
		}
		pinned[fields[0]] = true
		for i, n := range counts {
			if got := strconv.Itoa(bucket(fields[0], n)); got != fields[1+i] {
				t.Errorf("bucket(%q, %d) = %s, pinned is %s", fields[0], n, got, fields[1+i])
			}
		}
	}
	wantEqual(t, "pinned namespaces", len(pinned), 1000)
}

func TestBucketGrowth(t *testing.T) {
	namespaces := manyNamespaces(100_000)
	for _, n := range []int{1, 2, 3, 4, 5, 7, 8, 16, 20} {
		t.Run(fmt.Sprintf("%d to %d", n, n+1), func(t *testing.T) {
			moved := 0
			for _, namespace := range namespaces {
				before, after := bucket(namespace, n), bucket(namespace, n+1)
				if before == after {
					continue
				}
				moved++
				if after != n {
					t.Fatalf("%s moves from %d to %d, want %d only", namespace, before, after, n)
				}
			}
			want := float64(len(namespaces)) / float64(n+1)
			if off := float64(moved)/want - 1; math.Abs(off) > 0.05 {
				t.Errorf("%d namespaces move, %+.1f %% off %.0f, want 5 %% at most", moved, 100*off, want)
			}
		})
	}
}

func TestBucketBalance(t *testing.T) {
	namespaces := manyNamespaces(100_000)
	for _, n := range []int{1, 2, 3, 4, 5, 8, 16} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			shares := make([]int, n)
			for _, namespace := range namespaces {
				shares[bucket(namespace, n)]++
			}
			want := float64(len(namespaces)) / float64(n)
			for ordinal, share := range shares {
				if off := float64(share)/want - 1; math.Abs(off) > 0.04 {
					t.Errorf("backend %d has %d namespaces, %+.1f %% off %.0f, want 4 %% at most", ordinal, share, 100*off, want)
				}
			}
		})
	}
}

func TestBucketIsInRange(t *testing.T) {
	for _, namespace := range append(manyNamespaces(1000), "", "a", "\x00", strings.Repeat("z", 253)) {
		for _, n := range []int{1, 2, 3, 1000, 1 << 20} {
			if got := bucket(namespace, n); got < 0 || got >= n {
				t.Fatalf("bucket(%q, %d) = %d", namespace, n, got)
			}
		}
	}
}

func TestFNV1aIsTheStandardOne(t *testing.T) {
	for _, s := range append(manyNamespaces(1000), "", "a", "foobar", "\xff\x00é", strings.Repeat("z", 253)) {
		h := fnv.New64a()
		h.Write([]byte(s))
		if got, want := fnv1a(s), h.Sum64(); got != want {
			t.Fatalf("fnv1a(%q) = %#x, hash/fnv has %#x", s, got, want)
		}
	}
}

func BenchmarkBucket(b *testing.B) {
	namespaces := shuffled(manyNamespaces(100_000)) // so many that the processor cannot learn their branches
	for _, n := range []int{4, 16, 100} {
		b.Run(fmt.Sprintf("backends=%d", n), func(b *testing.B) {
			b.ReportAllocs()
			sum, next := 0, 0
			for b.Loop() {
				sum += bucket(namespaces[next], n)
				if next++; next == len(namespaces) {
					next = 0
				}
			}
			if sum < 0 {
				b.Fatal("a bucket below 0")
			}
		})
	}
}
