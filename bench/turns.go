package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// turn is how long one proxy is under load before it is the next one's turn. What
// else is on the machine, other virtual machines above all, changes within
// seconds, and is the same for all proxies so.
const turn = 250 * time.Millisecond

// load is what a scenario puts on a target, whose ports it has sessions with.
type load interface {
	// send goes on for the time d, and returns when nothing is under way any more.
	send(d time.Duration) error
	// count forgets what was sent so far.
	count()
	// values says what was sent since count, with what that used.
	values(use) (values, error)
	close()
}

// contender is a proxy in one measurement.
type contender struct {
	run    *run
	target *target
	stop   func() // ends the proxy
	load   load   // or nil
	use    use
}

// fail notes the first error.
func (c *contender) fail(err error) {
	if err != nil && c.run.Error == "" {
		c.run.Error = err.Error()
	}
}

// When all proxies are at rest before a turn: together they use less than restUse of
// restSlice. It is an error if that takes longer than maxUnrest.
const (
	restSlice = 5 * time.Millisecond
	restUse   = restSlice / 10
	maxUnrest = 2 * time.Second
)

// awaitRest waits until all are at rest. A proxy still moves what its kernel buffers hold
// when its turn is over: without the wait, the next one would pay for it.
func awaitRest(all []*contender) error {
	cpu := func() (sum time.Duration, err error) {
		for _, c := range all {
			used, err := c.target.group.cpu()
			if err != nil {
				return 0, err
			}
			sum += used
		}
		return sum, nil
	}
	before, err := cpu()
	for began := time.Now(); err == nil; {
		time.Sleep(restSlice)
		after, failed := cpu()
		switch {
		case failed != nil:
			err = failed
		case after-before < restUse:
			return nil
		case time.Since(began) > maxUnrest:
			err = fmt.Errorf("the proxies were not at rest within %s", maxUnrest)
		}
		before = after
	}
	return err
}

// takeTurns measures a load on all, each for the time length in all. The order of the
// proxies changes with each turn, since each may leave something to the one after it. It
// is the same in each run.
func takeTurns(all []*contender, open func(*target) (load, error), length time.Duration) {
	each := func(f func(*contender) error) {
		for _, c := range all {
			if c.run.Error == "" {
				c.fail(f(c))
			}
		}
	}
	var opened []load
	each(func(c *contender) (err error) {
		if c.load, err = open(c.target); err == nil {
			opened = append(opened, c.load)
		}
		return err
	})
	each(func(c *contender) error { // the first time is to warm up
		err := c.load.send(min(warmUp, length))
		c.load.count()
		return err
	})
	order := rand.New(rand.NewPCG(0, 0))
	all = slices.Clone(all)
	for left := length; left > 0; left -= turn {
		order.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		each(func(c *contender) error {
			if err := awaitRest(all); err != nil {
				return err
			}
			used, err := c.target.during(func() error { return c.load.send(min(left, turn)) })
			c.use.add(used)
			return err
		})
	}
	each(func(c *contender) (err error) {
		c.run.Values, err = c.load.values(c.use)
		return err
	})
	for _, l := range opened {
		l.close()
	}
}

// measure runs the scenario against all that have not failed.
func (sc scenario) measure(all []*contender, length time.Duration) {
	if sc.open != nil {
		takeTurns(all, sc.open, length)
		return
	}
	for _, c := range all {
		if c.run.Error == "" {
			var err error
			c.run.Values, err = sc.run(c.target)
			c.fail(err)
		}
	}
}

// idleTLS is how many idle sessions there are with TLS, at most: a handshake takes the load
// and the proxy a millisecond.
const idleTLS = 5000

// target is what the load without a proxy is put on, and every proxy.
func (s *suite) target() *target {
	return &target{ports: backendPorts(), backends: s.backends, cpu: s.cpu, idle: min(s.sessions, (s.files-spareFiles)/2),
		settle: time.Second, own: s.own}
}

// contend starts a proxy afresh for a measurement.
func (s *suite) contend(p *proxy, sc scenario) *contender {
	c := &contender{run: &run{Proxy: p.name, Scenario: sc.name}, target: s.target(), stop: func() {}}
	t := c.target
	t.ports, t.overrides, t.beside = p.ports(), p.overrides(), s.beside(sc)
	t.idle = min(s.sessions, (s.files-spareFiles)/p.files)
	if p.direct() {
		return c
	}
	var cert *certificate
	if sc.tls != nil {
		cert = s.certs[sc.tls.key]
		t.tls, t.idle = cert.config(sc.tls), min(t.idle, idleTLS)
	}
	r, err := p.start(t, s.tmp, cert)
	if err != nil {
		c.fail(err)
		return c
	}
	c.stop = r.stop
	t.group, err = processGroup(r.cmd.Process.Pid)
	c.fail(err)
	return c
}

// once runs one scenario against proxies.
func (s *suite) once(proxies []*proxy, sc scenario) (runs []*run) {
	if sc.memory && s.own == 0 {
		t := s.target()
		t.idle = min(t.idle, idleTLS)
		var err error
		if s.own, err = loadMemory(t); err != nil {
			fmt.Fprintln(s.log, "the load's own memory:", err)
		}
	}
	var all []*contender
	for _, p := range proxies {
		c := s.contend(p, sc)
		defer c.stop()
		all, runs = append(all, c), append(runs, c.run)
	}
	sc.measure(all, s.length)
	return runs
}
