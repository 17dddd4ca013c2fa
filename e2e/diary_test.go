package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/go-logfmt/logfmt"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// stay is a session as the backend that had it wrote it down, from before the client
// could have its 101 until before the router could know of its end.
type stay struct {
	backend, namespace, router string
	pod                        types.UID // of the backend
	table                      string    // X-Router-Table, a stamp
	opened, ended              time.Time // by the backend's clock; ended is zero while it is open
	messages                   int       // that the backend sent; known once it has ended
}

// diary is what the backends write of their sessions, from the logs of all their
// pods, those that come later too.
type diary struct {
	// Static after construction.
	s       *system
	since   metav1.Time
	ctx     context.Context // of all reading
	reading sync.WaitGroup

	// Guarded by mu.
	mu    sync.Mutex
	pods  map[types.UID]bool // whose logs are read
	stays []*stay
	wrong []error
}

// keepDiary reads the backends' logs until the test ends.
func (s *system) keepDiary() *diary {
	s.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	d := &diary{s: s, since: metav1.Now(), ctx: ctx, pods: map[types.UID]bool{}}
	pods := s.client.CoreV1().Pods(s.namespace)
	label := metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=backend"}
	list, err := pods.List(ctx, label)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, pod := range list.Items {
		d.meet(&pod)
	}
	label.ResourceVersion = list.ResourceVersion
	events, err := pods.Watch(ctx, label)
	if err != nil {
		s.t.Fatal(err)
	}
	d.reading.Go(func() {
		for event := range events.ResultChan() {
			if pod, ok := event.Object.(*corev1.Pod); ok {
				d.meet(pod)
			}
		}
		if ctx.Err() == nil {
			d.complain(fmt.Errorf("the watch of the backends' pods has ended"))
		}
	})
	s.t.Cleanup(func() {
		stop()
		events.Stop()
		d.reading.Wait()
	})
	return d
}

// meet reads the pod's log, once its container runs.
func (d *diary) meet(pod *corev1.Pod) {
	d.mu.Lock()
	defer d.mu.Unlock()
	runs := slices.ContainsFunc(pod.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.State.Running != nil })
	if !runs || d.pods[pod.UID] {
		return
	}
	d.pods[pod.UID] = true
	d.reading.Go(func() {
		log, err := d.s.client.CoreV1().Pods(d.s.namespace).GetLogs(pod.Name, &corev1.PodLogOptions{Follow: true, SinceTime: &d.since}).Stream(d.ctx)
		if err != nil {
			d.complain(fmt.Errorf("the log of %s: %w", pod.Name, err))
			return
		}
		defer log.Close()
		d.read(pod, log)
	})
}

// read takes the sessions from a backend's log. It may only end behind the line
// with which the backend does.
func (d *diary) read(pod *corev1.Pod, log io.Reader) {
	last, err := d.scan(pod, log)
	if d.ctx.Err() == nil && last != "stopped" {
		d.complain(fmt.Errorf("the log of %s ended after %q: %v", pod.Name, last, err))
	}
}

// scan takes the sessions from a backend's log as far as it goes, and returns the
// message of its last line.
func (d *diary) scan(pod *corev1.Pod, log io.Reader) (last string, err error) {
	lines := logfmt.NewDecoder(log)
	open := map[string]*stay{} // by the number that the backend gave them
	for lines.ScanRecord() {
		line := map[string]string{}
		for lines.ScanKeyval() {
			line[string(lines.Key())] = string(lines.Value())
		}
		last = line["msg"]
		if err := d.take(pod, open, line); err != nil {
			d.complain(fmt.Errorf("the log of %s says %v: %w", pod.Name, line, err))
		}
	}
	return last, lines.Err()
}

// take reads one line of a log. The end of a session that was opened before the
// diary was begun is left out.
func (d *diary) take(pod *corev1.Pod, open map[string]*stay, line map[string]string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var err error
	switch line["msg"] {
	case "session open":
		one := &stay{backend: pod.Name, pod: pod.UID, namespace: line["namespace"], router: line["router"], table: line["table"]}
		one.opened, err = time.Parse(time.RFC3339Nano, line["opened"])
		open[line["session"]] = one
		d.stays = append(d.stays, one)
	case "session end":
		if one := open[line["session"]]; one != nil {
			var failed error
			one.ended, failed = time.Parse(time.RFC3339Nano, line["ended"])
			one.messages, err = strconv.Atoi(line["messages"])
			err = errors.Join(err, failed)
			delete(open, line["session"])
		}
	}
	return err
}

func (d *diary) complain(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wrong = append(d.wrong, err)
}

// of returns the stays of each namespace that is one of those, in the order in
// which they were opened, and fails the test if a log was not read to its end.
func (d *diary) of(namespaces map[string]bool) map[string][]stay {
	d.s.t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := some(d.wrong); err != nil {
		d.s.t.Fatal(err)
	}
	all := map[string][]stay{}
	for _, one := range d.stays {
		if namespaces[one.namespace] {
			all[one.namespace] = append(all[one.namespace], *one)
		}
	}
	for _, stays := range all {
		slices.SortStableFunc(stays, func(a, b stay) int { return cmp.Compare(a.opened.UnixNano(), b.opened.UnixNano()) })
	}
	return all
}
