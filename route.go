package main

import (
	"fmt"
	"hash/fnv"
	"iter"
	"slices"
	"strings"
	"time"
)

// What an owner may be if it is not the ordinal of a backend. The first three are part of a table's
// stamp, so they never change.
const (
	byHash        = -1 // the hash gives the owner, as without an override
	unresolved    = -2 // there is no owner, or this router may serve none (invariant 3)
	invalidValue  = -3 // the override's value names no existing backend
	ownerNotKnown = -5 // a table that this router does not have gives the owner: any backend; -4 is queueHeld
)

// The reasons why a namespace has its owner, as /owner gives them.
const (
	whyOverride   = "override"   // an override names it
	whyHash       = "hash"       // there is no override
	whyCordoned   = "cordoned"   // there is none, and the backend of its hash is cordoned
	whyPrevious   = "previous"   // it keeps its previous owner: an override is invalid
	whyConflict   = "conflict"   // it keeps its previous owner: overrides disagree
	whyUnresolved = "unresolved" // it would keep its previous owner, which is not known or was scaled in: 503
)

// sourceID identifies an object that holds overrides, such as a ConfigMap or a directory.
type sourceID struct {
	kind          string // "ConfigMap", "directory", or that of another source
	kubeNamespace string // the Kubernetes namespace of a ConfigMap; "" for all others
	name          string // the ConfigMap's name, or the directory's path
}

// String returns the name that people read: "ConfigMap edge/overwriting", "directory /d".
func (id sourceID) String() string {
	switch id.kind {
	case "":
		return id.name
	case "ConfigMap":
		return id.kind + " " + id.kubeNamespace + "/" + id.name
	}
	return id.kind + " " + id.name
}

// sourceContent is the content of one object that holds overrides, at one moment.
type sourceContent struct {
	id        sourceID
	object    apiObject    // the ConfigMap; zero for other sources
	version   string       // the ConfigMap's resourceVersion, or another text that changes with the overrides
	overrides *overrideSet // never nil
}

// table maps each namespace to its owner. It is immutable: an update makes a new one.
// Its methods take no lock, and ownerOf does not allocate (invariant 1).
type table struct {
	statefulSet      string          // the part of a backend's name before "-" and its ordinal
	fromHost         bool            // a namespace is the first label of a host name
	backends         ordinalRange    // at least one
	listedCordon     cordon          // the whole list
	cordon           cordon          // of it, what is in force: see cordon.among
	cordoned         []bool          // for each of backends, whether cordon has it; nil for none
	updated          time.Time       // when it became the newest; zero for others
	specID           string          // of the StatefulSet when backends changed; "" if not known
	sources          []sourceContent // in the order in which they are merged
	overridesVersion string          // of the only source, or a hash of all versions; for people
	stamp            string          // ownersHash.keptHash, each as 16 hexadecimal digits

	// Routers with the same ownersHash have the same owners, except for kept
	// namespaces; with the same keptHash, for these too.
	//
	// ownersHash is a hash of the overrides (an ordinal for each namespace, or that it
	// is kept), of the backends, of the cordon, and of hashVersion. How and where an
	// override is written does not count. Nor does the resourceVersion: after a restore, two
	// different versions of a ConfigMap can have the same. An override counts also if it names
	// the owner that the hash gives, since with other backends it would not. keptHash is a
	// hash of the owners of the kept namespaces.
	ownersHash, keptHash uint64

	// The sets of index are those of sources, and two more with kept namespaces:
	// one for invalid overrides, one for conflicts. A kept namespace keeps its previous
	// owner.
	index         overrideIndex
	valueOrdinals [][]int32 // for each set of index, the ordinal of each of its values
	overrides     int       // namespaces whose owner is not given by the hash
	invalid       []int     // for each source, its invalid overrides
	conflicts     int       // namespaces whose overrides name different backends
}

