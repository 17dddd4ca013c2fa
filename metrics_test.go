package main

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"
)

// exposition is what a scrape has: values by series as they are written, and the
// type of each family.
type exposition struct {
	values map[string]float64
	kinds  map[string]string
}

const (
	metricName = `[a-zA-Z_:][a-zA-Z0-9_:]*`
	labelPair  = `[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"`
)

// parseExposition reads the text format, and is stricter than Prometheus: each
// family has HELP, then TYPE, then its samples, all once; no series comes twice
// (https://prometheus.io/docs/instrumenting/exposition_formats/).
func parseExposition(text string) (*exposition, error) {
	if !strings.HasSuffix(text, "\n") || !utf8.ValidString(text) {
		return nil, errors.New("no newline at the end, or no UTF-8")
	}
	help := regexp.MustCompile(`^# HELP (` + metricName + `) (?:[^\\]|\\[\\n])+$`)
	kind := regexp.MustCompile(`^# TYPE (` + metricName + `) (counter|gauge|histogram|summary)$`)
	sample := regexp.MustCompile(`^((` + metricName + `)(?:\{` + labelPair + `(?:,` + labelPair + `)*\})?) (\S+)$`)
	e := &exposition{values: map[string]float64{}, kinds: map[string]string{}}
	var helped, typed string // the families of the last HELP and TYPE
	seen := map[string]bool{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if m := help.FindStringSubmatch(line); m != nil && !seen[m[1]] {
			helped, seen[m[1]] = m[1], true
			continue
		}
		if m := kind.FindStringSubmatch(line); m != nil && m[1] == helped && e.kinds[helped] == "" {
			typed, e.kinds[helped] = helped, m[2]
			continue
		}
		m := sample.FindStringSubmatch(line)
		if m != nil && (e.kinds[typed] == "histogram" || e.kinds[typed] == "summary") {
			m[2] = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(m[2], "")
		}
		if m == nil || m[2] != typed || typed != helped {
			return nil, fmt.Errorf("line %q after HELP %s and TYPE %s", line, helped, typed)
		}
		value, err := strconv.ParseFloat(m[3], 64)
		if _, twice := e.values[m[1]]; err != nil || twice {
			return nil, fmt.Errorf("series %s: value %q, or twice", m[1], m[3])
		}
		e.values[m[1]] = value
	}
	return e, e.complete()
}

// complete reports a family without samples, and one whose name does not say
// that it is a counter, or says so wrongly.
func (e *exposition) complete() error {
	families := map[string]bool{}
	for series := range e.values {
		family, _, _ := strings.Cut(series, "{")
		families[family] = true
		families[strings.TrimSuffix(family, "_count")] = true
	}
	for family, kind := range e.kinds {
		if !families[family] || strings.HasSuffix(family, "_total") != (kind == "counter") {
			return fmt.Errorf("family %s of type %s has no sample, or a wrong name", family, kind)
		}
	}
	return nil
}

func TestExpositionCheckerIsStrict(t *testing.T) {
	const head = "# HELP a Text.\n# TYPE a gauge\n"
	for _, valid := range []string{"a 1\n", `a{b="c",d="\"\\\n"} 1.5e+06` + "\n"} {
		if _, err := parseExposition(head + valid); err != nil {
			t.Errorf("error %v for\n%s", err, valid)
		}
	}
	for name, invalid := range map[string]string{
		"no newline": head + "a 1", "no head": "a 1\n", "no TYPE": "# HELP a Text.\na 1\n",
		"TYPE first":      "# TYPE a gauge\n# HELP a Text.\na 1\n",
		"TYPE of another": "# HELP a Text.\n# TYPE b gauge\nb 1\n", "unknown type": "# HELP a Text.\n# TYPE a number\na 1\n",
		"HELP twice": head + "a 1\n" + head + "a{b=\"c\"} 1\n", "sample of another": head + "a 1\nb 1\n",
		"series twice": head + "a{b=\"c\"} 1\na{b=\"c\"} 2\n", "no value": head + "a\n", "value no number": head + "a one\n",
		"label not escaped": head + `a{b="c"d"} 1` + "\n", "backslash alone": head + `a{b="c\d"} 1` + "\n",
		"label without a name": head + `a{="c"} 1` + "\n", "invalid UTF-8": head + "a{b=\"\xff\"} 1\n", "no sample": head,
		"counter's name": "# HELP a Text.\n# TYPE a counter\na 1\n", "gauge's name": "# HELP a_total Text.\n# TYPE a_total gauge\na_total 1\n",
		"empty line": head + "\na 1\n",
	} {
		if _, err := parseExposition(invalid); err == nil {
			t.Errorf("%s: no error for\n%s", name, invalid)
		}
	}
}

