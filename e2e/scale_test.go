package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestScale scales the StatefulSet out and in under clients that come back, two of
// each namespace. All routers follow. The backends' own logs show that each session
// was with the owner that its table gives its namespace; the clients of those whose
// owner did not change notice nothing.
func TestScale(t *testing.T) {
	s := newSystem(t)
	t.Cleanup(func() { // the test's own context has ended by then
		if _, err := s.kubectl(context.Background(), "", "scale", "statefulset", "backend", "--replicas=4"); err != nil {
			t.Error(err)
		}
	})
	c := &crowd{s: s, names: map[string]bool{}, router: build(t, "."), diary: s.keepDiary(), owners: map[int]map[string]string{}}
	for i := range number(t, "E2E_CLIENTS", 300) {
		namespace := fmt.Sprintf("%sscale-%d", prefix, i/2)
		c.names[namespace] = true
		c.clients = append(c.clients, s.goAndReturn(namespace))
	}
	s.awaitOpen(c.clients, "")
	for _, step := range [][2]int{{4, 6}, {6, 3}, {3, 4}} {
		c.scale(step[0], step[1])
	}
}

// crowd is the clients of many namespaces.
type crowd struct {
	s       *system
	clients []*returner
	names   map[string]bool // the namespaces
	diary   *diary
	router  string                    // the program
	owners  map[int]map[string]string // by the number of backends; see owner
}

// owner is who owns a namespace among so many backends, as the router's program
// says without a cluster.
func (c *crowd) owner(backends int, namespace string) string {
	c.s.t.Helper()
	if c.owners[backends] == nil {
		args := []string{"owner", "-replicas", strconv.Itoa(backends)}
		for name := range c.names {
			args = append(args, name)
		}
		out, err := exec.CommandContext(c.s.t.Context(), c.router, args...).Output()
		if err != nil {
			c.s.t.Fatalf("router owner: %v", err)
		}
		c.owners[backends] = map[string]string{}
		for line := range strings.Lines(string(out)) {
			if fields := strings.Fields(line); len(fields) == 3 && fields[2] == "hash" {
				c.owners[backends][fields[0]] = fields[1]
			}
		}
	}
	owner := c.owners[backends][namespace]
	if owner == "" {
		c.s.t.Fatalf("router owner does not say who owns %s among %d", namespace, backends)
	}
	return owner
}

// scale changes the number of backends, and holds what became of the clients.
func (c *crowd) scale(from, to int) {
	s := c.s
	s.t.Helper()
	visits := map[*returner]int{}
	for _, r := range c.clients {
		seen, _ := r.history()
		visits[r] = len(seen)
	}
	began := time.Now()
	s.mustKubectl("", "scale", "statefulset", "backend", "--replicas="+strconv.Itoa(to))
	routers := s.routers(s.t.Context())
	for _, r := range routers {
		eventually(s.t, 60*time.Second, fmt.Sprintf("%s to have %d backends", r.pod, to), func() error {
			m, err := r.metrics(s.t.Context())
			if got := m.sum("router_table_backends"); err == nil && got != float64(to) {
				err = fmt.Errorf("it has %v", got)
			}
			return err
		})
	}
	swapped := time.Since(began)
	c.awaitSettled(to)

	moved, most := 0, c.most()
	var away []time.Duration
	for _, r := range c.clients {
		seen, failed := r.history()
		stays := c.owner(from, r.namespace) == c.owner(to, r.namespace)
		switch {
		case !stays:
			moved++
		case len(seen) != visits[r]:
			s.t.Errorf("%s stayed with %s, and its session ended: %v", r.namespace, c.owner(to, r.namespace), seen[len(seen)-2].ended)
		}
		for _, v := range seen[visits[r]:] {
			if away = append(away, v.gap); v.gap > most {
				s.t.Errorf("%s was away for %s, want at most %s; attempts failed: %v", r.namespace, v.gap, most, some(failed))
			}
		}
	}
	s.t.Logf("scale from %d to %d: the routers followed after %.1f s; %d of %d clients moved, and were away for %s",
		from, to, swapped.Seconds(), moved, len(c.clients), newDistribution(away))
	c.checkShare(from, to)
	c.checkDiary(began, to)
	s.t.Logf("scale: two routers disagreed for at most %s", s.disagreed(routers, began, from).Round(time.Millisecond))
	s.awaitWhole()
}

// most is how long a client may be away: as long as an upgrade is held, and as a
// move of all takes one router.
func (c *crowd) most() time.Duration {
	hold, err := time.ParseDuration(c.s.routerFlag("-hold", "10s"))
	if err != nil {
		c.s.t.Fatal(err)
	}
	return hold + time.Duration(len(c.clients))*time.Second/time.Duration(c.s.moveRate())
}

