package main

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fakeDir is a directory of overrides under test. The tests look themselves,
// without a clock.
type fakeDir struct {
	*directory
	applied []sourceContent
	logged  *textLog
}

func newFakeDir(t *testing.T) *fakeDir {
	d := &fakeDir{logged: &textLog{}}
	create := newDirectory(filepath.Join(t.TempDir(), "overrides"), slog.New(slog.NewTextHandler(d.logged, nil)))
	d.directory = create(func(contents ...sourceContent) { d.applied = append(d.applied, contents...) }).(*directory)
	d.mkdir(t, "")
	return d
}

func (d *fakeDir) at(name string) string { return filepath.Join(d.path, name) }

func (d *fakeDir) mkdir(t *testing.T, name string) { must(t, os.Mkdir(d.at(name), 0o755)) }

func (d *fakeDir) write(t *testing.T, name, content string) {
	must(t, os.WriteFile(d.at(name), []byte(content), 0o644))
}

func (d *fakeDir) link(t *testing.T, target, name string) {
	must(t, os.Symlink(target, d.at("..next")), os.Rename(d.at("..next"), d.at(name)))
}

func (d *fakeDir) remove(t *testing.T, name string) { must(t, os.RemoveAll(d.at(name))) }

func (d *fakeDir) fifo(t *testing.T, name string) { must(t, syscall.Mkfifo(d.at(name), 0o600)) }

// want looks until nothing can change any more, and checks what was applied: at
// most one update, or none if data is nil.
func (d *fakeDir) want(t *testing.T, data map[string]string) {
	t.Helper()
	d.applied = nil
	for range 4 {
		d.poll()
	}
	switch {
	case data == nil && len(d.applied) > 0:
		t.Fatalf("applied %v, want nothing", d.applied)
	case data == nil:
	case len(d.applied) != 1:
		t.Fatalf("applied %v, want %v once; log:\n%s", d.applied, data, d.logged)
	case !maps.Equal(unpack(d.applied[0].overrides), unpack(newOverrideSet(data))):
		t.Fatalf("applied %v, want %v", unpack(d.applied[0].overrides), data)
	}
}

func TestDirectoryFollowsFiles(t *testing.T) {
	d := newFakeDir(t)
	d.want(t, map[string]string{})
	d.want(t, nil)
	d.write(t, "ns-01", "backend-1\n")
	d.write(t, "ns-02", "backend-2")
	d.want(t, map[string]string{"ns-01": "backend-1\n", "ns-02": "backend-2"})
	one := d.applied[0]
	d.write(t, "ns-01", "backend-10")
	d.want(t, map[string]string{"ns-01": "backend-10", "ns-02": "backend-2"})
	if d.applied[0].version == one.version || one.id.String() != "directory "+d.path {
		t.Errorf("%+v, then version %s", one, d.applied[0].version)
	}
	d.remove(t, "ns-02")
	d.want(t, map[string]string{"ns-01": "backend-10"})
	d.write(t, ".ns", "backend-1")
	d.write(t, "..ns", "backend-1") // no key of a ConfigMap
	d.want(t, map[string]string{"ns-01": "backend-10", ".ns": "backend-1"})
	d.remove(t, ".ns")
	d.remove(t, "ns-01")
	d.write(t, "ns-02", "backend-2")
	d.write(t, "ns-01", "  backend-1")
	d.want(t, map[string]string{"ns-01": "  backend-1", "ns-02": "backend-2"})
	wantEqual(t, "the version of the same content", d.applied[0].version, one.version)
	wantEqual(t, "the log", d.logged.String(), "")
}

// A file that takes the place of another one counts also with the same size and time, as after
// tar, kubectl cp, or where all files have one time.
func TestDirectoryReplacedFile(t *testing.T) {
	d, at := newFakeDir(t), time.Unix(1, 0)
	put := func(name, content string) {
		d.write(t, name, content)
		must(t, os.Chtimes(d.at(name), at, at))
	}
	put("ns-01", "backend-1")
	d.mkdir(t, "..other")
	put("..other/ns-01", "backend-2")
	d.want(t, map[string]string{"ns-01": "backend-1"})
	must(t, os.Rename(d.at("..other/ns-01"), d.at("ns-01")))
	d.want(t, map[string]string{"ns-01": "backend-2"})
	put("..other/ns-01", "backend-3")
	d.link(t, "..other/ns-01", "ns-01")
	d.want(t, map[string]string{"ns-01": "backend-3"})
}

