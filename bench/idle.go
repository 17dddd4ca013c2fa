package main

import "time"

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
	base, err := t.group.memory()
	if err != nil {
		return nil, err
	}
	e, err := openEcho(t, t.idle, usedSize)
	if err != nil {
		return nil, err
	}
	defer e.close()
	v := values{"sessions": float64(t.idle), "base_mib": base.pss / 1024}
	measure := func(hold time.Duration, name string) error {
		e.run(hold)
		now, err := t.group.memory()
		v[name] = (now.pss - base.pss) / float64(t.idle)
		v["files"] = max(v["files"], (now.files-base.files)/float64(t.idle))
		return err
	}
	if err := measure(3*t.settle, "pss_kib"); err != nil {
		return nil, err
	}
	if err := e.verify(); err != nil {
		return nil, err
	}
	if err := measure(t.settle, "pss_used_kib"); err != nil {
		return nil, err
	}
	return v, e.failure
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
