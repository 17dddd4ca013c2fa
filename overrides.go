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
	maxNamespaceBytes   = 255       // bytes that are kept of a namespace; 253 are the most that one may have
	maxValueBytes       = 300       // bytes that are kept of a value; a name of a backend has fewer
	maxSources          = 1<<16 - 4 // parts in an index, and two that a table adds
	overrideHeaderBytes = 9         // bytes of a record before its namespace

	invalidForHost, invalidForPath = 1, 2 // of override.invalidFor: the name cannot be the namespace of a host, or not of a path either
	invalidForShift                = 30   // where a record has odd, above which
)

// overrideSet is what one source of overrides holds, in one piece of memory: a million
// entries take 10 bytes each and the namespace, and 150 as a map of strings. They
// are in the order of their hashes: so an index of several is made from its
// begin to its end, not here and there. It is immutable.
type overrideSet struct {
	data     []byte   // of each entry: hash, odd and which (4 bytes each, little endian), len(namespace) (1 byte), namespace
	values   []string // distinct
	hashSums []uint64 // of each value, of the spreads of its entries' namespaces
	count    int      // of entries
}

// override is one entry of a packed.
type override struct {
	offset, end uint32 // where it begins and ends in records
	hash        uint32 // upper half of spread
	valueIndex  uint32 // of values
	invalidFor  uint32 // 0, invalidForHost or invalidForPath
	namespace   []byte // part of records
}

// newOverrideSet packs a map.
func newOverrideSet(data map[string]string) *overrideSet {
	p := &setBuilder{}
	for _, namespace := range slices.Sorted(maps.Keys(data)) {
		p.add([]byte(namespace), []byte(data[namespace]))
	}
	return p.build()
}

// The most bytes of one object's names and values, where each entry has entryOverhead
// bytes more, as in the API server's protobuf. etcd takes 1.5 MiB at most
// (--max-request-bytes).
const (
	maxConfigMapData = 2 << 20
	entryOverhead    = 6
)

// UnmarshalJSON packs an object of texts. encoding/json has seen to it that b is
// valid; to have it make a map of 40,000 entries, to be packed after that, would
// take most of the time between an edit and the table.
func (p *overrideSet) UnmarshalJSON(b []byte) error {
	const between = " \t\r\n,:"
	all, size := &setBuilder{}, 0
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
	*p = *all.build()
	return nil
}

