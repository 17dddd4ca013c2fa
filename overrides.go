package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"
)

const (
	maxNamespaceBytes   = 255       // longer keys are cut; a valid namespace has at most 253
	maxValueBytes       = 300       // longer values are cut; a backend's name is shorter
	maxSources          = 1<<16 - 4 // indexSlot.set has 16 bits, and a table adds two sets
	overrideHeaderBytes = 9         // bytes of a stored override before its namespace

	// Values of override.invalidFor; 0 is a namespace that is valid for both.
	invalidForHost = 1 // no host name has this namespace, but a path may
	invalidForPath = 2 // neither a host name nor a path has this namespace

	invalidForShift = 30 // invalidFor is stored in the two bits above valueIndex
)

// overrideSet stores the overrides of one source in one piece of memory. Each of a
// million overrides takes 10 bytes and its namespace; a map of strings takes 150. They
// are in the order of their hashes, so that an index of several sets is filled from its
// start to its end, which the CPU's cache favours. A set is immutable once it is built.
type overrideSet struct {
	// For each override: its hash (4 bytes, little endian), invalidFor and valueIndex
	// (4 bytes together, little endian), the length of its namespace (1 byte), and the
	// namespace.
	data     []byte
	values   []string // distinct
	hashSums []uint64 // for each value, the sum of hash64 of the namespaces that have it
	count    int      // number of overrides
}

// override is one override of an overrideSet: a namespace, and the backend's name as
// its value.
type override struct {
	offset, end uint32 // where it begins and ends in data
	hash        uint32 // upper32 of the namespace's hash64
	valueIndex  uint32 // index into values
	invalidFor  uint32 // 0, invalidForHost or invalidForPath
	namespace   []byte // a part of data
}

// newOverrideSet returns the set of the overrides in data, whose keys are namespaces.
func newOverrideSet(data map[string]string) *overrideSet {
	b := newSetBuilder()
	for _, namespace := range slices.Sorted(maps.Keys(data)) {
		b.add([]byte(namespace), []byte(data[namespace]))
	}
	return b.build()
}

// maxConfigMapData bounds the data of one ConfigMap: the bytes of its keys and values,
// and entryOverhead bytes for each entry, as in the API server's protobuf. etcd accepts
// at most 1.5 MiB (--max-request-bytes).
const (
	maxConfigMapData = 2 << 20
	entryOverhead    = 6
)

// UnmarshalJSON reads a JSON object whose values are strings. encoding/json has already
// checked that b is valid JSON. A map of 40,000 entries in between would take most of
// the time from an edit to the new table.
func (s *overrideSet) UnmarshalJSON(b []byte) error {
	const between = " \t\r\n,:"
	all, size := newSetBuilder(), 0
	switch b[0] {
	case 'n': // null
	case '{':
		for b = bytes.TrimLeft(b[1:], between); b[0] != '}'; b = bytes.TrimLeft(b, between) {
			namespace, rest, _ := cutJSONString(b)
			value, rest, err := cutJSONString(bytes.TrimLeft(rest, between))
			if err != nil {
				return err
			}
			if size += entryOverhead + len(namespace) + len(value); size > maxConfigMapData {
				return fmt.Errorf("more than %d bytes in names and values", maxConfigMapData)
			}
			all.add(namespace, value)
			b = rest
		}
	default:
		return json.Unmarshal(b, new(map[string]string)) // its error
	}
	*s = *all.build()
	return nil
}

// cutJSONString decodes the JSON string that b begins with, and returns the rest of b
// after it. It returns an error if b begins with another JSON value.
func cutJSONString(b []byte) (text, rest []byte, err error) {
	if b[0] != '"' {
		var s string
		err = json.NewDecoder(bytes.NewReader(b)).Decode(&s)
		null := &json.UnmarshalTypeError{Value: "null", Type: reflect.TypeFor[string]()}
		return nil, nil, cmp.Or(err, error(null))
	}
	end := 1
	for b[end] != '"' {
		if b[end] == '\\' {
			end++
		}
		end++
	}
	text, rest = b[1:end], b[end+1:]
	if bytes.IndexByte(text, '\\') >= 0 || !utf8.Valid(text) {
		var s string
		err = json.Unmarshal(b[:end+1], &s)
		text = []byte(s)
	}
	return text, rest, err
}

// setBuilder builds an overrideSet. Its memory is in proportion to the namespaces and
// values that were added, not to the JSON that they come from.
type setBuilder struct {
	overrideSet                    // the overrides in the order of add
	sortKeys     []uint64          // of each override: hash<<32 | offset
	valueIndexes map[string]uint32 // from a value to its index in values
}

func newSetBuilder() *setBuilder { return &setBuilder{valueIndexes: map[string]uint32{}} }

