package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// metricsWriter writes the Prometheus text format, version 0.0.4
// (https://prometheus.io/docs/instrumenting/exposition_formats/). Each component writes
// its own families with it; admin.writeMetrics calls them. Errors of w are dropped.
type metricsWriter struct{ w io.Writer }

// family starts a family of the kind "counter", "gauge" or "histogram". The function that it returns
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

// histogram counts times in buckets. The zero value has counted none.
type histogram struct {
	counts      [len(histogramBounds{}) + 1]atomic.Int64 // of each bucket alone
	nanoseconds atomic.Int64                             // sum
}

// histogramBounds are upper bounds of buckets, in seconds.
type histogramBounds [13]float64

// bounds returns the upper bounds of all buckets but the last, which has none.
func (h *histogram) bounds() histogramBounds {
	return histogramBounds{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
}

// observe counts a time.
func (h *histogram) observe(d time.Duration) {
	bucket := 0
	for bounds := h.bounds(); bucket < len(bounds) && d.Seconds() > bounds[bucket]; {
		bucket++
	}
	h.counts[bucket].Add(1)
	h.nanoseconds.Add(int64(d))
}

// write writes the histogram as a family. Its buckets are cumulative.
func (h *histogram) write(m metricsWriter, name, help string) {
	m.family(name, "histogram", help)
	total := int64(0)
	for i, bound := range h.bounds() {
		total += h.counts[i].Load()
		m.sample(name+"_bucket", float64(total), "le", strconv.FormatFloat(bound, 'g', -1, 64))
	}
	total += h.counts[len(h.counts)-1].Load()
	m.sample(name+"_bucket", float64(total), "le", "+Inf")
	m.sample(name+"_sum", time.Duration(h.nanoseconds.Load()).Seconds())
	m.sample(name+"_count", float64(total))
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
