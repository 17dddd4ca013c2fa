package main

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	dirPollInterval = 100 * time.Millisecond // between two looks at the directory
	dirPollShare    = 20                     // a look takes at most 1/dirPollShare of the time
	maxDirValue     = 1 << 10                // bytes that are read of a file: a name of a backend is shorter
)

// directory follows overrides in a directory with one file for each namespace,
// as a mounted ConfigMap is one. It looks rather than being told: inotify is
// Linux only and silent on some network and mounted file systems.
type directory struct {
	// Static after construction.
	path   string
	update func(...sourceContent) // gets the overrides, once for each change
	log    *slog.Logger

	lastError atomic.Pointer[string] // why the last look failed; nil if it did not

	// Owned by run.
	lastSignature    string // the signature of the last look
	appliedSignature string // the signature of what was given to update
}

// id identifies the directory among the sources of overrides.
func (d *directory) id() sourceID { return sourceID{kind: "directory", name: d.path} }

// run looks until ctx ends. What it finds counts when two looks agree: a file
// may be half written at the first.
func (d *directory) run(ctx context.Context) {
	for {
		begun := time.Now()
		d.poll()
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(dirPollInterval, dirPollShare*time.Since(begun))):
		}
	}
}

// whyNotReady says, in words, why nothing was given to update yet.
func (d *directory) whyNotReady() string {
	if problem := d.lastError.Load(); problem != nil {
		return *problem
	}
	return d.id().String() + " was not read yet"
}

// poll compares the directory with the last look, and applies what is new and
// settled. A directory that cannot be read changes nothing.
func (d *directory) poll() {
	signature, err := d.signature()
	if err == nil && signature == d.lastSignature && signature != d.appliedSignature {
		err = d.apply(signature)
	}
	if err != nil {
		d.setError(err)
		return
	}
	d.lastSignature = signature
}

// apply reads the entries and gives them to update, unless the directory has
// changed since the signature was made: they could be of two times.
func (d *directory) apply(signature string) error {
	data, version, err := d.read()
	if err != nil {
		return err
	}
	if after, err := d.signature(); err != nil || after != signature {
		return err
	}
	d.appliedSignature = signature
	d.lastError.Store(nil)
	d.update(sourceContent{id: d.id(), version: version, overrides: newOverrideSet(data)})
	return nil
}

// setError notes the error, and logs it if it is another than before.
func (d *directory) setError(err error) {
	text := fmt.Sprintf("read the overrides: %v", err)
	if old := d.lastError.Swap(&text); old == nil || *old != text {
		d.log.Warn("directory", "error", text)
	}
	d.lastSignature, d.appliedSignature = "", "" // look afresh when it is back
}

// signature changes whenever a file may have changed. A mounted ConfigMap is
// never written to: the kubelet makes a new directory and swaps the symbolic
// link ..data to it, so there the link's target is enough.
func (d *directory) signature() (string, error) {
	if target, err := os.Readlink(filepath.Join(d.path, "..data")); err == nil {
		return target, nil
	}
	found, err := overrideFiles(d.path)
	if err != nil {
		return "", err
	}
	sum := fnv.New64a()
	for _, file := range found {
		info, err := os.Stat(filepath.Join(d.path, file.Name()))
		if err != nil {
			fmt.Fprintf(sum, "%s %v\n", file.Name(), err)
			continue
		}
		fmt.Fprintf(sum, "%s %d %d\n", file.Name(), info.Size(), info.ModTime().UnixNano())
	}
	return fmt.Sprintf("%016x", sum.Sum64()), nil
}

// overrideFiles lists what may be files in the order of their names. Names with two dots in
// front are the kubelet's own, as of ..data: overrideKeyFault.
func overrideFiles(path string) ([]fs.DirEntry, error) {
	all, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(file fs.DirEntry) bool {
		return overrideKeyFault(file.Name()) != "" || !file.Type().IsRegular() && file.Type() != fs.ModeSymlink
	}), nil
}

// read returns the entries, and a version that is the same for the same
// entries. A file that cannot be read is an entry that cannot be read. In a
// mounted ConfigMap the links beside ..data come later and go later than what
// they point to, so they are not asked.
func (d *directory) read() (map[string]string, string, error) {
	path := filepath.Join(d.path, "..data")
	if _, err := os.Lstat(path); err != nil {
		path = d.path
	}
	found, err := overrideFiles(path)
	if err != nil {
		return nil, "", err
	}
	data := make(map[string]string, len(found))
	sum := fnv.New64a()
	for _, file := range found {
		value, ok, err := readPrefix(filepath.Join(path, file.Name()))
		if err != nil {
			value = err.Error() // rejected as any value that names no backend
		} else if !ok {
			continue
		}
		data[file.Name()] = value
		fmt.Fprintf(sum, "%q %q\n", file.Name(), strings.TrimSpace(value))
	}
	return data, fmt.Sprintf("dir-%016x", sum.Sum64()), nil
}

// readPrefix returns the first maxDirValue bytes of a file; ok is false if the path
// leads to something else, such as a directory. Opening a pipe does not block.
func readPrefix(path string) (value string, ok bool, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return "", false, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxDirValue))
	return string(b), true, err
}
