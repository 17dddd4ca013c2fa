package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// statusOf returns the answer of GET path.
func statusOf(t testing.TB, a *admin, path string) (s status) {
	t.Helper()
	resp := answered(a, path)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s is %s, want 200", path, resp.Status)
	}
	must(t, json.NewDecoder(resp.Body).Decode(&s))
	return s
}

// A router that is not ready answers, and says why.
func TestStatusWithoutTable(t *testing.T) {
	a, update := adminOf(t, "127.0.0.1:1")
	a.proxy.podName = "router-a"
	s := statusOf(t, a, "/status")
	if r := s.Routers[0]; r.Name != "router-a" || r.Ready || fmt.Sprint(r.WhyNot) != "[no overrides have been read yet: they are late]" || r.Stamp != "" {
		t.Errorf("%+v, want the reason why it is not ready", r)
	}
	update(sourceContent{id: sourceID{"ConfigMap", "edge", "one"}, version: "7"})
	s = statusOf(t, a, "/status")
	if r := s.Routers[0]; !r.Ready || r.OverridesVersion != "7" || r.Stamp != a.proxy.tables.table().stamp {
		t.Errorf("%+v, want it ready", r)
	}
	if fmt.Sprint(s.Sources) != "[{ConfigMap edge one 7}]" || len(s.Backends) != 1 || !s.Backends[0].InTable {
		t.Errorf("sources %v, backends %+v", s.Sources, s.Backends)
	}
}

// The summary of a table is made once, and anew for a new table.
func TestStatusFollowsTable(t *testing.T) {
	a, update := adminOf(t, "127.0.0.1:1", "127.0.0.1:1")
	for i, data := range []map[string]string{{"a": "backend-1", "b": "backend-1"}, {"a": "backend-0", "x": "junk"}} {
		update(sourceContent{version: fmt.Sprint(i), overrides: newOverrideSet(data)})
		if first := a.summary(); first != a.summary() {
			t.Error("a second summary of the same table")
		}
	}
	s := statusOf(t, a, "/status")
	if s.Backends[0].Overrides != 1 || s.Backends[1].Overrides != 0 || s.Rejected != 1 || len(s.Rejections) != 1 || s.Rejections[0].Namespace != "x" {
		t.Errorf("%+v", s)
	}
}

// A move leaves a receipt. The last ten are kept, the newest first.
func TestStatusReceipts(t *testing.T) {
	echoes := strings.Split(echoBackends(t, 2), ",")
	p := startProxy(t, echoes, map[string]string{"ns-01": "backend-0", "ns-02": "backend-0"}, func(p *proxy) {
		p.relay.closeTimeout = 50 * time.Millisecond
	})
	a := &admin{proxy: p.proxy, fdLimit: wideDescriptorLimit(t)}
	for i := range maxReceipts + 2 {
		p.waitSessions(t, 0) // a receipt is there just before the last session is forgotten
		for _, namespace := range []string{"ns-01", "ns-02", "ns-02"} {
			p.open(t, namespace)
		}
		p.waitSessions(t, 3)
		owner, version := backendName("backend", (i+1)%2), fmt.Sprint(100+i)
		p.override(version, map[string]string{"ns-01": owner, "ns-02": owner})
		eventually(t, "the newest receipt", version, func() string {
			if s := statusOf(t, a, "/status"); len(s.Receipts) > 0 && s.Handoff.Moving == nil {
				return s.Receipts[0].OverridesVersion
			}
			return ""
		})
	}
	all := statusOf(t, a, "/status").Receipts
	if len(all) != maxReceipts {
		t.Fatalf("%d receipts, want %d", len(all), maxReceipts)
	}
	for i, r := range all {
		content, _, _ := strings.Cut(p.tables.table().stamp, ".")
		if r.OverridesVersion != fmt.Sprint(100+maxReceipts+1-i) || r.Planned != 3 || r.Moved != 3 || r.Namespaces != 2 || r.Cancelled != 0 ||
			fmt.Sprint(r.Examples) != "[ns-01 ns-02]" || r.Began.IsZero() || (r.OwnersHash == content) != (i%2 == 0) {
			t.Errorf("receipt %d is %+v", i, r)
		}
	}
}