// newTable merges the sources. A namespace keeps its owner in old if an override
// of it is invalid, or if two sources give it different backends. Without old it is
// unresolved, and not hashed, since another router may know a valid override. All other
// overrides apply (invariant 3).
func newTable(statefulSet string, fromHost bool, backends ordinalRange, listedCordon cordon,
	sources []sourceContent, old *table) *table {
	t := &table{
		statefulSet: statefulSet, fromHost: fromHost, backends: backends, listedCordon: listedCordon,
		sources: sources, overridesVersion: versionOf(sources),
		invalid: make([]int, len(sources)),
	}
	var sets []*overrideSet
	count := 0
	for _, src := range sources {
		sets = append(sets, src.overrides)
		t.valueOrdinals = append(t.valueOrdinals, t.resolveValues(src.overrides))
		count += src.overrides.count
	}
	ordinals := []int32{unresolved, byHash} // of the two sets of kept namespaces
	for i := range t.backends.count {
		ordinals = append(ordinals, int32(t.backends.first+i))
	}
	t.valueOrdinals = append(t.valueOrdinals, ordinals, ordinals)
	t.index = newOverrideIndex(append(sets, &overrideSet{}, &overrideSet{}), count)
	t.setCordon()
	t.mergeSources(old)
	hashed := fmt.Sprintf("hash %d, backends %s", hashVersion, t.backends)
	if t.cordon != nil {
		hashed += ", cordon " + t.cordon.String()
	}
	t.ownersHash = fmix64(t.ownersHash + hash64(hashed))
	t.finishStamp()
	return t
}

// setCordon sets cordon and cordoned to the part of listedCordon that is in force.
func (t *table) setCordon() {
	if t.cordon, _ = t.listedCordon.among(t.backends); t.cordon == nil {
		return
	}
	t.cordoned = make([]bool, t.backends.count)
	for _, ordinal := range t.cordon {
		t.cordoned[ordinal-t.backends.first] = true
	}
}

// finishStamp sets stamp, once ownersHash and the sum in keptHash are complete.
func (t *table) finishStamp() {
	t.keptHash = fmix64(t.keptHash)
	t.stamp = fmt.Sprintf("%016x.%016x", t.ownersHash, t.keptHash)
}

// weight returns the weight of an ordinal in ownersHash and keptHash. These are sums
// of hash64(namespace) × weight over namespaces, so that the sum of a source is known
// once its set is built, except for the namespaces that it shares with other sources.
//
// hash64 is as good as random. Two contents differ by the sum of hash64 × the difference
// of two weights, over some namespaces. So they have the same sum only by accident, once
// in 2^(64-k) times, where 2^k divides all these differences. The weight is 0 for a
// namespace that only one of both has; the others are consecutive odd numbers. So k is 0
// in that case, otherwise mostly 1 or 2, and at most 14 with 10,000 backends.
func weight(ordinal int) uint64 { return uint64(2*(ordinal-invalidValue) + 1) }

// versionOf returns the version of the only source, or a hash of the names and versions
// of all: a text for people.
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

// resolveValues returns the ordinals of the set's values. It adds the set's overrides to
// ownersHash as if all were in force and in no other source.
func (t *table) resolveValues(set *overrideSet) (ordinals []int32) {
	for i, value := range set.values {
		ordinal, ok := t.ordinal(value)
		if !ok {
			ordinal = invalidValue
		}
		ordinals = append(ordinals, int32(ordinal))
		t.ownersHash += set.hashSums[i] * weight(ordinal)
	}
	return ordinals
}

// mergeSources adds the overrides of all sources: first the overrides in one range of hashes,
// of each source, then the overrides in the next range. The index slots of one range stay in
// the CPU's cache, which halves the time for a million overrides of 30 sources. Only newTable
// calls it.
func (t *table) mergeSources(old *table) {
	const ranges = 64
	offsets := make([]uint32, len(t.sources))
	for n := range uint64(ranges) {
		for i, src := range t.sources {
			for r := range src.overrides.rangeBelow((n+1)<<32/ranges, &offsets[i]) {
				t.addOverride(i, r, old)
			}
		}
	}
}

