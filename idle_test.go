package main

import (
	"context"
	"sync"
	"testing"
	"time"
)

// A session that carries nothing ends in time; one that carries something now
// and then, in whichever direction, stays for as long as it does.
func TestRelayEndsIdle(t *testing.T) {
	const timeout = 800 * time.Millisecond
	r := quietRelay(t)
	silent := carried(t, r, 0, nil, nil)
	spoke := carried(t, r, 0, []byte("hello"), []byte("hello"))
	asks, tells := carried(t, r, 0, nil, nil), carried(t, r, 0, nil, nil)
	begun := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	var looking sync.WaitGroup
	looking.Go(func() { r.endIdle(ctx, timeout) })
	defer looking.Wait()
	defer cancel()

	var ended time.Duration
	for ended == 0 || time.Since(begun) < 3*timeout {
		mustWrite(t, asks.client, "x")
		mustRead(t, asks.backend, "x")
		mustWrite(t, tells.backend, "x")
		mustRead(t, tells.client, "x")
		<-time.After(timeout / 20)
		if ended == 0 && silent.gone.Load() && spoke.gone.Load() {
			ended = time.Since(begun)
		}
		if time.Since(begun) > patience {
			t.Fatalf("%d sessions are open, want those that carry nothing ended", r.size())
		}
	}
	if ended < timeout || ended > 3*timeout/2 {
		t.Errorf("ended after %s, want -idle-timeout %s and at most a quarter more", ended, timeout)
	}
	for name, c := range map[string]relayed{"client sends": asks, "backend sends": tells} {
		if c.ending() {
			t.Errorf("%s: ended with cause %v, want open", name, cause(c.why.Load()))
		}
	}
	waitFor(t, r) // now they are idle too
	if got := r.ended[causeIdle].Load(); got != 4 {
		t.Errorf("%d sessions ended with cause idle, want 4", got)
	}
}

func TestRunIdleTimeout(t *testing.T) {
	r := startRouter(t, "-backends", echoBackends(t, 1), "-overrides", t.TempDir(), "-idle-timeout", "1s")
	r.log.wait(t, "table", 1)
	r.open(t, "ns-01")
	if line := r.log.wait(t, "session ended", 1); line["cause"] != "idle" || line["seconds"].(float64) < 1 {
		t.Errorf("ended with cause %v after %v s, want idle after 1 s", line["cause"], line["seconds"])
	}
	waitMetrics(t, r, map[string]float64{`router_sessions_ended_total{cause="idle"}`: 1})
}
