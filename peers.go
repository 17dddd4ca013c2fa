package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	askTimeout    = time.Second     // of one question to one router
	askAllTimeout = 3 * time.Second // of a question to all, with the LIST of their pods
	maxReply      = 16 << 20        // bytes of one answer: a preview of 100,000 sessions
	peerListAge   = 5 * time.Second // how long a LIST of pods is used
)

// askerHeader has, in a question, peers.askerID of the router that asks. It is another
// random number than member.instance.
const askerHeader = "X-Router-Asker"

// errOwnAnswer says that this router has asked itself.
var errOwnAnswer = errors.New("this router has this address")

// peers asks the other routers, at their admin ports. A router that is asked by another
// router answers for itself alone.
type peers struct {
	// Static after construction.
	askerID string // of this process: random
	find    func(ctx context.Context) ([]peer, error)
	conns   chan struct{} // has an element for each connection

	timeout, allTimeout time.Duration // see the constants
}

// peer is another router.
type peer struct {
	name string // of its pod, or its address
	addr string // of its admin port
}

// silentRouter is a router that did not answer, or not as a router does.
type silentRouter struct {
	Name  string `json:"name"` // of its pod, or its address
	Error string `json:"error"`
}

// question is a request to the admin port of each router.
type question struct {
	method, path string // path has the query too
	body         []byte
}

// reply is what a router has answered to a question.
type reply struct {
	name string // of the router
	body []byte
	err  error // nil if the status is 200
}

// newPeers returns the peers that find finds. With an error, find may also return peers: those that
// it has found before.
func newPeers(find func(ctx context.Context) ([]peer, error)) *peers {
	return &peers{
		askerID: fmt.Sprintf("%016x", rand.Uint64()),
		find:    find,
		conns:   make(chan struct{}, maxPeerConns),
		timeout: askTimeout, allTimeout: askAllTimeout,
	}
}

// fixedPeers returns a find function for a list of addresses.
func fixedPeers(addrs []string) func(context.Context) ([]peer, error) {
	var all []peer
	for _, addr := range addrs {
		all = append(all, peer{addr, addr})
	}
	return func(context.Context) ([]peer, error) { return all, nil }
}

// ask asks all other routers at once, and returns their replies by name. If they are not
// known, one more reply says why.
func (p *peers) ask(ctx context.Context, q question) []reply {
	if p == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, p.allTimeout)
	defer cancel()
	all, err := p.find(ctx)
	replies := make([]reply, len(all))
	var asking sync.WaitGroup
	for i, other := range all {
		asking.Go(func() { replies[i] = p.askOne(ctx, other, q) })
	}
	asking.Wait()
	replies = slices.DeleteFunc(replies, func(r reply) bool { return r.err == errOwnAnswer })
	slices.SortFunc(replies, func(a, b reply) int { return cmp.Compare(a.name, b.name) })
	if err != nil {
		replies = append(replies, reply{
			name: "other routers", err: fmt.Errorf("they are not known: %w", err)})
	}
	return replies
}

// askOne asks one router, once there are fewer than maxPeerConns connections.
func (p *peers) askOne(ctx context.Context, other peer, q question) reply {
	r := reply{name: other.name}
	select {
	case p.conns <- struct{}{}:
		defer func() { <-p.conns }()
	case <-ctx.Done():
		r.err = errors.New("too many questions at once")
		return r
	}
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	r.body, r.err = p.request(ctx, other.addr, q)
	var timeout net.Error // of the dial, which may know the end of ctx before ctx does
	if r.err != nil && (ctx.Err() != nil || errors.As(r.err, &timeout) && timeout.Timeout()) {
		r.err = fmt.Errorf("no answer within %s", p.timeout)
	}
	return r
}

