package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// overrideSource reads overrides from one place, as configMaps and directory do. It
// gives all that it holds to the update function with which it was created: first when
// that is complete, also if it is nothing, then after each change. Until the first call the
// router is not ready. A call with the same contents changes nothing and logs nothing. Any
// goroutine may call update. The tableStore merges the sources, rejects invalid entries, finds
// conflicts and logs changes.
//
// The keys of the overrides are those of a ConfigMap (namespaceKey), and their version is any text
// that changes with them (sourceContent). An entry that cannot be read becomes an override with the
// error's text as its value, which is rejected since it names no backend.
//
// With -handoff=all, changes wait until all routers have the same overrides. So a source whose
// contents may differ from router to router must not be added then.
type overrideSource interface {
	// run reads the source until ctx ends.
	run(ctx context.Context)
	// whyNotReady says in words why the source has not called update yet. "" means that it
	// has, or is about to. It is not called once there is a table.
	whyNotReady() string
}

// noOverrides is an overrideSource that has none: the hash gives each namespace its owner.
// It is the update function of the source.
type noOverrides func(...sourceContent)

func (update noOverrides) run(context.Context) { update() }

func (noOverrides) whyNotReady() string { return "" }

// tableStore merges the sources of overrides, and holds the newest table.
type tableStore struct {
	// Static after construction.
	statefulSet string
	fromHost    bool // a namespace is the first label of a host name
	log         *slog.Logger
	onSwap      func()          // called after each swap of the table; must not block
	sources     []*mergedSource // in the order of addSource
	// reportChange gets what the newest table changes, source by source. Namespaces keep their
	// owners until it is their turn to move. It must not block. nil: nobody is told.
	reportChange func(sourceChange)
	// previousOwners returns a function that returns the owner that a namespace keeps if its override
	// is invalid now; nil where only the newest table says that. It must not block. The field may be
	// nil.
	previousOwners func() func(namespace string) int

	newest atomic.Pointer[table] // nil until overrides and backends are known, not nil after that
	swaps  atomic.Int64          // of newest to a new table

	applyDurations *histogram // how long it took to make these and to swap them in

	// Guarded by mu, which serialises swaps.
	mu       sync.Mutex
	contents []sourceContent // of the sources, merged; nil before they are known; tables share it
	backends backendSet      // of the next table; count is 0 before they are known
}

// table returns the newest table, nil if there was none yet.
func (ts *tableStore) table() *table { return ts.newest.Load() }

// mergedSource is a source of overrides that a tableStore merges with the others.
type mergedSource struct {
	overrideSource
	provisional bool            // a copy that may lag
	contents    []sourceContent // nil before the first. Guarded by tableStore.mu.
}

// addSource adds a source of overrides, which create makes: the source gives its
// contents to update. A provisional source counts only until all others have given
// theirs. The caller runs the source. addSource must not be called once one runs.
func (ts *tableStore) addSource(provisional bool,
	create func(update func(...sourceContent)) overrideSource) {
	s := &mergedSource{provisional: provisional}
	s.overrideSource = create(func(contents ...sourceContent) { ts.setContents(s, contents) })
	ts.sources = append(ts.sources, s)
}

// whyNoOverrides says why not all overrides are known yet, or "".
func (ts *tableStore) whyNoOverrides() string {
	var all []string
	for _, s := range ts.sources {
		if s.provisional {
			continue
		}
		if why := s.whyNotReady(); why != "" {
			all = append(all, why)
		}
	}
	return strings.Join(all, "; ")
}

// setContents replaces the contents of one source, and makes a table of all sources the
// newest once they are known.
func (ts *tableStore) setContents(s *mergedSource, contents []sourceContent) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	s.contents = append([]sourceContent{}, contents...)
	if ts.contents = ts.mergeContents(); ts.contents != nil && !ts.updateVersions() {
		ts.swap()
	}
}

