package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// result is what became of an upgrade request.
type result int

const (
	resultOK             result = iota
	resultBadRequest            // 400
	resultBadHead               // 431: too many fields; or by net/http, or closed by that: too long, too slow, malformed
	resultNotFound              // 404
	resultNotUpgrade            // 426
	resultNoTable               // 503
	resultRefused               // 503: the namespace's entry cannot be read
	resultHoldTimeout           // 503
	resultMisdirected           // 503: another backend has the owner's address
	resultMaxSessions           // 503
	resultMaxWaiting            // 503
	resultDraining              // 503: the router stops
	resultClientGone            // the client left before there was an answer
	resultBadGateway            // 502
	resultGatewayTimeout        // 504
	resultAnswered              // the backend gave an answer other than 101
	results                     // how many there are
)

// String is the value of the metric's label.
func (r result) String() string {
	return [results]string{"ok", "bad_request", "bad_head", "not_found", "not_upgrade", "no_table", "refused",
		"hold_timeout", "misdirected", "max_sessions", "max_waiting", "draining", "client_gone", "bad_gateway", "gateway_timeout", "answered"}[r]
}

// status is the HTTP status that goes with the result.
func (r result) status() int {
	switch r {
	case resultBadRequest:
		return http.StatusBadRequest
	case resultBadHead:
		return http.StatusRequestHeaderFieldsTooLarge
	case resultNotFound:
		return http.StatusNotFound
	case resultNotUpgrade:
		return http.StatusUpgradeRequired
	case resultBadGateway:
		return http.StatusBadGateway
	case resultGatewayTimeout:
		return http.StatusGatewayTimeout
	}
	return http.StatusServiceUnavailable
}

// refusal is an upgrade that did not happen, and why. The reason is for the log:
// of what the client did wrong (4xx) it quotes the request and says what was wanted,
// but of all else it names backends and addresses, which are no business of clients.
type refusal struct {
	result result
	reason string
}

func (r *refusal) Error() string { return r.reason }

// forClient is what the client reads: what is wrong with its request (4xx), or one
// sentence for each status that says whose fault it is and nothing of the inside.
func (no *refusal) forClient() string {
	switch no.result.status() {
	case http.StatusBadGateway:
		return "the backend gave no valid answer"
	case http.StatusServiceUnavailable:
		return "the service is not available now, try again later"
	case http.StatusGatewayTimeout:
		return "the backend gave no answer in time"
	}
	return no.reason
}

func refuse(result result, format string, args ...any) *refusal {
	return &refusal{result: result, reason: fmt.Sprintf(format, args...)}
}

// answer writes the refusal. The client has bound to send the rest of its
// request, and as long again to take the answer. A 503 may be tried again in a
// second: clients add their own back-off.
func (no *refusal) answer(w http.ResponseWriter, bound time.Duration) {
	conn := http.NewResponseController(w)
	conn.SetReadDeadline(time.Now().Add(bound)) // net/http reads what is left of a body before it answers
	conn.SetWriteDeadline(time.Now().Add(2 * bound))
	switch no.result.status() {
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	case http.StatusUpgradeRequired:
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Connection", "Upgrade")
	case http.StatusRequestHeaderFieldsTooLarge: // as net/http does: the next head would be no smaller
		w.Header().Set("Connection", "close")
	}
	http.Error(w, no.forClient(), no.result.status())
}

// errDraining is the cause that ends the contexts of requests when the router
// stops.
var errDraining = errors.New("the router stops")

// gone says why the request's context ended.
func gone(ctx context.Context) *refusal {
	if errors.Is(context.Cause(ctx), errDraining) {
		return refuse(resultDraining, "%v", errDraining)
	}
	return refuse(resultClientGone, "the client left")
}
