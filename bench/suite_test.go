package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// rounds is a report of CPU per echo in three rounds.
func rounds(disturbed ...string) *report {
	r := &report{Proxies: []string{ours, "nginx", "haproxy"}, Missing: map[string]string{"nginx-64k": "it is away"}}
	for i, v := range [][3]float64{{8, 10, 20}, {9, 30, 10}, {3, 2, 4}} {
		for j, proxy := range r.Proxies {
			r.Runs = append(r.Runs, &run{Round: i + 1, Proxy: proxy, Scenario: "echo64", Values: values{"cpu_us": v[j]}})
		}
	}
	for i, text := range disturbed {
		r.Runs[i].Disturbed = text
	}
	return r
}

func TestRequirements(t *testing.T) {
	const row = "| CPU per echo of 64 B | 1.00 | 0.80 |"
	alone := rounds()
	alone.Runs = alone.Runs[:1] // ours only
	four := rounds()
	for _, m := range rounds("", "", "late").Runs[:3] { // haproxy was disturbed
		m.Round, m.Values = 4, values{"cpu_us": 1}
		four.Runs = append(four.Runs, m)
	}
	over := rounds()
	over.Runs = over.Runs[6:]
	for name, test := range map[string]struct {
		report *report
		want   string
	}{
		"median, extremes, peers": {rounds(), row + " 0.80 | nginx (without nginx-64k, haproxy-splice) | 0.30–1.50 |"},
		"two of three disturbed":  {rounds("x", "", "y"), row + " 0.80 | nginx (without nginx-64k, haproxy-splice) | 0.30–1.50 |"},
		"one of four disturbed":   {four, row + " 0.90 | nginx (without nginx-64k, haproxy-splice) | 0.30–1.50 |"},
		"over must":               {over, row + " **1.50** | nginx (without nginx-64k, haproxy-splice) | 1.50–1.50 |"},
		"no peer":                 {alone, row + " – | (without nginx-64k, haproxy-splice) | – |"},
		"another row":             {rounds(), "| user memory per idle session | 0.35 KiB | 0.30 KiB | – | – | – |"},
		"a row without bounds":    {rounds(), "| CPU per plain request | – | – | – | – | – |"},
		"what is missing":         {rounds(), "Not measured: nginx-64k, since it is away.\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := test.report.summary(); !strings.Contains(got, test.want) {
				t.Errorf("got\n%swant\n%s", got, test.want)
			}
		})
	}
}

func TestOwnFigure(t *testing.T) {
	r := &report{Runs: []*run{{Proxy: ours, Scenario: "idle", Values: values{"pss_kib": 0.3549}}}}
	if want := "| 0.35 KiB | 0.30 KiB | 0.35 KiB | – | 0.35–0.35 |"; !strings.Contains(r.summary(), want) {
		t.Errorf("got\n%swant %s", r.summary(), want)
	}
}

func TestTLSRequirements(t *testing.T) {
	r := &report{Proxies: []string{ours}}
	if strings.Contains(r.summary(), "Through TLS") {
		t.Errorf("nothing with TLS was measured, got\n%s", r.summary())
	}
	r.Proxies = []string{oursTLS, pod, haproxyEnd}
	for proxy, kib := range map[string]float64{oursTLS: 13, pod: 50, haproxyEnd: 20} {
		r.Runs = append(r.Runs, &run{Round: 1, Proxy: proxy, Scenario: "tls-idle", Values: values{"pss_kib": kib}})
	}
	got := r.summary()
	for _, want := range []string{
		"Through TLS, router-tls:\n\n| what | must | aim |",
		"| user memory per idle session | 0.60 | 0.45 | **0.65** | haproxy-tls | 0.65–0.65 |\n",
		"| CPU per GB in 64 KiB frames | 1.00 | 0.70 | – | – | – |\n",
		"Through TLS, pod:\n\n| what |",
		"| user memory per idle session | – | – | 2.50 | haproxy-tls | 2.50–2.50 |\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("got\n%swant %s", got, want)
		}
	}
}

