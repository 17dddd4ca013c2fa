package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// serviceAccountDir is where a pod finds its token, CA and Kubernetes namespace
// (https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/).
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// retryMost is the longest wait, in seconds, that a server may ask for.
const retryMost = 60

// kube speaks to one API server. It is not safe for concurrent use: each
// watcher has its own, so that what one does to its connections is felt by no
// other.
type kube struct {
	// Static after construction.
	base *url.URL
	dir  string // of the service account's files; "" through kubectl proxy
	dial func(ctx context.Context, network, addr string) (net.Conn, error)

	transport *http.Transport
	hangUp    func()         // closes every connection of transport
	ca        []byte         // the file's bytes that roots was made of
	roots     *x509.CertPool // what transport trusts; nil through kubectl proxy
	token     string         // the last that was not empty
}

// inCluster returns a client with the pod's service account, whose files are in
// dir. It fails only on what no waiting mends.
func inCluster(getenv func(string) string, dir string) (*kube, error) {
	host, port := getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod")
	}
	k := &kube{base: &url.URL{Scheme: "https", Host: net.JoinHostPort(host, port)}, dir: dir, dial: dialTCP}
	if err := k.readCA(); err != nil {
		return nil, err
	}
	return k, nil
}

// throughProxy returns a client of a kubectl proxy, which adds the credentials.
func throughProxy(base string) (*kube, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf("-kube %q, want in-cluster, none or the http://host:port of a kubectl proxy", base)
	}
	k := &kube{base: &url.URL{Scheme: "http", Host: u.Host}, dial: dialTCP}
	k.renew()
	return k, nil
}

// podNamespace returns the Kubernetes namespace that the pod with this service
// account is in.
func podNamespace(dir string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, "namespace"))
	return strings.TrimSpace(string(b)), err
}

func dialTCP(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{
		Timeout:         5 * time.Second,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
	}
	return d.DialContext(ctx, network, addr)
}

// renew replaces the transport, and with it every connection. That is the only
// cure for a connection that is half open: HTTP/2 goes on using it after a
// request on it timed out, and also after CloseIdleConnections
// (golang/go#36026). HTTP/2 pings notice it early; HTTP/1.1 has only deadlines.
func (k *kube) renew() {
	k.close()
	life, hangUp := context.WithCancel(context.Background())
	k.hangUp = hangUp
	k.transport = &http.Transport{
		Proxy: nil, // HTTPS_PROXY is not for the API server (cert-manager#1371)
		DialContext: func(_ context.Context, network, addr string) (net.Conn, error) {
			conn, err := k.dial(life, network, addr)
			if err != nil {
				return nil, err
			}
			return &line{conn, context.AfterFunc(life, func() { conn.Close() })}, nil
		},
		TLSHandshakeTimeout: 5 * time.Second,
		ForceAttemptHTTP2:   true, // a dialer of our own turns HTTP/2 off otherwise
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second},
		DisableCompression:  true,
		TLSClientConfig:     &tls.Config{RootCAs: k.roots, MinVersion: tls.VersionTLS12},
	}
}

// close closes every connection, whatever state it is in: one that HTTP/2 has
// just reset a stream on is not idle, and would stay.
func (k *kube) close() {
	if k.hangUp != nil {
		k.hangUp()
	}
}

// line is a connection that the client's close closes.
type line struct {
	net.Conn
	forget func() bool
}

func (l *line) Close() error {
	l.forget()
	return l.Conn.Close()
}

// readCA renews the transport if the CA file's bytes have changed. A file that
// cannot be read or has no certificate changes nothing.
func (k *kube) readCA() error {
	ca, err := os.ReadFile(filepath.Join(k.dir, "ca.crt"))
	if err != nil || bytes.Equal(ca, k.ca) {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return fmt.Errorf("%s/ca.crt has no certificate in PEM", k.dir)
	}
	k.ca, k.roots = ca, roots
	k.renew()
	return nil
}

// readToken reads the token, which the kubelet replaces about hourly, and
// reports whether it is another than before. A file that is empty or cannot be
// read keeps the last one (kubernetes#68164).
func (k *kube) readToken() (changed bool) {
	b, err := os.ReadFile(filepath.Join(k.dir, "token"))
	token := strings.TrimSpace(string(b))
	if err != nil || token == "" || token == k.token {
		return false
	}
	k.token = token
	return true
}

// get asks for path?query and returns the body of an answer that is 200 and
// JSON, which the caller closes. A refusal of the server is a *status. The
// body ends with ctx. Any other error means that the transport is in doubt.
func (k *kube) get(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	credentials := k.dir != "" // through kubectl proxy no token must be sent
	if credentials {
		k.readCA() // its error shows when the connection does
		k.readToken()
	}
	resp, err := k.roundTrip(ctx, path, query)
	if err == nil && resp.StatusCode == http.StatusUnauthorized && credentials && k.readToken() {
		resp.Body.Close()
		resp, err = k.roundTrip(ctx, path, query)
	}
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, refusedBy(resp)
	}
	if media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); media != "application/json" {
		resp.Body.Close()
		return nil, fmt.Errorf("the answer is %.60q, want application/json: is this an API server?", media)
	}
	return resp.Body, nil
}

// roundTrip sends one request. It goes to the transport directly: a redirect
// must not be followed with the token.
func (k *kube) roundTrip(ctx context.Context, path string, query url.Values) (*http.Response, error) {
	u := *k.base
	u.Path, u.RawQuery = path, query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "wsrouter/"+version())
	if k.token != "" {
		req.Header.Set("Authorization", "Bearer "+k.token)
	}
	return k.transport.RoundTrip(req)
}

// status is the API server's own "no", over HTTP or in a watch: what is read of
// its Status
// (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/).
type status struct {
	Message string `json:"message"`
	Reason  string `json:"reason"`
	Code    int    `json:"code"`
	Details struct {
		RetryAfterSeconds int `json:"retryAfterSeconds"`
	} `json:"details"`
}

func (s *status) Error() string {
	return fmt.Sprintf("%d %s: %s", s.Code, cmp.Or(s.Reason, http.StatusText(s.Code)), s.Message)
}

// retryAfter is how long the server wants to be left alone, which it may ask for
// up to retryMost.
func (s *status) retryAfter() time.Duration {
	return time.Duration(min(s.Details.RetryAfterSeconds, retryMost)) * time.Second
}

// refusedBy makes an error of an answer that is not 200. Its body may be a
// Status or plain text: that of flow control is text, of kubectl proxy too.
func refusedBy(resp *http.Response) *status {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 16<<10)) // half a message is better than none
	s := &status{}
	if json.Unmarshal(body, s) != nil || s.Message == "" {
		s = &status{Message: fmt.Sprintf("%.200s", bytes.TrimSpace(body))}
	}
	s.Code = resp.StatusCode
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		s.Details.RetryAfterSeconds = max(s.Details.RetryAfterSeconds, n)
	}
	return s
}
