package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A host that is stopped, or a link that swallows everything, is noticed by
// HTTP/2 pings within 20 s. Through kubectl proxy there are none: there the
// deadline of the WATCH is what is left. Either way the old connection is not
// tried again.
func TestWatchFault10Frozen(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	for name, c := range map[string]struct {
		certificates []tls.Certificate
		proto        string
		within       time.Duration
	}{
		"HTTP/2":   {[]tls.Certificate{certificate}, "HTTP/2.0", 20 * time.Second},
		"HTTP/1.1": {nil, "HTTP/1.1", watchMax + watchGrace},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				server := newFakeKube(t, network, fakeKubeLists(2), fakeKubeScript{fakeKubeOpen()}, c.certificates...)
				k := network.kube(t)
				if c.certificates != nil {
					k = fakeKubePod(t, "127.0.0.1", "6443", ca)
					k.dial = network.dial
				}
				client := fakeKubeFollow(t, k)
				client.want(t, fakeKube1)
				time.Sleep(40 * time.Second) // a quiet connection that works is kept
				if verbs := server.verbs(); verbs != "LIST WATCH" {
					t.Errorf("asked %s", verbs)
				}
				network.freeze()
				begun := time.Now()
				client.want(t, fakeKube2)
				if took := time.Since(begun); took > c.within+backoffFirst+time.Millisecond {
					t.Errorf("noticed after %s, want %s", took, c.within)
				}
				if r := server.request(t); r.Proto != c.proto {
					t.Errorf("%s, want %s", r.Proto, c.proto)
				}
			})
		})
	}
}

// What hangs is given up on after a bound, and asked again on a new connection.
func TestWatchFault13Hangs(t *testing.T) {
	mute := func(n *fakeKubeNet) { n.frozen.Store(1) } // the first connection
	for name, c := range map[string]struct {
		fault       func(*fakeKubeNet)
		tls         bool
		list, watch http.HandlerFunc // the first
		within      time.Duration    // from the start to version 2
	}{
		"LIST without a head": {list: fakeKubeHang, within: listTime},
		"LIST without an end": {list: fakeKubeOpen(`{"kind":`), within: listTime},
		"no TLS handshake":    {fault: mute, tls: true, within: 5 * time.Second},
		"WATCH without a head": {watch: func(_ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
		}, within: watchMax + watchGrace},
		"half an event": {watch: func(w http.ResponseWriter, r *http.Request) {
			fakeKubeStream(`{"type":"MODIF`)(w, r)
			<-r.Context().Done()
		}, within: watchMax + watchGrace},
	} {
		t.Run(name, func(t *testing.T) {
			ca, certificate := fakeKubeCA(t)
			synctest.Test(t, func(t *testing.T) {
				network := newFakeKubeNet()
				if c.fault != nil {
					c.fault(network)
				}
				lists, watches := fakeKubeScript{fakeKubeLists(2)[1]}, fakeKubeScript{fakeKubeOpen()}
				if c.list != nil {
					lists = append(fakeKubeScript{c.list}, lists...)
				}
				if c.watch != nil {
					lists, watches = append(fakeKubeLists(1), lists...), append(fakeKubeScript{c.watch}, watches...)
				}
				k, certificates := network.kube(t), []tls.Certificate(nil)
				if c.tls {
					k, certificates = fakeKubePod(t, "127.0.0.1", "6443", ca), []tls.Certificate{certificate}
					k.dial = network.dial
				}
				newFakeKube(t, network, lists, watches, certificates...)
				client := fakeKubeFollow(t, k)
				begun := time.Now()
				if c.watch != nil {
					client.want(t, fakeKube1)
				}
				client.want(t, fakeKube2)
				if took := time.Since(begun); took > c.within+750*time.Millisecond {
					t.Errorf("took %s, want at most %s and a first pause", took, c.within)
				}
			})
		})
	}
}

