//go:build controlplane

package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const (
	soakNamespaces = 100              // with a session at each router: one half roams
	soakRecovery   = 25 * time.Second // of a router after a fault
	soakMemory     = 8 << 20          // bytes that a router may have more at the end than after a tenth
	soakCount      = 5                // goroutines that it may, and descriptors
	startOwner     = "backend-3"      // of those that are kept there by an override
)

func soakRoams(i int) string  { return fmt.Sprintf("%sroams-%02d", prefix, i) }
func soakKept(i int) string   { return fmt.Sprintf("%skept-%02d", prefix, i) }
func soakHashed(i int) string { return fmt.Sprintf("%shashed-%02d", prefix, i) }

// soak is two routers, one as in a pod and one behind kubectl proxy, their
// clients, and a control plane that has one fault after the other.
type soak struct {
	*rig
	*findings
	random              *rand.Rand // of the faults
	files               accountFiles
	pod, laptop         *subject
	podGate, laptopGate *gate
	proxyAddress        string
	proxy               *process
	ledger              *ledger
	roaming, steady     []string
	visitors            []*client // one of each router
	guests              []*guest
	samples             map[*subject]*samples
	recoveries          map[string][]time.Duration // of the slower router, by hardship
	calm                atomic.Bool                // there is no fault, and none is recovered from
	running             sync.WaitGroup
}

// TestSoak has one writer per second, and a random fault every 20 to 40 s for
// E2E_SOAK. A fault ends when the API server answers again, and would take a
// write. From then on each router may take soakRecovery until its table is, entry
// by entry, that of a write which was accepted after the end of the fault. All the
// time every upgrade must get to a backend that might own its namespace: the owner
// of before from when a write is sent until the router was seen with the table of
// it, or of a later one, and the owner of after from when it is sent. A session
// ends only when the owner changes, by Close 1012. What a router has of memory,
// goroutines and descriptors must be the same at the end.
func TestSoak(t *testing.T) {
	d, seed := span(t, "E2E_SOAK", 30*time.Minute), number(t, "E2E_SEED", int(time.Now().UnixNano()%1e6)+1)
	t.Logf("soak: %s with E2E_SEED=%d", d, seed)
	s := newSoak(t, uint64(seed))
	ctx, stop := context.WithCancel(context.Background())
	writing, rest := context.WithCancel(ctx)
	var writer sync.WaitGroup
	defer func() { // also if a router does not recover, which is fatal
		stop()
		writer.Wait()
		s.running.Wait()
		s.sum(d)
		if err := s.err(); err != nil {
			t.Errorf("soak, E2E_SEED=%d: %v", seed, err)
		}
	}()
	s.populate(ctx, uint64(seed))
	writer.Go(func() { s.write(writing, rand.New(rand.NewPCG(uint64(seed), 2))) })
	s.suffer(d)
	rest()
	writer.Wait()
	s.settle()
}

// newSoak starts the routers, with the overrides that are there from the start.
func newSoak(t *testing.T, seed uint64) *soak {
	r := newRig(t)
	s := &soak{rig: r, findings: &findings{}, random: rand.New(rand.NewPCG(seed, 1)), files: r.newFiles(), proxyAddress: freeAddress(t),
		samples: map[*subject]*samples{}, recoveries: map[string][]time.Duration{}}
	data := map[string]string{}
	for i := range soakNamespaces / 4 {
		data[soakKept(i)] = startOwner
		s.steady = append(s.steady, soakKept(i), soakHashed(i))
		s.roaming = append(s.roaming, soakRoams(2*i), soakRoams(2*i+1))
	}
	if err := r.restoreOverrides(t.Context(), data); err != nil {
		t.Fatal(err)
	}
	s.podGate, s.laptopGate = newGate(t, r.address), newGate(t, s.proxyAddress)
	s.proxy = s.kubectlProxy(s.proxyAddress)
	s.pod, s.laptop = s.inPod(s.files, s.podGate.addr), s.run("laptop", "http://"+s.laptopGate.addr)
	for _, subject := range s.subjects() {
		subject.awaitReady(t)
		s.samples[subject] = &samples{}
	}
	s.calm.Store(true)
	s.ledger = r.newLedger(s.subjects(), s.roaming, s.steady)
	return s
}

func (s *soak) subjects() []*subject { return []*subject{s.pod, s.laptop} }

// populate sends the clients, and who looks at the routers, until ctx ends.
func (s *soak) populate(ctx context.Context, seed uint64) {
	all := slices.Concat(s.roaming, s.steady)
	for i, subject := range s.subjects() {
		visitor := &client{findings: s.findings, subject: subject, ledger: s.ledger}
		s.visitors = append(s.visitors, visitor)
		random := rand.New(rand.NewPCG(seed, uint64(3+i)))
		s.running.Go(func() { visitor.probe(ctx, random, all) })
		s.running.Go(func() { s.observe(ctx, subject) })
		s.running.Go(func() { s.sample(ctx, subject) })
		for _, namespace := range all {
			g := &guest{client: &client{findings: s.findings, subject: subject, ledger: s.ledger}, namespace: namespace}
			s.guests = append(s.guests, g)
			s.running.Go(func() { g.stay(ctx) })
		}
	}
	eventually(s.t, 30*time.Second, "all sessions", s.misplaced)
}

