package main

import "time"

// connector opens a session, hears the greeting, closes it, and begins again.
type connector struct {
	*client
	counting  bool
	latencies []time.Duration
}

func (k *connector) opened(s *session) {
	if k.counting {
		k.latencies = append(k.latencies, k.now()-s.begun)
	}
	s.close()
	k.dial()
}

func (k *connector) message(*session, *frame) {}

// handshakes keeps 64 handshakes under way for the time d.
func (k *connector) handshakes(d time.Duration) error {
	for k.opening < 64 && k.failure == nil {
		k.dial()
	}
	k.run(d)
	return k.failure
}

// runConnect measures handshakes.
func runConnect(t *target) (values, error) {
	c, err := newClient(t.ports, names("ns-", 256))
	if err != nil {
		return nil, err
	}
	defer c.close()
	k := &connector{client: c}
	c.user = k
	if err := k.handshakes(warmUp); err != nil {
		return nil, err
	}
	k.counting = true
	use, err := t.during(func() error { return k.handshakes(t.length) })
	if err != nil {
		return nil, err
	}
	return use.operations(k.latencies)
}