// addOverride adds one override of the i-th source. resolveValues has already added it to
// ownersHash; addOverride corrects that if the namespace has another override too, or if
// this one is not valid. Only mergeSources calls it.
func (t *table) addOverride(i int, r override, old *table) {
	ordinal := int(t.valueOrdinals[i][r.valueIndex])
	if t.isInvalidName(r) {
		t.invalid[i]++
		t.ownersHash -= hash64(r.namespace) * weight(ordinal)
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
		t.invalid[i]++
		if !t.isKept(s) {
			t.keepPrevious(s, len(t.sources), r, old)
		}
	case !t.isKept(s) && t.ordinalOf(s) != ordinal:
		t.conflicts++
		t.keepPrevious(s, len(t.sources)+1, r, old)
	}
	t.ownersHash += hash64(r.namespace) * (t.contribution(s) - before - weight(ordinal))
}

// contribution returns the weight in ownersHash of the namespace of the slot.
func (t *table) contribution(s *indexSlot) uint64 {
	switch {
	case s.set == 0:
		return 0
	case t.isKept(s):
		return weight(invalidValue)
	}
	return weight(t.ordinalOf(s))
}

// isInvalidName reports whether r has a key of no namespace, or no request can have that.
func (t *table) isInvalidName(r override) bool {
	return r.invalidFor == invalidForPath || r.invalidFor == invalidForHost && t.fromHost
}

// keepPrevious gives the namespace of r to the owner that it had in old, or to none: it
// adds an override to the index's set with that number, and makes s point to it. An owner that the
// hash gave stays the owner, also if the hash of t gives another one.
func (t *table) keepPrevious(s *indexSlot, set int, r override, old *table) {
	ordinal, hash := unresolved, hash64(r.namespace)
	if old != nil {
		ordinal = old.ordinalOf(findSlot(&old.index, r.namespace, r.hash))
	}
	if ordinal == byHash {
		ordinal = old.hashOwner(hash)
	}
	ordinal = t.keptOrdinal(ordinal, hash)
	if s.set == 0 {
		t.overrides++
	}
	if ordinal == byHash {
		t.overrides--
	}
	*s = indexSlot{t.addKept(set, r, ordinal), uint16(set + 1), uint16(r.hash)}
}

// keptOrdinal returns what t has of a kept namespace with this hash64 and this previous owner.
func (t *table) keptOrdinal(previous int, hash uint64) int {
	switch {
	case !t.backends.has(previous):
		return unresolved
	case previous == t.hashOwner(hash):
		return byHash
	}
	return previous
}

// addKept adds r to the set of kept namespaces with that number, with this ordinal, and
// returns its offset there.
func (t *table) addKept(set int, r override, ordinal int) (offset uint32) {
	t.keptHash += hash64(r.namespace) * weight(ordinal)
	r.valueIndex = uint32(slices.Index(t.valueOrdinals[set], int32(ordinal)))
	return t.index.sets[set].appendOverride(r)
}

// ordinalOf returns the ordinal that the slot points to, byHash or unresolved.
func (t *table) ordinalOf(s *indexSlot) int {
	if s.set == 0 {
		return byHash
	}
	return int(t.valueOrdinals[s.set-1][t.index.overrideAt(s).valueIndex])
}

// isKept reports whether the namespace of the slot keeps its previous owner.
func (t *table) isKept(s *indexSlot) bool { return int(s.set) > len(t.sources) }

// ownerOf returns the ordinal of the backend to which t gives the namespace; who owns it now, a
// view says. ok is false if the namespace is unresolved.
func (t *table) ownerOf(namespace string) (ordinal int, ok bool) {
	ordinal, _ = t.lookup(namespace, hash64(namespace))
	return ordinal, ordinal != unresolved
}

// hashOwner returns the ordinal of the backend that the hash gives to a namespace with
// this hash64.
func (t *table) hashOwner(hash uint64) int {
	b := jump(hash, t.backends.count)
	if t.cordoned != nil && t.cordoned[b] {
		b = bucketPast(hash, t.cordoned)
	}
	return t.backends.first + b
}

// isHashedTo reports whether the hash gives the backend namespaces.
func (t *table) isHashedTo(ordinal int) bool {
	return t.backends.has(ordinal) &&
		(t.cordoned == nil || !t.cordoned[ordinal-t.backends.first])
}

