#!/usr/bin/env bash
# Deploys the router and the demo backend (k8s/demo) to the cluster of the current
# kubeconfig context, into that context's Kubernetes namespace, and waits until all pods
# are ready.
#
#   deploy.sh          create what is missing, apply the rest, wait
#   deploy.sh undeploy remove it; the overrides and the certificate stay
#
# It creates two objects once and never changes them, because they belong to the
# user: the ConfigMap overwriting (the overrides) and the Secret nginx-tls
# (perhaps a real certificate). What routers have written into the ConfigMap
# router-handoff-backend stays at deploy, and goes at undeploy. Four backends and two
# routers are the numbers it begins with: later `kubectl scale` decides.
#
# TIMEOUT     seconds to wait for the pods (180)
# REGISTRY    where the nodes find the images (localhost:5000)
# TAG         of the images (that of bin/router and bin/backend)
# DEPLOY_WITH names of k8s/components that are added, such as "tls-in-router ipv6" (none)
set -euo pipefail

K8S=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CERTS=${K8S%/*}/certs
APPLIED=${K8S%/*}/bin/deploy # the kustomization that is applied
TIMEOUT=${TIMEOUT:-180}
REGISTRY=${REGISTRY:-localhost:5000}
DEPLOY_WITH=${DEPLOY_WITH:-}

say() { printf '%s\n' "deploy.sh: $*"; }
die() { say "$*" >&2; exit 1; }

# missing KIND NAME succeeds if the cluster has no such object. Any other failure
# ends the script: an API server that does not answer must not look like "none".
missing() {
  local found
  found=$(kubectl get "$1" "$2" --ignore-not-found -o name) || die "cannot ask the cluster for $1 $2"
  [ -z "$found" ]
}

# make_secret creates the Secret from certs/, where make.sh creates what is missing or
# expires soon.
make_secret() {
  "$CERTS/make.sh"
  kubectl create secret tls nginx-tls --cert="$CERTS/tls.crt" --key="$CERTS/tls.key"
}

# check_secret checks that certificate and key in the cluster fit. If they did not, nginx
# would start and every handshake would fail, and a router that terminates TLS would not start.
check_secret() {
  local cert key
  if ! command -v openssl >/dev/null; then
    say "openssl is not installed: not checked that certificate and key in secret/nginx-tls fit"
    return
  fi
  cert=$(secret 'tls\.crt' | openssl x509 -noout -pubkey) || die "tls.crt in secret/nginx-tls is no certificate"
  key=$(secret 'tls\.key' | openssl pkey -pubout -passin pass:) || die "tls.key in secret/nginx-tls is no key without a password"
  [ "$cert" = "$key" ] || die "tls.key in secret/nginx-tls is not the key of the certificate in tls.crt"
}

secret() { # key, with \ before its dots
  kubectl get secret nginx-tls -o "jsonpath={.data.$1}" | base64 -d
}

# make_tickets creates the secret from which all routers that terminate TLS themselves derive the
# keys of session tickets.
make_tickets() {
  head -c 48 /dev/urandom | kubectl create secret generic router-tickets --from-file=secret=/dev/stdin
}

# make_overwriting creates the ConfigMap. With --save-config a later `kubectl apply` of
# the user's own file knows what was there before.
make_overwriting() {
  kubectl create --save-config -f "$K8S/overwriting.yaml"
}

# make_kustomization writes what is applied: the demo with the components, and with images by
# their tag. That is another one if a program has changed, and only then the pods are
# replaced.
make_kustomization() {
  local tag programs component components=
  tag=$("$K8S/image.sh" tag) || die "the images have no tag: see above"
  for component in $DEPLOY_WITH; do
    [ -f "$K8S/components/$component/kustomization.yaml" ] || die "DEPLOY_WITH: there is no $K8S/components/$component"
    components+=${components:+, }../../k8s/components/$component
  done
  mkdir -p "$APPLIED"
  cat >"$APPLIED/kustomization.yaml" <<EOF
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../../k8s/demo]
components: [$components]
images:
  - {name: localhost:5000/router, newName: "$REGISTRY/router", newTag: "$tag"}
  - {name: localhost:5000/router-backend, newName: "$REGISTRY/router-backend", newTag: "$tag"}
EOF
  # A tag that somebody has chosen may be the same for other programs.
  if [ -n "${TAG:-}" ] && programs=$(TAG='' "$K8S/image.sh" tag 2>/dev/null); then
    cat >>"$APPLIED/kustomization.yaml" <<EOF
patches:
  - target: {kind: Deployment|StatefulSet}
    patch: |
      - {op: add, path: /spec/template/metadata/annotations, value: {router/programs: "$programs"}}
EOF
  fi
}

# policy VERB... runs kubectl with the admission policy. It fails if the user has no right
# to that, or if Kubernetes before 1.30 has no such kind. Any other failure ends the script.
policy() {
  local errors other
  { errors=$(kubectl kustomize "$K8S/base/policy" | kubectl "$@" -f - 2>&1 >&3) && return; } 3>&1
  printf '%s\n' "$errors" >&2
  other=$(grep -vE '\(Forbidden\)|no matches for kind' <<<"$errors" | grep -iE '^(error|unable|the connection)' || true)
  if [ -n "$other" ] || ! grep -qE '\(Forbidden\)|no matches for kind' <<<"$errors"; then
    die "kubectl $1 of the admission policy failed"
  fi
  return 1
}

# keep_replicas KIND NAME lets an apply not set back what the manifest of an earlier
# version has set. That had a number of replicas, which an apply would remove, and without
# one it is 1: `kubectl apply` compares with what was applied last, and with --server-side
# a field goes unless somebody else has it too.
keep_replicas() {
  local applied kind replicas
  applied=$(kubectl apply view-last-applied "$1/$2" -o json 2>/dev/null) || return 0
  grep -q '"replicas"' <<<"$applied" || return 0
  sed -E '/^ *"replicas": [0-9]+,?$/d' <<<"$applied" | kubectl apply set-last-applied -f - >/dev/null
  read -r kind replicas <<<"$(kubectl get "$1" "$2" -o 'jsonpath={.kind} {.spec.replicas}')"
  kubectl apply --server-side --force-conflicts --field-manager=replicas -f - >/dev/null \
    <<<'{"apiVersion":"apps/v1","kind":"'"$kind"'","metadata":{"name":"'"$2"'"},"spec":{"replicas":'"$replicas"'}}'
}

# start_with KIND NAME N sets the number of replicas of what deploy has just made.
start_with() { kubectl scale "$1/$2" --replicas="$3"; }

# wait_for KIND NAME waits for the rollout, or prints why it does not end.
wait_for() {
  kubectl rollout status "$1/$2" --timeout="${TIMEOUT}s" && return
  explain "$2" >&2
  die "$1/$2 is not ready after $TIMEOUT s: the reason is above"
}

# explain NAME prints pods, their latest warnings, and the end of the log of every
# container that is not ready.
explain() {
  local selector=app.kubernetes.io/name=$1 pod container
  printf '\n--- pods\n'
  kubectl get pods -l "$selector" -o wide || true
  printf '\n--- events\n'
  kubectl get events --field-selector type=Warning --sort-by=.lastTimestamp \
    -o 'custom-columns=OBJECT:.involvedObject.name,REASON:.reason,MESSAGE:.message' |
    grep -E "^(OBJECT|$1)" | tail -n 15 || true
  unready "$selector" | while read -r pod container; do
    printf '\n--- log of %s, container %s\n' "$pod" "$container"
    kubectl logs "$pod" -c "$container" --tail=20 </dev/null || true
    # If a container ended, the reason is in the log of its run before.
    kubectl logs "$pod" -c "$container" --tail=20 --previous </dev/null 2>/dev/null || true
  done
  printf '\n'
}

# unready SELECTOR prints "pod container" for every container that is not ready.
unready() {
  local fields='{range .items[*]}{.metadata.name}{range .status.initContainerStatuses[*]} {.name}={.ready}{end}{range .status.containerStatuses[*]} {.name}={.ready}{end}{"\n"}{end}'
  kubectl get pods -l "$1" -o "jsonpath=$fields" |
    awk '{ for (i = 2; i <= NF; i++) if (sub(/=false$/, "", $i)) print $1, $i }'
}

deploy() {
  command -v kubectl >/dev/null || die "kubectl is not installed"
  local context namespace
  context=$(kubectl config current-context) || die "the kubeconfig has no current context"
  namespace=$(kubectl config view --minify -o 'jsonpath={..namespace}')
  say "context \"$context\", Kubernetes namespace \"${namespace:-default}\""
  if missing secret nginx-tls; then make_secret; fi
  check_secret
  if missing configmap overwriting; then make_overwriting; fi
  make_kustomization
  if [[ " $DEPLOY_WITH " == *" tls-in-router "* ]] && missing secret router-tickets; then make_tickets; fi
  local new_backend=no new_router=no
  if missing statefulset backend; then new_backend=yes; else keep_replicas statefulset backend; fi
  if missing deployment router; then new_router=yes; else keep_replicas deployment router; fi
  kubectl apply -k "$APPLIED" -l "app.kubernetes.io/component!=policy"
  if [ $new_backend = yes ]; then start_with statefulset backend 4; fi
  if [ $new_router = yes ]; then start_with deployment router 2; fi
  if policy apply; then
    remove_old_policy || say "the policy of an earlier version was not removed"
  else
    say "going on without the admission policy: nothing refuses bad overrides at kubectl apply, routers report them"
  fi
  wait_for statefulset backend
  wait_for deployment router
}

# remove_old_policy removes the policy of earlier versions, which had one for each
# Kubernetes namespace.
remove_old_policy() {
  local namespace
  namespace=$(kubectl config view --minify -o 'jsonpath={..namespace}')
  kubectl delete --ignore-not-found \
    "validatingadmissionpolicybinding/overwriting.${namespace:-default}" \
    "validatingadmissionpolicy/overwriting.${namespace:-default}"
}

# nginx_configmaps prints the ConfigMaps of nginx, of earlier versions and of the component
# auth: their names have other hashes (of kustomize's alphabet). The label alone is not
# enough: ConfigMaps with overrides may have it too.
nginx_configmaps() {
  kubectl get configmap -l app.kubernetes.io/part-of=router -o name | { grep -E '^configmap/(nginx|page|auth)-[2456789bcdfghkmt]{10}$' || true; }
}

# remove_monitoring removes what the component monitoring has added, whether DEPLOY_WITH has
# it now or not. A cluster without the Prometheus operator has no such kinds.
remove_monitoring() {
  local kind
  kubectl delete configmap router-dashboard --ignore-not-found
  for kind in $(kubectl api-resources --api-group=monitoring.coreos.com -o name | grep -E '^(podmonitors|prometheusrules)\.'); do
    kubectl delete "$kind" router --ignore-not-found || say "$kind/router was not removed, if it was ever applied"
  done
}

# others_use_policy succeeds if a router of another Kubernetes namespace has the policy.
others_use_policy() {
  local own all
  own=$(kubectl get configmap router-policy --ignore-not-found -o 'jsonpath={.metadata.uid}') || die "cannot ask the cluster for configmap router-policy"
  all=$(kubectl get configmap -A --field-selector metadata.name=router-policy -o 'jsonpath={.items[*].metadata.uid}' 2>/dev/null) || return 0
  tr ' ' '\n' <<<"$all" | grep -qvE "^($own)?\$"
}

undeploy() {
  if others_use_policy; then
    say "the admission policy stays: routers of other Kubernetes namespaces may have it"
  else
    policy delete --ignore-not-found || say "the admission policy was not removed, if it was ever applied"
    remove_old_policy || true
  fi
  kubectl delete -k "$K8S/demo" -l "app.kubernetes.io/component!=policy" --ignore-not-found
  kubectl delete secret router-tickets --ignore-not-found
  local name
  for name in $(nginx_configmaps); do kubectl delete "$name"; done
  remove_monitoring
  say "kept: configmap/overwriting and secret/nginx-tls; to remove them too:"
  say "  kubectl delete configmap/overwriting secret/nginx-tls"
}

case ${1:-deploy} in
  deploy) deploy ;;
  undeploy) undeploy ;;
  *) sed -n '2,18s/^#\( \|$\)//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
