package main

import (
	"errors"
	"fmt"
	"math"
	"net/http"
	"regexp"
	"runtime"
	"strconv"
	"strings"
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
	kind := regexp.MustCompile(`^# TYPE (` + metricName + `) (counter|gauge|histogram)$`)
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
		if m != nil && e.kinds[typed] == "histogram" {
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
	table, stamp := line["version"].(string), line["stamp"].(string)
	before := waitMetrics(t, r, map[string]float64{
		`router_ready`: 1, `router_table_overrides`: 2, `router_table_backends`: 2, `router_table_conflicts`: 0,
		`router_table_rejected_overrides{source="directory ` + dir + `"}`: 1,
		`router_table_updates_total`:                                      1, `router_table_info{source="directory ` + dir + `",version="` + table + `",stamp="` + stamp + `"}`: 1,
		`router_build_info{version="` + version() + `",goversion="` + runtime.Version() + `"}`: 1,
		`router_sessions{backend="backend-0"}`:                                                 0, `router_sessions{backend="backend-1"}`: 0,
		`router_sessions_opened_total{backend="backend-1"}`: 0, `router_pending_upgrades`: 0,
		`router_bytes_total{direction="to_backend"}`: 0, `router_bytes_total{direction="to_client"}`: 0,
		`router_log_lines_dropped_total`: 0, `router_accept_paused`: 0, `router_client_descriptors`: 0,
	})
	zero := map[string]float64{}
	for r := range resultCut {
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
			`router_table_info{source="ConfigMap default/overwriting",version="5",stamp="` + stamp + `"}`: 1, `router_table_overrides`: 1,
			`router_table_rejected_overrides{source="ConfigMap default/overwriting"}`: 0, `router_watch_info` + of + `,protocol="HTTP/1.1"}`: 1,
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
			var out strings.Builder
			a.writeMetrics(&out)
			e, err := parseExposition(out.String())
			must(t, err)
			if lacks := e.lacks(map[string]float64{`router_table_info{source="` + tt.want + `",version="` + tt.want + `",stamp="` + a.proxy.router.table().stamp + `"}`: 1}); lacks != "" {
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
	var out strings.Builder
	a.writeMetrics(&out)
	e, err := parseExposition(out.String())
	must(t, err)
	if lacks := e.lacks(map[string]float64{`router_sessions_to_move`: 3,
		`router_sessions_cut_total{cause="moved"}`: 4, `router_sessions_cut_total{cause="drain"}`: 5}); lacks != "" {
		t.Error(lacks)
	}
}

func TestMetricsAreText(t *testing.T) {
	a, _ := adminOf(t, "127.0.0.1:1")
	resp := answered(a, "/metrics")
	if got, want := resp.Header.Get("Content-Type"), "text/plain; version=0.0.4; charset=utf-8"; got != want || resp.StatusCode != 200 {
		t.Errorf("%s with Content-Type %q, want 200 and %q", resp.Status, got, want)
	}
}
