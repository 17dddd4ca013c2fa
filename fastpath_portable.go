//go:build portable || !linux || 386

package main

import "net"

// fastPath has no short way here: all clients are net/http's.
type fastPath struct{ clientListener }

func newFastPath(p *proxy, l net.Listener, g *descriptorLimit) *fastPath {
	return &fastPath{clientListener{retryListener{l, newAcceptRetry("-listen", p.log)}, g, &p.results[resultBadHead]}}
}

func (x *fastPath) run()  {}
func (x *fastPath) stop() {}
