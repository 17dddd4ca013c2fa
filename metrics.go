package main

import (
	"fmt"
	"io"
	"math"
	"runtime"
	"strings"
	"time"
)

// metricsWriter writes the Prometheus text format, version 0.0.4
// (https://prometheus.io/docs/instrumenting/exposition_formats/).
type metricsWriter struct{ w io.Writer }

// family starts a metric; its samples follow.
func (m metricsWriter) family(name, kind, help string) {
	fmt.Fprintf(m.w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// sample writes one value with labels given as name, value, name, value...
func (m metricsWriter) sample(name string, value float64, labels ...string) {
	if len(labels) == 0 {
		fmt.Fprintf(m.w, "%s %v\n", name, value)
		return
	}
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
	pairs := make([]string, 0, len(labels)/2)
	for i := 0; i < len(labels); i += 2 {
		pairs = append(pairs, labels[i]+`="`+escape.Replace(strings.ToValidUTF8(labels[i+1], "�"))+`"`)
	}
	fmt.Fprintf(m.w, "%s{%s} %v\n", name, strings.Join(pairs, ","), value)
}

// single writes a metric of one value.
func (m metricsWriter) single(name, kind, help string, value float64) {
	m.family(name, kind, help)
	m.sample(name, value)
}

// writeMetrics writes all metrics.
func (a *admin) writeMetrics(w io.Writer) {
	m := metricsWriter{w}
	m.family("router_build_info", "gauge", "Always 1; the labels say which build this is.")
	m.sample("router_build_info", 1, "version", version(), "goversion", runtime.Version())
	m.single("router_ready", "gauge", "1 if /readyz says so.", boolToFloat(len(a.whyNotReady()) == 0))
	a.writeSessions(m)
	a.writeUpgrades(m)
	a.writeTable(m)
	if a.replicaWatcher != nil {
		a.writeReplicas(m)
	}
	if a.configMaps != nil {
		a.writeWatchers(m)
	}
	m.single("router_log_lines_dropped_total", "counter", "Log lines that nobody took in time.", float64(a.droppedLogLines()))
	m.single("go_goroutines", "gauge", "Goroutines.", float64(runtime.NumGoroutine()))
	m.single("process_start_time_seconds", "gauge", "Start of the process, in seconds since the epoch.",
		float64(a.started.UnixNano())/float64(time.Second))
}

// writeSessions writes what the relay counts. The numbers are read one after the
// other: a session that ends meanwhile may be in one and not yet in the other.
func (a *admin) writeSessions(m metricsWriter) {
	relay, name := a.proxy.relay, a.proxy.backends.name
	counts := relay.counts()
	if all := a.backendOrdinals(counts); len(all) > 0 {
		m.family("router_sessions", "gauge", "Open sessions.")
		for _, i := range all {
			m.sample("router_sessions", float64(counts[i].open), "backend", name(i))
		}
		m.family("router_sessions_total", "counter", "Sessions since the start.")
		for _, i := range all {
			m.sample("router_sessions_total", float64(counts[i].total), "backend", name(i))
		}
	}
	m.family("router_sessions_ended_total", "counter", "Sessions that ended, by cause.")
	for c := causeNone + 1; c < numCauses; c++ {
		m.sample("router_sessions_ended_total", float64(relay.ended[c].Load()), "cause", c.String())
	}
	m.family("router_sessions_cut_total", "counter", "Sessions of which not both sides answered their Close frames in time, by cause.")
	for _, c := range []cause{causeMoved, causeDrain} {
		m.sample("router_sessions_cut_total", float64(relay.cut[c].Load()), "cause", c.String())
	}
	m.single("router_sessions_to_move", "gauge", "Open sessions whose owner has changed and whose turn is to come.",
		float64(a.proxy.mover.pendingSessions.Load()))
	bytes := relay.bytes()
	m.family("router_bytes_total", "counter", "Bytes carried after the handshakes.")
	m.sample("router_bytes_total", float64(bytes[clientSide]), "direction", "to_backend")
	m.sample("router_bytes_total", float64(bytes[backendSide]), "direction", "to_client")
}

func (a *admin) writeUpgrades(m metricsWriter) {
	m.family("router_upgrades_total", "counter", "Upgrade requests, by what became of them.")
	for r := range numResults {
		m.sample("router_upgrades_total", float64(a.proxy.results[r].Load()), "result", r.String())
	}
	pending, _ := a.proxy.pendingUpgrades.inUse(0)
	m.single("router_upgrades_waiting", "gauge", "Upgrades under way: held, dialled or in the handshake.",
		float64(pending))
	used, limit, full := a.fdLimit.usage()
	m.family("router_descriptors", "gauge", "Descriptors that clients and their sessions may need, and may have.")
	m.sample("router_descriptors", float64(used), "kind", "used")
	m.sample("router_descriptors", float64(limit), "kind", "limit")
	m.single("router_accept_paused", "gauge", "1 if clients wait, in the kernel's backlog, for descriptors.", boolToFloat(full))
}

// writeTable writes the table in force, if there is one.
func (a *admin) writeTable(m metricsWriter) {
	m.single("router_table_swaps_total", "counter", "Tables put in force.", float64(a.proxy.router.swaps.Load()))
	t := a.proxy.router.table()
	if t == nil {
		return
	}
	m.family("router_table_info", "gauge", "Always 1; the labels say which table is in force.")
	m.sample("router_table_info", 1, "source", t.sourceName(), "version", t.version, "stamp", t.stamp)
	m.single("router_table_overrides", "gauge", "Overrides in force.", float64(t.overrides))
	m.single("router_table_backends", "gauge", "Backends that namespaces are hashed over.", float64(t.backends.count))
	m.family("router_table_rejected_entries", "gauge", "Entries that cannot be read.")
	for i, src := range t.sources {
		m.sample("router_table_rejected_entries", float64(t.rejected[i]), "object", src.source)
	}
	m.single("router_table_conflicts", "gauge", "Namespaces that objects give to different backends.", float64(t.conflicts))
}

// writeReplicas writes what is known of the StatefulSet and its pods.
func (a *admin) writeReplicas(m metricsWriter) {
	if replicas, known := a.replicaWatcher.specReplicas(); known {
		m.single("router_statefulset_replicas", "gauge", "Backends that the StatefulSet is to have, with namespaces or not yet.",
			float64(replicas))
	}
	t := a.proxy.router.table()
	if t == nil {
		return
	}
	m.family("router_backend_ready", "gauge", "1 if the backend is ready for new sessions, as far as is known.")
	for i := range t.backends.count {
		ordinal := t.backends.first + i
		ready, known := a.replicaWatcher.endpoints.isReady(ordinal)
		m.sample("router_backend_ready", boolToFloat(ready || !known), "backend", t.name(ordinal))
	}
}

// objectWatcher is a watcher of any kind.
type objectWatcher interface {
	String() string
	snapshot() watchStatus
}

// watchers are all that there are.
func (a *admin) watchers() (all []objectWatcher) {
	for _, w := range a.configMaps.watchers {
		all = append(all, w)
	}
	if a.replicaWatcher != nil {
		all = append(all, a.replicaWatcher.watcher, a.replicaWatcher.endpoints.watcher)
	}
	return all
}

// writeWatchers writes how the API server's objects are followed.
func (a *admin) writeWatchers(m metricsWriter) {
	all := a.watchers()
	each := func(name, help string, write func(object string, s watchStatus)) {
		m.family(name, "gauge", help)
		for _, w := range all {
			write(w.String(), w.snapshot())
		}
	}
	each("router_watch_state", "1 for the state that the watch is in.", func(object string, s watchStatus) {
		for _, state := range []string{stateListing, stateConnecting, stateWatching, stateWaiting} {
			m.sample("router_watch_state", boolToFloat(s.state == state), "object", object, "state", state)
		}
	})
	each("router_watch_staleness_seconds", "Time since the API server last said how things are, +Inf if it never did.",
		func(object string, s watchStatus) {
			age := math.Inf(1)
			if !s.confirmed.IsZero() {
				age = time.Since(s.confirmed).Seconds()
			}
			m.sample("router_watch_staleness_seconds", age, "object", object)
		})
	each("router_watch_failures_in_row", "LIST and WATCH cycles that failed since the last good one.", func(object string, s watchStatus) {
		m.sample("router_watch_failures_in_row", float64(s.failures), "object", object)
	})
	each("router_watch_last_error", "Always 1; the label says what failed since the last good cycle.", func(object string, s watchStatus) {
		m.sample("router_watch_last_error", 1, "object", object, "class", errorClass(s.failure))
	})
	each("router_watch_info", "Always 1; the label says what the API server last answered with.", func(object string, s watchStatus) {
		m.sample("router_watch_info", 1, "object", object, "protocol", s.protocol)
	})
	objects := a.configMaps.watchedObjects()
	if len(objects) == 0 {
		return
	}
	m.family("router_watch_object_info", "gauge", "Always 1; the labels say which version of an object is in force.")
	for _, o := range objects {
		m.sample("router_watch_object_info", 1, "object", o.object, "uid", o.uid, "version", o.version)
	}
	m.family("router_watch_object_absent", "gauge", "1 if there is no such object.")
	for _, o := range objects {
		m.sample("router_watch_object_absent", boolToFloat(o.absent), "object", o.object)
	}
}

func boolToFloat(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
