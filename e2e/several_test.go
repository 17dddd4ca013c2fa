package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// label is on the ConfigMaps of TestSeveralConfigMaps.
const label = prefix + "overrides"

// TestSeveralConfigMaps runs a router that follows two ConfigMaps, by their
// names and by a label.
func TestSeveralConfigMaps(t *testing.T) {
	const one, two = prefix + "map-1", prefix + "map-2"
	s := newSystem(t)
	s.startKubectlProxy()
	for name, flags := range map[string][]string{
		"names": {"-configmap=" + two, "-configmap=" + one},
		"label": {"-configmap-selector=app=" + label},
	} {
		t.Run(name, func(t *testing.T) {
			sub := *s
			sub.t = t
			sub.makeMap(one, map[string]string{prefix + "a": "backend-1", prefix + "both": "backend-2"})
			sub.makeMap(two, map[string]string{prefix + "b": "backend-3"})
			laptop, d := sub.startRouter(flags...)
			sub.followSeveral(laptop, d, one, two, name == "label")
		})
	}
}

// followSeveral changes two ConfigMaps under the eyes of a router, which follows
// them by their label or their names.
func (s *system) followSeveral(r outside, d *dialer, one, two string, byLabel bool) {
	const a, b, both = prefix + "a", prefix + "b", prefix + "both"
	owns := func(namespace, backend, why string) {
		s.t.Helper()
		eventually(s.t, 10*time.Second, "the router", func() error { return r.owns(s.t.Context(), namespace, backend, why) })
		if err := d.lands(s.t.Context(), namespace, backend); err != nil {
			s.t.Fatal(err)
		}
	}
	gauges := func(conflicts, absent float64) {
		s.t.Helper()
		m, err := r.metrics(s.t.Context())
		if err != nil {
			s.t.Fatal(err)
		}
		if c, o := m.sum("router_table_conflicts"), m.sum("router_watch_object_absent"); c != conflicts || o != absent {
			s.t.Errorf("router_table_conflicts %v, router_watch_object_absent %v, want %v and %v", c, o, conflicts, absent)
		}
	}
	owns(a, "backend-1", "override")
	owns(b, "backend-3", "override")
	owns(both, "backend-2", "override")
	gauges(0, 0)

	stays, err := d.open(s.t.Context(), both)
	if err != nil {
		s.t.Fatal(err)
	}
	f := follow(stays)
	defer f.close()
	s.setMap(two, map[string]string{b: "backend-0", both: "backend-1"})
	owns(b, "backend-0", "override")
	owns(both, "backend-2", "conflict")
	gauges(1, 0)
	o, err := r.owner(s.t.Context(), both)
	if err != nil || len(o.Rejected) != 2 || o.Rejected[0].Value != "backend-2" || o.Rejected[1].Value != "backend-1" || o.Rejected[0].InForce != "backend-2" {
		s.t.Errorf("rejected (error %v): %+v, want what both say", err, o.Rejected)
	}
	r.says(s.t, `"msg":"override rejected","source":"ConfigMap `+s.namespace+"/"+two+`"`)

	if err := s.client.CoreV1().ConfigMaps(s.namespace).Delete(s.t.Context(), two, metav1.DeleteOptions{}); err != nil {
		s.t.Fatal(err)
	}
	if byLabel {
		r.says(s.t, "ConfigMap no longer selected; its overrides are removed")
		owns(b, s.mustOwner(b).Owner, "hash") // the deployed routers do not follow these
		owns(both, "backend-2", "override")
		gauges(0, 0)
	} else {
		r.says(s.t, "ConfigMap deleted or no longer selected; keeping its last overrides")
		owns(b, "backend-0", "override")
		owns(both, "backend-2", "conflict")
		gauges(1, 1)
	}
	s.setMap(one, map[string]string{a: "backend-3", both: "backend-2"})
	owns(a, "backend-3", "override")

	s.makeMap(two, map[string]string{b: "backend-1"})
	owns(b, "backend-1", "override")
	owns(both, "backend-2", "override")
	gauges(0, 0)
	if byLabel {
		s.mustKubectl("", "label", "configmap", two, "app-")
		owns(b, s.mustOwner(b).Owner, "hash")
		s.mustKubectl("", "label", "configmap", one, "app-")
		r.says(s.t, "ConfigMap deleted or no longer selected; keeping its last overrides")
		owns(a, "backend-3", "override")
		gauges(0, 1)
	}
	s.goOn([]*follower{f}, 1)
}

