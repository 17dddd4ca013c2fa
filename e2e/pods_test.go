package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

// TestPods holds what runs against the manifests: how many pods, as which
// user, with which rights.
func TestPods(t *testing.T) {
	s := newSystem(t)
	set, err := s.client.AppsV1().StatefulSets(s.namespace).Get(t.Context(), "backend", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := set.Status.ReadyReplicas; got != 4 {
		t.Errorf("StatefulSet backend: %d pods ready, want 4", got)
	}
	deployment, err := s.client.AppsV1().Deployments(s.namespace).Get(t.Context(), "router", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := deployment.Status.ReadyReplicas; got != 2 {
		t.Errorf("Deployment router: %d pods ready, want 2", got)
	}
	for _, app := range []string{"backend", "router"} {
		for _, pod := range s.pods(t.Context(), app) {
			checkPod(t, &pod)
		}
	}
	if !s.hasNginx() {
		t.Log("no container of the routers has programs to ask the kernel with")
		return
	}
	for _, pod := range s.pods(t.Context(), "router") {
		s.checkInside(pod.Name)
	}
}

// checkPod holds the settings of a pod that keep an intruder small.
func checkPod(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	want := func(container string, ok bool, what string) {
		if !ok {
			t.Errorf("%s, container %q: want %s", pod.Name, container, what)
		}
	}
	own := pod.Spec.SecurityContext
	want("", own.RunAsNonRoot != nil && *own.RunAsNonRoot, "runAsNonRoot")
	want("", own.RunAsUser != nil && *own.RunAsUser == 65532, "runAsUser 65532")
	want("", own.RunAsGroup != nil && *own.RunAsGroup == 65532, "runAsGroup 65532")
	want("", own.SeccompProfile != nil && own.SeccompProfile.Type == corev1.SeccompProfileTypeRuntimeDefault, "seccomp RuntimeDefault")
	for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
		own := c.SecurityContext
		if own == nil {
			t.Errorf("%s, container %q has no securityContext", pod.Name, c.Name)
			continue
		}
		want(c.Name, own.RunAsUser == nil || *own.RunAsUser == 65532, "no other user than the pod's")
		want(c.Name, own.ReadOnlyRootFilesystem != nil && *own.ReadOnlyRootFilesystem, "readOnlyRootFilesystem")
		want(c.Name, own.AllowPrivilegeEscalation != nil && !*own.AllowPrivilegeEscalation, "allowPrivilegeEscalation: false")
		want(c.Name, own.Capabilities != nil && fmt.Sprint(*own.Capabilities) == "{[] [ALL]}", "all capabilities dropped")
		want(c.Name, len(c.Resources.Limits) > 0 && len(c.Resources.Requests) > 0, "requests and limits")
	}
	for _, status := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
		want(status.Name, status.Ready, "ready")
		if status.RestartCount > 0 {
			t.Logf("%s, container %q was restarted %d times", pod.Name, status.Name, status.RestartCount)
		}
	}
}

// checkInside asks the kernel. nginx's container has programs to ask with; the
// router's image has nothing but the router.
func (s *system) checkInside(pod string) {
	s.t.Helper()
	status := s.mustKubectl("", "exec", pod, "-c", "nginx", "--", "cat", "/proc/1/status")
	for _, want := range []string{
		"Uid:\t65532\t65532\t65532\t65532", "Gid:\t65532\t65532\t65532\t65532",
		"CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2",
	} {
		if !strings.Contains(status, want+"\n") {
			s.t.Errorf("%s, nginx: /proc/1/status has no %q:\n%s", pod, want, status)
		}
	}
	_, err := s.kubectl(s.t.Context(), "", "exec", pod, "-c", "nginx", "--", "sh", "-c", "echo x >/usr/share/x")
	if err == nil || !strings.Contains(err.Error(), "Read-only file system") {
		s.t.Errorf("%s, nginx: a write to its root ended with %v, want: Read-only file system", pod, err)
	}
}

// TestManifests holds the manifests against the API server, and what runs
// against the manifests.
func TestManifests(t *testing.T) {
	s := newSystem(t)
	deployed := filepath.Join(s.root, "bin", "deploy")
	s.mustKubectl("", "apply", "-k", deployed, "--dry-run=server")
	if out, err := s.kubectl(t.Context(), "", "diff", "-k", deployed); err != nil {
		t.Errorf("the cluster is not what the manifests say (\"make deploy\"): %v\n%.3000s", err, out)
	}
}

// watchPod returns a pod and a watch of what happens to it from now on. The caller stops
// the watch. It begins with the version of a list, which is of now: that of the pod may be
// older than what the API server still has, and then the watch would end at once.
func (s *system) watchPod(ctx context.Context, name string) (corev1.Pod, watch.Interface) {
	s.t.Helper()
	pods, only := s.client.CoreV1().Pods(s.namespace), metav1.ListOptions{FieldSelector: "metadata.name=" + name}
	list, err := pods.List(ctx, only)
	if err != nil || len(list.Items) != 1 {
		s.t.Fatalf("%d pods %s: %v", len(list.Items), name, err)
	}
	only.ResourceVersion = list.ResourceVersion
	events, err := pods.Watch(ctx, only)
	if err != nil {
		s.t.Fatal(err)
	}
	return list.Items[0], events
}
