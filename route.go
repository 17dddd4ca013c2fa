package main

import (
	"cmp"
	"context"
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
	whyOverride   = "override" // an entry
	whyHash       = "hash"     // no entry
	whyPrevious   = "kept"     // an entry that cannot be read: stays where it was
	whyConflict   = "conflict" // entries of several objects that name different backends: stays where it was
	whyUnresolved = "refused"  // stays where it was, and where that is is not known: 503
)

// What an entry can mean instead of an ordinal.
const (
	byHash       = -1 // the same as no entry
	unresolved   = -2 // the namespace is not served (invariant 3)
	invalidValue = -3
)

// sourceID identifies an object that holds overrides: a ConfigMap or a directory.
type sourceID struct {
	kind      string // "ConfigMap" or "directory"
	namespace string // the Kubernetes namespace; "" for a directory
	name      string // the ConfigMap's name, or the directory's path
}

// String returns the name that people read: "ConfigMap edge/overwriting".
func (id sourceID) String() string {
	switch id.kind {
	case "":
		return id.name
	case "directory":
		return id.kind + " " + id.name
	}
	return id.kind + " " + id.namespace + "/" + id.name
}

// sourceContent is the content of one object that holds overrides, at one moment.
type sourceContent struct {
	id        sourceID
	version   string // the ConfigMap's resourceVersion, or a hash of the directory's files
	overrides *overrideSet
}

// overrideSource reads overrides from one place, as configMaps and directory do. It
// gives all that it holds to the update function with which it was created: first when
// that is complete, then after each change.
type overrideSource interface {
	// run reads the source until ctx ends.
	run(ctx context.Context)
	// whyNotReady says why the source has not called update yet. "" means that it has,
	// or is about to.
	whyNotReady() string
}

// changeReporter is an overrideSource that reports what its overrides changed.
type changeReporter interface {
	// reportChange reports a change that is in force. It must not block. It gets the
	// changes of all sources.
	reportChange(sourceChange)
}

// table says who owns which namespace. It is immutable: an update makes a new
// one. Its methods take no lock and owner does not allocate (invariant 1).
type table struct {
	statefulSet string          // the part of a backend's name before its ordinal
	fromHost    bool            // a namespace is the first label of a host name
	backends    ordinals        // at least 1
	revision    string          // of the StatefulSet, when it came to have these; "" if it was not asked
	sources     []sourceContent // of the overrides, in the order in which they are read
	version     string          // of the source, or a hash of those of several: for people
	stamp       string          // content.kept

	// Routers with the same content have the same owners, but for the namespaces that
	// stay where they were; with the same kept, these too. contentHash is a hash of what
	// namespaces have as their override (an ordinal, or that they stay), of which
	// backends there are, and of hashVersion: not of how and where it was written, nor
	// of a resourceVersion, which two contents can have after a restored backup. An
	// override counts also if it names the owner by hash: with other backends it would
	// not.
	contentHash, pinnedHash uint64

	// The parts of index are the data of sources, then the namespaces that stay
	// where they were: since an entry cannot be read, since entries disagree.
	index         overrideIndex
	valueOrdinals [][]int32 // for each part, for each of its values
	overrides     int       // namespaces of which owner does not ask the hash
	rejected      []int     // for each source, entries that cannot be read
	conflicts     int       // namespaces whose entries disagree
}

// newTable reads the sources. A namespace of which an entry cannot be read, or
// to which two sources give different backends, stays where old had it; without
// an old table it is refused rather than hashed, since another router may know a
// good value. All other entries apply (invariant 3).
func newTable(statefulSet string, backends ordinals, sources []sourceContent, old *table) *table {
	t := &table{statefulSet: statefulSet, backends: backends}
	t.build(sources, old)
	return t
}

// with returns the table that follows t with other backends or sources.
func (t *table) with(backends ordinals, sources []sourceContent) *table {
	next := &table{statefulSet: t.statefulSet, fromHost: t.fromHost, backends: backends}
	next.build(sources, t)
	return next
}

