package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// admin answers operators and probes, off the data path.
type admin struct {
	// Static after construction.
	proxy      *proxy
	gate       *gate
	configMaps *configMaps   // nil without an API server
	missing    func() string // why there is no table yet, in words
	dropped    func() int64  // log lines
	started    time.Time

	draining atomic.Bool
}

// handler serves the admin port.
func (a *admin) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", a.readyz)
	mux.HandleFunc("GET /metrics", a.metrics)
	mux.HandleFunc("GET /owner", a.owner)
	return mux
}

// notReady says why the router should get no new clients. Once there is a table
// the API server may be away for as long as it likes (invariant 5).
func (a *admin) notReady() []string {
	var why []string
	if a.draining.Load() {
		why = append(why, errDraining.Error())
	}
	if a.proxy.router.table() == nil {
		why = append(why, "no overrides were read yet: "+a.missing())
	}
	if used, full := a.gate.state(); full {
		why = append(why, fmt.Sprintf("clients wait for descriptors: %d of %d are used", used, a.gate.limit))
	}
	return why
}

func (a *admin) readyz(w http.ResponseWriter, _ *http.Request) {
	if why := a.notReady(); len(why) > 0 {
		http.Error(w, strings.Join(why, "\n"), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ready")
}

func (a *admin) metrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	b := bufio.NewWriter(w)
	a.writeMetrics(b)
	b.Flush() // a scraper that left is no error
}

// ownership is the answer of /owner.
type ownership struct {
	Namespace string      `json:"namespace"`
	Owner     string      `json:"owner,omitempty"` // none if the namespace is refused
	Why       string      `json:"why"`             // one of the why constants
	Address   string      `json:"address,omitempty"`
	Ready     bool        `json:"ready"` // it takes a connection now
	Error     string      `json:"error,omitempty"`
	Table     string      `json:"table"` // the version
	Rejected  []rejection `json:"rejected,omitempty"`
}

func (a *admin) owner(w http.ResponseWriter, r *http.Request) {
	namespace := r.FormValue("namespace")
	if want := namespaceFault(namespace); want != "" {
		writeJSON(w, http.StatusBadRequest, map[string]string{
			"error": fmt.Sprintf("/owner?namespace= is %.260q, want %s", namespace, want)})
		return
	}
	t := a.proxy.router.table()
	if t == nil {
		writeJSON(w, http.StatusServiceUnavailable, map[string]string{"error": "no overrides were read yet: " + a.missing()})
		return
	}
	writeJSON(w, http.StatusOK, a.ownership(r.Context(), t, namespace))
}

// ownership looks the namespace up as an upgrade would, and dials its owner.
func (a *admin) ownership(ctx context.Context, t *table, namespace string) ownership {
	o := ownership{Namespace: namespace, Why: t.explain(namespace), Table: t.version, Rejected: t.rejectionsOf(namespace)}
	ordinal, ok := t.owner(namespace)
	if !ok {
		return o
	}
	o.Owner = t.name(ordinal)
	var err error
	if o.Address, err = a.proxy.backends.probe(ctx, ordinal); err != nil {
		o.Error = err.Error()
	}
	o.Ready = err == nil
	return o
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v) // a client that left is no error
}
