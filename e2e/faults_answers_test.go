//go:build controlplane

package e2e

import (
	"strings"
	"syscall"
	"testing"
)

// TestFaultsAnswersOfAll stops the process of one router. The commands, asked of the other
// one, show the rest, and exit with 1 and the name of the router that is silent.
func TestFaultsAnswersOfAll(t *testing.T) {
	s := newSystem(t)
	all := s.routers(t.Context())
	silent, other := all[0].pod, all[1].pod
	goOn := s.signalRouter(syscall.SIGSTOP, syscall.SIGCONT)
	for _, args := range []string{"status", "owner e2e-answers", "backends", "plan 5"} {
		words := strings.Fields("exec -i " + other + " -c router -- /router " + args)
		out, err := s.kubectl(t.Context(), "", words...)
		if err == nil || !strings.Contains(err.Error(), silent+" did not answer: no answer within 1s") || out == "" {
			t.Errorf("router %s: %v\n%s\nwant the name of %s", args, err, out, silent)
		}
	}
	goOn()
	out, err := s.kubectl(t.Context(), "", strings.Fields("exec -i "+other+" -c router -- /router status")...)
	if err != nil || !strings.Contains(out, "2 of 2 routers answered; they agree") {
		t.Errorf("router status: %v\n%s", err, out)
	}
}