// build is the rest of newTable.
func (t *table) build(sources []sourceContent, old *table) {
	t.sources, t.version, t.rejected = slices.Clone(sources), versionOf(sources), make([]int, len(sources))
	var sets []*overrideSet
	count := 0
	for i := range t.sources {
		src := &t.sources[i]
		src.overrides = cmp.Or(src.overrides, &overrideSet{})
		sets = append(sets, src.overrides)
		t.valueOrdinals = append(t.valueOrdinals, t.resolveValues(src.overrides))
		count += src.overrides.count
	}
	ordinals := []int32{unresolved, byHash} // what the values of the last two parts mean
	for i := range t.backends.count {
		ordinals = append(ordinals, int32(t.backends.first+i))
	}
	t.valueOrdinals = append(t.valueOrdinals, ordinals, ordinals)
	t.index = newOverrideIndex(append(sets, &overrideSet{}, &overrideSet{}), count)
	t.mergeSources(old)
	t.contentHash = fmix64(t.contentHash + hash64(fmt.Sprintf("hash %d, backends %s", hashVersion, t.backends)))
	t.pinnedHash = fmix64(t.pinnedHash)
	t.stamp = fmt.Sprintf("%016x.%016x", t.contentHash, t.pinnedHash)
}

// weight is what a meaning of a namespace counts in content and kept. These are
// sums, of spread(namespace) × weight for each namespace, so that a source's part
// is known once it is packed, but for the namespaces that it shares with others. A
// spread is as good as random. Two contents differ by the sum of spread × the
// difference of two weights over some namespaces: so they have the same sum by
// accident only, once in 2^(64-k) times where 2^k divides all these differences.
// With 0 for a namespace that is in one of both, and weights that are odd and in a
// row, k is 0 for that, mostly 1 or 2, and at most 14 with 10,000 backends.
func weight(meaning int) uint64 { return uint64(2*(meaning-invalidValue) + 1) }

// versionOf names the state of all sources for people.
func versionOf(sources []sourceContent) string {
	if len(sources) == 1 {
		return sources[0].version
	}
	sum := fnv.New64a()
	for _, src := range sources {
		fmt.Fprintf(sum, "%q %q\n", src.id.String(), src.version)
	}
	return fmt.Sprintf("%d-%016x", len(sources), sum.Sum64())
}

// resolveValues returns what the values mean, and counts their namespaces in content as if
// all were in force and in no other source.
func (t *table) resolveValues(p *overrideSet) (ordinals []int32) {
	for i, value := range p.values {
		ordinal, ok := t.ordinal(value)
		if !ok {
			ordinal = invalidValue
		}
		ordinals = append(ordinals, int32(ordinal))
		t.contentHash += p.hashSums[i] * weight(ordinal)
	}
	return ordinals
}

// mergeSources reads all entries, while t is being made: a range of hashes of each
// source, then the next range. The cells of one range stay in the CPU's cache,
// which makes a table of a million entries from 30 sources in half of the time.
func (t *table) mergeSources(old *table) {
	const ranges = 64
	at := make([]uint32, len(t.sources))
	for n := range uint64(ranges) {
		for i, src := range t.sources {
			for r := range src.overrides.rangeBelow((n+1)<<32/ranges, &at[i]) {
				t.addOverride(i, r, old)
			}
		}
	}
}

// addOverride reads one entry of the i-th source, while t is being made. contentHash has it
// already, by read: what else was known of its namespace, or is now, is put right.
func (t *table) addOverride(i int, r override, old *table) {
	ordinal := int(t.valueOrdinals[i][r.valueIndex])
	if t.isInvalidName(r) {
		t.rejected[i]++
		t.contentHash -= hash64(r.namespace) * weight(ordinal)
		return
	}
	s := findSlot(&t.index, r.namespace, r.hash)
	if s.set == 0 && ordinal != invalidValue {
		*s = indexSlot{r.offset, uint16(i + 1), uint16(r.hash)}
		t.overrides++
		return
	}
	before := t.contribution(s)
	switch {
	case ordinal == invalidValue:
		t.rejected[i]++
		if !t.isPinned(s) {
			t.pinToPrevious(s, len(t.sources), r, old)
		}
	case !t.isPinned(s) && t.ordinalOf(s) != ordinal:
		t.conflicts++
		t.pinToPrevious(s, len(t.sources)+1, r, old)
	}
	t.contentHash += hash64(r.namespace) * (t.contribution(s) - before - weight(ordinal))
}

