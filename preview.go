package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"
)

// maxPreviewBody bounds the body of POST /plan, in bytes. A ConfigMap has at most 1 MiB of
// data (https://kubernetes.io/docs/concepts/configuration/configmap/), which is 6.3 MB of
// JSON if each byte is escaped.
const maxPreviewBody = 8 << 20

// previewRequest is the body of POST /plan: a ConfigMap as JSON, with or without its Kubernetes
// namespace, or a number of backends, or all that would be cordoned, or these two:
// {"replicas": 6, "cordon": [2]}.
type previewRequest struct {
	configMap
	Replicas *int    `json:"replicas"`
	Cordon   *cordon `json:"cordon"`
}

// preview is the answer of POST /plan: which sessions of this router, or with all=1 of all
// routers, a change would move, and which namespaces it would leave without an owner.
type preview struct {
	Router           string        `json:"router"`            // that answers
	OverridesVersion string        `json:"overrides_version"` // of the newest table
	Stamp            string        `json:"stamp"`
	Backends         int           `json:"backends"`   // after the change
	Sessions         int           `json:"sessions"`   // that would move
	Namespaces       int           `json:"namespaces"` // of these sessions
	Seconds          float64       `json:"seconds"`    // that the moves would take at least
	Moves            []previewMove `json:"moves"`
	// Unresolved is how many namespaces would have no owner: clients that come get 503. Their
	// sessions stay until their backend ends them, and are not in Sessions.
	Unresolved         int      `json:"unresolved"`
	UnresolvedSessions int      `json:"unresolved_sessions"`
	Rejected           int      `json:"rejected"`             // entries that would be rejected
	Rejections         []string `json:"rejections,omitempty"` // the first maxExamples

	// With all=1 only.
	Agree   *bool          `json:"agree,omitempty"`   // all that answered have the same table
	Routers []string       `json:"routers,omitempty"` // whose sessions are added up
	Silent  []silentRouter `json:"silent,omitzero"`
}

// previewMove has the sessions of one namespace that would move from one backend to
// another, or lose their owner. A namespace that is moving already may have two. Without
// sessions there is one only for a namespace that would have no owner, and only for the
// first maxExamples of these.
type previewMove struct {
	Namespace string `json:"namespace"`
	From      string `json:"from"` // "" if it has no owner now
	To        string `json:"to"`   // "" if it would have no owner
	Sessions  int    `json:"sessions"`
}

// table returns the table that would follow current.
func (p *previewRequest) table(current *table) (*table, error) {
	backends, sources := current.backends, slices.Clone(current.sources)
	switch {
	case p.Replicas != nil && p.Kind != "":
		return nil, fmt.Errorf("the body must not have both a %.60s and replicas",
			p.Kind)
	case p.Cordon != nil && p.Kind != "":
		return nil, fmt.Errorf("the body must not have both a %.60s and cordon", p.Kind)
	case p.Replicas != nil && (*p.Replicas < 1 || *p.Replicas > maxReplicas):
		return nil, fmt.Errorf("replicas must be 1 to %d (got %d)", maxReplicas, *p.Replicas)
	case p.Replicas != nil:
		backends.count = *p.Replicas
	case p.Cordon != nil:
	case p.Kind != "ConfigMap":
		return nil, fmt.Errorf("the body must be a ConfigMap (got kind %.60q), or have replicas or cordon",
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
func (p *previewRequest) cordoned(current *table, backends ordinalRange) (cordon, error) {
	if p.Cordon == nil {
		return current.listedCordon, nil
	}
	if _, all := p.Cordon.among(backends); all {
		return nil, errors.New("cordon must leave a backend that is not cordoned")
	}
	return *p.Cordon, nil
}

// matches reports whether the proposed ConfigMap is a new version of this source.
func (p *previewRequest) matches(src sourceContent) bool {
	id := p.id()
	id.kubeNamespace = cmp.Or(id.kubeNamespace, src.id.kubeNamespace)
	return id == src.id
}

// sourceNames returns the names of the sources, separated by commas, or "none".
func sourceNames(sources []sourceContent) string {
	name := func(src sourceContent) string { return src.id.String() }
	return cmp.Or(joined(sources, ", ", name), "none")
}

// newPreview returns what would become of the sessions of p if next followed current.
func newPreview(p *proxy, current, next *table) *preview {
	answer := &preview{
		Router: p.podName, OverridesVersion: current.overridesVersion, Stamp: current.stamp,
		Backends: next.backends.count,
	}
	moves, paced := map[previewMove]int{}, int64(0)
	open, _ := p.relay.snapshot()
	for _, s := range open {
		owner, ok := next.ownerOf(s.namespace)
		move := previewMove{Namespace: s.namespace, From: next.name(s.backend)}
		switch {
		case ok && owner == s.backend:
			continue
		case !ok:
			answer.UnresolvedSessions++
		default:
			move.To = next.name(owner)
			answer.Sessions++
			if next.backends.has(s.backend) { // others move at once: it is scaled in
				paced++
			}
		}
		moves[move]++
	}
	answer.Seconds = p.mover.minMoveTime(paced).Seconds()
	answer.addMoves(moves)
	answer.addUnresolved(current, next)
	for i := range next.sources {
		for bad := range next.rejections(i) {
			if answer.Rejected++; answer.Rejected <= maxExamples {
				answer.Rejections = append(answer.Rejections, fmt.Sprintf("%s, in force: %s", bad, bad.InForce))
			}
		}
	}
	return answer
}

// addMoves sets Moves and Namespaces. moves has the sessions of each move, which has
// none itself.
func (p *preview) addMoves(moves map[previewMove]int) {
	p.Moves = []previewMove{}
	moving := map[string]bool{}
	for move, sessions := range moves {
		if move.To != "" {
			moving[move.Namespace] = true
		}
		move.Sessions = sessions
		p.Moves = append(p.Moves, move)
	}
	p.Namespaces = len(moving)
	p.sortMoves()
}

// sortMoves sorts Moves by namespace.
func (p *preview) sortMoves() {
	slices.SortFunc(p.Moves, func(a, b previewMove) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace),
			cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To))
	})
}

