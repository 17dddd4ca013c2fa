package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestUpdateLosesNothing replaces all routers and all backends, one after the other
// of each, while clients talk: a backend answers each message with the next number.
// What it sent until its session ended, as it wrote that down, its client has had.
func TestUpdateLosesNothing(t *testing.T) {
	const clients, talks = 200, 50 * time.Millisecond
	s := newSystem(t)
	d := s.keepDiary()
	var all []*returner
	names := map[string]bool{}
	for i := range clients {
		r := s.talkAndReturn(fmt.Sprintf("%supdate-%d", prefix, i), talks)
		all, names[r.namespace] = append(all, r), true
	}
	s.awaitOpen(all, "")

	began := time.Now()
	for _, what := range []string{"statefulset/backend", "deployment/router"} {
		s.mustKubectl("", "rollout", "restart", what)
	}
	for _, what := range []string{"statefulset/backend", "deployment/router"} {
		s.mustKubectl("", "rollout", "status", "--timeout=4m", what)
	}
	s.awaitWhole()
	s.awaitDrained()
	s.awaitOpen(all, "")
	codes := s.checkEnds(all)

	var stays map[string][]stay
	eventually(t, 20*time.Second, "the backends to write down that all sessions but the last have ended", func() error {
		stays = d.of(names)
		for namespace, of := range stays {
			for _, one := range of[:len(of)-1] {
				if one.ended.IsZero() {
					return fmt.Errorf("%s has one open with %s by way of %s since %s, and a later one", namespace, one.backend, one.router, one.opened)
				}
			}
		}
		return nil
	})
	sessions, messages, refused := 0, 0, 0
	for _, r := range all {
		n, sum := checkHad(t, r, stays[r.namespace])
		sessions, messages = sessions+n, messages+sum
		_, failed := r.history()
		refused += len(failed)
	}
	t.Logf("update: all pods were replaced within %.1f s; %d sessions ended, by Close %s; %d messages of theirs were had as they were sent; %d attempts failed",
		time.Since(began).Seconds(), sessions, codes, messages, refused)
	if sessions < clients { // more, of those whose router and whose backend left one after the other
		t.Errorf("%d sessions ended, want one of each of %d clients at least", sessions, clients)
	}
}

// awaitDrained waits until no router is left that is being deleted.
func (s *system) awaitDrained() {
	s.t.Helper()
	eventually(s.t, 2*time.Minute, "the old routers to be gone", func() error {
		list, err := s.client.CoreV1().Pods(s.namespace).List(s.t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=router"})
		if err != nil {
			return err
		}
		for _, pod := range list.Items {
			if pod.DeletionTimestamp != nil {
				return fmt.Errorf("%s is there", pod.Name)
			}
		}
		return nil
	})
}

// checkHad holds the ended sessions of a client against what backends wrote down of
// its namespace, of which it is the only client: one by one the same messages.
// A session is none to the client if it ended before its first message came, or if the
// client got no 101: a router that stops gives up the upgrades that it still has, also when
// their backend has just answered and sent its first message.
func checkHad(t *testing.T, r *returner, stays []stay) (sessions, messages int) {
	t.Helper()
	visits, failed := r.history()
	unseen, refused := 0, 0
	for _, err := range failed {
		if errors.As(err, new(cut)) {
			unseen++
		} else {
			refused++
		}
	}
	for _, one := range stays {
		if one.ended.IsZero() {
			continue
		}
		if sessions < len(visits) && visits[sessions].server == one.backend && visits[sessions].router == one.router && visits[sessions].had == one.messages {
			sessions, messages = sessions+1, messages+one.messages
			continue
		}
		if one.messages == 0 && unseen > 0 {
			unseen--
			continue
		}
		if one.messages <= 1 && refused > 0 {
			refused--
			continue
		}
		t.Errorf("%s: %s sent %d messages by way of %s in the session of %s; the client had %+v", r.namespace, one.backend, one.messages, one.router,
			one.opened.Format(time.RFC3339Nano), visits[min(sessions, len(visits)-1)])
		return sessions, messages
	}
	if sessions != len(visits)-1 {
		t.Errorf("%s: the client had %d sessions that ended, the backends wrote %d down", r.namespace, len(visits)-1, sessions)
	}
	return sessions, messages
}
