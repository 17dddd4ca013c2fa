package main

import (
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"os"
	"slices"
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

// cordonOf returns n buckets of which these are cordoned.
func cordonOf(n int, ordinals ...int) []bool {
	cordoned := make([]bool, n)
	for _, ordinal := range ordinals {
		cordoned[ordinal] = true
	}
	return cordoned
}

// randomCordon returns n buckets of which some are cordoned, but not those in open.
func randomCordon(random *rand.Rand, n int, open ...int) []bool {
	cordoned := make([]bool, n)
	for b := range cordoned {
		cordoned[b] = random.IntN(2) == 0 && !slices.Contains(open, b)
	}
	return cordoned
}

// cordonsFile pins the owner of the namespaces of ownersFile with several cordons.
const cordonsFile = "testdata/owners-cordoned.txt"

// TestCordonedOwnersArePinned: see ownersFile.
func TestCordonedOwnersArePinned(t *testing.T) {
	cordons := [][]bool{cordonOf(2, 0), cordonOf(4, 2), cordonOf(4, 2, 3), cordonOf(5, 0, 4),
		cordonOf(8, 1, 2, 5, 6), cordonOf(16, 15), cordonOf(100, 0, 50, 99)}
	b, err := os.ReadFile(cordonsFile)
	must(t, err)
	pinned := 0
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if strings.HasPrefix(line, "#") {
			continue
		}
		if len(fields) != 1+len(cordons) {
			t.Fatalf("line %q, want a namespace and %d owners", line, len(cordons))
		}
		pinned++
		for i, cordoned := range cordons {
			got := strconv.Itoa(bucketPast(hash64(fields[0]), cordoned))
			if got != fields[1+i] {
				t.Errorf("%s with %v is in %s, pinned is %s", fields[0], cordoned, got, fields[1+i])
			}
		}
	}
	wantEqual(t, "pinned namespaces", pinned, 1000)
}

// Without a cordon, bucketPast is bucket. With one, it is a bucket that is not cordoned,
// and bucket's own if that is not.
func TestBucketPastIsBucket(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, namespace := range manyNamespaces(2000) {
		n := 1 + random.IntN(40)
		b := bucket(namespace, n)
		if got := bucketPast(hash64(namespace), make([]bool, n)); got != b {
			t.Fatalf("%s of %d: %d, want %d", namespace, n, got, b)
		}
		cordoned := randomCordon(random, n, random.IntN(n))
		got := bucketPast(hash64(namespace), cordoned)
		if cordoned[got] || !cordoned[b] && got != b {
			t.Fatalf("%s with %v: %d, bucket is %d", namespace, cordoned, got, b)
		}
	}
}

// A further cordon moves the namespaces of that bucket only, and its end moves exactly
// these back, whatever else is cordoned.
func TestCordonMovesItsNamespacesOnly(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for _, namespace := range manyNamespaces(5000) {
		n := 2 + random.IntN(30)
		b, open := random.IntN(n), random.IntN(n)
		if b == open {
			continue
		}
		cordoned := randomCordon(random, n, b, open)
		before := bucketPast(hash64(namespace), cordoned)
		cordoned[b] = true
		after := bucketPast(hash64(namespace), cordoned)
		if moved := before != after; moved != (before == b) {
			t.Fatalf("%s moves from %d to %d when %d is cordoned too: %v", namespace, before, after, b, cordoned)
		}
	}
}

// From n to n+1 buckets, a namespace moves to the new one or not at all, and not at all if
// the new one is cordoned.
func TestCordonGrowth(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	toNew, stays := 0, 0
	for _, namespace := range manyNamespaces(5000) {
		n := 1 + random.IntN(30)
		cordoned := randomCordon(random, n, random.IntN(n))
		before := bucketPast(hash64(namespace), cordoned)
		grown := append(slices.Clone(cordoned), false)
		switch bucketPast(hash64(namespace), grown) {
		case n:
			toNew++
		case before:
			stays++
		default:
			t.Fatalf("%s moves between old buckets, from %d, with %v", namespace, before, cordoned)
		}
		grown[n] = true
		if after := bucketPast(hash64(namespace), grown); after != before {
			t.Fatalf("%s moves from %d to %d as a cordoned bucket comes: %v", namespace, before, after, grown)
		}
	}
	if toNew == 0 || stays == 0 {
		t.Errorf("%d move to the new bucket, %d stay", toNew, stays)
	}
}

// The buckets that are not cordoned have even shares, and so have those of one that is.
func TestCordonBalance(t *testing.T) {
	namespaces := manyNamespaces(200_000)
	for name, cordoned := range map[string][]bool{
		"one of four": cordonOf(4, 2), "the first": cordonOf(4, 0), "the last": cordonOf(4, 3),
		"two of five": cordonOf(5, 0, 3), "half": cordonOf(8, 1, 3, 5, 7), "all but three": cordonOf(9, 0, 1, 3, 4, 5, 7),
	} {
		t.Run(name, func(t *testing.T) {
			all, moved := make([]int, len(cordoned)), make([]int, len(cordoned))
			total, from := 0, slices.Index(cordoned, true)
			for _, namespace := range namespaces {
				b := bucketPast(hash64(namespace), cordoned)
				if all[b]++; bucket(namespace, len(cordoned)) == from {
					moved[b]++
					total++
				}
			}
			open := 0
			for _, is := range cordoned {
				if !is {
					open++
				}
			}
			for b, is := range cordoned {
				if is {
					wantEqual(t, "share of a cordoned bucket", all[b], 0)
					continue
				}
				wantShare(t, all[b], len(namespaces)/open)
				wantShare(t, moved[b], total/open)
			}
		})
	}
}

// wantShare checks that a share is within 5 % of the mean.
func wantShare(t *testing.T, share, mean int) {
	t.Helper()
	if off := float64(share)/float64(mean) - 1; math.Abs(off) > 0.05 {
		t.Errorf("a share of %d, %+.1f %% off %d, want 5 %% at most", share, 100*off, mean)
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
