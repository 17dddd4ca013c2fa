package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/coder/websocket"
	corev1 "k8s.io/api/core/v1"
)

// TestBackendRestart deletes a backend. Until it is back, an upgrade for one of
// its namespaces waits for it or gets 503 with Retry-After; it never gets to
// another backend. Sessions with other backends go on.
func TestBackendRestart(t *testing.T) {
	const victim = "backend-1"
	s := newSystem(t)
	mine, others := s.split(victim)
	first := s.mustFollow(mine[0])
	var stay []*follower
	for _, namespace := range others {
		stay = append(stay, s.mustFollow(namespace))
	}
	var clients []*returner
	for _, namespace := range mine {
		clients = append(clients, s.goAndReturn(namespace))
	}
	s.awaitOpen(clients, "")
	address := s.mustOwner(mine[0]).Address

	began, back := time.Now(), s.watchReady(victim)
	s.mustKubectl("", "delete", "pod", victim, "--wait=false")
	select {
	case <-first.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the session with the deleted backend does not end")
	}
	if err := first.alive(); websocket.CloseStatus(err) != websocket.StatusGoingAway {
		t.Errorf("the session with the deleted backend ended with %v, want the backend's Close 1001", err)
	}
	eventually(t, 90*time.Second, victim+" to be ready again", func() error {
		o, err := s.routers(t.Context())[0].owner(t.Context(), mine[0])
		if err == nil && (!o.Ready || o.Address == address) {
			err = fmt.Errorf("/owner: %+v, it was at %s", o, address)
		}
		return err
	})
	ready := time.Since(began)
	s.awaitWhole()
	s.awaitOpen(clients, "")
	for _, namespace := range mine {
		s.mustLand(namespace, victim)
	}
	s.goOn(stay, 2)

	late := afterReady(clients, <-back)
	if late.percentile(99) > 250*time.Millisecond {
		t.Errorf("clients were back %s after the API server called %s ready, want p99 below 250 ms", late, victim)
	}
	gaps, refusals := checkReturns(t, clients, victim)
	t.Logf("backend restart: %s answered at its new address after %.1f s; "+
		"%d clients were away for %s, and back %s after it was ready; %d attempts were refused with 503",
		victim, ready.Seconds(), len(clients), gaps, late, refusals)
}

// watchReady returns where the time comes at which a pod that is about to be
// deleted is there again and ready, as the API server tells it.
func (s *system) watchReady(name string) <-chan time.Time {
	s.t.Helper()
	pod, events := s.watchPod(s.t.Context(), name)
	s.t.Cleanup(events.Stop)
	back := make(chan time.Time, 1)
	go func() {
		for event := range events.ResultChan() {
			now, ok := event.Object.(*corev1.Pod)
			if !ok || now.UID == pod.UID {
				continue
			}
			for _, c := range now.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && len(back) == 0 {
					back <- time.Now()
					return
				}
			}
		}
		if s.t.Context().Err() == nil {
			s.t.Errorf("the watch of %s has ended before it was back", name)
			close(back)
		}
	}()
	return back
}

// afterReady returns how long after ready the clients opened their last sessions.
func afterReady(clients []*returner, ready time.Time) distribution {
	var late []time.Duration
	for _, c := range clients {
		visits, _ := c.history()
		late = append(late, max(0, visits[len(visits)-1].began.Sub(ready)))
	}
	return newDistribution(late)
}

// split returns namespaces that a backend owns, and some that it does not.
func (s *system) split(backend string) (mine, others []string) {
	s.t.Helper()
	for i := 0; len(mine) < 10 || len(others) < 10; i++ {
		namespace := fmt.Sprintf("%sbackend-%d", prefix, i)
		if s.mustOwner(namespace).Owner == backend {
			mine = append(mine, namespace)
		} else {
			others = append(others, namespace)
		}
	}
	return mine, others
}

// checkReturns holds where clients landed, and with which answers they were
// refused. It returns how long they were away.
func checkReturns(t *testing.T, clients []*returner, backend string) (gaps distribution, refusals int) {
	t.Helper()
	var away []time.Duration
	for _, c := range clients {
		visits, failed := c.history()
		if len(visits) < 2 {
			t.Errorf("%s: the session did not end with its backend", c.namespace)
		}
		for i, v := range visits {
			if v.server != backend {
				t.Errorf("%s landed on %s, want %s or 503", c.namespace, v.server, backend)
			}
			if i > 0 {
				away = append(away, v.gap)
			}
		}
		for _, err := range failed {
			var r refusal
			switch {
			case errors.As(err, &r) && r.status == 503 && r.retryAfter != "":
				refusals++
			case errors.As(err, new(cut)): // it got to the backend that was about to stop
			default:
				t.Errorf("%s was refused with %v, want 503 with Retry-After", c.namespace, err)
			}
		}
	}
	return newDistribution(away), refusals
}
