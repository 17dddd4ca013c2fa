package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"time"
)

// podObject holds the fields that the router reads of a Pod
// (https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/).
type podObject struct {
	apiObject
	Spec struct {
		NodeName string `json:"nodeName"`
	} `json:"spec"`
	Status struct {
		Phase             string `json:"phase"`
		PodIP             string `json:"podIP"`
		ContainerStatuses []struct {
			State struct {
				Terminated *struct{} `json:"terminated"`
			} `json:"state"`
		} `json:"containerStatuses"`
	} `json:"status"`
}

// routerPod returns what the hand-off needs to know of the pod. It has ended if the
// kubelet has written that all its containers have: the phase alone is also written by
// others.
func (p *podObject) routerPod() routerPod {
	phase := p.Status.Phase
	ended := (phase == "Failed" || phase == "Succeeded") && p.containersEnded()
	return routerPod{uid: p.Metadata.UID, scheduled: p.Spec.NodeName != "", provenEnded: ended}
}

// containersEnded reports whether all containers but sidecars have terminated.
func (p *podObject) containersEnded() bool {
	for i := range p.Status.ContainerStatuses {
		if p.Status.ContainerStatuses[i].State.Terminated == nil {
			return false
		}
	}
	return len(p.Status.ContainerStatuses) > 0
}

// routerEnded reports whether no router runs in the pod, and none will. It is for the list of the
// other routers' admin ports: so, unlike routerPod, it goes by the phase alone.
func (p *podObject) routerEnded() bool {
	phase := p.Status.Phase
	return phase == "Failed" || phase == "Succeeded" ||
		p.Metadata.DeletionTimestamp != "" && p.containersEnded()
}

// routerPod is what a router needs to know of the pod of another one.
type routerPod struct {
	uid         string
	scheduled   bool // spec.nodeName is set
	provenEnded bool // phase Failed or Succeeded, and all containers have terminated
}

// podTimeout bounds the request for one pod.
const podTimeout = 5 * time.Second

// podsPath returns the path of the pods of the Kubernetes namespace.
func podsPath(kubeNamespace string) string {
	return "/api/v1/namespaces/" + kubeNamespace + "/pods"
}

// listPods lists the pods with this label selector.
func listPods(
	ctx context.Context, client *kubeClient, kubeNamespace, label string,
) ([]*podObject, error) {
	query := url.Values{"labelSelector": {label}}
	body, err := client.do(ctx, podsPath(kubeNamespace), query, nil)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	answer, pods, err := decodeList[podObject](body, maxList)
	switch {
	case err != nil:
		return nil, cmp.Or(ctx.Err(), err)
	case answer.Kind != "PodList" || answer.Metadata.Continue != "":
		return nil, fmt.Errorf("%w: kind %.60q, continue %.60q, expected a whole PodList",
			errBadResponse, answer.Kind, answer.Metadata.Continue)
	}
	return pods, nil
}

// getPod returns the pod of this name, nil if the API server says that there is none. Any
// other answer is an error, because the routers go on without a pod that is gone.
func getPod(
	ctx context.Context, client *kubeClient, kubeNamespace, name string,
) (*podObject, error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	body, err := client.do(ctx, podsPath(kubeNamespace)+"/"+name, nil, nil)
	if saysNotFound(err, "pods", name) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer body.Close()
	pod := &podObject{}
	err = json.NewDecoder(io.LimitReader(body, maxObject)).Decode(pod)
	m := pod.Metadata
	if err == nil && (pod.Kind != "Pod" || m.Namespace != kubeNamespace || m.Name != name || m.UID == "") {
		err = fmt.Errorf("%w: %.60q %.260q/%.260q with uid %.60q, expected Pod %s/%s",
			errBadResponse, pod.Kind, m.Namespace, m.Name, m.UID, kubeNamespace, name)
	}
	return pod, err
}
