package main

import (
	"testing"
	"time"
)

// A pace that is late makes up for one second, and not for more.
func TestPaceCatchesUp(t *testing.T) {
	begun := time.Unix(1000, 0)
	for behind, want := range map[time.Duration]int{0: 1, 500 * time.Millisecond: 51, time.Hour: 101} {
		p := pace{interval: 10 * time.Millisecond}
		p.start(begun)
		now, done := begun.Add(behind), 0
		for !p.scheduled.After(now) && done < 1000 {
			p.advance(now)
			done++
		}
		if done < want || done > want+1 {
			t.Errorf("%d steps were due when the pace was %s late, want %d", done, behind, want)
		}
	}
}
