package e2e

import (
	"fmt"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestBackendCopy copies a backend's pod with its labels, as people do who look for
// a fault in it: the Service has two endpoints then with the hostname of the
// backend. When the backend restarts, its sessions come back to it. None is ever
// with the copy, though that is ready all the time.
func TestBackendCopy(t *testing.T) {
	const victim, copied = "backend-2", prefix + "copy"
	s := newSystem(t)
	mine, _ := s.split(victim)
	s.copyPod(victim, copied)
	book, names := s.keepDiary(), map[string]bool{}
	var clients []*returner
	for _, namespace := range mine {
		names[namespace] = true
		clients = append(clients, s.goAndReturn(namespace))
	}
	s.awaitOpen(clients, "")

	began, back := time.Now(), s.watchReady(victim)
	s.mustKubectl("", "delete", "pod", victim, "--wait=false")
	select {
	case <-back:
	case <-time.After(60 * time.Second):
		t.Fatalf("%s is not back", victim)
	}
	ready := time.Since(began)
	eventually(t, 60*time.Second, "all sessions to be back", func() error {
		all := book.of(names)
		if len(all) < len(names) {
			return fmt.Errorf("%d of %d namespaces had a session", len(all), len(names))
		}
		for namespace, stays := range all {
			if last := stays[len(stays)-1]; len(stays) < 2 || !last.ended.IsZero() {
				return fmt.Errorf("%s: %+v", namespace, stays)
			}
		}
		return nil
	})
	sessions := 0
	for namespace, stays := range book.of(names) {
		for _, one := range stays {
			if sessions++; one.backend != victim {
				t.Errorf("%s had a session with %s, which is a copy of %s", namespace, one.backend, victim)
			}
		}
	}
	pod, err := s.client.CoreV1().Pods(s.namespace).Get(t.Context(), victim, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if o := s.mustOwner(mine[0]); o.Owner != victim || o.PodUID != string(pod.UID) {
		t.Errorf("/owner: %+v, want %s, whose pod is %s", o, victim, pod.UID)
	}
	checkReturns(t, clients, victim)
	t.Logf("backend copy: %s was ready after %.1f s; %d sessions of %d namespaces", victim, ready.Seconds(), sessions, len(names))
}

// copyPod copies a backend's pod with its labels, until the test ends, and waits
// until the copy is a ready endpoint of the Service, with the hostname of the first.
func (s *system) copyPod(backend, name string) {
	s.t.Helper()
	remove := func() {
		ctx, cancel := cleanupContext()
		defer cancel()
		if _, err := s.kubectl(ctx, "", "delete", "pod", name, "--ignore-not-found"); err != nil {
			s.t.Error(err)
		}
	}
	remove()
	s.t.Cleanup(remove)
	pod, err := s.client.CoreV1().Pods(s.namespace).Get(s.t.Context(), backend, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	s.mustKubectl("", "debug", backend, "--copy-to="+name, "--keep-labels", "--share-processes=false",
		"--set-image=backend="+pod.Spec.Containers[0].Image)
	eventually(s.t, 60*time.Second, name+" to be an endpoint", func() error {
		e, err := s.endpoint(name)
		if err == nil && (e.Hostname == nil || *e.Hostname != backend || e.Conditions.Ready == nil || !*e.Conditions.Ready) {
			err = fmt.Errorf("%+v, want it ready and with the hostname %s", e, backend)
		}
		return err
	})
}

// endpoint returns the backends' endpoint whose pod has this name.
func (s *system) endpoint(pod string) (discoveryv1.Endpoint, error) {
	list, err := s.client.DiscoveryV1().EndpointSlices(s.namespace).List(s.t.Context(),
		metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=headless"})
	if err != nil {
		return discoveryv1.Endpoint{}, err
	}
	for _, slice := range list.Items {
		for _, e := range slice.Endpoints {
			if e.TargetRef != nil && e.TargetRef.Name == pod {
				return e, nil
			}
		}
	}
	return discoveryv1.Endpoint{}, fmt.Errorf("no endpoint has the pod %s", pod)
}
