package main

import (
	"math"
	"os"
	"syscall"
)

// openFileLimit is how many files the process may have open: the hard limit, which
// Go makes the soft one too.
func openFileLimit() (int, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	return int(min(limit.Cur, math.MaxInt32)), nil
}
