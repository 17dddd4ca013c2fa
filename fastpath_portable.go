//go:build portable || !linux || 386

package main

import "net"

// fastPath only accepts clients here: net/http serves all.
type fastPath struct{ clientListener }

func newFastPath(p *proxy, l net.Listener, fdLimit *descriptorLimit) *fastPath {
	return &fastPath{clientListener{
		retryListener{l, newAcceptRetry("-listen", p.log)}, fdLimit, &p.results[resultBadHead], p.proxyProtocol, p.tls,
	}}
}

func (*fastPath) run()  {}
func (*fastPath) stop() {}
