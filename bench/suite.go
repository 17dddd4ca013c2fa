package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	tries       = 3    // of a measurement that fails or is disturbed
	spareFiles  = 1000 // of the limit on open files, for all but sessions
	spareOfLoad = 500  // of the same, for all but the load's connections
)

// options are what the flags say.
type options struct {
	rounds, sessions, cpu   int
	length, calm            time.Duration
	scenarios, proxies, out string
	before                  string // program of a build before, "" for none
}

// suite measures proxies in turn.
type suite struct {
	options
	log       io.Writer
	scenarios []scenario
	proxies   []*proxy
	tmp       string                  // scratch directory
	certs     map[string]*certificate // by the kind of their keys
	own       float64                 // target.own in this round; 0: not measured yet
	backends  *backends
	files     int // limit on open files of one process
	report    *report
}

// measureAll measures what o says and writes the report after each round. The
// error is of the whole; what failed is in the report.
func measureAll(ctx context.Context, o options, log io.Writer) (*report, error) {
	s := &suite{options: o, log: log, report: newReport(o)}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("getrlimit: %w", err)
	}
	s.files = int(min(limit.Cur, 1<<20))
	err := s.choose()
	if err != nil {
		return nil, err
	}
	if least := spareFiles + 2*busySessions*s.contenders(); s.files < least {
		return nil, fmt.Errorf("%d open files are allowed, want at least %d (ulimit -n)", s.files, least)
	}
	s.certs = map[string]*certificate{}
	for _, kind := range []string{keyRSA, keyECDSA} {
		if s.certs[kind], err = newCertificate(kind); err != nil {
			return nil, err
		}
	}
	if s.tmp, err = os.MkdirTemp("", "bench-"); err != nil {
		return nil, err
	}
	defer os.RemoveAll(s.tmp)
	if err := os.Chmod(s.tmp, 0o755); err != nil { // nginx's worker is another user
		return nil, err
	}
	if s.backends, err = newBackends(backendPorts()); err != nil {
		return nil, err
	}
	defer s.backends.close()
	for round := range o.rounds {
		if err := s.round(ctx, round+1); err != nil {
			return nil, err
		}
		if err := s.report.save(o.out); err != nil {
			return nil, err
		}
	}
	return s.report, nil
}

// choose sets what to measure, and notes the proxies that are not there.
func (s *suite) choose() (err error) {
	if s.scenarios, err = pick(scenarios(), func(sc scenario) string { return sc.name }, expand(s.options.scenarios)); err != nil {
		return fmt.Errorf("-scenarios: %w", err)
	}
	wanted, err := pick(proxies("bin/router", "bin/bare", s.before), func(p *proxy) string { return p.name }, s.options.proxies)
	if err != nil {
		return fmt.Errorf("-proxies: %w", err)
	}
	for _, p := range wanted {
		if err := p.find(); err != nil {
			s.report.Missing[p.name] = err.Error()
			fmt.Fprintf(s.log, "without %s: %v\n", p.name, err)
			continue
		}
		s.proxies = append(s.proxies, p)
		s.report.Proxies = append(s.report.Proxies, p.name)
		s.report.Versions[p.name] = p.version
	}
	return nil
}

// contenders is how many proxies one scenario has at most.
func (s *suite) contenders() (most int) {
	for _, sc := range s.scenarios {
		most = max(most, len(sc.against(s.proxies)))
	}
	return most
}

// pick returns those of all whose names are in the list, all if it is empty.
func pick[T any](all []T, name func(T) string, list string) (picked []T, err error) {
	if list == "" {
		return all, nil
	}
	for _, wanted := range strings.Split(list, ",") {
		i := slices.IndexFunc(all, func(one T) bool { return name(one) == wanted })
		if i < 0 {
			return nil, fmt.Errorf("there is no %q", wanted)
		}
		picked = append(picked, all[i])
	}
	return picked, nil
}

// round runs every scenario against every proxy, of which another one is the
// first in each round.
func (s *suite) round(ctx context.Context, round int) error {
	s.own = 0
	first := (round - 1) % len(s.proxies)
	order := slices.Concat(s.proxies[first:], s.proxies[:first])
	for _, sc := range s.scenarios {
		if sc.once && round > 1 {
			continue
		}
		wanted := sc.against(order)
		var runs []*run
		if sc.open != nil {
			runs = s.measure(ctx, wanted, sc)
		} else {
			for _, p := range wanted {
				runs = append(runs, s.measure(ctx, []*proxy{p}, sc)...)
			}
		}
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		for _, m := range runs {
			m.Round = round
			fmt.Fprintln(s.log, m)
		}
		s.report.Runs = append(s.report.Runs, runs...)
	}
	return nil
}

// measure runs one scenario against proxies, again when it failed with one, or
// other programs disturbed it.
func (s *suite) measure(ctx context.Context, proxies []*proxy, sc scenario) (runs []*run) {
	for try := 1; try <= tries && ctx.Err() == nil; try++ {
		s.awaitCalm(ctx)
		runs = s.once(proxies, sc)
		calm := true
		for _, m := range runs {
			m.Tries, m.Disturbed = try, disturbed(sc.name, m.Values)
			calm = calm && m.trouble() == ""
		}
		if calm {
			break
		}
	}
	return runs
}

// beside is how many sessions a scenario like mixed has with each of its proxies. The load
// has both ends of all of them at a time, and other connections with the proxies.
func (s *suite) beside(sc scenario) int {
	contenders, most, others := len(sc.against(s.proxies)), mixedSockets, plainConns
	if sc.tls != nil {
		most, others = floodSessions, floodOpen
	}
	return min(most, ((s.files-spareOfLoad)/max(contenders, 1)-others)/2)
}

// disturbed says what took too much of the machine meanwhile.
func disturbed(scenario string, v values) string {
	most := .1
	if strings.Contains(scenario, "stream") {
		// Interrupts on an idle CPU free the packets that were sent from it:
		// they are the proxy's but not counted as its time.
		most = .35
	}
	switch {
	case v["steal"] > .03:
		return fmt.Sprintf("other virtual machines took %.1f %%", 100*v["steal"])
	case v["foreign"] > most:
		return fmt.Sprintf("other programs took %.0f %% of a CPU", 100*v["foreign"])
	}
	return ""
}

// awaitCalm waits until other programs leave the machine idle for a second, for
// the time calm at most.
func (s *suite) awaitCalm(ctx context.Context) {
	for deadline := time.Now().Add(s.calm); time.Now().Before(deadline) && ctx.Err() == nil; {
		before, err := readCPUs()
		if err != nil {
			return // the measurement says it
		}
		time.Sleep(time.Second)
		cpus, _ := readCPUs()
		all := sum(cpus, before)
		if busy := all.busy + all.steal; busy*100 <= (busy+all.idle)*6 {
			return
		}
	}
}
