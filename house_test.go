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

// fileOrder has the root's files in their reading order: a file uses only the files after
// it. The files of one noun for several systems, like listen_linux.go and
// listen_portable.go, count as one.
var fileOrder = strings.Fields(`main command config admin preview status peers page redirect fastpath socket proxy forward namespacematcher handshake listen clientconn descriptorlimit pending proxyprotocol certificates configmap
	directory events drain move movetally movetarget movequeue maxage pace sharedhandoff member handoffobject handoff flight release tablestore route overrides namespace hash discovery cordon backends dialqueue pod watch kube
	top relay tls websocket namespacelimit result log runtime metrics wait`)

// sources has the root's files, parsed, without the tests.
type sources struct {
	fset  *token.FileSet
	names []string // without .go, in alphabetical order
	files map[string]*ast.File
}

func parseSources(t *testing.T) *sources {
	t.Helper()
	paths, err := filepath.Glob("*.go")
	must(t, err)
	s := &sources{fset: token.NewFileSet(), files: map[string]*ast.File{}}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(s.fset, path, nil, parser.ParseComments)
		must(t, err)
		name := strings.TrimSuffix(path, ".go")
		s.names = append(s.names, name)
		s.files[name] = file
	}
	return s
}

// emptyImporter imports each package as an empty one: these tests need only what the root
// declares, and to check the standard library would take seconds.
type emptyImporter struct{}

func (emptyImporter) Import(path string) (*types.Package, error) {
	return types.NewPackage(path, filepath.Base(path)), nil
}

// uses returns for each file the other files that it uses, each with an identifier that
// it uses from there.
func (s *sources) uses() map[string]map[string]string {
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{Importer: emptyImporter{}, Error: func(error) {}} // the compiler has no errors
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
		if from, to := s.unitAt(ident.Pos()), s.unitAt(declaredAt(object)); from != to {
			uses[from][to] = ident.Name
		}
	}
	return uses
}

