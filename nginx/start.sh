#!/bin/sh
# start.sh NGINX [ARGUMENT...] replaces itself by nginx. Before that it writes the parts
# of the configuration that depend on the machine, to files in /tmp that nginx.conf
# includes. The image has no more than a shell, and only /tmp is writable.
#
# PROXY_PROTOCOL, a list of addresses and CIDRs like 10.0.0.0/8,fd00::/8, says that load
# balancers with these addresses open each connection to ports 80 and 443 with a header
# of the PROXY protocol. Then nginx expects one from everybody, closes the connection
# without, and believes it only from these. By default it expects none.
set -euf

# IPv6: where the system has none, nginx would not start with an address of it.
ipv6='' loopback=127.0.0.1
if [ -r /proc/net/if_inet6 ]; then
  while read -r address _; do
    ipv6=yes
    if [ "$address" = 00000000000000000000000000000001 ]; then loopback='[::1]'; fi
  done </proc/net/if_inet6
fi

# listen PORT [OPTION...] prints the directives for the port on all addresses.
listen() {
  port=$1
  shift
  echo "listen $port $*;"
  if [ "$ipv6" ]; then echo "listen [::]:$port $*;"; fi
}

# accept_proxies prints whose PROXY protocol nginx believes.
accept_proxies() {
  if [ ! "$proxies" ]; then return; fi
  IFS=,
  for range in $proxies; do echo "set_real_ip_from $range;"; done
  unset IFS
  echo 'real_ip_header proxy_protocol;'
}

proxies=${PROXY_PROTOCOL-}
# refuse ends start.sh: nginx would look up a word that is no address as a host's name.
refuse() {
  echo "start.sh: PROXY_PROTOCOL must be addresses and CIDRs, with commas between them (got $proxies)" >&2
  exit 1
}
IFS=,
for range in $proxies; do
  case $range in
  '' | *[!0-9a-fA-F.:/]*) refuse ;;
  *:*) ;;
  *[!0-9./]*) refuse ;;
  esac
done
unset IFS

# reuseport: the kernel spreads clients over the workers. With one shared socket the same
# worker accepts nearly all of them, for hours.
# backlog: when a router drains, its clients reconnect nearly at once.
# so_keepalive: nginx detects a dead client after 3 minutes, and a load balancer that
# drops idle connections after 4 or 5 minutes sees packets.
client="reuseport so_keepalive=2m:20s:3${proxies:+ proxy_protocol}"
{ listen 80 "$client"; accept_proxies; } >/tmp/nginx-listen-80.conf
{ listen 443 ssl backlog=4096 "$client"; accept_proxies; } >/tmp/nginx-listen-443.conf
listen 8002 >/tmp/nginx-listen-8002.conf
echo "listen $loopback:8003 ssl;" >/tmp/nginx-listen-8003.conf
echo "server $loopback:8003;" >/tmp/nginx-server-8003.conf

# drop_unknown FILE NGINX [ARGUMENT...] empties the file if nginx takes no such
# configuration. A host that is not found is not the file's fault.
drop_unknown() {
  file=$1
  shift
  if ! errors=$("$@" -t 2>&1); then
    case $errors in
    *'host not found'*) ;;
    *) : >"$file" ;;
    esac
  fi
}

# Directives that only newer versions of nginx have: an older one would not start.
#
# ssl_certificate_cache (since 1.27.4): nginx parses certificate and key once, and not
# in each handshake, which takes 1 ms and 8 KiB for as long as the connection is open.
# nginx notices a replaced Secret after the time in "valid".
# ssl_session_tickets: since 1.23.2 their keys change with the session cache. Without
# this line nginx.conf disables them.
# proxy_pass_trailers (since 1.27.2): trailers of answers reach the client.
# An nginx older than 1.27.4 gets none of them.
#
# keepalive 0: since 1.29.7 nginx keeps connections to an upstream unless that says so,
# and before that it does not know this line.
known=/tmp/nginx-known.conf
known_upstream=/tmp/nginx-known-upstream.conf
: >"$known_upstream"
printf '%s\n' 'ssl_certificate_cache max=4 valid=1s;' 'ssl_session_tickets on;' \
  'proxy_pass_trailers on;' >"$known"
drop_unknown "$known" "$@"
echo 'keepalive 0;' >"$known_upstream"
drop_unknown "$known_upstream" "$@"
exec "$@"
