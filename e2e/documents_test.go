package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd/api"
)

// TestDocuments types what the documents say, line by line, in a copy of the repository
// without anything built: docs/install.md into an empty Kubernetes namespace, README.md and
// docs/operations.md after "make deploy", as they say. The copy has the tag of the images
// that "make deploy" has brought into the cluster.
func TestDocuments(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	s := &system{t: t, root: root}
	s.loadConfig()
	t.Run("install", func(t *testing.T) {
		p := s.newTypist(t)
		p.read(t, "docs/install.md")
	})
	t.Run("after deploy", func(t *testing.T) {
		p := s.newTypist(t)
		if out, err := s.deploySh(t, p.namespace); err != nil {
			t.Fatalf("deploy.sh: %v\n%s", err, out)
		}
		p.read(t, "README.md")
		p.read(t, "docs/operations.md")
	})
}

// typist is somebody with a copy of the repository and a Kubernetes namespace, who types
// what a document says.
type typist struct {
	namespace  string // it enforces the Pod Security Standard restricted
	root       string // of the copy
	kubeconfig string // whose context has the namespace
	own        *strings.Replacer
}

// newTypist makes a typist until the test ends.
func (s *system) newTypist(t *testing.T) *typist {
	t.Helper()
	p := &typist{namespace: s.newNamespace(t), root: t.TempDir()}
	s.mustKubectl("", "label", "namespace", p.namespace, "pod-security.kubernetes.io/enforce=restricted")
	p.copyRepository(t, s.root)
	p.kubeconfig = s.kubeconfig(func(c *api.Config) { c.Contexts[c.CurrentContext].Namespace = p.namespace })
	t.Cleanup(func() { p.remove(t, s) })
	return p
}

// listFiles prints the repository's files, without those that git ignores, also where it is
// somebody else's, or no clone.
const listFiles = `git -c safe.directory='*' ls-files -z --cached --others --exclude-standard 2>/dev/null ||
		find . -type f ! -path './.git/*' ! -path './bin/*' ! -path './dist/*' ! -path '*/node_modules/*' \
			! -path './e2e/artifacts/*' ! -name '*.crt' ! -name '*.key' -print0`