// contribution is the weight in content of the namespace that s leads to.
func (t *table) contribution(s *indexSlot) uint64 {
	switch {
	case s.set == 0:
		return 0
	case t.isPinned(s):
		return weight(invalidValue)
	}
	return weight(t.ordinalOf(s))
}

// isInvalidName reports whether no request can have the namespace of r.
func (t *table) isInvalidName(r override) bool {
	return r.invalidFor == invalidForPath || r.invalidFor == invalidForHost && t.fromHost
}

// pinToPrevious makes s lead to an entry, in the part, that gives the namespace the owner
// it had in old.
func (t *table) pinToPrevious(s *indexSlot, set int, r override, old *table) {
	ordinal := unresolved
	if old != nil {
		ordinal = old.ordinalOf(findSlot(&old.index, r.namespace, r.hash))
	}
	if ordinal >= 0 && !t.backends.has(ordinal) {
		ordinal = unresolved
	}
	if s.set == 0 {
		t.overrides++
	}
	if ordinal == byHash {
		t.overrides--
	}
	t.pinnedHash += hash64(r.namespace) * weight(ordinal)
	r.valueIndex = uint32(slices.Index(t.valueOrdinals[set], int32(ordinal)))
	*s = indexSlot{t.index.sets[set].appendOverride(r), uint16(set + 1), uint16(r.hash)}
}

// ordinalOf returns the ordinal that s leads to, hashed or refused.
func (t *table) ordinalOf(s *indexSlot) int {
	if s.set == 0 {
		return byHash
	}
	return int(t.valueOrdinals[s.set-1][t.index.overrideAt(s).valueIndex])
}

// isPinned reports whether s leads to a namespace that stays where it was.
func (t *table) isPinned(s *indexSlot) bool { return int(s.set) > len(t.sources) }

// owner returns the ordinal of the backend that owns the namespace; ok is false
// if the namespace is refused.
func (t *table) owner(namespace string) (ordinal int, ok bool) {
	key := hash64(namespace)
	ordinal = t.ordinalOf(findSlot(&t.index, namespace, upper32(key)))
	if ordinal == byHash {
		return t.backends.first + jump(key, t.backends.count), true
	}
	return ordinal, ordinal != unresolved
}

// overrideOrdinal returns the ordinal of the override of r's namespace, hashed if it has
// none, or refused.
func (t *table) overrideOrdinal(r override) int {
	return t.ordinalOf(findSlot(&t.index, r.namespace, r.hash))
}

// explain says why owner answers as it does.
func (t *table) explain(namespace string) string {
	s := findSlot(&t.index, namespace, upper32(hash64(namespace)))
	switch {
	case s.set == 0:
		return whyHash
	case t.ordinalOf(s) == unresolved:
		return whyUnresolved
	case !t.isPinned(s):
		return whyOverride
	case int(s.set) == len(t.sources)+1:
		return whyPrevious
	}
	return whyConflict
}

// rejection is one entry that is not in force as it was written, and what became
// of its namespace.
type rejection struct {
	namespace string
	Source    string `json:"source"`
	Value     string `json:"value"`         // as it was found, cut to maxQuotedValue bytes
	Expected  string `json:"want"`          // what would have been right
	Previous  string `json:"kept"`          // the owner it keeps, "hash", "refused" or "nothing"
	Key       string `json:"key,omitempty"` // of an entry that is of no namespace
}

// String names the entry and says what would be right:
// `ns-01: "bakend-2", want backend-0 to backend-3`.
func (r rejection) String() string {
	return fmt.Sprintf("%s: %q, want %s", r.namespace, r.Value, r.Expected)
}

// maxQuotedValue is how much of a rejected value is shown, in bytes: a value may
// be 1 MiB of anything.
const maxQuotedValue = 64

// rejections are those of the i-th source.
func (t *table) rejections(i int) iter.Seq[rejection] {
	return func(yield func(rejection) bool) {
		if t.rejected[i] == 0 && t.conflicts == 0 {
			return
		}
		for r := range t.sources[i].overrides.all() {
			if bad, ok := t.check(i, r); ok && !yield(bad) {
				return
			}
		}
	}
}

