package e2e

import (
	"context"
	"fmt"
	"strconv"
	"testing"
	"time"
)

// TestScale scales the StatefulSet out and in under clients that come back. All
// routers follow, each namespace is served by the backend that they name, and
// those whose owner did not change notice nothing.
func TestScale(t *testing.T) {
	clients := number(t, "E2E_CLIENTS", 300)
	s := newSystem(t)
	t.Cleanup(func() { // the test's own context has ended by then
		if _, err := s.kubectl(context.Background(), "", "scale", "statefulset", "backend", "--replicas=4"); err != nil {
			t.Error(err)
		}
	})
	routers := s.routers(t.Context())
	var all []*returner
	for i := range clients {
		all = append(all, s.goAndReturn(fmt.Sprintf("%sscale-%d", prefix, i)))
	}
	s.awaitOpen(all, "")
	for _, replicas := range []int{6, 3, 4} {
		s.scaleTo(routers, all, replicas)
	}
}

// scaleTo scales, and holds what became of the clients.
func (s *system) scaleTo(routers []*router, all []*returner, replicas int) {
	s.t.Helper()
	before := s.ownersOf(all)
	visits := map[*returner]int{}
	for _, r := range all {
		seen, _ := r.history()
		visits[r] = len(seen)
	}
	began := time.Now()
	s.mustKubectl("", "scale", "statefulset", "backend", "--replicas="+strconv.Itoa(replicas))
	var swapped []time.Duration
	for _, r := range routers {
		eventually(s.t, 60*time.Second, fmt.Sprintf("%s to have %d backends", r.pod, replicas), func() error {
			m, err := r.metrics(s.t.Context())
			if got := m.sum("router_table_backends"); err == nil && got != float64(replicas) {
				err = fmt.Errorf("it has %v", got)
			}
			return err
		})
		swapped = append(swapped, time.Since(began).Round(time.Millisecond))
	}
	after := s.ownersOf(all)
	moved, worst := 0, time.Duration(0)
	for _, r := range all {
		if before[r.namespace] != after[r.namespace] {
			moved++
		}
		eventually(s.t, 30*time.Second, r.namespace+" to be on "+after[r.namespace], func() error {
			seen, failed := r.history()
			if _, open := r.open(); !open || seen[len(seen)-1].server != after[r.namespace] {
				return fmt.Errorf("on %s, open %t; attempts failed: %v", seen[len(seen)-1].server, open, some(failed))
			}
			return nil
		})
		seen, _ := r.history()
		for _, v := range seen[visits[r]:] {
			worst = max(worst, v.gap)
			if v.server != before[r.namespace] && v.server != after[r.namespace] && replicas < 6 {
				s.t.Errorf("%s was on %s, which is neither its old owner nor its new one", r.namespace, v.server)
			}
		}
		if before[r.namespace] == after[r.namespace] && len(seen) != visits[r] {
			s.t.Errorf("%s stayed with %s, and its session ended: %v", r.namespace, after[r.namespace], seen[len(seen)-2].ended)
		}
	}
	s.t.Logf("scale to %d: the routers followed after %v; %d of %d clients moved, and were away for at most %s",
		replicas, swapped, moved, len(all), worst.Round(time.Millisecond))
	s.awaitWhole()
}

// ownersOf returns the owners of the clients' namespaces, on which all routers
// agree.
func (s *system) ownersOf(all []*returner) map[string]string {
	s.t.Helper()
	owners := map[string]string{}
	for _, r := range all {
		owners[r.namespace] = s.mustOwner(r.namespace).Owner
	}
	return owners
}
