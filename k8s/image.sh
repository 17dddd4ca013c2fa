#!/usr/bin/env bash
# Builds the two images, the router's and the demo backend's, and pushes or loads them to
# where the cluster finds them: REGISTRY/router:TAG and REGISTRY/router-backend:TAG.
#
#   image.sh tag           prints TAG
#   image.sh build         builds both from the Dockerfile and the programs in bin/
#   image.sh push          pushes both to REGISTRY
#   image.sh load          loads both into the cluster of the current context
#   image.sh load IMAGE    loads another one
#
# REGISTRY           default localhost:5000
# TAG                default: 12 hex digits of the programs' checksum, so that a cluster
#                    that has the tag has these programs
# CONTAINER_ENGINE   docker, podman or buildah; default: the first that works
# CONTAINERD_SOCKET  for load: the socket of the containerd that the node uses
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REGISTRY=${REGISTRY:-localhost:5000}
TEST_CLUSTER_SOCKET=/var/lib/k8s-test-cluster/run/containerd.sock

say() { printf '%s\n' "image.sh: $*"; }
die() { say "$*" >&2; exit 1; }
usage() { sed -n '2,15s/^#\( \|$\)//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

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

# check_programs fails if bin/ does not have both programs, built for an empty image of Linux.
check_programs() {
  local f
  for f in bin/router bin/backend; do
    [ -x "$ROOT/$f" ] || die "$f is missing: run \"make build\" first"
    [ "$(head -c 4 "$ROOT/$f")" = $'\x7fELF' ] ||
      die "$f is not a program for Linux: build it with GOOS=linux"
    ! readelf -l "$ROOT/$f" 2>/dev/null | grep -q INTERP ||
      die "$f is not static and cannot run in an empty image: build it with CGO_ENABLED=0"
  done
}

# checksum prints the SHA-256 of its input; macOS has the other program.
checksum() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }

tag() {
  if [ "${TAG:-}" = latest ]; then die "TAG is \"latest\", which says nothing about the programs"; fi
  if [ -n "${TAG:-}" ]; then echo "$TAG"; return; fi
  check_programs
  cat "$ROOT/bin/router" "$ROOT/bin/backend" | checksum | cut -c1-12
}

# image NAME prints the whole name of an image.
image() {
  local t
  t=$(tag) && echo "$REGISTRY/$1:$t"
}

# go_says FIELD prints what the go command put into bin/router, or else "unknown".
go_says() {
  { go version -m "$ROOT/bin/router" 2>/dev/null || true; } |
    awk -v field="$1" '$1 == "mod" { said["version"] = $3 }
      $1 == "build" && sub(/^vcs.revision=/, "", $2) { said["revision"] = $2 }
      END { print said[field] ? said[field] : "unknown" }'
}

build() {
  local e name ref arguments
  e=$(engine)
  check_programs
  for name in router router-backend; do
    ref=$(image "$name")
    arguments=(-q --target "${name#router-}" --build-context "programs=$ROOT/bin"
      --build-arg "VERSION=$(go_says version)" --build-arg "REVISION=$(go_says revision)"
      -t "$ref" "$ROOT")
    say "building $ref with $e"
    case $e in
      docker | podman) "$e" build "${arguments[@]}" ;;
      buildah) buildah_ bud --isolation chroot "${arguments[@]}" ;;
    esac
  done
}

push() {
  local e name ref plain=()
  e=$(engine)
  case $REGISTRY in
    # A registry on this machine uses HTTP. docker assumes that by itself.
    localhost | localhost[:/]* | 127.*) plain=(--tls-verify=false) ;;
  esac
  for name in router router-backend; do
    ref=$(image "$name")
    say "pushing $ref with $e"
    case $e in
      docker) docker push "$ref" ;;
      podman) podman push ${plain[@]+"${plain[@]}"} "$ref" ;;
      buildah) buildah_ push ${plain[@]+"${plain[@]}"} "$ref" "docker://$ref" ;;
    esac || die "push of $ref: see above; was it built (\"make image\"), does the registry answer?"
  done
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

load() { # image...
  local context ref
  context=$(kubectl config current-context) || die "the kubeconfig has no current context"
  tmp=$(mktemp -d)
  trap 'rm -rf "$tmp"' EXIT
  for ref; do
    archive "$ref" "$tmp/image.tar"
    say "loading $ref into the cluster of context \"$context\""
    load_archive "$context" "$tmp/image.tar"
    rm "$tmp/image.tar" # podman adds to a file that is there
  done
}

load_archive() { # context file
  local socket
  case $1 in
    kind-*) kind load image-archive --name "${1#kind-}" "$2" ;;
    minikube) minikube image load "$2" ;;
    *)
      if on_k3s; then
        k3s ctr images import "$2"
      elif socket=$(containerd_socket); then
        ctr --address "$socket" -n k8s.io images import "$2"
      else
        [ -z "${CONTAINERD_SOCKET:-}" ] || exit 1
        die "no way is known into the cluster of context \"$1\" (known: kind-*, minikube, k3s, a containerd named by CONTAINERD_SOCKET); push the images to a registry that its nodes can reach: make push REGISTRY=..."
      fi
      ;;
  esac
}

case $#${1:-} in
  1tag) tag ;;
  1build) build ;;
  1push) push ;;
  1load)
    router=$(image router)
    load "$router" "$(image router-backend)"
    ;;
  2load) load "$2" ;;
  *) usage ;;
esac
