package main

import (
	"go/ast"
	"go/token"
	"go/types"
	"strings"
	"testing"
)

// TestNoState: nothing happens before main, and no package variable can change.
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
					if value, ok := spec.(*ast.ValueSpec); ok && decl.Tok == token.VAR && !isSentinel(value) {
						t.Errorf("%s.go has the package variable %s, want error sentinels only", name, value.Names[0])
					}
				}
			}
		}
	}
}

// isSentinel reports whether a variable is an error to compare with: var
// errName = errors.New(...) or fmt.Errorf(...).
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

// TestSizes: functions of 60 lines, nesting of 3 at most; a comment on every type
// and on every function of more than 15 lines. A file holds one noun, whatever its
// length.
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

// nesting is how deep the statements below n are in others. An else if is as
// deep as its if.
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
