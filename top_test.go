package main

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"
)

// TestTopCounts: a look has the sessions that are open, and the bytes since the look
// before. There is no other one within topInterval.
func TestTopCounts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, _ := withoutSockets(0, 0) // whose time begins now
		top := &topNamespaces{}
		add := func(namespace string, count int) (all []*session) {
			for range count {
				all = append(all, newSession(namespace, 0, ""))
				r.add(all[len(all)-1])
			}
			return all
		}
		want := func(when string, over time.Duration, sessions, bytes []namespaceLoad) {
			t.Helper()
			got := top.look(r)
			wantEqual(t, "the time "+when, got.window, over)
			if !slices.Equal(got.bySessions, sessions) || !slices.Equal(got.byBytes, bytes) {
				t.Errorf("%s: by sessions %v, by bytes %v; want %v, %v",
					when, got.bySessions, got.byBytes, sessions, bytes)
			}
		}
		time.Sleep(3 * time.Second)
		a, b, c := add("a", 2), add("b", 3), add("c", 2)
		a[0].bytesFrom[clientSide].Store(5)
		a[1].bytesFrom[backendSide].Store(7)
		b[2].bytesFrom[backendSide].Store(4)
		sessions := []namespaceLoad{{"b", 3, 4}, {"a", 2, 12}, {"c", 2, 0}}
		bytes := []namespaceLoad{{"a", 2, 12}, {"b", 3, 4}}
		want("at the first look", 3*time.Second, sessions, bytes)

		c[0].bytesFrom[clientSide].Store(100)
		r.remove(b[0], b[0].bytes())
		r.remove(b[1], b[1].bytes())
		time.Sleep(topInterval - time.Nanosecond)
		want("within topInterval", 3*time.Second, sessions, bytes)
		time.Sleep(time.Nanosecond)
		want("after it", topInterval, []namespaceLoad{{"a", 2, 0}, {"c", 2, 100}, {"b", 1, 0}},
			[]namespaceLoad{{"c", 2, 100}})
		for _, s := range slices.Concat(a, b[2:], c) {
			r.remove(s, s.bytes())
		}
		time.Sleep(time.Hour)
		want("without sessions", time.Hour, nil, nil)
	})
}

// TestTopIsTheLargest: of many namespaces, of which many are equal, a list has the largest.
func TestTopIsTheLargest(t *testing.T) {
	for _, count := range []int{0, 1, topSize - 1, topSize, topSize + 1, 1000} {
		var loads []namespaceLoad
		for _, namespace := range shuffled(manyNamespaces(count)) {
			loads = append(loads, namespaceLoad{namespace, int64(hash64(namespace) % 30), 0})
		}
		size := func(l namespaceLoad) int64 { return l.sessions }
		got := largest(loads, size)
		var sizes, want []int64
		for i := range got {
			sizes = append(sizes, got[i].sessions)
			if !slices.Contains(loads, got[i]) || slices.Contains(got[:i], got[i]) {
				t.Errorf("%v is twice in the list, or not in the router", got[i])
			}
		}
		for i := range loads {
			want = append(want, loads[i].sessions)
		}
		slices.SortFunc(want, func(a, b int64) int { return int(b - a) })
		if want = want[:min(topSize, count)]; !slices.Equal(sizes, want) {
			t.Errorf("of %d namespaces the largest are %v, want %v", count, sizes, want)
		}
	}
}

// TestTopWhileSessionsEnd: sessions start, carry bytes and end during looks.
func TestTopWhileSessionsEnd(t *testing.T) {
	const sessions = 1000
	r, all := withoutSockets(sessions, 1)
	top := &topNamespaces{}
	var changing sync.WaitGroup
	changing.Go(func() {
		for _, s := range all {
			s.bytesFrom[clientSide].Add(1)
			r.remove(s, s.bytes())
			r.add(&session{namespace: "new"})
		}
	})
	for looks := 0; looks < 10; looks++ {
		changing.Go(func() {
			sum := int64(0)
			for _, load := range top.look(r).bySessions {
				sum += load.sessions
			}
			if sum < sessions-1 || sum > sessions {
				t.Errorf("%d sessions, want the %d that are open", sum, sessions)
			}
		})
	}
	changing.Wait()
}

// BenchmarkTop measures a look, and all of /metrics, with 100,000 sessions of as many
// namespaces, and how long a look makes a session wait that opens or ends.
func BenchmarkTop(b *testing.B) {
	const sessions = 100_000
	for _, namespaces := range []int{1, 1000, sessions} {
		a := loadedAdmin(b, sessions, namespaces)
		b.Run(fmt.Sprintf("look/namespaces=%d", namespaces), func(b *testing.B) {
			for b.Loop() {
				a.topNamespaces.at = 0
				a.topNamespaces.look(a.proxy.relay)
			}
		})
		b.Run(fmt.Sprintf("metrics/namespaces=%d", namespaces), func(b *testing.B) {
			for b.Loop() {
				a.topNamespaces.at = 0
				a.writeMetrics(metricsWriter{w: io.Discard})
			}
		})
		b.Run(fmt.Sprintf("lock/namespaces=%d", namespaces), func(b *testing.B) {
			benchmarkTopLock(b, a)
		})
	}
}

// benchmarkTopLock measures how long a session that opens or ends waits for the relay's
// lock during looks: the 99th percentile.
func benchmarkTopLock(b *testing.B, a *admin) {
	done := make(chan struct{})
	var looking sync.WaitGroup
	looking.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				a.topNamespaces.loads(a.proxy.relay)
			}
		}
	})
	var waits []time.Duration
	for b.Loop() {
		began := time.Now()
		a.proxy.relay.size()
		waits = append(waits, time.Since(began))
	}
	close(done)
	looking.Wait()
	slices.Sort(waits)
	b.ReportMetric(float64(waits[len(waits)*99/100].Nanoseconds()), "p99-ns")
	b.ReportMetric(float64(waits[len(waits)*9999/10000].Nanoseconds()), "p99.99-ns")
}

// loadedAdmin is the admin of a router with so many sessions, of so many namespaces.
func loadedAdmin(t testing.TB, sessions, namespaces int) *admin {
	a, _ := adminOf(t, "127.0.0.1:1")
	for i := range sessions {
		s := newSession(fmt.Sprintf("namespace-%d", i%namespaces), 0, "192.0.2.1")
		s.bytesFrom[clientSide].Store(int64(i))
		a.proxy.relay.add(s)
	}
	return a
}
