package main

import (
	"cmp"
	"hash/maphash"
	"math/bits"
	"slices"
	"sync"
	"time"
)

const (
	topSize     = 20              // namespaces in each list of a topLook
	topInterval = 2 * time.Second // the shortest time between two looks
)

// namespaceLoad is the load of one namespace in this router: of its open sessions.
type namespaceLoad struct {
	namespace string
	sessions  int64
	bytes     int64 // that they carried, in both directions, since the look before
}

// topLook is what a look at all sessions has found. Nothing changes it.
type topLook struct {
	// window is the time in which bytes are counted: since the look before, or for the
	// first look since the relay began.
	window     time.Duration
	bySessions []namespaceLoad // with the most sessions, topSize at most, largest first
	byBytes    []namespaceLoad // with the most bytes, but none without bytes
}

// topNamespaces finds the namespaces with the most load. A look costs some 200 ns for each
// session, and memory for each namespace until it is over. There is at most one in
// topInterval, so that several readers neither cost more nor shorten each other's time.
// There is one topNamespaces for a relay. Its zero value has not looked.
type topNamespaces struct {
	// Guarded by mu, which is held during a look, as is session.topBytes.
	mu         sync.Mutex
	at         time.Duration // of the last look, since relay.began; 0 before the first
	last       topLook
	namespaces int // that the last look has found
}

// look returns the last look at r's sessions, or a new one if that is older than
// topInterval.
func (t *topNamespaces) look(r *relay) topLook {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Since(r.began)
	if t.at != 0 && now-t.at < topInterval {
		return t.last
	}
	loads := t.loads(r)
	t.last = topLook{
		window:     now - t.at,
		bySessions: largest(loads, func(l namespaceLoad) int64 { return l.sessions }),
		byBytes:    largest(loads, func(l namespaceLoad) int64 { return l.bytes }),
	}
	t.last.byBytes = slices.DeleteFunc(t.last.byBytes,
		func(l namespaceLoad) bool { return l.bytes == 0 })
	t.at, t.namespaces = now, len(loads)
	return t.last
}

// loads returns the load of each namespace that has sessions, in no order. The caller
// holds mu. Sessions start and end meanwhile: it takes the relay's lock only as long as
// snapshot does. It finds namespaces in a hash table with linear probing, which takes a
// tenth of the memory of a map, and half of the time.
func (t *topNamespaces) loads(r *relay) []namespaceLoad {
	open, _ := r.snapshot()
	loads := make([]namespaceLoad, 0, min(len(open), t.namespaces+t.namespaces/8))
	slots := make([]uint32, 2<<bits.Len(uint(len(open)))) // index in loads plus 1, or 0
	mask, seed := uint64(len(slots)-1), maphash.MakeSeed()
	for _, s := range open {
		slot := maphash.String(seed, s.namespace) & mask
		for slots[slot] != 0 && loads[slots[slot]-1].namespace != s.namespace {
			slot = (slot + 1) & mask
		}
		if slots[slot] == 0 {
			loads = append(loads, namespaceLoad{namespace: s.namespace})
			slots[slot] = uint32(len(loads))
		}
		load, n := &loads[slots[slot]-1], s.bytes()
		sum := n[clientSide] + n[backendSide]
		load.sessions++
		load.bytes += sum - s.topBytes
		s.topBytes = sum
	}
	return loads
}

// largest returns the topSize loads for which size is largest, in that order. Loads of the same
// size are in the order of their names.
func largest(loads []namespaceLoad, size func(namespaceLoad) int64) (top []namespaceLoad) {
	order := func(a, b namespaceLoad) int {
		if bySize := cmp.Compare(size(b), size(a)); bySize != 0 {
			return bySize
		}
		return cmp.Compare(a.namespace, b.namespace)
	}
	for _, load := range loads {
		top = insertSorted(top, load, topSize, order)
	}
	return top
}
