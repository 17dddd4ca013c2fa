package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// requirement is a row of a table: a figure of the router's own, or what
// it is of the best peer's. The best is the one beside which the router does
// worst in the median of the rounds: to take the best of each round would be to
// compare with luck.
type requirement struct {
	what, unit       string
	must, aim        float64 // 0: reported only
	scenario, metric string
	peers            []string // nil: its own figure
	proxy            string   // whose figure; "": the router's
}

// allRequirements returns the rows in their order.
func allRequirements() []requirement {
	all, nginx, haproxy := []string{"nginx", "nginx-64k", "haproxy", "haproxy-splice"}, []string{"nginx"}, []string{"haproxy"}
	return []requirement{
		{"user memory per idle session", " KiB", 0.35, 0.30, "idle", "pss_kib", nil, ""},
		{"the same after 16 KiB echoed on each", " KiB", 0.35, 0.30, "idle", "pss_used_kib", nil, ""},
		{"files per session", "", 2, 2, "idle", "files", nil, ""},
		{"CPU per echo of 64 B", "", 1.0, 0.8, "echo64", "cpu_us", all, ""},
		{"CPU per echo of 1 KiB", "", 1.0, 0.8, "echo1k", "cpu_us", all, ""},
		{"CPU per echo, sparse", "", 1.1, 1.0, "paced", "cpu_us", nginx, ""},
		{"CPU per GB in 64 KiB frames", "", 0.7, 0.3, "stream", "cpu_s_per_gb", haproxy, ""},
		{"CPU per GB in 64 KiB frames", "", 1.3, 1.0, "stream", "cpu_s_per_gb", []string{"haproxy-splice"}, ""},
		{"CPU per handshake", "", 1.25, 1.0, "connect", "cpu_us", haproxy, ""},
		{"p99 latency, 500 busy sessions", "", 1.0, 0.8, "echo64", "p99_ms", nginx, ""},
		{"CPU per plain request", "", 1.15, 1.0, "http", "cpu_us", []string{bare}, ""},
		{"CPU per plain request", "", 0, 0, "http", "cpu_us", nginx, ""},
		{"CPU per plain request", "", 0, 0, "http", "cpu_us", haproxy, ""},
		{"CPU per 16 KiB sent and returned", "", 1.15, 1.0, "http16k", "cpu_us", []string{bare}, ""},
		{"p99 latency of sockets beside plain requests", "", 1.2, 1.0, "mixed", "p99_ms", nginx, ""},
	}
}

// tlsRequirements returns the rows of a proxy that ends TLS, in their order: what its
// figures are of HAProxy's. Only the router has to meet them.
func tlsRequirements(proxy string) []requirement {
	haproxy := []string{haproxyEnd}
	rows := []requirement{
		{"user memory per idle session", "", 0.6, 0.45, "tls-idle", "pss_kib", haproxy, proxy},
		{"the same after 16 KiB echoed on each", "", 1.4, 0.6, "tls-idle", "pss_used_kib", haproxy, proxy},
		{"user and kernel memory per idle session", "", 0.8, 0.6, "tls-idle", "all_kib", haproxy, proxy},
		{"CPU per echo of 64 B", "", 0.9, 0.75, "tls-echo64", "cpu_us", haproxy, proxy},
		{"CPU per echo of 1 KiB", "", 0.9, 0.75, "tls-echo1k", "cpu_us", haproxy, proxy},
		{"CPU per echo, sparse", "", 1.4, 1.2, "tls-paced", "cpu_us", haproxy, proxy},
		{"CPU per GB in 64 KiB frames", "", 1.0, 0.7, "tls-stream", "cpu_s_per_gb", haproxy, proxy},
		{"CPU per full handshake, ECDSA P-256", "", 1.05, 0.85, "tls-connect-ecdsa", "cpu_us", haproxy, proxy},
		{"CPU per full handshake, RSA-2048", "", 2.1, 1.5, "tls-connect", "cpu_us", haproxy, proxy},
		{"CPU per resumed handshake", "", 1.1, 0.95, "tls-resume", "cpu_us", haproxy, proxy},
		{"p99 latency, 500 busy sessions", "", 0, 1.0, "tls-echo64", "p99_ms", haproxy, proxy},
		{"p99 latency of sockets beside handshakes that stall, to that without them", "", 1.3, 1.0, "tls-flood", "flood_p99", nil, proxy},
		{"the same, with a key exchange in each", "", 1.3, 1.0, "tls-flood-hello", "flood_p99", nil, proxy},
	}
	if proxy != oursTLS {
		for i := range rows {
			rows[i].must, rows[i].aim = 0, 0
		}
	}
	return rows
}

