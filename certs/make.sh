#!/bin/sh
# Makes a root CA and a certificate for mydomain.com, *.mydomain.com, localhost,
# 127.0.0.1 and ::1, for demonstrations and tests. It needs openssl 1.1.1 or
# newer and nothing else.
#
#   certs/make.sh [-d DIR]          make what is missing or soon expires
#   certs/make.sh [-d DIR] renew    make a new certificate in any case
#
#   DIR defaults to the folder of this script. Files in it:
#   ca.crt  ca.key    the CA, 10 years; never overwritten, so that browsers
#                     that trust it do not have to import it again
#   tls.crt tls.key   the certificate and its key, 397 days (browsers reject
#                     more than 398); made again 30 days before it expires
#
# Keys have mode 0600 from the beginning. The script writes new files beside the old
# ones and renames them in the end, so a reader never sees half a file.
set -eu
umask 077

die() {
    echo "certs/make.sh: $*" >&2
    exit 1
}

usage() {
    echo "usage: certs/make.sh [-d DIR] [renew]" >&2
    exit 2
}

# new_key FILE makes a key of P-256: browsers and Go accept it, and signing is cheap.
new_key() {
    openssl ecparam -name prime256v1 -genkey -noout -out "$1"
}

# openssl_config prints a configuration, because openssl req needs one and the machine
# may have none. The CA can sign no other CA (pathlen). If somebody steals its key,
# clients trust it for these names only (nameConstraints).
openssl_config() {
    cat <<'END'
[req]
distinguished_name = dn
prompt = no
[dn]
CN = set by -subj
[ca]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
nameConstraints = critical, @names
subjectKeyIdentifier = hash
[names]
permitted;DNS.0 = mydomain.com
permitted;DNS.1 = localhost
permitted;IP.0 = 127.0.0.1/255.255.255.255
permitted;IP.1 = ::1/ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:mydomain.com, DNS:*.mydomain.com, DNS:localhost, IP:127.0.0.1, IP:::1
END
}

# make_ca renames the certificate last: without it the CA counts as absent.
make_ca() {
    new_key "$tmp/ca.key"
    openssl req -new -x509 -sha256 -days 3650 -key "$tmp/ca.key" -config "$tmp/openssl.cnf" \
        -extensions ca -subj "/O=router demo/CN=router demo CA $(date +%Y-%m-%d)" -out "$tmp/ca.crt"
    chmod 644 "$tmp/ca.crt"
    mv "$tmp/ca.key" "$dir/ca.key"
    mv "$tmp/ca.crt" "$dir/ca.crt"
    echo "made $dir/ca.crt (trust this one in the browser)"
}

# make_leaf uses a random serial number, so that no file has to store the last one.
make_leaf() {
    new_key "$tmp/tls.key"
    openssl req -new -sha256 -key "$tmp/tls.key" -config "$tmp/openssl.cnf" \
        -subj "/CN=mydomain.com" -out "$tmp/tls.csr"
    openssl x509 -req -sha256 -days 397 -in "$tmp/tls.csr" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" \
        -set_serial "0x$(openssl rand -hex 16 | sed 's/^./4/')" \
        -extfile "$tmp/openssl.cnf" -extensions leaf -out "$tmp/tls.crt" 2>"$tmp/log" ||
        die "sign: $(cat "$tmp/log")"
    chmod 644 "$tmp/tls.crt"
    mv "$tmp/tls.key" "$dir/tls.key"
    mv "$tmp/tls.crt" "$dir/tls.crt"
    echo "made $dir/tls.crt, valid until $(openssl x509 -in "$dir/tls.crt" -noout -enddate | cut -d= -f2)"
}

# leaf_is_good succeeds if the certificate exists with its key, is of this CA, and does
# not expire soon.
leaf_is_good() {
    [ -f "$dir/tls.crt" ] && [ -f "$dir/tls.key" ] &&
        openssl x509 -in "$dir/tls.crt" -noout -checkend $((30 * 86400)) >/dev/null &&
        openssl verify -CAfile "$dir/ca.crt" "$dir/tls.crt" >/dev/null 2>&1 &&
        [ "$(openssl x509 -in "$dir/tls.crt" -noout -pubkey)" = "$(openssl pkey -in "$dir/tls.key" -pubout)" ]
}

dir=$(dirname "$0")
while getopts d: flag; do
    case $flag in
        d) dir=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -le 1 ] || usage
[ "${1:-renew}" = renew ] || usage
command -v openssl >/dev/null || die "openssl is not installed"

mkdir -p "$dir"
tmp=$(mktemp -d "$dir/.make.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
openssl_config >"$tmp/openssl.cnf"

if [ ! -f "$dir/ca.crt" ]; then
    [ ! -f "$dir/ca.key" ] || die "$dir/ca.key is there without ca.crt: remove or complete it"
    make_ca
fi
if [ "${1:-}" = renew ] || ! leaf_is_good; then
    [ -f "$dir/ca.key" ] || die "$dir/ca.key is missing: nothing can be signed"
    make_leaf
else
    echo "$dir/tls.crt is good, nothing to do"
fi