// makeMap creates a ConfigMap with the label, which is deleted when the test
// ends.
func (s *system) makeMap(name string, data map[string]string) {
	s.t.Helper()
	configMaps := s.client.CoreV1().ConfigMaps(s.namespace)
	remove := func(ctx context.Context) {
		if err := configMaps.Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			s.t.Errorf("ConfigMap %s could not be removed: %v", name, err)
		}
	}
	remove(s.t.Context()) // what a killed run left behind
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": label}}, Data: data}
	if _, err := configMaps.Create(s.t.Context(), m, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { remove(context.Background()) })
}

// setMap makes the data of a ConfigMap this.
func (s *system) setMap(name string, data map[string]string) {
	s.t.Helper()
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": label}}, Data: data}
	if _, err := s.client.CoreV1().ConfigMaps(s.namespace).Update(s.t.Context(), m, metav1.UpdateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// TestSelectorRole runs a router as a pod, with a label, and with a service
// account that has the rights of docs/operations.md and no more. It follows, and says
// once that it may not write Events.
func TestSelectorRole(t *testing.T) {
	const name, namespace = prefix + "selector", prefix + "a"
	s := newSystem(t)
	s.makeMap(prefix+"map-1", map[string]string{namespace: "backend-1"})
	s.makeAccount(name)
	began := metav1.Now()
	// It has other overrides than the deployed routers, so it does not share their object.
	r := s.startRouterPod(name, "-handoff=single", "-configmap-selector=app="+label)
	for _, backend := range []string{"backend-2", "backend-3", "backend-0"} {
		s.setMap(prefix+"map-1", map[string]string{namespace: backend})
		eventually(t, 10*time.Second, "the router", func() error { return r.owns(t.Context(), namespace, backend, "override") })
	}
	eventually(t, 10*time.Second, "a line about Events", func() error {
		lines, log, err := s.lines(t.Context(), r.pod, began, "cannot write Event; nothing else depends on it", "cannot create resource")
		if err == nil && lines != 1 {
			err = fmt.Errorf("there are %d lines, want 1:\n%s", lines, log)
		}
		return err
	})
}

// makeAccount makes a service account with the role "view", until the test ends.
func (s *system) makeAccount(name string) {
	s.t.Helper()
	accounts, bindings := s.client.CoreV1().ServiceAccounts(s.namespace), s.client.RbacV1().RoleBindings(s.namespace)
	remove := func(ctx context.Context) {
		for _, err := range []error{accounts.Delete(ctx, name, metav1.DeleteOptions{}), bindings.Delete(ctx, name, metav1.DeleteOptions{})} {
			if err != nil && !apierrors.IsNotFound(err) {
				s.t.Errorf("%s could not be removed: %v", name, err)
			}
		}
	}
	remove(s.t.Context())
	s.t.Cleanup(func() { remove(context.Background()) })
	meta := metav1.ObjectMeta{Name: name}
	_, err := accounts.Create(s.t.Context(), &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	_, err = bindings.Create(s.t.Context(), &rbac.RoleBinding{
		ObjectMeta: meta,
		RoleRef:    rbac.RoleRef{APIGroup: rbac.GroupName, Kind: "ClusterRole", Name: "view"},
		Subjects:   []rbac.Subject{{Kind: rbac.ServiceAccountKind, Name: name, Namespace: s.namespace}},
	}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
}

// startRouterPod runs the deployed router with other flags, and with the service
// account of its name, until the test ends, and waits until it is ready. Nothing
// leads clients to it.
func (s *system) startRouterPod(name string, flags ...string) *router {
	s.t.Helper()
	deployed := s.pods(s.t.Context(), "router")[0].Spec
	at := slices.IndexFunc(deployed.Containers, func(c corev1.Container) bool { return c.Name == "router" })
	c := deployed.Containers[at]
	c.Args, c.VolumeMounts = append(flags, "-listen=127.0.0.1:8000", "-log-format=json"), nil
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{ServiceAccountName: name, Containers: []corev1.Container{c},
			SecurityContext: deployed.SecurityContext, EnableServiceLinks: deployed.EnableServiceLinks},
	}
	pods := s.client.CoreV1().Pods(s.namespace)
	if _, err := pods.Create(s.t.Context(), pod, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		now := metav1.DeleteOptions{GracePeriodSeconds: new(int64)}
		if err := pods.Delete(context.Background(), name, now); err != nil {
			s.t.Errorf("pod %s could not be removed: %v", name, err)
		}
	})
	var running *corev1.Pod
	eventually(s.t, time.Minute, "the router's pod to be ready", func() (err error) {
		running, err = pods.Get(s.t.Context(), name, metav1.GetOptions{})
		if err == nil && !slices.ContainsFunc(running.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.Ready }) {
			err = fmt.Errorf("it is %s", running.Status.Phase)
		}
		return err
	})
	return s.newRouter(*running)
}