// declaredAt returns where an object is declared; for a method, where its type is.
func declaredAt(object types.Object) token.Pos {
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

// unitAt returns the unit of the file at pos.
func (s *sources) unitAt(pos token.Pos) string {
	return unit(strings.TrimSuffix(s.fset.Position(pos).Filename, ".go"))
}

// unit returns the noun that a file belongs to: relay for relay_linux, relay_portable
// and epoll_linux, the event loop of relay_linux.
func unit(name string) string {
	name, _, _ = strings.Cut(name, "_")
	if name == "epoll" {
		return "relay"
	}
	return name
}

// TestLayoutIsWhole: fileOrder has each file once, and nothing else.
func TestLayoutIsWhole(t *testing.T) {
	var actual []string
	for _, name := range parseSources(t).names {
		actual = append(actual, unit(name))
	}
	slices.Sort(actual)
	actual = slices.Compact(actual)
	if want := slices.Sorted(slices.Values(fileOrder)); !slices.Equal(actual, want) {
		t.Errorf("the root has the files\n%v, the order\n%v", actual, want)
	}
}

// TestLayoutGoesDown: no file uses a file before it. So no files use each other. TestLayoutIsWhole
// says which files are not in the order.
func TestLayoutGoesDown(t *testing.T) {
	for file, others := range parseSources(t).uses() {
		for other, identifier := range others {
			if slices.Contains(fileOrder, other) && slices.Index(fileOrder, other) < slices.Index(fileOrder, file) {
				t.Errorf("%s uses %s of %s, which is before it in the order", file, identifier, other)
			}
		}
	}
}

// TestPackageComment: the reading order in the last paragraph of main.go's package
// comment is fileOrder.
func TestPackageComment(t *testing.T) {
	comment := parseSources(t).files["main"].Doc.Text()
	_, order, ok := strings.Cut(comment, "\nRead ")
	if !ok {
		t.Fatal("no paragraph \"Read ...\" in the package comment")
	}
	order = regexp.MustCompile(`\([^)]*\)`).ReplaceAllString(order, "")
	var got []string
	for _, word := range regexp.MustCompile(`[a-z_]+`).FindAllString(order, -1) {
		if slices.Contains(fileOrder, word) {
			got = append(got, word)
		}
	}
	if !slices.Equal(got, fileOrder) {
		t.Errorf("the reading order is\n%v, want\n%v", got, fileOrder)
	}
}

// TestPackageCommentNames: each step of a path and each lock in the package comment is a
// method or a field of the root.
func TestPackageCommentNames(t *testing.T) {
	s := parseSources(t)
	declared := map[string]bool{}
	for _, file := range s.files {
		for _, decl := range file.Decls {
			addMembers(declared, decl)
		}
	}
	listed := regexp.MustCompile(`(?m)^\t *([a-zA-Z.]+\.[a-zA-Z]+(?:, [a-zA-Z]+\.[a-zA-Z]+)*)(?:  |$)`)
	names := listed.FindAllStringSubmatch(s.files["main"].Doc.Text(), -1)
	if len(names) < 30 {
		t.Errorf("%d lines with names in the package comment, want its paths and locks", len(names))
	}
	for _, line := range names {
		for name := range strings.SplitSeq(line[1], ", ") {
			if !declared[name] {
				t.Errorf("the package comment has %s, which no file declares", name)
			}
		}
	}
}

// Each lock stands in the order of locks.
func TestPackageCommentHasAllLocks(t *testing.T) {
	s := parseSources(t)
	locks := map[string]bool{}
	for _, file := range s.files {
		ast.Inspect(file, func(n ast.Node) bool {
			declared, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			structure, ok := declared.Type.(*ast.StructType)
			if !ok {
				return true
			}
			for _, field := range structure.Fields.List {
				if kind := types.ExprString(field.Type); kind == "sync.Mutex" || kind == "sync.RWMutex" {
					locks[declared.Name.Name+"."+field.Names[0].Name] = true
				}
			}
			return true
		})
	}
	_, order, _ := strings.Cut(s.files["main"].Doc.Text(), "A goroutine that holds a lock")
	for lock := range locks {
		if !strings.Contains(order, lock) {
			t.Errorf("the order of locks in the package comment lacks %s", lock)
		}
	}
	if len(locks) < 20 {
		t.Errorf("%d locks: the test has tested little", len(locks))
	}
}

// addMembers adds the method, or the fields of the structs, that decl declares, as
// type.member.
func addMembers(members map[string]bool, decl ast.Decl) {
	switch decl := decl.(type) {
	case *ast.FuncDecl:
		if decl.Recv != nil {
			receiver := strings.TrimPrefix(types.ExprString(decl.Recv.List[0].Type), "*")
			receiver, _, _ = strings.Cut(receiver, "[")
			members[receiver+"."+decl.Name.Name] = true
		}
	case *ast.GenDecl:
		for _, spec := range decl.Specs {
			addFields(members, spec)
		}
	}
}

func addFields(members map[string]bool, spec ast.Spec) {
	declared, ok := spec.(*ast.TypeSpec)
	if !ok {
		return
	}
	if structure, ok := declared.Type.(*ast.StructType); ok {
		for _, field := range structure.Fields.List {
			for _, name := range field.Names {
				members[declared.Name.Name+"."+name.Name] = true
			}
		}
	}
}

func TestImportsAreStandardLibrary(t *testing.T) {
	s := parseSources(t)
	for _, name := range s.names {
		for _, spec := range s.files[name].Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			must(t, err)
			if _, err := os.Stat(filepath.Join(build.Default.GOROOT, "src", path)); err != nil || path == "C" || path == "unsafe" {
				t.Errorf("%s.go imports %q, want the standard library only, without unsafe", name, path)
			}
		}
	}
}

func TestGoModRequiresLittle(t *testing.T) {
	b, err := os.ReadFile("go.mod")
	must(t, err)
	allowed := regexp.MustCompile(`^(|module router|go 1\.\d+(\.\d+)?|require golang\.org/x/net v\S+)$`)
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); !allowed.MatchString(line) {
			t.Errorf("go.mod has %q, want to require nothing but golang.org/x/net", line)
		}
	}
}

