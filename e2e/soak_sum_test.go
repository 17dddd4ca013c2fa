//go:build controlplane

package e2e

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// samples are what a router had in the course of a soak.
type samples struct {
	mu  sync.Mutex
	all []sample // guarded by mu, in order
}

// sample is what a router has at a time.
type sample struct {
	at                      time.Time
	goroutines, descriptors int
	memory                  int // bytes: anonymous, resident
}

// take adds one.
func (s *samples) take(ctx context.Context, of *subject) error {
	m, err := of.metrics(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, sample{time.Now(), int(m.sum("go_goroutines")), int(m.sum("router_client_descriptors")), memory(of.cmd.Process.Pid)})
	return nil
}

// between returns the median of each, over a part of the time: a fault, or the
// garbage collector, may add to it for a moment.
func (s *samples) between(from, to time.Duration) sample {
	s.mu.Lock()
	defer s.mu.Unlock()
	var goroutines, descriptors, memories []int
	for _, now := range s.all {
		if since := now.at.Sub(s.all[0].at); since >= from && since <= to {
			goroutines, descriptors, memories = append(goroutines, now.goroutines), append(descriptors, now.descriptors), append(memories, now.memory)
		}
	}
	return sample{goroutines: median(goroutines), descriptors: median(descriptors), memory: median(memories)}
}

// median is 0 of none.
func median(all []int) int {
	slices.Sort(all)
	if len(all) == 0 {
		return 0
	}
	return all[len(all)/2]
}

// sum holds what the routers have grown by, and says everything in one. What was
// refused or lost is an error, and not in it.
func (s *soak) sum(d time.Duration) {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, "\n  "+format, args...) }
	count := 0
	for _, name := range slices.Sorted(maps.Keys(s.recoveries)) {
		times := newDistribution(s.recoveries[name])
		count += len(times)
		say("%-30s %2d times, recovered in %5.2f s, at most %5.2f s", name, len(times),
			times.percentile(50).Seconds(), times.percentile(100).Seconds())
	}
	accepted, failed := s.ledger.written()
	say("%d faults; %d writes were accepted, %d failed", count, accepted, failed)
	steady, moved, messages := 0, 0, 0
	for _, g := range s.guests {
		moved += g.opened - 1
		if slices.Contains(s.steady, g.namespace) {
			steady++
			messages += g.messages()
		}
	}
	say("%d sessions were held, %d of them of owners that stayed, with %d messages and no gap; the others were moved %d times",
		len(s.guests), steady, messages, moved)
	for i, subject := range s.subjects() {
		v := s.visitors[i]
		begin, end := s.samples[subject].between(d/10, d/5), s.samples[subject].between(d-d/10, 2*d)
		say("%-6s %d upgrades, the slowest in %d ms", subject.pod, v.opened, v.slowest.Milliseconds())
		say("%-6s after a tenth of the time, and in the last: memory %.1f and %.1f MiB, goroutines %d and %d, descriptors of clients and sessions %d and %d",
			subject.pod, mib(begin.memory), mib(end.memory), begin.goroutines, end.goroutines, begin.descriptors, end.descriptors)
		if end.memory > begin.memory+soakMemory || end.goroutines > begin.goroutines+soakCount || end.descriptors > begin.descriptors+soakCount {
			s.add("%s has grown by more than %d MiB, or by more than %d goroutines or descriptors", subject.pod, soakMemory>>20, soakCount)
		}
	}
	s.t.Logf("soak:%s", b.String())
}

func mib(bytes int) float64 { return float64(bytes) / (1 << 20) }
