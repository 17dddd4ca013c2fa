package e2e

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// metricNames are metrics that a router in a cluster always has, with their types. They are
// not all: testdata/golden/metrics/ has those.
func metricNames() map[string]dto.MetricType {
	const counter, gauge, histogram = dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_HISTOGRAM
	return map[string]dto.MetricType{
		"router_build_info":                        gauge,
		"router_ready":                             gauge,
		"router_sessions":                          gauge,
		"router_sessions_opened_total":             counter,
		"router_sessions_ended_total":              counter,
		"router_sessions_cut_total":                counter,
		"router_sessions_to_move":                  gauge,
		"router_handoff_info":                      gauge,
		"router_handoff_in_progress":               gauge,
		"router_handoff_steps_total":               counter,
		"router_handoff_waiting_seconds":           gauge,
		"router_handoff_unproven_total":            counter,
		"router_upgrades_total":                    counter,
		"router_pending_upgrades":                  gauge,
		"router_bytes_total":                       counter,
		"router_client_descriptors":                gauge,
		"router_client_descriptors_limit":          gauge,
		"router_accept_paused":                     gauge,
		"router_log_lines_dropped_total":           counter,
		"router_table_info":                        gauge,
		"router_table_overrides":                   gauge,
		"router_table_backends":                    gauge,
		"router_table_invalid_overrides":           gauge,
		"router_table_conflicts":                   gauge,
		"router_table_updates_total":               counter,
		"router_statefulset_replicas":              gauge,
		"router_backend_ready":                     gauge,
		"router_backend_without_namespaces":        gauge,
		"router_watch_state":                       gauge,
		"router_watch_confirmed_timestamp_seconds": gauge,
		"router_watch_consecutive_failures":        gauge,
		"router_watch_failures_total":              counter,
		"router_watch_info":                        gauge,
		"router_watch_object_absent":               gauge,
		"router_table_updated_timestamp_seconds":   gauge,
		"process_open_fds":                         gauge,
		"process_max_fds":                          gauge,
		"go_goroutines":                            gauge,
		"process_start_time_seconds":               gauge,
		"process_cpu_seconds_total":                counter,
		"process_resident_memory_bytes":            gauge,
		"process_virtual_memory_bytes":             gauge,
		"go_memstats_heap_inuse_bytes":             gauge,
		"go_gc_duration_seconds":                   dto.MetricType_SUMMARY,
		"router_max_sessions":                      gauge,
		"router_max_pending_upgrades":              gauge,
		"router_moved_sessions_total":              counter,
		"router_move_cancelled_total":              counter,
		"router_upgrade_duration_seconds":          histogram,
		"router_hold_duration_seconds":             histogram,
		"router_session_duration_seconds":          histogram,
		"router_table_apply_duration_seconds":      histogram,
		"router_handoff_step_duration_seconds":     histogram,
		"router_http_requests_total":               counter,
		"router_http_requests_in_progress":         gauge,
		"router_http_requests_cut_total":           counter,
		"router_http_request_duration_seconds":     histogram,
	}
}

// tlsMetricNames are those of a router that ends TLS.
func tlsMetricNames() map[string]dto.MetricType {
	const counter, gauge, histogram = dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_HISTOGRAM
	return map[string]dto.MetricType{
		"router_tls_handshakes_in_progress":               gauge,
		"router_tls_handshakes_total":                     counter,
		"router_tls_handshakes_resumed_total":             counter,
		"router_tls_handshake_duration_seconds":           histogram,
		"router_tls_certificate_expiry_timestamp_seconds": gauge,
		"router_tls_file_rejected":                        gauge,
	}
}

// labelValues are values of labels that must be there from the start, so that
// a rate has something to begin with.
func labelValues() map[string]string {
	return map[string]string{
		"router_sessions backend":              "backend-0 backend-1 backend-2 backend-3",
		"router_sessions_opened_total backend": "backend-0 backend-1 backend-2 backend-3",
		"router_sessions_ended_total cause":    "client backend client_error backend_error router_error half_close idle moved drain max_age truncated",
		"router_sessions_cut_total cause":      "moved drain max_age",
		"router_bytes_total direction":         "to_backend to_client",
		"router_upgrades_total result": "ok bad_request bad_head not_found not_upgrade no_table unresolved hold_timeout misdirected " +
			"client_gone max_sessions max_pending_upgrades max_sessions_per_namespace max_upgrades_per_second bad_gateway gateway_timeout backend_refused draining",
		"router_watch_state object state":                  "",
		"router_watch_failures_total object class":         "", // each object has each class: see the golden
		"router_watch_info object":                         "",
		"router_backend_ready backend":                     "backend-0 backend-1 backend-2 backend-3",
		"router_build_info version goversion":              "",
		"router_table_info source overrides_version stamp": "",

		"router_table_invalid_overrides source":           "",
		"router_watch_confirmed_timestamp_seconds object": "",
		"router_watch_consecutive_failures object":        "",
		"router_watch_object_absent object":               "",
	}
}