// TestGroups: each group has scenarios that there are, and each scenario is run against the
// proxies that end TLS if it uses TLS, or against others.
func TestGroups(t *testing.T) {
	name := func(sc scenario) string { return sc.name }
	for group := range scenarioGroups() {
		if picked, err := pick(scenarios(), name, expand(group)); err != nil || len(picked) < 4 {
			t.Errorf("%s: %d scenarios, %v", group, len(picked), err)
		}
	}
	if got := expand("echo64,checks"); got != "echo64,check,checkhttp,tls-check,tls12-check-ecdsa" {
		t.Errorf("got %s", got)
	}
	all := proxies("router", "bare", "")
	names := func(scenario string) string {
		picked, err := pick(scenarios(), name, scenario)
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for _, p := range picked[0].against(all) {
			list = append(list, p.name)
		}
		return strings.Join(list, ",")
	}
	if got := names("tls12-stream-ecdsa"); got != "router-tls,pod,nginx-tls,haproxy-tls" {
		t.Errorf("got %s", got)
	}
	if got := names("stream"); got != "router,nginx,nginx-64k,haproxy,haproxy-splice,direct" {
		t.Errorf("got %s", got)
	}
}

func TestFlag(t *testing.T) {
	for flag, want := range map[string]string{"": "", "-test.v": "", "-tls-cert": "does not know the flag -tls-cert"} {
		p := &proxy{program: os.Args[0], flag: flag}
		if err := p.find(); fmt.Sprint(err) != "<nil>" && want == "" || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: got %v, want %q", flag, err, want)
		}
	}
}

func TestBesideBefore(t *testing.T) {
	r := rounds()
	if strings.Contains(r.summary(), before) {
		t.Errorf("no build before was measured, got\n%s", r.summary())
	}
	r.Proxies = append(r.Proxies, before)
	for i, cpu := range []float64{10, 8, 3} {
		r.Runs = append(r.Runs,
			&run{Round: i + 1, Proxy: before, Scenario: "echo64", Values: values{"cpu_us": cpu}},
			&run{Round: i + 1, Proxy: ours, Scenario: "idle", Values: values{"pss_kib": 0.33}},
			&run{Round: i + 1, Proxy: before, Scenario: "idle", Values: values{"pss_kib": 0.30}})
	}
	for _, want := range []string{
		"| CPU per echo of 64 B | 1.02 | 1.00 | 1.00 | router-before | 0.80–1.12 |\n",
		"| user memory per idle session | 1.02 | 1.00 | **1.10** | router-before | 1.10–1.10 |\n",
	} {
		if !strings.Contains(r.summary(), want) {
			t.Errorf("got\n%swant\n%s", r.summary(), want)
		}
	}
}

func TestReport(t *testing.T) {
	r := rounds("busy neighbour")
	r.Runs[1].Values, r.Runs[1].Error = nil, "does not route"
	out := filepath.Join(t.TempDir(), "new", "report")
	if err := r.save(out); err != nil {
		t.Fatal(err)
	}
	md, err := os.ReadFile(out + ".md")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| proxy | cpu_us |\n", "| haproxy | 10 [4–20] |", "DISTURBED: busy neighbour", "FAILED: does not route"} {
		if !strings.Contains(string(md), want) {
			t.Errorf("no %q in\n%s", want, md)
		}
	}
	if err := r.failed(); err == nil || err.Error() != "1 of 9 measurements failed" {
		t.Errorf("got %v, want 1 of 9", err)
	}
	if raw, err := os.ReadFile(out + ".json"); err != nil || !strings.Contains(string(raw), `"cpu_us": 8`) {
		t.Errorf("got %v, %s", err, raw)
	}
}

func TestDisturbed(t *testing.T) {
	for scenario, v := range map[string]values{"echo64": {"foreign": .09, "steal": .029}, "stream": {"foreign": .34}} {
		if got := disturbed(scenario, v); got != "" {
			t.Errorf("%s %v: %s", scenario, v, got)
		}
	}
	for scenario, v := range map[string]values{"echo64": {"foreign": .11}, "paced": {"steal": .031}, "stream": {"foreign": .36}} {
		if disturbed(scenario, v) == "" {
			t.Errorf("%s %v: not disturbed", scenario, v)
		}
	}
}

