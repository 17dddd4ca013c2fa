#!/usr/bin/env bash
# usage: image.sh IMAGE   builds an image of server.js with buildah: this machine's node
# with its libraries, what "npm ci" has installed here, and the server of SignalR
set -euo pipefail

APPS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

node=$(readlink -f "$(command -v node)")
mkdir -p "$dir/root/bin" "$dir/root/app"
cp "$node" "$dir/root/bin/node"
ldd "$node" | grep -o '/[^ ]*' | while read -r library; do
  mkdir -p "$dir/root$(dirname "$library")"
  cp -L "$library" "$dir/root$library"
done
(cd "$APPS" && CGO_ENABLED=0 go build -o "$dir/root/bin/signalr" ./signalr)
cp -r "$APPS/server.js" "$APPS/package.json" "$APPS/node_modules" "$dir/root/app"
printf 'FROM scratch\nCOPY root /\nENV SIGNALR=/bin/signalr\nENTRYPOINT ["/bin/node", "/app/server.js"]\n' >"$dir/Dockerfile"
buildah --storage-driver vfs bud -q --isolation chroot -t "$1" "$dir"
