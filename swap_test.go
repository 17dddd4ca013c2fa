package main

import (
	"fmt"
	"log/slog"
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
		r.update(entries{version: version})
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
		r.resize(step.backends)
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
		r.resize(step.backends)
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
