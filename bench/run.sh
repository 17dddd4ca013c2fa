#!/usr/bin/env bash
# Runs bin/bench so that its figures are steady: the load has a CPU of its own, the
# limit of open files is as high as allowed, and, if possible, there is a network
# namespace of its own. In it nobody else has connections or ports, and no congestion
# control paces: BBR sets a timer for each send, which on loopback takes more CPU than
# all the rest. make bench builds bin/bench and passes on its flags; -h lists them.
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
