//go:build controlplane

package e2e

import (
	"errors"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// behind starts a router as in a pod behind a gate, which is there to make it
// ask anew.
func (r *rig) behind(files accountFiles) (*subject, *gate) {
	r.t.Helper()
	g := newGate(r.t, r.address)
	s := r.inPod(files, g.addr)
	s.awaitReady(r.t)
	return s, g
}

// TestFaultTooManyRequests gives the routers' account no share of the API
// server, which answers 429 to it as long as another of its requests is served.
func TestFaultTooManyRequests(t *testing.T) {
	r := newRig(t)
	pod, g := r.behind(r.newFiles())
	trial := r.try(pod)
	allow := r.starve()
	asker := r.newAsker(r.token(nil))
	asker.run(8, 0)
	eventually(t, 20*time.Second, "the API server rejects the account", func() error {
		if asker.times(string(metav1.StatusReasonTooManyRequests)) < 100 {
			return errors.New("it was answered " + asker.answers())
		}
		return nil
	})
	g.cut(false)
	cuts := 1
	eventually(t, time.Minute, "the pod to log that it was rejected", func() error {
		if pod.count(failedWith("too_many_requests")) > 0 {
			return nil
		}
		if pod.count(`"watch recovered"`) == cuts { // its requests were those that are served
			g.cut(false)
			cuts++
		}
		return errors.New("it has not")
	})
	trial.stands()
	allow()
	asker.stop()
	t.Logf("the account was answered %s", asker.answers())
	trial.recovered(22500 * time.Millisecond)
}

// starve lets the API server reject what the routers' account asks, until the
// returned function is called or the test ends.
func (p *plane) starve() (allow func()) {
	p.t.Helper()
	none, name := int32(0), prefix+"starved"
	flow := p.client.FlowcontrolV1()
	level := &flowcontrolv1.PriorityLevelConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: flowcontrolv1.PriorityLevelConfigurationSpec{Type: flowcontrolv1.PriorityLevelEnablementLimited,
			Limited: &flowcontrolv1.LimitedPriorityLevelConfiguration{
				NominalConcurrencyShares: &none, LendablePercent: &none, BorrowingLimitPercent: &none,
				LimitResponse: flowcontrolv1.LimitResponse{Type: flowcontrolv1.LimitResponseTypeReject}}}}
	schema := &flowcontrolv1.FlowSchema{ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: flowcontrolv1.FlowSchemaSpec{MatchingPrecedence: 50,
			PriorityLevelConfiguration: flowcontrolv1.PriorityLevelConfigurationReference{Name: name},
			Rules: []flowcontrolv1.PolicyRulesWithSubjects{{
				Subjects: []flowcontrolv1.Subject{{Kind: flowcontrolv1.SubjectKindServiceAccount,
					ServiceAccount: &flowcontrolv1.ServiceAccountSubject{Namespace: p.namespace, Name: account}}},
				ResourceRules: []flowcontrolv1.ResourcePolicyRule{{
					Verbs: []string{"*"}, APIGroups: []string{"*"}, Resources: []string{"*"}, Namespaces: []string{"*"}}}}}}}
	if _, err := flow.PriorityLevelConfigurations().Create(p.t.Context(), level, metav1.CreateOptions{}); !made(err) {
		p.t.Fatal(err)
	}
	if _, err := flow.FlowSchemas().Create(p.t.Context(), schema, metav1.CreateOptions{}); !made(err) {
		p.t.Fatal(err)
	}
	allow = func() {
		ctx, stop := cleanupContext()
		defer stop()
		err := errors.Join(flow.FlowSchemas().Delete(ctx, name, metav1.DeleteOptions{}),
			flow.PriorityLevelConfigurations().Delete(ctx, name, metav1.DeleteOptions{}))
		if err != nil && !apierrors.IsNotFound(err) {
			p.t.Error(err)
		}
	}
	p.t.Cleanup(allow)
	return allow
}

