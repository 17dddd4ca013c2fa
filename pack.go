package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"iter"
	"maps"
	"math/bits"
	"slices"
	"strings"
)

const (
	maxName    = 255       // bytes that are kept of a namespace; 253 are the most that one may have
	maxValue   = 300       // bytes that are kept of a value; a name of a backend has fewer
	maxSources = 1<<16 - 4 // parts in an index, and two that a table adds
	oddName    = 1 << 31   // the bit of record.which that is set if the name is no namespace
)

// packed is what one source of overrides holds: its namespaces in order, and
// their values. It is one piece of memory: a million entries take 15 bytes each
// with the namespace, and 150 as a map of strings. It is immutable.
type packed struct {
	records []byte   // of each entry: which (4 bytes, little endian), len(namespace) (1 byte), namespace
	values  []string // distinct
	count   int      // of entries
}

// record is one entry of a packed.
type record struct {
	at, next  uint32 // where it begins and ends in records
	which     uint32 // of values, and perhaps oddName
	namespace []byte // part of records
}

// pack takes spaces off the values, as a file's last newline is one.
func pack(data map[string]string) *packed {
	size := 0
	for namespace := range data {
		size += 5 + min(maxName, len(namespace))
	}
	p, known := &packed{records: make([]byte, 0, size), count: len(data)}, map[string]uint32{}
	for _, namespace := range slices.Sorted(maps.Keys(data)) {
		value := strings.TrimSpace(data[namespace])
		value = value[:min(maxValue, len(value))]
		which, ok := known[value]
		if !ok {
			value = strings.Clone(value) // of a text that need not stay
			which = uint32(len(p.values))
			known[value] = which
			p.values = append(p.values, value)
		}
		if namespaceFault(namespace) != "" {
			which |= oddName
		}
		p.add(namespace[:min(maxName, len(namespace))], which)
	}
	return p
}

// UnmarshalJSON packs an object of texts.
func (p *packed) UnmarshalJSON(b []byte) error {
	var data map[string]string
	if err := json.Unmarshal(b, &data); err != nil {
		return err
	}
	*p = *pack(data)
	return nil
}

// add appends a record, while p is being made, and returns where.
func (p *packed) add(namespace string, which uint32) (at uint32) {
	at = uint32(len(p.records))
	p.records = binary.LittleEndian.AppendUint32(p.records, which)
	p.records = append(p.records, byte(len(namespace)))
	p.records = append(p.records, namespace...)
	return at
}

// record returns the one that begins at at.
func (p *packed) record(at uint32) record {
	b := p.records[at:]
	next := 5 + uint32(b[4])
	return record{at: at, next: at + next, which: binary.LittleEndian.Uint32(b), namespace: b[5:next]}
}

// all are the records of p in order.
func (p *packed) all() iter.Seq[record] {
	return func(yield func(record) bool) {
		for at := uint32(0); at < uint32(len(p.records)); {
			r := p.record(at)
			if !yield(r) {
				return
			}
			at = r.next
		}
	}
}

// value returns that of r, a record of p.
func (p *packed) value(r record) string { return p.values[r.which&^oddName] }

// differences are the namespaces that p and other do not give the same value, in
// order; with everything those of which they do too.
func (p *packed) differences(other *packed, everything bool) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
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
				order = bytes.Compare(mine.namespace, others.namespace)
			}
			differs := everything || order != 0 || p.value(mine) != other.value(others)
			namespace := mine.namespace
			if order <= 0 {
				i = mine.next
			}
			if order >= 0 {
				j, namespace = others.next, others.namespace
			}
			if differs && !yield(namespace) {
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

// cell leads to a record. Its place among the cells is where the upper bits of
// the namespace's hash point to, or after.
type cell struct {
	at    uint32
	part  uint16 // number of the packed plus 1; 0 is an empty cell
	print uint16 // lower bits of the hash
}

// newIndex returns an index without namespaces and with room for n.
func newIndex(parts []*packed, n int) index {
	return index{parts: parts, cells: make([]cell, n+n/2+1)}
}

// find returns the cell of the namespace, of which key is the hash, or the empty
// cell where it belongs.
func find[S string | []byte](x *index, namespace S, key uint64) *cell {
	i, _ := bits.Mul64(key, uint64(len(x.cells)))
	for {
		s := &x.cells[i]
		if s.part == 0 || s.print == uint16(key) && string(x.record(s).namespace) == string(namespace) {
			return s
		}
		if i++; i == uint64(len(x.cells)) {
			i = 0
		}
	}
}

// record returns what s leads to.
func (x *index) record(s *cell) record { return x.parts[s.part-1].record(s.at) }

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