// add adds an override. It removes white space around the value, since a file may end
// with a newline.
func (b *setBuilder) add(namespace, value []byte) {
	value = bytes.TrimSpace(value)
	value = value[:min(maxValueBytes, len(value))]
	valueIndex, ok := b.valueIndexes[string(value)]
	if !ok {
		valueIndex = uint32(len(b.values))
		b.values, b.hashSums = append(b.values, string(value)), append(b.hashSums, 0)
		b.valueIndexes[b.values[valueIndex]] = valueIndex
	}
	invalid := invalidFor(namespace)
	namespace = namespace[:min(maxNamespaceBytes, len(namespace))]
	key := hash64(namespace)
	b.hashSums[valueIndex] += key
	offset := b.appendOverride(override{
		hash: upper32(key), valueIndex: valueIndex, invalidFor: invalid, namespace: namespace,
	})
	b.sortKeys = append(b.sortKeys, uint64(upper32(key))<<32|uint64(offset))
}

// build returns the set. The builder must not be used afterwards. It sorts numbers,
// which is faster than to sort overrides.
func (b *setBuilder) build() *overrideSet {
	slices.Sort(b.sortKeys)
	ith := func(i int) override { return b.overrideAt(uint32(b.sortKeys[i])) }
	set := &overrideSet{
		data: make([]byte, 0, len(b.data)), values: b.values, hashSums: b.hashSums,
		count: len(b.sortKeys),
	}
	for i := range b.sortKeys { // order those of the same hash by their namespace
		for j := i; j > 0 && ith(j).compare(ith(j-1)) < 0; j-- {
			b.sortKeys[j], b.sortKeys[j-1] = b.sortKeys[j-1], b.sortKeys[j]
		}
	}
	for i := range b.sortKeys {
		set.appendOverride(ith(i))
	}
	return set
}

// compare orders overrides by their hash, then by their namespace.
func (r override) compare(other override) int {
	if r.hash != other.hash {
		return cmp.Compare(r.hash, other.hash)
	}
	return bytes.Compare(r.namespace, other.namespace)
}

// upper32 returns the part of a hash64 that orders overrides and chooses a slot.
func upper32(key uint64) uint32 { return uint32(key >> 32) }

// appendOverride appends an override to a set that is not in use yet, and returns its
// offset. r.valueIndex is an index into s.values; r.offset and r.end are ignored.
func (s *overrideSet) appendOverride(r override) (offset uint32) {
	offset = uint32(len(s.data))
	s.data = binary.LittleEndian.AppendUint32(s.data, r.hash)
	packed := r.invalidFor<<invalidForShift | r.valueIndex
	s.data = binary.LittleEndian.AppendUint32(s.data, packed)
	s.data = append(s.data, byte(len(r.namespace)))
	s.data = append(s.data, r.namespace...)
	return offset
}

// overrideAt returns the override that begins at the offset. Its namespace is a part of
// s.data.
func (s *overrideSet) overrideAt(offset uint32) override {
	b := s.data[offset:]
	length := overrideHeaderBytes + uint32(b[overrideHeaderBytes-1])
	packed := binary.LittleEndian.Uint32(b[4:])
	return override{
		offset: offset, end: offset + length, namespace: b[overrideHeaderBytes:length],
		hash:       binary.LittleEndian.Uint32(b),
		valueIndex: packed & (1<<invalidForShift - 1), invalidFor: packed >> invalidForShift,
	}
}

// all returns the overrides of s in order.
func (s *overrideSet) all() iter.Seq[override] { return s.rangeBelow(1<<32, new(uint32)) }

// rangeBelow returns, in order, the overrides from offset on whose hash is below end. It
// advances offset, so the sequence can be read once.
func (s *overrideSet) rangeBelow(end uint64, offset *uint32) iter.Seq[override] {
	return func(yield func(override) bool) {
		for *offset < uint32(len(s.data)) {
			r := s.overrideAt(*offset)
			if uint64(r.hash) >= end {
				return
			}
			*offset = r.end
			if !yield(r) {
				return
			}
		}
	}
}

// value returns the value of r, which must be an override of s.
func (s *overrideSet) value(r override) string { return s.values[r.valueIndex] }

// equal reports whether s and other have the same overrides. It may return false for
// equal sets whose overrides were added in different orders.
func (s *overrideSet) equal(other *overrideSet) bool {
	return s == other ||
		bytes.Equal(s.data, other.data) && slices.Equal(s.values, other.values)
}

