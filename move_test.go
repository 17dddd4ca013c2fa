package main

import (
	"context"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// The sessions whose owner changed end, and only these.
func TestMoveExactlyThose(t *testing.T) {
	var addrs []string
	for range 4 {
		addrs = append(addrs, startStub(t, "127.0.0.1:0", echo).addr)
	}
	before := map[string]string{"pinned": "backend-0", "released": "backend-1"}
	after := map[string]string{"pinned": "backend-0", "moved": "backend-3", "bad": "backend-x"}
	p := startProxy(t, addrs, before, nil)
	old := p.router.table()
	stay, leave := []string{"pinned", "bad"}, []string{"moved", "released"}
	for i := range 20 {
		stay = append(stay, fmt.Sprintf("ns-%02d", i))
	}
	if owner, _ := old.owner("moved"); owner == 3 {
		t.Fatal("the hash has it on backend-3 already")
	}
	if bucket("released", 4) == 1 {
		t.Fatal("the hash has it on backend-1 too")
	}
	for _, namespace := range leave {
		conn := p.open(t, namespace)
		defer mustBreak(t, conn)
	}
	for _, namespace := range stay {
		conn := p.open(t, namespace)
		defer mustRead(t, conn, "pong")
		defer mustWrite(t, conn, "pong")
	}
	p.router.update(entries{source: "test", version: "42", data: pack(after)})
	for end := time.Now().Add(patience); p.relay.ended[causeMoved].Load() < int64(len(leave)); <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d sessions moved, want %d", p.relay.ended[causeMoved].Load(), len(leave))
		}
	}
	if got := p.relay.size(); got != len(stay) {
		t.Errorf("%d sessions left, want %d", got, len(stay))
	}
}

// A table that is swapped between the handshake and the hand-over does not
// leave a session behind with its old owner.
func TestMoveAtHandOver(t *testing.T) {
	p := startProxy(t, []string{"127.0.0.1:1", "127.0.0.1:1"}, map[string]string{"ns-01": "backend-0"}, nil)
	p.router.update(entries{source: "test", version: "42", data: pack(map[string]string{"ns-01": "backend-1"})})
	client, clientFar := tcpPair(t)
	server, serverFar := tcpPair(t)
	p.waiting.Add(1)
	p.handOver(&session{namespace: "ns-01"}, [2]net.Conn{clientFar, server}, [2][]byte{})
	mustBreak(t, client)
	mustBreak(t, serverFar)
	for end := time.Now().Add(patience); p.relay.ended[causeMoved].Load() != 1; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the session was not moved")
		}
	}
}

// sessions returns n without sockets.
func sessions(n int, gone bool) []*session {
	all := make([]*session, n)
	for i := range all {
		all[i] = &session{}
		all[i].gone.Store(gone)
	}
	return all
}

func TestPace(t *testing.T) {
	t.Run("spread evenly", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			begun := time.Now()
			var at []time.Duration
			done, _ := pace(t.Context(), nil, sessions(1000, false), 10*time.Millisecond, func(*session) bool {
				at = append(at, time.Since(begun))
				return true
			})
			if done != 1000 {
				t.Errorf("%d ended, want 1000", done)
			}
			for i, when := range at {
				if slot := time.Duration(i) * 10 * time.Millisecond; when < slot || when > slot+5*time.Millisecond {
					t.Fatalf("session %d ended after %s, want %s and at most 5 ms more", i, when, slot)
				}
			}
		})
	})
	t.Run("stops with its context", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if done, _ := pace(ctx, nil, sessions(1000, false), 10*time.Millisecond, func(*session) bool { return true }); done < 95 || done > 101 {
				t.Errorf("%d ended in a second, want about 100", done)
			}
		})
	})
	t.Run("what is over takes no time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			begun := time.Now()
			if done, _ := pace(t.Context(), nil, sessions(1000, true), time.Second, func(*session) bool { return true }); done != 0 || time.Since(begun) != 0 {
				t.Errorf("%d ended in %s, want none at once", done, time.Since(begun))
			}
		})
	})
	t.Run("stops when it is woken", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			wake := make(chan struct{}, 1)
			time.AfterFunc(time.Second, func() { wake <- struct{}{} })
			done, woken := pace(t.Context(), wake, sessions(1000, false), 10*time.Millisecond, func(*session) bool { return true })
			if done < 95 || done > 101 || !woken {
				t.Errorf("%d ended in a second, woken %v; want about 100 and true", done, woken)
			}
		})
	})
	t.Run("what is taken back is not counted", func(t *testing.T) {
		if done, _ := pace(t.Context(), nil, sessions(10, false), 0, func(*session) bool { return false }); done != 0 {
			t.Errorf("%d ended, want 0", done)
		}
	})
}

func TestDrain(t *testing.T) {
	r := quietRelay(t)
	for range 20 {
		carried(t, r, 0, nil, nil)
	}
	begun := time.Now()
	if ended := drain(t.Context(), r, 400*time.Millisecond); ended != 20 {
		t.Errorf("%d ended, want 20", ended)
	}
	if took := time.Since(begun); took < 300*time.Millisecond {
		t.Errorf("drained in %s, want it spread over 400 ms", took)
	}
	if got := r.ended[causeDrain].Load(); got != 20 || r.size() != 0 {
		t.Errorf("%d ended by drain, %d left; want 20 and 0", got, r.size())
	}
}

// An edit that takes the change back keeps what has not moved yet.
func TestMoveTakenBack(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", echo)
	p := startProxy(t, []string{backend.addr, backend.addr}, map[string]string{"ns-01": "backend-0"}, func(p *proxy) { p.moves.rate = 1 })
	for range 10 {
		p.open(t, "ns-01")
	}
	p.router.update(entries{source: "test", version: "42", data: pack(map[string]string{"ns-01": "backend-1"})})
	for end := time.Now().Add(patience); p.relay.ended[causeMoved].Load() == 0; <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing moved")
		}
	}
	p.router.update(entries{source: "test", version: "43", data: pack(map[string]string{"ns-01": "backend-0"})})
	moved := p.relay.ended[causeMoved].Load()
	p.moves.move(t.Context())
	if got := p.relay.ended[causeMoved].Load(); got != moved || moved > 2 {
		t.Errorf("%d sessions moved before it was taken back and %d after", moved, got-moved)
	}
}