// What is not settled is not applied: the second look must find what the first
// found, and what was read must not have changed meanwhile.
func TestDirectorySettles(t *testing.T) {
	d := newFakeDir(t)
	d.want(t, map[string]string{})
	d.applied = nil
	for i := range 20 {
		d.write(t, "ns-01", strings.Repeat("b", i))
		d.poll()
	}
	if d.applied != nil {
		t.Errorf("applied %v while it was being written", d.applied)
	}
	d.want(t, map[string]string{"ns-01": strings.Repeat("b", 19)})

	before, err := d.signature()
	must(t, err)
	d.write(t, "ns-01", "backend-1")
	d.applied = nil
	if err := d.apply(before); err != nil || d.applied != nil {
		t.Errorf("applied %v of another time than it was settled, error %v", d.applied, err)
	}
}

// A ConfigMap is mounted as links through ..data to a directory that is never
// written to; the links themselves come after it and go after it.
func TestDirectoryMountedConfigMap(t *testing.T) {
	d := newFakeDir(t)
	d.mkdir(t, "..1")
	d.write(t, "..1/ns-01", "backend-1")
	d.write(t, "..1/.hidden", "backend-1")
	d.link(t, "..1", "..data")
	d.link(t, "..data/ns-01", "ns-01")
	d.want(t, map[string]string{"ns-01": "backend-1", ".hidden": "backend-1"})

	d.mkdir(t, "..2")
	d.write(t, "..2/ns-02", "backend-2")
	d.want(t, nil)
	d.link(t, "..2", "..data")
	d.want(t, map[string]string{"ns-02": "backend-2"})
	d.remove(t, "..1")
	d.remove(t, "ns-01")
	d.link(t, "..data/ns-02", "ns-02")
	d.want(t, nil)

	d.link(t, "..3", "..data") // leads nowhere
	d.want(t, nil)
	d.mkdir(t, "..3")
	d.want(t, map[string]string{})
}

// What is no file is no entry; what cannot be read is an entry that cannot be
// read, and the others apply.
func TestDirectoryOddFiles(t *testing.T) {
	for name, c := range map[string]struct {
		make func(t *testing.T, d *fakeDir)
		want string // part of the entry's value, "" if there is none
	}{
		"the kubelet's file":  {func(t *testing.T, d *fakeDir) { d.write(t, "..odd", "backend-1") }, "-"},
		"directory":           {func(t *testing.T, d *fakeDir) { d.mkdir(t, "odd") }, "-"},
		"link to a directory": {func(t *testing.T, d *fakeDir) { d.link(t, "..", "odd") }, "-"},
		"link to a file":      {func(t *testing.T, d *fakeDir) { d.link(t, "ns-01", "odd") }, "backend-1"},
		"pipe":                {func(t *testing.T, d *fakeDir) { d.fifo(t, "odd") }, "-"},
		"link to a pipe":      {func(t *testing.T, d *fakeDir) { d.fifo(t, ".pipe"); d.link(t, ".pipe", "odd") }, "-"},
		"dangling link":       {func(t *testing.T, d *fakeDir) { d.link(t, "nowhere", "odd") }, "no such file"},
		"looping link":        {func(t *testing.T, d *fakeDir) { d.link(t, "odd", "odd") }, "too many levels"},
		"empty":               {func(t *testing.T, d *fakeDir) { d.write(t, "odd", "\n") }, ""},
		"1 MiB":               {func(t *testing.T, d *fakeDir) { d.write(t, "odd", strings.Repeat("x", 1<<20)) }, strings.Repeat("x", maxValueBytes)},
		"binary":              {func(t *testing.T, d *fakeDir) { d.write(t, "odd", "\x00\xff") }, "\x00\xff"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newFakeDir(t)
			d.write(t, "ns-01", "backend-1")
			c.make(t, d)
			for range 4 {
				d.poll()
			}
			if len(d.applied) != 1 || unpack(d.applied[0].overrides)["ns-01"] != "backend-1" {
				t.Fatalf("applied %v", d.applied)
			}
			odd, found := unpack(d.applied[0].overrides)["odd"]
			if found != (c.want != "-") || found && !strings.Contains(odd, c.want) || len(odd) > maxDirValue {
				t.Errorf("entry %.100q (%t), want %.100q", odd, found, c.want)
			}
		})
	}
}

