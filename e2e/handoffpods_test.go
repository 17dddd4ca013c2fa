package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// storeName is the name of the store of the backends' counts, and of its Service.
const storeName = prefix + "store"

// counter is a client that raises the count of its namespace again and again. Each answer
// has the new count: no two answers of a namespace may have the same one, or the state of an
// acknowledged message was lost.
type counter struct {
	dialer    *dialer
	namespace string
	pause     time.Duration

	mu      sync.Mutex
	totals  []int64 // of the answers, in their order. Guarded by mu.
	refused []error // guarded by mu
	open    bool    // it has a session. Guarded by mu.
}

// count starts a counter that ends with the test.
func (s *system) count(namespace string, pause time.Duration) *counter {
	c := &counter{dialer: s.dialer, namespace: namespace, pause: pause}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { c.run(ctx) })
	s.t.Cleanup(func() {
		stop()
		running.Wait()
	})
	return c
}

// run goes from one session to the next until ctx ends.
func (c *counter) run(ctx context.Context) {
	for ctx.Err() == nil {
		session, err := c.dialer.open(ctx, c.namespace)
		if err != nil {
			c.refuse(ctx, err)
			until(ctx, 50*time.Millisecond)
			continue
		}
		c.setOpen(true)
		for c.raise(ctx, session) == nil {
			until(ctx, c.pause)
		}
		c.setOpen(false)
		session.conn.CloseNow()
	}
}

func (c *counter) setOpen(open bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open = open
}

func (c *counter) refuse(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused = append(c.refused, err)
}

// raise sends one message and reads until its answer.
func (c *counter) raise(ctx context.Context, session *session) error {
	if err := session.conn.Write(ctx, websocket.MessageText, []byte("count")); err != nil {
		return err
	}
	for {
		m, err := session.read(ctx)
		if err != nil {
			return err
		}
		if m.Total != 0 {
			c.mu.Lock()
			c.totals = append(c.totals, m.Total)
			c.mu.Unlock()
			return nil
		}
	}
}

// answers returns the counts in the answers, and the attempts that failed.
func (c *counter) answers() ([]int64, []error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.totals), slices.Clone(c.refused)
}

// counters are the counters of several namespaces.
type counters struct {
	s     *system
	all   []*counter
	names map[string]bool
	diary *diary
}

// newCounters starts so many counters over so many namespaces.
func (s *system) newCounters(name string, namespaces, clients int, pause time.Duration) *counters {
	s.t.Helper()
	s.needDirect()
	s.needFiles(clients + 1000)
	c := &counters{s: s, names: map[string]bool{}, diary: s.keepDiary()}
	for i := range clients {
		one := s.count(fmt.Sprintf("%s%s-%d", prefix, name, i%namespaces), pause)
		c.all, c.names[one.namespace] = append(c.all, one), true
		if i%50 == 49 {
			c.awaitAnswers(30 * time.Second)
		}
	}
	c.awaitAnswers(30 * time.Second)
	return c
}

// awaitAnswers waits until each counter has had an answer since now.
func (c *counters) awaitAnswers(within time.Duration) {
	c.s.t.Helper()
	before := make([]int, len(c.all))
	for i, one := range c.all {
		totals, _ := one.answers()
		before[i] = len(totals)
	}
	for i, one := range c.all {
		eventually(c.s.t, within, one.namespace+" to have an answer", func() error {
			if totals, refused := one.answers(); len(totals) <= before[i] {
				return fmt.Errorf("attempts failed: %v", some(refused[max(0, len(refused)-3):]))
			}
			return nil
		})
	}
}

// check fails the test if a count was given twice, or a client saw one that is not above
// the one before, or a namespace was with two pods at once.
func (c *counters) check(what string) {
	c.s.t.Helper()
	answers, failed := 0, 0
	given := map[string]map[int64]bool{}
	var wrong []error
	for _, one := range c.all {
		totals, refused := one.answers()
		answers, failed = answers+len(totals), failed+len(refused)
		if given[one.namespace] == nil {
			given[one.namespace] = map[int64]bool{}
		}
		last := int64(0)
		for _, total := range totals {
			if given[one.namespace][total] || total <= last {
				wrong = append(wrong, fmt.Errorf("%s: the count %d after %d, given before: %t", one.namespace, total, last, given[one.namespace][total]))
			}
			given[one.namespace][total], last = true, max(last, total)
		}
	}
	if len(wrong) > 0 {
		c.s.t.Errorf("%s: the state of acknowledged messages was lost, %d times: %v", what, len(wrong), some(wrong))
	}
	two, now := 0, time.Now()
	for namespace, stays := range c.diary.of(c.names) {
		if both := overlap(stays, now); both > 0 {
			two++
			c.s.t.Errorf("%s: %s had two owners for %s: %s", what, namespace, both, describe(stays))
		}
	}
	c.s.t.Logf("%s: %d messages were acknowledged, of %d namespaces; %d attempts to connect failed; %d namespaces had two owners", what, answers, len(c.names), failed, two)
}