// No connection is used for a second request, however the first ended, and none
// is left.
func TestConnectionServesOneRequest(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	ok := fakeKubeLists(1)[0]
	for name, c := range map[string]struct{ list, watch http.HandlerFunc }{
		"LIST 401":        {fakeKubeSay(401, `{"message":"Unauthorized"}`), nil},
		"LIST 500":        {fakeKubeSay(500, "dial tcp 127.0.0.1:6443: refused"), nil},
		"LIST 302":        {fakeKubeSay(302, "", "Location", "http://elsewhere/"), nil},
		"LIST cut":        {fakeKubeCut("{"), nil},
		"LIST of garbage": {fakeKubeSay(200, "<html>"), nil},
		"WATCH 410":       {ok, fakeKubeSay(410, `{"reason":"Expired"}`)},
		"WATCH ends":      {ok, fakeKubeStream()},
		"WATCH cut":       {ok, fakeKubeCut()},
		"WATCH ERROR":     {ok, fakeKubeOpen(fakeKubeEvent("ERROR", `{"code":410}`))},
	} {
		for proto, certificates := range map[string][]tls.Certificate{"HTTP/2": {certificate}, "HTTP/1.1": nil} {
			t.Run(name+" "+proto, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					network := newFakeKubeNet()
					watches := fakeKubeScript{fakeKubeOpen()}
					if c.watch != nil {
						watches = fakeKubeScript{c.watch, fakeKubeOpen()}
					}
					server := newFakeKube(t, network, fakeKubeScript{c.list, fakeKubeLists(2)[1]}, watches, certificates...)
					k := network.kube(t)
					if certificates != nil {
						k = fakeKubePod(t, "127.0.0.1", "6443", ca)
						k.dial = network.dial
					}
					client := fakeKubeFollow(t, k)
					if c.watch != nil {
						client.want(t, fakeKube1)
					}
					client.want(t, fakeKube2)
					time.Sleep(time.Second)
					requests := len(strings.Fields(server.verbs()))
					if n, open := network.dials.Load(), network.open.Load(); int(n) != requests || open != 1 {
						t.Errorf("%d connections for %d requests, %d open; want as many, and that of the WATCH open", n, requests, open)
					}
				})
			})
		}
	}
}

// run ends with its context in every state, at once, and leaves neither a
// goroutine (the bubble would not end) nor a connection.
func TestStopInEveryState(t *testing.T) {
	ca, certificate := fakeKubeCA(t)
	ok := fakeKubeLists(1)[0]
	for name, c := range map[string]struct {
		list, watch http.HandlerFunc
		state       string
		frozen      bool
	}{
		"listing":           {fakeKubeHang, nil, stateListing, false},
		"within a list":     {fakeKubeOpen(`{"kind"`), nil, stateListing, false},
		"connecting":        {ok, fakeKubeHang, stateConnecting, false},
		"watching":          {ok, fakeKubeOpen(), stateWatching, false},
		"watching, frozen":  {ok, fakeKubeOpen(), stateWatching, true},
		"within an event":   {ok, fakeKubeOpen(`{"type"`), stateWatching, false},
		"waiting":           {fakeKubeSay(500, "no", "Retry-After", "60"), nil, stateWaiting, false},
		"waiting after one": {ok, fakeKubeSay(500, "no", "Retry-After", "60"), stateWaiting, false},
	} {
		for proto, certificates := range map[string][]tls.Certificate{"HTTP/2": {certificate}, "HTTP/1.1": nil} {
			t.Run(name+" "+proto, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					network := newFakeKubeNet()
					newFakeKube(t, network, fakeKubeScript{c.list}, fakeKubeScript{c.watch}, certificates...)
					k := network.kube(t)
					if certificates != nil {
						k = fakeKubePod(t, "127.0.0.1", "6443", ca)
						k.dial = network.dial
					}
					client := fakeKubeFollow(t, k)
					time.Sleep(3 * time.Second)
					if s, open := client.now(), network.open.Load(); s.state != c.state || (open == 1) == (c.state == stateWaiting) {
						t.Fatalf("%d connections, %+v, want %s, and one unless it is that", open, s, c.state)
					}
					if c.frozen {
						network.freeze()
					}
					begun := time.Now()
					client.stop()
					synctest.Wait()
					if took := time.Since(begun); took > time.Second || network.open.Load() != 0 {
						t.Errorf("stopped after %s with %d connections", took, network.open.Load())
					}
				})
			})
		}
	}
}

func TestStopWhileConnecting(t *testing.T) {
	for name, conn := range map[string]bool{"dial": false, "TLS handshake": true} {
		t.Run(name, func(t *testing.T) {
			ca, _ := fakeKubeCA(t)
			synctest.Test(t, func(t *testing.T) {
				k := fakeKubePod(t, "127.0.0.1", "6443", ca)
				k.dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
					if conn {
						client, _ := net.Pipe()
						return client, nil
					}
					<-ctx.Done()
					return nil, ctx.Err()
				}
				c := fakeKubeFollow(t, k)
				time.Sleep(time.Second)
				begun := time.Now()
				c.stop()
				synctest.Wait()
				if took := time.Since(begun); took > time.Second {
					t.Errorf("stopped after %s", took)
				}
			})
		})
	}
}