func TestDirectoryMissing(t *testing.T) {
	d := newFakeDir(t)
	d.remove(t, "")
	if why := d.whyNotReady(); !strings.Contains(why, "has not been read yet") {
		t.Errorf("missing: %s", why)
	}
	d.want(t, nil)
	if why := d.whyNotReady(); !strings.Contains(why, "no such file") || d.logged.count("level=WARN") != 1 {
		t.Errorf("missing: %s; log:\n%s", why, d.logged)
	}
	d.mkdir(t, "")
	d.write(t, "ns-01", "backend-1")
	d.want(t, map[string]string{"ns-01": "backend-1"})
	version := d.applied[0].version
	wantEqual(t, "why it is not ready", d.whyNotReady(), "")
	os.Rename(d.path, d.path+".away")
	d.want(t, nil)
	os.Rename(d.path+".away", d.path)
	d.want(t, map[string]string{"ns-01": "backend-1"})
	if d.problem.Load() != nil || d.applied[0].version != version || d.logged.count("level=WARN") != 2 {
		t.Errorf("version %s, want %s as before; log, want one warning each time:\n%s", d.applied[0].version, version, d.logged)
	}
}

// A removed directory, a bad entry and a stale copy change nothing in the table.
func TestDirectoryAndTable(t *testing.T) {
	d := newFakeDir(t)
	r := &tableStore{statefulSet: "backend", backends: backendSet{ordinalRange: ordinalRange{count: 4}}, log: d.log, onSwap: func() {}}
	_, live := r.addFakeSource(false)
	_, d.directory.update = r.addFakeSource(true)
	look := func(want string) {
		t.Helper()
		for range 4 {
			d.poll()
		}
		wantEqual(t, "overrides", fmt.Sprint(overridesOf(r.table())), want)
	}
	d.write(t, "ns-01", "backend-1\n")
	d.write(t, "ns-02", "backend-2")
	look("map[ns-01:1 ns-02:2]")
	d.link(t, "nowhere", "ns-02")
	d.write(t, "ns-03", "backend-3")
	look("map[ns-01:1 ns-02:2 ns-03:3]")
	d.remove(t, "")
	look("map[ns-01:1 ns-02:2 ns-03:3]")
	live(sourceContent{id: sourceID{"ConfigMap", "edge", "routes"}, version: "7", overrides: newOverrideSet(map[string]string{"ns-01": "backend-0"})})
	d.mkdir(t, "")
	d.write(t, "ns-01", "backend-3")
	look("map[ns-01:0]")
	wantEqual(t, "the source of the table", r.table().sourceName(), "ConfigMap edge/routes")
}

// run finds a change by itself, soon, and ends with its context.
func TestDirectoryRun(t *testing.T) {
	d := newFakeDir(t)
	applied := make(chan sourceContent, 10)
	d.directory.update = func(contents ...sourceContent) { applied <- contents[0] }
	stop := inBackground(t, d.run)
	for _, want := range []string{"", "backend-1", "backend-2"} {
		if want != "" {
			d.write(t, "..next", want)
			must(t, os.Rename(d.at("..next"), d.at("ns-01")))
		}
		select {
		case src := <-applied:
			wantEqual(t, "the override of ns-01", unpack(src.overrides)["ns-01"], want)
		case <-time.After(5 * time.Second):
			t.Fatalf("%q was not found", want)
		}
	}
	stop()
}
