package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// result is what became of an upgrade, or of a plain request.
type result int

const (
	resultOK                      result = iota
	resultBadRequest                     // 400
	resultBadHead                        // 431: too many fields; or too long, slow or malformed: net/http answers
	resultNotFound                       // 404
	resultNotUpgrade                     // 426
	resultNoTable                        // 503: no table yet, or no plan of the hand-off
	resultUnresolved                     // 503: an invalid override, and the previous owner is not known or was scaled in
	resultHoldTimeout                    // 503
	resultMisdirected                    // 503: another backend has the owner's address
	resultMaxSessions                    // 503
	resultMaxPending                     // 503
	resultMaxSessionsPerNamespace        // 503: the sessions of one namespace
	resultMaxUpgradesPerSecond           // 429: the upgrades of one namespace
	resultDraining                       // 503: the router stops
	resultClientGone                     // the client left before there was an answer
	resultBadGateway                     // 502
	resultGatewayTimeout                 // 504
	resultBackendRefused                 // the backend gave an answer other than 101
	resultBrokenOff                      // the answer to a plain request broke off; 503 if there was none
	numResults                           // how many there are
)

// numUpgradeResults is how many of the results an upgrade may have: those before
// resultBrokenOff.
const numUpgradeResults = resultBrokenOff

// resultInfo is what there is to know of a result.
type resultInfo struct {
	text        string // the value of the metric's label
	status      int    // of a refusal with it; 0: 503
	upgradeOnly bool   // an upgrade can have it, and a plain request cannot
}

// info returns what there is to know of the result.
func (r result) info() resultInfo {
	return [numResults]resultInfo{
		resultOK:                      {text: "ok"},
		resultBadRequest:              {"bad_request", http.StatusBadRequest, false},
		resultBadHead:                 {"bad_head", http.StatusRequestHeaderFieldsTooLarge, false},
		resultNotFound:                {"not_found", http.StatusNotFound, false},
		resultNotUpgrade:              {"not_upgrade", http.StatusUpgradeRequired, true},
		resultNoTable:                 {text: "no_table"},
		resultUnresolved:              {text: "unresolved"},
		resultHoldTimeout:             {text: "hold_timeout"},
		resultMisdirected:             {text: "misdirected"},
		resultMaxSessions:             {text: "max_sessions"},
		resultMaxPending:              {text: "max_pending_upgrades"},
		resultMaxSessionsPerNamespace: {text: "max_sessions_per_namespace", upgradeOnly: true},
		resultMaxUpgradesPerSecond:    {"max_upgrades_per_second", http.StatusTooManyRequests, true},
		resultDraining:                {text: "draining"},
		resultClientGone:              {text: "client_gone"},
		resultBadGateway:              {"bad_gateway", http.StatusBadGateway, false},
		resultGatewayTimeout:          {"gateway_timeout", http.StatusGatewayTimeout, true},
		resultBackendRefused:          {text: "backend_refused", upgradeOnly: true},
		resultBrokenOff:               {text: "broken_off"},
	}[r]
}

// String is the value of the metric's label.
func (r result) String() string { return r.info().text }

// refusalStatus is the HTTP status of a refusal with this result: 503 for those that have no
// other.
func (r result) refusalStatus() int {
	return cmp.Or(r.info().status, http.StatusServiceUnavailable)
}

// refusal says that a request is not carried out, and why. The reason is for the log:
// of what the client did wrong (4xx) it quotes the request and says what was wanted,
// but of all else it names backends and addresses, which clients must not see.
type refusal struct {
	result result
	reason string
}

func (r *refusal) Error() string { return r.reason }

// outcome is what has become of the request.
func (r *refusal) outcome() (result, error) { return r.result, r }

// clientMessage is what the client reads: what is wrong with its request (4xx), or one
// sentence for each status that says whose fault it is and nothing of the inside.
func (r *refusal) clientMessage() string {
	switch r.result.refusalStatus() {
	case http.StatusBadGateway:
		return "the backend gave no valid answer"
	case http.StatusServiceUnavailable:
		return "the service is not available now, try again later"
	case http.StatusGatewayTimeout:
		return "the backend gave no answer in time"
	}
	return r.reason
}

func refuse(result result, format string, args ...any) *refusal {
	return &refusal{result: result, reason: fmt.Sprintf(format, args...)}
}

// writeResponse writes the refusal. The client may take as long as bound to send the rest
// of its request, and as long again to read the answer. A 503 or 429 may be tried again in
// a second: clients add their own back-off.
func (r *refusal) writeResponse(w http.ResponseWriter, bound time.Duration) {
	conn := http.NewResponseController(w)
	conn.SetReadDeadline(time.Now().Add(bound)) // net/http reads what is left of a body before it answers
	conn.SetWriteDeadline(time.Now().Add(2 * bound))
	switch r.result.refusalStatus() {
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		w.Header().Set("Retry-After", "1")
	case http.StatusUpgradeRequired:
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Connection", "Upgrade")
	case http.StatusRequestHeaderFieldsTooLarge: // as net/http does: the next head would be no smaller
		w.Header().Set("Connection", "close")
	}
	http.Error(w, r.clientMessage(), r.result.refusalStatus())
}

// errDraining is the cause that ends the contexts of requests when the router
// stops.
var errDraining = errors.New("the router is stopping")

// contextRefusal says why the request's context ended.
func contextRefusal(ctx context.Context) *refusal {
	if errors.Is(context.Cause(ctx), errDraining) {
		return refuse(resultDraining, "%v", errDraining)
	}
	return refuse(resultClientGone, "the client left")
}
