package main

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"iter"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// Why a namespace belongs to its owner, as /owner says it.
const (
	whyOverride = "override" // an entry
	whyHash     = "hash"     // no entry
	whyKept     = "kept"     // an entry that cannot be read: stays where it was
	whyConflict = "conflict" // entries of several objects that name different backends: stays where it was
	whyRefused  = "refused"  // stays where it was, and where that is is not known: 503
)

// What an entry can mean instead of an ordinal.
const (
	hashed     = -1 // the same as no entry
	refused    = -2 // the namespace is not served (invariant 3)
	unreadable = -3
)

// entries is what one source of overrides holds at one moment.
type entries struct {
	source  string // for people: "ConfigMap edge/overwriting"
	version string // the ConfigMap's resourceVersion, or a hash of a directory
	data    *packed
	stale   bool // a copy that may lag: counts only until the API server was heard
}

// table says who owns which namespace. It is immutable: an update makes a new
// one. Its methods take no lock and owner does not allocate (invariant 1).
type table struct {
	statefulSet string    // the part of a backend's name before its ordinal
	host        bool      // a namespace is the first label of a host name
	backends    ordinals  // at least 1
	revision    string    // of the StatefulSet, when it came to have these; "" if it was not asked
	sources     []entries // of the overrides, in the order in which they are read
	version     string    // of the source, or a hash of those of several: for people
	stamp       string    // content.kept

	// Routers with the same content have the same owners, but for the namespaces that
	// stay where they were; with the same kept, these too. content is a hash of what
	// namespaces have as their override (an ordinal, or that they stay), of which
	// backends there are, and of hashVersion: not of how and where it was written, nor
	// of a resourceVersion, which two contents can have after a restored backup. An
	// override counts also if it names the owner by hash: with other backends it would
	// not.
	content, kept uint64

	// The parts of index are the data of sources, then the namespaces that stay
	// where they were: since an entry cannot be read, since entries disagree.
	index     index
	ordinals  [][]int32 // for each part, for each of its values
	overrides int       // namespaces of which owner does not ask the hash
	rejected  []int     // for each source, entries that cannot be read
	conflicts int       // namespaces whose entries disagree
}

// newTable reads the sources. A namespace of which an entry cannot be read, or
// to which two sources give different backends, stays where old had it; without
// an old table it is refused rather than hashed, since another router may know a
// good value. All other entries apply (invariant 3).
func newTable(statefulSet string, backends ordinals, sources []entries, old *table) *table {
	t := &table{statefulSet: statefulSet, backends: backends}
	t.fill(sources, old)
	return t
}

// with returns the table that follows t with other backends or sources.
func (t *table) with(backends ordinals, sources []entries) *table {
	next := &table{statefulSet: t.statefulSet, host: t.host, backends: backends}
	next.fill(sources, t)
	return next
}

// fill is the rest of newTable.
func (t *table) fill(sources []entries, old *table) {
	t.sources, t.version, t.rejected = slices.Clone(sources), versionOf(sources), make([]int, len(sources))
	var parts []*packed
	count := 0
	for i := range t.sources {
		e := &t.sources[i]
		e.data = cmp.Or(e.data, &packed{})
		parts = append(parts, e.data)
		t.ordinals = append(t.ordinals, t.read(e.data))
		count += e.data.count
	}
	known := []int32{refused, hashed} // what the values of the last two parts mean
	for i := range t.backends.count {
		known = append(known, int32(t.backends.first+i))
	}
	t.ordinals = append(t.ordinals, known, known)
	t.index = newIndex(append(parts, &packed{}, &packed{}), count)
	t.readSources(old)
	t.content = fmix64(t.content + spread(fmt.Sprintf("hash %d, backends %s", hashVersion, t.backends)))
	t.kept = fmix64(t.kept)
	t.stamp = fmt.Sprintf("%016x.%016x", t.content, t.kept)
}

// weight is what a meaning of a namespace counts in content and kept. These are
// sums, of spread(namespace) × weight for each namespace, so that a source's part
// is known once it is packed, but for the namespaces that it shares with others. A
// spread is as good as random. Two contents differ by the sum of spread × the
// difference of two weights over some namespaces: so they have the same sum by
// accident only, once in 2^(64-k) times where 2^k divides all these differences.
// With 0 for a namespace that is in one of both, and weights that are odd and in a
// row, k is 0 for that, mostly 1 or 2, and at most 14 with 10,000 backends.
func weight(meaning int) uint64 { return uint64(2*(meaning-unreadable) + 1) }

