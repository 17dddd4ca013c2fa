package main

import (
	"context"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Memory that handshakes took is given back once they pause, and only then.
func TestTidy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var begun atomic.Int64
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go tidy(ctx, func() int { return int(begun.Load()) })
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
			begun.Add(int64(step.open))
			time.Sleep(tidyTime)
			if got := collected() - before; got != step.want {
				t.Errorf("step %d, %d handshakes: %d collections, want %d", i, step.open, got, step.want)
			}
		}
	})
}
