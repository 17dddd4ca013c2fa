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
	maxName    = 255       // bytes that are kept of a namespace; 253 are the most that one may have
	maxValue   = 300       // bytes that are kept of a value; a name of a backend has fewer
	maxSources = 1<<16 - 4 // parts in an index, and two that a table adds
	recordHead = 9         // bytes of a record before its namespace

	oddHost, oddPath = 1, 2 // of record.odd: the name cannot be the namespace of a host, or not of a path either
	oddShift         = 30   // where a record has odd, above which
)

// packed is what one source of overrides holds, in one piece of memory: a million
// entries take 10 bytes each and the namespace, and 150 as a map of strings. They
// are in the order of their hashes: so an index of several is made from its
// begin to its end, not here and there. It is immutable.
type packed struct {
	records []byte   // of each entry: hash, odd and which (4 bytes each, little endian), len(namespace) (1 byte), namespace
	values  []string // distinct
	sums    []uint64 // of each value, of the spreads of its entries' namespaces
	count   int      // of entries
}

// record is one entry of a packed.
type record struct {
	at, next  uint32 // where it begins and ends in records
	hash      uint32 // upper half of spread
	which     uint32 // of values
	odd       uint32 // 0, oddHost or oddPath
	namespace []byte // part of records
}

// pack packs a map.
func pack(data map[string]string) *packed {
	p := &packer{}
	for _, namespace := range slices.Sorted(maps.Keys(data)) {
		p.add([]byte(namespace), []byte(data[namespace]))
	}
	return p.pack()
}

// The most bytes of one object's names and values, where each entry has entryHead
// bytes more, as in the API server's protobuf. etcd takes 1.5 MiB at most
// (--max-request-bytes).
const (
	maxData   = 2 << 20
	entryHead = 6
)

// UnmarshalJSON packs an object of texts. encoding/json has seen to it that b is
// valid; to have it make a map of 40,000 entries, to be packed after that, would
// take most of the time between an edit and the table.
func (p *packed) UnmarshalJSON(b []byte) error {
	const between = " \t\r\n,:"
	all, size := &packer{}, 0
	switch b[0] {
	case 'n': // null
	case '{':
		for b = bytes.TrimLeft(b[1:], between); b[0] != '}'; b = bytes.TrimLeft(b, between) {
			namespace, rest, _ := cutText(b)
			value, rest, err := cutText(bytes.TrimLeft(rest, between))
			if err != nil {
				return err
			}
			if size += entryHead + len(namespace) + len(value); size > maxData {
				return fmt.Errorf("more than %d bytes in names and values", maxData)
			}
			all.add(namespace, value)
			b = rest
		}
	default:
		return json.Unmarshal(b, new(map[string]string)) // its error
	}
	*p = *all.pack()
	return nil
}