// A backend that was scaled in is there, and not safe to remove, for as long as it has a request
// or was asked to release namespaces.
func TestStatusOfBusyBackend(t *testing.T) {
	for name, occupy := range map[string]func(p *proxy) (end func()){
		"flight": func(p *proxy) func() { return p.mover.flights.add("ns-02", 2, "", func() {}).end },
		"pending upgrade": func(p *proxy) func() {
			p.pending.take(2)
			return func() { p.pending.giveBack(2) }
		},
		"release": func(p *proxy) func() {
			r := &releaser{waiting: map[int]*releaseWait{}}
			p.mover.releases = &stepReleases{releaser: r}
			wait := r.startWait(2, 1)
			return func() { r.endWait(2, wait) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			a, update := adminOf(t, "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1")
			a.proxy.tables.setBackends(backendSet{ordinalRange: ordinalRange{0, 2}})
			update(contentOf("test", "1", pairs("ns-01=backend-0")))
			of2 := func() string {
				s := statusOf(t, a, "/status")
				at := slices.IndexFunc(s.Backends, func(b backendStatus) bool { return b.Ordinal == 2 })
				if at < 0 {
					return "not there"
				}
				return fmt.Sprintf("safe to remove: %t", s.Backends[at].SafeToRemove)
			}
			end := occupy(a.proxy)
			wantEqual(t, "backend-2", of2(), "safe to remove: false")
			end()
			wantEqual(t, "backend-2", of2(), "not there")
		})
	}
}

// While a change waits, /status says what will move, and from where to where; what is
// taken back counts as cancelled.
func TestStatusOfWhatWillMove(t *testing.T) {
	p := startProxy(t, []string{strings.Split(echoBackends(t, 1), ",")[0], refusingAddr(t)}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) {
		p.mover.targets.probe = func(context.Context, int) error { return errors.New("nobody there") }
	})
	a := &admin{proxy: p.proxy, fdLimit: wideDescriptorLimit(t)}
	p.open(t, "ns-01")
	p.open(t, "ns-01")
	p.waitSessions(t, 2)
	p.override("42", map[string]string{"ns-01": "backend-1"})
	eventually(t, "moving", "in 2, out 2, planned 2", func() string {
		s := statusOf(t, a, "/status")
		if s.Handoff.Moving == nil {
			return ""
		}
		return fmt.Sprintf("in %d, out %d, planned %d", s.Backends[1].MovingIn, s.Backends[0].MovingOut, s.Handoff.Moving.Planned)
	})
	p.override("43", map[string]string{"ns-01": "backend-0"})
	eventually(t, "the receipt", "42: planned 2, moved 0, cancelled 2", func() string {
		s := statusOf(t, a, "/status")
		if len(s.Receipts) == 0 || s.Handoff.InProgress || s.Backends[0].MovingOut != 0 {
			return ""
		}
		r := s.Receipts[0]
		return fmt.Sprintf("%s: planned %d, moved %d, cancelled %d", r.OverridesVersion, r.Planned, r.Moved, r.Cancelled)
	})
}

// Of three routers that each have other namespaces in their lists, the sum has those with
// the most sessions, in whatever order the routers answer: also one that was not among the
// largest of the first two.
func TestTopOfAllKeepsTheLargest(t *testing.T) {
	of := func(sessions int64, names ...string) *status {
		s := &status{Routers: []routerState{{}}}
		for _, name := range names {
			s.Top.BySessions = append(s.Top.BySessions, topNamespace{Namespace: name, Sessions: sessions})
		}
		return s
	}
	names := manyNamespaces(2 * topSize)
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 0, 2}} {
		all := []*status{of(70, names[:topSize]...), of(60, append(names[topSize:2*topSize-1], "hot")...), of(60, "hot")}
		top := sumStatus([]*status{all[order[0]], all[order[1]], all[order[2]]}, nil).Top.BySessions
		if len(top) != topSize || top[0].Namespace != "hot" || top[0].Sessions != 120 {
			t.Errorf("%d namespaces, first %+v; want hot with 120 sessions", len(top), top[0])
		}
	}
}

