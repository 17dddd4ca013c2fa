package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// quiet is how long after a change, and after the last connection to the old
// backend, probing goes on.
const quiet = 250 * time.Millisecond

// TestOverrideLatency measures how long after the API server's answer to a
// change of one override a new connection through nginx may begin and still
// get to the old owner.
func TestOverrideLatency(t *testing.T) {
	for name, tt := range map[string]struct {
		overrides int // in the ConfigMap besides the one that changes
		changes   int
		bound     time.Duration // for the 99th percentile
	}{
		"small":   {3, 100, 100 * time.Millisecond},
		"one MiB": {39_900, 30, 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSystem(t)
			s.needDirect()
			s.keepOverrides()
			bytes := s.fill(tt.overrides)
			r := s.measure(tt.changes)
			t.Logf("override latency (%s): %d changes of a ConfigMap with %d overrides (%d bytes of data): "+
				"the last new connection to the old owner began %s after the API server's answer "+
				"(the old owner's last answer: %s; the PATCH itself: %s; %d connections)",
				name, tt.changes, tt.overrides+1, bytes, r.began, r.answered, r.patch, r.attempts)
			if p99 := r.began.percentile(99); p99 > tt.bound {
				t.Errorf("99th percentile %s, want at most %s", p99, tt.bound)
			}
		})
	}
}

// latencies is what measure found.
type latencies struct {
	began, answered, patch distribution
	attempts               int
}

// fill puts n overrides of other namespaces into the ConfigMap and returns how
// many bytes of data it then has.
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
	for i := range n {
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

// measure changes one override n times between two backends.
func (s *system) measure(n int) latencies {
	s.t.Helper()
	const namespace = prefix + "latency"
	from := s.mustOwner(namespace).Owner
	to := s.other(from)
	var r latencies
	var began, answered, patch []time.Duration
	for i := range n {
		c, attempts, err := s.changeOnce(s.t.Context(), namespace, from, to)
		if err != nil {
			s.t.Fatalf("change %d: %v", i, err)
		}
		b, a, err := lateness(attempts, c.at, from, to)
		if err != nil {
			s.t.Fatalf("change %d: %v", i, err)
		}
		began, answered, patch = append(began, b), append(answered, a), append(patch, c.at.Sub(c.sent))
		r.attempts += len(attempts)
		from, to = to, from
	}
	r.began, r.answered, r.patch = newDistribution(began), newDistribution(answered), newDistribution(patch)
	return r
}

// changeOnce makes one change while connections are opened, from before it
// until none has got to the old backend for a while.
func (s *system) changeOnce(ctx context.Context, namespace, from, to string) (change, []attempt, error) {
	p := probe(ctx, s.dialer, namespace)
	defer p.finish()
	eventually(s.t, 10*time.Second, "connections before the change", func() error {
		_, n, err := p.lastOld(to)
		if err == nil && n < 2*probers {
			err = fmt.Errorf("%d", n)
		}
		return err
	})
	c, err := s.patch(ctx, map[string]any{namespace: to})
	if err != nil {
		return change{}, nil, err
	}
	eventually(s.t, 20*time.Second, "the last connection to the old owner", func() error {
		last, _, err := p.lastOld(to)
		if err == nil && (time.Since(c.at) < quiet || time.Since(last) < quiet) {
			err = fmt.Errorf("it was %s ago", time.Since(last))
		}
		return err
	})
	attempts, err := p.finish()
	return c, attempts, err
}