// versionOf names the state of all sources for people.
func versionOf(sources []entries) string {
	if len(sources) == 1 {
		return sources[0].version
	}
	sum := fnv.New64a()
	for _, e := range sources {
		fmt.Fprintf(sum, "%q %q\n", e.source, e.version)
	}
	return fmt.Sprintf("%d-%016x", len(sources), sum.Sum64())
}

// read returns what the values mean, and counts their namespaces in content as if
// all were in force and in no other source.
func (t *table) read(p *packed) (ordinals []int32) {
	for i, value := range p.values {
		ordinal, ok := t.ordinal(value)
		if !ok {
			ordinal = unreadable
		}
		ordinals = append(ordinals, int32(ordinal))
		t.content += p.sums[i] * weight(ordinal)
	}
	return ordinals
}

// readSources reads all entries, while t is being made: a range of hashes of each
// source, then the next range. The cells of one range stay in the CPU's cache,
// which makes a table of a million entries from 30 sources in half of the time.
func (t *table) readSources(old *table) {
	const ranges = 64
	at := make([]uint32, len(t.sources))
	for n := range uint64(ranges) {
		for i, e := range t.sources {
			for r := range e.data.below((n+1)<<32/ranges, &at[i]) {
				t.add(i, r, old)
			}
		}
	}
}

// add reads one entry of the i-th source, while t is being made. content has it
// already, by read: what else was known of its namespace, or is now, is put right.
func (t *table) add(i int, r record, old *table) {
	ordinal := int(t.ordinals[i][r.which])
	if t.odd(r) {
		t.rejected[i]++
		t.content -= spread(r.namespace) * weight(ordinal)
		return
	}
	s := find(&t.index, r.namespace, r.hash)
	if s.part == 0 && ordinal != unreadable {
		*s = cell{r.at, uint16(i + 1), uint16(r.hash)}
		t.overrides++
		return
	}
	before := t.counts(s)
	switch {
	case ordinal == unreadable:
		t.rejected[i]++
		if !t.stays(s) {
			t.keep(s, len(t.sources), r, old)
		}
	case !t.stays(s) && t.means(s) != ordinal:
		t.conflicts++
		t.keep(s, len(t.sources)+1, r, old)
	}
	t.content += spread(r.namespace) * (t.counts(s) - before - weight(ordinal))
}

// counts is the weight in content of the namespace that s leads to.
func (t *table) counts(s *cell) uint64 {
	switch {
	case s.part == 0:
		return 0
	case t.stays(s):
		return weight(unreadable)
	}
	return weight(t.means(s))
}

// odd reports whether no request can have the namespace of r.
func (t *table) odd(r record) bool { return r.odd == oddPath || r.odd == oddHost && t.host }

// keep makes s lead to an entry, in the part, that gives the namespace the owner
// it had in old.
func (t *table) keep(s *cell, part int, r record, old *table) {
	ordinal := refused
	if old != nil {
		ordinal = old.means(find(&old.index, r.namespace, r.hash))
	}
	if ordinal >= 0 && !t.backends.has(ordinal) {
		ordinal = refused
	}
	if s.part == 0 {
		t.overrides++
	}
	if ordinal == hashed {
		t.overrides--
	}
	t.kept += spread(r.namespace) * weight(ordinal)
	r.which = uint32(slices.Index(t.ordinals[part], int32(ordinal)))
	*s = cell{t.index.parts[part].add(r), uint16(part + 1), uint16(r.hash)}
}

// means returns the ordinal that s leads to, hashed or refused.
func (t *table) means(s *cell) int {
	if s.part == 0 {
		return hashed
	}
	return int(t.ordinals[s.part-1][t.index.record(s).which])
}

// stays reports whether s leads to a namespace that stays where it was.
func (t *table) stays(s *cell) bool { return int(s.part) > len(t.sources) }

