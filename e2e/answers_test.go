package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// routerCommand runs a command of the router in one of its pods, as the README's alias does.
func (s *system) routerCommand(ctx context.Context, stdin string, args ...string) (string, error) {
	args = append([]string{"exec", "-i", "deployment/router", "-c", "router", "--", "/router"}, args...)
	return s.kubectl(ctx, stdin, args...)
}

// movePlan is what router plan -o json prints.
type movePlan struct {
	Sessions        int      `json:"sessions"`
	Namespaces      int      `json:"namespaces"`
	Unowned         int      `json:"unresolved"`
	UnownedSessions int      `json:"unresolved_sessions"`
	Agree           bool     `json:"agree"`
	Routers         []string `json:"routers"`
	Moves           []struct {
		Namespace, To string
		Sessions      int
	} `json:"moves"`
}

// moveReceipt is a change in what router status -o json prints.
type moveReceipt struct {
	Version    string    `json:"overrides_version"`
	Began      time.Time `json:"began"`
	Planned    int       `json:"planned"`
	Moved      int       `json:"moved"`
	Namespaces int       `json:"namespaces"`
}

// mustPlan asks for a plan for all routers.
func (s *system) mustPlan(stdin string, args ...string) (p movePlan) {
	s.t.Helper()
	out, err := s.routerCommand(s.t.Context(), stdin, append([]string{"plan", "-o", "json"}, args...)...)
	if err == nil {
		err = json.Unmarshal([]byte(out), &p)
	}
	if routers := len(s.routers(s.t.Context())); err != nil || !p.Agree || len(p.Routers) != routers {
		s.t.Fatalf("router plan: %v\n%s\nwant the plan of %d routers that agree", err, out, routers)
	}
	return p
}

// wantReceipt waits until nothing is left to move, and checks that the last change did what
// was planned, or, if backends were scaled in, something of no other namespaces: these stop
// meanwhile, and may end sessions before the routers do, whose clients may come back to them.
func (s *system) wantReceipt(what string, p movePlan, since time.Time, scaledIn bool) {
	s.t.Helper()
	if out, err := s.routerCommand(s.t.Context(), "", "wait", "-timeout", "2m"); err != nil {
		s.t.Fatalf("router wait: %v\n%s", err, out)
	}
	out, err := s.routerCommand(s.t.Context(), "", "status", "-o", "json")
	var status struct{ Receipts []moveReceipt }
	if err == nil {
		err = json.Unmarshal([]byte(out), &status)
	}
	if err != nil || len(status.Receipts) == 0 {
		s.t.Fatalf("router status: %v\n%s", err, out)
	}
	r := status.Receipts[0]
	s.t.Logf("answers: %s: planned %d sessions of %d namespaces; receipt %+v", what, p.Sessions, p.Namespaces, r)
	// A receipt has 50 names. If there are more, a namespace counts once for each router
	// that had sessions of it.
	same := r.Namespaces == p.Namespaces ||
		p.Namespaces > 50 && r.Namespaces > p.Namespaces && r.Namespaces <= p.Namespaces*len(s.routers(s.t.Context()))
	exact := r.Moved == p.Sessions && r.Planned == p.Sessions && same
	some := r.Planned <= p.Sessions && r.Namespaces <= p.Namespaces
	if scaledIn && r.Began.Before(since) {
		return // the backend ended all of them before a step began
	}
	if r.Began.Before(since) || !exact && !(scaledIn && some) {
		s.t.Errorf("%s: the receipt is %+v, want what was planned: %d sessions of %d namespaces",
			what, r, p.Sessions, p.Namespaces)
	}
}

// settle waits until each client has one session, with the owner of its namespace, and the
// routers have no others. A client that comes back during a change is moved too, and so is a
// session that the router does not yet know to have ended.
func (c *tenants) settle() {
	c.s.t.Helper()
	c.awaitOwners(c.owners(), time.Minute)
	eventually(c.s.t, time.Minute, "the routers to have a session for each client", func() error {
		sum := 0
		for _, r := range c.s.routers(c.s.t.Context()) {
			m, err := r.metrics(c.s.t.Context())
			if err != nil {
				return err
			}
			sum += int(m.sum("router_sessions"))
		}
		if sum != len(c.clients) {
			return fmt.Errorf("they have %d, want %d", sum, len(c.clients))
		}
		return nil
	})
}

// TestAnswersOfAll plans overrides and numbers of backends by the commands, which count the
// sessions of all routers, and finds the same in the receipts. A plan names the namespace
// that a change would leave without an owner.
func TestAnswersOfAll(t *testing.T) {
	sessions := number(t, "E2E_ANSWERS", 120)
	namespaces := min(500, sessions/3)
	each := sessions / namespaces
	s := newSystem(t)
	s.keepOverrides()
	scale := func(replicas int) {
		ctx, stop := cleanupContext()
		defer stop()
		if _, err := s.kubectl(ctx, "", "scale", "statefulset", "backend", fmt.Sprint("--replicas=", replicas)); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(func() { scale(4) })
	c := s.newTenants("answers", namespaces, namespaces*each)
	c.spread()
	c.settle()
	began := time.Now().Add(-time.Second)

	next := map[string]any{}
	for namespace, owner := range c.toOthers() {
		if len(next) < 10 {
			next[namespace] = owner
		}
	}
	object := map[string]any{"kind": "ConfigMap", "metadata": map[string]any{"name": "overwriting"}, "data": next}
	body, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	p := s.mustPlan(string(body), "-")
	if p.Sessions != 10*each || p.Namespaces != 10 || p.Unowned != 0 {
		t.Errorf("%+v, want %d sessions of 10 namespaces", p, 10*each)
	}
	s.mustKubectl("", "patch", "configmap", "overwriting", "--type=merge", "-p", string(mustJSON(t, map[string]any{"data": next})))
	s.wantReceipt("overrides", p, began, false)

	for _, replicas := range []int{5, 4} {
		c.settle()
		began = time.Now().Add(-time.Second)
		p = s.mustPlan("", fmt.Sprint(replicas))
		if p.Sessions == 0 {
			t.Errorf("a plan of %d backends moves nothing: %+v", replicas, p)
		}
		scale(replicas)
		s.wantReceipt(fmt.Sprint(replicas, " backends"), p, began, replicas == 4)
	}

	vip := c.names[namespaces-1]
	patch, err := s.routerCommand(t.Context(), "", "move", vip, "backend-3")
	if err != nil || !strings.HasPrefix(patch, "{") {
		t.Fatalf("router move: %v\n%s", err, patch)
	}
	s.mustKubectl(patch, "patch", "configmap", "overwriting", "--type", "merge", "--patch-file", "/dev/stdin")
	s.awaitRest("", time.Minute)
	p = s.mustPlan("", "3")
	for _, m := range p.Moves {
		if m.Namespace == vip && m.To == "" && m.Sessions == each {
			return
		}
	}
	t.Errorf("%+v, want that %s, with %d sessions, has no owner", p, vip, each)
}

// mustJSON returns v as JSON.
func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