// lacks says which series has another value than is wanted, or "".
func (e *exposition) lacks(values map[string]float64) string {
	for series, want := range values {
		if got, ok := e.values[series]; !ok || got != want {
			return fmt.Sprintf("%s is %v (there: %v), want %v", series, got, ok, want)
		}
	}
	return ""
}

func TestMetricsOfASession(t *testing.T) {
	dir := overridesDir(t, map[string]string{"ns-01": "backend-1", "bad": "bakend-1"})
	r := startRouter(t, "-backends", echoBackends(t, 2), "-overrides", dir, "-http", "off")
	line := r.log.wait(t, "routing table updated", 1)
	table, stamp := line["overrides_version"].(string), line["stamp"].(string)
	before := waitMetrics(t, r, map[string]float64{
		`router_ready`: 1, `router_table_overrides`: 2, `router_table_backends`: 2, `router_table_conflicts`: 0,
		`router_table_invalid_overrides{source="directory ` + dir + `"}`: 1,
		`router_table_updates_total`:                                     1, `router_table_info{source="directory ` + dir + `",overrides_version="` + table + `",stamp="` + stamp + `"}`: 1,
		`router_build_info{version="` + version() + `",goversion="` + runtime.Version() + `"}`: 1,
		`router_sessions{backend="backend-0"}`:                                                 0, `router_sessions{backend="backend-1"}`: 0,
		`router_sessions_opened_total{backend="backend-1"}`: 0, `router_pending_upgrades`: 0,
		`router_bytes_total{direction="to_backend"}`: 0, `router_bytes_total{direction="to_client"}`: 0,
		`router_log_lines_dropped_total`: 0, `router_accept_paused`: 0, `router_client_descriptors`: 0,
	})
	zero := map[string]float64{}
	for r := range numUpgradeResults {
		zero[`router_upgrades_total{result="`+r.String()+`"}`] = 0
	}
	for c := causeNone + 1; c < numCauses; c++ {
		zero[`router_sessions_ended_total{cause="`+c.String()+`"}`] = 0
	}
	if lacks := before.lacks(zero); lacks != "" {
		t.Error(lacks)
	}

	ws := r.open(t, "ns-01") // "hello" there and back: 2 and 4 bytes of header
	waitMetrics(t, r, map[string]float64{
		`router_sessions{backend="backend-0"}`: 0, `router_sessions{backend="backend-1"}`: 1,
		`router_sessions_opened_total{backend="backend-1"}`: 1, `router_upgrades_total{result="ok"}`: 1, `router_pending_upgrades`: 0,
		`router_bytes_total{direction="to_backend"}`: 11, `router_bytes_total{direction="to_client"}`: 7,
	})
	ws.Close()
	cause := r.log.wait(t, "session ended", 1)["cause"].(string) // either side may be the first: the backend answers a Close
	resp, err := http.Get("http://" + r.clientAddr + "/ws/ns-01")
	must(t, err)
	resp.Body.Close()
	after := waitMetrics(t, r, map[string]float64{
		`router_sessions{backend="backend-1"}`: 0, `router_sessions_opened_total{backend="backend-1"}`: 1,
		`router_sessions_ended_total{cause="` + cause + `"}`: 1, `router_upgrades_total{result="not_upgrade"}`: 1,
	})
	for series, value := range before.values {
		if now := after.values[series]; strings.Contains(series, "_total") && now < value {
			t.Errorf("counter %s fell from %v to %v", series, value, now)
		}
	}
	if started := after.values["process_start_time_seconds"]; math.Abs(started-float64(time.Now().Unix())) > 60 {
		t.Errorf("process_start_time_seconds is %v, want about now", started)
	}
}

