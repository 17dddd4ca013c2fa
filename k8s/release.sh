#!/usr/bin/env bash
# Makes what a release consists of, in dist/, from a commit. Two runs make the same bytes,
# with the same version of Go. The version is that of the commit's tag, v1.2.3, or without
# one that which the go command makes of the commit.
#
#   release.sh programs      both programs for each platform, and archives of them
#   release.sh images        pushes both images for all platforms (docker buildx), with SBOM
#                            and provenance; writes their digests to dist/images
#   release.sh files         install.yaml with the router's image, by its digest if images
#                            has pushed it; notes.md from CHANGELOG.md; SHA256SUMS
#
# REGISTRY   where the images are (localhost:5000)
# SOURCE     for images: the URL of the repository, for their labels
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DIST=$ROOT/dist
REGISTRY=${REGISTRY:-localhost:5000}
ARCHITECTURES=(amd64 arm64)

die() { printf '%s\n' "release.sh: $*" >&2; exit 1; }

# version prints the version that the go command has put into the programs.
version() {
  go version -m "$DIST/linux-amd64/router" | awk '$1 == "mod" { print $3 }'
}

# programs builds both programs. The go command knows no version without git, and none in
# a worktree of it.
programs() {
  local arch dir name
  rm -rf "$DIST"
  for arch in "${ARCHITECTURES[@]}"; do
    dir=$DIST/linux-$arch
    mkdir -p "$dir"
    (cd "$ROOT" && GOFLAGS='' CGO_ENABLED=0 GOOS=linux GOARCH=$arch GOAMD64=v1 GOARM64=v8.0 \
      go build -buildvcs=true -trimpath -ldflags '-s -w' -o "$dir/" . ./backend)
    cp "$ROOT/LICENSE" "$dir"
  done
  [[ $(version) = v* ]] || die "the go command knows no version: this is not a clone of the repository"
  for arch in "${ARCHITECTURES[@]}"; do
    name=router_$(version)_linux_$arch
    tar --create --directory "$DIST/linux-$arch" --transform "s,^,$name/," \
      --sort=name --owner=0 --group=0 --numeric-owner --mode='u=rwX,go=rX' \
      --mtime="@$(git -C "$ROOT" log -1 --format=%ct)" backend LICENSE router |
      gzip -n >"$DIST/$name.tar.gz"
  done
}

# tag prints the tag of the images: what a version may have and a tag may not is replaced.
tag() { version | tr + -; }

# images pushes one image for each platform, as a named context is the same for all, and
# then an index of them.
images() {
  local name ref arch digests
  : >"$DIST/images"
  for name in router router-backend; do
    ref=$REGISTRY/$name
    digests=()
    for arch in "${ARCHITECTURES[@]}"; do
      docker buildx build --platform "linux/$arch" --target "${name#router-}" \
        --build-context "programs=$DIST/linux-$arch" --sbom=true --provenance=mode=max \
        --build-arg "VERSION=$(version)" --build-arg "REVISION=$(git -C "$ROOT" rev-parse HEAD)" \
        ${SOURCE:+--label "org.opencontainers.image.source=$SOURCE"} \
        --output "type=image,name=$ref,push-by-digest=true,name-canonical=true,push=true" \
        --metadata-file "$DIST/metadata" "$ROOT"
      digests+=("$ref@$(jq -r '."containerimage.digest"' "$DIST/metadata")")
    done
    docker buildx imagetools create --tag "$ref:$(tag)" "${digests[@]}"
    echo "$ref:$(tag)@$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$ref:$(tag)")" >>"$DIST/images"
  done
  rm "$DIST/metadata"
}

# install prints k8s/base with the image, NAME:TAG or NAME:TAG@DIGEST.
install() { # image
  local digest=''
  if [ "$1" != "${1%@*}" ]; then digest=", digest: ${1#*@}"; fi
  local named=${1%@*}
  mkdir -p "$DIST/install"
  cat >"$DIST/install/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../../k8s/base]
images:
  - {name: localhost:5000/router, newName: ${named%:*}, newTag: ${named##*:}$digest}
END
  kubectl kustomize "$DIST/install"
  rm -r "$DIST/install"
}

# notes writes what CHANGELOG.md says of a version: of a tag its own section, which begins
# with "## v1.2.3", and of a commit without a tag "## Unreleased".
notes() { # version
  local heading="## $1"
  if [[ $1 =~ [-.][0-9]{14}-[0-9a-f]{12} ]]; then heading='## Unreleased'; fi
  awk -v heading="$heading" '
    /^## / { inside = $0 == heading || index($0, heading ",") == 1 || index($0, heading " ") == 1; next }
    inside' "$ROOT/CHANGELOG.md" >"$DIST/notes.md"
  grep -q . "$DIST/notes.md" || die "CHANGELOG.md has nothing below \"$heading\""
  if [ -s "$DIST/images" ]; then
    { printf '\nImages:\n\n' && sed 's/^/    /' "$DIST/images"; } >>"$DIST/notes.md"
  fi
}

files() {
  local image
  image=$REGISTRY/router:$(tag)
  if [ -s "$DIST/images" ]; then image=$(head -n 1 "$DIST/images"); fi
  install "$image" >"$DIST/install.yaml"
  if grep -E 'image: .*(:dev|:latest)$' "$DIST/install.yaml"; then die "install.yaml has an image without a version"; fi
  notes "$(version)"
  (cd "$DIST" && sha256sum -- *.tar.gz install.yaml >SHA256SUMS)
}

case $#${1:-} in
  1programs | 1images | 1files) "$1" ;;
  *) sed -n '2,15s/^#\( \|$\)//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
