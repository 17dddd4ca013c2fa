package main

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

const (
	minTargetRetry = 100 * time.Millisecond // after the first failure; then it doubles
	maxTargetRetry = 600 * time.Millisecond // so that namespaces follow within 1 s
	maxAwayTime    = 60 * time.Second       // how long namespaces wait for a target
)

// moveTargets has the new owners of the sessions that have to move, and dials each of
// them until it accepts a connection. The mover's run owns it and closes it.
type moveTargets struct {
	// probe dials a backend. It returns nil if the backend has accepted the connection.
	probe   func(ctx context.Context, backend int) error
	results chan dialResult     // dial sends, run receives
	all     map[int]*moveTarget // by ordinal
	dials   sync.WaitGroup      // all dial

	// waitUntil says, by ordinal, until when namespaces wait for a backend that is away:
	// maxAwayTime after a router has found that. It stays until all routers reach the backend,
	// or the move to a table ends, also while there is no session for the backend.
	waitUntil map[int]time.Time
}

// moveTarget is a new owner of sessions that have to move.
type moveTarget struct {
	backend   int                // its ordinal
	cancel    context.CancelFunc // ends its dial
	reachable bool               // it has accepted a connection
	dialled   bool               // its first dial has ended
}

// wasDialled reports whether a dial of the target has ended, this one or that before redial.
func (t *moveTarget) wasDialled() bool { return t.reachable || t.dialled }

// dialResult is the result of one dial of a target. err is nil if it is reachable.
type dialResult struct {
	*moveTarget
	err error
}

// newMoveTargets returns moveTargets without a target.
func newMoveTargets(probe func(ctx context.Context, backend int) error) *moveTargets {
	return &moveTargets{
		probe: probe, results: make(chan dialResult),
		all: map[int]*moveTarget{}, waitUntil: map[int]time.Time{},
	}
}

// addMissing makes the backends targets too. It dials those that were no targets before, until
// ctx ends. A target whose first dial has ended stays one while sessions move to the same
// table, also when no session is left for it: new clients do not go there either while it is
// away.
func (t *moveTargets) addMissing(ctx context.Context, backends map[int]bool) {
	for backend, target := range t.all {
		if !target.wasDialled() && !backends[backend] {
			t.drop(target) // else allDialled would wait for it
		}
	}
	for backend := range backends {
		if t.all[backend] == nil {
			t.add(ctx, &moveTarget{backend: backend})
		}
	}
}

// redial dials those targets anew that are reachable. They count as reachable until the new
// dial has ended.
func (t *moveTargets) redial(ctx context.Context) {
	for backend, target := range t.all {
		if target.reachable {
			target.cancel()
			t.add(ctx, &moveTarget{backend: backend, reachable: true})
		}
	}
}

// add adds the target, in place of the one before of its backend, and dials it until ctx ends.
func (t *moveTargets) add(ctx context.Context, target *moveTarget) {
	ctx, target.cancel = context.WithCancel(ctx)
	t.all[target.backend] = target
	t.dials.Go(func() { t.dial(ctx, target) })
}

// drop forgets the target, and ends its dial.
func (t *moveTargets) drop(target *moveTarget) {
	target.cancel()
	delete(t.all, target.backend)
}

// dropAll ends all dials and forgets all targets, since no session has to move any more.
func (t *moveTargets) dropAll() { t.forgetOthers(nil) }

// forgetOthers forgets all targets but these, and the waits for others: sessions now move to
// another table.
func (t *moveTargets) forgetOthers(backends map[int]bool) {
	for backend, target := range t.all {
		if !backends[backend] {
			t.drop(target)
		}
	}
	maps.DeleteFunc(t.waitUntil, func(backend int, _ time.Time) bool { return t.all[backend] == nil })
}

// startWaits starts the waits for backends that are away for other routers, and maybe for this one.
// A wait that is under way goes on. The wait for any other target is over if that is reachable.
func (t *moveTargets) startWaits(backends []int, now time.Time) {
	for backend, target := range t.all {
		if target.reachable && !slices.Contains(backends, backend) {
			delete(t.waitUntil, backend)
		}
	}
	for _, backend := range backends {
		t.startWait(backend, now)
	}
}

// startWait starts the wait for a backend, unless it is under way.
func (t *moveTargets) startWait(backend int, now time.Time) {
	if t.waitUntil[backend].IsZero() {
		t.waitUntil[backend] = now.Add(maxAwayTime)
	}
}

// close ends all dials and waits for them.
func (t *moveTargets) close() {
	t.dropAll()
	t.dials.Wait()
}

// dial dials the target until it accepts a connection or ctx ends. It sends the result of
// each dial to results.
func (t *moveTargets) dial(ctx context.Context, target *moveTarget) {
	retry := backoff{minTargetRetry, maxTargetRetry}
	for failures := 1; ; failures++ {
		err := t.probe(ctx, target.backend)
		select {
		case <-ctx.Done():
			return
		case t.results <- dialResult{target, err}:
		}
		if err == nil || sleep(ctx, retry.jittered(failures, rand.Float64())) != nil {
			return
		}
	}
}

// note notes the result of a dial. It reports whether this is the target's first failure. The caller
// calls startWaits, which ends the wait for a target that is reachable.
func (t *moveTargets) note(d dialResult, now time.Time) (firstFailure bool) {
	target := d.moveTarget
	if t.all[target.backend] != target { // it was dropped or dialled anew meanwhile
		return false
	}
	firstFailure = d.err != nil && !target.dialled
	target.reachable, target.dialled = d.err == nil, true
	if !target.reachable {
		t.startWait(target.backend, now)
	}
	return firstFailure
}

// allDialled reports whether a dial of each target has ended.
func (t *moveTargets) allDialled() bool {
	for _, target := range t.all {
		if !target.wasDialled() {
			return false
		}
	}
	return true
}

// away returns the ordinals, sorted, of the targets that accept no connection and that
// namespaces wait for. until is when they wait for one of them no longer; zero if there
// is none.
func (t *moveTargets) away(now time.Time) (away []int, until time.Time) {
	for backend, target := range t.all {
		if wait := t.waitUntil[backend]; !target.reachable && target.dialled && now.Before(wait) {
			away = append(away, backend)
			until = earliest(until, wait)
		}
	}
	slices.Sort(away)
	return away, until
}
