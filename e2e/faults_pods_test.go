//go:build controlplane

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// newDeployed is the system of "make deploy", and its control plane.
func newDeployed(t *testing.T) (*system, *plane) {
	t.Helper()
	p := newPlane(t)
	return newSystem(t), p
}

// TestFaultPodReplaced replaces a backend's pod while its process lives on, as it
// does on a node that is cut off: the kubelet's clock is stopped, the pod is deleted
// by force, and its successor is ready at another address. The sessions with the
// old process are closed, and each namespace has one with the new only after that.
func TestFaultPodReplaced(t *testing.T) {
	const victim, successor = "backend-2", prefix + "successor"
	s, p := newDeployed(t)
	mine, others := s.split(victim)
	old, there := s.pod(victim), s.startSuccessor(victim, successor)
	var left, stay []*follower
	for _, namespace := range mine {
		left = append(left, s.mustFollow(namespace), s.mustFollow(namespace))
	}
	for _, namespace := range others {
		stay = append(stay, s.mustFollow(namespace))
	}

	p.component("pause", "kubelet")
	s.mustKubectl("", "delete", "pod", victim, "--force", "--grace-period=0", "--wait=false")
	next := s.awaitOtherPod(victim, old.UID)
	s.goOn(left, 2) // there is no other pod to have them yet
	var clients []*returner
	for _, namespace := range mine {
		clients = append(clients, s.goAndReturn(namespace))
	}
	s.awaitWaiting(len(clients))
	s.callReady(next, there.Status.PodIP)

	began := time.Now()
	checkMoved(t, left)
	closed := time.Since(began)
	s.awaitOpen(clients, "")
	for _, r := range s.routers(t.Context()) {
		if err := r.hasPod(s, mine[0], victim, next.UID); err != nil {
			t.Error(err)
		}
	}
	overlap := s.checkReplaced(mine, old, there)
	for _, c := range clients {
		if visits, _ := c.history(); visits[0].server != successor {
			t.Errorf("%s landed on %s, want %s", c.namespace, visits[0].server, successor)
		}
	}
	s.goOn(append(stay, current(clients)...), 2)

	p.component("resume", "kubelet")
	s.awaitOwn(next, old, there)
	s.mustKubectl("", "delete", "pod", successor, "--wait=false")
	eventually(t, 30*time.Second, "the sessions to be with "+victim, func() error {
		for _, namespace := range mine {
			if err := s.dialer.lands(t.Context(), namespace, victim); err != nil {
				return err
			}
		}
		return nil
	})
	s.goOn(stay, 2)
	t.Logf("pod replaced: %d sessions with the old process were closed within %s; one of the same router overlapped with a new one for at most %s, of another router %s",
		len(left), closed.Round(time.Millisecond), overlap[0], overlap[1])
}

// checkMoved holds that the sessions are closed as in a move.
func checkMoved(t *testing.T, all []*follower) {
	t.Helper()
	for _, f := range all {
		select {
		case <-f.done:
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: its session with %s is not closed", f.session.first.NS, f.session.first.Server)
		}
		if err := f.alive(); websocket.CloseStatus(err) != websocket.StatusServiceRestart {
			t.Errorf("a session was ended by %v, want Close 1012", err)
		}
	}
}

// awaitOwn waits until the kubelet has started the pod, at an address that none of
// the others has, and all are ready.
func (s *system) awaitOwn(pod *corev1.Pod, others ...*corev1.Pod) {
	s.t.Helper()
	eventually(s.t, 60*time.Second, pod.Name+" to have an address of its own", func() error {
		now := s.pod(pod.Name)
		for _, other := range others {
			if now.UID != pod.UID || now.Status.PodIP == other.Status.PodIP {
				return fmt.Errorf("it has %s, its uid is %s", now.Status.PodIP, now.UID)
			}
		}
		return s.whole(s.t.Context())
	})
}

