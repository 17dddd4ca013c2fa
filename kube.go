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
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	// maxObject bounds the JSON of one object, in bytes. 1 MiB of "<" in a ConfigMap is
	// 6.3 MB of JSON.
	maxObject = 16 << 20
	// maxList bounds the JSON of a LIST, in bytes.
	maxList = 256 << 20

	// The waits between tries: see retryDelay.
	minKubeRetry = 500 * time.Millisecond
	maxKubeRetry = 15 * time.Second
	// maxRetryAfter is the longest wait, in seconds, that the API server may ask for.
	maxRetryAfter = 60
)

var (
	errTooBig      = fmt.Errorf("an object of more than %d bytes", maxObject)
	errBadResponse = errors.New("not a response of an API server")
)

// kubeClient sends requests to one API server. It is not safe for concurrent use: each
// watcher has a client of its own, so that its connections do not depend on those of
// another watcher.
type kubeClient struct {
	// Static after construction.
	base         *url.URL // https, or http through kubectl proxy; without a path
	accountDir   string   // of the service account's files; "" through kubectl proxy
	dial         func(ctx context.Context, network, addr string) (net.Conn, error)
	sendsPatches bool // do sends merge patches, by PATCH
	keepsConn    bool // the connection is kept for the next request

	// Changed by do.
	roots    *x509.CertPool // from the last good ca.crt; nil through kubectl proxy
	token    string         // the last that was not empty; "" through kubectl proxy
	protocol string         // of the last response: "HTTP/1.1" (without pings) or "HTTP/2.0"

	kept *http.Transport // kept between requests, if keepsConn is set; nil before the first and after an error
}

// newTransport returns a transport for one request. Its connection is closed when the
// context of the request ends, and no other request uses it. HTTP/2 would use a half-open
// connection again after a request on it timed out, and also after CloseIdleConnections
// (golang/go#36026). The pings of HTTP/2 detect such a connection; HTTP/1.1 has no pings.
func (k *kubeClient) newTransport() *http.Transport {
	return &http.Transport{
		Proxy: nil, // HTTPS_PROXY is not for the API server (cert-manager#1371)
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			// The context of the request: the transport's own goes on when that ends.
			requestCtx := ctx.Value(k).(context.Context)
			conn, err := k.dial(requestCtx, network, addr)
			if err == nil {
				context.AfterFunc(requestCtx, func() { conn.Close() })
			}
			return conn, err
		},
		TLSHandshakeTimeout: 5 * time.Second,
		ForceAttemptHTTP2:   true, // DialContext turns HTTP/2 off otherwise
		HTTP2: &http.HTTP2Config{
			SendPingTimeout: 15 * time.Second,
			PingTimeout:     5 * time.Second,
		},
		DisableCompression: true,
		TLSClientConfig:    &tls.Config{RootCAs: k.roots, MinVersion: tls.VersionTLS12},
	}
}

// transport returns the transport for the next request: a new one, or the kept one. That
// one uses HTTP/1.1, which gives a connection up when a request on it is not answered.
func (k *kubeClient) transport() *http.Transport {
	if !k.keepsConn {
		return k.newTransport()
	}
	if k.kept == nil {
		k.kept = k.newTransport()
		k.kept.DialContext = k.dial
		k.kept.ForceAttemptHTTP2 = false
		k.kept.MaxIdleConnsPerHost = 1
		k.kept.IdleConnTimeout = time.Minute
	}
	return k.kept
}

// dropKept closes the kept connection: the next request reads the CAs anew, and dials.
func (k *kubeClient) dropKept() {
	if k.kept != nil {
		k.kept.CloseIdleConnections()
		k.kept = nil
	}
}

