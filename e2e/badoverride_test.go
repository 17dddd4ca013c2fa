package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestBadOverride applies values that are no backend: their namespaces and
// sessions stay where they are, the rest of the ConfigMap applies, and it is
// reported in /owner, in a metric and in the log of every router.
func TestBadOverride(t *testing.T) {
	const overridden, hashed, good = prefix + "bad-overridden", prefix + "bad-hashed", prefix + "bad-good"
	s := newSystem(t)
	s.keepOverrides()
	s.withoutPolicy()
	routers := s.routers(t.Context())
	began := metav1.Now()
	rejected := s.mustSum(routers, "router_table_invalid_overrides")
	byOverride := s.other(s.mustOwner(overridden).Owner)
	byHash := s.mustOwner(hashed).Owner
	elsewhere := s.other(s.mustOwner(good).Owner)

	s.awaitTable(t.Context(), s.apply(map[string]string{overridden: byOverride}))
	sessions := []*follower{s.mustFollow(overridden), s.mustFollow(hashed)}
	s.awaitTable(t.Context(), s.apply(map[string]string{
		overridden: "bakend-2", hashed: "backend-99", good: elsewhere,
	}))
	for _, r := range routers {
		s.checkKept(r, overridden, byOverride, "bakend-2", byOverride)
		s.checkKept(r, hashed, byHash, "backend-99", "hash")
		if err := r.owns(t.Context(), good, elsewhere, "override"); err != nil {
			t.Error(err)
		}
		if err := s.logged(t.Context(), r.pod, began, "override rejected", overridden, "bakend-2"); err != nil {
			t.Error(err)
		}
		if err := s.logged(t.Context(), r.pod, began, "override rejected", hashed, "backend-99"); err != nil {
			t.Error(err)
		}
	}
	if got := s.mustSum(routers, "router_table_invalid_overrides") - rejected; got != float64(2*len(routers)) {
		t.Errorf("router_table_invalid_overrides rose by %v over %d routers, want 2 each", got, len(routers))
	}
	s.mustLand(overridden, byOverride)
	s.mustLand(hashed, byHash)
	s.mustLand(good, elsewhere)
	s.goOn(sessions, 2)

	s.awaitTable(t.Context(), s.apply(map[string]string{overridden: byOverride, good: elsewhere}))
	if got := s.mustSum(routers, "router_table_invalid_overrides"); got != rejected {
		t.Errorf("router_table_invalid_overrides is %v after the correction, want %v", got, rejected)
	}
	s.goOn(sessions, 1)
}

// checkKept asks a router why a namespace with a bad override is where it is.
func (s *system) checkKept(r *router, namespace, owner, value, inForce string) {
	s.t.Helper()
	o, err := r.owner(s.t.Context(), namespace)
	switch {
	case err != nil:
		s.t.Error(err)
	case o.Owner != owner || o.Why != "previous":
		s.t.Errorf("%s: %s belongs to %q by %q, want %q by \"kept\"", r.pod, namespace, o.Owner, o.Why, owner)
	case len(o.Rejected) != 1 || o.Rejected[0].Value != value || o.Rejected[0].InForce != inForce || o.Rejected[0].Expected == "":
		s.t.Errorf("%s: %s: rejected is %+v, want value %q, in force %q, and what would be right", r.pod, namespace, o.Rejected, value, inForce)
	}
}

// logged is nil if a line of the router's log since then has all these words.
func (s *system) logged(ctx context.Context, pod string, since metav1.Time, words ...string) error {
	lines, log, err := s.lines(ctx, pod, since, words...)
	if err == nil && lines == 0 {
		err = fmt.Errorf("log of %s has no line with %q:\n%s", pod, words, log)
	}
	return err
}

// lines counts the lines of the router's log since then that have all these
// words.
func (s *system) lines(ctx context.Context, pod string, since metav1.Time, words ...string) (count int, log string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	raw, err := s.client.CoreV1().Pods(s.namespace).GetLogs(pod, &corev1.PodLogOptions{
		Container: "router", SinceTime: &since,
	}).DoRaw(ctx)
	for line := range strings.Lines(string(raw)) {
		if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
			count++
		}
	}
	return count, string(raw), err
}
