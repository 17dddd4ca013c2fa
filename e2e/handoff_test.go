package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// handoffObject is the ConfigMap that routers with -handoff=all share.
const handoffObject = "router-handoff-backend"

// overlap returns for how long the sessions of one namespace were with two or more pods at
// once, by the clock of the one node. A session that has not ended lasts until now.
func overlap(stays []stay, now time.Time) (total time.Duration) {
	type edge struct {
		at   time.Time
		pod  string
		step int // 1: a session opens, -1: it ends
	}
	var edges []edge
	for _, one := range stays {
		end := one.ended
		if end.IsZero() {
			end = now
		}
		pod := one.backend + string(one.pod)
		edges = append(edges, edge{one.opened, pod, 1}, edge{end, pod, -1})
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Or(a.at.Compare(b.at), a.step-b.step) })
	open := map[string]int{} // by pod
	var before time.Time
	for _, e := range edges {
		if len(open) >= 2 {
			total += e.at.Sub(before)
		}
		before = e.at
		if open[e.pod] += e.step; open[e.pod] == 0 {
			delete(open, e.pod)
		}
	}
	return total
}

// TestOverlap: what counts as two owners.
func TestOverlap(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(ms)) }
	session := func(backend string, opened, ended int) stay {
		one := stay{backend: backend, opened: at(opened)}
		if ended > 0 {
			one.ended = at(ended)
		}
		return one
	}
	for name, tt := range map[string]struct {
		stays []stay
		want  int // ms
	}{
		"none":                {nil, 0},
		"one backend":         {[]stay{session("a", 1, 50), session("a", 10, 0)}, 0},
		"one after the other": {[]stay{session("a", 1, 50), session("b", 50, 90)}, 0},
		"for a moment":        {[]stay{session("a", 1, 50), session("b", 40, 90)}, 10},
		"not ended":           {[]stay{session("a", 1, 0), session("b", 40, 90)}, 50},
		"two of the old":      {[]stay{session("a", 1, 50), session("a", 2, 60), session("b", 40, 90)}, 20},
		"twice":               {[]stay{session("b", 20, 90), session("a", 1, 30), session("a", 80, 95)}, 20},
		"three":               {[]stay{session("a", 1, 100), session("b", 20, 90), session("c", 30, 40)}, 70},
	} {
		t.Run(name, func(t *testing.T) {
			if got := overlap(tt.stays, at(100)); got != time.Duration(tt.want)*time.Millisecond {
				t.Errorf("overlap %s, want %d ms", got, tt.want)
			}
		})
	}
}

// passerby opens sessions of random namespaces, so many a second, and closes each after
// visitTime.
type passerby struct {
	mu      sync.Mutex
	waited  []time.Duration // until the first message. Guarded by mu.
	refused []error         // guarded by mu
}

// passBy starts a passerby that ends with ctx, for which stop waits.
func (s *system) passBy(ctx context.Context, namespaces []string, perSecond int) (p *passerby, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	p = &passerby{}
	running.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				running.Go(func() { p.visit(ctx, s.dialer, namespaces[rand.IntN(len(namespaces))]) })
			}
		}
	})
	stop = func() {
		cancel()
		running.Wait()
	}
	s.t.Cleanup(stop)
	return p, stop
}

// visitTime is how long a visitor stays: long enough that routers that do not wait for each
// other are seen to have a namespace open on two backends.
const visitTime = time.Second

// visit opens a session, and stays for visitTime or until the session is moved or ctx ends. A
// session that ends before its first message was moved; on a machine with too much to do, nginx
// ends connections whose client is slow.
func (p *passerby) visit(ctx context.Context, d *dialer, namespace string) {
	began := time.Now()
	session, err := d.open(ctx, namespace)
	p.mu.Lock()
	switch {
	case err == nil:
		p.waited = append(p.waited, time.Since(began))
	case ctx.Err() == nil && errors.As(err, new(refusal)):
		p.refused = append(p.refused, fmt.Errorf("%s after %s: %w", namespace, time.Since(began).Round(time.Millisecond), err))
	}
	p.mu.Unlock()
	if err != nil {
		return
	}
	ended := make(chan struct{})
	go func() { // it answers a Close frame
		defer close(ended)
		for err := error(nil); err == nil; {
			_, _, err = session.conn.Read(context.WithoutCancel(ctx))
		}
	}()
	select {
	case <-ended:
	case <-ctx.Done():
	case <-time.After(visitTime):
	}
	session.conn.Close(websocket.StatusNormalClosure, "")
	<-ended
}

// seen returns how long the visitors had to wait, and who was refused.
func (p *passerby) seen() (distribution, []error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return newDistribution(p.waited), slices.Clone(p.refused)
}

// tenants are namespaces with clients that come back at once when their session ends, and
// what the backends write down of them.
type tenants struct {
	s       *system
	names   []string
	owned   map[string]bool // the names as a set
	clients []*returner
	diary   func() *diary // with all that was written until now
}