// current returns the sessions that the clients have now.
func current(clients []*returner) (all []*follower) {
	for _, c := range clients {
		c.mu.Lock()
		if c.current != nil {
			all = append(all, c.current)
		}
		c.mu.Unlock()
	}
	return all
}

// pod returns a pod by its name.
func (s *system) pod(name string) *corev1.Pod {
	s.t.Helper()
	pod, err := s.client.CoreV1().Pods(s.namespace).Get(s.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return pod
}

// startSuccessor starts a pod with the backend's program, which no Service selects,
// until the test ends. Its host has no backend's name: it takes what is meant for any.
func (s *system) startSuccessor(backend, name string) *corev1.Pod {
	s.t.Helper()
	remove := func() {
		ctx, cancel := cleanupContext()
		defer cancel()
		if _, err := s.kubectl(ctx, "", "delete", "pod", name, "--ignore-not-found", "--wait=false"); err != nil {
			s.t.Error(err)
		}
	}
	s.mustKubectl("", "delete", "pod", name, "--ignore-not-found")
	s.t.Cleanup(remove)
	spec := s.pod(backend).Spec
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PodSpec{
		AutomountServiceAccountToken: spec.AutomountServiceAccountToken, SecurityContext: spec.SecurityContext, Containers: spec.Containers}}
	if _, err := s.client.CoreV1().Pods(s.namespace).Create(s.t.Context(), pod, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, 30*time.Second, name+" to be ready", func() error {
		if pod = s.pod(name); !isReady(pod) {
			return errors.New("it is not")
		}
		return nil
	})
	return pod
}

// isReady reports whether the pod's condition Ready is true.
func isReady(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// awaitOtherPod waits until another pod than that of the uid has the name, and is
// bound to a node. A kubelet that has lost the API server several times connects again
// after up to half a minute.
func (s *system) awaitOtherPod(name string, uid types.UID) *corev1.Pod {
	s.t.Helper()
	var pod *corev1.Pod
	eventually(s.t, 90*time.Second, "another "+name, func() (err error) {
		pod, err = s.client.CoreV1().Pods(s.namespace).Get(s.t.Context(), name, metav1.GetOptions{})
		if err == nil && (pod.UID == uid || pod.Spec.NodeName == "") {
			err = fmt.Errorf("%s, on node %q", pod.UID, pod.Spec.NodeName)
		}
		return err
	})
	return pod
}

// awaitWaiting waits until the routers hold this many upgrades.
func (s *system) awaitWaiting(upgrades int) {
	s.t.Helper()
	eventually(s.t, 10*time.Second, "upgrades to wait", func() error {
		sum, err := sumOver(s.t.Context(), s.routers(s.t.Context()), "router_pending_upgrades")
		if err == nil && int(sum) < upgrades {
			err = fmt.Errorf("%v wait, want %d", sum, upgrades)
		}
		return err
	})
}

// callReady says of a pod that it is ready at the address, in place of a kubelet.
func (s *system) callReady(pod *corev1.Pod, address string) {
	s.t.Helper()
	status, err := json.Marshal(map[string]any{"status": corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: address, PodIPs: []corev1.PodIP{{IP: address}},
		Conditions: []corev1.PodCondition{
			{Type: corev1.ContainersReady, Status: corev1.ConditionTrue}, {Type: corev1.PodReady, Status: corev1.ConditionTrue}}}})
	if err != nil {
		s.t.Fatal(err)
	}
	_, err = s.client.CoreV1().Pods(s.namespace).Patch(s.t.Context(), pod.Name, types.StrategicMergePatchType, status, metav1.PatchOptions{}, "status")
	if err != nil {
		s.t.Fatal(err)
	}
}

