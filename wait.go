package main

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// backoff gives the waits between the tries of what fails: min after the first failure,
// twice as long after each further one, at most max.
type backoff struct{ min, max time.Duration }

// delay returns the wait after this many failures in a row, at least 1, without a jitter.
func (b backoff) delay(failures int) time.Duration {
	return min(b.max, b.min<<min(failures-1, 10))
}

// jittered returns the delay with a jitter of half of it up or down, so that those that
// failed together do not try again together. random is in [0, 1).
func (b backoff) jittered(failures int, random float64) time.Duration {
	return time.Duration((0.5 + random) * float64(b.delay(failures)))
}

// sleep waits for d. If ctx ends before, it returns the error of ctx at once.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// isClosed reports whether the channel, which is only ever closed, is. A nil one is not.
func isClosed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// earliest returns the earlier one of two times. A zero time is never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// latest returns the later one of two times.
func latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// insertSorted inserts a value into list, which is sorted by order, and returns the first limit
// elements.
func insertSorted[T any](list []T, value T, limit int, order func(a, b T) int) []T {
	if len(list) == limit && order(list[limit-1], value) <= 0 {
		return list // most often, if there are many values
	}
	i, _ := slices.BinarySearchFunc(list, value, order)
	list = slices.Insert(list, i, value)
	return list[:min(len(list), limit)]
}

// joined returns the texts of the elements of list, with the separator in between.
func joined[T any](list []T, separator string, text func(T) string) string {
	var all []string
	for _, one := range list {
		all = append(all, text(one))
	}
	return strings.Join(all, separator)
}

// parseDecimal parses a decimal number of at most this many bits, without a sign or leading
// zeros.
func parseDecimal(text string, bits int) (n uint64, ok bool) {
	n, err := strconv.ParseUint(text, 10, bits)
	return n, err == nil && strconv.FormatUint(n, 10) == text
}

// wakeup wakes the goroutine that receives from it. It has a capacity of 1 and is never
// closed: a notify before the receive is kept, and several of them are one.
type wakeup chan struct{}

func newWakeup() wakeup { return make(wakeup, 1) }

// notify wakes the goroutine that receives. It does not block.
func (w wakeup) notify() {
	select {
	case w <- struct{}{}:
	default:
	}
}

// waitCount is a number, and goroutines can wait until it is 0. Unlike the number of a
// sync.WaitGroup, it may rise from 0 meanwhile. The zero value is 0.
type waitCount struct {
	mu   sync.Mutex
	n    int           // guarded by mu
	zero chan struct{} // guarded by mu; closed when n falls to 0; nil if nobody waits
}

// add adds delta, which may be negative.
func (c *waitCount) add(delta int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n += delta; c.n == 0 && c.zero != nil {
		close(c.zero)
		c.zero = nil
	}
}

// size returns the number.
func (c *waitCount) size() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// wait returns when the number is 0.
func (c *waitCount) wait() {
	c.mu.Lock()
	if c.n == 0 {
		c.mu.Unlock()
		return
	}
	if c.zero == nil {
		c.zero = make(chan struct{})
	}
	zero := c.zero
	c.mu.Unlock()
	<-zero
}

// pastDeadline is a deadline that ends the reads or writes of a connection that are under way,
// and all later ones.
func pastDeadline() time.Time { return time.Unix(1, 0) }

// splitList returns the items of a list with commas, as flags have it, without the spaces
// around them.
func splitList(list string) []string {
	items := strings.Split(list, ",")
	for i := range items {
		items[i] = strings.TrimSpace(items[i])
	}
	return items
}