// mostOfBefore is what a figure may be of the same figure of the build before: a
// change must not make the router dearer.
const mostOfBefore = 1.02

// besideBefore returns the rows that compare the router with the build before.
func besideBefore() (rows []requirement) {
	for _, q := range allRequirements() {
		known := func(row requirement) bool { return row.scenario == q.scenario && row.metric == q.metric }
		if q.metric == "files" || slices.ContainsFunc(rows, known) {
			continue
		}
		q.unit, q.must, q.aim, q.peers = "", mostOfBefore, 1, []string{before}
		rows = append(rows, q)
	}
	return rows
}

// points returns the router's figure of each round that has one; beside a peer,
// what it is of that one's.
func (q *requirement) points(r *report, peer string) (points []point) {
	of := func(proxy string) map[int]*run {
		runs := map[int]*run{}
		for _, m := range r.Runs {
			if _, ok := m.Values[q.metric]; ok && m.Scenario == q.scenario && m.Proxy == proxy {
				runs[m.Round] = m
			}
		}
		return runs
	}
	beside := of(peer)
	for round, m := range of(cmp.Or(q.proxy, ours)) {
		p := point{value: m.Values[q.metric], disturbed: m.Disturbed != ""}
		if peer != "" {
			b := beside[round]
			if b == nil {
				continue
			}
			p.value /= b.Values[q.metric]
			p.disturbed = p.disturbed || b.Disturbed != ""
		}
		points = append(points, p)
	}
	return settled(points)
}

// best returns the points beside the best peer, and its name; or the router's own.
func (q *requirement) best(r *report) (points []point, peer string) {
	if q.peers == nil {
		return q.points(r, ""), ""
	}
	worst := 0.0
	for _, candidate := range q.peers {
		p := q.points(r, candidate)
		if len(p) == 0 {
			continue
		}
		if median, _, _ := spread(p); median > worst {
			worst, points, peer = median, p, candidate
		}
	}
	return points, peer
}

// against names the best peer, and those that were not measured.
func (q *requirement) against(r *report, peer string) string {
	absent := slices.DeleteFunc(slices.Clone(q.peers), func(peer string) bool { return slices.Contains(r.Proxies, peer) })
	if len(absent) > 0 {
		peer += " (without " + strings.Join(absent, ", ") + ")"
	}
	return cmp.Or(strings.TrimSpace(peer), "–")
}

// summary is the tables of what must be, and what is missing in them.
func (r *report) summary() string {
	var b strings.Builder
	b.WriteString(r.requirements(allRequirements()))
	if slices.Contains(r.Proxies, before) {
		b.WriteString("\n" + r.requirements(besideBefore()))
	}
	for _, proxy := range []string{oursTLS, pod} {
		if slices.Contains(r.Proxies, proxy) {
			fmt.Fprintf(&b, "\nThrough TLS, %s:\n\n%s", proxy, r.requirements(tlsRequirements(proxy)))
		}
	}
	b.WriteString("\nSeen is the median of the rounds; of CPU, latency and all with TLS, what the router's is of another proxy's in the same round, " +
		"of the one beside which it does worst. Bold is over must.\n")
	for _, proxy := range slices.Sorted(maps.Keys(r.Missing)) {
		fmt.Fprintf(&b, "Not measured: %s, since %s.\n", proxy, r.Missing[proxy])
	}
	return b.String()
}

// bound writes must or aim.
func (q *requirement) bound(value float64) string {
	if value == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f%s", value, q.unit)
}

// requirements is a table of rows.
func (r *report) requirements(rows []requirement) string {
	var b strings.Builder
	b.WriteString("| what | must | aim | seen | against | rounds' extremes |\n|---|---:|---:|---:|---|---|\n")
	for _, q := range rows {
		points, peer := q.best(r)
		seen, extremes := "–", "–"
		if len(points) > 0 {
			median, least, most := spread(points)
			seen = fmt.Sprintf("%.2f%s", median, q.unit)
			if q.must > 0 && median >= q.must+.005 { // as it is written
				seen = "**" + seen + "**"
			}
			extremes = fmt.Sprintf("%.2f–%.2f", least, most)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", q.what, q.bound(q.must), q.bound(q.aim), seen,
			q.against(r, peer), extremes)
	}
	return b.String()
}