// TestFaultEndpointsForbidden takes the right to read EndpointSlices from routers that
// run, and ends their watches: the API server is killed. A backend that restarts at
// another address meanwhile is found by DNS. When the right is back, so is the watch.
func TestFaultEndpointsForbidden(t *testing.T) {
	const victim = "backend-1"
	s, p := newDeployed(t)
	mine, others := s.split(victim)
	var clients []*returner
	for _, namespace := range mine {
		clients = append(clients, s.goAndReturn(namespace))
	}
	var stay []*follower
	for _, namespace := range others {
		stay = append(stay, s.mustFollow(namespace))
	}
	s.awaitOpen(clients, "")
	old := s.pod(victim)
	giveBack := s.forbidEndpoints()
	p.kill("apiserver")
	p.component("start", "apiserver")
	p.reconnect()
	s.client = p.client
	s.awaitEndpointsForbidden("the EndpointSlices to be forbidden")

	s.mustKubectl("", "delete", "pod", victim, "--wait=false")
	s.awaitOwn(s.awaitOtherPod(victim, old.UID), old)
	ready := time.Now()
	// A DNS server that has lost the API server several times connects again after up to a
	// minute, as a kubelet does, and has the old address until then.
	eventually(t, 2*time.Minute, "all clients to be back", func() error { return returned(clients) })
	late := afterReady(clients, ready)
	for _, namespace := range mine {
		s.mustLand(namespace, victim)
	}
	s.awaitEndpointsForbidden("the EndpointSlices to be forbidden still")
	gaps, refusals := checkReturns(t, clients, victim)

	giveBack()
	s.awaitEndpointWatch("the EndpointSlices to be followed", func(m metrics, object string) bool {
		return m.sum("router_watch_state", "object", object, "state", "watching") == 1
	})
	for _, r := range s.routers(t.Context()) {
		if err := r.hasPod(s, mine[0], victim, s.pod(victim).UID); err != nil {
			t.Error(err)
		}
	}
	s.goOn(append(stay, current(clients)...), 2)
	t.Logf("endpoints forbidden: %d clients were away for %s, and back %s after %s was ready; %d attempts were refused with 503",
		len(clients), gaps, late, victim, refusals)
}

// returned is nil if each client has a session that is not its first.
func returned(clients []*returner) error {
	for _, c := range clients {
		visits, failed := c.history()
		if _, open := c.open(); !open || len(visits) < 2 {
			return fmt.Errorf("%s had %d sessions, open %t; attempts failed: %v", c.namespace, len(visits), open, some(failed))
		}
	}
	return nil
}

