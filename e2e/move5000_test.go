package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestMove5000 gives other owners to 50 of the 1,000 namespaces that 5,000
// connections through nginx belong to, and then to 500 of them. Exactly their
// connections are closed, with Close 1012 and at the routers' pace.
func TestMove5000(t *testing.T) {
	const each = 5 // connections of a namespace
	connections := number(t, "E2E_CONNECTIONS", 5000)
	namespaces := max(connections/each, 20)
	s := newSystem(t)
	s.needDirect()
	s.needFiles(connections + 500)
	s.keepOverrides()
	name := func(i int) string { return fmt.Sprintf("%smove-%04d", prefix, i%namespaces) }
	began := time.Now()
	held := s.hold(connections, name)
	t.Logf("move: %d connections over %d namespaces opened in %.1f s", connections, namespaces, time.Since(began).Seconds())

	from := 0
	for _, n := range []int{namespaces / 20, namespaces / 2} {
		change := map[string]bool{}
		for i := from; i < from+n; i++ {
			change[name(i)] = true
		}
		held = s.giveAway(held, change)
		from += n
	}
}

// giveAway gives the namespaces other owners, and holds what becomes of all
// sessions. It returns those that stay.
func (s *system) giveAway(held []*follower, namespaces map[string]bool) (stay []*follower) {
	s.t.Helper()
	next := map[string]string{}
	for _, pod := range s.pods(s.t.Context(), "backend") {
		next[pod.Name] = s.other(pod.Name)
	}
	var gone []*follower
	owners, overrides := map[string]string{}, map[string]any{}
	for _, f := range held {
		namespace := f.session.first.NS
		if !namespaces[namespace] {
			stay = append(stay, f)
			continue
		}
		gone = append(gone, f)
		owners[namespace] = next[f.session.first.Server]
		overrides[namespace] = owners[namespace]
	}
	since := metav1.NewTime(time.Now().Add(-time.Minute)) // the clocks of nodes may differ
	c, err := s.patch(s.t.Context(), overrides)
	if err != nil {
		s.t.Fatal(err)
	}
	s.awaitMoved(gone)
	s.t.Logf("move: %d sessions of %d namespaces were closed, %s", len(gone), len(owners), sinceChange(c.at, gone))
	s.checkPace(gone)
	s.checkReceipts(gone, c.version, since)
	s.goOn(stay, 3)
	s.t.Logf("move: the other %d sessions went on, no counter with a gap", len(stay))
	names := make([]string, 0, len(owners))
	for namespace := range owners {
		names = append(names, namespace)
	}
	err = forEach(len(names), 16, func(i int) error {
		return s.dialer.lands(s.t.Context(), names[i], owners[names[i]])
	})
	if err != nil {
		s.t.Error(err)
	}
	return stay
}

// awaitMoved waits until the sessions are closed, and holds the Close frame that
// each client had.
func (s *system) awaitMoved(gone []*follower) {
	s.t.Helper()
	within := time.After(20*time.Second + time.Duration(len(gone))*time.Second/time.Duration(s.moveRate()))
	var wrong []error
	for _, f := range gone {
		select {
		case <-f.done:
		case <-within:
			s.t.Fatalf("%s: its session with %s is not closed", f.session.first.NS, f.session.first.Server)
		}
		var closed websocket.CloseError
		_, err := f.end()
		if !errors.As(err, &closed) || closed.Code != websocket.StatusServiceRestart || closed.Reason != "service restart" {
			wrong = append(wrong, fmt.Errorf("%s: %w", f.session.first.NS, err))
		}
	}
	if len(wrong) > 0 {
		s.t.Errorf("%d of %d sessions were not ended by Close 1012 \"service restart\": %v", len(wrong), len(gone), some(wrong))
	}
}

// sinceChange says when the first and the last of the sessions were closed.
func sinceChange(change time.Time, gone []*follower) string {
	times := ends(gone)
	first, last := times[0].Sub(change), times[len(times)-1].Sub(change)
	return fmt.Sprintf("from %s to %s after the change", first.Round(time.Millisecond), last.Round(time.Millisecond))
}

