package main

import (
	"cmp"
	"context"
	_ "embed"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"syscall"
	"time"
)

// embeddedVersion has the version and the commit of this binary if it was built from a copy
// without version control, as in a container. There the Dockerfile writes the file; in
// the repository it is empty.
//
//go:embed version.txt
var embeddedVersion string

// buildInfo is what this binary was built from.
type buildInfo struct {
	version string // "v1.2.3", a pseudo-version, "(devel)" or "unknown"
	commit  string // or "unknown"
}

// readBuild returns what embedded says, the version and the commit, else what the go command
// put into this binary (https://pkg.go.dev/runtime/debug#BuildSetting).
func readBuild(embedded string) buildInfo {
	if words := strings.Fields(embedded); len(words) == 2 {
		return buildInfo{version: words[0], commit: words[1]}
	}
	b := buildInfo{version: "unknown", commit: "unknown"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	b.version = cmp.Or(info.Main.Version, b.version)
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" {
			b.commit = setting.Value
		}
	}
	return b
}

// String returns the line that "router version" prints.
func (b buildInfo) String() string {
	return fmt.Sprintf("router %s, commit %s, %s, %s/%s",
		b.version, b.commit, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// version returns the version of this binary.
func version() string { return readBuild(embeddedVersion).version }

// runtimeMetric is a metric of Go's runtime, by the name that prometheus/client_golang
// gives it, which dashboards use.
type runtimeMetric struct {
	name, kind, help string
	keys             []string // whose sum it is (package runtime/metrics)
}

// runtimeMetrics are the metrics that writeRuntimeMetrics reads from runtime/metrics. There
// is no go_memstats_alloc_bytes: in OpenMetrics go_memstats_alloc_bytes_total is of the
// same family. go_memstats_heap_alloc_bytes has the same value.
func runtimeMetrics() []runtimeMetric {
	const heap = "/memory/classes/heap/"
	const objects, unused = heap + "objects:bytes", heap + "unused:bytes"
	const free, released = heap + "free:bytes", heap + "released:bytes"
	return []runtimeMetric{
		{"go_goroutines", "gauge", "Goroutines.", []string{"/sched/goroutines:goroutines"}},
		{"go_threads", "gauge", "Threads of the operating system that Go has made.",
			[]string{"/sched/threads/total:threads"}},
		{"go_memstats_alloc_bytes_total", "counter", "Bytes of allocated heap objects.",
			[]string{"/gc/heap/allocs:bytes"}},
		{"go_memstats_mallocs_total", "counter", "Heap objects that were allocated.",
			[]string{"/gc/heap/allocs:objects", "/gc/heap/tiny/allocs:objects"}},
		{"go_memstats_frees_total", "counter", "Heap objects that were freed.",
			[]string{"/gc/heap/frees:objects", "/gc/heap/tiny/allocs:objects"}},
		{"go_memstats_heap_alloc_bytes", "gauge", "Bytes of heap objects, not freed yet.",
			[]string{objects}},
		{"go_memstats_heap_inuse_bytes", "gauge", "Bytes of the heap's parts with objects.",
			[]string{objects, unused}},
		{"go_memstats_heap_idle_bytes", "gauge", "Bytes of the heap's parts without objects.",
			[]string{free, released}},
		{"go_memstats_heap_released_bytes", "gauge", "Bytes of these that were given back.",
			[]string{released}},
		{"go_memstats_heap_sys_bytes", "gauge", "Bytes of the heap, with those given back.",
			[]string{objects, unused, free, released}},
		{"go_memstats_heap_objects", "gauge", "Heap objects.",
			[]string{"/gc/heap/objects:objects"}},
		{"go_memstats_stack_inuse_bytes", "gauge", "Bytes of goroutines' stacks.",
			[]string{heap + "stacks:bytes"}},
		{"go_memstats_next_gc_bytes", "gauge", "Heap size of the next garbage collection.",
			[]string{"/gc/heap/goal:bytes"}},
		{"go_memstats_sys_bytes", "gauge", "Bytes from the system, with those given back.",
			[]string{"/memory/classes/total:bytes"}},
	}
}

// writeRuntimeMetrics writes the metrics of Go's runtime. It does not stop other
// goroutines, as runtime.ReadMemStats would.
func writeRuntimeMetrics(m metricsWriter) {
	var samples []metrics.Sample // of all, read at one moment
	for _, r := range runtimeMetrics() {
		for _, key := range r.keys {
			samples = append(samples, metrics.Sample{Name: key})
		}
	}
	metrics.Read(samples)
	for _, r := range runtimeMetrics() {
		sum := uint64(0)
		for range r.keys {
			v := samples[0].Value
			if v.Kind() == metrics.KindUint64 { // not in older versions of Go
				sum += v.Uint64()
			}
			samples = samples[1:]
		}
		m.single(r.name, r.kind, r.help, float64(sum))
	}
	var gc debug.GCStats
	debug.ReadGCStats(&gc)
	const pauses = "go_gc_duration_seconds"
	m.family(pauses, "summary", "Pauses of all goroutines for the garbage collector.")
	m.sample(pauses+"_sum", gc.PauseTotal.Seconds())
	m.sample(pauses+"_count", float64(gc.NumGC))
}

// writeProcessMetrics writes what the operating system says of the process, which has
// started at this time.
func writeProcessMetrics(m metricsWriter, started time.Time) {
	m.single("process_start_time_seconds", "gauge",
		"Start of the process, in seconds since 1970.", unixSeconds(started))
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) == nil {
		cpu := time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
		m.single("process_cpu_seconds_total", "counter",
			"CPU time of the process, in user mode and in the kernel.", cpu.Seconds())
	}
	if virtual, resident, err := processMemory(); err == nil {
		m.single("process_virtual_memory_bytes", "gauge", "Virtual memory.", virtual)
		m.single("process_resident_memory_bytes", "gauge", "Resident memory.", resident)
	}
}

// processMemory returns how much memory the process has, in bytes (proc(5), statm). It
// fails on systems without proc(5), and while the process cannot open a file.
func processMemory() (virtual, resident float64, err error) {
	text, err := os.ReadFile("/proc/self/statm")
	_, scanErr := fmt.Sscan(string(text), &virtual, &resident)
	page := float64(os.Getpagesize())
	return virtual * page, resident * page, cmp.Or(err, scanErr)
}

const (
	minRequestsToFree  = 1000        // requests since the memory was given back
	maxCalmRequests    = 10          // requests in freeMemoryInterval: these are few
	freeMemoryInterval = time.Second // between two checks
)

// freeMemory returns memory to the system: what many requests have taken, as soon as few
// come (maxCalmRequests in a second), until ctx ends. The runtime alone would keep it for
// minutes: it collects garbage when the heap has doubled, and a router of idle sessions would
// have more garbage than sessions. requests returns how many there were so far, upgrades and
// plain ones.
func freeMemory(ctx context.Context, requests func() int64) {
	var freed, before int64
	for sleep(ctx, freeMemoryInterval) == nil {
		now := requests()
		if now-before <= maxCalmRequests && now-freed >= minRequestsToFree {
			returnHeap(ctx, func() bool { return requests()-now <= maxCalmRequests })
			freed = now
		}
		before = now
	}
}

const (
	returnStep    = 256 << 10 // bytes; one or two milliseconds
	returnRest    = 3 << 19   // bytes: this, and 1/32 of what is used, is given back at once
	giveBackPause = 5 * time.Millisecond
)

// returnHeap collects garbage and gives the free memory of the heap back to the system, until
// ctx ends or calm returns false: many requests come again.
//
// debug.FreeOSMemory gives back all at once: a router with one CPU would carry nothing for
// 100 ms after 5,000 handshakes with TLS. So most is given back before, in small steps: each
// sets the limit of memory a little below what is used, and whatever allocates then gives
// back that much first (https://go.dev/doc/gc-guide#Memory_limit). The rest is not, because
// the runtime wants 3 % of the heap to be free below the limit: it would collect garbage all
// the time.
func returnHeap(ctx context.Context, calm func() bool) {
	limit := debug.SetMemoryLimit(-1)
	runtime.GC()
	used, free := goMemory()
	for range free / returnStep { // no more, in case others make garbage as fast
		if !calm() || free <= returnRest+used/32 || sleep(ctx, giveBackPause) != nil {
			break
		}
		debug.SetMemoryLimit(min(limit, used-returnStep))
		runtime.KeepAlive(make([]byte, returnStep)) // too large for the stack
		used, free = goMemory()
	}
	debug.SetMemoryLimit(limit)
	if calm() && ctx.Err() == nil {
		debug.FreeOSMemory()
	}
}

// goMemory returns how many bytes Go has from the system, and how many of these are of the
// heap and free.
func goMemory() (used, free int64) {
	samples := []metrics.Sample{
		{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
	}
	metrics.Read(samples)
	bytes := func(i int) int64 { return int64(samples[i].Value.Uint64()) }
	return bytes(0) - bytes(1), bytes(2)
}
