package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// maxReplicas is the most backends that a plan may be for.
const maxReplicas = 10_000

// maxPlan is the most bytes of a plan's body. A ConfigMap has at most 1 MiB of data
// (https://kubernetes.io/docs/concepts/configuration/configmap/), which is 6.3 MB in
// JSON if each byte of it is escaped.
const maxPlan = 8 << 20

// proposal is what POST /plan takes: a ConfigMap as JSON, which need not say its
// Kubernetes namespace, or {"replicas": 6}.
type proposal struct {
	configMap
	Replicas *int `json:"replicas"`
}

// plan says what a change would do: which sessions of this router would move. A
// namespace without sessions is not in it.
type plan struct {
	Table      string        `json:"table"`      // the version that is in force
	Backends   int           `json:"backends"`   // after the change
	Sessions   int           `json:"sessions"`   // that would move
	Namespaces int           `json:"namespaces"` // of these
	Seconds    float64       `json:"seconds"`    // that it would take at least
	Moves      []plannedMove `json:"moves"`
	Rejected   int           `json:"rejected"`             // entries that would be rejected
	Rejections []string      `json:"rejections,omitempty"` // the first of them
}

// plannedMove is the sessions of one namespace that would go from a backend to
// another. There may be two of a namespace while it moves already.
type plannedMove struct {
	Namespace string `json:"namespace"`
	From      string `json:"from"`
	To        string `json:"to"`
	Sessions  int    `json:"sessions"`
}

// plan answers POST /plan, which changes nothing.
func (a *admin) plan(w http.ResponseWriter, r *http.Request) {
	t := a.proxy.router.table()
	if t == nil {
		writeJSON(w, http.StatusServiceUnavailable, map[string]string{"error": strings.Join(a.noTable(), "\n")})
		return
	}
	next, err := a.propose(w, r, t)
	switch tooBig := (&http.MaxBytesError{}); {
	case errors.As(err, &tooBig):
		err = fmt.Errorf("a body of more than %d bytes", tooBig.Limit)
		writeJSON(w, http.StatusRequestEntityTooLarge, map[string]string{"error": err.Error()})
	case err != nil:
		writeJSON(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
	default:
		writeJSON(w, http.StatusOK, a.compare(t, next))
	}
}

// propose reads the proposal that r has, and returns the table that would be in
// force after it, now being the one that is.
func (a *admin) propose(w http.ResponseWriter, r *http.Request, now *table) (*table, error) {
	if r.ContentLength > maxPlan {
		w.Header().Set("Connection", "close") // not to read the body
		return nil, &http.MaxBytesError{Limit: maxPlan}
	}
	size := r.ContentLength
	if size < 0 { // not known
		size = maxPlan
	}
	body := bytes.NewBuffer(make([]byte, 0, size+bytes.MinRead)) // so that it never grows
	var p proposal
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, maxPlan))
	if err == nil {
		err = json.Unmarshal(body.Bytes(), &p)
	}
	if err != nil {
		err = fmt.Errorf("the body is no JSON of a ConfigMap or {\"replicas\": number}: %w", err)
	}
	return p.table(now, err)
}

// table returns the table that would be in force after the proposal, now being
// the one that is.
func (p *proposal) table(now *table, err error) (*table, error) {
	backends, sources := now.backends, slices.Clone(now.sources)
	switch {
	case err != nil:
		return nil, err
	case p.Replicas != nil && p.Kind != "":
		return nil, fmt.Errorf("a %.60s and replicas %d, want one of them", p.Kind, *p.Replicas)
	case p.Replicas != nil && (*p.Replicas < 1 || *p.Replicas > maxReplicas):
		return nil, fmt.Errorf("replicas %d, want 1 to %d", *p.Replicas, maxReplicas)
	case p.Replicas != nil:
		backends.count = *p.Replicas
	case p.Kind != "ConfigMap":
		return nil, fmt.Errorf("kind %.60q, want ConfigMap, or {\"replicas\": number}", p.Kind)
	default:
		i := slices.IndexFunc(sources, p.replaces)
		if i < 0 {
			return nil, fmt.Errorf("%s is not among the sources of overrides: %s", p.title(), titles(sources))
		}
		sources[i] = entries{source: sources[i].source, version: "proposed", data: &p.Data}
	}
	return now.with(backends, sources), nil
}

// replaces reports whether the ConfigMap that is proposed is of this source.
func (p *proposal) replaces(e entries) bool {
	if p.Metadata.Namespace == "" {
		return strings.HasPrefix(e.source, "ConfigMap ") && strings.HasSuffix(e.source, "/"+p.Metadata.Name)
	}
	return e.source == p.title()
}

// titles names the sources.
func titles(sources []entries) string {
	var all []string
	for _, e := range sources {
		all = append(all, e.source)
	}
	return strings.Join(all, ", ")
}

// compare says what next would do to the sessions.
func (a *admin) compare(now, next *table) *plan {
	p := &plan{Table: now.version, Backends: next.backends.count, Moves: []plannedMove{}}
	moving := a.proxy.relay.where(func(s *session) bool {
		owner, ok := next.owner(s.namespace)
		return ok && owner != s.backend
	})
	p.Sessions = len(moving)
	slices.SortFunc(moving, func(a, b *session) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.backend, b.backend))
	})
	for i, s := range moving {
		if i > 0 && s.namespace == moving[i-1].namespace && s.backend == moving[i-1].backend {
			p.Moves[len(p.Moves)-1].Sessions++
			continue
		}
		if i == 0 || s.namespace != moving[i-1].namespace {
			p.Namespaces++
		}
		owner, _ := next.owner(s.namespace)
		p.Moves = append(p.Moves, plannedMove{Namespace: s.namespace, From: next.name(s.backend), To: next.name(owner), Sessions: 1})
	}
	p.Seconds = float64(p.Sessions) * a.proxy.moves.pace.interval.Seconds()
	for i := range next.sources {
		for bad := range next.rejections(i) {
			if p.Rejected++; p.Rejected <= maxTold {
				p.Rejections = append(p.Rejections, fmt.Sprintf("%s: %q, want %s, keeps %s", bad.namespace, bad.Value, bad.Want, bad.Kept))
			}
		}
	}
	return p
}
