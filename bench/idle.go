package main

import (
	"syscall"
	"time"
)

// usedSize is the size in bytes of the message that each idle session carries
// before memory is measured again.
const usedSize = 16 << 10

// runIdle measures the memory and the files of sessions at rest: how much more
// the proxy has than with none, after a little traffic.
func runIdle(t *target) (values, error) {
	if err := makeBusy(t); err != nil {
		return nil, err
	}
	t.backends.run(t.settle)
	base, kernel, err := t.memory()
	if err != nil {
		return nil, err
	}
	e, err := openEcho(t, t.idle, usedSize)
	if err != nil {
		return nil, err
	}
	defer e.close()
	defer resetAll(e.loop, t.backends.loop)
	n := float64(t.idle)
	v := values{"sessions": n, "base_mib": base.pss / 1024}
	measure := func(hold time.Duration, user, both string) error {
		e.run(hold)
		now, kernelNow, err := t.memory()
		v[user] = (now.pss - base.pss) / n
		v[both] = v[user] + (kernelNow-kernel)/n - t.own
		v["files"] = max(v["files"], (now.files-base.files)/n)
		return err
	}
	if err := measure(3*t.settle, "pss_kib", "all_kib"); err != nil {
		return nil, err
	}
	if err := e.verify(); err != nil {
		return nil, err
	}
	if err := measure(t.settle, "pss_used_kib", "all_used_kib"); err != nil {
		return nil, err
	}
	return v, e.failure
}

// memory is what the processes have, and the kernel for all programs in KiB.
func (t *target) memory() (m memory, kernel float64, err error) {
	if m, err = t.group.memory(); err != nil {
		return m, 0, err
	}
	kernel, err = kernelMemory()
	return m, kernel, err
}

// loadMemory measures what of the kernel's memory the load itself has for each session, in
// KiB: its sockets, the client's and the backend's, without a proxy between them. t is the
// load without a proxy.
func loadMemory(t *target) (float64, error) {
	if err := makeBusy(t); err != nil {
		return 0, err
	}
	t.backends.run(t.settle)
	before, err := kernelMemory()
	if err != nil {
		return 0, err
	}
	e, err := openEcho(t, t.idle, usedSize)
	if err != nil {
		return 0, err
	}
	defer e.close()
	defer resetAll(e.loop, t.backends.loop)
	e.run(3 * t.settle)
	after, err := kernelMemory()
	return (after - before) / float64(t.idle), err
}

// resetAll closes all connections of the loops with RST. So none is left in TIME-WAIT, whose
// memory the next measurement would miss when it goes.
func resetAll(loops ...*loop) {
	for _, l := range loops {
		for _, c := range l.conns {
			if c == nil || c.accept != nil {
				continue
			}
			syscall.SetsockoptLinger(c.fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
			c.security = nil // no more records
			c.close()
		}
	}
}

// makeBusy makes the proxy allocate what it does once.
func makeBusy(t *target) error {
	e, err := openEcho(t, 16, 64)
	if err != nil {
		return err
	}
	defer e.close()
	return e.flood(300 * time.Millisecond)
}