func TestMetricsOfTheWatch(t *testing.T) {
	const of = `{object="ConfigMap default/overwriting"`
	stamp := tableOf(1, map[string]string{"ns-01": "backend-0"}, nil).stamp
	tests := map[string]struct {
		url       string
		want      map[string]float64
		confirmed bool // the API server has answered with the object
	}{
		"ConfigMap": {kubeAnswers(t, oneMap()), map[string]float64{`router_ready`: 1,
			`router_table_info{source="ConfigMap default/overwriting",overrides_version="5",stamp="` + stamp + `"}`: 1, `router_table_overrides`: 1,
			`router_table_invalid_overrides{source="ConfigMap default/overwriting"}`: 0, `router_watch_info` + of + `,protocol="HTTP/1.1"}`: 1,
			`router_watch_consecutive_failures` + of + `}`: 0, `router_watch_failures_total` + of + `,class="dial"}`: 0,
			`router_watch_object_absent` + of + `}`:            0,
			`router_watch_state` + of + `,state="connecting"}`: 1}, true},
		"no ConfigMap": {kubeAnswers(t, listOf("ConfigMap", nil)), map[string]float64{`router_ready`: 0, `router_table_updates_total`: 0,
			`router_watch_object_absent` + of + `}`:            1,
			`router_watch_state` + of + `,state="connecting"}`: 1}, true}, // after the LIST
		"forbidden": {kubeAnswers(t, forbidden()), map[string]float64{`router_ready`: 0,
			`router_watch_object_absent` + of + `}`: 0, `router_watch_consecutive_failures` + of + `}`: 1,
			`router_watch_failures_total` + of + `,class="forbidden"}`: 1, `router_watch_state` + of + `,state="backoff"}`: 1,
			`router_watch_state` + of + `,state="listing"}`: 0, `router_watch_state` + of + `,state="connecting"}`: 0,
			`router_watch_state` + of + `,state="watching"}`: 0}, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := startRouter(t, "-backends", "127.0.0.1:1", "-kube", tt.url)
			e := waitMetrics(t, r, tt.want)
			confirmed := e.values["router_watch_confirmed_timestamp_seconds"+of+"}"]
			if age := time.Since(time.Unix(int64(confirmed), 0)); tt.confirmed && (age < 0 || age > time.Minute) || !tt.confirmed && confirmed != 0 {
				t.Errorf("router_watch_confirmed_timestamp_seconds is %v", confirmed)
			}
		})
	}
}

// TestMetricsEscapeLabels: a path of -overrides may have any bytes.
func TestMetricsEscapeLabels(t *testing.T) {
	for name, tt := range map[string]struct{ source, want string }{
		"quotes":        {`a "b"`, `a \"b\"`},
		"backslash":     {`a\b\n`, `a\\b\\n`},
		"newline":       {"a\nb", `a\nb`},
		"braces":        {`a{b="c"} 1`, `a{b=\"c\"} 1`},
		"invalid UTF-8": {"a\xffb", "a�b"},
		"other letters": {"ä", "ä"},
	} {
		t.Run(name, func(t *testing.T) {
			a, update := adminOf(t, "127.0.0.1:1")
			update(sourceContent{id: sourceID{name: tt.source}, version: tt.source})
			e := expositionOf(t, a.writeMetrics)
			if lacks := e.lacks(map[string]float64{`router_table_info{source="` + tt.want + `",overrides_version="` + tt.want + `",stamp="` + a.proxy.tables.table().stamp + `"}`: 1}); lacks != "" {
				t.Error(lacks)
			}
		})
	}
}

func TestMetricsOfMoves(t *testing.T) {
	a, _ := adminOf(t, "127.0.0.1:1")
	a.proxy.mover.queue.size.Store(3)
	a.proxy.relay.cut[causeMoved].Store(4)
	a.proxy.relay.cut[causeDrain].Store(5)
	e := expositionOf(t, a.writeMetrics)
	if lacks := e.lacks(map[string]float64{`router_sessions_to_move`: 3,
		`router_sessions_cut_total{cause="moved"}`: 4, `router_sessions_cut_total{cause="drain"}`: 5}); lacks != "" {
		t.Error(lacks)
	}
}

