package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// requirement is a row of the first table: a figure of the router's own, or what
// it is of the best peer's in the same round.
type requirement struct {
	what, unit       string
	must, aim        float64
	scenario, metric string
	peers            []string // nil: its own figure
}

// allRequirements returns the rows in their order.
func allRequirements() []requirement {
	all, haproxy := []string{"nginx", "nginx-64k", "haproxy", "haproxy-splice"}, []string{"haproxy"}
	return []requirement{
		{"user memory per idle session", " KiB", 0.7, 0.4, "idle", "pss_kib", nil},
		{"the same after 16 KiB echoed on each", " KiB", 0.7, 0.4, "idle", "pss_used_kib", nil},
		{"files per session", "", 2, 2, "idle", "files", nil},
		{"CPU per echo of 64 B", "", 1.0, 0.8, "echo64", "cpu_us", all},
		{"CPU per echo of 1 KiB", "", 1.0, 0.8, "echo1k", "cpu_us", all},
		{"CPU per echo, sparse", "", 1.8, 1.0, "paced", "cpu_us", all},
		{"CPU per GB in 64 KiB frames", "", 0.7, 0.3, "stream", "cpu_s_per_gb", haproxy},
		{"CPU per GB in 64 KiB frames", "", 2.1, 1.0, "stream", "cpu_s_per_gb", all},
		{"CPU per handshake", "", 1.25, 1.0, "connect", "cpu_us", haproxy},
		{"p99 latency, 500 busy sessions", "", 1.0, 0.8, "echo64", "p99_ms", all},
	}
}

// points returns q's figure of each round that has one.
func (q *requirement) points(r *report) (points []point) {
	rounds := map[int]map[string]*run{}
	for _, m := range r.Runs {
		if _, ok := m.Values[q.metric]; ok && m.Scenario == q.scenario {
			if rounds[m.Round] == nil {
				rounds[m.Round] = map[string]*run{}
			}
			rounds[m.Round][m.Proxy] = m
		}
	}
	for _, round := range slices.Sorted(maps.Keys(rounds)) {
		if p, ok := q.point(rounds[round]); ok {
			points = append(points, p)
		}
	}
	return settled(points)
}

// point compares the proxies of one round. It is disturbed if one of them was:
// that one could have been the best.
func (q *requirement) point(runs map[string]*run) (p point, ok bool) {
	our := runs[ours]
	if our == nil {
		return p, false
	}
	p = point{value: our.Values[q.metric], disturbed: our.Disturbed != ""}
	best := 1.0
	for _, peer := range q.peers {
		m := runs[peer]
		if m == nil {
			continue
		}
		p.disturbed = p.disturbed || m.Disturbed != ""
		if value := m.Values[q.metric]; p.peer == "" || value < best {
			best, p.peer = value, peer
		}
	}
	p.value /= best
	return p, q.peers == nil || p.peer != ""
}

// against names the best peers, the one of most rounds first, and those that
// were not measured.
func (q *requirement) against(r *report, points []point) string {
	rounds := map[string]int{}
	for _, p := range points {
		rounds[p.peer]++
	}
	text := strings.Join(slices.SortedFunc(maps.Keys(rounds), func(a, b string) int {
		return cmp.Or(cmp.Compare(rounds[b], rounds[a]), cmp.Compare(a, b))
	}), ", ")
	absent := slices.DeleteFunc(slices.Clone(q.peers), func(peer string) bool { return slices.Contains(r.Proxies, peer) })
	if len(absent) > 0 {
		text += " (without " + strings.Join(absent, ", ") + ")"
	}
	return cmp.Or(strings.TrimSpace(text), "–")
}

// requirements is the first table, and what is missing in it.
func (r *report) requirements() string {
	var b strings.Builder
	b.WriteString("| what | must | aim | seen | against | rounds' extremes |\n|---|---:|---:|---:|---|---|\n")
	for _, q := range allRequirements() {
		points := q.points(r)
		seen, extremes := "–", "–"
		if len(points) > 0 {
			median, least, most := spread(points)
			seen = fmt.Sprintf("%.2f%s", median, q.unit)
			if median >= q.must+.005 { // as it is written
				seen = "**" + seen + "**"
			}
			extremes = fmt.Sprintf("%.2f–%.2f", least, most)
		}
		fmt.Fprintf(&b, "| %s | %.2f%s | %.2f%s | %s | %s | %s |\n", q.what, q.must, q.unit, q.aim, q.unit, seen,
			q.against(r, points), extremes)
	}
	b.WriteString("\nSeen is the median of the rounds; of CPU and latency, what the router's is of the best peer's in the same round. " +
		"Bold is over must.\n")
	for _, proxy := range slices.Sorted(maps.Keys(r.Missing)) {
		fmt.Fprintf(&b, "Not measured: %s, since %s.\n", proxy, r.Missing[proxy])
	}
	return b.String()
}