// mergeContents returns the contents of all sources in their order, without the
// provisional ones. Until each of the others has given its contents, it returns the
// provisional ones alone, nil if there are none. The caller holds mu.
func (ts *tableStore) mergeContents() []sourceContent {
	var live, provisional []sourceContent
	complete := true
	for _, s := range ts.sources {
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
	for _, s := range ts.sources {
		if s.provisional {
			s.contents = nil // never read again
		}
	}
	return append([]sourceContent{}, live...)
}

// updateVersions reports whether contents differs from the newest table in versions
// only, for example after a change of labels. If so, it puts a copy of the table with the
// new versions in its place; that does not count as a swap and is not reported. In any case,
// sources whose overrides are unchanged share the old set in memory afterwards. The
// caller holds mu.
func (ts *tableStore) updateVersions() bool {
	t := ts.table()
	if t == nil {
		return false
	}
	same := len(ts.contents) == len(t.sources)
	for i := range ts.contents {
		src := &ts.contents[i]
		j := slices.IndexFunc(t.sources, hasID(src.id))
		if j >= 0 && src.overrides.equal(t.sources[j].overrides) {
			src.overrides = t.sources[j].overrides
		}
		same = same && i == j && src.overrides == t.sources[j].overrides
	}
	if !same {
		return false
	}
	for { // mover.takeNewVersion may replace t meanwhile, without mu
		next := *t
		next.sources, next.overridesVersion = ts.contents, versionOf(ts.contents)
		if ts.newest.CompareAndSwap(t, &next) {
			return true
		}
		t = ts.table()
	}
}

// hasID returns a function that reports whether a content is of the object with this ID.
func hasID(id sourceID) func(sourceContent) bool {
	return func(src sourceContent) bool { return src.id == id }
}

// setBackends makes a table for these backends, at least one, the newest, if they or their
// cordon are others than before. It checks all overrides again: "backend-7" is valid once
// there are eight.
func (ts *tableStore) setBackends(s backendSet) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if !s.isSame(&ts.backends) {
		ts.backends = s
		ts.swap()
	}
}

// swap makes a new table the newest, and reports the changes. It does nothing before
// overrides and backends are known. The caller holds mu.
func (ts *tableStore) swap() {
	if ts.contents == nil || ts.backends.count == 0 {
		return
	}
	old, began := ts.table(), time.Now()
	t := newTable(ts.statefulSet, ts.fromHost, ts.backends.ordinalRange, ts.backends.listedCordon,
		ts.contents, old)
	if ts.previousOwners != nil {
		t = t.withPrevious(ts.previousOwners())
	}
	t.specID, t.updated = ts.backends.specID, time.Now()
	ts.newest.Store(t)
	ts.swaps.Add(1)
	ts.onSwap()
	ts.applyDurations.observe(time.Since(began))
	all := t.changes(old)
	ts.logSwap(t, all)
	if ts.reportChange != nil {
		for _, c := range all {
			ts.reportChange(c)
		}
	}
	if len(t.index.slots) > largeIndexSlots {
		runtime.GC()
	}
}

// largeIndexSlots is the number of slots, of 8 bytes each, above which a swap runs the
// garbage collector to free the old table. Otherwise the runtime would let as much
// garbage accumulate as there is memory in use: for a million overrides, three old
// indexes.
const largeIndexSlots = 1 << 18

// sourceChange describes how a new table changed the overrides of one source. The log and
// the Events are written from it.
type sourceChange struct {
	sourceContent                       // the new content
	initial                 bool        // there was no table before
	ownersHash              uint64      // of the new table
	eventSpecID             string      // table.specID, if only the backends changed; for the identity of Events
	added, changed, removed int         // overrides
	rejected                int         // overrides that the new table rejects
	examples                []rejection // the first of them, by namespace
	newlyRejected           int         // those that the old table did not reject, or not with the same text
	newExamples             []rejection // the first of them, by namespace
}

// maxExamples is how many rejected overrides of a source are reported one by one.
const maxExamples = 10

// changes returns the differences of t from old, which may be nil, by source: first those
// of t's sources, then those of sources that only old has. It leaves out sources that did
// not change: a new conflict is reported with the source that has made it.
func (t *table) changes(old *table) (all []sourceChange) {
	initial := old == nil
	if initial {
		old = newTable(t.statefulSet, t.fromHost, t.backends, nil, nil, nil)
	}
	for i, src := range t.sources {
		previous, j := &overrideSet{}, slices.IndexFunc(old.sources, hasID(src.id))
		if j >= 0 {
			previous = old.sources[j].overrides
		}
		if previous == src.overrides && old.backends == t.backends {
			continue
		}
		c := sourceChange{sourceContent: src, initial: initial, ownersHash: t.ownersHash}
		if previous == src.overrides {
			c.eventSpecID = t.specID
		}
		for r := range previous.differences(src.overrides, old.backends != t.backends) {
			c.countChange(old.overrideOrdinal(r), t.overrideOrdinal(r))
		}
		c.countRejections(t, i, old, j)
		all = append(all, c)
	}
	for _, src := range old.sources {
		if slices.ContainsFunc(t.sources, hasID(src.id)) {
			continue
		}
		gone := sourceContent{id: src.id, overrides: &overrideSet{}}
		c := sourceChange{sourceContent: gone, ownersHash: t.ownersHash}
		for r := range src.overrides.all() {
			if t.overrideOrdinal(r) == byHash {
				c.countChange(old.overrideOrdinal(r), byHash)
			}
		}
		all = append(all, c)
	}
	return all
}