// readCA reads the CAs to trust from ca.crt, which changes when the CA is rotated
// (kubernetes#119483). If the file cannot be read or has no certificate, readCA returns
// an error and keeps the CAs from before.
func (k *kubeClient) readCA() error {
	ca, err := os.ReadFile(filepath.Join(k.accountDir, "ca.crt"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return fmt.Errorf("%s/ca.crt has no certificate in PEM", k.accountDir)
	}
	k.roots = roots
	return nil
}

// readToken reads the token, which the kubelet replaces about once an hour, and reports
// whether it changed. If the file is empty or cannot be read, readToken keeps the token
// from before (kubernetes#68164).
func (k *kubeClient) readToken() (changed bool) {
	b, err := os.ReadFile(filepath.Join(k.accountDir, "token"))
	token := strings.TrimSpace(string(b))
	if err != nil || token == "" || token == k.token {
		return false
	}
	k.token = token
	return true
}

// do sends one request:
//
//   - without a body, GET path?query;
//   - with a body, POST: the API server creates this object, which is JSON, in the collection
//     at path;
//   - for a client with sendsPatches, PATCH: body is a merge patch, in JSON, of the object at path.
//
// do returns the body of a successful response, which is JSON. The caller closes it. The
// body also ends when ctx ends, and ctx must end: the connection is closed then, unless it
// is kept and the body was read to its end. do returns a *statusError if the API server
// refused the request, and errBadResponse if the response is not JSON. It reads the token
// and the CAs before each request, and sends the request again if the answer was 401 and
// the token has changed since (ManageIQ/kubeclient#530).
func (k *kubeClient) do(ctx context.Context, path string, query url.Values,
	body []byte) (io.ReadCloser, error) {
	if k.accountDir != "" { // kubectl proxy must get no token
		k.readCA() // if it fails and the CA has changed, the TLS handshake fails
		k.readToken()
	}
	resp, err := k.roundTrip(ctx, path, query, body)
	if err == nil && resp.StatusCode == http.StatusUnauthorized &&
		k.accountDir != "" && k.readToken() {
		resp.Body.Close()
		resp, err = k.roundTrip(ctx, path, query, body)
	}
	if err != nil {
		k.dropKept()
		return nil, cmp.Or(ctx.Err(), err)
	}
	k.protocol = resp.Proto
	created := resp.StatusCode == http.StatusCreated && body != nil
	if resp.StatusCode != http.StatusOK && !created {
		defer resp.Body.Close()
		return nil, newStatusError(resp)
	}
	mediaType, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	if mediaType != "application/json" {
		resp.Body.Close()
		return nil, fmt.Errorf("%w: Content-Type %.60q, expected application/json", errBadResponse, mediaType)
	}
	return resp.Body, nil
}

// roundTrip sends one request, with object as its body. It follows no redirect: the other
// server would get the token.
func (k *kubeClient) roundTrip(ctx context.Context, path string, query url.Values,
	object []byte) (*http.Response, error) {
	u, method, mediaType := *k.base, http.MethodGet, "application/json"
	u.Path, u.RawQuery = path, query.Encode()
	if k.sendsPatches {
		method, mediaType = http.MethodPatch, "application/merge-patch+json"
	} else if object != nil {
		method = http.MethodPost
	}
	ctx = context.WithValue(ctx, k, ctx) // see newTransport
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(object))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Content-Type", mediaType)
	req.Header.Set("User-Agent", "router/"+version())
	if k.token != "" {
		req.Header.Set("Authorization", "Bearer "+k.token)
	}
	return k.transport().RoundTrip(req)
}

// statusError is an error that the API server answered: as a response that is not 2xx, or
// as an ERROR event of a WATCH. It holds those fields of the Status that the router needs
// (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/).
type statusError struct {
	Message string `json:"message"`
	Reason  string `json:"reason"`
	Code    int    `json:"code"`
	Details struct {
		Name              string `json:"name"` // of the object that there is none of
		Kind              string `json:"kind"` // its resource: "pods"
		RetryAfterSeconds int    `json:"retryAfterSeconds"`
	} `json:"details"`
}

func (s *statusError) Error() string {
	reason := cmp.Or(s.Reason, http.StatusText(s.Code))
	return fmt.Sprintf("%d %s: %s", s.Code, reason, s.Message)
}

// retryAfter returns how long the API server asks to wait before the next request, at
// most maxRetryAfter; 0 if err is no *statusError.
func retryAfter(err error) time.Duration {
	statusErr, ok := errors.AsType[*statusError](err)
	if !ok {
		return 0
	}
	seconds := min(statusErr.Details.RetryAfterSeconds, maxRetryAfter)
	return time.Duration(seconds) * time.Second
}

// retryDelay returns how long to wait before the next request, after this many failures in a
// row. It is a jittered backoff from minKubeRetry to maxKubeRetry. After no failure it is a
// jitter of up to minKubeRetry, so that routers that lost their streams together do not come
// back together. It is never less than minWait, which the API server asked for. random is in
// [0, 1).
func retryDelay(failures int, minWait time.Duration, random float64) time.Duration {
	wait := time.Duration(random * float64(minKubeRetry))
	if failures > 0 {
		wait = backoff{minKubeRetry, maxKubeRetry}.jittered(failures, random)
	}
	if minWait > wait {
		wait = time.Duration((1 + 0.2*random) * float64(minWait))
	}
	return wait
}