// TestFaultTokenRevoked revokes a token, which the API server notices within
// ten seconds. A router whose files have another by then has no failure; one
// whose files have not gets 401 until they have.
func TestFaultTokenRevoked(t *testing.T) {
	r := newRig(t)
	files, rotated := r.newFiles(), r.newFiles()
	token, revoke := r.boundToken()
	files.put("token", token+"\n")
	rotated.put("token", token+"\n")
	pod, g := r.behind(files)
	other, otherGate := r.behind(rotated)
	trial, otherTrial := r.try(pod), r.try(other)
	trial.owner, trial.version = otherTrial.owner, otherTrial.version

	next := r.token(nil)
	rotated.put("token", next)
	revoke()
	g.cut(false)
	otherGate.cut(false)
	pod.logs(t, 5*time.Second, failedWith("unauthorized"))
	trial.stands()
	otherTrial.recovered(2 * time.Second)
	if n := other.count(failedWith("unauthorized")); n != 0 {
		t.Errorf("%d answers 401, want none with the new token in the file", n)
	}
	trial.owner, trial.version = otherTrial.owner, otherTrial.version
	files.put("token", next)
	trial.recovered(22500 * time.Millisecond)
}

// boundToken returns a token, and what revokes it and waits until the API server
// refuses it.
func (p *plane) boundToken() (token string, revoke func()) {
	p.t.Helper()
	secrets := p.client.CoreV1().Secrets(p.namespace)
	secret, err := secrets.Create(p.t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{GenerateName: "token-"}}, metav1.CreateOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	token = p.token(&authenticationv1.BoundObjectReference{Kind: "Secret", APIVersion: "v1", Name: secret.Name, UID: secret.UID})
	asker := p.newAsker(token)
	return token, func() {
		p.t.Helper()
		if err := secrets.Delete(p.t.Context(), secret.Name, metav1.DeleteOptions{}); err != nil {
			p.t.Fatal(err)
		}
		eventually(p.t, 20*time.Second, "the API server to refuse the token", func() error {
			if answer := asker.ask(); answer != string(metav1.StatusReasonUnauthorized) {
				return errors.New(answer)
			}
			return nil
		})
	}
}

// TestFaultRoleTaken takes the Role from the routers' account and gives it
// back. What was open goes on; what is asked anew is refused.
func TestFaultRoleTaken(t *testing.T) {
	r := newRig(t)
	pod, g := r.behind(r.newFiles())
	trial := r.try(pod)
	r.unbind()
	took := trial.followed(trial.write(), 2*time.Second)
	t.Logf("the stream that was open brought a write in %.2f s", took[0].Seconds())
	g.cut(false)
	pod.logs(t, 10*time.Second, failedWith("forbidden"))
	for _, word := range []string{"system:serviceaccount:" + r.namespace + ":" + account, "list", "configmaps"} {
		if pod.count(word) == 0 {
			t.Errorf("the log does not say %q", word)
		}
	}
	trial.stands()
	r.bindAgain()
	trial.recovered(22500 * time.Millisecond)
}

// TestFaultTokenEmpty empties the token's file: the last token stays in use. A
// router that never had one is "anonymous" until it gets one.
func TestFaultTokenEmpty(t *testing.T) {
	r := newRig(t)
	files := r.newFiles()
	token := r.token(nil)
	pod, g := r.behind(files)
	files.put("token", "")
	trial := r.try(pod)
	g.cut(false)
	trial.recovered(2 * time.Second)
	if n := pod.count(`"state":"listing"`); n != 0 {
		t.Errorf("%d LISTs failed, want none with the last token", n)
	}

	late := r.inPod(files, r.address)
	late.logs(t, 5*time.Second, "system:anonymous")
	if _, err := late.get(t.Context(), "/readyz"); err == nil || !strings.Contains(err.Error(), "system:anonymous") {
		t.Errorf("/readyz of a router without a token: %v, want the API server's words", err)
	}
	files.put("token", token)
	began := time.Now()
	late.awaitReady(t)
	t.Logf("a router that started without a token was ready %.2f s after it was there", time.Since(began).Seconds())
}
