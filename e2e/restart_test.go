package e2e

import (
	"bufio"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/watch"
)

// TestRestart deletes one router pod. Its clients come back through another,
// those of the other router notice nothing, the drained router ends with exit
// code 0, and a new pod takes its place.
func TestRestart(t *testing.T) {
	const clients = 40
	s := newSystem(t)
	routers := s.routers(t.Context())
	victim := routers[0].pod
	var all []*returner
	for i := range clients {
		all = append(all, s.goAndReturn(fmt.Sprintf("%srestart-%d", prefix, i)))
	}
	s.awaitOpen(all, "")
	drained := s.observe(victim)

	began := time.Now()
	s.mustKubectl("", "delete", "pod", victim, "--wait=false")
	eventually(t, 90*time.Second, victim+" to be gone", drained.gone)
	gone := time.Since(began)
	s.awaitWhole()
	whole := time.Since(began)
	s.awaitOpen(all, victim)
	drained.check(t)

	from, worst, refusals := 0, time.Duration(0), 0
	for _, r := range all {
		visits, failed := r.history()
		refusals += len(failed)
		if visits[0].router != victim && s.front.forward == nil {
			if len(visits) > 1 {
				t.Errorf("%s was with %s and lost it: %v", r.namespace, visits[0].router, visits[0].ended)
			}
			continue
		}
		from++
		for _, v := range visits[1:] {
			worst = max(worst, v.gap)
		}
	}
	if from == 0 {
		t.Errorf("no client was with %s: nothing was shown", victim)
	}
	t.Logf("restart: %d of %d clients were with %s; it was gone after %.1f s; "+
		"they were back within %s (%d attempts failed); all pods were ready after %.1f s", from, clients, victim, gone.Seconds(), worst.Round(time.Millisecond), refusals, whole.Seconds())
	if s.front.forward == nil && worst > 5*time.Second {
		t.Errorf("a client was away for %s, want at most 5s", worst)
	}
}

// awaitOpen waits until every client has a session, with a router other than
// the given one.
func (s *system) awaitOpen(all []*returner, not string) {
	s.t.Helper()
	for _, r := range all {
		eventually(s.t, 60*time.Second, r.namespace+" to have a session", func() error {
			router, open := r.open()
			if !open || router == not {
				_, failed := r.history()
				return fmt.Errorf("with router %q, open %t; attempts failed: %v", router, open, some(failed))
			}
			return nil
		})
	}
}

// departure is the end of a router pod as the API server tells it.
type departure struct {
	pod        string
	containers []string

	// Guarded by mu.
	mu      sync.Mutex
	log     []string
	exits   map[string]int32 // exit codes by container
	deleted bool
	lost    error // the API server ended the watch
}

// observe follows the log of a router and the state of its pod until the test
// ends.
func (s *system) observe(name string) *departure {
	s.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	s.t.Cleanup(stop)
	d := &departure{pod: name, exits: map[string]int32{}}
	log, err := s.client.CoreV1().Pods(s.namespace).GetLogs(name, &corev1.PodLogOptions{Container: "router", Follow: true}).Stream(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	pod, events := s.watchPod(ctx, name)
	for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
		d.containers = append(d.containers, c.Name)
	}
	var reading sync.WaitGroup
	reading.Go(func() { d.readLog(bufio.NewScanner(log)) })
	reading.Go(func() { d.readEvents(events) })
	s.t.Cleanup(func() {
		stop()
		log.Close()
		events.Stop()
		reading.Wait()
	})
	return d
}

func (d *departure) readLog(lines *bufio.Scanner) {
	for lines.Scan() {
		d.mu.Lock()
		d.log = append(d.log, lines.Text())
		d.mu.Unlock()
	}
}

// readEvents keeps what each state of the pod says. An object that is no pod is
// the error with which the API server ends a watch.
func (d *departure) readEvents(events watch.Interface) {
	for event := range events.ResultChan() {
		d.mu.Lock()
		pod, ok := event.Object.(*corev1.Pod)
		if !ok {
			d.lost = apierrors.FromObject(event.Object)
			pod = &corev1.Pod{}
		}
		for _, c := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
			if c.State.Terminated != nil {
				d.exits[c.Name] = c.State.Terminated.ExitCode
			}
		}
		d.deleted = d.deleted || event.Type == watch.Deleted
		d.mu.Unlock()
	}
}

func (d *departure) gone() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.deleted {
		return fmt.Errorf("it is there; containers that ended: %v; watch: %v", d.exits, d.lost)
	}
	return nil
}

// check holds how the router ended: its last line, and the exit codes of all
// containers.
func (d *departure) check(t *testing.T) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	last := ""
	if len(d.log) > 0 {
		last = d.log[len(d.log)-1]
	}
	if !strings.Contains(last, "stopped") {
		t.Errorf("the last line of %s is %q, want msg=stopped", d.pod, last)
	} else {
		t.Logf("restart: %s: %s", d.pod, last)
	}
	for _, line := range d.log {
		if strings.Contains(line, "draining") {
			t.Logf("restart: %s: %s", d.pod, line)
		}
	}
	for _, container := range d.containers {
		if code, ended := d.exits[container]; !ended || code != 0 {
			t.Errorf("%s, container %q: ended %t, exit code %d, want 0", d.pod, container, ended, code)
		}
	}
}