func TestPick(t *testing.T) {
	name := func(s string) string { return s }
	if got, err := pick([]string{"a", "b", "c"}, name, "c,a"); err != nil || strings.Join(got, "") != "ca" {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := pick([]string{"a"}, name, "a,d"); err == nil || err.Error() != `there is no "d"` {
		t.Errorf("got %v", err)
	}
}

func TestConfigurations(t *testing.T) {
	dir := t.TempDir()
	if err := writeOverrides(dir); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		"overrides.nginx":          "ov-0005 b1;\n",
		"overrides.haproxy":        "ov-0005 b1\n",
		"overrides/..data/ov-0005": "backend-1\n",
	} {
		if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || !strings.Contains(string(got), want) {
			t.Errorf("%s: no %q, %v", file, want, err)
		}
	}
	left := strings.NewReplacer("@DIR@", "", "@PORT@", "", "@ADMIN@", "", "@NGINX@", "", "@ROUTER@", "")
	for _, p := range proxies("router", "bare", "router") {
		for line := range strings.Lines(left.Replace(p.config + p.args)) {
			if strings.Contains(line, "@") {
				t.Errorf("%s: %s", p.name, line)
			}
		}
	}
}

func TestNoProxy(t *testing.T) {
	p := &proxy{name: "x", program: "no-such-proxy"}
	if err := p.find(); err == nil || !strings.Contains(err.Error(), "no-such-proxy is not installed: apt-get install") {
		t.Errorf("got %v", err)
	}
	p = &proxy{name: "x", program: "/bin/false", port: 1}
	to := startTestBackends(t)
	to.ports = []int{p.port}
	if _, err := p.start(to, t.TempDir(), nil); err == nil || !strings.Contains(err.Error(), "connection refused; its log") {
		t.Errorf("got %v", err)
	}
}

func TestProcessCPU(t *testing.T) {
	g, err := processGroup(syscall.Getpgrp())
	if err != nil {
		t.Fatal(err)
	}
	before, err := g.cpu()
	if err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); time.Since(begun) < 20*time.Millisecond; {
	}
	if after, err := g.cpu(); err != nil || after <= before {
		t.Errorf("got %v then %v, %v", before, after, err)
	}
	if m, err := g.memory(); err != nil || m.pss < 1000 || m.files < 3 {
		t.Errorf("got %+v, %v", m, err)
	}
}

// countedLoad notes what it is asked for, and fails at the failAt-th time.
type countedLoad struct {
	sent          time.Duration
	times, failAt int
	closed        bool
}

func (l *countedLoad) send(d time.Duration) error {
	l.sent += d
	if l.times++; l.times == l.failAt {
		return errors.New("broken")
	}
	return nil
}

func (l *countedLoad) count()                     { l.sent = 0 }
func (l *countedLoad) values(use) (values, error) { return values{"sent": l.sent.Seconds()}, nil }
func (l *countedLoad) close()                     { l.closed = true }

func TestTurns(t *testing.T) {
	loads := []*countedLoad{{}, {failAt: 2}, {}, {}}
	var all []*contender
	for range loads {
		all = append(all, &contender{run: new(run), target: &target{group: group{os.Getpid()}}})
	}
	all[2].fail(errors.New("did not start"))
	next := 0
	takeTurns(all, func(*target) (load, error) {
		next++
		return []*countedLoad{loads[0], loads[1], loads[3]}[next-1], nil
	}, 600*time.Millisecond)
	for i, want := range []struct {
		sent  float64
		times int
		err   string
	}{{.6, 4, ""}, {0, 2, "broken"}, {0, 0, "did not start"}, {.6, 4, ""}} { // once to warm up
		c, l := all[i], loads[i]
		if c.run.Values["sent"] != want.sent || l.times != want.times || c.run.Error != want.err || l.closed != (l.times > 0) {
			t.Errorf("%d: %v in %d turns, error %q, closed %v; want %v", i, c.run.Values, l.times, c.run.Error, l.closed, want)
		}
	}
}
