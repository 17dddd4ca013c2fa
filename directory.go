package main

import (
	"context"
	"errors"
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
	dirPollInterval = 100 * time.Millisecond // between two polls, at least
	dirPollShare    = 20                     // polls take at most 1/dirPollShare of the time
	maxDirValue     = 1 << 10                // bytes read of a file, at most
)

// directory is a source of overrides: a directory with one file for each namespace, such
// as a mounted ConfigMap. It polls, because inotify exists only on Linux and reports
// nothing on some network and mounted file systems.
type directory struct {
	// Static after construction.
	path   string
	update func(...sourceContent) // gets the overrides, once for each change
	log    *slog.Logger

	problem atomic.Pointer[string] // why the last poll has not read it; nil if it has

	// Owned by run.
	lastSignature    string // found by the last poll
	appliedSignature string // of the overrides that update got
	unreadVersion    string // version of these if a file could not be read, so that all are read again; or ""
}

// newDirectory returns what makes the source of the directory at path: see
// tableStore.addSource.
func newDirectory(path string, log *slog.Logger) func(update func(...sourceContent)) overrideSource {
	return func(update func(...sourceContent)) overrideSource {
		d := &directory{path: path, update: update, log: log}
		notYet := d.id().String() + " has not been read yet"
		d.problem.Store(&notYet)
		return d
	}
}

// id identifies the directory among the sources of overrides.
func (d *directory) id() sourceID { return sourceID{kind: "directory", name: d.path} }

// run polls the directory until ctx ends. A change is applied when two polls find the
// same: a file may be half written at the first.
func (d *directory) run(ctx context.Context) {
	for {
		begun := time.Now()
		d.poll()
		if sleep(ctx, max(dirPollInterval, dirPollShare*time.Since(begun))) != nil {
			return
		}
	}
}

// whyNotReady says why update was not called yet.
func (d *directory) whyNotReady() string {
	if problem := d.problem.Load(); problem != nil {
		return *problem
	}
	return ""
}

// poll compares the directory with the last poll, and applies a change that both polls
// found. If the directory cannot be read, the last overrides stay in force.
func (d *directory) poll() {
	signature, err := d.signature()
	isDue := signature != d.appliedSignature || d.unreadVersion != ""
	if err == nil && signature == d.lastSignature && isDue {
		err = d.apply(signature)
	}
	if err != nil {
		d.setError(err)
		return
	}
	d.lastSignature = signature
}

// apply reads the overrides and gives them to update, unless the directory has changed
// since the signature was computed: some could be older than others. If they are those that update
// has got, it does not get them again.
func (d *directory) apply(signature string) error {
	data, version, whole, err := d.read()
	if err != nil {
		return err
	}
	if after, err := d.signature(); err != nil || after != signature {
		return err
	}
	isNew := signature != d.appliedSignature || version != d.unreadVersion
	d.appliedSignature, d.unreadVersion = signature, ""
	if !whole {
		d.unreadVersion = version
	}
	d.problem.Store(nil)
	if !isNew {
		return nil
	}
	d.update(sourceContent{id: d.id(), version: version, overrides: newOverrideSet(data)})
	return nil
}

// setError stores the error, and logs it if it differs from the last one.
func (d *directory) setError(err error) {
	text := fmt.Sprintf("read the overrides: %v", err)
	if old := d.problem.Swap(&text); old == nil || *old != text {
		d.log.Warn("cannot read the overrides directory", "error", text)
	}
	d.lastSignature, d.appliedSignature = "", "" // read all again once the error is gone
}

// signature returns a text that changes whenever a file may have changed: when it is another file,
// or has another size or time. So a file must not be written in place with the time that it had. For
// a mounted ConfigMap it is the target of the symbolic link ..data: the kubelet never writes to the
// files, but makes a new directory and replaces the link.
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
		stat := info.Sys().(*syscall.Stat_t)
		fmt.Fprintf(sum, "%s %d:%d %d %d\n", file.Name(), stat.Dev, stat.Ino, info.Size(), info.ModTime().UnixNano())
	}
	return fmt.Sprintf("%016x", sum.Sum64()), nil
}

// overrideFiles returns the regular files and symbolic links of the directory at path, in
// the order of their names. It leaves out names that begin with two dots, such as ..data:
// these are the kubelet's own (see namespaceKey).
func overrideFiles(path string) ([]fs.DirEntry, error) {
	all, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(file fs.DirEntry) bool {
		return strings.HasPrefix(file.Name(), "..") ||
			!file.Type().IsRegular() && file.Type() != fs.ModeSymlink
	}), nil
}

// read returns the overrides by key, as a ConfigMap has them, and a version that depends on
// them alone. If a file cannot be read, its override is invalid: its value is the error's
// text; whole is false if that may change although the signature stays. In a mounted
// ConfigMap, read uses the files in ..data: the kubelet adds and removes the links beside
// ..data later than the files.
func (d *directory) read() (data map[string]string, version string, whole bool, err error) {
	path := filepath.Join(d.path, "..data")
	if _, err := os.Lstat(path); err != nil {
		path = d.path
	}
	found, err := overrideFiles(path)
	if err != nil {
		return nil, "", false, err
	}
	data, whole = make(map[string]string, len(found)), true
	sum := fnv.New64a()
	for _, file := range found {
		value, ok, err := readPrefix(filepath.Join(path, file.Name()), maxDirValue)
		if err != nil {
			whole = whole && errors.Is(err, fs.ErrNotExist) // the signature shows that it exists again
			value = err.Error()                             // the table rejects it, as it names no backend
		} else if !ok {
			continue
		}
		data[file.Name()] = value
		fmt.Fprintf(sum, "%q %q\n", file.Name(), strings.TrimSpace(value))
	}
	return data, fmt.Sprintf("dir-%016x", sum.Sum64()), whole, nil
}

// readPrefix returns the first bytes of the file at path, at most limit. ok is false if it
// is not a regular file but, for example, a directory. It does not block on a named pipe.
func readPrefix(path string, limit int64) (value string, ok bool, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return "", false, err
	}
	b, err := io.ReadAll(io.LimitReader(f, limit))
	return string(b), true, err
}
