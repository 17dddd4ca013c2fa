package main

import (
	"math/rand/v2"
	"time"
)

// maxDrainInterval is the longest time between two sessions in a drain, so that a
// router with few sessions does not use all of its time.
const maxDrainInterval = 100 * time.Millisecond

// drain closes all sessions gracefully, in random order and spread over the given time,
// and waits until they are over. It returns how many sessions have ended because of the
// drain.
func drain(r *relay, duration time.Duration) int64 {
	before := r.ended[causeDrain].Load()
	all := r.filter(func(s *session) bool { return !s.isEnding() })
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	p := pace{interval: min(maxDrainInterval, duration/time.Duration(max(1, len(all))))}
	p.start(time.Now())
	for _, s := range all {
		if s.isEnding() {
			continue
		}
		if wait := time.Until(p.next()); wait >= paceTick {
			time.Sleep(wait)
		}
		s.closeGracefully(causeDrain, nil)
		p.advance(time.Now())
	}
	r.wait()
	return r.ended[causeDrain].Load() - before
}
