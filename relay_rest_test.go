package main

import (
	"context"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// Memory that handshakes took is given back once they pause, and only then.
func TestRelayTidies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRelay(func(int) string { return "backend-0" }, nil)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go r.tidy(ctx)
		collected := func() uint32 {
			synctest.Wait()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.NumForcedGC
		}
		steps := []struct {
			open int // in one tidyTime
			want uint32
		}{
			{tidyAfter - 1, 0}, {0, 0}, // too few
			{tidyCalm + 1, 0}, {1, 1}, // calm after enough
			{0, 0}, {tidyAfter, 0}, {tidyAfter, 0}, {tidyCalm, 1}, {0, 0},
		}
		time.Sleep(tidyTime / 2)
		for i, step := range steps {
			before := collected()
			r.mu.Lock()
			r.byBackend[0] = backendCount{total: r.byBackend[0].total + step.open}
			r.mu.Unlock()
			time.Sleep(tidyTime)
			if got := collected() - before; got != step.want {
				t.Errorf("step %d, %d sessions: %d collections, want %d", i, step.open, got, step.want)
			}
		}
	})
}
