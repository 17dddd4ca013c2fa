package main

import (
	"os"
	"runtime"
	"syscall"
	"testing"
)

// A file that could not be read is read again, also if it looks as before: its size and its time do
// not show that the router may read it now, or that what was wrong is over. What stays as it was
// is applied once.
func TestDirectoryReadsAgain(t *testing.T) {
	d := newFakeDir(t)
	d.write(t, "ns-01", "backend-1")
	d.write(t, "ns-02", "backend-2")
	must(t, os.Chmod(d.at(".."), 0o755), os.Chmod(d.at("../.."), 0o755), os.Chmod(d.at("ns-02"), 0))
	poll := func() {
		done := make(chan struct{})
		go func() { // root may read everything
			defer close(done)
			runtime.LockOSThread() // and no unlock: the thread ends with the goroutine
			syscall.Setfsuid(65534)
			for range 4 {
				d.poll()
			}
		}()
		<-done
	}
	poll()
	poll()
	if len(d.applied) != 1 || unpack(d.applied[0].overrides)["ns-02"] == "backend-2" {
		t.Fatalf("applied %v, want once, without ns-02", d.applied)
	}
	must(t, os.Chmod(d.at("ns-02"), 0o644))
	poll()
	poll()
	if len(d.applied) != 2 || unpack(d.applied[1].overrides)["ns-02"] != "backend-2" {
		t.Fatalf("applied %v, want once more, with ns-02", d.applied)
	}
	wantEqual(t, "the log", d.logged.String(), "")
}