// copyRepository makes the copy. Its images are those in the cluster, and the names that
// its example has for objects of the whole cluster are the test's own.
func (p *typist) copyRepository(t *testing.T, root string) {
	t.Helper()
	files := exec.CommandContext(t.Context(), "bash", "-c",
		`set -o pipefail; { `+listFiles+`; } | tar --null -T - -c | tar -x -C "$0"`, p.root)
	files.Dir = root
	if out, err := files.CombinedOutput(); err != nil {
		t.Fatalf("copy of the repository: %v\n%s", err, out)
	}
	deployed, err := os.ReadFile(filepath.Join(root, "bin", "deploy", "kustomization.yaml"))
	if err != nil {
		t.Fatalf("%v: \"make deploy\" makes it", err)
	}
	images := regexp.MustCompile(`name: (\S+), newName: "(\S+)", newTag: "([^"]+)"`).FindAllStringSubmatch(string(deployed), -1)
	if len(images) == 0 {
		t.Fatalf("no images in bin/deploy/kustomization.yaml:\n%s", deployed)
	}
	names := []string{"editor", p.namespace + "-editor", "acme-", prefix + "acme-", "newTag: dev", `newTag: "` + images[0][3] + `"`}
	for _, image := range images {
		names = append(names, image[1]+":dev", image[2]+":"+image[3])
	}
	p.own = strings.NewReplacer(names...)
	for _, dir := range []string{"base", "demo", "examples/own-statefulset"} {
		manifests, _ := filepath.Glob(filepath.Join(p.root, "k8s", dir, "*.yaml"))
		for _, file := range manifests {
			text, err := os.ReadFile(file)
			if err == nil {
				err = os.WriteFile(file, []byte(p.own.Replace(string(text))), 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// remove takes away what a document leaves outside of its Kubernetes namespace when it
// breaks off.
func (p *typist) remove(t *testing.T, s *system) {
	for _, object := range []string{
		"namespace/" + p.namespace + "-editor",
		"validatingadmissionpolicybinding/" + prefix + "acme-router-overrides",
		"validatingadmissionpolicy/" + prefix + "acme-router-overrides",
	} {
		if _, err := s.kubectl(context.Background(), "", "delete", "--ignore-not-found", "--wait=false", object); err != nil {
			t.Error(err)
		}
	}
}

// blockMark begins the output of a block, with the block's index after it.
const blockMark = "\x1e"

// read types the blocks of a document into one shell, and compares what they print.
func (p *typist) read(t *testing.T, name string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(p.root, name))
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := documentBlocks(p.own.Replace(string(text)))
	if err != nil {
		t.Fatalf("%s:%v", name, err)
	}
	began := time.Now()
	out, failed := p.shell(t, documentScript(blocks))
	parts := strings.Split(out, blockMark)[1:]
	t.Logf("%s: %d blocks, %.0f s", name, len(parts), time.Since(began).Seconds())
	if len(parts) == 0 {
		t.Fatalf("%s has no block that is run: %v\n%s", name, failed, out)
	}
	for i, part := range parts {
		index, printed, _ := strings.Cut(part, "\n")
		n, err := strconv.Atoi(index)
		if err != nil {
			t.Fatalf("the output has the mark of block %q", index)
		}
		b := blocks[n]
		switch {
		case failed != nil && i == len(parts)-1:
			t.Fatalf("%s:%d: %v\n%s\nAll that was printed:\n%s", name, b.line, failed, b.text, out)
		case b.prints != nil && !b.prints.MatchString(compact(printed)):
			t.Errorf("%s:%d prints\n%s\nand not, as the document says,\n%s", name, b.line, printed, b.said)
		}
	}
}

// documentScript returns the blocks that are run as one script of bash.
func documentScript(blocks []commandBlock) string {
	script := "set -euo pipefail\nshopt -s expand_aliases\nexec 2>&1 </dev/null\n"
	for i, b := range blocks {
		if b.notRun != "" {
			continue
		}
		for name, content := range b.files {
			script += fmt.Sprintf("printf '%%b\\n' %s >%s\n", quote(content), quote(name))
		}
		script += fmt.Sprintf("printf '%s%d\\n'\n%s\n", blockMark, i, b.text)
	}
	return script
}

// shell runs a script in the copy, and returns what it prints.
func (p *typist) shell(t *testing.T, script string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	file := filepath.Join(t.TempDir(), "document.sh")
	if err := os.WriteFile(file, []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, "bash", file)
	cmd.Dir = p.root
	cmd.Env = append(os.Environ(), "KUBECONFIG="+p.kubeconfig)
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func quote(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

// commandBlock is an indented block of a document.
type commandBlock struct {
	line   int // of its beginning
	text   string
	notRun string            // the reason; "" if it is run
	files  map[string]string // that the reader has: content by name
	said   string            // what it prints, in the document's words; "" if these say nothing
	prints *regexp.Regexp    // said, of compact text
}

// The comments before a block, which readers do not see:
//
//	<!-- not run: REASON -->       the test omits it
//	<!-- with FILE: CONTENT -->    the reader has this file; \n begins a new line
//	<!-- prints -->                it is what the block before prints; ... is any text
var (
	blockComment  = regexp.MustCompile(`^<!-- *(.*?) *-->$`)
	notRunComment = regexp.MustCompile(`^not run: *(.*)$`)
	withComment   = regexp.MustCompile(`^with ([-.\w]+): (.+)$`)
)

// documentBlocks finds the indented blocks of a text, in order. An error begins with the
// number of its line.
func documentBlocks(text string) ([]commandBlock, error) {
	var (
		blocks  []commandBlock
		next    = commandBlock{} // what comments say of the next one
		said    bool             // the next one is what the last one prints
		comment int              // the line of the last comment without a block yet
	)
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		switch {
		case strings.HasPrefix(line, "```"):
			return nil, fmt.Errorf("%d: a block between ```, which is not run: indent it", i+1)
		case blockComment.MatchString(line):
			if err := next.read(blockComment.FindStringSubmatch(line)[1], &said); err != nil {
				return nil, fmt.Errorf("%d: %w", i+1, err)
			}
			comment = i + 1
		case strings.HasPrefix(line, "    ") && i > 0 && lines[i-1] == "":
			next.line, next.text, i = i+1, "", blockEnd(lines, i)
			for _, l := range lines[next.line-1 : i+1] {
				next.text += strings.TrimPrefix(l, "    ") + "\n"
			}
			if err := appendBlock(&blocks, next, said); err != nil {
				return nil, fmt.Errorf("%d: %w", next.line, err)
			}
			next, said, comment = commandBlock{}, false, 0
		case line != "" && comment > 0:
			return nil, fmt.Errorf("%d: no block follows the comment", comment)
		}
	}
	if comment > 0 {
		return nil, fmt.Errorf("%d: no block follows the comment", comment)
	}
	return blocks, nil
}

// blockEnd returns the index of the last line of the block that begins at index i.
func blockEnd(lines []string, i int) int {
	end := i
	for ; i < len(lines) && (lines[i] == "" || strings.HasPrefix(lines[i], "    ")); i++ {
		if lines[i] != "" {
			end = i
		}
	}
	return end
}

// read takes what a comment says of the block after it.
func (b *commandBlock) read(comment string, said *bool) error {
	if m := notRunComment.FindStringSubmatch(comment); m != nil && m[1] != "" {
		b.notRun = m[1]
		return nil
	}
	if m := withComment.FindStringSubmatch(comment); m != nil {
		if b.files == nil {
			b.files = map[string]string{}
		}
		b.files[m[1]] = m[2]
		return nil
	}
	if comment == "prints" {
		*said = true
		return nil
	}
	return fmt.Errorf("comment %q: want \"not run: REASON\", \"with FILE: CONTENT\" or \"prints\"", comment)
}

// appendBlock appends a block, or makes it what the last one prints.
func appendBlock(blocks *[]commandBlock, b commandBlock, said bool) error {
	if !said {
		*blocks = append(*blocks, b)
		return nil
	}
	if len(*blocks) == 0 {
		return fmt.Errorf("no block before prints this")
	}
	last := &(*blocks)[len(*blocks)-1]
	if last.notRun != "" || last.said != "" {
		return fmt.Errorf("the block before is not run, or prints something else")
	}
	last.said = b.text
	pattern := strings.ReplaceAll(regexp.QuoteMeta(compact(b.text)), regexp.QuoteMeta("..."), ".*")
	last.prints = regexp.MustCompile("^" + pattern + "$")
	return nil
}

// kubectlLog is the beginning of a line of kubectl's own log. "kubectl exec" writes one when
// an event of a stream that has ended is late.
var kubectlLog = regexp.MustCompile(`^[EWI]\d{4} \d\d:`)

// compact removes empty lines, kubectl's log, and all white space but one space between words.
func compact(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if words := strings.Fields(line); len(words) > 0 && !kubectlLog.MatchString(line) {
			lines = append(lines, strings.Join(words, " "))
		}
	}
	return strings.Join(lines, "\n")
}

// TestDocumentBlocks: what is found in a text, and what is refused. It needs no cluster.
func TestDocumentBlocks(t *testing.T) {
	for _, name := range []string{"docs/install.md", "README.md", "docs/operations.md"} {
		text, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		if blocks, err := documentBlocks(string(text)); err != nil || len(blocks) == 0 {
			t.Errorf("%s: %d blocks, error %v", name, len(blocks), err)
		}
	}
	blocks, err := documentBlocks("text\n\n    a\n\n      b\n\ntext\n    text\n\n<!-- with x.env: a=b -->\n<!-- with y: c -->\n\n" +
		"    c\n\n<!-- prints -->\n\n    x   y-...\n\n    z\n\n<!-- not run: why -->\n\n    d\n")
	if err != nil {
		t.Fatal(err)
	}
	if len(blocks) != 3 || blocks[0].line != 3 || blocks[0].text != "a\n\n  b\n" || blocks[0].prints != nil ||
		blocks[1].files["x.env"] != "a=b" || blocks[1].files["y"] != "c" || blocks[2].text != "d\n" || blocks[2].notRun != "why" || blocks[1].notRun != "" {
		t.Errorf("%+v", blocks)
	}
	for out, want := range map[string]bool{"x y-1\nz": true, "\nx      y-1 2  \n\nz\n": true, "x y\nz": false, "x y-1": false, "x y-1\nz\nmore": false} {
		out += "\nE1130 01:23:04.202059   14219 websocket.go:296] Unknown stream id 1, discarding message\n"
		if got := blocks[1].prints.MatchString(compact(out)); got != want {
			t.Errorf("%q is what it prints: %t, want %t", out, got, want)
		}
	}
	for text, want := range map[string]string{
		"```\na\n```\n":                                              "1: a block between ```",
		"<!-- not run: -->\n\n    a\n":                               `1: comment "not run:": want`,
		"<!-- note -->\n\n    a\n":                                   `1: comment "note": want`,
		"<!-- not run: why -->\n\ntext\n\n    a\n":                   "1: no block follows the comment",
		"<!-- prints -->\n\n    a\n":                                 "3: no block before",
		"<!-- not run: x -->\n\n    a\n\n<!-- prints -->\n\n    b\n": "7: the block before is not run",
	} {
		if _, err := documentBlocks(text); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s...", text, err, want)
		}
	}
}
