package main

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
)

// newStores returns a store of each kind, without content.
func newStores(t *testing.T) map[string]store {
	return map[string]store{
		"memory":    newLocalStore(""),
		"directory": newLocalStore(t.TempDir()),
		"HTTP":      serveTestStore(t, newLocalStore("")),
	}
}

// serveTestStore returns a client of a server that has the store.
func serveTestStore(t *testing.T, s store) *httpStore {
	hs := httptest.NewServer(storeServer{s}.handler())
	t.Cleanup(hs.Close)
	remote := newHTTPStore(hs.URL)
	t.Cleanup(remote.client.CloseIdleConnections)
	return remote
}

// TestStoreComparesSteps: whoever has loaded with a higher step shuts out all with a lower
// one, though it has saved nothing yet.
func TestStoreComparesSteps(t *testing.T) {
	for kind, s := range newStores(t) {
		t.Run(kind, func(t *testing.T) {
			mustLoad(t, s, "ns-01", 5, "")
			mustSave(t, s, "ns-01", 5, "old")
			mustLoad(t, s, "ns-01", 7, "old")
			mustBeStale(t, s.save(t.Context(), "ns-01", 6, []byte("late")), 7)
			_, err := s.load(t.Context(), "ns-01", 6)
			mustBeStale(t, err, 7)
			mustSave(t, s, "ns-01", 7, "new")
			mustSave(t, s, "ns-01", 7, "newer")
			mustLoad(t, s, "ns-01", 7, "newer")
			mustLoad(t, s, "ns-02", 1, "")
		})
	}
}

// TestStoreTakesAnyName: no name gets the state of another one.
func TestStoreTakesAnyName(t *testing.T) {
	names := []string{"ns-01", "NS-01", ".", "..", "../up", "a/b", "a%2Fb", "a b", "ü", "a&step=9",
		strings.Repeat("a", 253), strings.Repeat("a", 252) + "b", strings.Repeat("é", 126)}
	for kind, s := range newStores(t) {
		t.Run(kind, func(t *testing.T) {
			for _, name := range names {
				mustSave(t, s, name, 1, "of "+name)
			}
			for _, name := range names {
				mustLoad(t, s, name, 1, "of "+name)
			}
		})
	}
}

func TestDirectorySurvivesRestart(t *testing.T) {
	dir := t.TempDir()
	mustSave(t, newLocalStore(dir), "ns-01", 5, "state")
	s := newLocalStore(dir)
	mustBeStale(t, s.save(t.Context(), "ns-01", 4, nil), 5)
	mustLoad(t, s, "ns-01", 5, "state")
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 || files[0].Name() != "ns-01.state" {
		t.Errorf("files %v, %v; want ns-01.state alone", files, err)
	}
}

// TestStoreThatFails: a state that is not safe in its file is not saved, and no other
// status than 2xx is success.
func TestStoreThatFails(t *testing.T) {
	dir := t.TempDir()
	s := newLocalStore(dir)
	mustSave(t, s, "ns-01", 1, "first")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	remote := serveTestStore(t, s)
	err := remote.save(t.Context(), "ns-01", 1, []byte("second"))
	if err == nil || !strings.Contains(err.Error(), "500") {
		t.Errorf("save without a directory: %v, want 500", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	mustLoad(t, remote, "ns-01", 1, "first")
}

func TestStoreRefusesBadSteps(t *testing.T) {
	hs := httptest.NewServer(storeServer{newLocalStore("")}.handler())
	defer hs.Close()
	for _, step := range []string{"-1", "x", "9223372036854775808"} {
		for _, method := range []string{http.MethodPost, http.MethodPut} {
			req, err := http.NewRequestWithContext(t.Context(), method, hs.URL+"/state?namespace=a", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set(stepHeader, step)
			resp, err := hs.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != 400 {
				t.Errorf("%s with step %s: %s, want 400", method, step, resp.Status)
			}
		}
	}
}

// TestStoreProgram runs the store as a process of its own.
func TestStoreProgram(t *testing.T) {
	cmd, addr, rest := startProgram(t, "-store-listen", "127.0.0.1:0", "-store-dir", t.TempDir()+"/new")
	s := newHTTPStore("http://" + addr)
	defer s.client.CloseIdleConnections()
	mustSave(t, s, "ns-01", 1, "state")
	mustLoad(t, s, "ns-01", 1, "state")
	s.client.CloseIdleConnections()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	rest()
	if err := cmd.Wait(); err != nil {
		t.Errorf("the store ended with %v, want exit code 0", err)
	}
}

func mustLoad(t *testing.T, s store, namespace string, step int64, want string) {
	t.Helper()
	state, err := s.load(context.Background(), namespace, step)
	if err != nil || string(state) != want {
		t.Errorf("load %q with step %d: %q, %v; want %q", namespace, step, state, err, want)
	}
}

func mustSave(t *testing.T, s store, namespace string, step int64, state string) {
	t.Helper()
	if err := s.save(context.Background(), namespace, step, []byte(state)); err != nil {
		t.Errorf("save %q with step %d: %v", namespace, step, err)
	}
}

func mustBeStale(t *testing.T, err error, seen int64) {
	t.Helper()
	if err == nil || err.Error() != (staleError{seen}).Error() {
		t.Errorf("error %v, want %v", err, staleError{seen})
	}
}
