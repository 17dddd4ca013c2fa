#!/bin/bash
# e2e/tlsfuzz.sh DIRECTORY [SCRIPT...]: runs tlsfuzzer's tests of TLS servers against the router,
# bin/router, and against a server of net/http. crypto/tls answers some otherwise than the tests
# want; no conversation may fail at the router alone. DIRECTORY has a checkout of
# https://github.com/tlsfuzzer/tlsfuzzer whose Python, PYTHON, finds tlslite-ng and ecdsa. Without
# scripts it runs those below: they fit a server of TLS 1.2 and 1.3 without static RSA,
# finite-field Diffie-Hellman, client certificates and renegotiation. Of each it takes
# CONVERSATIONS, the same for both. The logs are in OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
tlsfuzzer=$(realpath "${1:?usage: e2e/tlsfuzz.sh DIRECTORY [SCRIPT...]}")
shift
python=${PYTHON:-python3} router=${ROUTER:-bin/router} out=$(realpath -m "${OUT:-bin/tlsfuzz}")

# With -d and --extra-exts, a script of TLS 1.2 uses ECDHE in place of static RSA.
tls13="0rtt-garbage ccs connection-abort conversation crfg-curves ecdhe-curves empty-alert finished
  finished-plaintext hrr invalid-ciphers keyshare-omitted keyupdate legacy-version
  multiple-ccs-messages nociphers no-unknown-groups obsolete-curves pkcs-signature psk_dhe_ke psk_ke
  record-layer-limits record-padding serverhello-random session-resumption shuffled-extentions
  symetric-ciphers unencrypted-alert unrecognised-groups version-negotiation zero-content-type zero-length-data"
tls12="aes-gcm-nonces ccs chacha20 client-hello-max-size clienthello-md5 connection-abort conversation
  cve-2016-6309 cve-2016-7054 downgrade-protection early-application-data ecdhe-padded-shared-secret
  ecdhe-rsa-key-exchange ecdhe-rsa-key-exchange-with-bad-messages ecdhe-rsa-key-share-random empty-extensions
  export-ciphers-rejected extended-master-secret-extension fallback-scsv fuzzed-ciphertext fuzzed-finished
  hello-request-by-client interleaved-CKE-with-CCS invalid-cipher-suites invalid-client-hello
  invalid-client-hello-w-record-overflow invalid-compression-methods invalid-content-type
  invalid-server-name-extension invalid-session-id invalid-version large-hello large-number-of-extensions
  message-duplication message-skipping no-heartbeat point-extension record-layer-fragmentation
  renegotiation-disabled serverhello-random session-ticket-resumption ssl-death-alert sslv2-connection
  sslv2hello-protocol truncating-of-client-hello truncating-of-finished unsupported-curve-fallback
  version-numbers x25519 zero-length-data"
if [ $# -eq 0 ]; then
  for name in $tls13; do set -- "$@" "test-tls13-$name.py"; done
  for name in $tls12; do set -- "$@" "test-$name.py"; done
fi

mkdir -p "$out"
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
  -keyout "$out/tls.key" -out "$out/tls.crt" 2>/dev/null
(cd e2e && go build -o "$out/plaintls" ./plaintls)
"$router" -kube none -backends 127.0.0.1:9 -listen 127.0.0.1:0 -admin 127.0.0.1:0 -log-format json -pod-name tlsfuzz \
  -tls-cert "$out/tls.crt" -tls-key "$out/tls.key" -drain-duration 0 >"$out/router.log" &
servers=$!
"$out/plaintls" "$out/tls.crt" "$out/tls.key" >"$out/plaintls.log" 2>"$out/plaintls.errors" &
servers="$servers $!"
trap 'kill $servers; wait' EXIT

# port SERVER prints where it listens.
port() {
  local found=
  while [ -z "$found" ]; do
    found=$(sed -n 's/.*"msg":"serving".*"listen":"127.0.0.1:\([0-9]*\)".*/\1/p' "$out/$1.log")
    sleep .1
  done
  echo "$found"
}

# converse SERVER SCRIPT ARGUMENT... prints the conversations that fail.
converse() {
  local server=$1 log="$out/$2.$1.log"
  shift
  local seeded='import random, runpy, sys; random.seed(1); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
  (cd "$tlsfuzzer" && PYTHONPATH=. timeout 600 "$python" -c "$seeded" "scripts/$1" -h localhost -p "$(port "$server")" \
    -n "${CONVERSATIONS:-30}" "${@:2}") >"$log" 2>&1 || true
  if ! grep -q '^TOTAL: ' "$log"; then
    echo "no result: $server"
  fi
  sed -n "/^FAILED:/,\$p" "$log" | sort -u
}

# takes OPTION SCRIPT reports whether the script knows the option.
takes() {
  (cd "$tlsfuzzer" && PYTHONPATH=. "$python" "scripts/$2" --help) | grep -- "^ *$1 " >/dev/null
}

worse=0
for script; do
  arguments=()
  for option in -d --extra-exts; do
    if ! [[ $script == test-tls13-* ]] && takes "$option" "$script"; then
      arguments+=("$option")
    fi
  done
  converse router "$script" "${arguments[@]}" >"$out/router.failed"
  converse plaintls "$script" "${arguments[@]}" >"$out/plaintls.failed"
  total=$(sed -n 's/^TOTAL: //p' "$out/$script.router.log") failed=$(grep -c "^[[:space:]]*'" "$out/router.failed" || true)
  comm -13 "$out/plaintls.failed" "$out/router.failed" >"$out/$script.more"
  if ! [ -s "$out/$script.more" ]; then
    echo "good  $script: $total conversations, $failed fail at both"
  else
    worse=1
    echo "WORSE $script: $total conversations; these fail at the router alone:"
    cat "$out/$script.more"
  fi
done
exit $worse