func TestMetricsFormat(t *testing.T) {
	const text, open = "text/plain; version=0.0.4; charset=utf-8", "application/openmetrics-text; version=1.0.0; charset=utf-8"
	for accept, want := range map[string]string{
		"": text, "*/*": text, "text/html, */*;q=0.1": text, "text/plain": text, "nonsense;;,": text,
		"application/openmetrics-text":                           open,
		"application/openmetrics-text; version=1.0.0":            open,
		"Application/OpenMetrics-Text;version=\"1.0.0\"; q=0.1":  open,
		"text/plain;q=0.3,application/openmetrics-text;q=0.5":    open,
		"application/openmetrics-text; version=0.0.1":            text,
		"application/openmetrics-text; version=2.0.0, */*":       text,
		"application/openmetrics-text; q=0":                      text,
		"application/openmetrics-text; q=much":                   text,
		"application/openmetrics-text; q=NaN":                    text,
		"application/openmetrics-text;q=0.4, text/plain;q=0.5":   text,
		"application/openmetrics-text;q=0.4, text/plain;q=0.400": open,
		// Prometheus 2.42 and 3.0
		"application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1":                                                             open,
		"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.7,application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.4,*/*;q=0.2": open,
	} {
		openMetrics, got := metricsFormat([]string{accept})
		if got != want || openMetrics != (want == open) {
			t.Errorf("Accept: %s gets %q (OpenMetrics: %v), want %q", accept, got, openMetrics, want)
		}
	}
	if _, got := metricsFormat([]string{"text/html", "application/openmetrics-text"}); got != open {
		t.Errorf("two fields Accept get %q, want %q", got, open)
	}
	if _, got := metricsFormat(nil); got != text {
		t.Errorf("no field Accept gets %q, want %q", got, text)
	}
}

