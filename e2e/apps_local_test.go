package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// startApps starts four backends with e2e/apps/server.js, and a router with these flags
// before them, whose overrides are files.
func startApps(t *testing.T, flags ...string) *appStage {
	t.Helper()
	var backends []*process
	var addresses []string
	signalR := buildIn(t, ".", "./apps/signalr")
	for i := range 4 {
		backends = append(backends, start(t, "env", fmt.Sprintf("BACKEND=backend-%d", i), "PORT=0",
			"SIGNALR="+signalR, "node", "apps/server.js"))
	}
	for _, b := range backends {
		_, rest, _ := strings.Cut(b.says(t, "serving on port "), "serving on port ")
		port, _, _ := strings.Cut(rest, " ")
		addresses = append(addresses, "127.0.0.1:"+port)
	}
	overrides := t.TempDir() // a file for each
	r := start(t, build(t, "."), append([]string{"-listen=127.0.0.1:0", "-admin=127.0.0.1:0", "-log-format=json", "-kube=none",
		"-overrides=" + overrides, "-backends=" + strings.Join(addresses, ",")}, flags...)...)
	line := r.says(t, `"msg":"serving"`)
	admin := &router{pod: "router", base: "http://" + field(t, line, "admin")}
	eventually(t, time.Minute, "the router to be ready", func() error {
		_, err := admin.get(t.Context(), "/readyz")
		return err
	})
	return &appStage{
		base: strings.Replace("http://"+field(t, line, "listen"), "127.0.0.1", "localhost", 1),
		env:  []string{"CLIENT_ADDRESS=127.0.0.1"},
		owner: func(namespace string) string {
			o, err := admin.owner(t.Context(), namespace)
			if err != nil {
				t.Fatal(err)
			}
			return o.Owner
		},
		move: func(owners map[string]string) {
			for key, backend := range owners {
				if err := os.WriteFile(filepath.Join(overrides, key), []byte(backend), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		},
		handled: func() (all []appMessage) {
			for _, b := range backends {
				all = append(all, messagesIn(b.output())...)
			}
			return all
		},
		browser: func() context.Context { return startBrowser(t, t.TempDir()) },
	}
}

// appFlags returns the flags of routers that e2e/apps/kustomization.yaml adds.
func appFlags(t *testing.T) (flags []string) {
	t.Helper()
	text, err := os.ReadFile("apps/kustomization.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if flag, ok := strings.CutPrefix(strings.TrimSpace(line), "value: -"); ok {
			flags = append(flags, "-"+flag)
		}
	}
	return flags
}

// TestAppsLayouts plays socket.io with its own path, which has no namespace: it is in the
// query, or in the name of the host.
func TestAppsLayouts(t *testing.T) {
	needNode(t)
	for from, c := range map[string]*appCase{
		"query:doc": {app: "socket.io-query", namespace: "my room", key: "my_x20room"},
		"host":      {app: "socket.io-host", namespace: "app-host", key: "app-host"},
	} {
		t.Run(from, func(t *testing.T) {
			c.check = checkSocketIO("polling", "websocket")
			startApps(t, "-namespace-from="+from).play(t, []*appCase{c})
		})
	}
}
