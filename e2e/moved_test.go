package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// TestMoved changes the owner of half of the namespaces: their sessions are
// closed and come back on the new owner, and the others go on counting.
func TestMoved(t *testing.T) {
	const each = 10
	s := newSystem(t)
	s.keepOverrides()
	routers := s.routers(t.Context())
	moved := s.mustSum(routers, "router_sessions_ended_total", "cause", "moved")

	overrides := map[string]string{}
	var move, stay []*follower
	for i := range each {
		namespace := fmt.Sprintf("%smove-%d", prefix, i)
		overrides[namespace] = s.other(s.mustOwner(namespace).Owner)
		move = append(move, s.mustFollow(namespace))
		stay = append(stay, s.mustFollow(fmt.Sprintf("%sstay-%d", prefix, i)))
	}
	s.apply(overrides)
	began := time.Now()
	for _, f := range move {
		select {
		case <-f.done:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: its session with %s is not closed", f.session.first.NS, f.session.first.Server)
		}
		var closed websocket.CloseError
		if _, err := f.state(); !errors.As(err, &closed) || closed.Code != websocket.StatusServiceRestart || closed.Reason != "service restart" {
			t.Errorf("a session was ended by %v, want Close 1012 \"service restart\"", err)
		}
	}
	t.Logf("moved: %d sessions were closed within %s of kubectl apply", each, time.Since(began).Round(time.Millisecond))
	for namespace, owner := range overrides {
		s.mustLand(namespace, owner)
	}
	s.goOn(stay, 3)
	eventually(t, 5*time.Second, "the sessions to be counted", func() error {
		now, err := sumOver(t.Context(), routers, "router_sessions_ended_total", "cause", "moved")
		if err == nil && now-moved != each {
			err = fmt.Errorf("%v sessions ended with cause moved, want %d", now-moved, each)
		}
		return err
	})
}

// goOn waits until each session has had this many more messages, and fails the
// test if one ends or leaves a message out.
func (s *system) goOn(all []*follower, messages int) {
	s.t.Helper()
	want := make([]int, len(all))
	for i, f := range all {
		now, err := f.state()
		if err != nil {
			s.t.Fatal(err)
		}
		want[i] = now + messages
	}
	for i, f := range all {
		eventually(s.t, time.Duration(messages+5)*time.Second, "messages", func() error {
			now, err := f.state()
			if err != nil {
				s.t.Fatal(err)
			}
			if now < want[i] {
				return fmt.Errorf("the last is %d, want %d", now, want[i])
			}
			return nil
		})
	}
}

// TestApplyUnchanged gives a namespace an override to the owner that it has by
// its hash: nothing moves.
func TestApplyUnchanged(t *testing.T) {
	s := newSystem(t)
	s.keepOverrides()
	const namespace = prefix + "unchanged"
	owner := s.mustOwner(namespace).Owner
	f := s.mustFollow(namespace)
	s.awaitTable(t.Context(), s.apply(map[string]string{namespace: owner}))
	for _, r := range s.routers(t.Context()) {
		if err := r.owns(t.Context(), namespace, owner, "override"); err != nil {
			t.Error(err)
		}
	}
	s.goOn([]*follower{f}, 3)
}
