package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// handoffVersion is a version of the object that routers share.
type handoffVersion struct {
	at   time.Time
	step int64             // of its plan, 0 if it has none
	data map[string]string // as it is
}

// handoffWatch sees each version of the object: each write that changed something.
type handoffWatch struct {
	s        *system
	mu       sync.Mutex
	versions []handoffVersion // guarded by mu; the first one is from before
	lost     error            // guarded by mu
}

// watchHandoff watches the object until the test ends.
func (s *system) watchHandoff() *handoffWatch {
	s.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	only := metav1.ListOptions{FieldSelector: "metadata.name=" + handoffObject}
	list, err := s.client.CoreV1().ConfigMaps(s.namespace).List(ctx, only)
	if err != nil || len(list.Items) != 1 {
		stop()
		s.t.Fatalf("%d objects %s (error %v), want 1", len(list.Items), handoffObject, err)
	}
	w := &handoffWatch{s: s}
	w.add(&list.Items[0])
	only.ResourceVersion = list.ResourceVersion
	events, err := s.client.CoreV1().ConfigMaps(s.namespace).Watch(ctx, only)
	if err != nil {
		stop()
		s.t.Fatal(err)
	}
	var reading sync.WaitGroup
	reading.Go(func() {
		for event := range events.ResultChan() {
			if object, ok := event.Object.(*corev1.ConfigMap); ok {
				w.add(object)
				continue
			}
			w.mu.Lock()
			w.lost = apierrors.FromObject(event.Object)
			w.mu.Unlock()
		}
	})
	s.t.Cleanup(func() {
		stop()
		events.Stop()
		reading.Wait()
	})
	return w
}

// stepOf returns the step of a plan, 0 if there is none.
func stepOf(data map[string]string) int64 {
	var plan struct{ Step int64 }
	if json.Unmarshal([]byte(data["plan"]), &plan) != nil {
		return 0
	}
	return plan.Step
}

func (w *handoffWatch) add(object *corev1.ConfigMap) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.versions = append(w.versions, handoffVersion{time.Now(), stepOf(object.Data), maps.Clone(object.Data)})
}

// since returns how many writes there were after the first n versions, and how many steps.
func (w *handoffWatch) since(n int) (writes, steps int) {
	w.s.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lost != nil {
		w.s.t.Fatalf("the watch of %s has ended: %v", handoffObject, w.lost)
	}
	for i := n; i < len(w.versions); i++ {
		if w.versions[i].step != w.versions[i-1].step {
			steps++
		}
	}
	return len(w.versions) - n, steps
}

// seen returns how many versions there were.
func (w *handoffWatch) seen() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.versions)
}

// describe returns what was written after the first n versions.
func (w *handoffWatch) describe(n int) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out strings.Builder
	for i := max(n, 1); i < len(w.versions); i++ {
		now, before := w.versions[i], w.versions[i-1].data
		fmt.Fprintf(&out, "\n%s", now.at.Format("15:04:05.000"))
		for _, key := range slices.Sorted(maps.Keys(now.data)) {
			if now.data[key] != before[key] {
				fmt.Fprintf(&out, " %s: %s", key, now.data[key])
			}
		}
	}
	return out.String()
}

