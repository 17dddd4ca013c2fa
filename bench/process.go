package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of /proc/stat (proc(5)), which Linux has on all that Go runs on.
const tick = 10 * time.Millisecond

// group is the processes of a process group, which a proxy has for itself.
type group []int

// processGroup finds the processes whose group is pgid.
func processGroup(pgid int) (group, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var g group
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil { // it has ended
			continue
		}
		// After the name in brackets: state, parent, group.
		fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(fields) < 3 || fields[2] != strconv.Itoa(pgid) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		g = append(g, pid)
	}
	if len(g) == 0 {
		return nil, fmt.Errorf("no process in group %d", pgid)
	}
	return g, nil
}

// cpu is the CPU time that the processes have used.
func (g group) cpu() (sum time.Duration, err error) {
	for _, pid := range g {
		used, err := processCPU(pid)
		if err != nil {
			return 0, err
		}
		sum += used
	}
	return sum, nil
}

// processCPU reads the CPU clock of a process (clock_getcpuclockid(3)): user and
// system time in nanoseconds, of which /proc/PID/stat has steps of 10 ms.
func processCPU(pid int) (time.Duration, error) {
	now, errno := rawClock(uintptr(^pid<<3 | 2)) // CPUCLOCK_SCHED, of the whole process
	if errno != 0 {
		return 0, fmt.Errorf("CPU clock of process %d: %w", pid, errno)
	}
	return time.Duration(now.Nano()), nil
}

// memory is what processes have.
type memory struct {
	pss   float64 // proportional set size, KiB
	files float64 // open
}

// memory sums up what the processes have now.
func (g group) memory() (m memory, err error) {
	for _, pid := range g {
		dir := fmt.Sprintf("/proc/%d/", pid)
		b, err := os.ReadFile(dir + "smaps_rollup")
		if err != nil {
			return m, err
		}
		_, rest, _ := strings.Cut(string(b), "\nPss:")
		kib, err := strconv.ParseFloat(strings.Fields(rest + " none")[0], 64)
		if err != nil {
			return m, fmt.Errorf("%ssmaps_rollup: %w", dir, err)
		}
		files, err := os.ReadDir(dir + "fd")
		if err != nil {
			return m, err
		}
		m.pss += kib
		m.files += float64(len(files))
	}
	return m, nil
}

// kernelMemory is the memory in KiB that the kernel has for all programs: its objects, such
// as sockets and open files, stacks, page tables, and what TCP buffers hold (proc(5)). There
// is no such figure of one process; a cgroup's needs rights, and a kernel that charges an
// accepted socket to who accepts it.
func kernelMemory() (float64, error) {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	sockets, err := os.ReadFile("/proc/net/sockstat")
	if err != nil {
		return 0, err
	}
	return parseKernelMemory(string(info), string(sockets), os.Getpagesize())
}

// parseKernelMemory adds up the figures of /proc/meminfo and /proc/net/sockstat, which
// counts TCP's memory in pages.
func parseKernelMemory(info, sockets string, page int) (sum float64, err error) {
	for _, name := range []string{"Slab:", "KernelStack:", "PageTables:"} {
		_, rest, _ := strings.Cut("\n"+info, "\n"+name)
		kib, err := strconv.ParseFloat(strings.Fields(rest + " none")[0], 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/meminfo: %s %w", name, err)
		}
		sum += kib
	}
	for line := range strings.Lines(sockets) {
		fields := strings.Fields(line)
		at := slices.Index(fields, "mem")
		if fields[0] != "TCP:" || at < 0 || at+1 == len(fields) {
			continue
		}
		pages, err := strconv.ParseFloat(fields[at+1], 64)
		return sum + pages*float64(page)/1024, err
	}
	return 0, errors.New("/proc/net/sockstat: no memory of TCP")
}

// cpuTicks is a line of /proc/stat.
type cpuTicks struct{ busy, idle, steal time.Duration }

// readCPUs reads the times of the CPUs by their numbers.
func readCPUs() (map[int]cpuTicks, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return nil, err
	}
	cpus := map[int]cpuTicks{}
	for line := range strings.Lines(string(b)) {
		var number int
		var user, nice, system, idle, iowait, irq, softirq, steal time.Duration
		n, _ := fmt.Sscanf(line, "cpu%d %d %d %d %d %d %d %d %d", &number, &user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal)
		if n == 9 && !strings.HasPrefix(line, "cpu ") { // which is the sum of all
			cpus[number] = cpuTicks{busy: tick * (user + nice + system + irq + softirq), idle: tick * (idle + iowait), steal: tick * steal}
		}
	}
	if len(cpus) == 0 {
		return nil, errors.New("/proc/stat: no line of a CPU")
	}
	return cpus, nil
}

// sum is the time of all CPUs since before.
func sum(cpus, before map[int]cpuTicks) (all cpuTicks) {
	for number, now := range cpus {
		then := before[number]
		all.busy += now.busy - then.busy
		all.idle += now.idle - then.idle
		all.steal += now.steal - then.steal
	}
	return all
}
