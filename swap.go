package main

import (
	"cmp"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
)

// router holds the table in force.
type router struct {
	// Static after construction.
	statefulSet string
	host        bool // a namespace is the first label of a host name
	log         *slog.Logger
	swapped     func()       // called after each swap; must not block
	told        func(change) // gets what each source did in a swap; must not block. Or nil.

	current atomic.Pointer[table] // nil until entries and backends are known, never again
	swaps   atomic.Int64

	// Guarded by mu, which serialises swaps.
	mu       sync.Mutex
	heard    bool      // entries that are not stale came
	sources  []entries // the last, nil before the first
	backends ordinals  // none before they are known
	revision string    // of the StatefulSet, when it came to have these
}

// table returns the table in force, nil if there was none yet.
func (r *router) table() *table { return r.current.Load() }

// update puts a table made of all sources of overrides in force.
func (r *router) update(sources ...entries) {
	r.mu.Lock()
	defer r.mu.Unlock()
	stale := len(sources) > 0 && sources[0].stale
	if stale && r.heard {
		return
	}
	r.heard = r.heard || !stale
	r.sources = append([]entries{}, sources...)
	if !r.relabel() {
		r.swap()
	}
}

// relabel reports whether the sources have nothing new but their versions, as after
// a change of labels, and has the table in force say these then: that is no swap, of
// which anybody is told. What each source has as before is the same in memory after
// it. mu is held.
func (r *router) relabel() bool {
	t := r.table()
	if t == nil {
		return false
	}
	same := len(r.sources) == len(t.sources)
	for i := range r.sources {
		e := &r.sources[i]
		e.data = cmp.Or(e.data, &packed{})
		j := slices.IndexFunc(t.sources, named(e.source))
		if j >= 0 && e.data.equal(t.sources[j].data) {
			e.data = t.sources[j].data
		}
		same = same && i == j && e.data == t.sources[j].data
	}
	if same {
		next := *t
		next.sources, next.version = slices.Clone(r.sources), versionOf(r.sources)
		r.current.Store(&next)
	}
	return same
}

// named returns a function that finds the source of the name.
func named(source string) func(entries) bool {
	return func(e entries) bool { return e.source == source }
}

// resize puts a table for these backends in force, at least one. Entries are
// judged anew: "backend-7" is good once there are eight. revision is that of the
// StatefulSet that says so.
func (r *router) resize(backends ordinals, revision string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if backends != r.backends {
		r.backends, r.revision = backends, revision
		r.swap()
	}
}

// swap puts a table of what is known now in force, once all of it is, and tells
// what that did. mu is held.
func (r *router) swap() {
	if r.sources == nil || r.backends.count == 0 {
		return
	}
	old := r.table()
	t := &table{statefulSet: r.statefulSet, host: r.host, backends: r.backends, revision: r.revision}
	t.fill(r.sources, old)
	r.current.Store(t)
	r.swaps.Add(1)
	r.swapped()
	all := t.changes(old)
	r.report(t, all)
	for _, c := range all {
		if r.told != nil {
			r.told(c)
		}
	}
	if len(t.index.cells) > largeIndex {
		runtime.GC()
	}
}

// largeIndex is how many cells, of 8 bytes, are worth a collection of the old table
// when it is out of force. By itself the runtime would let as much garbage come
// together as there is in use: of a million overrides, three old indexes.
const largeIndex = 1 << 18

// change is what the new state of one source did.
type change struct {
	entries
	first                   bool        // there was no table before
	content                 uint64      // of the table
	scaled                  string      // if the number of backends did it all: the StatefulSet's revision
	added, changed, removed int         // overrides
	rejected                int         // entries that are rejected now
	shown                   []rejection // the first of them by name
	fresh                   int         // those that the table before did not reject
	freshShown              []rejection // the first of them by name
}

// maxTold is how many rejected entries of a source are told one by one.
const maxTold = 10

// changes compares t with old, which may be nil. Sources that are the same in
// both are left out.
func (t *table) changes(old *table) (all []change) {
	first := old == nil
	if first {
		old = newTable(t.statefulSet, t.backends, nil, nil)
	}
	for i, e := range t.sources {
		before, j := &packed{}, slices.IndexFunc(old.sources, named(e.source))
		if j >= 0 {
			before = old.sources[j].data
		}
		if before == e.data && old.backends == t.backends {
			continue
		}
		c := change{entries: e, first: first, content: t.content}
		if before == e.data {
			c.scaled = t.revision
		}
		for r := range before.differences(e.data, old.backends != t.backends) {
			c.count(old.pinned(r), t.pinned(r))
		}
		c.judge(t, i, old, j)
		all = append(all, c)
	}
	for _, e := range old.sources {
		if slices.ContainsFunc(t.sources, named(e.source)) {
			continue
		}
		c := change{entries: entries{source: e.source}}
		for r := range e.data.all() {
			if t.pinned(r) == hashed {
				c.count(old.pinned(r), hashed)
			}
		}
		all = append(all, c)
	}
	return all
}

// count takes note of one namespace that had an override before, or hashed, and
// has one after.
func (c *change) count(before, after int) {
	switch {
	case before == after:
	case before == hashed:
		c.added++
	case after == hashed:
		c.removed++
	default:
		c.changed++
	}
}

// judge takes note of the entries that are rejected of t's i-th source, which
// was old's j-th, if that is not below 0.
func (c *change) judge(t *table, i int, old *table, j int) {
	known := map[rejection]bool{}
	if j >= 0 {
		for bad := range old.rejections(j) {
			known[bad] = true
		}
	}
	for bad := range t.rejections(i) {
		c.rejected++
		c.shown = firstTold(c.shown, bad)
		if !known[bad] {
			c.fresh++
			c.freshShown = firstTold(c.freshShown, bad)
		}
	}
}

// firstTold adds bad to those that are told, in the order of their names, if it
// is among the first.
func firstTold(told []rejection, bad rejection) []rejection {
	at, _ := slices.BinarySearchFunc(told, bad, func(a, b rejection) int { return cmp.Compare(a.namespace, b.namespace) })
	if at < maxTold {
		told = slices.Insert(told, at, bad)
	}
	return told[:min(maxTold, len(told))]
}

// source names the sources for people.
func (t *table) source() string {
	if len(t.sources) == 1 {
		return t.sources[0].source
	}
	return fmt.Sprintf("%d objects", len(t.sources))
}

// report logs the new table: one line, and one for each entry that is rejected
// since this table, up to maxTold of a source.
func (r *router) report(t *table, all []change) {
	source, sum, rejected := t.source(), change{}, 0
	if len(all) == 1 {
		source = all[0].source
	}
	for _, c := range all {
		sum.added, sum.changed, sum.removed = sum.added+c.added, sum.changed+c.changed, sum.removed+c.removed
	}
	for _, n := range t.rejected {
		rejected += n
	}
	r.log.Info("table", "source", source, "version", t.version, "stamp", t.stamp, "backends", t.backends.count,
		"overrides", t.overrides, "added", sum.added, "changed", sum.changed, "removed", sum.removed,
		"rejected", rejected, "conflicts", t.conflicts)
	for _, c := range all {
		for _, bad := range c.freshShown {
			r.log.Warn("entry rejected", "source", c.source, "version", c.version,
				"namespace", bad.namespace, "value", bad.Value, "want", bad.Want, "kept", bad.Kept)
		}
		if c.fresh > maxTold {
			r.log.Warn("more entries rejected", "source", c.source, "count", c.fresh-maxTold)
		}
	}
}
