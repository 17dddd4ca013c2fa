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
	"strings"
	"sync/atomic"
	"time"
)

const (
	dirPoll  = 100 * time.Millisecond // between two looks at the directory
	dirShare = 20                     // a look takes at most 1/dirShare of the time
	dirValue = 1 << 10                // bytes that are read of a file: a name of a backend is shorter
)

// directory follows overrides in a directory with one file for each namespace,
// as a mounted ConfigMap is one. It looks rather than being told: inotify is
// Linux only and silent on some network and mounted file systems.
type directory struct {
	// Static after construction.
	path   string
	stale  bool // it is a copy of what the API server has
	update func(entries)
	log    *slog.Logger

	problem atomic.Pointer[string] // why the last look failed; nil if it did not

	// Owned by run.
	seen    string // the signature of the last look
	applied string // the signature of what was given to update
}

// run looks until ctx ends. What it finds counts when two looks agree: a file
// may be half written at the first.
func (d *directory) run(ctx context.Context) {
	for {
		begun := time.Now()
		d.look()
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(dirPoll, dirShare*time.Since(begun))):
		}
	}
}

// missing says, in words, why nothing was given to update yet.
func (d *directory) missing() string {
	if problem := d.problem.Load(); problem != nil {
		return *problem
	}
	return "directory " + d.path + " was not read yet"
}

// look compares the directory with the last look, and applies what is new and
// settled. A directory that cannot be read changes nothing.
func (d *directory) look() {
	signature, err := d.signature()
	if err != nil {
		d.fail(err)
		return
	}
	settled := signature == d.seen
	d.seen = signature
	if !settled || signature == d.applied {
		return
	}
	data, version, err := d.read()
	if err != nil {
		d.fail(err)
		return
	}
	d.applied = signature
	d.problem.Store(nil)
	d.update(entries{source: "directory " + d.path, version: version, data: data, stale: d.stale})
}

// fail notes the error, and logs it if it is another than before.
func (d *directory) fail(err error) {
	text := fmt.Sprintf("read the overrides: %v", err)
	if old := d.problem.Swap(&text); old == nil || *old != text {
		d.log.Warn("directory", "error", text)
	}
	d.seen, d.applied = "", "" // look afresh when it is back
}

// signature changes whenever a file may have changed. The kubelet updates a
// mounted ConfigMap by swapping the symbolic link ..data, so there it is the
// link's target.
func (d *directory) signature() (string, error) {
	if target, err := os.Readlink(filepath.Join(d.path, "..data")); err == nil {
		return target, nil
	}
	files, err := d.files()
	if err != nil {
		return "", err
	}
	sum := fnv.New64a()
	for _, file := range files {
		info, err := os.Stat(filepath.Join(d.path, file.Name()))
		if err != nil {
			fmt.Fprintf(sum, "%s %v\n", file.Name(), err)
			continue
		}
		fmt.Fprintf(sum, "%s %d %d\n", file.Name(), info.Size(), info.ModTime().UnixNano())
	}
	return fmt.Sprintf("%016x", sum.Sum64()), nil
}

// files lists the directory's files in the order of their names. Names with a
// dot in front are not namespaces here: an editor's or the kubelet's own.
// Opening a pipe or a device could block.
func (d *directory) files() ([]fs.DirEntry, error) {
	all, err := os.ReadDir(d.path)
	if err != nil {
		return nil, err
	}
	files := all[:0]
	for _, file := range all {
		if (file.Type().IsRegular() || file.Type() == fs.ModeSymlink) && !strings.HasPrefix(file.Name(), ".") {
			files = append(files, file)
		}
	}
	return files, nil
}

// read returns the entries, and a version that is the same for the same
// entries. A file that cannot be read is an entry that cannot be read.
func (d *directory) read() (map[string]string, string, error) {
	files, err := d.files()
	if err != nil {
		return nil, "", err
	}
	data := make(map[string]string, len(files))
	sum := fnv.New64a()
	for _, file := range files {
		value, err := readStart(filepath.Join(d.path, file.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since it was listed
		}
		if err != nil {
			value = err.Error() // rejected as any value that names no backend
		}
		data[file.Name()] = value
		fmt.Fprintf(sum, "%q %q\n", file.Name(), strings.TrimSpace(value))
	}
	return data, fmt.Sprintf("dir-%016x", sum.Sum64()), nil
}

// readStart returns the first dirValue bytes of a file.
func readStart(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, dirValue))
	return string(b), err
}