// owner returns the ordinal of the backend that owns the namespace; ok is false
// if the namespace is refused.
func (t *table) owner(namespace string) (ordinal int, ok bool) {
	key := spread(namespace)
	ordinal = t.means(find(&t.index, namespace, upper(key)))
	if ordinal == hashed {
		return t.backends.first + jump(key, t.backends.count), true
	}
	return ordinal, ordinal != refused
}

// pinned returns the ordinal of the override of r's namespace, hashed if it has
// none, or refused.
func (t *table) pinned(r record) int { return t.means(find(&t.index, r.namespace, r.hash)) }

// explain says why owner answers as it does.
func (t *table) explain(namespace string) string {
	s := find(&t.index, namespace, upper(spread(namespace)))
	switch {
	case s.part == 0:
		return whyHash
	case t.means(s) == refused:
		return whyRefused
	case !t.stays(s):
		return whyOverride
	case int(s.part) == len(t.sources)+1:
		return whyKept
	}
	return whyConflict
}

// rejection is one entry that is not in force as it was written, and what became
// of its namespace.
type rejection struct {
	namespace string
	Source    string `json:"source"`
	Value     string `json:"value"`         // as it was found, cut to maxShownValue bytes
	Want      string `json:"want"`          // what would have been right
	Kept      string `json:"kept"`          // the owner it keeps, "hash", "refused" or "nothing"
	Key       string `json:"key,omitempty"` // of an entry that is of no namespace
}

// maxShownValue is how much of a rejected value is shown, in bytes: a value may
// be 1 MiB of anything.
const maxShownValue = 64

// rejections are those of the i-th source.
func (t *table) rejections(i int) iter.Seq[rejection] {
	return func(yield func(rejection) bool) {
		if t.rejected[i] == 0 && t.conflicts == 0 {
			return
		}
		for r := range t.sources[i].data.all() {
			if bad, ok := t.judge(i, r); ok && !yield(bad) {
				return
			}
		}
	}
}

// rejectionsOf are those of the namespace in all sources, and of keys that would be
// it in lower case where host names have it. It reads them from end to end: it is
// for operators, not for requests.
func (t *table) rejectionsOf(namespace string) (all []rejection) {
	if !t.host && !t.stays(find(&t.index, namespace, upper(spread(namespace)))) {
		return nil
	}
	for i := range t.sources {
		for r := range t.sources[i].data.all() {
			if string(r.namespace) != namespace && !(t.host && strings.EqualFold(string(r.namespace), namespace)) {
				continue
			}
			if bad, ok := t.judge(i, r); ok {
				all = append(all, bad)
			}
		}
	}
	return all
}

// judge reports whether an entry of the i-th source is rejected.
func (t *table) judge(i int, r record) (bad rejection, ok bool) {
	s := find(&t.index, r.namespace, r.hash)
	bad = rejection{namespace: string(r.namespace), Source: t.sources[i].source, Kept: "nothing"}
	odd := t.odd(r)
	switch {
	case odd:
		bad.Key, bad.Want = bad.namespace, nameFault(bad.namespace, t.host)
	case t.ordinals[i][r.which] == unreadable:
		bad.Want = t.name(t.backends.first) + " to " + t.name(t.backends.first+t.backends.count-1)
	case int(s.part) == len(t.sources)+2:
		bad.Want = "the same backend in all objects"
	default:
		return bad, false
	}
	value := t.sources[i].data.value(r)
	if len(value) > maxShownValue {
		value = value[:maxShownValue] + "…"
	}
	bad.Value = strings.ToValidUTF8(value, "�")
	switch ordinal := t.means(s); {
	case odd:
	case ordinal == hashed:
		bad.Kept = whyHash
	case ordinal == refused:
		bad.Kept = whyRefused
	default:
		bad.Kept = t.name(ordinal)
	}
	return bad, true
}

// name returns the name of the backend with this ordinal.
func (t *table) name(ordinal int) string { return backendName(t.statefulSet, ordinal) }

// ordinal reads the name of a backend that there is.
func (t *table) ordinal(name string) (int, bool) {
	ordinal, ok := backendOrdinal(t.statefulSet, name)
	return ordinal, ok && t.backends.has(ordinal)
}

// nameFault says what is wrong with a namespace of a host name, or of a path, or "".
func nameFault(name string, host bool) string {
	if host {
		return labelFault(name)
	}
	return namespaceFault(name)
}

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
