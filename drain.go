package main

import (
	"context"
	"math/rand/v2"
	"time"
)

// maxDrainInterval is the longest time between two sessions in a drain, so that a
// router with few sessions does not use all of its time.
const maxDrainInterval = 100 * time.Millisecond

// drain closes all sessions gracefully, in random order and spread over the given time,
// and waits until they are over. When ctx ends, it ends all that are left at once. It
// returns how many sessions have ended because of the drain.
func drain(ctx context.Context, r *relay, duration time.Duration) int64 {
	before := r.ended[causeDrain].Load()
	stop := context.AfterFunc(ctx, func() { r.endAll(causeDrain) })
	defer stop()
	all := r.filter(func(s *session) bool { return !s.isEnding() })
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	p := pace{interval: min(maxDrainInterval, duration/time.Duration(max(1, len(all))))}
	p.start(time.Now())
	for _, s := range all {
		if s.isEnding() {
			continue
		}
		if wait := time.Until(p.next()); wait >= paceTick {
			sleep(ctx, wait)
		}
		s.closeGracefully(causeDrain, nil)
		p.advance(time.Now())
	}
	r.wait()
	return r.ended[causeDrain].Load() - before
}