// newTenants opens so many sessions, over so many namespaces.
func (s *system) newTenants(name string, namespaces, sessions int) *tenants {
	s.t.Helper()
	d := s.keepDiary()
	return s.newTenantsOf(func() *diary { return d }, name, namespaces, sessions)
}

// newTenantsOf is newTenants with this diary.
func (s *system) newTenantsOf(diary func() *diary, name string, namespaces, sessions int) *tenants {
	s.t.Helper()
	s.needDirect()
	s.needFiles(sessions + 1000)
	c := &tenants{s: s, owned: map[string]bool{}, diary: diary}
	for i := range namespaces {
		c.names = append(c.names, fmt.Sprintf("%s%s-%03d", prefix, name, i))
		c.owned[c.names[i]] = true
	}
	for i := range sessions {
		c.clients = append(c.clients, s.goAndReturn(c.names[i%namespaces]))
		if i%50 == 49 { // nginx has a queue of its own for clients that come all at once
			s.awaitOpen(c.clients[i-49:], "")
		}
	}
	s.awaitOpen(c.clients, "")
	return c
}

// spread makes all clients connect again, so that each router has its share of them.
func (c *tenants) spread() {
	c.s.t.Helper()
	for some := range slices.Chunk(c.clients, 50) {
		for _, r := range some {
			r.interrupt()
		}
		c.s.awaitOpen(some, "")
	}
}

// interrupt ends the client's session, which it follows by another one.
func (r *returner) interrupt() {
	r.mu.Lock()
	f := r.current
	r.mu.Unlock()
	if f != nil {
		f.session.conn.CloseNow()
		<-f.done
	}
}

// leave ends all clients.
func (c *tenants) leave() {
	for _, r := range c.clients {
		r.stop()
	}
	for _, r := range c.clients {
		r.running.Wait()
	}
}

// marks returns how many sessions each client has had.
func (c *tenants) marks() map[*returner]int {
	marks := map[*returner]int{}
	for _, r := range c.clients {
		visits, _ := r.history()
		marks[r] = len(visits)
	}
	return marks
}

// since returns for how long clients were away since marks, and the answers other than 101
// that they ever got.
func (c *tenants) since(marks map[*returner]int) (away distribution, refused []error) {
	var gaps []time.Duration
	for _, r := range c.clients {
		visits, failed := r.history()
		for _, v := range visits[min(marks[r], len(visits)):] {
			gaps = append(gaps, v.gap)
		}
		for _, err := range failed {
			if errors.As(err, new(refusal)) {
				refused = append(refused, fmt.Errorf("%s: %w", r.namespace, err))
			}
		}
	}
	return newDistribution(gaps), refused
}

// toOthers returns overrides that give every namespace to the backend after its owner.
func (c *tenants) toOthers() map[string]any {
	backends := len(c.s.pods(c.s.t.Context(), "backend"))
	next := map[string]any{}
	for namespace, owner := range c.owners() {
		next[namespace] = ordinalAfter(owner.(string), backends)
	}
	return next
}

// owners returns the owner of each namespace.
func (c *tenants) owners() map[string]any {
	c.s.t.Helper()
	owners := map[string]any{}
	var mu sync.Mutex
	routers := c.s.routers(c.s.t.Context())
	err := forEach(len(c.names), 8, func(i int) error {
		o, err := routers[0].owner(c.s.t.Context(), c.names[i])
		mu.Lock()
		defer mu.Unlock()
		owners[c.names[i]] = o.Owner
		return err
	})
	if err != nil {
		c.s.t.Fatal(err)
	}
	return owners
}

// ordinalAfter returns the name of the backend after the given one.
func ordinalAfter(backend string, backends int) string {
	var ordinal int
	fmt.Sscanf(backend, "backend-%d", &ordinal)
	return fmt.Sprintf("backend-%d", (ordinal+1)%backends)
}

// awaitRest waits until no router has a change of owners under way, and all have the table
// of this version, unless that is "".
func (s *system) awaitRest(version string, within time.Duration) {
	s.t.Helper()
	eventually(s.t, within, "the change of owners to end", func() error { return s.atRest(s.t.Context(), version) })
}

// awaitCalm is awaitRest, and waits until a step of the next change may begin at once: routers
// leave 100 ms between two steps.
func (s *system) awaitCalm(version string, within time.Duration) {
	s.t.Helper()
	s.awaitRest(version, within)
	until(s.t.Context(), 200*time.Millisecond)
}

// atRest is nil if no router has a change under way.
func (s *system) atRest(ctx context.Context, version string) error {
	var errs []error
	stamps := map[string]bool{}
	for _, r := range s.routers(ctx) {
		m, err := r.metrics(ctx)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if got := m.label("router_table_info", "overrides_version"); version != "" && got != version {
			errs = append(errs, fmt.Errorf("%s has version %q, want %q", r.pod, got, version))
		}
		stamps[m.label("router_table_info", "stamp")] = true
		if m.sum("router_handoff_in_progress") != 0 {
			status, _ := r.get(ctx, "/status")
			errs = append(errs, fmt.Errorf("%s has a change under way: %.300s", r.pod, status))
		}
	}
	if len(stamps) > 1 {
		errs = append(errs, fmt.Errorf("the routers have the tables %v", stamps))
	}
	return errors.Join(errs...)
}