// TestMetrics reads /metrics of every router with Prometheus's parser, and
// sees counters follow what clients do.
func TestMetrics(t *testing.T) {
	const sessions, watches = 25, 4 // of the ConfigMap, the StatefulSet, the EndpointSlices and the hand-off
	s := newSystem(t)
	routers := s.routers(t.Context())
	for _, r := range routers {
		m, err := r.metrics(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		checkFamilies(t, r.pod, m, metricNames(), labelValues())
		if !s.hasNginx() {
			checkFamilies(t, r.pod, m, tlsMetricNames(), map[string]string{
				"router_tls_handshakes_total result":                          "ok failed timeout evicted client_gone",
				"router_tls_certificate_expiry_timestamp_seconds certificate": "/tls",
				"router_tls_file_rejected file":                               "/tls /tickets/secret",
			})
		}
		for name, want := range map[string]float64{"router_ready": 1, "router_table_backends": 4, "router_statefulset_replicas": 4,
			"router_backend_ready": 4, "router_watch_state": watches} {
			if got := m.sum(name); got != want {
				t.Errorf("%s: %s is %v in all, want %v", r.pod, name, got, want)
			}
		}
		failures, fast := m.sum("router_watch_consecutive_failures"), m.sum("router_watch_info", "protocol", "HTTP/2.0")
		if failures != 0 || fast != watches {
			t.Errorf("%s: %v failures, %v watches over HTTP/2, want 0 and %d", r.pod, failures, fast, watches)
		}
	}

	s.awaitSessions(routers, 0)
	rising := []string{"router_sessions_opened_total", "router_upgrades_total", "router_bytes_total"}
	before := map[string]float64{}
	for _, name := range rising {
		before[name] = s.mustSum(routers, name)
	}
	ended := s.mustSum(routers, "router_sessions_ended_total")
	var held []*follower
	for i := range sessions {
		held = append(held, s.mustFollow(fmt.Sprintf("%smetrics-%d", prefix, i)))
	}
	s.awaitSessions(routers, sessions)
	for name, least := range map[string]float64{
		"router_sessions_opened_total": sessions, "router_upgrades_total": sessions, "router_bytes_total": 40 * sessions,
	} {
		if rose := s.mustSum(routers, name) - before[name]; rose < least {
			t.Errorf("%s rose by %v with %d sessions, want at least %v", name, rose, sessions, least)
		}
	}
	for _, f := range held {
		f.close()
	}
	s.awaitSessions(routers, 0)
	if rose := s.mustSum(routers, "router_sessions_ended_total") - ended; rose != sessions {
		t.Errorf("router_sessions_ended_total rose by %v after %d sessions", rose, sessions)
	}
}

// checkFamilies holds names, types, help and labels of metrics.
func checkFamilies(t *testing.T, pod string, m metrics, names map[string]dto.MetricType, labels map[string]string) {
	t.Helper()
	for name, kind := range names {
		family := m[name]
		switch {
		case family == nil:
			t.Errorf("%s: no %s", pod, name)
		case family.GetType() != kind:
			t.Errorf("%s: %s is a %s, want %s", pod, name, family.GetType(), kind)
		case family.GetHelp() == "" || len(family.GetMetric()) == 0:
			t.Errorf("%s: %s has no help or no samples", pod, name)
		}
	}
	for key, values := range labels {
		words := strings.Fields(key)
		for _, label := range words[1:] {
			checkLabel(t, pod, m[words[0]], label, strings.Fields(values))
		}
	}
}

// checkLabel holds the values of a label: exactly these, if any are given, or more backends.
func checkLabel(t *testing.T, pod string, family *dto.MetricFamily, label string, want []string) {
	t.Helper()
	got := map[string]int{}
	for _, sample := range family.GetMetric() {
		for _, pair := range sample.GetLabel() {
			if pair.GetName() == label {
				got[pair.GetValue()]++
			}
		}
	}
	if len(got) == 0 {
		t.Errorf("%s: %s has no label %q", pod, family.GetName(), label)
	}
	for _, value := range want {
		if got[value] != 1 {
			t.Errorf("%s: %s has %d samples with %s=%q, want 1", pod, family.GetName(), got[value], label, value)
		}
	}
	if label == "backend" { // there may have been more backends before
		maps.DeleteFunc(got, func(value string, n int) bool { return n == 1 && !slices.Contains(want, value) })
	}
	if len(want) > 0 && len(got) != len(want) {
		t.Errorf("%s: %s has the values %v of %q, want %q", pod, family.GetName(), got, label, want)
	}
}

// awaitSessions waits until the routers count this many sessions in all. The
// time is that of a half-closed session of a client that is gone.
func (s *system) awaitSessions(routers []*router, want float64) {
	s.t.Helper()
	eventually(s.t, 40*time.Second, "router_sessions (has the system other clients?)", func() error {
		got, err := sumOver(s.t.Context(), routers, "router_sessions")
		if err == nil && got != want {
			err = fmt.Errorf("the sum is %v, want %v", got, want)
		}
		return err
	})
}