// uncordonedOwner returns the ordinal that the hash would give to the namespace if nothing
// was cordoned. ok is false if it is not cordoned.
func (t *table) uncordonedOwner(namespace string) (ordinal int, ok bool) {
	b := bucket(namespace, t.backends.count)
	return t.backends.first + b, t.cordoned != nil && t.cordoned[b]
}

// lookup returns the owner of a namespace with this hash64, unresolved if it has none, and
// whether the namespace is kept.
func (t *table) lookup(namespace string, hash uint64) (ordinal int, kept bool) {
	s := findSlot(&t.index, namespace, upper32(hash))
	if ordinal = t.ordinalOf(s); ordinal == byHash {
		ordinal = t.hashOwner(hash)
	}
	return ordinal, t.isKept(s)
}

// withKept returns a table like t in which each kept namespace has the owner that previous
// returns, which may be unresolved.
func (t *table) withKept(previous func(namespace string) int) *table {
	next := *t
	next.keptHash = 0
	next.index.sets = slices.Clone(t.index.sets)
	for set := len(t.sources); set < len(next.index.sets); set++ {
		old := t.index.sets[set]
		next.index.sets[set] = &overrideSet{}
		for r := range old.all() {
			ordinal := t.keptOrdinal(previous(string(r.namespace)), hash64(r.namespace))
			if t.valueOrdinals[set][r.valueIndex] == byHash {
				next.overrides++
			}
			if ordinal == byHash {
				next.overrides--
			}
			next.addKept(set, r, ordinal)
		}
	}
	next.finishStamp()
	return &next
}

// withPrevious is withKept, or returns t itself if previous is nil.
func (t *table) withPrevious(previous func(namespace string) int) *table {
	if previous == nil {
		return t
	}
	return t.withKept(previous)
}

// overrideOrdinal returns the ordinal that t's override gives to the namespace of r,
// byHash if t has none, or unresolved.
func (t *table) overrideOrdinal(r override) int {
	if t.isInvalidName(r) {
		return byHash
	}
	return t.ordinalOf(findSlot(&t.index, r.namespace, r.hash))
}

// explain returns the reason why the namespace has its owner: one of the why constants.
func (t *table) explain(namespace string) string {
	s := findSlot(&t.index, namespace, upper32(hash64(namespace)))
	switch {
	case s.set == 0:
		if _, ok := t.uncordonedOwner(namespace); ok {
			return whyCordoned
		}
		return whyHash
	case t.ordinalOf(s) == unresolved:
		return whyUnresolved
	case !t.isKept(s):
		return whyOverride
	case int(s.set) == len(t.sources)+1:
		return whyPrevious
	}
	return whyConflict
}

// sourceOf returns the source whose override gives the namespace its owner, nil for none.
func (t *table) sourceOf(namespace string) *sourceContent {
	s := findSlot(&t.index, namespace, upper32(hash64(namespace)))
	if s.set == 0 || t.isKept(s) {
		return nil
	}
	return &t.sources[s.set-1]
}

// sourcesWith returns the names of the sources that have an override of the namespace, valid
// or not. If there are several sources, it looks at all of their overrides.
func (t *table) sourcesWith(namespace string) (all []string) {
	hash := upper32(hash64(namespace))
	if findSlot(&t.index, namespace, hash).set == 0 {
		return nil
	}
	has := func(overrides *overrideSet) bool {
		for r := range overrides.all() {
			if r.hash == hash && string(r.namespace) == namespace && !t.isInvalidName(r) {
				return true
			}
		}
		return false
	}
	for i := range t.sources {
		if len(t.sources) == 1 || has(t.sources[i].overrides) {
			all = append(all, t.sources[i].id.String())
		}
	}
	return all
}

// unresolvedNamespaces returns the namespaces that have no owner because their overrides are
// not valid, or disagree.
func (t *table) unresolvedNamespaces() iter.Seq[string] {
	return func(yield func(string) bool) {
		for set := len(t.sources); set < len(t.index.sets); set++ {
			for r := range t.index.sets[set].all() {
				if t.valueOrdinals[set][r.valueIndex] == unresolved && !yield(string(r.namespace)) {
					return
				}
			}
		}
	}
}

