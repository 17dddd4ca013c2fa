//go:build portable || !linux || 386

package main

import "net"

// express has no short way here: all clients are net/http's.
type express struct{ frontListener }

func newExpress(p *proxy, l net.Listener, g *gate) *express {
	return &express{frontListener{retryListener{l, newAcceptRetry("-listen", p.log)}, g, &p.results[resultBadHead]}}
}

func (x *express) run()  {}
func (x *express) stop() {}
