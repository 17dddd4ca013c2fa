package main

import (
	"bufio"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"
)

// agesIn runs a mover as movesIn does, with sessions of as many namespaces and -max-age.
// The router drains after drain. closed returns the sessions that were closed for their
// age so far.
func agesIn(t *testing.T, rate, sessions int, limit, drain time.Duration,
	play func(t *testing.T, m *moveTest, closed func() []closedSession)) {
	data := pinned(sessions, 0)
	movesIn(t, rate, 0, data, func(t *testing.T, m *moveTest) {
		var mu sync.Mutex
		var all []closedSession
		m.ages.close = func(s *session) bool {
			mu.Lock()
			defer mu.Unlock()
			all = append(all, closedSession{s, time.Since(m.started)})
			return s.setCause(causeMaxAge)
		}
		for i, namespace := range slices.Sorted(maps.Keys(data)) {
			m.relay.add(&session{namespace: namespace, started: time.Duration(sessions - i)})
		}
		m.ages.limit = limit
		m.ages.draining = func() bool { return time.Since(m.started) > drain }
		m.wake.notify()
		play(t, m, func() []closedSession {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(all)
		})
	})
}

// TestMaxAgeIsEachSessionsOwn: a session ends at an age of its own, from nine tenths of the
// limit to all of it, and late by one look at most.
func TestMaxAgeIsEachSessionsOwn(t *testing.T) {
	const limit, sessions, look = time.Hour, 300, time.Hour / 100
	agesIn(t, 0, sessions, limit, 2*limit, func(t *testing.T, m *moveTest, closed func() []closedSession) {
		m.after(limit + look)
		ages := closed()
		wantEqual(t, "sessions that were closed", len(ages), sessions)
		looks := map[time.Duration]int{}
		for _, c := range ages {
			from, to := m.ages.maxAge(c.session), m.ages.maxAge(c.session)+look
			if from < limit*9/10 || from > limit || c.at < from || c.at > to {
				t.Errorf("closed after %s, want %s to %s, and 54m to 1h", c.at, from, to)
			}
			looks[c.at]++
		}
		for at, n := range looks {
			if len(looks) < 9 || n > sessions/4 {
				t.Errorf("%d of %d sessions were closed at %s, one of %d looks: want them spread",
					n, sessions, at, len(looks))
			}
		}
	})
}

// TestMaxAgePace: sessions that are too old are closed at the rate of moves, the oldest
// first.
func TestMaxAgePace(t *testing.T) {
	agesIn(t, 10, 100, time.Second, time.Hour, func(t *testing.T, m *moveTest, closed func() []closedSession) {
		m.after(15 * time.Second)
		all := closed()
		wantEqual(t, "sessions that were closed", len(all), 100)
		for i, c := range all {
			if due := all[0].at + time.Duration(i)*100*time.Millisecond; c.at < due || c.at > due+60*time.Millisecond {
				t.Errorf("session %d was closed after %s, want about %s", i, c.at, due)
			}
		}
		if !slices.IsSortedFunc(all, func(a, b closedSession) int { return int(a.started - b.started) }) {
			t.Error("the oldest sessions were not the first")
		}
	})
}

// TestMaxAgeAfterMoves: while sessions wait to be moved, none is closed for its age, and those that
// became too old meanwhile are then closed at the pace too.
func TestMaxAgeAfterMoves(t *testing.T) {
	const old, moved = 20, 30
	agesIn(t, 5, old, 10*time.Second, time.Hour, func(t *testing.T, m *moveTest, closed func() []closedSession) {
		before, after := pinned(old, 0), pinned(old, 0)
		for i := range moved {
			namespace := fmt.Sprintf("moves-%02d", i)
			before[namespace], after[namespace] = "backend-1", "backend-2"
			m.relay.add(&session{namespace: namespace, backend: 1, started: time.Hour})
		}
		m.table(before)
		m.after(8 * time.Second) // no session is old yet
		m.table(after)
		moves := m.after(time.Minute)
		wantEqual(t, "sessions that moved", len(moves), moved)
		aged := closed()
		wantEqual(t, "sessions that were too old", len(aged), old)
		if first, last := aged[0].at, moves[len(moves)-1].at; first < last {
			t.Errorf("the first session was closed for its age after %s, the last one moved after %s", first, last)
		}
		for i, c := range aged {
			if due := aged[0].at + time.Duration(i)*200*time.Millisecond - 250*time.Millisecond; c.at < due { // the first may be late
				t.Errorf("session %d was closed for its age after %s, want not before %s", i, c.at, due)
			}
		}
	})
}

// TestMaxAgeWhileDraining: a router that drains closes none for its age.
func TestMaxAgeWhileDraining(t *testing.T) {
	const drain = 15 * time.Second
	agesIn(t, 1, 10, 10*time.Second, drain, func(t *testing.T, m *moveTest, closed func() []closedSession) {
		m.after(time.Minute)
		for _, c := range closed() {
			if c.at > drain {
				t.Errorf("a session was closed after %s, with the drain since %s", c.at, drain)
			}
		}
		if n := len(closed()); n == 0 || n == 10 {
			t.Errorf("%d sessions were closed before the drain, want some of the 10", n)
		}
	})
}

// TestMaxAgeClosesGracefully: the session of each way of an upgrade ends with Close 1012,
// and its client gets in again at once.
func TestMaxAgeClosesGracefully(t *testing.T) {
	both(t, func(t *testing.T, request string) {
		backend := startStub(t, "127.0.0.1:0", answer(switching)) // it answers no Close frame
		p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) {
			p.mover.ages.limit = time.Millisecond
			p.relay.closeTimeout = 100 * time.Millisecond
			limitSessions(p, 1)
		})
		conn, br, _ := p.ask(t, request)
		first, payload, err := nextFrame(bufio.NewReader(br), false, nil)
		must(t, err)
		if want := closeFrame(closeServiceRestart, "service restart", false); string(payload) != string(want[2:]) {
			t.Errorf("the client gets the frame %#x %q, want Close 1012", first, payload)
		}
		again, _, resp := p.ask(t, request)
		wantEqual(t, "the status of the next upgrade", resp.StatusCode, 101)
		conn.Close()
		again.Close()
		eventually(t, "sessions that were too old", true, func() bool { return p.relay.ended[causeMaxAge].Load() > 0 })
		// The second session ends with its client, maybe before the first one.
		eventually(t, "the cause of a session's end in the log", true, func() bool {
			return slices.ContainsFunc(p.tail.all("session ended"), func(line map[string]any) bool {
				return line["cause"] == "max_age"
			})
		})
	})
}