// differences returns, in order, one override for each namespace to which s and other
// do not give the same value; if all is true, for each namespace of both.
func (s *overrideSet) differences(other *overrideSet, all bool) iter.Seq[override] {
	return func(yield func(override) bool) {
		for i, j := uint32(0), uint32(0); int(i) < len(s.data) || int(j) < len(other.data); {
			var mine, others override
			order := 0
			switch {
			case int(i) == len(s.data):
				others, order = other.overrideAt(j), 1
			case int(j) == len(other.data):
				mine, order = s.overrideAt(i), -1
			default:
				mine, others = s.overrideAt(i), other.overrideAt(j)
				order = mine.compare(others)
			}
			differs := all || order != 0 || s.value(mine) != other.value(others)
			one := mine
			if order <= 0 {
				i = mine.end
			}
			if order >= 0 {
				j, one = others.end, others
			}
			if differs && !yield(one) {
				return
			}
		}
	}
}

// overrideIndex finds namespaces in several sets. It is a hash table with open
// addressing. A lookup reads a few adjacent slots and one override. A new table needs
// new slots only, of 8 bytes each.
type overrideIndex struct {
	sets  []*overrideSet
	slots []indexSlot // at least a third of them are empty
}

// indexSlot points to an override. It is at the position that the namespace's hash
// gives, or in the next free slot after it.
type indexSlot struct {
	offset      uint32 // of the override in its set
	set         uint16 // index into sets, plus 1; 0 is an empty slot
	fingerprint uint16 // lower half of override.hash
}

// newOverrideIndex returns an empty index of the sets, with room for n namespaces.
func newOverrideIndex(sets []*overrideSet, n int) overrideIndex {
	return overrideIndex{sets: sets, slots: make([]indexSlot, n+n/2+1)}
}

// findSlot returns the slot of the namespace, whose override.hash is hash, or the empty
// slot where it belongs.
func findSlot[S string | []byte](index *overrideIndex, namespace S, hash uint32) *indexSlot {
	i := uint64(hash) * uint64(len(index.slots)) >> 32
	for {
		s := &index.slots[i]
		if s.set == 0 || s.fingerprint == uint16(hash) &&
			string(index.overrideAt(s).namespace) == string(namespace) {
			return s
		}
		if i++; i == uint64(len(index.slots)) {
			i = 0
		}
	}
}

// overrideAt returns the override that s points to. s must not be empty.
func (index *overrideIndex) overrideAt(s *indexSlot) override {
	return index.sets[s.set-1].overrideAt(s.offset)
}

// invalidFor returns override.invalidFor of a namespace.
func invalidFor(namespace []byte) uint32 {
	switch {
	case isHostNamespace(namespace):
		return 0
	case isPathNamespace(namespace):
		return invalidForHost
	}
	return invalidForPath
}

// expectedPathNamespace says what a namespace of a path must be, or "" if this one is valid.
func expectedPathNamespace(s string) string {
	if isPathNamespace(s) {
		return ""
	}
	return "a namespace of 1 to 253 characters of [-._a-zA-Z0-9] other than \".\" and \"..\""
}

// expectedHostNamespace says what a namespace of a host name must be, or "" if this one,
// in lower case, is valid.
func expectedHostNamespace(s string) string {
	if isHostNamespace(s) {
		return ""
	}
	return "a namespace of 1 to 63 characters of [-_a-z0-9], " +
		"the first label of a host name in lower case"
}

// isPathNamespace reports whether a path can have the namespace. The characters and
// the length are those of a ConfigMap's keys, so that each namespace can have an
// override, except those that overrideKeyFault names. "." and ".." would be dot segments
// of a path (RFC 3986 §3.3).
func isPathNamespace[S string | []byte](s S) bool {
	if len(s) == 0 || len(s) > 253 || string(s) == "." || string(s) == ".." {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; !isHostNamespaceByte(c) && c != '.' && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

// isHostNamespace reports whether a host name can have the namespace as its first label.
// A label has 1 to 63 bytes (RFC 1035 §2.3.4) and no dot. It must be in lower case,
// since host names ignore case (RFC 4343). DNS allows an underscore (RFC 2181 §11), and
// browsers send it.
func isHostNamespace[S string | []byte](s S) bool {
	for i := 0; i < len(s); i++ {
		if !isHostNamespaceByte(s[i]) {
			return false
		}
	}
	return 1 <= len(s) && len(s) <= 63
}

func isHostNamespaceByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

// overrideKeyFault says why a namespace can have no override, or "" if it can. A
// ConfigMap's keys cannot begin with two dots, because the kubelet has files with such
// names in a directory where a ConfigMap is mounted
// (https://kubernetes.io/docs/concepts/configuration/configmap/).
func overrideKeyFault(namespace string) string {
	if strings.HasPrefix(namespace, "..") {
		return "it cannot have an override: no key of a ConfigMap begins with two dots"
	}
	return ""
}
