package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// TestOverrideLatency measures how long after the API server's answer to a PATCH
// of one override new connections follow it, and beside that when the same event
// has come, to its last byte, to somebody who only reads.
func TestOverrideLatency(t *testing.T) {
	changes := number(t, "E2E_CHANGES", 20)
	for _, tt := range []struct {
		overrides int           // in the ConfigMap
		goal      time.Duration // how much later than the reader a router may be, at the 99th percentile
	}{
		{10, 10 * time.Millisecond},
		{10_000, 20 * time.Millisecond},
		{40_000, 60 * time.Millisecond},
	} {
		t.Run(fmt.Sprintf("%d overrides", tt.overrides), func(t *testing.T) {
			s := newSystem(t)
			s.keepOverrides()
			s.withoutPolicy() // its word comes before what is measured, and takes longer
			if s.routerFlag("-handoff", "all") == "all" {
				tt.goal += 40 * time.Millisecond // answers, a step, and answers to that
			}
			bytes := s.fill(tt.overrides)
			l := s.measure(changes)
			t.Logf("override latency: %d changes of a ConfigMap with %d overrides (%d bytes of data), after the API server's answer: "+
				"new connections followed: %s; a reader had the event: %s; the difference: %s, goal %s; the PATCH itself: %s",
				changes, tt.overrides, bytes, l.followed, l.read, l.later, tt.goal, l.patch)
			// The goal is for a machine with nothing else to do.
			if median := l.later.percentile(50); median > 5*tt.goal {
				t.Errorf("the median of the difference is %s, want at most %s even on a busy machine", median, 5*tt.goal)
			}
		})
	}
}

// latencies is what measure found.
type latencies struct{ followed, read, later, patch distribution }