// newStatusError returns the error of a response that is not 2xx. Its body is a Status in
// JSON, or plain text from the API server's flow control and from kubectl proxy. The
// caller closes the body.
func newStatusError(resp *http.Response) *statusError {
	// If this fails, the first part of the message is better than none.
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
	s := &statusError{}
	if json.Unmarshal(body, s) != nil || s.Message == "" {
		s = &statusError{Message: fmt.Sprintf("%.200s", bytes.TrimSpace(body))}
	}
	s.Code = resp.StatusCode
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil {
		s.Details.RetryAfterSeconds = max(s.Details.RetryAfterSeconds, n)
	}
	return s
}

// hasStatus reports whether err is a *statusError with this HTTP status code.
func hasStatus(err error, code int) bool {
	statusErr, ok := errors.AsType[*statusError](err)
	return ok && statusErr.Code == code
}

// saysNotFound reports whether err is the answer of an API server that it has no object of this
// name in the resource. A 404 alone may be of something on the way to it, or say that this path
// is not served yet.
func saysNotFound(err error, resource, name string) bool {
	statusErr, ok := errors.AsType[*statusError](err)
	return ok && statusErr.Code == http.StatusNotFound && statusErr.Reason == "NotFound" &&
		statusErr.Details.Kind == resource && statusErr.Details.Name == name
}

// errorClass returns the class of err, for the log and the metrics: one word of a small
// set, "none" for nil.
func errorClass(err error) string {
	statusErr, opErr, netErr := &statusError{}, &net.OpError{}, net.Error(nil)
	switch as := func(target any) bool { return errors.As(err, target) }; {
	case err == nil:
		return "none"
	case as(&statusErr): // not_found, too_many_requests, ...
		text := strings.ToLower(http.StatusText(statusErr.Code))
		return cmp.Or(strings.ReplaceAll(text, " ", "_"), "unknown_status")
	case errors.Is(err, errTooBig):
		return "too_big"
	case errors.Is(err, errBadResponse),
		as(new(*json.SyntaxError)), as(new(*json.UnmarshalTypeError)):
		return "bad_response"
	case as(&opErr) && opErr.Op == "dial":
		return "dial"
	case as(new(*tls.CertificateVerificationError)), as(new(tls.RecordHeaderError)),
		as(&opErr) && opErr.Op == "remote error":
		return "tls"
	case errors.Is(err, context.DeadlineExceeded), as(&netErr) && netErr.Timeout():
		return "timeout"
	}
	return "connection_lost"
}

// connectionClasses returns the classes of errorClass that are no HTTP status.
func connectionClasses() []string {
	return []string{"bad_response", "connection_lost", "dial", "timeout", "tls", "too_big"}
}

// apiObject holds the fields that the router reads of every API object and every list.
type apiObject struct {
	Kind     string `json:"kind"`
	Metadata struct {
		Name            string `json:"name"`
		Namespace       string `json:"namespace"`
		UID             string `json:"uid"`
		ResourceVersion string `json:"resourceVersion"`
		Generation      int64  `json:"generation"` // of the spec, from 1; 0 without a spec
		Continue        string `json:"continue"`   // of a list: "" if the list is whole

		DeletionTimestamp string `json:"deletionTimestamp"` // "" if it is not being deleted
	} `json:"metadata"`
}

// serviceAccountDir is the directory with a pod's token, CA and Kubernetes namespace
// (https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/).
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// newInClusterClient returns a client that uses the pod's service account, with its files
// in dir. It returns an error only for what would fail at each later try too.
func newInClusterClient(getenv func(string) string, dir string) (*kubeClient, error) {
	host, port := getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New(
			"KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: the router does not run in a pod")
	}
	base := &url.URL{Scheme: "https", Host: net.JoinHostPort(host, port)}
	k := &kubeClient{base: base, accountDir: dir, dial: dialAPIServer}
	return k, k.readCA()
}

// newKubectlProxyClient returns a client that uses the kubectl proxy at base, a URL such
// as http://127.0.0.1:8080. The proxy adds the credentials.
func newKubectlProxyClient(base string) (*kubeClient, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf(
			"-kube must be in-cluster, none or the http://host:port of a kubectl proxy (got %q)", base)
	}
	u = &url.URL{Scheme: "http", Host: u.Host}
	return &kubeClient{base: u, dial: dialAPIServer}, nil
}

// podKubeNamespace returns the Kubernetes namespace of the pod, from the service account's
// files in dir.
func podKubeNamespace(dir string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, "namespace"))
	return strings.TrimSpace(string(b)), err
}

// dialAPIServer connects to an API server within 5 s. TCP keepalive ends the connection
// when the API server's host has not answered for 30 s. The caller closes the connection.
func dialAPIServer(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{
		Timeout: 5 * time.Second,
		KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3,
		},
	}
	return d.DialContext(ctx, network, addr)
}
