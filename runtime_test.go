package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestReadBuild: the embedded version of a build without version control counts if it is
// whole, else what the go command says, which knows no commit of a test.
func TestReadBuild(t *testing.T) {
	without := readBuild("")
	if without.version == "" || without.commit == "" {
		t.Errorf("%+v without an embedded version, want no empty field", without)
	}
	for embedded, want := range map[string]buildInfo{
		"v1.2.3 0123abcd\n": {"v1.2.3", "0123abcd"},
		"v1.2.3 \n":         without,
		"a b c":             without,
	} {
		if got := readBuild(embedded); got != want {
			t.Errorf("%q is %+v, want %+v", embedded, got, want)
		}
	}
}

// TestRuntimeMetrics: this version of Go has all that is read from runtime/metrics, and
// the values fit each other.
func TestRuntimeMetrics(t *testing.T) {
	var known []string
	for _, d := range metrics.All() {
		if d.Kind == metrics.KindUint64 {
			known = append(known, d.Name)
		}
	}
	for _, r := range runtimeMetrics() {
		for _, key := range r.keys {
			if !slices.Contains(known, key) {
				t.Errorf("%s is read from %s, which runtime/metrics does not have", r.name, key)
			}
		}
	}
	v := expositionOf(t, writeRuntimeMetrics).values
	inuse, idle, all := v["go_memstats_heap_inuse_bytes"], v["go_memstats_heap_idle_bytes"], v["go_memstats_heap_sys_bytes"]
	if inuse+idle != all || v["go_memstats_heap_alloc_bytes"] > inuse || all > v["go_memstats_sys_bytes"] || inuse == 0 {
		t.Errorf("the heap has %v bytes with objects, %v without, %v in all, of %v of Go: %v", inuse, idle, all, v["go_memstats_sys_bytes"], v)
	}
	objects := v["go_memstats_mallocs_total"] - v["go_memstats_frees_total"]
	if objects != v["go_memstats_heap_objects"] {
		t.Errorf("%v objects were allocated and not freed, %v are in the heap", objects, v["go_memstats_heap_objects"])
	}
}

func TestProcessMetrics(t *testing.T) {
	write := func(m metricsWriter) { writeProcessMetrics(m, time.Unix(1e9, 5e8)) }
	before := expositionOf(t, write).values
	eventually(t, "the CPU time of the process rises", true, func() bool {
		return expositionOf(t, write).values["process_cpu_seconds_total"] > before["process_cpu_seconds_total"]
	})
	virtual, resident := before["process_virtual_memory_bytes"], before["process_resident_memory_bytes"]
	if before["process_start_time_seconds"] != 1e9+.5 || resident < 1<<20 || virtual < resident {
		t.Errorf("want the start at 1e9 s, and at least 1 MiB of memory: %v", before)
	}
}

// TestFreeMemory: memory that handshakes took is given back once they pause, and only then.
func TestFreeMemory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var begun atomic.Int64
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go freeMemory(ctx, begun.Load)
		collected := func() uint32 {
			synctest.Wait()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.NumForcedGC / 2 // returnHeap's and that of debug.FreeOSMemory
		}
		steps := []struct {
			open int // in one freeMemoryInterval
			want uint32
		}{
			{minRequestsToFree - 1, 0}, {0, 0}, // too few
			{maxCalmRequests + 1, 0}, {1, 1}, // calm after enough
			{0, 0}, {minRequestsToFree, 0}, {minRequestsToFree, 0}, {maxCalmRequests, 1}, {0, 0},
		}
		time.Sleep(freeMemoryInterval / 2)
		for i, step := range steps {
			before := collected()
			begun.Add(int64(step.open))
			time.Sleep(freeMemoryInterval)
			if got := collected() - before; got != step.want {
				t.Errorf("step %d, %d handshakes: %d collections, want %d", i, step.open, got, step.want)
			}
		}
	})
}

// TestGiveBack: what the heap has free goes back to the system, and the limit of memory is
// what it was. That ends when the router is busy again, or stops.
func TestGiveBack(t *testing.T) {
	const garbage = 32 << 20
	waste := func() {
		var all [][]byte
		for range garbage >> 14 {
			all = append(all, make([]byte, 1<<14))
		}
		runtime.KeepAlive(all)
	}
	limit := debug.SetMemoryLimit(1 << 40)
	defer debug.SetMemoryLimit(limit)
	stopped, stop := context.WithCancel(t.Context())
	stop()
	for name, test := range map[string]struct {
		ctx  context.Context
		calm bool
		all  bool // is given back
	}{
		"calm":    {t.Context(), true, true},
		"busy":    {t.Context(), false, false},
		"stopped": {stopped, true, false},
	} {
		// On a loaded machine the runtime may give back more by itself meanwhile, or have
		// freed more than it has given back.
		eventually(t, name+": all that is free is given back", test.all, func() bool {
			waste()
			returnHeap(test.ctx, func() bool { return test.calm })
			_, free := goMemory()
			return free < garbage/4
		})
		if got := debug.SetMemoryLimit(-1); got != 1<<40 {
			t.Errorf("%s: the limit of memory is %d, want that of before", name, got)
		}
	}
}
