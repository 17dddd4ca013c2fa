#!/bin/sh
# start.sh NGINX [ARGUMENT...] replaces itself by nginx. Before that it writes the
# directives that only newer versions of nginx have, and checks with "nginx -t" whether
# this one accepts them. They cannot be in nginx.conf: an older nginx would not start.
# The image has no more than a shell, and only /tmp is writable.
#
# ssl_certificate_cache (since 1.27.4): nginx parses certificate and key once, and not
# in each handshake, which takes 1 ms and 8 KiB for as long as the connection is open.
# nginx notices a replaced Secret after the time in "valid".
# ssl_session_tickets: since 1.23.2 their keys change with the session cache. Without
# this line nginx.conf disables them.
set -eu

known=/tmp/nginx-known.conf
printf '%s\n' 'ssl_certificate_cache max=4 valid=1s;' 'ssl_session_tickets on;' >"$known"
if ! "$@" -t 2>/dev/null; then
  : >"$known"
fi
exec "$@"
