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

// maxReplicas is how many backends a plan may have.
const maxReplicas = 10_000

// maxPlanBody bounds the body of POST /plan, in bytes. A ConfigMap has at most 1 MiB of
// data (https://kubernetes.io/docs/concepts/configuration/configmap/), which is 6.3 MB of
// JSON if each byte is escaped.
const maxPlanBody = 8 << 20

// planRequest is the body of POST /plan: a ConfigMap as JSON, with or without its Kubernetes
// namespace, or a number of backends, or all that would be cordoned, or these two:
// {"replicas": 6, "cordon": [2]}.
type planRequest struct {
	configMap
	Replicas *int    `json:"replicas"`
	Cordon   *cordon `json:"cordon"`
}

// preview is the answer of POST /plan: which sessions of this router a change would move. It
// leaves out namespaces without sessions.
type preview struct {
	Table      string        `json:"table"`      // version of the table in force
	Backends   int           `json:"backends"`   // after the change
	Sessions   int           `json:"sessions"`   // that would move
	Namespaces int           `json:"namespaces"` // of these sessions
	Seconds    float64       `json:"seconds"`    // that the moves would take at least
	Moves      []previewMove `json:"moves"`
	Rejected   int           `json:"rejected"`             // entries that would be rejected
	Rejections []string      `json:"rejections,omitempty"` // the first maxExamples
}

// previewMove has the sessions of one namespace that would move from one backend to
// another. A namespace that is moving already may have two.
type previewMove struct {
	Namespace string `json:"namespace"`
	From      string `json:"from"`
	To        string `json:"to"`
	Sessions  int    `json:"sessions"`
}

// table returns the table that would follow current.
func (p *planRequest) table(current *table) (*table, error) {
	backends, sources := current.active, slices.Clone(current.sources)
	switch {
	case p.Replicas != nil && p.Kind != "":
		return nil, fmt.Errorf("the body must not have both a %.60s and replicas",
			p.Kind)
	case p.Cordon != nil && p.Kind != "":
		return nil, fmt.Errorf("the body must not have both a %.60s and cordon", p.Kind)
	case p.Replicas != nil && (*p.Replicas < 1 || *p.Replicas > maxReplicas):
		return nil, fmt.Errorf("replicas must be 1 to %d (got %d)", maxReplicas, *p.Replicas)
	case p.Replicas != nil || p.Cordon != nil:
		if p.Replicas != nil {
			backends.count = *p.Replicas
		}
	case p.Kind != "ConfigMap":
		return nil, fmt.Errorf("the body must be a ConfigMap (got kind %.60q) or {\"replicas\": number}",
			p.Kind)
	default:
		i := slices.IndexFunc(sources, p.matches)
		if i < 0 {
			return nil, fmt.Errorf("%s is not a source of overrides; the sources are: %s",
				p.id(), sourceNames(sources))
		}
		sources[i] = sourceContent{
			id: sources[i].id, version: "proposed", overrides: &p.Data}
	}
	cordoned, err := p.cordoned(current, backends)
	if err != nil {
		return nil, err
	}
	return newTable(
		current.statefulSet, current.fromHost, backends, cordoned, sources, current), nil
}

// cordoned returns what would be cordoned of these backends.
func (p *planRequest) cordoned(current *table, backends ordinalRange) (cordon, error) {
	if p.Cordon == nil {
		return current.cordonList, nil
	}
	if _, all := p.Cordon.among(backends); all {
		return nil, errors.New("cordon must leave a backend that is not cordoned")
	}
	return *p.Cordon, nil
}

// matches reports whether the proposed ConfigMap is a new version of this source.
func (p *planRequest) matches(src sourceContent) bool {
	id := p.id()
	if id.namespace == "" {
		id.namespace = src.id.namespace
	}
	return id == src.id
}

// sourceNames returns the names of the sources, separated by commas.
func sourceNames(sources []sourceContent) string {
	var all []string
	for _, src := range sources {
		all = append(all, src.id.String())
	}
	return strings.Join(all, ", ")
}

// newPreview returns which sessions of p would move if next followed current.
func newPreview(p *proxy, current, next *table) *preview {
	answer := &preview{
		Table: current.version, Backends: next.active.count, Moves: []previewMove{}}
	moving := p.relay.filter(func(s *session) bool {
		owner, ok := next.owner(s.namespace)
		return ok && owner != s.backend
	})
	answer.Sessions = len(moving)
	slices.SortFunc(moving, func(a, b *session) int {
		return cmp.Or(
			cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.backend, b.backend))
	})
	for i, s := range moving {
		if i > 0 && s.namespace == moving[i-1].namespace && s.backend == moving[i-1].backend {
			answer.Moves[len(answer.Moves)-1].Sessions++
			continue
		}
		if i == 0 || s.namespace != moving[i-1].namespace {
			answer.Namespaces++
		}
		owner, _ := next.owner(s.namespace)
		answer.Moves = append(answer.Moves, previewMove{
			Namespace: s.namespace, From: next.name(s.backend), To: next.name(owner),
			Sessions: 1})
	}
	answer.Seconds = float64(answer.Sessions) * p.mover.moveInterval.Seconds()
	for i := range next.sources {
		for bad := range next.rejections(i) {
			if answer.Rejected++; answer.Rejected <= maxExamples {
				answer.Rejections = append(answer.Rejections, fmt.Sprintf("%s, in force: %s", bad, bad.InForce))
			}
		}
	}
	return answer
}

// readPlanRequest reads the planRequest in r's body, and returns the table that would follow
// current. A body above maxPlanBody is an *http.MaxBytesError.
func readPlanRequest(w http.ResponseWriter, r *http.Request, current *table) (*table, error) {
	if r.ContentLength > maxPlanBody {
		w.Header().Set("Connection", "close") // so that net/http does not read the body
		return nil, &http.MaxBytesError{Limit: maxPlanBody}
	}
	size := r.ContentLength
	if size < 0 { // not known
		size = maxPlanBody
	}
	body := bytes.NewBuffer(make([]byte, 0, size+bytes.MinRead)) // it never grows
	var p planRequest
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, maxPlanBody))
	if err == nil {
		err = json.Unmarshal(body.Bytes(), &p)
	}
	if err != nil {
		return nil, fmt.Errorf(
			"the body must be a ConfigMap in JSON or {\"replicas\": number}: %w", err)
	}
	return p.table(current)
}
