package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// report is what was measured, as it is in the JSON file.
type report struct {
	Started, Ended time.Time
	Machine        string
	Settings       string
	Proxies        []string          // that were measured
	Versions       map[string]string // of their programs
	Missing        map[string]string // proxies that were not, and why
	Runs           []*run
}

// run is one measurement, the last of its tries.
type run struct {
	Round           int
	Proxy, Scenario string
	Values          values // none if it failed
	Tries           int
	Error           string `json:",omitempty"`
	Disturbed       string `json:",omitempty"`
}

func (m *run) String() string {
	line := fmt.Sprintf("round %d %-17s %-14s", m.Round, m.Scenario, m.Proxy)
	for _, name := range slices.Sorted(maps.Keys(m.Values)) {
		line += fmt.Sprintf(" %s %.4g", name, m.Values[name])
	}
	return line + m.trouble()
}

func (m *run) trouble() string {
	switch {
	case m.Error != "":
		return " FAILED: " + m.Error
	case m.Disturbed != "":
		return " DISTURBED: " + m.Disturbed
	}
	return ""
}

func newReport(o options) *report {
	return &report{Started: time.Now(), Machine: machine(), Versions: map[string]string{}, Missing: map[string]string{},
		Settings: fmt.Sprintf("%d rounds of %s for each measurement, the proxy on CPU %d", o.rounds, o.length, o.cpu)}
}

// machine describes this one.
func machine() string {
	read := func(path string) string {
		b, _ := os.ReadFile(path)
		return strings.TrimSpace(string(b))
	}
	_, model, _ := strings.Cut(read("/proc/cpuinfo"), "model name\t: ")
	model, _, _ = strings.Cut(model, "\n")
	cpus, _ := readCPUs()
	return fmt.Sprintf("%s, %d CPUs, Linux %s, TCP congestion control %s, %s", model, len(cpus),
		read("/proc/sys/kernel/osrelease"), read("/proc/sys/net/ipv4/tcp_congestion_control"), runtime.Version())
}

// save writes out.json and out.md.
func (r *report) save(out string) error {
	r.Ended = time.Now()
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	return errors.Join(
		os.MkdirAll(filepath.Dir(out), 0o755),
		os.WriteFile(out+".json", append(raw, '\n'), 0o644),
		os.WriteFile(out+".md", []byte(r.markdown()), 0o644))
}

// failed is an error if a measurement failed in its last try.
func (r *report) failed() error {
	failed := 0
	for _, m := range r.Runs {
		if m.Error != "" {
			failed++
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d measurements failed", failed, len(r.Runs))
	}
	return nil
}

// point is a figure of one round.
type point struct {
	value     float64
	disturbed bool
}

// settled leaves out disturbed points where there are three others.
func settled(points []point) []point {
	clean := slices.DeleteFunc(slices.Clone(points), func(p point) bool { return p.disturbed })
	if len(clean) >= 3 {
		return clean
	}
	return points
}

// spread returns median and extremes of the values; there is one at least.
func spread(points []point) (median, least, most float64) {
	var v []float64
	for _, p := range points {
		v = append(v, p.value)
	}
	slices.Sort(v)
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2, v[0], v[n-1]
}

// points returns a proxy's values of a metric, one of each round.
func (r *report) points(proxy, scenario, metric string) (points []point) {
	for _, m := range r.Runs {
		if value, ok := m.Values[metric]; ok && m.Proxy == proxy && m.Scenario == scenario {
			points = append(points, point{value: value, disturbed: m.Disturbed != ""})
		}
	}
	return settled(points)
}

// cell is the median, and the extremes if they are others.
func cell(points []point) string {
	if len(points) == 0 {
		return "–"
	}
	median, least, most := spread(points)
	format := "%.4g"
	if most >= 1e4 {
		format = "%.0f"
	}
	if least == most {
		return fmt.Sprintf(format, median)
	}
	return fmt.Sprintf(format+" ["+format+"–"+format+"]", median, least, most)
}

// table is all figures of a scenario, a column for each metric; "" if there are
// none.
func (r *report) table(scenario string) string {
	found := values{}
	for _, m := range r.Runs {
		if m.Scenario == scenario {
			maps.Copy(found, m.Values)
		}
	}
	if len(found) == 0 {
		return ""
	}
	metrics := slices.Sorted(maps.Keys(found))
	var b strings.Builder
	fmt.Fprintf(&b, "\n## %s\n\n| proxy | %s |\n|---|%s\n", scenario, strings.Join(metrics, " | "), strings.Repeat("---:|", len(metrics)))
	for _, proxy := range r.Proxies {
		if !slices.ContainsFunc(r.Runs, func(m *run) bool { return m.Scenario == scenario && m.Proxy == proxy }) {
			continue // of no meaning there
		}
		fmt.Fprintf(&b, "| %s |", proxy)
		for _, metric := range metrics {
			fmt.Fprintf(&b, " %s |", cell(r.points(proxy, scenario, metric)))
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// markdown is the report to read: what must be, then all figures.
func (r *report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# The router beside other proxies\n\n%s\n%s. %s.\n\nBelow, medians and extremes over the rounds; "+
		"bench/README.md explains the columns.\n", r.summary(), r.Machine, r.Settings)
	for _, sc := range scenarios() {
		b.WriteString(r.table(sc.name))
	}
	b.WriteString("\n## Programs and trouble\n\n")
	for _, proxy := range r.Proxies {
		fmt.Fprintf(&b, "- %s: %s\n", proxy, r.Versions[proxy])
	}
	for _, m := range r.Runs {
		if trouble := m.trouble(); trouble != "" {
			fmt.Fprintf(&b, "- round %d, %s, %s:%s\n", m.Round, m.Scenario, m.Proxy, trouble)
		}
	}
	return b.String()
}