// fill puts overrides of other namespaces into the ConfigMap until it has one less
// than n, and returns how many bytes of data it then has.
func (s *system) fill(n int) int {
	s.t.Helper()
	if err := s.untrack(configMap); err != nil {
		s.t.Fatal(err)
	}
	now, err := s.overrides(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	if now.Data == nil {
		now.Data = map[string]string{}
	}
	for i := 0; len(now.Data) < n-1; i++ {
		now.Data[fmt.Sprintf("%sbig-%09d", prefix, i)] = fmt.Sprintf("backend-%d", i%4)
	}
	after, err := s.client.CoreV1().ConfigMaps(s.namespace).Update(s.t.Context(), now, metav1.UpdateOptions{})
	if err != nil {
		s.t.Fatalf("a ConfigMap of %d overrides: %v", len(now.Data), err)
	}
	s.awaitTable(s.t.Context(), after.ResourceVersion)
	bytes := 0
	for key, value := range after.Data {
		bytes += len(key) + len(value)
	}
	if object, err := json.Marshal(after); err == nil {
		s.t.Logf("the ConfigMap as JSON: %d bytes", len(object))
	}
	return bytes
}

// untrack makes Kubernetes forget who owns which key of a ConfigMap. It would
// note that in metadata.managedFields, which doubles the object and makes it too
// large for etcd; once emptied, they are not kept (kubernetes.io/docs,
// Server-Side Apply, Clearing managedFields).
func (s *system) untrack(name string) error {
	clear := []byte(`{"metadata":{"managedFields":[{}],"annotations":{"kubectl.kubernetes.io/last-applied-configuration":null}}}`)
	_, err := s.client.CoreV1().ConfigMaps(s.namespace).Patch(s.t.Context(), name, types.MergePatchType, clear, metav1.PatchOptions{})
	return err
}

// measure changes one override n times between two backends, and looks at the
// routers in turn.
func (s *system) measure(n int) latencies {
	s.t.Helper()
	const namespace = prefix + "latency"
	from := s.mustOwner(namespace).Owner
	to := s.other(from)
	reader := s.newReader()
	routers := s.routers(s.t.Context())
	var followed, read, later, patch []time.Duration
	for i := range n {
		r := routers[i%len(routers)]
		c, err := s.patch(s.t.Context(), map[string]any{namespace: to})
		if err != nil {
			s.t.Fatalf("change %d: %v", i, err)
		}
		router := s.flips(r, namespace, to).Sub(c.at)
		s.follows(r, namespace, to)
		raw := reader.had(c.version).Sub(c.at)
		followed, read, later, patch = append(followed, router), append(read, raw), append(later, router-raw), append(patch, c.at.Sub(c.sent))
		s.awaitCalm(c.version, 20*time.Second) // else the next change waits for the end of this one
		from, to = to, from
	}
	return latencies{newDistribution(followed), newDistribution(read), newDistribution(later), newDistribution(patch)}
}

// flips waits until the router says that the backend owns the namespace. One
// request per millisecond, on an open connection, is next to no load.
func (s *system) flips(r *router, namespace, owner string) time.Time {
	s.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for began := time.Now(); time.Since(began) < 20*time.Second; <-tick.C {
		o, err := r.owner(s.t.Context(), namespace)
		if err != nil {
			s.t.Fatal(err)
		}
		if o.Owner == owner && o.HeldByStep == 0 { // while it is held, another router may not have seen that
			return time.Now()
		}
	}
	s.t.Fatalf("%s does not send %s to %s", r.pod, namespace, owner)
	return time.Time{}
}

// follows sees that a new connection through nginx by way of the router, begun
// now, gets to the backend.
func (s *system) follows(r *router, namespace, owner string) {
	s.t.Helper()
	for range 100 {
		session, err := s.dialer.open(s.t.Context(), namespace)
		if errors.As(err, new(cut)) { // through the other router, which moves it now
			continue
		}
		if err != nil {
			s.t.Fatal(err)
		}
		session.conn.CloseNow()
		if session.first.Router != r.pod {
			continue
		}
		if session.first.Server != owner {
			s.t.Fatalf("a new connection by way of %s got to %s, want %s", r.pod, session.first.Server, owner)
		}
		return
	}
	s.t.Fatalf("none of 100 connections went by way of %s", r.pod)
}

// reader reads the watch of the overrides, as bytes.
type reader struct {
	t  *testing.T
	mu sync.Mutex
	at map[string]time.Time // when the event of a version was read to its end. Guarded by mu.
}

// newReader starts a reader, on a connection of its own, that ends with the test.
func (s *system) newReader() *reader {
	s.t.Helper()
	config := rest.CopyConfig(s.config)
	config.Dial = (&net.Dialer{}).DialContext // with one of its own it shares no connections
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		s.t.Fatal(err)
	}
	// The version of the list is of now: see watchPod.
	now, err := s.client.CoreV1().ConfigMaps(s.namespace).List(s.t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + configMap})
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	hour := int64(3600)
	stream, err := client.CoreV1().RESTClient().Get().Namespace(s.namespace).Resource("configmaps").SetHeader("Accept", "application/json").
		VersionedParams(&metav1.ListOptions{Watch: true, FieldSelector: "metadata.name=" + configMap, ResourceVersion: now.ResourceVersion,
			TimeoutSeconds: &hour}, metav1.ParameterCodec).Stream(ctx)
	if err != nil {
		stop()
		s.t.Fatal(err)
	}
	r := &reader{t: s.t, at: map[string]time.Time{}}
	var reading sync.WaitGroup
	reading.Go(func() { r.run(stream) })
	s.t.Cleanup(func() {
		stop()
		stream.Close()
		reading.Wait()
	})
	return r
}

// run notes when each event, which is a line, was there. The first version in it
// is that of the object.
func (r *reader) run(stream io.Reader) {
	lines := bufio.NewReaderSize(stream, 64<<10)
	for {
		event, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		at := time.Now()
		_, after, _ := bytes.Cut(event, []byte(`"resourceVersion":"`))
		version, _, _ := bytes.Cut(after, []byte(`"`))
		r.mu.Lock()
		r.at[string(version)] = at
		r.mu.Unlock()
	}
}

// had waits until the event of a version was read, and says when that was.
func (r *reader) had(version string) (at time.Time) {
	r.t.Helper()
	eventually(r.t, 20*time.Second, "the event of version "+version, func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		at = r.at[version]
		if at.IsZero() {
			return errors.New("it was not read")
		}
		return nil
	})
	return at
}