// observe notes what a router follows, which need not be the last write.
func (s *soak) observe(ctx context.Context, subject *subject) {
	for ctx.Err() == nil {
		s.ledger.settled(ctx, subject, time.Time{})
		until(ctx, 100*time.Millisecond)
	}
}

// sample notes what a router has. It waits for no write, as observe does.
func (s *soak) sample(ctx context.Context, subject *subject) {
	for ctx.Err() == nil {
		if err := s.samples[subject].take(ctx, subject); err != nil && ctx.Err() == nil {
			s.add("%s: %w", subject.pod, err)
		}
		until(ctx, 2*time.Second)
	}
}

// write moves a namespace each second. The API server need not answer, but while
// it has no fault both routers must follow before the next write, which would bring
// them what they missed.
func (s *soak) write(ctx context.Context, random *rand.Rand) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		err := s.ledger.move(context.WithoutCancel(ctx), s.roaming[random.IntN(len(s.roaming))], 1+random.IntN(backendCount-1))
		if err == nil {
			s.followed(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// followed waits until the routers have followed, or there is a fault.
func (s *soak) followed(ctx context.Context) {
	began := time.Now()
	for _, subject := range s.subjects() {
		for err := errors.New(""); err != nil && s.calm.Load() && ctx.Err() == nil; until(ctx, 20*time.Millisecond) {
			if err = s.ledger.settled(ctx, subject, time.Time{}); err != nil && time.Since(began) > soakRecovery {
				s.add("a write without a fault was not followed: %w", err)
				return
			}
		}
	}
}

// suffer has one hardship after the other for about d: all of them once, in a
// random order, then again.
func (s *soak) suffer(d time.Duration) {
	var order []hardship
	for began := time.Now(); time.Since(began) < d && s.err() == nil; {
		if len(order) == 0 {
			order = hardships()
			s.random.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		}
		next := time.After(20*time.Second + time.Duration(s.random.IntN(20_000))*time.Millisecond)
		s.undergo(order[0])
		order = order[1:]
		<-next
		s.holds(soakRecovery) // else the next fault would bring what was missed
	}
}

// undergo has one hardship, and waits until both routers follow again.
func (s *soak) undergo(h hardship) {
	lasts := time.Duration(h.least+s.random.IntN(h.most-h.least+1)) * time.Second
	s.calm.Store(false)
	end := h.begin(s)
	until(s.t.Context(), lasts)
	end()
	undone := time.Now()
	eventually(s.t, 90*time.Second, "the API server to answer", func() error { return s.health(s.t.Context()) })
	ended := time.Now()
	took := s.recovered(h, ended)
	s.calm.Store(true)
	s.recoveries[h.name] = append(s.recoveries[h.name], slices.Max(took))
	s.holds(5 * time.Second)
	s.t.Logf("soak: %s for %s: the API server answered after %.1f s, and then %s recovered in %.2f s, %s in %.2f s", h.name, lasts,
		ended.Sub(undone).Seconds(), s.pod.pod, took[0].Seconds(), s.laptop.pod, took[1].Seconds())
}

// recovered waits until each router has the table of a write that was accepted
// since the end of a hardship, and returns how long after it each had.
func (s *soak) recovered(h hardship, ended time.Time) []time.Duration {
	took := make([]time.Duration, len(s.subjects()))
	eventually(s.t, soakRecovery, "the tables to be those of the last write after "+h.name, func() error {
		var errs []error
		for i, subject := range s.subjects() {
			if took[i] > 0 {
				continue
			}
			err := s.ledger.settled(s.t.Context(), subject, ended)
			if err == nil {
				took[i] = time.Since(ended)
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
	return took
}

// holds waits until the tables are, entry by entry, what was written.
func (s *soak) holds(within time.Duration) {
	for _, subject := range s.subjects() {
		eventually(s.t, within, "the table to be what was written", func() error { return s.ledger.holds(s.t.Context(), subject) })
	}
}

// settle waits until every session is where the last write puts it.
func (s *soak) settle() {
	s.holds(soakRecovery)
	eventually(s.t, 20*time.Second, "all sessions to be with the owners", s.misplaced)
}

// misplaced is nil if each guest has a session, with the owner.
func (s *soak) misplaced() error {
	var errs []error
	for _, g := range s.guests {
		errs = append(errs, g.placed(s.ledger.owner(g.namespace)))
	}
	return errors.Join(errs...)
}