// rejection describes an override that is not in force as written, and the owner that
// its namespace has instead.
type rejection struct {
	namespace string // or the key, if it is that of no namespace
	Source    string `json:"source"`        // sourceID.String
	Value     string `json:"value"`         // cut to maxQuotedValue bytes
	Expected  string `json:"expected"`      // which values, or keys, would be valid
	InForce   string `json:"in_force"`      // its owner, "hash", "unresolved" or "none"
	Key       string `json:"key,omitempty"` // of an override whose key is not valid
}

// String returns the text of a rejected override for people:
// `ns-01: "bakend-2", expected backend-0 to backend-3`.
func (r rejection) String() string {
	return fmt.Sprintf("%s: %q, expected %s", showNamespace(r.namespace), r.Value, r.Expected)
}

// maxQuotedValue is how many bytes of a rejected value are shown: a value may be 1 MiB of
// anything.
const maxQuotedValue = 64

// rejections returns the rejected overrides of the i-th source.
func (t *table) rejections(i int) iter.Seq[rejection] {
	return func(yield func(rejection) bool) {
		if t.invalid[i] == 0 && t.conflicts == 0 {
			return
		}
		for r := range t.sources[i].overrides.all() {
			if bad, ok := t.rejectionOf(i, r); ok && !yield(bad) {
				return
			}
		}
	}
}

// rejectionsOf returns the rejected overrides of the namespace in all sources. It includes
// keys that are not valid and mean the namespace: those with escapes that need not be, and
// those that equal the namespace, if namespaces come from host names, except in case.
// It reads all overrides: it is for operators, not for requests.
func (t *table) rejectionsOf(namespace string) (all []rejection) {
	for i := range t.sources {
		if t.invalid[i] == 0 && t.conflicts == 0 {
			continue
		}
		for r := range t.sources[i].overrides.all() {
			if !t.means(r, namespace) {
				continue
			}
			if bad, ok := t.rejectionOf(i, r); ok {
				all = append(all, bad)
			}
		}
	}
	return all
}

// means reports whether r is an override of the namespace, or an invalid one that may have
// been meant for it.
func (t *table) means(r override, namespace string) bool {
	return string(r.namespace) == namespace ||
		t.fromHost && strings.EqualFold(string(r.namespace), namespace) ||
		r.invalidFor == invalidForPath &&
			string(decodeEscapes(r.namespace, keyEscape)) == namespace
}

// rejectionOf returns the rejection of an override of the i-th source. ok is false if it is
// not rejected.
func (t *table) rejectionOf(i int, r override) (bad rejection, ok bool) {
	s := findSlot(&t.index, r.namespace, r.hash)
	bad = rejection{
		namespace: string(r.namespace), Source: t.sources[i].id.String(), InForce: "none",
	}
	invalid := t.isInvalidName(r)
	switch {
	case invalid:
		bad.Key = r.key()
		bad.Expected = expectedKey(bad.Key, t.fromHost)
	case t.valueOrdinals[i][r.valueIndex] == invalidValue:
		last := t.backends.first + t.backends.count - 1
		bad.Expected = t.name(t.backends.first) + " to " + t.name(last)
	case int(s.set) == len(t.sources)+2:
		bad.Expected = "the same backend in all sources"
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
		bad.InForce = whyHash
	case ordinal == unresolved:
		bad.InForce = whyUnresolved
	default:
		bad.InForce = t.name(ordinal)
	}
	return bad, true
}

// name returns the name of the backend with this ordinal.
func (t *table) name(ordinal int) string { return backendName(t.statefulSet, ordinal) }

// ordinal returns the ordinal in a backend's name. ok is false if there is no such
// backend.
func (t *table) ordinal(name string) (ordinal int, ok bool) {
	ordinal, ok = backendOrdinal(t.statefulSet, name)
	return ordinal, ok && t.backends.has(ordinal)
}
