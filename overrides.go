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
	"unicode/utf8"
)

const (
	maxStoredBytes      = 255       // longer keys, which are invalid, are cut
	maxValueBytes       = 300       // longer values are cut; a backend's name is shorter
	maxSources          = 1<<16 - 4 // indexSlot.set has 16 bits, and a table adds two sets
	overrideHeaderBytes = 9         // bytes of a stored override before its namespace

	// Values of override.invalidFor; 0 is a namespace that is valid for both.
	invalidForHost = 1 // no host name has this namespace, but a path may
	invalidForPath = 2 // the key is that of no namespace, and is stored in its place

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
	namespace   []byte // a part of data; the key as it is written if invalidForPath
}

// newOverrideSet returns the set of the overrides in data, whose keys are those of a ConfigMap:
// the caller makes them by namespaceKey if it has plain names.
func newOverrideSet(data map[string]string) *overrideSet {
	b := newSetBuilder()
	for _, key := range slices.Sorted(maps.Keys(data)) {
		b.add([]byte(key), []byte(data[key]))
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
			key, rest, _ := cutJSONString(b)
			value, rest, err := cutJSONString(bytes.TrimLeft(rest, between))
			if err != nil {
				return err
			}
			if size += entryOverhead + len(key) + len(value); size > maxConfigMapData {
				return fmt.Errorf("more than %d bytes in names and values", maxConfigMapData)
			}
			all.add(key, value)
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

// add adds the override of the namespace that has this key. It removes white space around
// the value, since a file may end with a newline.
func (b *setBuilder) add(key, value []byte) {
	value = bytes.TrimSpace(value)
	value = value[:min(maxValueBytes, len(value))]
	valueIndex, ok := b.valueIndexes[string(value)]
	if !ok {
		valueIndex = uint32(len(b.values))
		b.values, b.hashSums = append(b.values, string(value)), append(b.hashSums, 0)
		b.valueIndexes[b.values[valueIndex]] = valueIndex
	}
	namespace, invalid := overrideNamespace(key)
	hash := hash64(namespace)
	b.hashSums[valueIndex] += hash
	offset := b.appendOverride(override{
		hash: upper32(hash), valueIndex: valueIndex, invalidFor: invalid, namespace: namespace,
	})
	b.sortKeys = append(b.sortKeys, uint64(upper32(hash))<<32|uint64(offset))
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

// overrideNamespace returns override.namespace and override.invalidFor of a key.
func overrideNamespace(key []byte) (namespace []byte, invalidFor uint32) {
	namespace, ok := keyNamespace(key)
	switch {
	case ok && isHostNamespace(namespace):
		return namespace, 0
	case ok && isPathNamespace(namespace):
		return namespace, invalidForHost
	}
	return key[:min(maxStoredBytes, len(key))], invalidForPath
}

// compare orders overrides by their hash, then by their namespace. An invalid key may be
// the same text as a namespace, which has another key.
func (r override) compare(other override) int {
	if r.hash != other.hash {
		return cmp.Compare(r.hash, other.hash)
	}
	return cmp.Or(bytes.Compare(r.namespace, other.namespace),
		cmp.Compare(r.invalidFor, other.invalidFor))
}

// key returns the key of the override, cut to maxStoredBytes.
func (r override) key() string {
	if r.invalidFor == invalidForPath {
		return string(r.namespace)
	}
	return namespaceKey(string(r.namespace))
}

// upper32 returns the part of a hash64 that orders overrides and chooses a slot.
func upper32(hash uint64) uint32 { return uint32(hash >> 32) }

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
