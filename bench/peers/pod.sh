#!/bin/sh
# Template: bench sets the directory, the router with its arguments, and the port of its
# admin pages. This is the router's pod as it is deployed (k8s/base): nginx with its
# configuration in front of the router's Unix socket. Both are one process group, which ends
# with nginx. In the pod both run as the same user, so that nginx may use the socket: here
# that is who runs the benchmark.
GOMEMLIMIT=448MiB setpriv --pdeathsig TERM @ROUTER@ -listen unix:@DIR@/router.sock -admin 127.0.0.1:@ADMIN@ \
  -max-sessions 10000 -log-format json -kube none -backends @BACKENDS@ -overrides @DIR@/overrides &
exec sh @DIR@/start.sh @NGINX@ -p @DIR@ -e stderr -c @DIR@/nginx.conf -g "daemon off; user $(id -un);"
