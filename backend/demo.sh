#!/usr/bin/env bash
# Four backends, the router and the demo page on this machine, until Ctrl-C.
# "make demo" builds the programs first.
#
# OVERRIDES  the directory with one file for each override (demo-overrides)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
OVERRIDES=${OVERRIDES:-demo-overrides}
mkdir -p "$OVERRIDES"

running=()
stop() {
  trap - EXIT INT TERM
  kill "${running[@]}" 2>/dev/null || true
  wait
}
trap stop EXIT INT TERM

for i in 0 1 2 3; do
  bin/backend -listen "127.0.0.1:900$i" -name "backend-$i" -page nginx/page/index.html -log-level warn &
  running+=($!)
done
bin/router -listen 127.0.0.1:8000 -admin 127.0.0.1:8001 -drain-duration 1s \
  -backends 127.0.0.1:9000,127.0.0.1:9001,127.0.0.1:9002,127.0.0.1:9003 \
  -overrides "$OVERRIDES" -pod-name laptop &
running+=($!)

cat <<TEXT

  clients    http://127.0.0.1:9000/?router=127.0.0.1:8000&admin=127.0.0.1:8001
  operator   http://127.0.0.1:8001
  client     bin/backend -connect ws://127.0.0.1:8000/ws/ns-01
  override   echo backend-3 > $OVERRIDES/ns-01        undo: rm $OVERRIDES/ns-01
  owner      curl '127.0.0.1:8001/owner?namespace=ns-01'
  Ctrl-C ends it.

TEXT
wait -n # the first that ends, ends all