// TestHandoffWrites counts the writes of the routers: none at rest, at most 2 + 3R for an edit that
// moves no session, and 1 + R for each further step; or 1 + 2R if the routers may not move
// their next sessions yet when they have released those of the step.
func TestHandoffWrites(t *testing.T) {
	const pause = 5 * time.Second // in which nothing is written
	s := newSystem(t)
	s.keepOverrides()
	s.awaitDrained() // who leaves, writes
	routers := len(s.routers(t.Context()))
	s.awaitRest("", 30*time.Second)
	w := s.watchHandoff()
	quiet := func(what string) {
		t.Helper()
		before := w.seen()
		until(t.Context(), pause)
		if writes, _ := w.since(before); writes > 0 {
			t.Errorf("%s: %d writes within %s, want none:%s", what, writes, pause, w.describe(before))
		}
	}
	quiet("at rest")
	for i := range 5 {
		before := w.seen()
		c, err := s.patch(t.Context(), map[string]any{prefix + "writes": fmt.Sprintf("backend-%d", i%2)})
		if err != nil {
			t.Fatal(err)
		}
		s.awaitRest(c.version, 20*time.Second)
		until(t.Context(), 200*time.Millisecond)
		writes, steps := w.since(before)
		t.Logf("handoff: an edit without sessions: %d writes, %d steps, of %d routers", writes, steps, routers)
		if most := 2 + 3*routers; writes > most {
			t.Errorf("an edit that moves no session: %d writes, want at most %d:%s", writes, most, w.describe(before))
		}
	}
	c := s.newTenants("writes", 40, 200)
	before := w.seen()
	c.moveAll("handoff, writes")
	until(t.Context(), 200*time.Millisecond)
	writes, steps := w.since(before)
	t.Logf("handoff: a change with sessions: %d writes, %d steps, of %d routers", writes, steps, routers)
	if most := 2 + 3*routers + (steps-1)*(1+2*routers); steps < 2 || writes > most {
		t.Errorf("a change of %d steps: %d writes, want at most %d:%s", steps, writes, most, w.describe(before))
	}
	quiet("after the change")
	c.wantOneOwner("handoff, writes")
}

// TestHandoffOverride changes the owner of a namespace without sessions. As soon as one
// router sends clients to the new owner, all do.
func TestHandoffOverride(t *testing.T) {
	const namespace, changes = prefix + "alone", 40
	s := newSystem(t)
	s.keepOverrides()
	owner := s.mustOwner(namespace).Owner
	d := s.keepDiary()
	var first, all []time.Duration
	for range changes {
		owner = s.other(owner)
		c, err := s.patch(t.Context(), map[string]any{namespace: owner})
		if err != nil {
			t.Fatal(err)
		}
		at := s.flips(s.routers(t.Context())[0], namespace, owner)
		first = append(first, at.Sub(c.at))
		for range 6 { // through any router
			s.mustLand(namespace, owner)
		}
		all = append(all, time.Since(c.at))
		s.awaitCalm(c.version, 20*time.Second)
	}
	t.Logf("handoff: an override of a namespace without sessions, after the API server's answer: the first router had it after %s; "+
		"six clients were with the new owner after %s", newDistribution(first), newDistribution(all))
	if two := overlap(d.of(map[string]bool{namespace: true})[namespace], time.Now()); two > 0 {
		t.Errorf("%s had two owners for %s", namespace, two)
	}
}

// TestHandoffObjectLost deletes the object and makes it again, empties it, and puts an old
// copy back, while owners change. The change ends by itself, and no namespace has two
// owners. While the object is away, changes wait, and nothing else does.
func TestHandoffObjectLost(t *testing.T) {
	s := newSystem(t)
	s.keepOverrides()
	s.explainHandoff()
	c := s.newTenants("lost", 100, 400)
	for _, tt := range []struct {
		name string
		held bool // for so long that clients may be refused
		do   func(old *corev1.ConfigMap)
	}{
		{"emptied", false, func(*corev1.ConfigMap) { s.replaceHandoff(nil) }},
		{"replaced by an old copy", false, func(old *corev1.ConfigMap) { s.replaceHandoff(old.Data) }},
		{"deleted and made with an old copy", true, func(old *corev1.ConfigMap) {
			s.mustKubectl("", "delete", "configmap", handoffObject)
			s.makeHandoff(old.Data)
		}},
		{ // the last one: it leaves the object as make deploy does
			"deleted and applied", true, func(*corev1.ConfigMap) {
				s.mustKubectl("", "delete", "configmap", handoffObject)
				until(t.Context(), 10*time.Second)
				s.applyHandoff()
			},
		},
	} {
		marks, owners, w := c.marks(), c.toOthers(), s.watchHandoff()
		old, err := s.client.CoreV1().ConfigMaps(s.namespace).Get(t.Context(), handoffObject, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		before := w.seen()
		change, err := s.patch(t.Context(), owners)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 30*time.Second, "the change to be under way", func() error {
			if _, steps := w.since(before); steps < 4 {
				return fmt.Errorf("%d steps", steps)
			}
			return nil
		})
		began := time.Now()
		tt.do(old)
		s.awaitRest(change.version, 90*time.Second)
		c.awaitOwners(owners, 30*time.Second)
		away, refused := c.since(marks)
		t.Logf("handoff, the object %s: the change ended %.1f s after; clients were away for %s; %d attempts failed",
			tt.name, time.Since(began).Seconds(), away, len(refused))
		if err := some(refused); err != nil && !tt.held {
			t.Errorf("the object %s: clients were refused: %v", tt.name, err)
		}
		c.wantOneOwner("handoff, the object " + tt.name)
	}
}