// awaitOwners waits until each client has a session with the owner of its namespace.
func (c *tenants) awaitOwners(owners map[string]any, within time.Duration) {
	c.s.t.Helper()
	eventually(c.s.t, within, "all sessions to be with the new owners", func() error {
		for _, r := range c.clients {
			visits, failed := r.history()
			if _, open := r.open(); !open {
				return fmt.Errorf("%s has no session; attempts failed: %v", r.namespace, some(failed))
			}
			if last := visits[len(visits)-1]; owners != nil && last.server != owners[r.namespace] {
				return fmt.Errorf("%s is with %s, want %s", r.namespace, last.server, owners[r.namespace])
			}
		}
		return nil
	})
}

// twoOwners returns for how long namespaces were with two pods at once, of those that ever
// were, by what the backends wrote down until now.
func (c *tenants) twoOwners() distribution {
	c.s.t.Helper()
	c.awaitWritten()
	var times []time.Duration
	now := time.Now()
	for _, stays := range c.diary().of(c.owned) {
		if both := overlap(stays, now); both > 0 {
			times = append(times, both)
		}
	}
	return newDistribution(times)
}

// awaitWritten waits until the backends have written down that each client has one open
// session.
func (c *tenants) awaitWritten() {
	c.s.t.Helper()
	want := map[string]int{}
	for _, r := range c.clients {
		want[r.namespace]++
	}
	eventually(c.s.t, 60*time.Second, "the backends to write down all sessions", func() error {
		all := c.diary().of(c.owned)
		for _, name := range c.names {
			open := 0
			for _, one := range all[name] {
				if one.ended.IsZero() {
					open++
				}
			}
			if open != want[name] {
				return fmt.Errorf("%s has %d open sessions, want %d", name, open, want[name])
			}
		}
		return nil
	})
}

// wantOneOwner fails the test if a namespace ever had two owners at once.
func (c *tenants) wantOneOwner(what string) {
	c.s.t.Helper()
	if two := c.twoOwners(); len(two) > 0 {
		c.s.t.Errorf("%s: %d of %d namespaces had two owners at once, for %s", what, len(two), len(c.names), two)
	}
}

// moveAll gives all namespaces other owners, and waits until all clients are with these.
func (c *tenants) moveAll(what string) {
	s := c.s
	s.t.Helper()
	owners, marks := c.toOthers(), c.marks()
	change, err := s.patch(s.t.Context(), owners)
	if err != nil {
		s.t.Fatal(err)
	}
	least := time.Duration(len(c.clients)) * time.Second / time.Duration(s.moveRate())
	s.awaitRest(change.version, 30*time.Second+3*least)
	whole := time.Since(change.at)
	c.awaitOwners(owners, 30*time.Second)
	away, refused := c.since(marks)
	s.t.Logf("%s: %d sessions of %d namespaces moved within %.1f s, -move-rate makes that %.1f s (%.2f); "+
		"from a client's Close to its next first message: %s; %d attempts failed",
		what, len(c.clients), len(c.names), whole.Seconds(), least.Seconds(), whole.Seconds()/least.Seconds(), away, len(refused))
	if err := some(refused); err != nil {
		s.t.Errorf("%s: clients were refused: %v", what, err)
	}
}

// TestHandoff gives all of 500 namespaces other owners: one of two routers has all sessions,
// then they have equal shares, then there are three routers. Clients
// come back at once, and new ones come all the time. No namespace is with two backends at
// any moment.
func TestHandoff(t *testing.T) {
	sessions := number(t, "E2E_HANDOFF", 800)
	s := newSystem(t)
	s.keepOverrides()
	s.keepWorkloads()
	c := s.newUneven("handoff", min(500, sessions), sessions)
	for _, tt := range []struct {
		what    string
		routers int
	}{{"two routers, one with all sessions", 2}, {"two routers", 2}, {"three routers", 3}} {
		if s.scaleRouters(tt.routers); tt.what != "two routers, one with all sessions" {
			c.spread()
		}
		c.moveUnderVisits("handoff, " + tt.what)
		c.wantOneOwner("handoff, " + tt.what)
	}
}

// newUneven is newTenants with all sessions through one of two routers.
func (s *system) newUneven(name string, namespaces, sessions int) *tenants {
	s.t.Helper()
	s.scaleRouters(1)
	c := s.newTenants(name, namespaces, sessions)
	s.scaleRouters(2)
	return c
}

// moveUnderVisits is moveAll while others come all the time.
func (c *tenants) moveUnderVisits(what string) {
	c.s.t.Helper()
	passers, stop := c.s.passBy(c.s.t.Context(), c.names, 40)
	c.moveAll(what)
	stop()
	waited, refused := passers.seen()
	c.s.t.Logf("%s: %d others came meanwhile, to their first message: %s", what, len(waited), waited)
	if err := some(refused); err != nil {
		c.s.t.Errorf("%s: %d others were refused: %v", what, len(refused), err)
	}
}
