package main

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestParseBackends(t *testing.T) {
	tests := map[string]struct {
		list string
		want string // joined by |, or the error
	}{
		"two":       {"127.0.0.1:9000, backend-1.headless:9000", "127.0.0.1:9000|backend-1.headless:9000"},
		"IPv6":      {"[::1]:9000", "[::1]:9000"},
		"no port":   {"127.0.0.1", `backend 0 is "127.0.0.1", want host:port`},
		"no host":   {"127.0.0.1:1,:9000", `backend 1 is ":9000", want host:port`},
		"bad port":  {"a:http", `backend 0 is "a:http", want host:port`},
		"high port": {"a:65536", `backend 0 is "a:65536", want host:port`},
		"empty":     {"a:1,", `backend 1 is "", want host:port`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			addrs, err := parseBackends(tt.list)
			got := strings.Join(addrs, "|")
			if err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("parseBackends(%q) = %s, want %s", tt.list, got, tt.want)
			}
		})
	}
}

// What the short way dials is an address and a port. A zone is the link's, which
// has to be looked up: a net.Dialer does.
func TestBackendsAtOnce(t *testing.T) {
	addrs := []string{"127.0.0.1:9000", "[::1]:9000", "localhost:9000", "[fe80::1%eth0]:9000"}
	b := fixedBackends("backend", addrs)
	for ordinal, want := range []bool{true, true, false, false} {
		if addr, ok := b.atOnce(ordinal); ok != want || ok && addr.String() != addrs[ordinal] {
			t.Errorf("atOnce of %s is %s, %v; want %v", addrs[ordinal], addr, ok, want)
		}
		if dialling := b.holds.lines[ordinal].dialing; (dialling == 1) != want {
			t.Errorf("%s has %d dials under way, want %v", addrs[ordinal], dialling, want)
		}
	}
}

// resolver is a lookup that a test holds back and counts.
type resolver struct {
	asked atomic.Int64
	delay time.Duration
	err   error
}

func (r *resolver) lookup(ctx context.Context, _, host string) ([]netip.Addr, error) {
	n := r.asked.Add(1)
	select {
	case <-time.After(r.delay):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if r.err != nil {
		return nil, r.err
	}
	return []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(n)})}, nil
}

func TestAddressCache(t *testing.T) {
	newCache := func(r *resolver) *addressCache {
		return &addressCache{port: "9000", lookup: r.lookup, byHost: map[string]*address{}}
	}
	get := func(t *testing.T, c *addressCache, want string) {
		t.Helper()
		if got, err := c.get(t.Context(), "backend-2.headless"); got != want || err != nil {
			t.Errorf("get = %q, %v; want %q", got, err, want)
		}
	}
	tests := map[string]func(t *testing.T){
		"one lookup for many waiters": func(t *testing.T) {
			r := &resolver{delay: 100 * time.Millisecond}
			c := newCache(r)
			var all sync.WaitGroup
			for range 1000 {
				all.Go(func() { get(t, c, "10.0.0.1:9000") })
			}
			all.Wait()
			if n := r.asked.Load(); n != 1 {
				t.Errorf("%d lookups, want 1", n)
			}
		},
		"kept for a second": func(t *testing.T) {
			r := &resolver{}
			c := newCache(r)
			get(t, c, "10.0.0.1:9000")
			time.Sleep(addressTTL - time.Millisecond)
			get(t, c, "10.0.0.1:9000")
			time.Sleep(2 * time.Millisecond)
			get(t, c, "10.0.0.2:9000")
		},
		"dropped when it was no good": func(t *testing.T) {
			c := newCache(&resolver{})
			get(t, c, "10.0.0.1:9000")
			c.forget("backend-2.headless")
			get(t, c, "10.0.0.1:9000")
			time.Sleep(lookupRest + time.Millisecond)
			get(t, c, "10.0.0.2:9000")
		},
		"a failure is kept for a moment": func(t *testing.T) {
			r := &resolver{err: errors.New("no such host")}
			c := newCache(r)
			if _, err := c.get(t.Context(), "backend-2.headless"); err == nil || err.Error() != "look up backend-2.headless: no such host" {
				t.Errorf("error %v", err)
			}
			r.err = nil
			time.Sleep(lookupRest - time.Millisecond)
			if _, err := c.get(t.Context(), "backend-2.headless"); err == nil {
				t.Error("looked up again too soon")
			}
			time.Sleep(2 * time.Millisecond)
			get(t, c, "10.0.0.2:9000")
		},
		"who leaves does not end the lookup": func(t *testing.T) {
			r := &resolver{delay: time.Second}
			c := newCache(r)
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			if _, err := c.get(ctx, "backend-2.headless"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error %v, want deadline exceeded", err)
			}
			get(t, c, "10.0.0.1:9000")
		},
		"a lookup is bounded": func(t *testing.T) {
			c := newCache(&resolver{delay: time.Hour})
			begun := time.Now()
			if _, err := c.get(t.Context(), "backend-2.headless"); err == nil || time.Since(begun) != lookupTime {
				t.Errorf("error %v after %s, want one after %s", err, time.Since(begun), lookupTime)
			}
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) { synctest.Test(t, test) })
	}
}