// TestMetricsOpenMetrics: both formats have the same families and series. In OpenMetrics
// the family of a counter lacks _total, and has no other family's name
// (https://prometheus.io/docs/specs/om/open_metrics_spec/). TestExposition of e2e/ reads
// both with Prometheus's parsers.
func TestMetricsOpenMetrics(t *testing.T) {
	a, _ := adminOf(t, "127.0.0.1:1")
	names := func(accept, contentType string) (text string, series map[string]bool) {
		r := httptest.NewRequest("GET", "/metrics", nil)
		r.Header.Set("Accept", accept)
		w := httptest.NewRecorder()
		a.handler().ServeHTTP(w, r)
		if got := w.Header().Get("Content-Type"); w.Code != 200 || !strings.HasPrefix(got, contentType) {
			t.Fatalf("%d with Content-Type %q, want 200 and %s", w.Code, got, contentType)
		}
		series = map[string]bool{}
		for _, m := range regexp.MustCompile(`(?m)^(\w+(?:\{.*\})?) \S+$`).FindAllStringSubmatch(w.Body.String(), -1) {
			series[m[1]] = true
		}
		return w.Body.String(), series
	}
	plain, plainSeries := names("text/plain", "text/plain")
	open, openSeries := names(openMetricsType, openMetricsType)
	if !maps.Equal(plainSeries, openSeries) || len(openSeries) < 100 {
		t.Errorf("%d series as text, %d as OpenMetrics, want the same", len(plainSeries), len(openSeries))
	}
	if !strings.HasSuffix(open, "\n# EOF\n") || strings.Contains(plain, "# EOF") || strings.Contains(plain, "# UNIT") {
		t.Errorf("want # EOF at the end of OpenMetrics only, and units nowhere else: %q", open[len(open)-40:])
	}
	families := map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+) `).FindAllStringSubmatch(open, -1) {
		families[m[1]]++
		if families[m[1]] > 1 || strings.HasSuffix(m[1], "_total") {
			t.Errorf("OpenMetrics has the family %s %d times, want each once, without _total", m[1], families[m[1]])
		}
	}
	for _, line := range []string{"# UNIT router_bytes bytes", "# UNIT router_upgrade_duration_seconds seconds", "# TYPE router_upgrades counter"} {
		if !strings.Contains(open, line+"\n") {
			t.Errorf("no %q in\n%s", line, open)
		}
	}
}

func TestHistogram(t *testing.T) {
	h := newHistogram(.01, 1, 60)
	for _, d := range []time.Duration{0, 10 * time.Millisecond, 11 * time.Millisecond, time.Second, time.Minute, time.Hour} {
		h.observe(d)
	}
	(*histogram)(nil).observe(time.Second) // counts nothing
	var out strings.Builder
	h.write(metricsWriter{w: &out}, "a_seconds", "Text.")
	e, err := parseExposition(out.String())
	must(t, err)
	if lacks := e.lacks(map[string]float64{
		`a_seconds_bucket{le="0.01"}`: 2, `a_seconds_bucket{le="1.0"}`: 4, `a_seconds_bucket{le="60.0"}`: 5,
		`a_seconds_bucket{le="+Inf"}`: 6, `a_seconds_count`: 6, `a_seconds_sum`: 3661.021,
	}); lacks != "" {
		t.Error(lacks)
	}
	if n := testing.AllocsPerRun(100, func() { h.observe(time.Second) }); n != 0 {
		t.Errorf("observe allocates %v times", n)
	}
}

// TestMetricsOfTimes: what takes time is counted once in its histogram: an upgrade that
// becomes a session, one that waits for its owner in vain, the session's end, the table.
func TestMetricsOfTimes(t *testing.T) {
	for way := range bothWays("") {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			const hold = 2 * time.Second // also of the first upgrade, on a busy machine
			dir := overridesDir(t, map[string]string{"up": "backend-0", "down": "backend-1"})
			r := startRouter(t, "-backends", echoBackends(t, 1)+","+refusingAddr(t), "-overrides", dir, "-hold", hold.String())
			r.until(t, "/readyz", "^ready\n$")
			ask := func(namespace string, status int) net.Conn {
				conn, _, resp := (&testProxy{addr: r.clientAddr}).ask(t, bothWays("/ws/" + namespace)[way])
				wantEqual(t, "status", resp.StatusCode, status)
				return conn
			}
			conn := ask("up", http.StatusSwitchingProtocols)
			e := waitMetrics(t, r, map[string]float64{
				`router_upgrade_duration_seconds_count`: 1, `router_hold_duration_seconds_count`: 0,
				`router_table_apply_duration_seconds_count`: 1, `router_session_duration_seconds_count{cause="client"}`: 0,
				`router_max_sessions`: 100000, `router_max_pending_upgrades`: 10000,
			})
			if took := e.values["router_upgrade_duration_seconds_sum"]; took <= 0 {
				t.Errorf("the upgrade took %v s", took)
			}
			ask("down", http.StatusServiceUnavailable)
			e = waitMetrics(t, r, map[string]float64{`router_hold_duration_seconds_count`: 1, `router_upgrade_duration_seconds_count`: 1})
			// It waits from its first refused dial on, the hold is from its head on.
			if held := e.values["router_hold_duration_seconds_sum"]; held <= 0 {
				t.Errorf("the upgrade was held for %v s", held)
			}
			conn.Close()
			cause := r.log.wait(t, "session ended", 1)["cause"].(string)
			e = waitMetrics(t, r, map[string]float64{`router_session_duration_seconds_count{cause="` + cause + `"}`: 1})
			if lasted := e.values[`router_session_duration_seconds_sum{cause="`+cause+`"}`]; lasted < hold.Seconds()/2 { // its clock does not begin with that of the hold
				t.Errorf("the session lasted %v s, want about as much as the hold, or more", lasted)
			}
		})
	}
}

// TestMetricsOfAHold: an upgrade that waits for its owner and becomes a session is counted
// as held, once, by its whole wait.
func TestMetricsOfAHold(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		var ready atomic.Bool
		p := startProxy(t, strings.Split(echoBackends(t, 1), ","), map[string]string{}, func(p *proxy) {
			p.backends.queues.backendReady = func(int) error {
				if ready.Load() {
					return nil
				}
				return errors.New("not yet")
			}
		})
		conn := dial(t, p.addr)
		mustWrite(t, conn, request)
		eventually(t, "upgrades that wait", 1, func() int { return len(p.backends.queues.waitersOf(0)) })
		ready.Store(true)
		p.backends.queues.readinessChanged()
		p.waitResult(t, resultOK)
		e := expositionOf(t, p.proxy.writeMetrics)
		if lacks := e.lacks(map[string]float64{`router_hold_duration_seconds_count`: 1, `router_upgrade_duration_seconds_count`: 1}); lacks != "" {
			t.Error(lacks)
		}
		if held, all := e.values["router_hold_duration_seconds_sum"], e.values["router_upgrade_duration_seconds_sum"]; held <= 0 || held > all {
			t.Errorf("held for %v s of an upgrade of %v s", held, all)
		}
	})
}

// expositionOf returns what the function writes.
func expositionOf(t *testing.T, write func(metricsWriter)) *exposition {
	t.Helper()
	var out strings.Builder
	write(metricsWriter{w: &out})
	e, err := parseExposition(out.String())
	must(t, err)
	return e
}
