package main

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	paceTick    = 2 * time.Millisecond // the least wait: what is due by then is done together
	paceCatchUp = time.Second          // how far behind its schedule a pace makes up for
)

// pace is one each interval, jittered by up to half of it. The schedule is an
// absolute one: what was late does not make the rest late.
type pace struct {
	interval time.Duration // 0: all at once
	slot     time.Time     // of the next
	jitter   time.Duration // of the next
}

// begin starts the schedule, or goes on with it after a time without anything to
// do.
func (p *pace) begin(now time.Time) {
	if p.slot.Before(now) {
		p.slot = now
	}
}

// next returns when the next is due.
func (p *pace) next() time.Time { return p.slot.Add(p.jitter) }

// took takes note that the next was done.
func (p *pace) took(now time.Time) {
	p.slot = p.slot.Add(p.interval)
	p.begin(now.Add(-paceCatchUp))
	p.jitter = rand.N(p.interval/2 + 1)
}

// drainSlowest is the longest time from one session to the next in a drain: a
// router with few sessions need not use all of its time.
const drainSlowest = 100 * time.Millisecond

// drain makes all sessions part, in random order and spread over the given time,
// and returns how many once they are over. When ctx ends the rest ends at once.
func drain(ctx context.Context, r *relay, over time.Duration) int64 {
	before := r.ended[causeDrain].Load()
	stop := context.AfterFunc(ctx, func() { r.endAll(causeDrain) })
	defer stop()
	all := r.where(func(s *session) bool { return !s.ending() })
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	p := pace{interval: min(drainSlowest, over/time.Duration(max(1, len(all))))}
	p.begin(time.Now())
	for _, s := range all {
		if s.ending() {
			continue
		}
		if wait := time.Until(p.next()); wait >= paceTick {
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
		s.part(causeDrain, nil)
		p.took(time.Now())
	}
	r.wait()
	return r.ended[causeDrain].Load() - before
}
