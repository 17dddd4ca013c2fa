package main

import (
	"errors"
	"time"
)

const (
	handshakes = 64                   // under way at a time
	closing    = 5 * time.Millisecond // for the proxy to notice the end of the last
)

// connector opens a session, hears the greeting, closes it, and begins again.
type connector struct {
	*client
	more      bool
	resumed   int // handshakes with a ticket
	latencies []time.Duration
}

func openConnect(t *target) (load, error) {
	c, err := newClient(t, names("ns-", 256))
	if err != nil {
		return nil, err
	}
	k := &connector{client: c}
	c.user = k
	return k, nil
}

func (k *connector) opened(s *session) {
	k.latencies = append(k.latencies, k.now()-s.begun)
	if s.security != nil && s.security.resumed() {
		k.resumed++
	}
	s.close()
	if k.more {
		k.dial()
	}
}

func (k *connector) message(*session, *frame) {}

func (k *connector) send(d time.Duration) error {
	k.more = true
	for k.opening < handshakes && k.failure == nil {
		k.dial()
	}
	k.run(d)
	k.more = false
	err := k.until(func() bool { return k.opening == 0 || k.failure != nil })
	k.run(closing)
	return errors.Join(err, k.failure)
}

func (k *connector) count() { k.latencies, k.resumed = nil, 0 }

func (k *connector) values(used use) (values, error) {
	v, err := used.operations(k.latencies)
	if err == nil && k.config != nil && k.config.ClientSessionCache != nil {
		v["resumed"] = float64(k.resumed) / float64(len(k.latencies))
	}
	return v, err
}
