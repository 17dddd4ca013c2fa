package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// serviceAccountDir is where a pod finds its token, CA and Kubernetes namespace
// (https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/).
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// inCluster returns a client with the pod's service account, whose files are in
// dir. It fails only on what no waiting mends.
func inCluster(getenv func(string) string, dir string) (*kube, error) {
	host, port := getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod")
	}
	k := &kube{base: &url.URL{Scheme: "https", Host: net.JoinHostPort(host, port)}, dir: dir, dial: dialTCP}
	return k, k.readCA()
}

// throughProxy returns a client of a kubectl proxy, which adds the credentials.
func throughProxy(base string) (*kube, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf("-kube %q, want in-cluster, none or the http://host:port of a kubectl proxy", base)
	}
	return &kube{base: &url.URL{Scheme: "http", Host: u.Host}, dial: dialTCP}, nil
}

// podNamespace returns the Kubernetes namespace that the pod with this service
// account is in.
func podNamespace(dir string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, "namespace"))
	return strings.TrimSpace(string(b)), err
}

// dialTCP connects to an API server, or gives up after 5 s; keepalives end a
// connection whose peer's host is gone for 30 s.
func dialTCP(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{
		Timeout:         5 * time.Second,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
	}
	return d.DialContext(ctx, network, addr)
}
