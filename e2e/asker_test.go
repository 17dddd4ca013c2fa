//go:build controlplane

package e2e

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// asker lists the overrides with a token of the routers' account.
type asker struct {
	// Static after construction.
	client    kubernetes.Interface
	namespace string
	ctx       context.Context // of the loops
	cancel    context.CancelFunc
	asking    sync.WaitGroup

	mu    sync.Mutex
	count map[string]int // of each answer. Guarded by mu.
}

// newAsker makes an asker that ends with the test.
func (p *plane) newAsker(token string) *asker {
	p.t.Helper()
	config := rest.AnonymousClientConfig(p.config)
	config.BearerToken = token
	config.QPS = -1
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		p.t.Fatal(err)
	}
	a := &asker{client: client, namespace: p.namespace, count: map[string]int{}}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	p.t.Cleanup(a.stop)
	return a
}

// run asks in n loops until stop is called.
func (a *asker) run(n int, every time.Duration) {
	for range n {
		a.asking.Go(func() {
			for a.ctx.Err() == nil {
				answer := a.ask()
				a.mu.Lock()
				a.count[answer]++
				a.mu.Unlock()
				until(a.ctx, every)
			}
		})
	}
}

// ask asks once, without retries, and names the answer: OK, or a reason of the
// API server like Forbidden, or why there was none.
func (a *asker) ask() string {
	ctx, cancel := context.WithTimeout(a.ctx, 2*time.Second)
	defer cancel()
	err := a.client.CoreV1().RESTClient().Get().Namespace(a.namespace).Resource("configmaps").MaxRetries(0).
		VersionedParams(&metav1.ListOptions{FieldSelector: "metadata.name=" + configMap}, metav1.ParameterCodec).Do(ctx).Error()
	switch reason := apierrors.ReasonForError(err); {
	case err == nil:
		return "OK"
	case reason != metav1.StatusReasonUnknown:
		return string(reason)
	case ctx.Err() != nil:
		return "nothing in time"
	}
	return "no connection"
}

// times returns how often there was this answer.
func (a *asker) times(answer string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.count[answer]
}

// answers says how often there was which answer.
func (a *asker) answers() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []string
	for _, answer := range slices.Sorted(maps.Keys(a.count)) {
		all = append(all, fmt.Sprintf("%s %d times", answer, a.count[answer]))
	}
	return strings.Join(all, ", ")
}

// stop ends the loops.
func (a *asker) stop() {
	a.cancel()
	a.asking.Wait()
}
