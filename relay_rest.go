package main

import (
	"context"
	"runtime/debug"
	"time"
)

// This file is what the relay does for sessions at rest.

// idleLooks is how often endIdle looks at a session in the time that it may be
// idle.
const idleLooks = 8

// endIdle ends sessions of which no byte was carried for timeout, until ctx ends.
// It is late by up to a quarter of that: a look, and one more for looks that come
// too close to each other. Sessions need no timer, and no time for each byte.
func (r *relay) endIdle(ctx context.Context, timeout time.Duration) {
	look := time.NewTicker(timeout / idleLooks)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			for _, s := range r.where((*session).idle) {
				s.end(causeIdle)
			}
		}
	}
}

// idle takes a look, and reports whether there were enough without a change.
func (s *session) idle() bool {
	n := s.bytes()
	if sum := n[client] + n[server]; sum != s.carried {
		s.carried, s.quiet = sum, 0
		return false
	}
	s.quiet++
	return s.quiet > idleLooks
}

const (
	tidyAfter = 1000        // handshakes
	tidyCalm  = 10          // most that begin in tidyTime while it is calm
	tidyTime  = time.Second // between two looks
)

// tidy gives the memory back that many handshakes took, as soon as it is calm
// again, until ctx ends. By itself the runtime would keep it for minutes, as it
// collects garbage when the heap has grown to twice its size: a router of idle
// sessions would have more garbage than sessions. begun is how many there were.
func tidy(ctx context.Context, begun func() int) {
	ticker := time.NewTicker(tidyTime)
	defer ticker.Stop()
	var tidied, before int
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := begun()
		if now-before <= tidyCalm && now-tidied >= tidyAfter {
			debug.FreeOSMemory()
			tidied = now
		}
		before = now
	}
}
