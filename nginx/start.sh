#!/bin/sh
# start.sh NGINX [ARGUMENT...] runs nginx in its own place. It writes, before
# that, what this nginx has and nginx.conf cannot ask for, since an older one
# would not start: nginx itself is asked (-t). The image has no more than a
# shell, and the file system is read-only but for /tmp.
#
# ssl_certificate_cache (since 1.27.4): the pair is parsed once and not in each
# handshake, which costs 1 ms and each connection 8 KiB for its life. A replaced
# Secret is seen after valid.
# ssl_session_tickets: since 1.23.2 their keys change with the session cache.
# Without this line they are off, as nginx.conf says.
set -eu

known=/tmp/nginx-known.conf
printf '%s\n' 'ssl_certificate_cache max=4 valid=1s;' 'ssl_session_tickets on;' >"$known"
if ! "$@" -t 2>/dev/null; then
  : >"$known"
fi
exec "$@"