// cutText returns the text that b, JSON, begins with, and what is after it.
func cutText(b []byte) (text, rest []byte, err error) {
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

// packer makes a packed. What it needs for that is in proportion to the names and
// values that were added, whatever the text that they come from.
type packer struct {
	packed                   // the records in the order in which they came
	order  []uint64          // of the records: hash, and below it where the record begins
	known  map[string]uint32 // numbers of values
}

// add takes spaces off the value, as a file's last newline is one.
func (p *packer) add(namespace, value []byte) {
	value = bytes.TrimSpace(value)
	value = value[:min(maxValue, len(value))]
	which, ok := p.known[string(value)]
	if !ok {
		if p.known == nil {
			p.known = map[string]uint32{}
		}
		which = uint32(len(p.values))
		text := string(value)
		p.known[text] = which
		p.values, p.sums = append(p.values, text), append(p.sums, 0)
	}
	odd := oddness(namespace)
	namespace = namespace[:min(maxName, len(namespace))]
	key := spread(namespace)
	p.sums[which] += key
	at := p.packed.add(record{hash: upper(key), which: which, odd: odd, namespace: namespace})
	p.order = append(p.order, uint64(upper(key))<<32|uint64(at))
}

// pack ends the making. It sorts numbers rather than records.
func (p *packer) pack() *packed {
	slices.Sort(p.order)
	record := func(i int) record { return p.record(uint32(p.order[i])) }
	done := &packed{records: make([]byte, 0, len(p.records)), values: p.values, sums: p.sums, count: len(p.order)}
	for i := range p.order {
		for j := i; j > 0 && record(j).compare(record(j-1)) < 0; j-- { // the same hash
			p.order[j], p.order[j-1] = p.order[j-1], p.order[j]
		}
	}
	for i := range p.order {
		done.add(record(i))
	}
	return done
}

// compare orders records by their hash, then by their namespace.
func (r record) compare(other record) int {
	if r.hash != other.hash {
		return cmp.Compare(r.hash, other.hash)
	}
	return bytes.Compare(r.namespace, other.namespace)
}

// upper is the part of a hash that places a namespace.
func upper(key uint64) uint32 { return uint32(key >> 32) }

// add appends a record, while p is being made, and returns where.
func (p *packed) add(r record) (at uint32) {
	at = uint32(len(p.records))
	p.records = binary.LittleEndian.AppendUint32(p.records, r.hash)
	p.records = binary.LittleEndian.AppendUint32(p.records, r.odd<<oddShift|r.which)
	p.records = append(p.records, byte(len(r.namespace)))
	p.records = append(p.records, r.namespace...)
	return at
}

// record returns the one that begins at at.
func (p *packed) record(at uint32) record {
	b := p.records[at:]
	next := recordHead + uint32(b[recordHead-1])
	which := binary.LittleEndian.Uint32(b[4:])
	return record{
		at: at, next: at + next, namespace: b[recordHead:next],
		hash: binary.LittleEndian.Uint32(b), which: which & (1<<oddShift - 1), odd: which >> oddShift,
	}
}

// all are the records of p in order.
func (p *packed) all() iter.Seq[record] { return p.below(1<<32, new(uint32)) }

// below are the records from at on whose hash is below end, in order. at follows:
// they can be read once.
func (p *packed) below(end uint64, at *uint32) iter.Seq[record] {
	return func(yield func(record) bool) {
		for *at < uint32(len(p.records)) {
			r := p.record(*at)
			if uint64(r.hash) >= end {
				return
			}
			*at = r.next
			if !yield(r) {
				return
			}
		}
	}
}

// value returns that of r, a record of p.
func (p *packed) value(r record) string { return p.values[r.which] }

// equal reports whether p and other have the same entries. It may say no of the
// same that came in another order.
func (p *packed) equal(other *packed) bool {
	return p == other || bytes.Equal(p.records, other.records) && slices.Equal(p.values, other.values)
}

// differences are the namespaces that p and other do not give the same value, in
// order; with everything those of which they do too.
func (p *packed) differences(other *packed, everything bool) iter.Seq[record] {
	return func(yield func(record) bool) {
		for i, j := uint32(0), uint32(0); int(i) < len(p.records) || int(j) < len(other.records); {
			var mine, others record
			order := 0
			switch {
			case int(i) == len(p.records):
				others, order = other.record(j), 1
			case int(j) == len(other.records):
				mine, order = p.record(i), -1
			default:
				mine, others = p.record(i), other.record(j)
				order = mine.compare(others)
			}
			differs := everything || order != 0 || p.value(mine) != other.value(others)
			one := mine
			if order <= 0 {
				i = mine.next
			}
			if order >= 0 {
				j, one = others.next, others
			}
			if differs && !yield(one) {
				return
			}
		}
	}
}

// index finds namespaces in several packed. It is a hash table with open
// addressing: a lookup reads a few cells beside one another and one record, and what
// a swap has to make anew is 8 bytes for each cell.
type index struct {
	parts []*packed
	cells []cell // a third of them are empty
}

// cell leads to a record. Its place among the cells is where the namespace's
// hash points to, or after.
type cell struct {
	at    uint32
	part  uint16 // number of the packed plus 1; 0 is an empty cell
	print uint16 // lower half of the hash
}

// newIndex returns an index without namespaces and with room for n.
func newIndex(parts []*packed, n int) index {
	return index{parts: parts, cells: make([]cell, n+n/2+1)}
}

// find returns the cell of the namespace with this hash, or the empty cell where
// it belongs.
func find[S string | []byte](x *index, namespace S, hash uint32) *cell {
	i := uint64(hash) * uint64(len(x.cells)) >> 32
	for {
		s := &x.cells[i]
		if s.part == 0 || s.print == uint16(hash) && string(x.record(s).namespace) == string(namespace) {
			return s
		}
		if i++; i == uint64(len(x.cells)) {
			i = 0
		}
	}
}

// record returns what s leads to.
func (x *index) record(s *cell) record { return x.parts[s.part-1].record(s.at) }

// oddness says where a request cannot have this namespace: record.odd.
func oddness(namespace []byte) uint32 {
	switch {
	case isLabel(namespace):
		return 0
	case isNamespace(namespace):
		return oddHost
	}
	return oddPath
}

// namespaceFault says what is wrong with a namespace of a path, or "".
func namespaceFault(s string) string {
	if isNamespace(s) {
		return ""
	}
	return "a namespace of 1 to 253 characters of [-._a-zA-Z0-9] other than \".\" and \"..\""
}

// labelFault says what is wrong with a namespace of a host name, in lower case, or
// "".
func labelFault(s string) string {
	if isLabel(s) {
		return ""
	}
	return "a namespace of 1 to 63 characters of [-_a-z0-9], the first label of a host name in lower case"
}

// isNamespace reports whether a path can have the namespace. The characters and
// the length are those of a ConfigMap's keys, so that it can be an override: all
// but those that keyFault names. "." and ".." would be dot segments of a path (RFC
// 3986 §3.3).
func isNamespace[S string | []byte](s S) bool {
	if len(s) == 0 || len(s) > 253 || s[0] == '.' && (len(s) == 1 || len(s) == 2 && s[1] == '.') {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; !isLabelByte(c) && c != '.' && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

// isLabel reports whether a host name can have the namespace as its first label: of
// at most 63 bytes (RFC 1035 §2.3.4), without a dot, and in lower case, as host
// names have no case (RFC 4343). An underscore is allowed in DNS (RFC 2181 §11),
// and browsers send it.
func isLabel[S string | []byte](s S) bool {
	for i := 0; i < len(s); i++ {
		if !isLabelByte(s[i]) {
			return false
		}
	}
	return 1 <= len(s) && len(s) <= 63
}

func isLabelByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

// keyFault says why a namespace can have no override, or "". A ConfigMap's keys do
// not begin with two dots: a directory that it is mounted to has files of the kubelet
// by such names (https://kubernetes.io/docs/concepts/configuration/configmap/).
func keyFault(namespace string) string {
	if strings.HasPrefix(namespace, "..") {
		return "it can have no override: no key of a ConfigMap begins with two dots"
	}
	return ""
}
