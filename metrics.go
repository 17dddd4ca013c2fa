package main

import (
	"fmt"
	"io"
	"mime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// metricsWriter writes the text format of Prometheus, version 0.0.4
// (https://prometheus.io/docs/instrumenting/exposition_formats/), or OpenMetrics 1.0.0
// (https://prometheus.io/docs/specs/om/open_metrics_spec/). Each component writes its own
// families with it; admin.writeMetrics calls them. Errors of w are dropped.
type metricsWriter struct {
	w           io.Writer
	openMetrics bool
}

// family starts a family of the kind "counter", "gauge", "histogram" or "summary". The
// function that it returns writes a sample of it, as m.sample does: at least one, before
// the next family. In OpenMetrics the name of a counter's family lacks the _total of its
// samples, and a family has the unit with which its name ends.
func (m metricsWriter) family(name, kind, help string) (
	sample func(value float64, labels ...string)) {
	family := name
	if m.openMetrics {
		family = strings.TrimSuffix(name, "_total")
	}
	fmt.Fprintf(m.w, "# HELP %s %s\n# TYPE %s %s\n", family, help, family, kind)
	for _, unit := range []string{"seconds", "bytes"} {
		if m.openMetrics && strings.HasSuffix(family, "_"+unit) {
			fmt.Fprintf(m.w, "# UNIT %s %s\n", family, unit)
		}
	}
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

// single writes a family with one sample.
func (m metricsWriter) single(name, kind, help string, value float64, labels ...string) {
	m.family(name, kind, help)
	m.sample(name, value, labels...)
}

// end writes what has to follow the last family.
func (m metricsWriter) end() {
	if m.openMetrics {
		io.WriteString(m.w, "# EOF\n")
	}
}

// histogram counts times in buckets. A nil one counts nothing.
type histogram struct {
	bounds      []float64      // upper bounds of all buckets but the last, in seconds
	counts      []atomic.Int64 // of each bucket alone
	nanoseconds atomic.Int64   // sum
}

// newHistogram returns a histogram with buckets up to these bounds, in seconds, which
// rise, and one more.
func newHistogram(bounds ...float64) *histogram {
	return &histogram{bounds: bounds, counts: make([]atomic.Int64, len(bounds)+1)}
}

// observe counts a time. It takes no lock and allocates nothing.
func (h *histogram) observe(d time.Duration) {
	if h == nil {
		return
	}
	bucket := 0
	for seconds := d.Seconds(); bucket < len(h.bounds) && seconds > h.bounds[bucket]; {
		bucket++
	}
	h.counts[bucket].Add(1)
	h.nanoseconds.Add(int64(d))
}

// write writes the histogram as a family.
func (h *histogram) write(m metricsWriter, name, help string) {
	m.family(name, "histogram", help)
	h.writeSamples(m, name)
}

// writeSamples writes the histogram as samples with these labels. Its buckets are
// cumulative.
func (h *histogram) writeSamples(m metricsWriter, name string, labels ...string) {
	with := func(bound string) []string { return append(slices.Clip(labels), "le", bound) }
	total := int64(0)
	for i, bound := range h.bounds {
		total += h.counts[i].Load()
		m.sample(name+"_bucket", float64(total), with(boundText(bound))...)
	}
	total += h.counts[len(h.bounds)].Load()
	m.sample(name+"_bucket", float64(total), with("+Inf")...)
	m.sample(name+"_sum", time.Duration(h.nanoseconds.Load()).Seconds(), labels...)
	m.sample(name+"_count", float64(total), labels...)
}

// boundText returns a bound as the label le has it: "1.0", as OpenMetrics wants it. A
// series then has the same labels in both formats.
func boundText(bound float64) string {
	text := strconv.FormatFloat(bound, 'g', -1, 64)
	if strings.ContainsAny(text, ".e") {
		return text
	}
	return text + ".0"
}

// metricsFormat returns whether a scraper with these fields Accept gets OpenMetrics, and
// the Content-Type of the answer. It gets OpenMetrics if it asks for version 1.0.0, or for
// none, and does not prefer text/plain (RFC 9110 §12.5.1).
func metricsFormat(accept []string) (openMetrics bool, contentType string) {
	best := map[string]float64{} // the highest q of each type
	for item := range strings.SplitSeq(strings.Join(accept, ","), ",") {
		kind, params, err := mime.ParseMediaType(item)
		if version := params["version"]; err != nil || kind == openMetricsType &&
			version != "" && version != openMetricsVersion {
			continue
		}
		q := 1.0
		if text, ok := params["q"]; ok {
			q, _ = strconv.ParseFloat(text, 64) // 0, not acceptable, if it is invalid
		}
		best[kind] = max(best[kind], q)
	}
	if q := best[openMetricsType]; q > 0 && q >= best["text/plain"] {
		return true, openMetricsType + "; version=" + openMetricsVersion + "; charset=utf-8"
	}
	return false, "text/plain; version=0.0.4; charset=utf-8"
}

const (
	openMetricsType    = "application/openmetrics-text"
	openMetricsVersion = "1.0.0"
)

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