// addUnresolved counts the namespaces without an owner in next. It adds the first of those
// that have no session to Moves.
func (p *preview) addUnresolved(current, next *table) {
	withSessions := map[string]bool{}
	for _, move := range p.Moves {
		withSessions[move.Namespace] = withSessions[move.Namespace] || move.To == ""
	}
	var others []string // the first maxExamples
	for namespace := range next.unresolvedNamespaces() {
		p.Unresolved++
		if !withSessions[namespace] {
			others = insertSorted(others, namespace, maxExamples, cmp.Compare)
		}
	}
	for _, namespace := range others {
		move := previewMove{Namespace: namespace}
		if owner, ok := current.ownerOf(namespace); ok {
			move.From = current.name(owner)
		}
		p.Moves = append(p.Moves, move)
	}
	p.sortMoves()
}

// isWhole reports whether p has what each router answers.
func (p *preview) isWhole() bool { return p.Router != "" && p.Stamp != "" }

// sumPreviews returns the preview for all routers. all has the preview of each, at least one.
// sharedRate says that all routers together have the rate of moves.
func sumPreviews(all []*preview, silent []silentRouter, sharedRate bool) *preview {
	sum := *all[0]
	sum.Silent = silent
	agree := true
	sum.Sessions, sum.Seconds, sum.UnresolvedSessions = 0, 0, 0
	moves, lost := map[previewMove]int{}, map[string]bool{}
	for _, p := range all {
		sum.Routers = append(sum.Routers, p.Router)
		agree = agree && p.Stamp == all[0].Stamp
		sum.Sessions += p.Sessions
		sum.UnresolvedSessions += p.UnresolvedSessions
		sum.Unresolved = max(sum.Unresolved, p.Unresolved)
		sum.Rejected = max(sum.Rejected, p.Rejected)
		if sharedRate {
			sum.Seconds += p.Seconds
		} else {
			sum.Seconds = max(sum.Seconds, p.Seconds)
		}
		for _, move := range p.Moves {
			sessions := move.Sessions
			move.Sessions = 0
			moves[move] += sessions
			lost[move.Namespace] = lost[move.Namespace] || move.To == "" && sessions > 0
		}
	}
	maps.DeleteFunc(moves, func(move previewMove, sessions int) bool {
		return sessions == 0 && lost[move.Namespace] // another router has sessions of it
	})
	slices.Sort(sum.Routers)
	sum.Agree = &agree
	sum.addMoves(moves)
	return &sum
}

// readPreviewBody reads the body of POST /plan. One above maxPreviewBody is an
// *http.MaxBytesError.
func readPreviewBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.ContentLength > maxPreviewBody {
		w.Header().Set("Connection", "close") // so that net/http does not read the body
		return nil, &http.MaxBytesError{Limit: maxPreviewBody}
	}
	size := r.ContentLength
	if size < 0 { // not known
		size = maxPreviewBody
	}
	body := bytes.NewBuffer(make([]byte, 0, size+bytes.MinRead)) // it never grows
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, maxPreviewBody))
	return body.Bytes(), previewBodyError(err)
}

// previewBodyError returns err, if it is not nil, with what the body of POST /plan must be.
func previewBodyError(err error) error {
	if err == nil {
		return nil
	}
	if bad, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		err = fmt.Errorf("expected %s (got %s)", jsonKind(bad.Type), jsonValue(bad.Value))
		if field := strings.TrimPrefix(bad.Field, "configMap."); field != "" { // embedded
			err = fmt.Errorf("%s: %w", field, err)
		}
	}
	return fmt.Errorf("the body must be a ConfigMap in JSON, or have replicas or cordon: %w", err)
}

// jsonKind says what in JSON fits in a Go value of this type.
func jsonKind(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Int, reflect.Int64:
		return "an integer"
	case reflect.Slice:
		return "an array"
	}
	return "an object"
}

// jsonValue says what there was in JSON: "a string", or for "number 1.5" the number alone.
func jsonValue(value string) string {
	number, ok := strings.CutPrefix(value, "number ")
	switch {
	case ok:
		return number
	case value == "array" || value == "object":
		return "an " + value
	}
	return "a " + value
}

// readPreviewRequest reads the previewRequest in r's body, and returns the table that would
// follow current.
func readPreviewRequest(w http.ResponseWriter, r *http.Request, current *table) (*table, error) {
	body, err := readPreviewBody(w, r)
	if err != nil {
		return nil, err
	}
	var p previewRequest
	if err := previewBodyError(json.Unmarshal(body, &p)); err != nil {
		return nil, err
	}
	return p.table(current)
}
