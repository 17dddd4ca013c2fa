package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestBackoff(t *testing.T) {
	b := backoff{min: 50 * time.Millisecond, max: time.Second}
	for failures, want := range map[int]time.Duration{
		1:    50 * time.Millisecond,
		2:    100 * time.Millisecond,
		5:    800 * time.Millisecond,
		6:    time.Second,
		1000: time.Second,
	} {
		wantEqual(t, fmt.Sprint("the delay after ", failures), b.delay(failures), want)
		for random, want := range map[float64]time.Duration{0: want / 2, 0.5: want, 0.75: want * 5 / 4} {
			wantEqual(t, fmt.Sprint("the delay after ", failures, " with ", random), b.jittered(failures, random), want)
		}
	}
}

func TestSleep(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begun := time.Now()
		if err := sleep(ctx, time.Second); err != nil || time.Since(begun) != time.Second {
			t.Errorf("error %v after %s, want none after 1s", err, time.Since(begun))
		}
		err := sleep(ctx, time.Hour)
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) != time.Minute {
			t.Errorf("error %v after %s, want that of the context after 1m", err, time.Since(begun))
		}
	})
}

func TestWakeup(t *testing.T) {
	w := newWakeup()
	w.notify()
	w.notify()
	<-w
	select {
	case <-w:
		t.Error("two notifies woke twice, want once")
	default:
	}
}

// A waitCount may rise while others wait for it, also from 0, which is a misuse of a
// sync.WaitGroup. Who waits goes on when it was 0.
func TestWaitCount(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var c waitCount
		c.wait()
		var waited atomic.Int64
		for range 3 {
			c.add(1)
			go func() { c.wait(); waited.Add(1) }()
		}
		c.add(-2)
		synctest.Wait()
		wantEqual(t, "waits that are over at 1", waited.Load(), 0)
		c.add(-1)
		go func() { c.add(1); c.add(-1) }()
		synctest.Wait()
		wantEqual(t, "waits that are over at 0", waited.Load(), 3)
		c.wait()
	})
}
