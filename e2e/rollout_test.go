package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// TestRolloutClosesClean replaces both routers, as `kubectl rollout restart`
// does, under thousands of connections through nginx. Every session ends with a
// Close frame and none by a cut, the ends are spread over -drain-duration, and every
// client gets in again.
func TestRolloutClosesClean(t *testing.T) {
	connections := number(t, "E2E_CONNECTIONS", 5000)
	s := newSystem(t)
	s.needDirect()
	s.needFiles(connections + 1000)
	began := time.Now()
	all := s.returners(connections)
	t.Logf("rollout: %d connections opened in %.1f s", connections, time.Since(began).Seconds())
	old := map[string]*departure{}
	for _, r := range s.routers(t.Context()) {
		old[r.pod] = s.observe(r.pod)
	}

	began = time.Now()
	s.mustKubectl("", "rollout", "restart", "deployment", "router")
	for pod, d := range old {
		eventually(t, 4*time.Minute, pod+" to be gone", d.gone)
	}
	s.awaitOpen(all, "")
	t.Logf("rollout: both routers were replaced and all clients back after %.1f s", time.Since(began).Seconds())
	for _, d := range old {
		d.check(t)
	}
	codes := s.checkEnds(all)
	t.Logf("rollout: sessions ended by Close %s", codes)
	for pod := range old {
		s.checkSpread(pod, began, all)
	}
	var gaps []time.Duration
	var failed []error
	for _, r := range all {
		visits, refusals := r.history()
		failed = append(failed, refusals...)
		for _, v := range visits[1:] {
			gaps = append(gaps, v.gap)
		}
		if now, _ := r.open(); old[now] != nil {
			t.Errorf("%s is with %s, which is gone", r.namespace, now)
		}
	}
	t.Logf("rollout: %d returns, away for %s; %d attempts failed: %v", len(gaps), newDistribution(gaps), len(failed), some(failed))
}

// returners starts so many clients that come back, and waits until each has a
// session.
func (s *system) returners(n int) []*returner {
	s.t.Helper()
	all := make([]*returner, n)
	err := forEach(n, 32, func(i int) error {
		all[i] = s.goAndReturn(fmt.Sprintf("%srollout-%05d", prefix, i))
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); until(s.t.Context(), 5*time.Millisecond) {
			if _, open := all[i].open(); open {
				return nil
			}
		}
		_, failed := all[i].history()
		return fmt.Errorf("%s has no session: %w", all[i].namespace, some(failed))
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return all
}

// checkEnds fails the test if a session, from its 101 on, has ended without the
// Close frame of a router that stops or of one that moves it. It counts the codes.
func (s *system) checkEnds(all []*returner) *tally {
	s.t.Helper()
	codes := newTally()
	var wrong []error
	for _, r := range all {
		visits, failed := r.history()
		for _, v := range visits {
			if v.ended != nil {
				wrong = append(wrong, ended(codes, v.ended))
			}
		}
		for _, err := range failed {
			if young := (cut{}); errors.As(err, &young) {
				wrong = append(wrong, ended(codes, young.error))
			}
		}
	}
	if err := errors.Join(wrong...); err != nil {
		lines := strings.Split(err.Error(), "\n")
		s.t.Errorf("%d sessions ended otherwise than by Close 1001 or 1012:\n%s", len(lines), strings.Join(lines[:min(len(lines), 10)], "\n"))
	}
	return codes
}

// ended counts how a session ended. It returns the error if that is no Close
// 1001 or 1012.
func ended(codes *tally, err error) error {
	code := websocket.CloseStatus(err)
	codes.count(fmt.Sprint(int(code)))
	if code == websocket.StatusGoingAway || code == websocket.StatusServiceRestart {
		return nil
	}
	return err
}

// checkSpread logs how many sessions of the router ended in each two seconds of
// its drain, and holds that they were spread over -drain-duration. A drain of few
// sessions is shorter: it waits for a tenth of a second at most between two.
func (s *system) checkSpread(pod string, began time.Time, all []*returner) {
	s.t.Helper()
	const bin = 2 * time.Second
	over, err := time.ParseDuration(s.routerFlag("-drain-duration", "30s"))
	if err != nil {
		s.t.Fatal(err)
	}
	var times []time.Duration
	for _, r := range all {
		visits, _ := r.history()
		for _, v := range visits {
			if v.router == pod && v.ended != nil {
				times = append(times, v.over.Sub(began))
			}
		}
	}
	if len(times) == 0 {
		s.t.Errorf("no session went through %s: nothing was shown", pod)
		return
	}
	in := newDistribution(times)
	first, took := in[0], in[len(in)-1]-in[0]
	bins := make([]int, took/bin+1)
	most := 0
	for _, at := range in {
		i := (at - first) / bin
		bins[i]++
		most = max(most, bins[i])
	}
	want := min(over, time.Duration(len(in))*100*time.Millisecond)
	s.t.Logf("rollout: %s closed %d sessions within %.1f s (want %.1f s) from %.1f s on; in each %s: %v",
		pod, len(in), took.Seconds(), want.Seconds(), first.Seconds(), bin, bins)
	// The clients share their machine with all else: what they see late is no fault.
	if took < want*9/10 || took > want+15*time.Second {
		s.t.Errorf("%s closed its sessions within %s, want %s", pod, took, want)
	}
	if even := float64(len(in)) * bin.Seconds() / want.Seconds(); float64(most) > 2*even+10 {
		s.t.Errorf("%s closed %d sessions in one span of %s, want about %.0f in each", pod, most, bin, even)
	}
}