// rejectionsOf are those of the namespace in all sources, and of keys that would be
// it in lower case where host names have it. It reads them from end to end: it is
// for operators, not for requests.
func (t *table) rejectionsOf(namespace string) (all []rejection) {
	if !t.fromHost && !t.isPinned(findSlot(&t.index, namespace, upper32(hash64(namespace)))) {
		return nil
	}
	for i := range t.sources {
		for r := range t.sources[i].overrides.all() {
			if string(r.namespace) != namespace && !(t.fromHost && strings.EqualFold(string(r.namespace), namespace)) {
				continue
			}
			if bad, ok := t.check(i, r); ok {
				all = append(all, bad)
			}
		}
	}
	return all
}

// check reports whether an entry of the i-th source is rejected.
func (t *table) check(i int, r override) (bad rejection, ok bool) {
	s := findSlot(&t.index, r.namespace, r.hash)
	bad = rejection{namespace: string(r.namespace), Source: t.sources[i].id.String(), Previous: "nothing"}
	invalid := t.isInvalidName(r)
	switch {
	case invalid:
		bad.Key, bad.Expected = bad.namespace, namespaceFault(bad.namespace, t.fromHost)
	case t.valueOrdinals[i][r.valueIndex] == invalidValue:
		bad.Expected = t.name(t.backends.first) + " to " + t.name(t.backends.first+t.backends.count-1)
	case int(s.set) == len(t.sources)+2:
		bad.Expected = "the same backend in all objects"
	default:
		return bad, false
	}
	value := t.sources[i].overrides.value(r)
	if len(value) > maxQuotedValue {
		value = value[:maxQuotedValue] + "…"
	}
	bad.Value = strings.ToValidUTF8(value, "�")
	switch ordinal := t.ordinalOf(s); {
	case invalid:
	case ordinal == byHash:
		bad.Previous = whyHash
	case ordinal == unresolved:
		bad.Previous = whyUnresolved
	default:
		bad.Previous = t.name(ordinal)
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

// namespaceFault says what is wrong with a namespace of a host name, or of a path, or "".
func namespaceFault(name string, host bool) string {
	if host {
		return hostNamespaceFault(name)
	}
	return pathNamespaceFault(name)
}

// router holds the table in force.
type router struct {
	// Static after construction.
	statefulSet string
	fromHost    bool // a namespace is the first label of a host name
	log         *slog.Logger
	onSwap      func()          // called after each swap; must not block
	sources     []*routerSource // in the order of addSource

	current atomic.Pointer[table] // nil until entries and backends are known, never again
	swaps   atomic.Int64

	// Guarded by mu, which serialises swaps.
	mu       sync.Mutex
	contents []sourceContent // of the sources, merged; nil before they are known
	backends ordinals        // none before they are known
	revision string          // of the StatefulSet, when it came to have these
}

// table returns the table in force, nil if there was none yet.
func (r *router) table() *table { return r.current.Load() }

// routerSource is a source of overrides that a router merges with the others.
type routerSource struct {
	overrideSource
	provisional bool            // a copy that may lag
	contents    []sourceContent // nil before the first. Guarded by router.mu.
}

// addSource adds a source of overrides, which create makes: the source gives its
// contents to update. A provisional source counts only until all others have given
// theirs. The caller runs the source. addSource must not be called once one runs.
func (r *router) addSource(provisional bool, create func(update func(...sourceContent)) overrideSource) {
	s := &routerSource{provisional: provisional}
	s.overrideSource = create(func(contents ...sourceContent) { r.setContents(s, contents) })
	r.sources = append(r.sources, s)
}

// whyNoOverrides says why not all overrides are known yet, or "".
func (r *router) whyNoOverrides() string {
	var all []string
	for _, s := range r.sources {
		if s.provisional {
			continue
		}
		if why := s.whyNotReady(); why != "" {
			all = append(all, why)
		}
	}
	return strings.Join(all, "; ")
}

// setContents replaces the contents of one source, and puts a table of all sources in
// force once they are known.
func (r *router) setContents(s *routerSource, contents []sourceContent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.contents = append([]sourceContent{}, contents...)
	if r.contents = r.mergeContents(); r.contents != nil && !r.updateVersions() {
		r.swap()
	}
}

// mergeContents returns the contents of all sources in their order, without the
// provisional ones. Until each of the others has given its contents, it returns the
// provisional ones alone, nil if there are none. The caller holds r.mu.
func (r *router) mergeContents() []sourceContent {
	var live, provisional []sourceContent
	complete := true
	for _, s := range r.sources {
		if s.provisional {
			provisional = append(provisional, s.contents...)
			continue
		}
		complete = complete && s.contents != nil
		live = append(live, s.contents...)
	}
	if !complete {
		return provisional
	}
	for _, s := range r.sources {
		if s.provisional {
			s.contents = nil // never read again
		}
	}
	return append([]sourceContent{}, live...)
}

// updateVersions reports whether the sources have nothing new but their versions, as after
// a change of labels, and has the table in force say these then: that is no swap, of
// which anybody is told. What each source has as before is the same in memory after
// it. mu is held.
func (r *router) updateVersions() bool {
	t := r.table()
	if t == nil {
		return false
	}
	same := len(r.contents) == len(t.sources)
	for i := range r.contents {
		src := &r.contents[i]
		src.overrides = cmp.Or(src.overrides, &overrideSet{})
		j := slices.IndexFunc(t.sources, hasID(src.id))
		if j >= 0 && src.overrides.equal(t.sources[j].overrides) {
			src.overrides = t.sources[j].overrides
		}
		same = same && i == j && src.overrides == t.sources[j].overrides
	}
	if same {
		next := *t
		next.sources, next.version = slices.Clone(r.contents), versionOf(r.contents)
		r.current.Store(&next)
	}
	return same
}

// hasID returns a function that reports whether a content is of the object with this ID.
func hasID(id sourceID) func(sourceContent) bool {
	return func(src sourceContent) bool { return src.id == id }
}

// setBackends puts a table for these backends in force, at least one. Entries are
// judged anew: "backend-7" is good once there are eight. revision is that of the
// StatefulSet that says so.
func (r *router) setBackends(backends ordinals, revision string) {
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
	if r.contents == nil || r.backends.count == 0 {
		return
	}
	old := r.table()
	t := &table{statefulSet: r.statefulSet, fromHost: r.fromHost, backends: r.backends, revision: r.revision}
	t.build(r.contents, old)
	r.current.Store(t)
	r.swaps.Add(1)
	r.onSwap()
	all := t.changes(old)
	r.logSwap(t, all)
	for _, s := range r.sources {
		if reporter, ok := s.overrideSource.(changeReporter); ok {
			for _, c := range all {
				reporter.reportChange(c)
			}
		}
	}
	if len(t.index.slots) > largeIndexSlots {
		runtime.GC()
	}
}

// largeIndexSlots is how many cells, of 8 bytes, are worth a collection of the old table
// when it is out of force. By itself the runtime would let as much garbage come
// together as there is in use: of a million overrides, three old indexes.
const largeIndexSlots = 1 << 18

// sourceChange is what the new state of one source did.
type sourceChange struct {
	sourceContent
	initial                 bool        // there was no table before
	contentHash             uint64      // of the table
	scaled                  string      // if the number of backends did it all: the StatefulSet's revision
	added, changed, removed int         // overrides
	rejected                int         // entries that are rejected now
	examples                []rejection // the first of them by name
	newlyRejected           int         // those that the table before did not reject
	newExamples             []rejection // the first of them by name
}

// maxExamples is how many rejected entries of a source are told one by one.
const maxExamples = 10

// changes compares t with old, which may be nil. Sources that are the same in
// both are left out.
func (t *table) changes(old *table) (all []sourceChange) {
	first := old == nil
	if first {
		old = newTable(t.statefulSet, t.backends, nil, nil)
	}
	for i, src := range t.sources {
		before, j := &overrideSet{}, slices.IndexFunc(old.sources, hasID(src.id))
		if j >= 0 {
			before = old.sources[j].overrides
		}
		if before == src.overrides && old.backends == t.backends {
			continue
		}
		c := sourceChange{sourceContent: src, initial: first, contentHash: t.contentHash}
		if before == src.overrides {
			c.scaled = t.revision
		}
		for r := range before.differences(src.overrides, old.backends != t.backends) {
			c.countChange(old.overrideOrdinal(r), t.overrideOrdinal(r))
		}
		c.countRejections(t, i, old, j)
		all = append(all, c)
	}
	for _, src := range old.sources {
		if slices.ContainsFunc(t.sources, hasID(src.id)) {
			continue
		}
		c := sourceChange{sourceContent: sourceContent{id: src.id}}
		for r := range src.overrides.all() {
			if t.overrideOrdinal(r) == byHash {
				c.countChange(old.overrideOrdinal(r), byHash)
			}
		}
		all = append(all, c)
	}
	return all
}

// countChange takes note of one namespace that had an override before, or hashed, and
// has one after.
func (c *sourceChange) countChange(before, after int) {
	switch {
	case before == after:
	case before == byHash:
		c.added++
	case after == byHash:
		c.removed++
	default:
		c.changed++
	}
}

// countRejections takes note of the entries that are rejected of t's i-th source, which
// was old's j-th, if that is not below 0.
func (c *sourceChange) countRejections(t *table, i int, old *table, j int) {
	known := map[rejection]bool{}
	if j >= 0 {
		for bad := range old.rejections(j) {
			known[bad] = true
		}
	}
	for bad := range t.rejections(i) {
		c.rejected++
		c.examples = addExample(c.examples, bad)
		if !known[bad] {
			c.newlyRejected++
			c.newExamples = addExample(c.newExamples, bad)
		}
	}
}

// addExample adds bad to those that are told, in the order of their names, if it
// is among the first.
func addExample(examples []rejection, bad rejection) []rejection {
	at, _ := slices.BinarySearchFunc(examples, bad, func(a, b rejection) int { return cmp.Compare(a.namespace, b.namespace) })
	if at < maxExamples {
		examples = slices.Insert(examples, at, bad)
	}
	return examples[:min(maxExamples, len(examples))]
}

// sourceName names the sources for people.
func (t *table) sourceName() string {
	if len(t.sources) == 1 {
		return t.sources[0].id.String()
	}
	return fmt.Sprintf("%d objects", len(t.sources))
}

// logSwap logs the new table: one line, and one for each entry that is rejected
// since this table, up to maxExamples of a source.
func (r *router) logSwap(t *table, all []sourceChange) {
	source, sum, rejected := t.sourceName(), sourceChange{}, 0
	if len(all) == 1 {
		source = all[0].id.String()
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
		for _, bad := range c.newExamples {
			r.log.Warn("entry rejected", "source", c.id.String(), "version", c.version,
				"namespace", bad.namespace, "value", bad.Value, "want", bad.Expected, "kept", bad.Previous)
		}
		if c.newlyRejected > maxExamples {
			r.log.Warn("more entries rejected", "source", c.id.String(), "count", c.newlyRejected-maxExamples)
		}
	}
}

// writeMetrics writes the table in force, if there is one.
func (r *router) writeMetrics(m metricsWriter) {
	m.single("router_table_swaps_total", "counter", "Tables put in force.", float64(r.swaps.Load()))
	t := r.table()
	if t == nil {
		return
	}
	m.family("router_table_info", "gauge", "Always 1; the labels say which table is in force.")
	m.sample("router_table_info", 1, "source", t.sourceName(), "version", t.version, "stamp", t.stamp)
	m.single("router_table_overrides", "gauge", "Overrides in force.", float64(t.overrides))
	m.single("router_table_backends", "gauge", "Backends that namespaces are hashed over.", float64(t.backends.count))
	m.family("router_table_rejected_entries", "gauge", "Entries that cannot be read.")
	for i, src := range t.sources {
		m.sample("router_table_rejected_entries", float64(t.rejected[i]), "object", src.id.String())
	}
	m.single("router_table_conflicts", "gauge", "Namespaces that objects give to different backends.", float64(t.conflicts))
}