// request sends the question to addr, on a connection of its own, and returns the answer.
// It follows no redirect.
func (p *peers) request(ctx context.Context, addr string, q question) ([]byte, error) {
	target := "http://" + addr + q.path
	req, err := http.NewRequestWithContext(ctx, q.method, target, bytes.NewReader(q.body))
	if err != nil {
		return nil, err
	}
	req.Header.Set(askerHeader, p.askerID)
	transport := &http.Transport{
		// The transport's own context goes on when ctx ends: to a host that is gone, for minutes.
		DialContext: func(_ context.Context, network, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	switch {
	case err != nil:
		return nil, err
	case len(body) > maxReply:
		return nil, fmt.Errorf("an answer of more than %d bytes", maxReply)
	case resp.StatusCode == http.StatusLoopDetected:
		return nil, errOwnAnswer
	}
	return body, answerError(resp.StatusCode, body)
}

// answerError returns nil for the answer 200, and otherwise an error with the text that the
// router gave.
func answerError(status int, body []byte) error {
	if status == http.StatusOK {
		return nil
	}
	var failure struct{ Error string }
	if json.Unmarshal(body, &failure) != nil || failure.Error == "" {
		failure.Error = fmt.Sprintf("%.200s", bytes.TrimSpace(body))
	}
	return fmt.Errorf("%d %s: %s", status, http.StatusText(status), failure.Error)
}

// isAskedByUs reports whether the request comes from this router itself.
func (p *peers) isAskedByUs(r *http.Request) bool {
	return p != nil && r.Header.Get(askerHeader) == p.askerID
}

// decodeReplies decodes the replies. isWhole reports whether one has what each router
// answers; other programs, and other versions of this one, may answer something else.
// All others are silent.
func decodeReplies[T any](replies []reply, isWhole func(*T) bool) (
	all []*T, silent []silentRouter) {
	silent = []silentRouter{}
	for _, r := range replies {
		answer := new(T)
		err := r.err
		if err == nil {
			err = json.Unmarshal(r.body, answer)
		}
		if err == nil && !isWhole(answer) {
			err = errors.New("it is not the answer of a router of this version")
		}
		if err != nil {
			silent = append(silent, silentRouter{r.name, err.Error()})
			continue
		}
		all = append(all, answer)
	}
	return all, silent
}

// peerPods finds the other routers by the label of their pods.
type peerPods struct {
	// Static after construction.
	kubeNamespace, label string
	own                  string // the name of this router's pod
	port                 string // of the admin ports

	turn chan struct{} // has an element while somebody owns what follows

	// Only the goroutine that has put the element into turn may use these.
	client  kubeClient
	found   []peer
	err     error
	foundAt time.Time
}

// newPeerPods returns peerPods of the pods with this label selector. admin is the address
// of this router's admin port: the others have the same port.
func newPeerPods(client kubeClient, kubeNamespace, label, own, admin string) *peerPods {
	port := ""
	if !strings.HasPrefix(admin, "unix:") {
		_, port, _ = net.SplitHostPort(admin)
	}
	return &peerPods{
		kubeNamespace: kubeNamespace, label: label, own: own, port: port, client: client, turn: make(chan struct{}, 1),
	}
}

// find returns the other routers. It lists the pods at most once in peerListAge. If the
// LIST fails, it returns those of the last one and the error.
func (p *peerPods) find(ctx context.Context) ([]peer, error) {
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if !p.foundAt.IsZero() && time.Since(p.foundAt) < peerListAge {
		return p.found, p.err
	}
	listCtx, cancel := context.WithTimeout(ctx, askAllTimeout-askTimeout)
	defer cancel()
	found, err := p.list(listCtx)
	if err == nil {
		p.found = found
	} else if ctx.Err() != nil { // who asks is gone: that says nothing of the API server
		return p.found, err
	}
	p.err, p.foundAt = err, time.Now()
	return p.found, p.err
}

// list lists the pods.
func (p *peerPods) list(ctx context.Context) (found []peer, err error) {
	if p.port == "" {
		return nil, errors.New("-admin has no port")
	}
	pods, err := listPods(ctx, &p.client, p.kubeNamespace, p.label)
	if err != nil {
		return nil, err
	}
	for _, pod := range pods {
		ip := pod.Status.PodIP
		if pod.Metadata.Name != p.own && ip != "" && !pod.routerEnded() {
			found = append(found, peer{pod.Metadata.Name, net.JoinHostPort(ip, p.port)})
		}
	}
	return found, nil
}

// parsePeers parses a list of the addresses of admin ports, separated by commas.
func parsePeers(list string) ([]string, error) {
	addrs := splitList(list)
	for _, addr := range addrs {
		host, port, err := net.SplitHostPort(addr)
		if err != nil || host == "" || port == "" {
			return nil, fmt.Errorf("%q is not host:port", addr)
		}
	}
	return addrs, nil
}
