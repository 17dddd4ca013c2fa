package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// dialTime bounds one dial: a pod that is gone may answer nothing at all.
const dialTime = 2 * time.Second

// ordinals are those of the backends that have namespaces: count of them, from
// first on.
type ordinals struct{ first, count int }

func (o ordinals) has(ordinal int) bool { return ordinal >= o.first && ordinal < o.first+o.count }

// String is "4" for 0 to 3, "2+4" for 2 to 5.
func (o ordinals) String() string {
	if o.first == 0 {
		return strconv.Itoa(o.count)
	}
	return strconv.Itoa(o.first) + "+" + strconv.Itoa(o.count)
}

// backends knows where each backend is, and dials it: at addresses that are
// given, by DNS, or where the EndpointSlices say.
type backends struct {
	// Static after construction.
	statefulSet string   // the part of a backend's name before its ordinal
	given       ordinals // what the flags say; none if the StatefulSet is followed
	dialer      net.Dialer
	holds       *holds
	locate      func(ctx context.Context, ordinal int) (addr string, err error)
	forget      func(ordinal int)        // the address was no good
	pod         func(ordinal int) string // uid of the pod that locate finds, "" if not known
	close       func()                   // returns when nothing that locate started runs any more
}

// name returns the name of the backend with this ordinal.
func (b *backends) name(ordinal int) string { return backendName(b.statefulSet, ordinal) }

func backendName(statefulSet string, ordinal int) string {
	return statefulSet + "-" + strconv.Itoa(ordinal)
}

// backendOrdinal reads the name of a backend. Only the one spelling that
// backendName makes is taken: no sign, no leading zero.
func backendOrdinal(statefulSet, name string) (int, bool) {
	digits, ok := strings.CutPrefix(name, statefulSet+"-")
	if !ok || len(digits) > 9 {
		return 0, false
	}
	n, err := strconv.Atoi(digits)
	if err != nil || n < 0 || strconv.Itoa(n) != digits {
		return 0, false
	}
	return n, true
}

// always lets every backend be dialled: there is nothing that says more than the
// dial.
func always(int) error { return nil }

// unknownPod is for backends of which no pods are known.
func unknownPod(int) string { return "" }

// fixedBackends are at the given addresses, in the order of their ordinals.
func fixedBackends(statefulSet string, addrs []string) *backends {
	return &backends{
		statefulSet: statefulSet,
		given:       ordinals{count: len(addrs)},
		holds:       newHolds(always),
		locate:      func(_ context.Context, ordinal int) (string, error) { return addrs[ordinal], nil },
		forget:      func(int) {},
		pod:         unknownPod,
		close:       func() {},
	}
}

// parseBackends reads the list of host:port of -backends.
func parseBackends(list string) ([]string, error) {
	addrs := strings.Split(list, ",")
	for i, addr := range addrs {
		addrs[i] = strings.TrimSpace(addr)
		host, port, err := net.SplitHostPort(addrs[i])
		if n, perr := strconv.Atoi(port); err != nil || host == "" || perr != nil || n < 1 || n > 65535 {
			return nil, fmt.Errorf("backend %d is %q, want host:port", i, addrs[i])
		}
	}
	return addrs, nil
}

// dial connects to the backend once. The caller closes the connection.
func (b *backends) dial(ctx context.Context, ordinal int) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	addr, err := b.locate(ctx, ordinal)
	if err != nil {
		return nil, err
	}
	conn, err := b.dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		b.forget(ordinal)
		return nil, err
	}
	if conn.LocalAddr().String() == conn.RemoteAddr().String() { // package net tries twice more, and then returns it
		conn.Close()
		b.forget(ordinal)
		return nil, fmt.Errorf("dial tcp %s: %w", addr, errToItself)
	}
	return conn, nil
}

// errToItself says that a connection's two ends are one socket: nobody listens at
// the address, and the system has chosen its port for the end that dials (RFC 9293
// §3.5, simultaneous open). It would answer a client with its own request.
var errToItself = errors.New("connected to itself, as nobody listens there")

// atOnce returns the address of a backend that may be dialled now, if nobody has
// to wait for that. The caller calls dialled.
func (b *backends) atOnce(ordinal int) (addr netip.AddrPort, ok bool) {
	if !b.holds.try(ordinal) {
		return addr, false
	}
	now, cancel := context.WithTimeout(context.Background(), 0)
	defer cancel()
	text, err := b.locate(now, ordinal)
	if err == nil {
		addr, err = netip.ParseAddrPort(text) // not of a host's name, which has to be looked up
	}
	if err != nil || addr.Addr().Zone() != "" { // nor of a link's, which has
		b.holds.done(ordinal, err, true)
		return addr, false
	}
	return addr, true
}

// dialled takes note of how the dial of an address from atOnce went; cut says that
// its upgrade ended before it could.
func (b *backends) dialled(ordinal int, err error, cut bool) {
	if err != nil && !cut {
		b.forget(ordinal)
	}
	b.holds.done(ordinal, err, cut)
}

// misdirected takes note that what answered at the backend's address is another.
func (b *backends) misdirected(ordinal int, err error) {
	b.forget(ordinal)
	b.holds.misdirected(ordinal, err)
}

// probe returns the backend's address, and whether it takes a connection now.
func (b *backends) probe(ctx context.Context, ordinal int) (addr string, err error) {
	conn, err := b.dial(ctx, ordinal)
	if err == nil {
		conn.Close()
	}
	addr, _ = b.locate(ctx, ordinal) // "" where dial has said why
	return addr, err
}

// hold waits until the owner is ready, dials it, and returns the connection to the one
// that owner named last, and the uid of its pod, if that is known. It dials again for as long as the owner is called
// ready, and asks owner again when the table was swapped. An error of owner ends
// it, as does ctx: then the error says what there was to wait for, or how the last
// dial failed.
func (b *backends) hold(ctx context.Context, owner func() (int, error)) (net.Conn, string, error) {
	w := b.holds.enter()
	for {
		swaps := b.holds.swaps.Load()
		ordinal, err := owner()
		if err != nil {
			return nil, "", err
		}
		var conn net.Conn
		var pod string
		if err = b.holds.wait(ctx, w, ordinal, swaps); err == nil {
			conn, pod, err = b.dialInTurn(ctx, w, ordinal)
		}
		if !errors.Is(err, errAskAgain) {
			return conn, pod, err
		}
	}
}

// dialInTurn dials the backend for w, which has its turn, and returns the connection and
// the uid of the pod, if that is known. If the dial fails it returns errAskAgain, or,
// when ctx has ended, what holds.reason says: not the error of a dial that ctx cut short.
func (b *backends) dialInTurn(ctx context.Context, w *waiter, ordinal int) (net.Conn, string, error) {
	pod := b.pod(ordinal) // before the address: a pod that is new by then is taken for the old one, never the other way
	conn, err := b.dial(ctx, ordinal)
	cut := isOver(ctx)
	b.holds.done(ordinal, err, cut)
	switch {
	case err == nil:
		return conn, pod, nil
	case cut:
		return nil, "", b.holds.reason(w, ordinal, err)
	}
	w.failure = err
	return nil, "", errAskAgain
}

// isOver reports whether ctx has ended, or its deadline has passed: a dial may see that
// before ctx does.
func isOver(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(deadline)
}
