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
	// Bytes of JSON: of one object (1 MiB of "<" in a ConfigMap is 6.3 MB), of a LIST.
	maxObject, maxList     = 16 << 20, 256 << 20
	minBackoff, maxBackoff = 500 * time.Millisecond, 15 * time.Second
	maxRetryAfter          = 60 // the longest wait, in seconds, that a server may ask for
)

var (
	errTooBig      = fmt.Errorf("an object of more than %d bytes", maxObject)
	errBadResponse = errors.New("not what an API server answers")
)

// kubeClient speaks to one API server. It is not safe for concurrent use: each
// watcher has its own, so that what one does to its connections is felt by no
// other.
type kubeClient struct {
	// Static after construction.
	base       *url.URL
	accountDir string // of the service account's files; "" through kubectl proxy
	dial       func(ctx context.Context, network, addr string) (net.Conn, error)
	patch      bool // what is sent changes an object

	roots    *x509.CertPool // the last that were good; nil through kubectl proxy
	token    string         // the last that was not empty
	protocol string         // of the last answer: "HTTP/2.0", or "HTTP/1.1", which has no pings
}

// newTransport returns a transport for one request, whose connection ends with the
// request's context. No connection is ever used again: HTTP/2 would go on with
// one that is half open after a request on it timed out, and also after
// CloseIdleConnections (golang/go#36026). HTTP/2 pings notice it; HTTP/1.1 has none.
func (k *kubeClient) newTransport() *http.Transport {
	return &http.Transport{
		Proxy: nil, // HTTPS_PROXY is not for the API server (cert-manager#1371)
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			requestCtx := ctx.Value(k).(context.Context) // the request's: the transport's goes on when that ends
			conn, err := k.dial(requestCtx, network, addr)
			if err == nil {
				context.AfterFunc(requestCtx, func() { conn.Close() })
			}
			return conn, err
		},
		TLSHandshakeTimeout: 5 * time.Second,
		ForceAttemptHTTP2:   true, // a dialer of our own turns HTTP/2 off otherwise
		HTTP2:               &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second},
		DisableCompression:  true,
		TLSClientConfig:     &tls.Config{RootCAs: k.roots, MinVersion: tls.VersionTLS12},
	}
}

// readCA reads which CAs to trust: others after a rotation (kubernetes#119483).
// A file that cannot be read or has no certificate changes nothing.
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

// readToken reads the token, which the kubelet replaces about hourly, and
// reports whether it is another than before. A file that is empty or cannot be
// read keeps the last one (kubernetes#68164).
func (k *kubeClient) readToken() (changed bool) {
	b, err := os.ReadFile(filepath.Join(k.accountDir, "token"))
	token := strings.TrimSpace(string(b))
	if err != nil || token == "" || token == k.token {
		return false
	}
	k.token = token
	return true
}

// do gets path?query, or creates the object, JSON, in the collection at path,
// or patches what is there. It returns the body of an answer that is as it should
// be, and JSON; the caller closes it, and it ends with ctx, which must end. A
// refusal of the server is a *status. Token and CA are read before each request,
// the token once more if it was refused (ManageIQ/kubeclient#530).
func (k *kubeClient) do(ctx context.Context, path string, query url.Values, object []byte) (io.ReadCloser, error) {
	if k.accountDir != "" { // through kubectl proxy no token must be sent
		k.readCA() // its error shows when the connection does
		k.readToken()
	}
	resp, err := k.roundTrip(ctx, path, query, object)
	if err == nil && resp.StatusCode == http.StatusUnauthorized && k.accountDir != "" && k.readToken() {
		resp.Body.Close()
		resp, err = k.roundTrip(ctx, path, query, object)
	}
	if err != nil {
		return nil, cmp.Or(ctx.Err(), err)
	}
	k.protocol = resp.Proto
	if resp.StatusCode != http.StatusOK && (resp.StatusCode != http.StatusCreated || object == nil) {
		defer resp.Body.Close()
		return nil, newStatusError(resp)
	}
	if media, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";"); media != "application/json" {
		resp.Body.Close()
		return nil, fmt.Errorf("%w: %.60q, want application/json", errBadResponse, media)
	}
	return resp.Body, nil
}

