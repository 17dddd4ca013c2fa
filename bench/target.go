package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// target is what a scenario is run against, and how.
type target struct {
	ports     []int // the proxy's, or of the backends
	group     group // the proxy's processes, none without proxy
	backends  *backends
	tls       *tls.Config   // of the clients; nil: they use none
	overrides bool          // the proxy has the overrides
	cpu       int           // the proxy's
	idle      int           // sessions of the scenario idle
	beside    int           // sessions of the scenarios mixed and flood, beside other connections
	settle    time.Duration // until memory is as it stays
	own       float64       // KiB of kernel memory that the load has for each session
}

// scenario is one kind of load and what is measured meanwhile. Either proxies
// take turns with the load that open makes, or each runs for itself.
type scenario struct {
	name   string
	open   func(*target) (load, error)
	run    func(*target) (values, error)
	tls    *tlsUse  // of the sessions; nil: they use none
	once   bool     // in the first round is enough
	memory bool     // it needs target.own
	skips  []string // proxies that it is not run against
}

// scenarios returns them in the order of a round.
func scenarios() []scenario {
	list := plainScenarios()
	for _, version := range []struct {
		prefix string
		number uint16
	}{{"tls", tls.VersionTLS13}, {"tls12", tls.VersionTLS12}} {
		for _, key := range []struct{ suffix, kind string }{{"", keyRSA}, {"-ecdsa", keyECDSA}} {
			for _, sc := range tlsScenarios(tlsUse{version: version.number, key: key.kind}) {
				sc.name = version.prefix + sc.name + key.suffix
				list = append(list, sc)
			}
		}
	}
	return list
}

// plainScenarios returns those without TLS.
func plainScenarios() []scenario {
	sockets := []string{bare}                           // which is for plain requests
	requests := []string{"nginx-64k", "haproxy-splice"} // which are for long streams
	both := []string{bare, "nginx-64k", "haproxy", "haproxy-splice", "direct"}
	return []scenario{
		{name: "check", run: runCheck, once: true},
		{name: "checkhttp", run: runCheckHTTP, once: true},
		{name: "idle", run: runIdle, memory: true, skips: []string{bare, "direct"}}, // nobody has the memory
		{name: "echo64", open: openEcho64, skips: sockets},
		{name: "echo1k", open: openEcho1k, skips: sockets},
		{name: "paced", open: openPaced, skips: sockets},
		{name: "stream", open: openDownloads, skips: sockets},
		{name: "connect", open: openConnect, skips: sockets},
		{name: "http", open: func(t *target) (load, error) { return openHTTP(t, 0) }, skips: requests},
		{name: "http16k", open: func(t *target) (load, error) { return openHTTP(t, postSize) }, skips: requests},
		{name: "mixed", open: openMixed, skips: both},
	}
}

// tlsScenarios returns those with one use of TLS. Their names are what follows its own.
func tlsScenarios(use tlsUse) []scenario {
	tickets := use
	tickets.resume = true
	return []scenario{
		{name: "-check", run: runCheckTLS, once: true, tls: &use},
		{name: "-idle", run: runIdle, memory: true, tls: &use},
		{name: "-echo64", open: openEcho64, tls: &use},
		{name: "-echo1k", open: openEcho1k, tls: &use},
		{name: "-paced", open: openPaced, tls: &use},
		{name: "-stream", open: openDownloads, tls: &use},
		{name: "-connect", open: openConnect, tls: &use},
		{name: "-resume", open: openConnect, tls: &tickets},
		{name: "-flood", open: openFloodOfBeginnings, tls: &use, skips: []string{pod, nginxEnd}},
		{name: "-flood-hello", open: openFloodOfHellos, tls: &use, skips: []string{pod, nginxEnd}},
	}
}

func openEcho64(t *target) (load, error)    { return openFlood(t, 64) }
func openEcho1k(t *target) (load, error)    { return openFlood(t, 1024) }
func openPaced(t *target) (load, error)     { return openPace(t, 64) }
func openDownloads(t *target) (load, error) { return openStream(t, 8, 1<<40, false) }

// The names of groups of scenarios, as -scenarios takes them.
const (
	groupPlain   = "plain"
	groupTLS     = "tls"
	groupTLS12   = "tls12"
	groupChecks  = "checks"
	groupDefault = groupPlain + "," + groupTLS
)

// scenarioGroups returns the scenarios of each group. Certificates matter in handshakes only.
func scenarioGroups() map[string]string {
	var plain []string
	for _, sc := range plainScenarios() {
		plain = append(plain, sc.name)
	}
	return map[string]string{
		groupPlain:  strings.Join(plain, ","),
		groupTLS:    "tls-check,tls-idle,tls-echo64,tls-echo1k,tls-paced,tls-stream,tls-connect,tls-connect-ecdsa,tls-resume,tls-flood,tls-flood-hello",
		groupTLS12:  "tls12-check-ecdsa,tls12-idle,tls12-echo64,tls12-echo1k,tls12-stream,tls12-connect,tls12-connect-ecdsa,tls12-resume",
		groupChecks: "check,checkhttp,tls-check,tls12-check-ecdsa",
	}
}

