package main

import (
	"math/rand/v2"
	"time"
)

const (
	paceTick    = 2 * time.Millisecond // the shortest wait: what is due by then is done at once
	paceCatchUp = time.Second          // how much delay a pace makes up for
)

// pace spreads sessions over time: one each interval, with a jitter of up to half of it.
// The schedule is absolute: a session that is late does not delay those after it. A copy of a
// pace is a pace of its own: mover.propose tries with one which sessions would be due, and
// mover.dequeueForStep advances the pace itself.
type pace struct {
	interval  time.Duration // 0: all at once
	scheduled time.Time     // of the next session, without its jitter
	jitter    time.Duration // of the next session
}

// start starts the schedule, or continues it after a time without sessions: the next one
// is not due before now.
func (p *pace) start(now time.Time) {
	if p.scheduled.Before(now) {
		p.scheduled = now
	}
}

// next returns when the next session is due.
func (p *pace) next() time.Time { return p.scheduled.Add(p.jitter) }

// advance schedules the next session, when one has had its turn.
func (p *pace) advance(now time.Time) {
	p.scheduled = p.scheduled.Add(p.interval)
	p.start(now.Add(-paceCatchUp))
	p.jitter = rand.N(p.interval/2 + 1)
}