// replaceHandoff makes the data of the object this, whatever it was. kubectl fails if a
// router writes between its GET and its PUT.
func (s *system) replaceHandoff(data map[string]string) {
	s.t.Helper()
	eventually(s.t, 20*time.Second, "the object to be replaced", func() error {
		_, err := s.kubectl(s.t.Context(), manifestOf(s.t, handoffObject, nil, data), "replace", "-f", "-")
		return err
	})
}

// makeHandoff makes the object with this data.
func (s *system) makeHandoff(data map[string]string) {
	s.t.Helper()
	s.mustKubectl(manifestOf(s.t, handoffObject, nil, data), "create", "--save-config", "-f", "-")
}

// applyHandoff applies the manifest of the object, as the kustomization has it.
func (s *system) applyHandoff() {
	s.t.Helper()
	manifests := s.mustKubectl("", "kustomize", filepath.Join(s.root, "k8s", "base"))
	for _, manifest := range strings.Split(manifests, "\n---\n") {
		if strings.Contains(manifest, "kind: ConfigMap\n") && strings.Contains(manifest+"\n", "\n  name: "+handoffObject+"\n") {
			s.mustKubectl(manifest, "apply", "-f", "-")
			return
		}
	}
	s.t.Fatalf("the manifests have no ConfigMap %s", handoffObject)
}