// describe says in one line each which pod had the namespace from when to when.
func describe(stays []stay) string {
	var out strings.Builder
	const clock = "15:04:05.000000"
	for _, one := range stays {
		ended := "now"
		if !one.ended.IsZero() {
			ended = one.ended.Format(clock)
		}
		fmt.Fprintf(&out, "\n%s to %s with %s (%.8s) by way of %s", one.opened.Format(clock), ended, one.backend, one.pod, one.router)
	}
	return out.String()
}

// keepCounts gives the backends a store, and the routers -release, until the test ends.
func (s *system) keepCounts() {
	s.t.Helper()
	s.startStore()
	s.keepWorkloads()
	s.setBackends(func(_ *corev1.PodTemplateSpec, c *corev1.Container) {
		c.Args = append(c.Args, "-store=http://"+storeName+":9100")
	})
	s.setRouters(func(_ *corev1.PodTemplateSpec, c *corev1.Container) {
		c.Args = append(c.Args, "-release=/release")
	})
}

// startStore runs the backend's program as a store, until the test ends.
func (s *system) startStore() {
	s.t.Helper()
	pods, services := s.client.CoreV1().Pods(s.namespace), s.client.CoreV1().Services(s.namespace)
	remove := func() {
		ctx, stop := cleanupContext()
		defer stop()
		if _, err := s.kubectl(ctx, "", "delete", "pod,service", storeName, "--ignore-not-found", "--now"); err != nil {
			s.t.Error(err)
		}
	}
	remove()
	s.t.Cleanup(remove)
	deployed := s.pods(s.t.Context(), "backend")[0].Spec
	c := deployed.Containers[0]
	c.Args, c.VolumeMounts, c.StartupProbe, c.LivenessProbe = []string{"-store-listen=:9100"}, nil, nil, nil
	c.Ports = []corev1.ContainerPort{{Name: "store", ContainerPort: 9100}}
	c.ReadinessProbe.HTTPGet.Port = intstr.FromString("store")
	labels := map[string]string{"app": storeName}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: storeName, Labels: labels},
		Spec: corev1.PodSpec{Containers: []corev1.Container{c}, SecurityContext: deployed.SecurityContext, EnableServiceLinks: deployed.EnableServiceLinks}}
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: storeName},
		Spec: corev1.ServiceSpec{Selector: labels, Ports: []corev1.ServicePort{{Port: 9100}}}}
	if _, err := services.Create(s.t.Context(), service, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	if _, err := pods.Create(s.t.Context(), pod, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	s.mustKubectl("", "wait", "pod/"+storeName, "--for=condition=Ready", "--timeout=60s")
}

// TestHandoffPods scales the backends out and in, deletes a backend and a router, and
// restarts all of both, under clients that change the state of their namespaces all the
// time. With -release each next owner begins with all that was acknowledged, and no
// namespace has two owners.
func TestHandoffPods(t *testing.T) {
	clients := number(t, "E2E_COUNTERS", 400)
	s := newSystem(t)
	s.keepCounts()
	s.explainHandoff()
	c := s.newCounters("pods", clients/2, clients, time.Duration(clients)*time.Second/2000) // 2,000 messages a second
	scale := func(n int) func() {
		return func() {
			s.mustKubectl("", "scale", "statefulset", "backend", fmt.Sprintf("--replicas=%d", n))
			s.awaitBackends(n)
		}
	}
	restart := func(objects ...string) func() {
		return func() {
			for _, object := range objects {
				s.mustKubectl("", "rollout", "restart", object)
			}
			for _, object := range objects {
				s.mustKubectl("", "rollout", "status", "--timeout=4m", object)
			}
		}
	}
	for _, tt := range []struct {
		what string
		do   func()
	}{
		{"backends from 4 to 6", scale(6)},
		{"backends from 6 to 3", scale(3)},
		{"backends from 3 to 4", scale(4)},
		{"a backend deleted", func() { s.mustKubectl("", "delete", "pod", "backend-1") }},
		{"a router deleted", func() { s.mustKubectl("", "delete", "pod", s.routers(t.Context())[0].pod) }},
		{"a router killed", func() {
			s.mustKubectl("", "delete", "pod", s.routers(t.Context())[0].pod, "--force", "--grace-period=0")
		}},
		{"all restarted", restart("statefulset/backend", "deployment/router")},
	} {
		began := time.Now()
		tt.do()
		s.awaitWhole()
		s.awaitDrained()
		s.awaitRest("", time.Minute)
		c.awaitAnswers(30 * time.Second)
		t.Logf("handoff, %s: all was well again after %.1f s", tt.what, time.Since(began).Seconds())
		c.check("handoff, " + tt.what)
	}
}

// awaitBackends waits until each router has this many backends.
func (s *system) awaitBackends(n int) {
	s.t.Helper()
	for _, r := range s.routers(s.t.Context()) {
		eventually(s.t, time.Minute, fmt.Sprintf("%s to have %d backends", r.pod, n), func() error {
			m, err := r.metrics(s.t.Context())
			if got := m.sum("router_table_backends"); err == nil && got != float64(n) {
				err = fmt.Errorf("it has %v", got)
			}
			return err
		})
	}
}

// TestHandoffNumber scales out to backends that never become ready, and replaces the
// StatefulSet by itself, as who has its manifest in a file does. The number of backends in
// force stays, also for a router that starts.
func TestHandoffNumber(t *testing.T) {
	s := newSystem(t)
	t.Cleanup(func() { s.partition(0) }) // after the template is what it was
	s.keepWorkloads()
	s.partition(4) // new pods from the fifth on never start
	s.mustKubectl("", "set", "image", "statefulset/backend", "backend=localhost:5000/none:latest")
	const namespaces = 60
	owners := map[string]string{}
	var stay []*follower
	for i := range namespaces {
		namespace := fmt.Sprintf("%snumber-%d", prefix, i)
		owners[namespace] = s.mustOwner(namespace).Owner
		stay = append(stay, s.mustFollow(namespace))
	}
	holds := func(what string) {
		t.Helper()
		for _, r := range s.routers(t.Context()) {
			m, err := r.metrics(t.Context())
			if got := m.sum("router_table_backends"); err != nil || got != 4 {
				t.Errorf("%s: %s has %v backends (error %v), want 4", what, r.pod, got, err)
			}
			for namespace, owner := range owners {
				if err := r.owns(t.Context(), namespace, owner, "hash"); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
		}
	}
	s.mustKubectl("", "scale", "statefulset", "backend", "--replicas=6")
	for _, r := range s.routers(t.Context()) {
		eventually(t, 20*time.Second, r.pod+" to see six replicas", func() error {
			m, err := r.metrics(t.Context())
			if got := m.sum("router_statefulset_replicas"); err == nil && got != 6 {
				err = fmt.Errorf("it sees %v", got)
			}
			return err
		})
	}
	holds("scaled out")
	set := s.statefulSet()
	set.Annotations, set.ManagedFields, set.ResourceVersion = nil, nil, ""
	set.APIVersion, set.Kind = "apps/v1", "StatefulSet"
	if set.Spec.Template.Annotations == nil {
		set.Spec.Template.Annotations = map[string]string{}
	}
	set.Spec.Template.Annotations["router-test/replaced"] = "yes" // another generation
	text, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	s.mustKubectl(string(text), "replace", "-f", "-")
	until(t.Context(), 3*time.Second)
	holds("replaced")
	s.mustKubectl("", "delete", "pod", s.routers(t.Context())[0].pod)
	eventually(t, 90*time.Second, "the routers to be ready", func() error {
		deployment, err := s.client.AppsV1().Deployments(s.namespace).Get(t.Context(), "router", metav1.GetOptions{})
		if err == nil && deployment.Status.ReadyReplicas != *deployment.Spec.Replicas {
			err = fmt.Errorf("%d are ready", deployment.Status.ReadyReplicas)
		}
		return err
	})
	holds("a router started")
	alive := slices.DeleteFunc(stay, func(f *follower) bool { return f.alive() != nil }) // the others were that router's
	s.goOn(alive, 2)
}

// partition leaves the pods of the StatefulSet before this ordinal as they are when their
// template changes.
func (s *system) partition(ordinal int) {
	s.t.Helper()
	ctx, stop := cleanupContext()
	defer stop()
	patch := fmt.Sprintf(`{"spec":{"updateStrategy":{"rollingUpdate":{"partition":%d}}}}`, ordinal)
	if _, err := s.kubectl(ctx, "", "patch", "statefulset", "backend", "--patch="+patch); err != nil {
		s.t.Error(err)
	}
}
