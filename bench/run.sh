#!/usr/bin/env bash
# Runs bin/bench (make bench builds it, and passes bench's flags on; -h lists
# them) where its figures are steady: load on a CPU of its own, as many open
# files as are allowed, and, if it may, in a network namespace of its own. There
# nobody else has connections or ports, and no congestion control paces: BBR sets
# a timer for each send, which on loopback costs more than all the rest.
#
# PROXY_CPU, LOAD_CPU  the CPUs of the proxy, and of load and backends (0, 1)
# NETNS                no: stay in this network namespace
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ulimit -n "$(ulimit -Hn)"
set -- taskset -c "${LOAD_CPU:-1}" bin/bench -proxy-cpu "${PROXY_CPU:-0}" "$@"
if [ "${NETNS:-yes}" = no ] || ! command -v ip >/dev/null || ! unshare -n true 2>/dev/null; then
  echo "in this network namespace, not one of its own" >&2
  exec "$@"
fi
# shellcheck disable=SC2016 # for the inner shell
exec unshare -n sh -c '
  ip link set lo up
  for control in cubic reno; do
    { echo $control >/proc/sys/net/ipv4/tcp_congestion_control; } 2>/dev/null && break
  done
  exec "$@"' sh "$@"
