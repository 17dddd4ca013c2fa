//go:build portable || !linux || 386

package main

import "net"

// fastPath is none here: all clients are net/http's.
type fastPath struct{ clientListener }

func newFastPath(p *proxy, l net.Listener, g *descriptorLimit) *fastPath {
	return &fastPath{clientListener{
		retryListener{l, newAcceptRetry("-listen", p.log)}, g, &p.results[resultBadHead], p.proxyProtocol, p.tls,
	}}
}

func (*fastPath) run()  {}
func (*fastPath) stop() {}
