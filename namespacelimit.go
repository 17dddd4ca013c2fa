package main

import (
	"hash/maphash"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// namespaceLimits bounds what clients can take of each namespace in this router. 0 is no
// limit.
type namespaceLimits struct {
	sessions          int // open at once, with the pending upgrades
	upgradesPerSecond int
}

// namespaceLimiter counts upgrades and their sessions in the limits of their namespaces. A
// nil *namespaceLimiter has no limits.
type namespaceLimiter struct {
	// Static after construction.
	limits   namespaceLimits
	sessions *namespaceSlots // nil: no limit
	rate     *namespaceRate  // nil: no limit
}

// newNamespaceLimiter returns nil if there are no limits.
func newNamespaceLimiter(limits namespaceLimits, log *slog.Logger) *namespaceLimiter {
	if limits == (namespaceLimits{}) {
		return nil
	}
	return &namespaceLimiter{
		limits: limits, sessions: newNamespaceSlots(limits.sessions),
		rate: newNamespaceRate(limits.upgradesPerSecond, log),
	}
}

// admit counts an upgrade in all limits of its namespace. If one refuses it, admit gives back
// what the others have counted; so the rate comes last, whose tokens cannot be given back. The
// permit is nil if no limit counts the upgrade after that; else the caller gives it back.
func (l *namespaceLimiter) admit(namespace string) (*namespacePermit, *refusal) {
	if l == nil {
		return nil, nil
	}
	var permit *namespacePermit
	if l.sessions != nil {
		// A permit must not keep the memory of a request.
		permit = &namespacePermit{sessions: l.sessions, namespace: strings.Clone(namespace)}
		if !l.sessions.acquire(permit.namespace) {
			return nil, refuse(resultMaxSessionsPerNamespace,
				"%q has %d sessions and pending upgrades, the limit of a namespace",
				namespace, l.limits.sessions)
		}
	}
	if !l.rate.allow(namespace) {
		permit.giveBack()
		return nil, refuse(resultMaxUpgradesPerSecond,
			"%q has more than %d upgrades per second, the limit of a namespace",
			namespace, l.limits.upgradesPerSecond)
	}
	return permit, nil
}

// namespacePermit is what an upgrade takes of the limits of its namespace with its admission,
// until it is answered or its client is gone, whether or not its owner still has the request
// (which pendingLimit counts). If it becomes a session, that has what forSession returns: until
// its closing handshake begins, since its client may return at once, or else until its end.
type namespacePermit struct {
	sessions  *namespaceSlots
	namespace string
}

// giveBack gives back what the permit has taken. It must be called exactly once. A nil
// permit has taken nothing.
func (p *namespacePermit) giveBack() {
	if p != nil {
		p.sessions.giveBack(p.namespace)
	}
}

// forSession returns what a session keeps of the permit of its upgrade, and gives back in its
// place: all of it. A limit of upgrades that are pending would give its part back here. It is
// called once, and nobody else has p then. p may be nil, as what it returns.
func (p *namespacePermit) forSession() *namespacePermit { return p }

// namespaceSlots bounds how many slots each namespace has in this router. A session has one,
// and an upgrade that is pending too, so that many clients at once do not pass.
type namespaceSlots struct {
	limit int // static; at least 1
	mu    sync.Mutex
	taken map[string]int32 // slots, by namespace; guarded by mu; none is 0
}

// newNamespaceSlots returns nil for a limit of 0.
func newNamespaceSlots(limit int) *namespaceSlots {
	if limit == 0 {
		return nil
	}
	return &namespaceSlots{limit: limit, taken: map[string]int32{}}
}

// acquire takes a slot of the namespace, and reports whether there was one. It keeps the
// text of the namespace. The caller calls giveBack.
func (n *namespaceSlots) acquire(namespace string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if int(n.taken[namespace]) >= n.limit {
		return false
	}
	n.taken[namespace]++
	return true
}

// giveBack gives a slot of the namespace back.
func (n *namespaceSlots) giveBack(namespace string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.taken[namespace]--; n.taken[namespace] == 0 {
		delete(n.taken, namespace)
	}
}

// maxRateNamespaces bounds the memory of a namespaceRate, to some 10 MB.
const maxRateNamespaces = 100_000

// namespaceRate bounds the upgrades of each namespace per second: each has a token bucket,
// which holds the upgrades of one second. Of a bucket it keeps the time at which it is
// full again (the generic cell rate algorithm, ITU-T I.371), and only while it is not: it
// has two generations of buckets, and one that is in neither is full. Namespaces beyond
// maxRateNamespaces in one generation are not limited. A nil *namespaceRate bounds nothing.
type namespaceRate struct {
	// Static after construction.
	interval time.Duration // between two upgrades
	size     time.Duration // of a bucket: how long an empty one takes to become full
	began    time.Time     // times are since then
	seed     maphash.Seed  // nobody can choose names that share a bucket
	log      *slog.Logger
	throttle throttle

	// Guarded by mu.
	mu              sync.Mutex
	generationBegan time.Duration            // when the present one began
	present         map[uint64]time.Duration // when the bucket is full, by the namespace's hash
	previous        map[uint64]time.Duration
}

// newNamespaceRate returns nil for a limit of 0 upgrades per second.
func newNamespaceRate(limit int, log *slog.Logger) *namespaceRate {
	if limit == 0 {
		return nil
	}
	limit = min(limit, int(time.Second)) // one a nanosecond
	interval := time.Second / time.Duration(limit)
	return &namespaceRate{
		interval: interval, size: interval * time.Duration(limit),
		began: time.Now(), seed: maphash.MakeSeed(), log: log,
		present: map[uint64]time.Duration{},
	}
}

// allow takes a token of the namespace, and reports whether there was one.
func (n *namespaceRate) allow(namespace string) bool {
	if n == nil {
		return true
	}
	ok, counted := n.take(maphash.String(n.seed, namespace))
	if counted {
		return ok
	}
	if omitted, ok := n.throttle.allow(time.Minute); ok {
		n.log.Warn("too many namespaces at once; upgrades of more are not limited",
			"max", maxRateNamespaces, "omitted", omitted)
	}
	return true
}

// take takes a token of the namespace with this hash, and reports whether there was one.
// counted is false if there is no room for one more bucket.
func (n *namespaceRate) take(key uint64) (ok, counted bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Since(n.began)
	n.startGeneration(now)
	full, ok := n.present[key]
	if !ok {
		full = n.previous[key]
	}
	full = max(full, now) + n.interval
	switch {
	case full-now > n.size:
		return false, true
	case !ok && len(n.present) >= maxRateNamespaces:
		return true, false
	}
	n.present[key] = full
	return true, true
}

// startGeneration starts a generation if in the present one an empty bucket could become
// full. It drops the buckets that were not used since the present one began: they are full.
// The caller holds mu.
func (n *namespaceRate) startGeneration(now time.Duration) {
	age := now - n.generationBegan
	if age < n.size {
		return
	}
	n.previous = n.present
	if age >= 2*n.size {
		n.previous = nil
	}
	n.present, n.generationBegan = map[uint64]time.Duration{}, now
}
