package main

import (
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// layout is the root's files in their reading order. What one file is for each
// system is one here.
var layout = strings.Fields(`main config route pack hash swap dir configmap events watch decode kube
	cluster statefulset endpoints dns backends hold listen proxy upgrade refusal express relay frame
	rawio pace move admin plan command metrics log`)

// sources is the root's files as they are, without tests.
type sources struct {
	fset  *token.FileSet
	names []string // without .go, in alphabetical order
	files map[string]*ast.File
}

func parseSources(t *testing.T) *sources {
	t.Helper()
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	s := &sources{fset: token.NewFileSet(), files: map[string]*ast.File{}}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(s.fset, path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(path, ".go")
		s.names = append(s.names, name)
		s.files[name] = file
	}
	return s
}

// nameless imports nothing: what the standard library has is of no interest
// here, and to check it would take seconds.
type nameless struct{}

func (nameless) Import(path string) (*types.Package, error) {
	return types.NewPackage(path, filepath.Base(path)), nil
}

// uses returns for each file the others that it uses, and one identifier of
// each that it does so with.
func (s *sources) uses() map[string]map[string]string {
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{Importer: nameless{}, Error: func(error) {}} // the compiler has no errors
	var files []*ast.File
	for _, name := range s.names {
		files = append(files, s.files[name])
	}
	root, _ := config.Check("router", s.fset, files, info)
	uses := map[string]map[string]string{}
	for _, name := range s.names {
		uses[unit(name)] = map[string]string{}
	}
	for ident, object := range info.Uses {
		if object.Pkg() != root {
			continue
		}
		if from, to := s.name(ident.Pos()), s.name(home(object)); from != to {
			uses[from][to] = ident.Name
		}
	}
	return uses
}

// home is where an object is declared, or the type of a method.
func home(object types.Object) token.Pos {
	function, ok := object.(*types.Func)
	if !ok || function.Signature().Recv() == nil {
		return object.Pos()
	}
	receiver := function.Signature().Recv().Type()
	if pointer, ok := receiver.(*types.Pointer); ok {
		receiver = pointer.Elem()
	}
	if named, ok := receiver.(*types.Named); ok {
		return named.Obj().Pos()
	}
	return object.Pos()
}

// name is the name of the file at pos.
func (s *sources) name(pos token.Pos) string {
	return unit(strings.TrimSuffix(s.fset.Position(pos).Filename, ".go"))
}

// unit is the file that another belongs to: relay to relay_linux and
// relay_other.
func unit(name string) string {
	name, _, _ = strings.Cut(name, "_")
	return name
}

// TestLayoutIsWhole: the reading order has each file once, and no other.
func TestLayoutIsWhole(t *testing.T) {
	var actual []string
	for _, name := range parseSources(t).names {
		actual = append(actual, unit(name))
	}
	slices.Sort(actual)
	actual = slices.Compact(actual)
	if want := slices.Sorted(slices.Values(layout)); !slices.Equal(actual, want) {
		t.Errorf("the root has the files\n%v, the layout\n%v", actual, want)
	}
}

func TestLayoutHasNoCircle(t *testing.T) {
	uses := parseSources(t).uses()
	done := map[string]bool{}
	var visit func(file string, path []string)
	visit = func(file string, path []string) {
		if at := slices.Index(path, file); at >= 0 {
			t.Errorf("a circle: %s", strings.Join(append(path[at:], file), " uses "))
			return
		}
		if done[file] {
			return
		}
		for other := range uses[file] {
			visit(other, append(slices.Clip(path), file))
		}
		done[file] = true
	}
	for file := range uses {
		visit(file, nil)
	}
}

// TestPackageComment holds the reading order of main.go's package comment, its
// last paragraph, against the layout.
func TestPackageComment(t *testing.T) {
	comment := parseSources(t).files["main"].Doc.Text()
	_, order, ok := strings.Cut(comment, "\nRead ")
	if !ok {
		t.Fatal("no paragraph \"Read ...\" in the package comment")
	}
	order = regexp.MustCompile(`\([^)]*\)`).ReplaceAllString(order, "")
	var got []string
	for _, word := range regexp.MustCompile(`[a-z_]+`).FindAllString(order, -1) {
		if slices.Contains(layout, word) {
			got = append(got, word)
		}
	}
	if !slices.Equal(got, layout) {
		t.Errorf("the reading order is\n%v, want\n%v", got, layout)
	}
}

func TestImportsAreStandardLibrary(t *testing.T) {
	s := parseSources(t)
	for _, name := range s.names {
		for _, spec := range s.files[name].Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(filepath.Join(build.Default.GOROOT, "src", path)); err != nil || path == "C" || path == "unsafe" {
				t.Errorf("%s.go imports %q, want the standard library only, without unsafe", name, path)
			}
		}
	}
}

func TestGoModRequiresLittle(t *testing.T) {
	b, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	allowed := regexp.MustCompile(`^(|module router|go 1\.\d+(\.\d+)?|require golang\.org/x/net v\S+)$`)
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); !allowed.MatchString(line) {
			t.Errorf("go.mod has %q, want to require nothing but golang.org/x/net", line)
		}
	}
}
