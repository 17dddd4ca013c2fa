#!/usr/bin/env bash
# Builds the image, and pushes or loads it to where the cluster finds it.
#
#   image.sh build IMAGE            from the Dockerfile and bin/
#   image.sh push IMAGE REGISTRY    as REGISTRY/<last part of IMAGE>
#   image.sh load IMAGE             into the cluster of the current context
#
# CONTAINER_ENGINE   docker, podman or buildah; default: the first that works
# CONTAINERD_SOCKET  for load: the socket of the containerd that the node uses
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TEST_CLUSTER_SOCKET=/var/lib/k8s-test-cluster/run/containerd.sock

say() { printf '%s\n' "image.sh: $*"; }
die() { say "$*" >&2; exit 1; }
usage() { sed -n '2,9s/^#\( \|$\)//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

# works ENGINE succeeds if it is installed and its daemon, if it has one, answers.
works() {
  case $1 in
    docker) docker info >/dev/null 2>&1 ;;
    podman) podman info >/dev/null 2>&1 ;;
    buildah) command -v buildah >/dev/null ;;
    *) die "CONTAINER_ENGINE is \"$1\": want docker, podman or buildah" ;;
  esac
}

# engine prints the name of the program that builds. build, push and load have to use
# the same one, because each stores its images in a place of its own.
engine() {
  local e
  if [ -n "${CONTAINER_ENGINE:-}" ]; then
    works "$CONTAINER_ENGINE" || die "CONTAINER_ENGINE is \"$CONTAINER_ENGINE\", which is not installed or whose daemon does not answer"
    echo "$CONTAINER_ENGINE"
    return
  fi
  for e in docker podman buildah; do
    if works "$e"; then echo "$e"; return; fi
  done
  die "docker (with its daemon running), podman or buildah is needed, and none was found"
}

# buildah_ runs buildah with the storage driver that works in every container and on
# every file system.
buildah_() { buildah --storage-driver vfs "$@"; }

build() { # image
  local e f
  e=$(engine)
  for f in bin/router bin/backend; do
    [ -x "$ROOT/$f" ] || die "$f is missing: run \"make build\" first"
    ! readelf -l "$ROOT/$f" 2>/dev/null | grep -q INTERP ||
      die "$f is not static and cannot run in an empty image: build it with CGO_ENABLED=0"
  done
  say "building $1 with $e"
  case $e in
    docker | podman) "$e" build -q --build-arg "VERSION=${VERSION:-dev}" -t "$1" "$ROOT" ;;
    buildah) buildah_ bud -q --isolation chroot --build-arg "VERSION=${VERSION:-dev}" -t "$1" "$ROOT" ;;
  esac
}

push() { # image registry
  local e ref plain=()
  e=$(engine)
  ref=$2/${1##*/}
  case $2 in
    # A registry on this machine uses HTTP. docker assumes that by itself.
    localhost | localhost[:/]* | 127.*) plain=(--tls-verify=false) ;;
  esac
  say "pushing $ref with $e"
  case $e in
    docker) docker tag "$1" "$ref" && docker push "$ref" ;;
    podman) podman push "${plain[@]}" "$1" "docker://$ref" ;;
    buildah) buildah_ push "${plain[@]}" "$1" "docker://$ref" ;;
  esac || die "push of $1 to $2: see above; was it built (\"make image\"), does the registry answer?"
  [ "$ref" = "$1" ] ||
    say "the manifests use $1; in k8s run: kustomize edit set image ${1%:*}=$ref"
}

# archive IMAGE FILE writes the image with its name, as `docker save` does.
archive() {
  case $(engine) in
    docker) docker save -o "$2" "$1" ;;
    podman) podman save -q --format docker-archive -o "$2" "$1" ;;
    buildah) buildah_ push -q "$1" "docker-archive:$2:$1" ;;
  esac || die "$1 is not here: run \"make image\" first"
}

# containerd_socket prints the socket to import into, and fails if none is known.
containerd_socket() {
  if [ -n "${CONTAINERD_SOCKET:-}" ]; then
    [ -S "$CONTAINERD_SOCKET" ] || die "CONTAINERD_SOCKET is \"$CONTAINERD_SOCKET\", which is not a socket"
    echo "$CONTAINERD_SOCKET"
  elif [ -S "$TEST_CLUSTER_SOCKET" ]; then
    echo "$TEST_CLUSTER_SOCKET"
  else
    return 1
  fi
}

# on_k3s succeeds if the cluster is k3s and runs on this machine.
on_k3s() {
  command -v k3s >/dev/null &&
    kubectl get nodes -o 'jsonpath={.items[*].status.nodeInfo.kubeletVersion}' | grep -q '+k3s'
}

load() { # image
  local context socket
  context=$(kubectl config current-context) || die "the kubeconfig has no current context"
  tmp=$(mktemp -d)
  trap 'rm -rf "$tmp"' EXIT
  archive "$1" "$tmp/image.tar"
  say "loading $1 into the cluster of context \"$context\""
  case $context in
    kind-*) kind load image-archive --name "${context#kind-}" "$tmp/image.tar" ;;
    minikube) minikube image load "$tmp/image.tar" ;;
    *)
      if on_k3s; then
        k3s ctr images import "$tmp/image.tar"
      elif socket=$(containerd_socket); then
        ctr --address "$socket" -n k8s.io images import "$tmp/image.tar"
      else
        [ -z "${CONTAINERD_SOCKET:-}" ] || exit 1
        die "no way is known into the cluster of context \"$context\" (known: kind-*, minikube, k3s, a containerd named by CONTAINERD_SOCKET); push the image to a registry that its nodes can reach: make push REGISTRY=..."
      fi
      ;;
  esac
}

case ${1:-} in
  build) [ $# = 2 ] || usage; build "$2" ;;
  push) [ $# = 3 ] || usage; push "$2" "$3" ;;
  load) [ $# = 2 ] || usage; load "$2" ;;
  *) usage ;;
esac
