package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// handoffLabel is on the pods of routers with -handoff=all.
const handoffLabel = "router-handoff"

// scaleRouters changes the number of routers, and waits until all that should be there are
// ready and all others are gone.
func (s *system) scaleRouters(n int) {
	s.t.Helper()
	s.mustKubectl("", "scale", "deployment", "router", fmt.Sprintf("--replicas=%d", n))
	s.awaitWhole()
	s.awaitDrained()
}

// setMode runs the routers with another -handoff. The label goes together with the mode
// "all".
func (s *system) setMode(mode string) {
	s.t.Helper()
	s.setRouters(func(template *corev1.PodTemplateSpec, c *corev1.Container) {
		c.Args = append(slices.DeleteFunc(c.Args, func(arg string) bool {
			return strings.HasPrefix(arg, "-handoff=")
		}), "-handoff="+mode)
		if delete(template.Labels, handoffLabel); mode == "all" {
			template.Labels[handoffLabel] = "all"
		}
	})
}

// setRouters changes the pods' template of the Deployment, and waits for the rollout.
func (s *system) setRouters(change func(*corev1.PodTemplateSpec, *corev1.Container)) {
	s.t.Helper()
	deployment, err := s.client.AppsV1().Deployments(s.namespace).Get(s.t.Context(), "router", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	template := deployment.Spec.Template
	at := slices.IndexFunc(template.Spec.Containers, func(c corev1.Container) bool { return c.Name == "router" })
	change(&template, &template.Spec.Containers[at])
	s.setTemplate(s.t.Context(), "deployment/router", template)
	s.awaitWhole()
	s.awaitDrained()
}

// setBackends changes the pods' template of the StatefulSet, as setRouters does.
func (s *system) setBackends(change func(*corev1.PodTemplateSpec, *corev1.Container)) {
	s.t.Helper()
	template := s.statefulSet().Spec.Template
	change(&template, &template.Spec.Containers[0])
	s.setTemplate(s.t.Context(), "statefulset/backend", template)
	s.awaitWhole()
}

// setTemplate replaces the pods' template of an object, and waits for the rollout.
func (s *system) setTemplate(ctx context.Context, object string, template corev1.PodTemplateSpec) {
	s.t.Helper()
	text, err := json.Marshal([]any{map[string]any{"op": "replace", "path": "/spec/template", "value": template}})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, args := range [][]string{{"patch", object, "--type=json", "--patch=" + string(text)}, {"rollout", "status", "--timeout=4m", object}} {
		if _, err := s.kubectl(ctx, "", args...); err != nil {
			s.t.Errorf("%s: %v", object, err)
			return
		}
	}
}

// keepWorkloads puts routers and backends back when the test ends: their number and the
// templates of their pods.
func (s *system) keepWorkloads() {
	s.t.Helper()
	deployment, err := s.client.AppsV1().Deployments(s.namespace).Get(s.t.Context(), "router", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	set := s.statefulSet()
	s.t.Cleanup(func() {
		ctx, stop := context.WithTimeout(context.Background(), 8*time.Minute)
		defer stop()
		for object, replicas := range map[string]int32{"statefulset/backend": *set.Spec.Replicas, "deployment/router": *deployment.Spec.Replicas} {
			if _, err := s.kubectl(ctx, "", "scale", object, fmt.Sprintf("--replicas=%d", replicas)); err != nil {
				s.t.Error(err)
			}
		}
		s.setTemplate(ctx, "statefulset/backend", set.Spec.Template)
		s.setTemplate(ctx, "deployment/router", deployment.Spec.Template)
	})
}

// statefulSet returns the StatefulSet as it is.
func (s *system) statefulSet() *appsv1.StatefulSet {
	s.t.Helper()
	set, err := s.client.AppsV1().StatefulSets(s.namespace).Get(s.t.Context(), "backend", metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return set
}

// TestHandoffModes has routers that do not wait for each other: then namespaces are with two
// backends for a while, or TestHandoff would prove nothing. At last it rolls out "all" while
// routers with "off" have clients: the new ones do not wait for an answer of these, which
// would never come.
func TestHandoffModes(t *testing.T) {
	sessions := number(t, "E2E_HANDOFF", 800)
	s := newSystem(t)
	s.keepOverrides()
	s.keepWorkloads()
	for _, mode := range []string{"single", "off"} {
		s.setMode(mode)
		s.hasMode(mode)
		c := s.newUneven("modes-"+mode, min(500, sessions), sessions)
		c.moveUnderVisits("handoff, " + mode)
		two := c.twoOwners()
		t.Logf("handoff, %s: %d of %d namespaces had two owners at once, for %s", mode, len(two), len(c.names), two)
		if two.percentile(100) < 50*time.Millisecond { // some visits last visitTime
			t.Errorf("-handoff=%s: namespaces had two owners for %s at most, want 50 ms or more", mode, two.percentile(100))
		}
		c.leave()
	}
	var all []*returner
	for i := range 50 {
		all = append(all, s.goAndReturn(fmt.Sprintf("%srollout-%d", prefix, i)))
	}
	s.awaitOpen(all, "")
	s.mustKubectl("", "delete", "configmap", handoffObject) // as if there had never been a plan
	s.applyHandoff()
	began := time.Now()
	s.setMode("all")
	s.awaitOpen(all, "")
	s.hasMode("all")
	t.Logf("handoff: the rollout from off to all took %.1f s", time.Since(began).Seconds())
	for _, r := range all {
		if _, refused := r.history(); some(refused) != nil {
			t.Errorf("%s was refused: %v", r.namespace, some(refused))
		}
	}
}

// hasMode fails the test unless all routers run in this mode.
func (s *system) hasMode(mode string) {
	s.t.Helper()
	for _, r := range s.routers(s.t.Context()) {
		m, err := r.metrics(s.t.Context())
		if got := m.label("router_handoff_info", "mode"); err != nil || got != mode {
			s.t.Errorf("%s runs in the mode %q (error %v), want %q", r.pod, got, err, mode)
		}
	}
}