// countChange counts a namespace whose override had the ordinal before and has the
// ordinal after. Each is byHash if there was, or is, no override.
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

// countRejections counts the rejected overrides of t's i-th source, which is old's j-th
// source. j is negative if old does not have it.
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

// addExample adds bad to the examples, in the order of their namespaces, if it is among
// the first maxExamples.
func addExample(examples []rejection, bad rejection) []rejection {
	return insertSorted(examples, bad, maxExamples, func(a, b rejection) int {
		return cmp.Compare(a.namespace, b.namespace)
	})
}

// sourceName returns the display name of the only source, or the number of sources.
func (t *table) sourceName() string {
	if len(t.sources) == 1 {
		return t.sources[0].id.String()
	}
	return fmt.Sprintf("%d sources", len(t.sources))
}

// logSwap logs the new table: one line, and one for each newly rejected override, up to
// maxExamples for each source.
func (ts *tableStore) logSwap(t *table, all []sourceChange) {
	source, sum, invalid := t.sourceName(), sourceChange{}, 0
	if len(all) == 1 {
		source = all[0].id.String()
	}
	for _, c := range all {
		sum.added += c.added
		sum.changed += c.changed
		sum.removed += c.removed
	}
	for _, n := range t.invalid {
		invalid += n
	}
	ts.log.Info("routing table updated", "source", source, "overrides_version", t.overridesVersion, "stamp", t.stamp,
		"backends", t.backends.count, "cordon", t.cordon.String(), "overrides", t.overrides,
		"added", sum.added, "changed", sum.changed, "removed", sum.removed,
		"invalid", invalid, "conflicts", t.conflicts)
	for _, c := range all {
		for _, bad := range c.newExamples {
			ts.log.Warn("override rejected", "source", c.id.String(), "source_version", c.version,
				"namespace", bad.namespace, "value", bad.Value,
				"expected", bad.Expected, "in_force", bad.InForce)
		}
		if c.newlyRejected > maxExamples {
			ts.log.Warn("more overrides rejected",
				"source", c.id.String(), "count", c.newlyRejected-maxExamples)
		}
	}
}

// writeMetrics writes the newest table, if there is one.
func (ts *tableStore) writeMetrics(m metricsWriter) {
	m.single("router_table_updates_total", "counter", "Routing tables that the router has made, because overrides, backends or the cordon changed.",
		float64(ts.swaps.Load()))
	ts.applyDurations.write(m, "router_table_apply_duration_seconds",
		"How long it took to make a routing table.")
	t := ts.table()
	if t == nil {
		return
	}
	m.single("router_table_info", "gauge",
		"Always 1. The labels have the source of the newest routing table, the version of its overrides, and its stamp.",
		1, "source", t.sourceName(), "overrides_version", t.overridesVersion, "stamp", t.stamp)
	m.single("router_table_updated_timestamp_seconds", "gauge",
		"When the newest routing table was made, in seconds since 1970.",
		unixSeconds(t.updated))
	m.single("router_table_overrides", "gauge", "Namespaces whose owner is not given by the hash.", float64(t.overrides))
	m.single("router_table_backends", "gauge", "Backends that the table has, also the cordoned ones.",
		float64(t.backends.count))
	m.single("router_table_cordoned_backends", "gauge",
		"Backends that get no namespaces by the hash, as they are cordoned.",
		float64(len(t.cordon)))
	if len(t.sources) > 0 {
		m.family("router_table_invalid_overrides", "gauge",
			"Overrides that are not in force because they are invalid, by source.")
	}
	for i, src := range t.sources {
		m.sample("router_table_invalid_overrides", float64(t.invalid[i]),
			"source", src.id.String())
	}
	m.single("router_table_conflicts", "gauge",
		"Namespaces to which sources give different backends.", float64(t.conflicts))
}