// expand replaces the names of groups in a list of scenarios.
func expand(list string) string {
	groups := scenarioGroups()
	names := strings.Split(list, ",")
	for i, name := range names {
		if group := groups[name]; group != "" {
			names[i] = group
		}
	}
	return strings.Join(names, ",")
}

// against returns those of the proxies that the scenario is run against: they end TLS if
// it uses TLS, and no others do.
func (sc *scenario) against(proxies []*proxy) []*proxy {
	return slices.DeleteFunc(slices.Clone(proxies), func(p *proxy) bool {
		return p.tls != (sc.tls != nil) || slices.Contains(sc.skips, p.name)
	})
}

// values are what one measurement gave, by metric; README.md explains them.
type values map[string]float64

// sample is CPU time used so far.
type sample struct {
	at          time.Time
	proxy, load time.Duration // of processes
	waited      time.Duration // by the load, with a CPU, until something came
	cpus        map[int]cpuTicks
}

func (t *target) sample() (s sample, err error) {
	var errs [3]error
	s.proxy, errs[0] = t.group.cpu()
	s.load, errs[1] = processCPU(os.Getpid())
	s.cpus, errs[2] = readCPUs()
	if t.backends != nil {
		s.waited = t.backends.waited
	}
	s.at = time.Now()
	return s, errors.Join(errs[:]...)
}

// use is what happened between samples.
type use struct {
	wall    time.Duration
	proxy   time.Duration // CPU time of the proxy's processes
	load    time.Duration // in which the load had something to do
	busy    time.Duration // of its CPU, on top of that interrupts charged to no process
	foreign time.Duration // CPU time of other programs
	steal   time.Duration // CPU time of other virtual machines
	cpus    time.Duration // of all CPUs
}

// during runs f and says what was used meanwhile.
func (t *target) during(f func() error) (u use, err error) {
	before, err := t.sample()
	if err != nil {
		return u, err
	}
	if err := f(); err != nil {
		return u, err
	}
	after, err := t.sample()
	all := sum(after.cpus, before.cpus)
	u.wall, u.proxy = after.at.Sub(before.at), after.proxy-before.proxy
	u.load = u.wall - (after.waited - before.waited)
	u.busy = after.cpus[t.cpu].busy - before.cpus[t.cpu].busy
	u.foreign = all.busy - (u.proxy + after.load - before.load)
	u.steal, u.cpus = all.steal, all.busy+all.idle+all.steal
	return u, err
}

// add makes u the use of both.
func (u *use) add(more use) {
	u.wall += more.wall
	u.proxy += more.proxy
	u.load += more.load
	u.busy += more.busy
	u.foreign += more.foreign
	u.steal += more.steal
	u.cpus += more.cpus
}

func (u use) values() values {
	return values{
		"cpu_share":  u.proxy.Seconds() / u.wall.Seconds(),
		"load_share": u.load.Seconds() / u.wall.Seconds(),
		"foreign":    max(u.foreign, 0).Seconds() / u.wall.Seconds(),
		"steal":      u.steal.Seconds() / max(u.cpus, tick).Seconds(),
	}
}

// operations returns what each operation cost, and the quantiles of their
// latencies, which it sorts.
func (u use) operations(latencies []time.Duration) (values, error) {
	n := len(latencies)
	if n == 0 {
		return nil, fmt.Errorf("nothing came back in %s", u.wall)
	}
	slices.Sort(latencies)
	v := u.values()
	if u.proxy > 0 {
		v["cpu_us"] = u.proxy.Seconds() * 1e6 / float64(n)
		v["busy_us"] = u.busy.Seconds() * 1e6 / float64(n)
	}
	v["per_s"] = float64(n) / u.wall.Seconds()
	v["p50_ms"] = latencies[n/2].Seconds() * 1e3
	v["p99_ms"] = latencies[n*99/100].Seconds() * 1e3
	return v, nil
}

// download returns what each of the bytes cost.
func (u use) download(bytes int64) (values, error) {
	if bytes == 0 {
		return nil, fmt.Errorf("nothing came in %s", u.wall)
	}
	gb := float64(bytes) / 1e9
	v := u.values()
	if u.proxy > 0 {
		v["cpu_s_per_gb"] = u.proxy.Seconds() / gb
		v["busy_s_per_gb"] = u.busy.Seconds() / gb
	}
	v["mb_per_s"] = gb * 1e3 / u.wall.Seconds()
	return v, nil
}
