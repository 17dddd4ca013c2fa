package e2e

import (
	"bytes"
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	authorization "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestEvents applies a ConfigMap with a bad entry, where no policy refuses it:
// `kubectl describe` tells what came of it, once although there are several
// routers, and traffic stays where it was. No router reports an annotation.
func TestEvents(t *testing.T) {
	const overridden, hashed, good = prefix + "event-overridden", prefix + "event-hashed", prefix + "event-good"
	s := newSystem(t)
	s.keepOverrides()
	s.withoutPolicy()
	byOverride := s.other(s.mustOwner(overridden).Owner)
	byHash := s.mustOwner(hashed).Owner
	elsewhere := s.other(s.mustOwner(good).Owner)

	s.applyTold(map[string]string{overridden: byOverride}, "1 overrides added, 0 changed, ", "")
	sessions := []*follower{s.mustFollow(overridden), s.mustFollow(hashed)}
	s.applyTold(map[string]string{overridden: "bakend-2", hashed: "backend-99", good: elsewhere},
		"1 overrides added, 0 changed, 0 removed", fmt.Sprintf(`rejected overrides: 2; `+
			`%s: "backend-99", expected backend-0 to backend-3, in force: hash; %s: "bakend-2", expected backend-0 to backend-3, in force: %s`, hashed, overridden, byOverride))
	s.mustLand(overridden, byOverride)
	s.mustLand(hashed, byHash)
	s.mustLand(good, elsewhere)
	s.goOn(sessions, 2)
	untold := []string{s.annotate("router-test/seen=yes"), s.annotate("router-test/seen-")}
	s.applyTold(map[string]string{overridden: byOverride, good: s.other(elsewhere)}, "0 overrides added, 1 changed, 0 removed", "")
	for _, version := range untold { // what came later was written by all
		if events := s.eventsOf(version); len(events) > 0 {
			t.Errorf("another annotation has Events: %v", events)
		}
	}
	s.applyTold(nil, "0 overrides added, 0 changed, 2 removed", "")
	s.goOn(sessions[1:], 1)
}

// applyTold applies overrides, waits until each router has tried to write the
// Events about that, and checks that there is one of a kind: what the version did,
// and a Warning if that is not "".
func (s *system) applyTold(data map[string]string, did, warning string) {
	s.t.Helper()
	before, err := s.conflicts(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	version := s.apply(data)
	want := []string{"Normal OverridesAccepted accepted resourceVersion " + version + ": " + did}
	if warning != "" {
		want = append(want, "Warning OverridesRejected "+warning)
	}
	least := before + float64(len(want)*(len(s.routers(s.t.Context()))-1))
	var events []corev1.Event
	eventually(s.t, 20*time.Second, "all routers to write their Events", func() error {
		n, err := s.conflicts(s.t.Context())
		if events = s.eventsOf(version); err == nil && (n < least || len(events) < len(want)) {
			err = fmt.Errorf("there are %d, want %d, and the API server has refused %v, want %v", len(events), len(want), n, least)
		}
		return err
	})
	var got []string
	for _, e := range events {
		got = append(got, e.Type+" "+e.Reason+" "+e.Message)
	}
	slices.Sort(got)
	if !slices.EqualFunc(got, want, strings.HasPrefix) {
		s.t.Errorf("Events of version %s: %q, want %q", version, got, want)
	}
	_, described, _ := strings.Cut(s.mustKubectl("", "describe", "configmap", configMap), "\nEvents:")
	for _, e := range events {
		line := regexp.MustCompile(e.Type + ` +` + e.Reason + ` .*` + regexp.QuoteMeta(e.Message))
		if !line.MatchString(described) {
			s.t.Errorf("kubectl describe does not show %s, but\n%s", line, described)
		}
	}
}

// annotate gives the ConfigMap another annotation, or takes one away, which is a
// version that all routers' tables say and no swap.
func (s *system) annotate(annotation string) (version string) {
	s.t.Helper()
	const swaps = "router_table_updates_total"
	routers := s.routers(s.t.Context())
	before := s.mustSum(routers, swaps)
	version = s.mustKubectl("", "annotate", "configmap", configMap, annotation, "--output=jsonpath={.metadata.resourceVersion}")
	s.awaitTable(s.t.Context(), version)
	if after := s.mustSum(routers, swaps); after != before {
		s.t.Errorf("%s is %v after the annotation %s, want %v", swaps, after, annotation, before)
	}
	return version
}

// eventsOf returns the Events about this version of the ConfigMap, but for those of moves:
// each router has its own.
func (s *system) eventsOf(version string) []corev1.Event {
	s.t.Helper()
	list, err := s.client.CoreV1().Events(s.namespace).List(s.t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.kind=ConfigMap," +
		"involvedObject.name=" + configMap + ",involvedObject.resourceVersion=" + version})
	if err != nil {
		s.t.Fatal(err)
	}
	return slices.DeleteFunc(list.Items, func(e corev1.Event) bool { return e.Reason == "SessionsMoved" })
}

// conflicts is how many Events the API server has refused since its start, as it
// had others of their names.
func (s *system) conflicts(ctx context.Context) (float64, error) {
	body, err := s.client.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return 0, err
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	return metrics(families).sum("apiserver_request_total", "verb", "POST", "resource", "events", "code", "409"), err
}

// TestEventsForbidden: without the permission to write Events, routers follow
// the overrides all the same, and say once that they may not.
func TestEventsForbidden(t *testing.T) {
	const namespace = prefix + "event-forbidden"
	s := newSystem(t)
	s.keepOverrides()
	owner := s.other(s.mustOwner(namespace).Owner)
	s.applyTold(map[string]string{namespace: owner}, "1 overrides added, 0 changed, ", "")

	stays := []*follower{s.mustFollow(prefix + "event-stays")}
	began, permit := metav1.Now(), s.withoutEvents()
	var versions []string
	for range 3 {
		owner = s.other(owner)
		versions = append(versions, s.apply(map[string]string{namespace: owner}))
		s.awaitTable(t.Context(), versions[len(versions)-1])
		s.mustLand(namespace, owner)
		s.goOn(stays, 2) // in two seconds the Event is tried
	}
	permit()
	s.applyTold(nil, "0 overrides added, 0 changed, 1 removed", "")
	for _, version := range versions {
		if events := s.eventsOf(version); len(events) > 0 {
			t.Errorf("without the permission there are Events: %v", events)
		}
	}
	for _, r := range s.routers(t.Context()) {
		lines, log, err := s.lines(t.Context(), r.pod, began, "cannot write Event; nothing else depends on it", "cannot create resource", "events")
		if err != nil || lines != 1 {
			t.Errorf("%s has logged it %d times (error %v), want once:\n%s", r.pod, lines, err, log)
		}
	}
}

// withoutEvents takes the permission to write Events from the routers, until
// permit is called or the test ends.
func (s *system) withoutEvents() (permit func()) {
	s.t.Helper()
	roles := s.client.RbacV1().Roles(s.namespace)
	role, err := roles.Get(s.t.Context(), "router", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	set := func(rules []rbac.PolicyRule, allowed bool) {
		role.Rules, role.ResourceVersion = rules, ""
		if _, err := roles.Update(context.Background(), role, metav1.UpdateOptions{}); err != nil {
			s.t.Fatalf("the Role: %v", err)
		}
		s.awaitPermission(allowed)
	}
	rules := role.Rules
	permit = func() { set(rules, true) }
	s.t.Cleanup(permit)
	set(slices.DeleteFunc(slices.Clone(rules), func(r rbac.PolicyRule) bool { return slices.Contains(r.Resources, "events") }), false)
	return permit
}

// awaitPermission waits until the routers may write Events, or may not: the API
// server follows its Roles with a delay.
func (s *system) awaitPermission(allowed bool) {
	s.t.Helper()
	review := &authorization.SubjectAccessReview{Spec: authorization.SubjectAccessReviewSpec{
		User:               "system:serviceaccount:" + s.namespace + ":router",
		ResourceAttributes: &authorization.ResourceAttributes{Namespace: s.namespace, Verb: "create", Resource: "events"},
	}}
	eventually(s.t, 20*time.Second, "the permission to write Events to change", func() error {
		answer, err := s.client.AuthorizationV1().SubjectAccessReviews().Create(context.Background(), review, metav1.CreateOptions{})
		if err == nil && answer.Status.Allowed != allowed {
			err = fmt.Errorf("it is %t, want %t", answer.Status.Allowed, allowed)
		}
		return err
	})
}