// TestNoState: no code runs before main, and no package variable can change.
func TestNoState(t *testing.T) {
	s := parseSources(t)
	for _, name := range s.names {
		for _, decl := range s.files[name].Decls {
			switch decl := decl.(type) {
			case *ast.FuncDecl:
				if decl.Recv == nil && decl.Name.Name == "init" {
					t.Errorf("%s.go has an init function", name)
				}
			case *ast.GenDecl:
				for _, spec := range decl.Specs {
					if value, ok := spec.(*ast.ValueSpec); ok && decl.Tok == token.VAR && !isSentinel(value) && !isEmbedded(decl, value) {
						t.Errorf("%s.go has the package variable %s, want error sentinels and embedded files only", name, value.Names[0])
					}
				}
			}
		}
	}
}

// isSentinel reports whether a variable is an error that others compare with:
// var errName = errors.New(...) or fmt.Errorf(...).
func isSentinel(v *ast.ValueSpec) bool {
	if len(v.Names) != 1 || len(v.Values) != 1 || !strings.HasPrefix(v.Names[0].Name, "err") {
		return false
	}
	call, ok := v.Values[0].(*ast.CallExpr)
	if !ok {
		return false
	}
	function := types.ExprString(call.Fun)
	return function == "errors.New" || function == "fmt.Errorf"
}

// isEmbedded reports whether a variable is the text of an embedded file, which go:embed
// allows for package variables only.
func isEmbedded(decl *ast.GenDecl, v *ast.ValueSpec) bool {
	return decl.Doc != nil && strings.HasPrefix(decl.Doc.List[len(decl.Doc.List)-1].Text, "//go:embed ") &&
		types.ExprString(v.Type) == "string" && len(v.Values) == 0
}

// TestSizes: a function has at most 60 lines and its statements nest at most 3 deep;
// every type and every function of more than 15 lines has a comment. A file holds one
// noun, whatever its length.
func TestSizes(t *testing.T) {
	s := parseSources(t)
	for _, name := range s.names {
		file := s.files[name]
		for _, decl := range file.Decls {
			switch decl := decl.(type) {
			case *ast.FuncDecl:
				s.checkFunction(t, name, decl)
			case *ast.GenDecl:
				if decl.Tok == token.TYPE && decl.Doc == nil {
					t.Errorf("%s.go:%d: a type without a comment", name, s.fset.Position(decl.Pos()).Line)
				}
			}
		}
	}
}

func (s *sources) checkFunction(t *testing.T, file string, f *ast.FuncDecl) {
	t.Helper()
	lines := s.fset.Position(f.End()).Line - s.fset.Position(f.Pos()).Line + 1
	if lines > 60 {
		t.Errorf("%s.go: %s has %d lines, want at most 60", file, f.Name, lines)
	}
	if lines > 15 && f.Doc == nil && f.Name.Name != "main" {
		t.Errorf("%s.go: %s has %d lines and no comment", file, f.Name, lines)
	}
	if depth := nesting(f.Body); depth > 3 {
		t.Errorf("%s.go: %s is nested %d deep, want at most 3", file, f.Name, depth)
	}
}

// nesting returns how deep the statements below n are nested. An else if is as deep as
// its if.
func nesting(n ast.Node) (deepest int) {
	ast.Inspect(n, func(inner ast.Node) bool {
		if inner == nil || inner == n {
			return true
		}
		switch inner := inner.(type) {
		case *ast.IfStmt:
			deepest = max(deepest, 1+nesting(inner.Body))
			switch other := inner.Else.(type) {
			case *ast.IfStmt:
				deepest = max(deepest, nesting(&ast.BlockStmt{List: []ast.Stmt{other}}))
			case *ast.BlockStmt:
				deepest = max(deepest, 1+nesting(other))
			}
			return false
		case *ast.ForStmt, *ast.RangeStmt, *ast.SwitchStmt, *ast.TypeSwitchStmt, *ast.SelectStmt:
			deepest = max(deepest, 1+nesting(inner))
			return false
		}
		return true
	})
	return deepest
}

// TestBubbles: the root's tests make synctest bubbles by bubble alone, which says why.
func TestBubbles(t *testing.T) {
	names, err := filepath.Glob("*_test.go")
	must(t, err)
	for _, name := range names {
		text, err := os.ReadFile(name)
		must(t, err)
		want := 0
		if name == "fakekube_test.go" {
			want = 1
		}
		if got := strings.Count(string(text), "synctest"+".Test("); got != want {
			t.Errorf("%s makes %d bubbles by itself, want %d", name, got, want)
		}
	}
}
