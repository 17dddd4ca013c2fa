package k8s_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
)

// TestRelease makes a release of one commit in two directories: all files are the same.
func TestRelease(t *testing.T) {
	for _, program := range []string{"git", "kubectl", "sha256sum"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	first, second := filepath.Join(t.TempDir(), "first"), filepath.Join(t.TempDir(), "second/below")
	tagged(t, first)
	run(t, ".", "git", "clone", "-q", first, second)
	var sums [2]string
	for i, dir := range []string{first, second} {
		run(t, dir, "env", "REGISTRY=registry.example/team", "make", "release")
		made := files(t, filepath.Join(dir, "dist"))
		if len(made) != 11 { // three files of each platform and its archive, and three others
			t.Errorf("a release has %q", made)
		}
		sums[i] = run(t, filepath.Join(dir, "dist"), "sha256sum", made...)
	}
	if sums[0] != sums[1] {
		t.Errorf("two builds of one commit differ:\n%s\n\n%s", sums[0], sums[1])
	}
	dist := filepath.Join(first, "dist")
	run(t, dist, "sha256sum", "--check", "--strict", "SHA256SUMS")
	if got, want := readFile(t, dist+"/notes.md"), "\n- What v1.9.8 brings.\n\n"; got != want {
		t.Errorf("the notes are %q, want %q", got, want)
	}
	images := regexp.MustCompile(`(?m)^ +image: (.*)$`).FindAllStringSubmatch(readFile(t, dist+"/install.yaml"), -1)
	if len(images) != 2 || images[0][1] != "registry.example/team/router:v1.9.8" {
		t.Errorf("install.yaml has the images %q, want the router's of v1.9.8 and nginx's", images)
	}
	commit := run(t, first, "git", "rev-parse", "HEAD")
	archive := "router_v1.9.8_linux_" + runtime.GOARCH
	run(t, dist, "tar", "-xf", archive+".tar.gz")
	if got, want := run(t, dist, archive+"/router", "version"), "router v1.9.8, commit "+commit+", "; !strings.HasPrefix(got, want) {
		t.Errorf("the router says %q, want %q", got, want)
	}
	t.Run("digest", func(t *testing.T) {
		ref := "registry.example/team/router:v1.9.8@sha256:" + strings.Repeat("a", 64)
		write(t, dist+"/images", ref+"\n")
		run(t, first, "k8s/release.sh", "files")
		if got := readFile(t, dist+"/install.yaml"); !strings.Contains(got, "image: "+ref+"\n") {
			t.Errorf("install.yaml does not have the image %s", ref)
		}
		if got := readFile(t, dist+"/notes.md"); !strings.HasSuffix(got, "\nImages:\n\n    "+ref+"\n") {
			t.Errorf("the notes are %q, want the images at the end", got)
		}
	})
	t.Run("without notes", func(t *testing.T) {
		write(t, first+"/CHANGELOG.md", "## v1.9.80\n\n- Another one.\n")
		cmd := exec.Command("k8s/release.sh", "files")
		cmd.Dir = first
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), `CHANGELOG.md has nothing below "## v1.9.8"`) {
			t.Errorf("%v\n%s\nwant an error, as CHANGELOG.md does not have the version", err, out)
		}
	})
}

// tagged makes a repository in dir with this one's files, tagged v1.9.8.
func tagged(t *testing.T, dir string) {
	t.Helper()
	copyTree(t, dir)
	write(t, dir+"/CHANGELOG.md", "# Changelog\n\n## Unreleased\n\n- Later.\n\n## v1.9.8, 2026-12-01\n\n- What v1.9.8 brings.\n\n## v1.9.7\n\n- Before.\n")
	git := []string{"-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "init.defaultBranch=main"}
	for _, command := range []string{"init -q", "add -A", "commit -q -m release", "tag v1.9.8"} {
		run(t, dir, "git", append(git, strings.Fields(command)...)...)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
