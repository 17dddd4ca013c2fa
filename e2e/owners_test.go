package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
)

// TestOwners opens a session for each of 1,000 namespaces through nginx, with
// the CA verified. Every tenth has an override. The backend that answers is
// the one that both routers' /owner names.
func TestOwners(t *testing.T) {
	const namespaces = 1000
	s := newSystem(t)
	s.keepOverrides()
	routers := s.routers(t.Context())
	if len(routers) != 2 {
		t.Fatalf("%d routers run, want 2", len(routers))
	}

	overrides := map[string]string{}
	for i := 0; i < namespaces; i += 10 {
		before := s.mustOwner(ownersNamespace(i))
		if before.Why != "hash" {
			t.Fatalf("%s: %+v, want it without an override", ownersNamespace(i), before)
		}
		overrides[ownersNamespace(i)] = s.other(before.Owner)
	}
	s.awaitTable(t.Context(), s.apply(overrides))

	landed := newTally()
	err := forEach(namespaces, 16, func(i int) error {
		namespace := ownersNamespace(i)
		want, overridden := overrides[namespace]
		return s.checkOwner(t.Context(), routers, namespace, want, overridden, landed)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("owners: %d namespaces landed where /owner of both routers says, %d of them by override: %s",
		namespaces, len(overrides), landed)
	for _, r := range routers {
		if landed.of(r.pod) == 0 && s.front.forward == nil {
			t.Errorf("no session went by way of %s: %s", r.pod, landed)
		}
	}
	for i := range 4 {
		// The hash gives a quarter to each; 5 standard deviations are 69.
		if n := landed.of(fmt.Sprintf("backend-%d", i)); n < 150 || n > 350 {
			t.Errorf("backend-%d owns %d of %d: %s", i, n, namespaces, landed)
		}
	}
}

func ownersNamespace(i int) string { return fmt.Sprintf("%sowners-%04d", prefix, i) }

// checkOwner asks both routers, then the system itself.
func (s *system) checkOwner(ctx context.Context, routers []*router, namespace, want string, overridden bool, landed *tally) error {
	why := "override"
	if !overridden {
		o, err := routers[0].owner(ctx, namespace)
		if err != nil {
			return err
		}
		want, why = o.Owner, "hash"
	}
	for _, r := range routers {
		if err := r.owns(ctx, namespace, want, why); err != nil {
			return err
		}
	}
	session, err := s.dialer.open(ctx, namespace)
	if err != nil {
		return err
	}
	defer session.conn.CloseNow()
	m := session.first
	if m.Server != want {
		return fmt.Errorf("%s landed on %s, both routers say %s", namespace, m.Server, want)
	}
	if !slices.ContainsFunc(routers, func(r *router) bool { return r.pod == m.Router }) {
		return fmt.Errorf("%s came by way of %q, which is no router", namespace, m.Router)
	}
	landed.count(m.Server)
	landed.count(m.Router)
	return nil
}

// TestBadNamespace sends what is no namespace through nginx.
func TestBadNamespace(t *testing.T) {
	s := newSystem(t)
	for name, tt := range map[string]struct {
		path   string
		status int
	}{
		"a tab":         {"a%09b", 400},
		"a slash in it": {"a%2Fb", 400},
		"a backslash":   {"a%5Cb", 400},
		"not UTF-8":     {"%C3", 400},
		"too long":      {fmt.Sprintf("%0254d", 0), 400},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.dialer.open(t.Context(), tt.path)
			var r refusal
			if !errors.As(err, &r) || r.status != tt.status {
				t.Errorf("/ws/%s: %v, want status %d", tt.path, err, tt.status)
			}
		})
	}
}

// tally counts by name.
type tally struct {
	mu sync.Mutex
	n  map[string]int // guarded by mu
}

func newTally() *tally { return &tally{n: map[string]int{}} }

func (c *tally) count(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n[name]++
}

func (c *tally) of(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[name]
}

// String has the names in order.
func (c *tally) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Sprint(c.n)
}