// forbidEndpoints takes the rule for EndpointSlices from the routers' Role, until the
// returned function is called or the test ends.
func (s *system) forbidEndpoints() (giveBack func()) {
	s.t.Helper()
	before, err := s.client.RbacV1().Roles(s.namespace).Get(s.t.Context(), account, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	set := func(rules []rbacv1.PolicyRule) {
		s.t.Helper()
		ctx, stop := cleanupContext()
		defer stop()
		role := before.DeepCopy()
		role.ResourceVersion, role.Rules = "", rules
		if _, err := s.client.RbacV1().Roles(s.namespace).Update(ctx, role, metav1.UpdateOptions{}); err != nil {
			s.t.Error(err)
		}
	}
	giveBack = func() { set(before.Rules) }
	s.t.Cleanup(giveBack)
	without := slices.DeleteFunc(slices.Clone(before.Rules), func(r rbacv1.PolicyRule) bool {
		return slices.Contains(r.Resources, "endpointslices")
	})
	if len(without) == len(before.Rules) {
		s.t.Fatalf("Role %s has no rule for endpointslices (\"make deploy\" gives it)", account)
	}
	set(without)
	return giveBack
}

// awaitEndpointsForbidden waits until the watch of EndpointSlices fails in every router,
// and has failed as forbidden.
func (s *system) awaitEndpointsForbidden(what string) {
	s.t.Helper()
	s.awaitEndpointWatch(what, func(m metrics, object string) bool {
		return m.sum("router_watch_consecutive_failures", "object", object) > 0 &&
			m.sum("router_watch_failures_total", "object", object, "class", "forbidden") > 0
	})
}

// awaitEndpointWatch waits until the watch of EndpointSlices is so in every router.
func (s *system) awaitEndpointWatch(what string, is func(m metrics, object string) bool) {
	s.t.Helper()
	object := "EndpointSlice " + s.namespace + "/kubernetes.io/service-name=headless"
	eventually(s.t, 40*time.Second, what, func() error {
		for _, r := range s.routers(s.t.Context()) {
			m, err := r.metrics(s.t.Context())
			if err != nil {
				return err
			}
			if !is(m, object) {
				return fmt.Errorf("it is not so in %s", r.pod)
			}
		}
		return nil
	})
}

// hasPod is nil if /owner of the namespace and /backends say that the backend is the
// pod with this uid.
func (r *router) hasPod(s *system, namespace, backend string, uid types.UID) error {
	o, err := r.owner(s.t.Context(), namespace)
	if err != nil {
		return err
	}
	body, err := r.get(s.t.Context(), "/backends")
	if err != nil {
		return err
	}
	var answer struct {
		Backends []struct {
			Name   string
			PodUID string `json:"pod_uid"`
		}
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		return err
	}
	for _, b := range answer.Backends {
		if b.Name == backend && (b.PodUID != string(uid) || o.PodUID != b.PodUID) {
			return fmt.Errorf("%s: /owner has the pod %q, /backends %q, want %q", r.pod, o.PodUID, b.PodUID, uid)
		}
	}
	return nil
}

// checkReplaced holds, by the logs of the old process and the new, that no router
// opened a session of a namespace with the new one while it had one with the old. It
// returns how long namespaces had both, by one router and by two.
func (s *system) checkReplaced(namespaces []string, old, next *corev1.Pod) (overlap [2]time.Duration) {
	s.t.Helper()
	names := map[string]bool{}
	for _, namespace := range namespaces {
		names[namespace] = true
	}
	var before, after map[string][]stay
	eventually(s.t, 10*time.Second, "the processes to write down what they had", func() error {
		before, after = s.written(old).of(names), s.written(next).of(names)
		for namespace := range names {
			for _, one := range before[namespace] {
				if one.ended.IsZero() {
					return fmt.Errorf("%s has %+v", namespace, one)
				}
			}
			if len(before[namespace]) == 0 || len(after[namespace]) == 0 {
				return fmt.Errorf("%s had %d sessions, and has %d", namespace, len(before[namespace]), len(after[namespace]))
			}
		}
		return nil
	})
	for namespace := range names {
		for _, first := range before[namespace] {
			for _, then := range after[namespace] {
				by := 1
				if first.router == then.router {
					by = 0
				}
				overlap[by] = max(overlap[by], first.ended.Sub(then.opened))
			}
		}
	}
	if overlap[0] > 100*time.Millisecond { // a process may write down late, but less than -move-settle
		s.t.Errorf("a router had sessions of one namespace with both processes for %s", overlap[0])
	}
	return overlap
}

// written is what a backend has written down until now, read from its node, which is
// this machine: the API server cannot ask a kubelet that is stopped.
func (s *system) written(pod *corev1.Pod) *diary {
	s.t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/var/log/pods/%s_%s_%s/*/*.log", pod.Namespace, pod.Name, pod.UID))
	if err != nil || len(files) == 0 {
		s.t.Fatalf("no log of %s: %v", pod.Name, err)
	}
	d := &diary{s: s}
	for _, file := range files {
		log, err := os.ReadFile(file)
		if err != nil {
			s.t.Fatal(err)
		}
		var said strings.Builder
		for line := range strings.Lines(string(log)) {
			_, text, _ := strings.Cut(line, " F ") // time, stream, and that the line is full
			said.WriteString(text)
		}
		d.scan(pod, strings.NewReader(said.String()))
	}
	return d
}