// roundTrip sends one request, and follows no redirect, which would get the token.
func (k *kubeClient) roundTrip(ctx context.Context, path string, query url.Values, object []byte) (*http.Response, error) {
	u, method, media := *k.base, http.MethodGet, "application/json"
	u.Path, u.RawQuery = path, query.Encode()
	if k.patch {
		method, media = http.MethodPatch, "application/merge-patch+json"
	} else if object != nil {
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(context.WithValue(ctx, k, ctx), method, u.String(), bytes.NewReader(object))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Content-Type", media)
	req.Header.Set("User-Agent", "wsrouter/"+version())
	if k.token != "" {
		req.Header.Set("Authorization", "Bearer "+k.token)
	}
	return k.newTransport().RoundTrip(req)
}

// statusError is the API server's own "no", over HTTP or in a watch: what is read of
// its Status
// (https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/).
type statusError struct {
	Message string `json:"message"`
	Reason  string `json:"reason"`
	Code    int    `json:"code"`
	Details struct {
		RetryAfterSeconds int `json:"retryAfterSeconds"`
	} `json:"details"`
}

func (s *statusError) Error() string {
	return fmt.Sprintf("%d %s: %s", s.Code, cmp.Or(s.Reason, http.StatusText(s.Code)), s.Message)
}

// retryAfter is how long the server wants to be left alone, at most maxRetryAfter.
func retryAfter(err error) time.Duration {
	statusErr := &statusError{}
	errors.As(err, &statusErr)
	return time.Duration(min(statusErr.Details.RetryAfterSeconds, maxRetryAfter)) * time.Second
}

// backoff returns how long to wait after the fails-th cycle in a row that was not
// healthy: exponential, jittered by half of itself in both directions, at least
// what the server asked for. random is in [0, 1).
func backoff(failures int, minWait time.Duration, random float64) time.Duration {
	wait := random * float64(minBackoff) // replicas that were cut together come back apart
	if failures > 0 {
		wait = (0.5 + random) * float64(min(maxBackoff, minBackoff<<min(failures-1, 10)))
	}
	if float64(minWait) > wait {
		wait = (1 + 0.2*random) * float64(minWait)
	}
	return time.Duration(wait)
}

// newStatusError makes an error of an answer that is not 200. Its body may be a
// Status or plain text: that of flow control is text, of kubectl proxy too.
func newStatusError(resp *http.Response) *statusError {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 16<<10)) // half a message is better than none
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

// hasStatus reports whether err is the API server's "no" with the code.
func hasStatus(err error, code int) bool {
	statusErr := &statusError{}
	return errors.As(err, &statusErr) && statusErr.Code == code
}

// errorClass says in one word, of some dozens, what kind of failure err is.
func errorClass(err error) string {
	statusErr, opErr, netErr := &statusError{}, &net.OpError{}, net.Error(nil)
	switch as := func(target any) bool { return errors.As(err, target) }; {
	case err == nil:
		return "none"
	case as(&statusErr): // not_found, too_many_requests, ...
		return cmp.Or(strings.ReplaceAll(strings.ToLower(http.StatusText(statusErr.Code)), " ", "_"), "refused")
	case errors.Is(err, errTooBig):
		return "too_big"
	case errors.Is(err, errBadResponse), as(new(*json.SyntaxError)), as(new(*json.UnmarshalTypeError)):
		return "bad_answer"
	case as(&opErr) && opErr.Op == "dial":
		return "dial"
	case as(new(*tls.CertificateVerificationError)), as(new(tls.RecordHeaderError)), as(&opErr) && opErr.Op == "remote error":
		return "tls"
	case errors.Is(err, context.DeadlineExceeded), as(&netErr) && netErr.Timeout():
		return "timeout"
	}
	return "cut"
}

// apiObject is what is read of every API object, and of every list.
type apiObject struct {
	Kind     string `json:"kind"`
	Metadata struct {
		Name            string `json:"name"`
		Namespace       string `json:"namespace"`
		UID             string `json:"uid"`
		ResourceVersion string `json:"resourceVersion"`
		Generation      int64  `json:"generation"` // of the spec, where there is one: 1 and up
		Continue        string `json:"continue"`   // lists only
	} `json:"metadata"`
}

// serviceAccountDir is where a pod finds its token, CA and Kubernetes namespace
// (https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/).
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// newInClusterClient returns a client with the pod's service account, whose files are in
// dir. It fails only on what no waiting mends.
func newInClusterClient(getenv func(string) string, dir string) (*kubeClient, error) {
	host, port := getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: this is no pod")
	}
	k := &kubeClient{base: &url.URL{Scheme: "https", Host: net.JoinHostPort(host, port)}, accountDir: dir, dial: dialAPIServer}
	return k, k.readCA()
}

// newKubectlProxyClient returns a client of a kubectl proxy, which adds the credentials.
func newKubectlProxyClient(base string) (*kubeClient, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf("-kube %q, want in-cluster, none or the http://host:port of a kubectl proxy", base)
	}
	return &kubeClient{base: &url.URL{Scheme: "http", Host: u.Host}, dial: dialAPIServer}, nil
}

// podNamespace returns the Kubernetes namespace that the pod with this service
// account is in.
func podNamespace(dir string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, "namespace"))
	return strings.TrimSpace(string(b)), err
}

// dialAPIServer connects to an API server, or gives up after 5 s; keepalives end a
// connection whose peer's host is gone for 30 s.
func dialAPIServer(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{
		Timeout:         5 * time.Second,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3},
	}
	return d.DialContext(ctx, network, addr)
}
