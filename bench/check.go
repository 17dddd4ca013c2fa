package main

import (
	"fmt"
	"slices"
)

// routing opens sessions, notes which backend each namespace has, and closes
// them.
type routing struct {
	*client
	backend []int // of each namespace; -1: not seen
}

// checkRouting opens 4 sessions of each namespace, and returns the backends that
// these have.
func checkRouting(t *target, namespaces []string) ([]int, error) {
	c, err := newClient(t, namespaces)
	if err != nil {
		return nil, err
	}
	defer c.close()
	r := &routing{client: c, backend: slices.Repeat([]int{-1}, len(namespaces))}
	return r.backend, c.openAll(4*len(namespaces), r)
}

func (r *routing) opened(s *session) {
	if seen := r.backend[s.namespace]; seen >= 0 && seen != s.backend {
		s.fail(fmt.Sprintf("namespace %s with backend-%d, before with backend-%d", r.namespaces[s.namespace], s.backend, seen))
		return
	}
	r.backend[s.namespace] = s.backend
	s.close()
}

func (r *routing) message(*session, *frame) {}

// runCheck is no measurement: it fails unless every session is where it has to
// be and every byte comes back.
func runCheck(t *target) (values, error) { return checkAll(t, 500, overrideCount) }

// runCheckTLS is the same with fewer sessions, since a handshake takes a millisecond of the
// proxy. The clients see to the version of TLS, the cipher suite and the certificate.
func runCheckTLS(t *target) (values, error) { return checkAll(t, 100, 100) }

// checkAll checks so many namespaces without an override and with one, and the bytes.
func checkAll(t *target, hashed, overridden int) (values, error) {
	v := values{}
	if err := checkHash(t, v, hashed); err != nil {
		return nil, fmt.Errorf("without override: %w", err)
	}
	if t.overrides {
		if err := checkOverrides(t, v, overridden); err != nil {
			return nil, fmt.Errorf("with override: %w", err)
		}
	}
	return v, checkBytes(t)
}

// checkBytes: every byte comes back.
func checkBytes(t *target) error {
	for _, size := range []int{0, 1, 7, 125, 126, 127, 1024, 4095, 4096, 4097, 16384, 65535, 65536, 300_000, 2 << 20} {
		if err := checkEcho(t, size); err != nil {
			return fmt.Errorf("echo of %d bytes: %w", size, err)
		}
	}
	if err := checkStream(t); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	return nil
}

// checkHash: each of n namespaces has one backend, and every backend namespaces.
func checkHash(t *target, v values, n int) error {
	backends, err := checkRouting(t, names("ns-", n))
	if err != nil {
		return err
	}
	share := make([]int, backendCount)
	for _, backend := range backends {
		share[backend]++
	}
	v["namespaces"], v["least"], v["most"] = float64(len(backends)), float64(slices.Min(share)), float64(slices.Max(share))
	if slices.Min(share) == 0 {
		return fmt.Errorf("namespaces of the backends: %d, want some of each", share)
	}
	return nil
}

// checkOverrides: each of n namespaces with an override has that backend.
func checkOverrides(t *target, v values, n int) error {
	namespaces := names(overridePrefix, n)
	backends, err := checkRouting(t, namespaces)
	if err != nil {
		return err
	}
	for i, backend := range backends {
		if backend != overrideBackend(i) {
			return fmt.Errorf("%s with backend-%d, want backend-%d", namespaces[i], backend, overrideBackend(i))
		}
	}
	v["overrides"] = float64(n)
	return nil
}

// checkEcho sends messages of one size on some sessions, twice.
func checkEcho(t *target, size int) error {
	e, err := openEcho(t, 8, size)
	if err != nil {
		return err
	}
	defer e.close()
	if err := e.verify(); err != nil {
		return err
	}
	return e.verify()
}

// runCheckHTTP is no measurement: it fails unless a plain request is where the sessions
// of its namespace are, and each answer is that of its request.
func runCheckHTTP(t *target) (values, error) {
	for _, namespaces := range [][]string{names("ns-", 500), names(overridePrefix, overrideCount)} {
		if err := checkPlain(t, namespaces, 0); err != nil {
			return nil, fmt.Errorf("GET: %w", err)
		}
	}
	for _, size := range []int{8, 1024, 4095, 4096, 4097, 16384, 65535, 65536, 300_000} {
		if err := checkPlain(t, names("ns-", 40), size); err != nil {
			return nil, fmt.Errorf("POST of %d bytes: %w", size, err)
		}
	}
	return values{}, nil
}

// checkPlain sends two requests in each namespace, with bodies of size bytes.
func checkPlain(t *target, namespaces []string, size int) error {
	const conns = 20
	l, err := newLoop(t.backends.loop)
	if err != nil {
		return err
	}
	defer l.close()
	h, err := openPlain(t, l, namespaces, conns, size)
	if err != nil {
		return err
	}
	return h.exchange(2 * int64(len(namespaces)/conns))
}