// ends returns when the sessions ended, in order.
func ends(all []*follower) []time.Time {
	var times []time.Time
	for _, f := range all {
		at, _ := f.end()
		times = append(times, at)
	}
	slices.SortFunc(times, time.Time.Compare)
	return times
}

// byRouter sorts sessions by the router that they went through.
func byRouter(all []*follower) map[string][]*follower {
	sorted := map[string][]*follower{}
	for _, f := range all {
		sorted[f.session.first.Router] = append(sorted[f.session.first.Router], f)
	}
	return sorted
}

// checkPace holds the times of the Close frames, as clients had them, against -move-rate:
// those of all routers together if they share a hand-off, else those of each.
func (s *system) checkPace(gone []*follower) {
	s.t.Helper()
	rate, closers := s.moveRate(), byRouter(gone)
	if s.routerFlag("-handoff", "all") == "all" {
		closers = map[string][]*follower{"all routers": gone}
	}
	for closer, all := range closers {
		times := ends(all)
		took := times[len(times)-1].Sub(times[0])
		want := time.Duration(len(times)-1) * time.Second / time.Duration(rate)
		s.t.Logf("move: %s closed %d sessions within %s, -move-rate %d makes that %s (%+.1f %%)", closer, len(times),
			took.Round(time.Millisecond), rate, want.Round(time.Millisecond), 100*(took.Seconds()/want.Seconds()-1))
		// A tenth, and what a message may take on a busy machine; and a shared step waits for
		// all routers and the API server.
		least, most := want-want/10-250*time.Millisecond, want+want/10+250*time.Millisecond
		if closer == "all routers" {
			most = 2*want + 2*time.Second
		}
		if took < least || took > most {
			s.t.Errorf("%s took %s, want %s to %s", closer, took, least, most)
		}
	}
}

// receipt is the line of a router's log about a change that moved sessions.
type receipt struct {
	Msg                               string
	OverridesVersion                  string `json:"overrides_version"`
	Namespaces, Moved, Cut, Cancelled int
	Seconds                           float64
}

// checkReceipts holds what the routers' logs say of the change against what the
// clients saw.
func (s *system) checkReceipts(gone []*follower, version string, since metav1.Time) {
	s.t.Helper()
	for pod, all := range byRouter(gone) {
		names := map[string]bool{}
		for _, f := range all {
			names[f.session.first.NS] = true
		}
		var got receipt
		eventually(s.t, 15*time.Second, pod+" to write its receipt", func() (err error) {
			got, err = s.receipt(s.t.Context(), pod, version, since)
			return err
		})
		s.t.Logf("move: %s: %+v", pod, got)
		want := receipt{Msg: "move finished", OverridesVersion: version, Namespaces: len(names), Moved: len(all), Seconds: got.Seconds}
		if got != want {
			s.t.Errorf("%s: the receipt is %+v, want %+v", pod, got, want)
		}
	}
}

// receipt finds the receipt of a change in a router's log.
func (s *system) receipt(ctx context.Context, pod, version string, since metav1.Time) (receipt, error) {
	_, log, err := s.lines(ctx, pod, since)
	if err != nil {
		return receipt{}, err
	}
	for line := range strings.Lines(log) {
		var r receipt
		if json.Unmarshal([]byte(line), &r) == nil && r.Msg == "move finished" && r.OverridesVersion == version {
			return r, nil
		}
	}
	return receipt{}, fmt.Errorf("its log has no \"move finished\" of version %s", version)
}

// moveRate is how many sessions a second may be closed: by all routers together with
// -handoff=all, else by each.
func (s *system) moveRate() int {
	s.t.Helper()
	flag := s.routerFlag("-move-rate", "200")
	rate, err := strconv.Atoi(flag)
	if err != nil || rate < 1 {
		s.t.Fatalf("the routers run with -move-rate=%s, want a number above 0", flag)
	}
	return rate
}

// routerFlag is the value of a flag in the Deployment, or the router's default.
func (s *system) routerFlag(name, otherwise string) string {
	s.t.Helper()
	containers := s.pods(s.t.Context(), "router")[0].Spec.Containers
	at := slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == "router" })
	for _, arg := range containers[at].Args {
		if value, ok := strings.CutPrefix(arg, name+"="); ok {
			return value
		}
	}
	return otherwise
}