// The progress of a change rises with its steps, and is whole once the newest table is the only
// one, also while not all routers have answered that step.
func TestProgress(t *testing.T) {
	first := newTable("backend", false, ordinalRange{count: 4}, nil, nil, nil)
	second := newTable("backend", false, ordinalRange{count: 5}, nil, nil, first)
	start := newView(first, nil, time.Now())
	half := start.next(second, stepLimit{upto: allPlaces / 2}, time.Now())
	halfDone := *half
	halfDone.done = true
	all := halfDone.next(second, stepLimit{upto: allPlaces}, time.Now())
	last := all.next(second, stepLimit{upto: allPlaces}, time.Now())
	last.done = false
	held := *last.handoffPlan
	held.allHeld = true
	allHeld := *last
	allHeld.handoffPlan = &held
	for name, c := range map[string]struct {
		v    *view
		want float64
	}{
		"before": {start, 0}, "the first half moves": {half, 0}, "it has moved": {&halfDone, 0.5}, "the rest moves": {all, 0.5},
		"the last answers are missing": {last, 1}, "all are held": {&allHeld, 0},
	} {
		if got := c.v.progress(second); math.Abs(got-c.want) > 1e-6 {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// A router that has no table or no view yet says so, and "router wait" waits. It says nothing of
// the progress of a change that others know.
func TestNoViewIsNotDone(t *testing.T) {
	m := newMover(&tableStore{}, newRelay(func(int) string { return "" }, nil), 0, nil, func() {}, nil)
	s := status{Agree: true, Handoff: handoffStatus{InProgress: true, Progress: 0.8}}
	starting := m.status()
	s.Handoff.add(&starting)
	wantEqual(t, "the progress", s.Handoff.Progress, 0.8)
	s.Handoff.InProgress = false
	wantEqual(t, "what is not over", s.unfinished(), "a router has no routing table yet, or no plan of the hand-off")
}

// Each router may have an older StatefulSet than another one: "router wait" waits until all have
// the same, and the table too. It does not wait for a router that knows none, nor for a table
// that stays while there are to be no backends.
func TestReplicasOfAll(t *testing.T) {
	for _, c := range []struct {
		table    int
		replicas []int
		want     string
	}{
		{4, []int{4, 5}, "the routers see different versions of the StatefulSet"},
		{4, []int{4, 4, 3}, "the routers see different versions of the StatefulSet"},
		{5, []int{4, 5, 5}, "the routers see different versions of the StatefulSet"},
		{4, []int{5, 5}, "the table has 4 of 5 backends; the next one is not ready"},
		{4, []int{0, 5}, "the table has 4 of 5 backends; the next one is not ready"},
		{4, []int{3, 3}, "the table has 4 backends, and the StatefulSet 3 replicas"},
		{4, []int{4, 4}, ""}, {4, []int{4, 0}, ""}, {4, []int{0, 4}, ""}, {4, []int{0, 0}, ""},
	} {
		var all []*status
		for i, replicas := range c.replicas {
			s := &status{Agree: true, Routers: []routerState{{Name: fmt.Sprint("router-", i), Stamp: "1.0"}},
				StatefulSet: &statefulSetState{Name: "backend", Replicas: replicas}}
			for ordinal := range c.table {
				s.Backends = append(s.Backends, backendStatus{Ordinal: ordinal, InTable: true})
			}
			all = append(all, s)
		}
		wantEqual(t, fmt.Sprint("what is not over with ", c.replicas), sumStatus(all, nil).unfinished(), c.want)
	}
	one, other := &statefulSetState{Replicas: 4}, &statefulSetState{Replicas: 4, FirstOrdinal: 1}
	wantEqual(t, "whether two first ordinals differ", one.merged(other).ReplicasDiffer, true)
	s := &status{Agree: true, Backends: []backendStatus{{Name: "backend-0", InTable: true}},
		StatefulSet: &statefulSetState{Name: "backend", Replicas: 1, FirstOrdinal: 4}}
	wantEqual(t, "what is not over when the first ordinal has changed", s.unfinished(),
		"the first backend is backend-0, and spec.ordinals.start is 4; the new ones are not ready")
}