// TestHandoffFirstStart installs everything anew with one, two and three routers, and then
// ends all routers at once while an override cannot be read. They are ready soon after the
// last container runs, and have all backends.
func TestHandoffFirstStart(t *testing.T) {
	s := newSystem(t)
	for _, routers := range []int{1, 2, 3} {
		t.Run(fmt.Sprintf("%d routers", routers), func(t *testing.T) {
			sub := *s
			sub.t, sub.namespace, sub.known = t, s.newNamespace(t), map[string]*router{}
			sub.install(s.namespace, routers)
			t.Logf("handoff, first start: %d routers were ready %s after the last container ran", routers, sub.awaitReadyRouters(routers, nil))
			sub.awaitBackends(4)
			sub.withoutPolicy()
			bad := map[string]any{prefix + "bad": "nonsense", prefix + "good": "backend-2"}
			change, err := sub.patch(t.Context(), bad)
			if err != nil {
				t.Fatal(err)
			}
			sub.awaitRest(change.version, 30*time.Second)
			old := map[string]bool{}
			for _, pod := range sub.pods(t.Context(), "router") {
				old[pod.Name] = true
			}
			sub.mustKubectl("", "--namespace="+sub.namespace, "delete", "pod", "-l", "app.kubernetes.io/name=router", "--now", "--wait=false")
			t.Logf("handoff, all restarted: %d routers were ready %s after the last container ran", routers, sub.awaitReadyRouters(routers, old))
			sub.awaitRest(change.version, 30*time.Second)
			sub.awaitBackends(4)
			for _, r := range sub.routers(t.Context()) {
				if err := errors.Join(r.owns(t.Context(), prefix+"good", "backend-2", "override"), r.owns(t.Context(), prefix+"bad", "", "unresolved")); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// install applies the manifests with so many routers, in the Kubernetes namespace of s, with
// the Secret of another one.
func (s *system) install(secretOf string, routers int) {
	s.t.Helper()
	secret, err := s.client.CoreV1().Secrets(secretOf).Get(s.t.Context(), tlsSecret, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	secret.ObjectMeta = metav1.ObjectMeta{Name: tlsSecret}
	if _, err := s.client.CoreV1().Secrets(s.namespace).Create(s.t.Context(), secret, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	s.mustKubectl("", "--namespace="+s.namespace, "create", "-f", filepath.Join(s.root, "k8s", "overwriting.yaml"))
	overlay := s.overlay("", fmt.Sprintf(`
resources: [../deploy]
replicas:
  - {name: backend, count: 4}
  - {name: router, count: %d}
`, routers))
	s.mustKubectl("", "--namespace="+s.namespace, "apply", "-k", overlay)
}

// awaitReadyRouters waits until so many routers are ready that are not old, and returns how
// long after the start of the last container that was. The API server has that start in
// whole seconds, so the time is up to a second too long.
func (s *system) awaitReadyRouters(routers int, old map[string]bool) time.Duration {
	s.t.Helper()
	var last, ready time.Time
	eventually(s.t, 2*time.Minute, "the routers to be ready", func() error {
		list, err := s.client.CoreV1().Pods(s.namespace).List(s.t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=router"})
		if err != nil {
			return err
		}
		pods := slices.DeleteFunc(list.Items, func(pod corev1.Pod) bool { return old[pod.Name] })
		var waits []error
		for _, pod := range pods {
			for _, c := range pod.Status.ContainerStatuses {
				switch {
				case c.State.Running == nil: // or the kubelet has not said so yet
					waits = append(waits, fmt.Errorf("%s, %s does not run", pod.Name, c.Name))
				case c.State.Running.StartedAt.After(last):
					last = c.State.Running.StartedAt.Time
				}
			}
			r := &router{pod: pod.Name, base: "http://" + net.JoinHostPort(pod.Status.PodIP, "8001")}
			if pod.Status.PodIP == "" {
				waits = append(waits, fmt.Errorf("%s does not run", pod.Name))
			} else if _, err := r.get(s.t.Context(), "/readyz"); err != nil {
				waits = append(waits, err)
			}
		}
		if len(pods) != routers {
			waits = append(waits, fmt.Errorf("there are %d routers, want %d", len(pods), routers))
		}
		ready = time.Now()
		return errors.Join(waits...)
	})
	s.awaitWhole()
	return ready.Sub(last).Round(10 * time.Millisecond)
}

// explainHandoff makes a test that fails show the object, and what the routers logged and
// say of the change. It has to be called after all that changes the routers.
func (s *system) explainHandoff() {
	s.t.Cleanup(func() {
		if !s.t.Failed() {
			return
		}
		ctx, stop := cleanupContext()
		defer stop()
		object, err := s.client.CoreV1().ConfigMaps(s.namespace).Get(ctx, handoffObject, metav1.GetOptions{})
		s.t.Logf("%s (error %v): %q", handoffObject, err, object.Data)
		for _, r := range s.known {
			status, _ := r.get(ctx, "/status")
			log, err := s.kubectl(ctx, "", "logs", r.pod, "--container=router", "--tail=400")
			if err != nil {
				continue // it is gone
			}
			lines := slices.DeleteFunc(strings.Split(log, "\n"), func(line string) bool { return strings.Contains(line, `"msg":"session `) })
			s.t.Logf("%s: /status %s\n%s", r.pod, status, strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	})
}
