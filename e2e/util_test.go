package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"
)

// eventually calls check until it returns nil, and fails the test with its
// last error when that takes longer than within. what completes "waiting for".
func eventually(t *testing.T, within time.Duration, what string, check func() error) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(within)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s: %v", within, what, err)
		}
		<-tick.C
	}
}

// forEach calls do for 0 to n-1 in several goroutines, which have ended when it
// returns.
func forEach(n, workers int, do func(i int) error) error {
	var (
		mu      sync.Mutex
		next    int
		errs    []error
		working sync.WaitGroup
	)
	take := func() (int, bool) {
		mu.Lock()
		defer mu.Unlock()
		next++
		return next - 1, next <= n
	}
	for range workers {
		working.Go(func() {
			for i, ok := take(); ok; i, ok = take() {
				if err := do(i); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	working.Wait()
	return some(errs)
}

// some joins errors, no more than ten of them.
func some(errs []error) error {
	const most = 10
	if len(errs) > most {
		errs = append(errs[:most:most], fmt.Errorf("and %d more", len(errs)-most))
	}
	return errors.Join(errs...)
}

// distribution is a set of measured times, in order.
type distribution []time.Duration

func newDistribution(times []time.Duration) distribution {
	return slices.SortedFunc(slices.Values(times), cmp.Compare)
}

// percentile returns the nearest rank: the smallest time that at least p
// percent of all do not exceed. It is 0 if there are none.
func (d distribution) percentile(p float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	rank := int(math.Ceil(p / 100 * float64(len(d))))
	return d[min(max(rank, 1), len(d))-1]
}

// String is the summary that the reports quote.
func (d distribution) String() string {
	ms := func(p float64) float64 { return float64(d.percentile(p).Microseconds()) / 1000 }
	return fmt.Sprintf("p50 %.1f ms, p99 %.1f ms, max %.1f ms", ms(50), ms(99), ms(100))
}

// number reads a number from the environment.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	value := os.Getenv(name)
	if value == "" {
		return otherwise
	}
	n, err := strconv.Atoi(value)
	if err != nil || n < 1 {
		t.Fatalf("%s is %q, want a number above 0", name, value)
	}
	return n
}

// span reads a time from the environment.
func span(t *testing.T, name string, otherwise time.Duration) time.Duration {
	t.Helper()
	value := os.Getenv(name)
	if value == "" {
		return otherwise
	}
	d, err := time.ParseDuration(value)
	if err != nil || d <= 0 {
		t.Fatalf("%s is %q, want a time above 0 like 2m", name, value)
	}
	return d
}

// readFile returns what is in the file.
func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// until waits for the end of d or of ctx.
func until(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// cleanupContext is for what cleanups do: the test's own context has ended.
func cleanupContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 20*time.Second)
}

// TestPercentile holds the nearest rank, of times from 1 to n in falling order.
func TestPercentile(t *testing.T) {
	upTo := func(n int) []time.Duration {
		var all []time.Duration
		for i := n; i >= 1; i-- {
			all = append(all, time.Duration(i))
		}
		return all
	}
	for name, tt := range map[string]struct {
		times []time.Duration
		p     float64
		want  time.Duration
	}{
		"none":                   {nil, 99, 0},
		"one":                    {upTo(1), 50, 1},
		"least":                  {upTo(100), 0, 1},
		"median of 100":          {upTo(100), 50, 50},
		"99th of 100":            {upTo(100), 99, 99},
		"99th of 30 is the last": {upTo(30), 99, 30},
		"most":                   {upTo(100), 100, 100},
	} {
		t.Run(name, func(t *testing.T) {
			if got := newDistribution(tt.times).percentile(tt.p); got != tt.want {
				t.Errorf("percentile %v is %d, want %d", tt.p, got, tt.want)
			}
		})
	}
}
