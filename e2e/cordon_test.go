package e2e

import (
	"fmt"
	"maps"
	"testing"
	"time"
)

// TestCordon cordons one of the backends under sessions. Exactly its namespaces go to the
// others, evenly, and come back when the cordon ends. All other sessions stay, and no
// namespace has two owners. A list that is not valid, and one of all backends, are reported.
func TestCordon(t *testing.T) {
	sessions := number(t, "E2E_HANDOFF", 800)
	s := newSystem(t)
	t.Cleanup(func() { s.cordon("") })
	c := s.newTenants("cordon", min(400, sessions), sessions)
	c.spread()
	before := c.owners()
	marks := c.marks()
	s.mustCordon("2", 1)
	s.awaitRest("", 90*time.Second)
	after := c.owners()
	c.awaitOwners(after, 30*time.Second)
	moved := 0
	for _, name := range c.names {
		switch {
		case before[name] != "backend-2" && after[name] != before[name]:
			t.Errorf("%s moved from %s to %s", name, before[name], after[name])
		case before[name] == "backend-2" && after[name] == before[name]:
			t.Errorf("%s is still with backend-2", name)
		case before[name] == "backend-2":
			moved++
		}
	}
	t.Logf("cordon: %d of %d namespaces left backend-2", moved, len(c.names))
	for name := range maps.Keys(before) {
		if o := s.mustOwner(name); before[name] == "backend-2" && o.Why != "cordoned" {
			t.Errorf("%s is with %s by %q", name, o.Owner, o.Why)
		}
	}
	s.mustCordon("2;", 1) // the list before stays
	s.awaitRejected(1)
	c.awaitOwners(after, 10*time.Second)
	s.mustCordon("2", 1)
	s.awaitRejected(0)
	s.mustCordon("", 0)
	s.awaitRest("", 90*time.Second)
	c.awaitOwners(before, 30*time.Second)
	for _, r := range c.clients {
		visits, _ := r.history()
		if before[r.namespace] != "backend-2" && len(visits) != marks[r] {
			t.Errorf("%s has %d new sessions, though its owner stayed", r.namespace, len(visits)-marks[r])
		}
	}
	c.wantOneOwner("cordon")
	_, refused := c.since(marks)
	if err := some(refused); err != nil {
		t.Errorf("clients were refused: %v", err)
	}
}

// cordon writes the list of cordoned backends; "" removes it.
func (s *system) cordon(list string) {
	s.t.Helper()
	ctx, stop := cleanupContext()
	defer stop()
	change := "router-cordon=" + list
	if list == "" {
		change = "router-cordon-"
	}
	if _, err := s.kubectl(ctx, "", "annotate", "statefulset", "backend", "--overwrite", change); err != nil {
		s.t.Error(err)
	}
}

// mustCordon is cordon, and waits until all routers have so many cordoned backends.
func (s *system) mustCordon(list string, count float64) {
	s.t.Helper()
	s.cordon(list)
	s.awaitOnAll("router_table_cordoned_backends", count)
}

// awaitRejected waits until all routers say that the list is rejected, with 1, or is not.
func (s *system) awaitRejected(rejected float64) {
	s.t.Helper()
	s.awaitOnAll("router_cordon_rejected", rejected)
}

// awaitOnAll waits until a metric has the value on all routers.
func (s *system) awaitOnAll(name string, want float64) {
	s.t.Helper()
	for _, r := range s.routers(s.t.Context()) {
		eventually(s.t, time.Minute, fmt.Sprintf("%s of %s to be %v", name, r.pod, want), func() error {
			m, err := r.metrics(s.t.Context())
			if got := m.sum(name); err == nil && got != want {
				err = fmt.Errorf("it is %v", got)
			}
			return err
		})
	}
}