// awaitSettled waits until the backends have written down that each client has one
// open session, with its owner.
func (c *crowd) awaitSettled(backends int) {
	want := map[string]int{}
	for _, r := range c.clients {
		want[r.namespace]++
	}
	eventually(c.s.t, 60*time.Second, "all sessions to be with their owners", func() error {
		for namespace, stays := range c.diary.of(c.names) {
			open := 0
			for _, one := range stays {
				if one.ended.IsZero() && one.backend != c.owner(backends, namespace) {
					return fmt.Errorf("a session of %s is with %s", namespace, one.backend)
				}
				if one.ended.IsZero() {
					open++
				}
			}
			if open != want[namespace] {
				return fmt.Errorf("%s has %d sessions, want %d", namespace, open, want[namespace])
			}
		}
		return nil
	})
	c.s.awaitOpen(c.clients, "")
}

// checkShare holds how many namespaces have another owner: no more than have to,
// give or take five standard deviations.
func (c *crowd) checkShare(from, to int) {
	c.s.t.Helper()
	n, moved := float64(len(c.names)), 0.0
	for namespace := range c.names {
		if c.owner(from, namespace) != c.owner(to, namespace) {
			moved++
		}
	}
	share := math.Abs(float64(to-from)) / float64(max(from, to))
	if most := n*share + 5*math.Sqrt(n*share*(1-share)); moved == 0 || moved > most {
		c.s.t.Errorf("%v of %v namespaces have another owner, want about %.0f and at most %.0f", moved, n, n*share, most)
	}
}

// checkDiary holds that the table that a session came by gives its namespace to the
// backend that wrote it down: routers with the same table never have two owners
// for one. It logs for how long a namespace had sessions with its old owner when it
// had some with the new one, of routers that had not followed or not moved them yet.
func (c *crowd) checkDiary(began time.Time, to int) {
	c.s.t.Helper()
	var apart []time.Duration
	tables, sessions := newTally(), 0
	numbers := map[string][]int{} // of backends, with which the owners of the sessions by a table are right
	for namespace, stays := range c.diary.of(c.names) {
		var first, last time.Time
		for _, one := range stays {
			if one.table == "" {
				c.s.t.Fatalf("%+v has no table", one)
			}
			if tables.of(one.table) == 0 {
				numbers[one.table] = []int{1, 2, 3, 4, 5, 6, 7, 8}
			}
			numbers[one.table] = slices.DeleteFunc(numbers[one.table], func(n int) bool { return c.owner(n, namespace) != one.backend })
			if len(numbers[one.table]) == 0 {
				c.s.t.Fatalf("%s had a session with %s by table %s, which no number of backends gives it to and the others by this table to theirs",
					namespace, one.backend, one.table)
			}
			tables.count(one.table)
			sessions++
			switch {
			case one.backend != c.owner(to, namespace):
				last = one.ended
			case one.opened.After(began) && first.IsZero():
				first = one.opened
			}
		}
		if !first.IsZero() && last.After(began) {
			apart = append(apart, max(0, last.Sub(first)))
		}
	}
	c.s.t.Logf("scale: %d sessions were with the owner that their table says: %s; the numbers of backends: %v", sessions, tables, numbers)
	c.s.t.Logf("scale: sessions of one namespace were with two backends for %s (a move is settled after %s)", newDistribution(apart), c.s.routerFlag("-move-settle", "500ms"))
}

// disagreed returns the longest time since began for which not all routers had the
// same number of backends, by their own logs; before, they had this many.
func (s *system) disagreed(routers []*router, began time.Time, before int) (most time.Duration) {
	s.t.Helper()
	type swap struct {
		Msg      string
		Time     time.Time
		Backends int
		pod      string
	}
	var swaps []swap
	have := map[string]int{}
	for _, r := range routers {
		have[r.pod] = before
		_, log, err := s.lines(s.t.Context(), r.pod, metav1.NewTime(began))
		if err != nil {
			s.t.Fatal(err)
		}
		for line := range strings.Lines(log) {
			one := swap{pod: r.pod}
			if json.Unmarshal([]byte(line), &one) == nil && one.Msg == "routing table updated" && one.Time.After(began) {
				swaps = append(swaps, one)
			}
		}
	}
	slices.SortFunc(swaps, func(a, b swap) int { return cmp.Compare(a.Time.UnixNano(), b.Time.UnixNano()) })
	var since time.Time
	for _, one := range swaps {
		have[one.pod] = one.Backends
		agree := true
		for _, backends := range have {
			agree = agree && backends == one.Backends
		}
		switch {
		case agree && !since.IsZero():
			most, since = max(most, one.Time.Sub(since)), time.Time{}
		case !agree && since.IsZero():
			since = one.Time
		}
	}
	if len(swaps) < len(routers) || !since.IsZero() {
		s.t.Errorf("the routers' logs have %d tables since the change, after which they do not agree", len(swaps))
	}
	return most
}
