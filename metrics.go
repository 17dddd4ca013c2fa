package main

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// metricsWriter writes the Prometheus text format, version 0.0.4
// (https://prometheus.io/docs/instrumenting/exposition_formats/). Each component writes
// its own families with it; admin.writeMetrics calls them. Errors of w are dropped.
type metricsWriter struct{ w io.Writer }

// family starts a family of the kind "counter" or "gauge". The function that it returns
// writes a sample of it, as m.sample does: at least one, before the next family.
func (m metricsWriter) family(name, kind, help string) (
	sample func(value float64, labels ...string)) {
	fmt.Fprintf(m.w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	return func(value float64, labels ...string) { m.sample(name, value, labels...) }
}

// sample writes one value. The labels are name, value, name, value...
func (m metricsWriter) sample(name string, value float64, labels ...string) {
	if len(labels) == 0 {
		fmt.Fprintf(m.w, "%s %v\n", name, value)
		return
	}
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
	pairs := make([]string, 0, len(labels)/2)
	for i := 0; i < len(labels); i += 2 {
		text := escape.Replace(strings.ToValidUTF8(labels[i+1], "�"))
		pairs = append(pairs, labels[i]+`="`+text+`"`)
	}
	fmt.Fprintf(m.w, "%s{%s} %v\n", name, strings.Join(pairs, ","), value)
}

// single writes a family with one sample and no labels.
func (m metricsWriter) single(name, kind, help string, value float64) {
	m.family(name, kind, help)
	m.sample(name, value)
}

// unixSeconds returns the time in seconds since 1970, as metrics have it; 0 for the zero
// time.
func unixSeconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixNano()) / float64(time.Second)
}

// boolToFloat returns 1 for true and 0 for false, as gauges have them.
func boolToFloat(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
