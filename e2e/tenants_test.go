package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// TestTenantLimit has one tenant open sessions until it is refused, beside others that open
// theirs. No other is refused, and router top names the tenant.
func TestTenantLimit(t *testing.T) {
	const limit, hot, others = 30, prefix + "hot", 100 // limit is that of each router
	s := newSystem(t)
	s.keepWorkloads()
	s.setRouters(func(_ *corev1.PodTemplateSpec, c *corev1.Container) {
		c.Args = append(c.Args, fmt.Sprintf("-max-sessions-per-namespace=%d", limit))
	})
	routers := len(s.routers(t.Context()))
	for i := range others {
		s.mustFollow(fmt.Sprintf("%sother-%d", prefix, i))
	}
	opened, refusals := 0, 0
	for range 4 * limit * routers {
		session, err := s.dialer.open(t.Context(), hot)
		var r refusal
		switch {
		case err == nil:
			opened++
			f := follow(session)
			defer f.close()
		case errors.As(err, &r) && r.status == http.StatusServiceUnavailable && r.retryAfter != "":
			refusals++
		default:
			t.Fatalf("%v, want a session or 503 with Retry-After", err)
		}
		if refusals == 10*routers { // so that each router has refused, as good as surely
			break
		}
	}
	full := time.Now()
	t.Logf("limit of a tenant: %d sessions were opened, %d refused, by %d routers", opened, refusals, routers)
	if opened < limit || opened > limit*routers || refusals == 0 {
		t.Errorf("%d sessions were opened and %d refused, want %d to %d, and some", opened, refusals, limit, limit*routers)
	}
	for i := range others {
		s.mustFollow(fmt.Sprintf("%sother-%d", prefix, i))
	}
	type load struct {
		Namespace string
		Sessions  int
	}
	eventually(t, time.Minute, "router top to name the tenant", func() error {
		out, err := s.routerCommand(t.Context(), "", "top", "-o", "json")
		var top []load
		if err == nil {
			err = json.Unmarshal([]byte(out), &top)
		}
		if err == nil && (len(top) == 0 || top[0] != load{hot, opened}) {
			err = fmt.Errorf("%s, want %s first, with %d sessions", out, hot, opened)
		}
		return err
	})
	t.Logf("router top named the tenant %.1f s after its last session", time.Since(full).Seconds())
	counted := 0.0
	for _, r := range s.routers(t.Context()) {
		m, err := r.metrics(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		counted += m.sum("router_upgrades_total", "result", "max_sessions_per_namespace")
	}
	if counted != float64(refusals) {
		t.Errorf("the routers count %v refusals of a tenant, want %d", counted, refusals)
	}
}
