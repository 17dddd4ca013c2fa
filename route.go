package main

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// Why a namespace belongs to its owner, as /owner says it.
const (
	whyOverride = "override" // an entry of the ConfigMap
	whyHash     = "hash"     // no entry
	whyKept     = "kept"     // an entry that cannot be read: stays where it was
	whyRefused  = "refused"  // the same, and where it was is not known: 503
)

// refused stands in table.overrides for a namespace that is not served because
// its entry cannot be read and no good one was ever seen (invariant 3).
const refused = -1

// table says who owns which namespace. It is immutable: an update makes a new
// one. Its methods take no lock and owner does not allocate (invariant 1).
type table struct {
	statefulSet string               // the part of a backend's name before its ordinal
	backends    int                  // how many there are, at least 1
	overrides   map[string]int       // namespace to ordinal, or refused
	rejected    map[string]rejection // the entries that could not be read, by namespace
	source      string               // where the entries came from, for people
	version     string               // the ConfigMap's resourceVersion, or a hash of a directory
}

// rejection is one entry that could not be read, and what became of it.
type rejection struct {
	Value string `json:"value"` // as it was found, cut to maxShownValue bytes
	Want  string `json:"want"`  // what would have been right
	Kept  string `json:"kept"`  // the owner it keeps, "hash" or "refused"
}

// maxShownValue is how much of a rejected value is kept for messages, in bytes:
// a value may be 1 MiB of anything.
const maxShownValue = 64

// entries is what a source of overrides holds at one moment.
type entries struct {
	source  string
	version string
	data    map[string]string // namespace to the name of a backend
	stale   bool              // a copy that may lag: counts only until the API server was heard
}

// newTable reads e. An entry that cannot be read keeps its namespace where old
// had it; without an old table it is refused rather than hashed, since another
// router may know a good value. All other entries apply (invariant 3).
func newTable(statefulSet string, backends int, e entries, old *table) *table {
	t := &table{
		statefulSet: statefulSet,
		backends:    backends,
		overrides:   make(map[string]int, len(e.data)),
		rejected:    map[string]rejection{},
		source:      e.source,
		version:     e.version,
	}
	for namespace, value := range e.data {
		if want := namespaceFault(namespace); want != "" {
			t.reject(namespace, value, want, "nothing")
			continue
		}
		ordinal, ok := t.ordinal(strings.TrimSpace(value))
		if ok {
			t.overrides[namespace] = ordinal
			continue
		}
		want := fmt.Sprintf("%s to %s", t.name(0), t.name(backends-1))
		t.reject(namespace, value, want, t.keep(namespace, old))
	}
	return t
}

// keep gives the namespace the owner it had in old, and names it.
func (t *table) keep(namespace string, old *table) string {
	if old == nil {
		t.overrides[namespace] = refused
		return whyRefused
	}
	ordinal, pinned := old.overrides[namespace]
	if !pinned {
		return whyHash
	}
	if ordinal == refused || ordinal >= t.backends {
		t.overrides[namespace] = refused
		return whyRefused
	}
	t.overrides[namespace] = ordinal
	return t.name(ordinal)
}

func (t *table) reject(namespace, value, want, kept string) {
	if len(value) > maxShownValue {
		value = value[:maxShownValue] + "…"
	}
	t.rejected[namespace] = rejection{Value: strings.ToValidUTF8(value, "�"), Want: want, Kept: kept}
}

// owner returns the ordinal of the backend that owns the namespace; ok is false
// if the namespace is refused.
func (t *table) owner(namespace string) (ordinal int, ok bool) {
	if ordinal, pinned := t.overrides[namespace]; pinned {
		return ordinal, ordinal != refused
	}
	return bucket(namespace, t.backends), true
}

// explain says why owner answers as it does.
func (t *table) explain(namespace string) string {
	ordinal, pinned := t.overrides[namespace]
	_, bad := t.rejected[namespace]
	switch {
	case pinned && ordinal == refused:
		return whyRefused
	case bad:
		return whyKept
	case pinned:
		return whyOverride
	}
	return whyHash
}

// name returns the name of the backend with this ordinal.
func (t *table) name(ordinal int) string {
	return backendName(t.statefulSet, ordinal)
}

// ordinal reads the name of a backend. Only the one spelling that name makes is
// taken: no sign, no leading zero.
func (t *table) ordinal(name string) (int, bool) {
	digits, ok := strings.CutPrefix(name, t.statefulSet+"-")
	if !ok || len(digits) > 9 {
		return 0, false
	}
	n, err := strconv.Atoi(digits)
	if err != nil || n < 0 || n >= t.backends || strconv.Itoa(n) != digits {
		return 0, false
	}
	return n, true
}

// changes counts how the overrides of t differ from those of old, which may be
// nil.
func (t *table) changes(old *table) (added, changed, removed int) {
	if old == nil {
		return len(t.overrides), 0, 0
	}
	for namespace, ordinal := range t.overrides {
		before, had := old.overrides[namespace]
		switch {
		case !had:
			added++
		case before != ordinal:
			changed++
		}
	}
	return added, changed, len(old.overrides) + added - len(t.overrides)
}

// namespaceFault says what is wrong with a namespace, or "". The characters and
// the length are those of a ConfigMap's keys, so that each namespace can be an
// override (https://kubernetes.io/docs/concepts/configuration/configmap/). "."
// and ".." would be dot segments of a path (RFC 3986 §3.3).
func namespaceFault(s string) string {
	const want = "a namespace of 1 to 253 characters of [-._a-zA-Z0-9] other than \".\" and \"..\""
	if len(s) == 0 || len(s) > 253 || s == "." || s == ".." {
		return want
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_':
		default:
			return want
		}
	}
	return ""
}

// router holds the table in force.
type router struct {
	// Static after construction.
	statefulSet string
	backends    int
	log         *slog.Logger
	swapped     func() // called after each swap; must not block

	current atomic.Pointer[table] // nil until the first entries came, never again
	swaps   atomic.Int64

	mu    sync.Mutex // serialises update
	heard bool       // entries that are not stale came. Guarded by mu.
}

// table returns the table in force, nil if there was none yet.
func (r *router) table() *table { return r.current.Load() }

// update puts a table made of e in force, and says in the log what changed.
func (r *router) update(e entries) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.stale && r.heard {
		return
	}
	r.heard = r.heard || !e.stale
	old := r.table()
	t := newTable(r.statefulSet, r.backends, e, old)
	r.current.Store(t)
	r.swaps.Add(1)
	r.swapped()
	r.report(t, old)
}

// report logs the new table: one line, and one for each rejected entry that the
// old table did not have, up to maxReported.
func (r *router) report(t, old *table) {
	added, changed, removed := t.changes(old)
	r.log.Info("table", "source", t.source, "version", t.version, "backends", t.backends,
		"overrides", len(t.overrides), "added", added, "changed", changed, "removed", removed,
		"rejected", len(t.rejected))
	const maxReported = 10
	fresh := slices.SortedFunc(maps.Keys(t.rejected), cmp.Compare)
	if old != nil {
		fresh = slices.DeleteFunc(fresh, func(ns string) bool { return old.rejected[ns] == t.rejected[ns] })
	}
	for i, namespace := range fresh {
		if i == maxReported {
			r.log.Warn("more entries rejected", "count", len(fresh)-maxReported)
			return
		}
		bad := t.rejected[namespace]
		r.log.Warn("entry rejected", "source", t.source, "version", t.version,
			"namespace", namespace, "value", bad.Value, "want", bad.Want, "kept", bad.Kept)
	}
}
