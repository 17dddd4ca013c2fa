package main

import (
	"maps"
	"slices"
	"time"
)

// handoffStatus says how far a change of owners has come, for /status.
type handoffStatus struct {
	Mode    string   `json:"mode"`              // of -handoff
	Members []string `json:"members,omitempty"` // pods of the routers that share it
	Why     string   `json:"why,omitempty"`     // what this router does or waits for
	Step    int64    `json:"step"`              // the last one, in Unix milliseconds or above
	// InProgress says that not all namespaces have the owner of the newest table, or that
	// the last step is not done.
	InProgress bool       `json:"in_progress"`
	Done       float64    `json:"done"`             // about the share of namespaces that have it
	ToMove     int64      `json:"sessions_to_move"` // of this router
	Unproven   int64      `json:"unproven"`         // upgrades whose end was not seen
	WaitingFor []stepWait `json:"waiting_for"`
}

// stepWait is what a step waits for: a backend of this router, or another router that has
// not answered.
type stepWait struct {
	Backend  string  `json:"backend,omitempty"` // "" for a router
	Router   string  `json:"router,omitempty"`  // its pod; "" for a backend
	Sessions int     `json:"sessions"`          // that have not ended yet
	Upgrades int     `json:"upgrades"`          // that it has got, and whose end was not seen
	Requests int     `json:"requests"`          // the same of plain requests
	Releases int     `json:"releases"`          // namespaces that it has not released (-release)
	Error    string  `json:"error,omitempty"`   // of the last release
	Seconds  float64 `json:"seconds"`           // since the step began
}

// status returns how far a change of owners has come.
func (m *mover) status() handoffStatus {
	s := handoffStatus{
		Mode: "single", Done: 1, ToMove: m.queue.size.Load(),
		Unproven:   m.flights.unproven.Load() + m.relay.unproven.Load(),
		WaitingFor: []stepWait{},
	}
	switch {
	case m.off:
		s.Mode = "off"
	case m.shared != nil:
		shared := m.shared.snapshot()
		s.Mode, s.Members, s.Why = "all", shared.members, shared.why
	}
	v, t := m.current.Load(), m.router.table()
	if v == nil || t == nil {
		return s
	}
	s.Step = v.step
	if s.InProgress = !v.isAtRest(t.contentHash) || !v.done; !s.InProgress {
		return s
	}
	s.Done = 0
	if newest := v.newestRecord(); newest.content == t.contentHash {
		s.Done = float64(newest.before.upto) / allPlaces
	}
	s.WaitingFor = append(m.waitingFor(v), m.routerWaits(v)...)
	return s
}

// waitingFor returns the backends that v's step waits for, sorted by ordinal.
func (m *mover) waitingFor(v *view) []stepWait {
	waits := []stepWait{}
	if v.done {
		return waits
	}
	count := map[int]stepWait{}
	m.flights.each(func(f *flight) {
		if m.blocks(v, f) {
			w := count[f.backend]
			if f.cut == nil {
				w.Upgrades++
			} else {
				w.Requests++
			}
			count[f.backend] = w
		}
	})
	for _, s := range m.misplacedSessions(v) {
		w := count[s.backend]
		w.Sessions++
		count[s.backend] = w
	}
	for backend, wait := range m.releases.waits() {
		w := count[backend]
		w.Releases = wait.namespaces
		if wait.err != nil {
			w.Error = wait.err.Error()
		}
		count[backend] = w
	}
	for _, backend := range slices.Sorted(maps.Keys(count)) {
		w := count[backend]
		w.Backend = m.relay.backendName(backend)
		w.Seconds = time.Since(v.began).Seconds()
		waits = append(waits, w)
	}
	return waits
}

// routerWaits returns the routers that v's step waits for, sorted by name.
func (m *mover) routerWaits(v *view) (waits []stepWait) {
	if m.shared == nil {
		return nil
	}
	seconds := time.Since(v.began).Seconds()
	for _, pod := range m.shared.snapshot().missing {
		waits = append(waits, stepWait{Router: pod, Seconds: seconds})
	}
	return waits
}

// waitSeconds returns for how many seconds a step has waited for each backend and router:
// those that it may wait for, with 0, and those that it does wait for. names are the
// keys, sorted.
func waitSeconds(
	mayWait []string, waits []stepWait,
) (names []string, seconds map[string]float64) {
	seconds = map[string]float64{}
	for _, name := range mayWait {
		seconds[name] = 0
	}
	for _, w := range waits {
		seconds[w.Backend+w.Router] = w.Seconds
	}
	return slices.Sorted(maps.Keys(seconds)), seconds
}

// writeMetrics writes how far a change of owners has come.
func (m *mover) writeMetrics(w metricsWriter) {
	w.single("router_sessions_to_move", "gauge",
		"Open sessions whose owner changed and which have not been closed yet.",
		float64(m.queue.size.Load()))
	s := m.status()
	info := w.family("router_handoff_info", "gauge",
		"Always 1. The label has the mode of -handoff.")
	info(1, "mode", s.Mode)
	w.single("router_handoff_in_progress", "gauge",
		"1 while not all namespaces have the owner of the newest table.",
		boolToFloat(s.InProgress))
	w.single("router_handoff_steps_total", "counter",
		"Steps of hand-offs that are done.", float64(m.steps.Load()))
	var names []string
	if t := m.router.table(); t != nil {
		for i := range t.active.count {
			names = append(names, t.name(t.active.first+i))
		}
	}
	names, seconds := waitSeconds(append(names, s.Members...), s.WaitingFor)
	if len(names) > 0 {
		waiting := w.family("router_handoff_waiting_seconds", "gauge",
			"How long the step of a hand-off has waited for this backend to end its "+
				"sessions, or for this router.")
		for _, name := range names {
			waiting(seconds[name], "for", name)
		}
	}
	w.single("router_handoff_unproven_total", "counter",
		"Upgrades and sessions that a backend may have served after they were given up.",
		float64(s.Unproven))
	if m.shared != nil {
		m.shared.writeMetrics(w)
	}
}