// cutJSONString returns the text that b, JSON, begins with, and what is after it.
func cutJSONString(b []byte) (text, rest []byte, err error) {
	if b[0] != '"' {
		var s string
		err = json.NewDecoder(bytes.NewReader(b)).Decode(&s)
		return nil, nil, cmp.Or(err, error(&json.UnmarshalTypeError{Value: "null", Type: reflect.TypeFor[string]()}))
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

// setBuilder makes a packed. What it needs for that is in proportion to the names and
// values that were added, whatever the text that they come from.
type setBuilder struct {
	overrideSet                    // the records in the order in which they came
	sortKeys     []uint64          // of the records: hash, and below it where the record begins
	valueIndexes map[string]uint32 // numbers of values
}

// add takes spaces off the value, as a file's last newline is one.
func (p *setBuilder) add(namespace, value []byte) {
	value = bytes.TrimSpace(value)
	value = value[:min(maxValueBytes, len(value))]
	valueIndex, ok := p.valueIndexes[string(value)]
	if !ok {
		if p.valueIndexes == nil {
			p.valueIndexes = map[string]uint32{}
		}
		valueIndex = uint32(len(p.values))
		text := string(value)
		p.valueIndexes[text] = valueIndex
		p.values, p.hashSums = append(p.values, text), append(p.hashSums, 0)
	}
	invalid := invalidFor(namespace)
	namespace = namespace[:min(maxNamespaceBytes, len(namespace))]
	key := hash64(namespace)
	p.hashSums[valueIndex] += key
	at := p.overrideSet.appendOverride(override{hash: upper32(key), valueIndex: valueIndex, invalidFor: invalid, namespace: namespace})
	p.sortKeys = append(p.sortKeys, uint64(upper32(key))<<32|uint64(at))
}

// build ends the making. It sorts numbers rather than records.
func (p *setBuilder) build() *overrideSet {
	slices.Sort(p.sortKeys)
	record := func(i int) override { return p.overrideAt(uint32(p.sortKeys[i])) }
	done := &overrideSet{data: make([]byte, 0, len(p.data)), values: p.values, hashSums: p.hashSums, count: len(p.sortKeys)}
	for i := range p.sortKeys {
		for j := i; j > 0 && record(j).compare(record(j-1)) < 0; j-- { // the same hash
			p.sortKeys[j], p.sortKeys[j-1] = p.sortKeys[j-1], p.sortKeys[j]
		}
	}
	for i := range p.sortKeys {
		done.appendOverride(record(i))
	}
	return done
}

// compare orders records by their hash, then by their namespace.
func (r override) compare(other override) int {
	if r.hash != other.hash {
		return cmp.Compare(r.hash, other.hash)
	}
	return bytes.Compare(r.namespace, other.namespace)
}

// upper32 is the part of a hash that places a namespace.
func upper32(key uint64) uint32 { return uint32(key >> 32) }

// appendOverride appends a record, while p is being made, and returns where.
func (p *overrideSet) appendOverride(r override) (at uint32) {
	at = uint32(len(p.data))
	p.data = binary.LittleEndian.AppendUint32(p.data, r.hash)
	p.data = binary.LittleEndian.AppendUint32(p.data, r.invalidFor<<invalidForShift|r.valueIndex)
	p.data = append(p.data, byte(len(r.namespace)))
	p.data = append(p.data, r.namespace...)
	return at
}

// overrideAt returns the one that begins at at.
func (p *overrideSet) overrideAt(at uint32) override {
	b := p.data[at:]
	next := overrideHeaderBytes + uint32(b[overrideHeaderBytes-1])
	valueIndex := binary.LittleEndian.Uint32(b[4:])
	return override{
		offset: at, end: at + next, namespace: b[overrideHeaderBytes:next],
		hash: binary.LittleEndian.Uint32(b), valueIndex: valueIndex & (1<<invalidForShift - 1), invalidFor: valueIndex >> invalidForShift,
	}
}

// all are the records of p in order.
func (p *overrideSet) all() iter.Seq[override] { return p.rangeBelow(1<<32, new(uint32)) }

// rangeBelow are the records from at on whose hash is below end, in order. at follows:
// they can be read once.
func (p *overrideSet) rangeBelow(end uint64, at *uint32) iter.Seq[override] {
	return func(yield func(override) bool) {
		for *at < uint32(len(p.data)) {
			r := p.overrideAt(*at)
			if uint64(r.hash) >= end {
				return
			}
			*at = r.end
			if !yield(r) {
				return
			}
		}
	}
}

// value returns that of r, a record of p.
func (p *overrideSet) value(r override) string { return p.values[r.valueIndex] }

// equal reports whether p and other have the same entries. It may say no of the
// same that came in another order.
func (p *overrideSet) equal(other *overrideSet) bool {
	return p == other || bytes.Equal(p.data, other.data) && slices.Equal(p.values, other.values)
}

// differences are the namespaces that p and other do not give the same value, in
// order; with everything those of which they do too.
func (p *overrideSet) differences(other *overrideSet, everything bool) iter.Seq[override] {
	return func(yield func(override) bool) {
		for i, j := uint32(0), uint32(0); int(i) < len(p.data) || int(j) < len(other.data); {
			var mine, others override
			order := 0
			switch {
			case int(i) == len(p.data):
				others, order = other.overrideAt(j), 1
			case int(j) == len(other.data):
				mine, order = p.overrideAt(i), -1
			default:
				mine, others = p.overrideAt(i), other.overrideAt(j)
				order = mine.compare(others)
			}
			differs := everything || order != 0 || p.value(mine) != other.value(others)
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

// overrideIndex finds namespaces in several packed. It is a hash table with open
// addressing: a lookup reads a few cells beside one another and one record, and what
// a swap has to make anew is 8 bytes for each cell.
type overrideIndex struct {
	sets  []*overrideSet
	slots []indexSlot // a third of them are empty
}

// indexSlot leads to a record. Its place among the cells is where the namespace's
// hash points to, or after.
type indexSlot struct {
	offset      uint32
	set         uint16 // number of the packed plus 1; 0 is an empty cell
	fingerprint uint16 // lower half of the hash
}

// newOverrideIndex returns an index without namespaces and with room for n.
func newOverrideIndex(parts []*overrideSet, n int) overrideIndex {
	return overrideIndex{sets: parts, slots: make([]indexSlot, n+n/2+1)}
}

// findSlot returns the cell of the namespace with this hash, or the empty cell where
// it belongs.
func findSlot[S string | []byte](x *overrideIndex, namespace S, hash uint32) *indexSlot {
	i := uint64(hash) * uint64(len(x.slots)) >> 32
	for {
		s := &x.slots[i]
		if s.set == 0 || s.fingerprint == uint16(hash) && string(x.overrideAt(s).namespace) == string(namespace) {
			return s
		}
		if i++; i == uint64(len(x.slots)) {
			i = 0
		}
	}
}

// overrideAt returns what s leads to.
func (x *overrideIndex) overrideAt(s *indexSlot) override {
	return x.sets[s.set-1].overrideAt(s.offset)
}

// invalidFor says where a request cannot have this namespace: override.invalidFor.
func invalidFor(namespace []byte) uint32 {
	switch {
	case isHostNamespace(namespace):
		return 0
	case isPathNamespace(namespace):
		return invalidForHost
	}
	return invalidForPath
}

// pathNamespaceFault says what is wrong with a namespace of a path, or "".
func pathNamespaceFault(s string) string {
	if isPathNamespace(s) {
		return ""
	}
	return "a namespace of 1 to 253 characters of [-._a-zA-Z0-9] other than \".\" and \"..\""
}

// hostNamespaceFault says what is wrong with a namespace of a host name, in lower case, or
// "".
func hostNamespaceFault(s string) string {
	if isHostNamespace(s) {
		return ""
	}
	return "a namespace of 1 to 63 characters of [-_a-z0-9], the first label of a host name in lower case"
}

// isPathNamespace reports whether a path can have the namespace. The characters and
// the length are those of a ConfigMap's keys, so that it can be an override: all
// but those that overrideKeyFault names. "." and ".." would be dot segments of a path (RFC
// 3986 §3.3).
func isPathNamespace[S string | []byte](s S) bool {
	if len(s) == 0 || len(s) > 253 || s[0] == '.' && (len(s) == 1 || len(s) == 2 && s[1] == '.') {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; !isHostNamespaceByte(c) && c != '.' && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

// isHostNamespace reports whether a host name can have the namespace as its first label: of
// at most 63 bytes (RFC 1035 §2.3.4), without a dot, and in lower case, as host
// names have no case (RFC 4343). An underscore is allowed in DNS (RFC 2181 §11),
// and browsers send it.
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

// overrideKeyFault says why a namespace can have no override, or "". A ConfigMap's keys do
// not begin with two dots: a directory that it is mounted to has files of the kubelet
// by such names (https://kubernetes.io/docs/concepts/configuration/configmap/).
func overrideKeyFault(namespace string) string {
	if strings.HasPrefix(namespace, "..") {
		return "it can have no override: no key of a ConfigMap begins with two dots"
	}
	return ""
}
