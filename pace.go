package main

import (
	"math/rand/v2"
	"time"
)

const (
	paceTick    = 2 * time.Millisecond // the shortest wait: steps due by then are done at once
	paceCatchUp = time.Second          // how much delay a pace makes up for
)

// pace spreads steps over time: one each interval, with a jitter of up to half of it.
// The schedule is absolute: a step that is late does not delay the steps after it.
type pace struct {
	interval  time.Duration // 0: all at once
	scheduled time.Time     // of the next step, without its jitter
	jitter    time.Duration // of the next step
}

// start starts the schedule, or continues it after a time without steps: the next step
// is not due before now.
func (p *pace) start(now time.Time) {
	if p.scheduled.Before(now) {
		p.scheduled = now
	}
}

// next returns when the next step is due.
func (p *pace) next() time.Time { return p.scheduled.Add(p.jitter) }

// advance schedules the step after the one that was just done.
func (p *pace) advance(now time.Time) {
	p.scheduled = p.scheduled.Add(p.interval)
	p.start(now.Add(-paceCatchUp))
	p.jitter = rand.N(p.interval/2 + 1)
}
