package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// trustedProxies is a flag with the addresses of peers that are believed when they say who
// their client is, by the PROXY protocol or in header fields: addresses and prefixes
// (CIDR), and "unix" for the peers of a Unix socket, with commas in between.
// It may be repeated: each adds to the list. It is safe for concurrent use once it is set.
type trustedProxies struct {
	prefixes []netip.Prefix
	unix     bool
}

func (p *trustedProxies) String() string {
	var names []string
	if p.unix {
		names = append(names, "unix")
	}
	for _, prefix := range p.prefixes {
		names = append(names, prefix.String())
	}
	return strings.Join(names, ",")
}

// Set adds the addresses in list. It returns an error for one that is none, and for a
// prefix with bits beyond its length, which is probably a mistake.
func (p *trustedProxies) Set(list string) error {
	for _, name := range splitList(list) {
		if name == "unix" {
			p.unix = true
			continue
		}
		prefix, err := netip.ParsePrefix(name)
		if addr, invalid := netip.ParseAddr(name); invalid == nil && addr.Zone() == "" {
			prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		switch {
		case err != nil:
			return fmt.Errorf("%q is no address, no CIDR and not unix", name)
		case prefix.Addr().Is4In6():
			return fmt.Errorf("%q must be written as IPv4", name)
		case prefix != prefix.Masked():
			return fmt.Errorf("%q has bits beyond its length: it would be %s", name, prefix.Masked())
		}
		p.prefixes = append(p.prefixes, prefix)
	}
	return nil
}

// contains reports whether a peer with this address, host:port or none for a Unix socket,
// is trusted. A nil p trusts nobody.
func (p *trustedProxies) contains(peer string) bool {
	if p == nil {
		return false
	}
	addr, err := netip.ParseAddrPort(peer)
	if err != nil {
		return p.unix
	}
	ip := addr.Addr().WithZone("").Unmap()
	return slices.ContainsFunc(p.prefixes, func(prefix netip.Prefix) bool { return prefix.Contains(ip) })
}

// How long a header of the PROXY protocol may be, in bytes. Version 2 would allow 64 KiB
// of optional fields (TLVs); what load balancers send has a few hundred bytes.
const (
	maxProxyLine   = 107 // of version 1 (§2.1)
	maxProxyHeader = 4 << 10
)

// proxySignature is how a header of version 2 begins (§2.2).
const proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

// errNoProxyHeader says that a connection does not begin with a valid header.
var errNoProxyHeader = errors.New("the connection begins with no valid header of the PROXY protocol")

// parseProxyHeader parses the header of the PROXY protocol, version 1 or 2, at the
// beginning of data (https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt). It
// returns the client's address, which is not valid if the header has none (LOCAL, UNKNOWN
// and UNSPEC, a Unix socket): then it is the peer's. size is the length of the header, 0
// if it is not whole yet. It returns errNoProxyHeader, and no size, for what is no such
// header.
func parseProxyHeader(data []byte) (client netip.AddrPort, size int, err error) {
	switch {
	case bytes.HasPrefix(data, []byte(proxySignature)):
		return parseProxyBinary(data)
	case strings.HasPrefix(proxySignature, string(data[:min(len(data), len(proxySignature))])):
		return client, 0, nil
	}
	line, _, whole := bytes.Cut(data[:min(len(data), maxProxyLine)], []byte("\r\n"))
	switch begin := "PROXY "; {
	case !strings.HasPrefix(begin, string(line[:min(len(line), len(begin))])),
		!whole && len(data) >= maxProxyLine:
		return client, 0, errNoProxyHeader
	case !whole:
		return client, 0, nil
	}
	if client, err = parseProxyLine(string(line)); err != nil {
		return client, 0, err
	}
	return client, len(line) + len("\r\n"), nil
}

// parseProxyLine parses a header of version 1 without its end (§2.1).
func parseProxyLine(line string) (client netip.AddrPort, err error) {
	fields := strings.Split(line, " ")
	if len(fields) > 1 && fields[1] == "UNKNOWN" { // what follows is to be ignored
		return client, nil
	}
	if len(fields) != 6 || fields[1] != "TCP4" && fields[1] != "TCP6" {
		return client, errNoProxyHeader
	}
	var ends [2]netip.AddrPort // source and destination
	for i := range ends {
		addr, err := netip.ParseAddr(fields[2+i])
		port, ok := parseDecimal(fields[4+i], 16)
		if err != nil || !ok || addr.Zone() != "" || addr.Is4() != (fields[1] == "TCP4") {
			return client, errNoProxyHeader
		}
		ends[i] = netip.AddrPortFrom(addr.Unmap(), uint16(port))
	}
	return ends[0], nil
}

// parseProxyBinary parses a header of version 2, which begins with the signature (§2.2).
// The version and the command, the family and the protocol, and the length of the rest
// follow that: the addresses, and optional fields, which are skipped.
func parseProxyBinary(data []byte) (client netip.AddrPort, size int, err error) {
	const fixed = len(proxySignature) + 4
	if len(data) < fixed {
		return client, 0, nil
	}
	command, family := data[fixed-4], data[fixed-3]
	size = fixed + int(binary.BigEndian.Uint16(data[fixed-2:]))
	const local, proxied = 0x20, 0x21
	lengths := map[byte]int{0x00: 0, 0x11: 12, 0x21: 36, 0x31: 216} // UNSPEC, TCP4, TCP6, Unix
	length, known := lengths[family]
	switch {
	case size > maxProxyHeader, command != local && command != proxied,
		command == proxied && (!known || size-fixed < length):
		return client, 0, errNoProxyHeader
	case len(data) < size:
		return client, 0, nil
	case command == local: // the proxy itself, such as its check; family counts for nothing
		return client, size, nil
	}
	rest := data[fixed:size]
	switch family {
	case 0x11:
		ip, _ := netip.AddrFromSlice(rest[:4])
		client = netip.AddrPortFrom(ip, binary.BigEndian.Uint16(rest[8:]))
	case 0x21:
		ip, _ := netip.AddrFromSlice(rest[:16])
		client = netip.AddrPortFrom(ip.Unmap(), binary.BigEndian.Uint16(rest[32:]))
	}
	return client, size, nil
}

// proxyProtocol is what a client listener does about the PROXY protocol. Nil does nothing.
type proxyProtocol struct {
	trusted     *trustedProxies
	log         *slog.Logger
	logThrottle throttle
}

// expects reports whether a connection from the peer has to begin with a header.
func (p *proxyProtocol) expects(peer string) bool {
	return p != nil && p.trusted.contains(peer)
}

// read reads the header at the beginning of a connection. data is what was read of it
// before, and more reads what comes next. It returns what follows the header, and the
// client's address, nil if the header has none. If there is an error, rest is all that was
// read. It holds maxProxyHeader at most, and what the last call of more has returned.
func (p *proxyProtocol) read(
	data []byte, more func() ([]byte, error),
) (client net.Addr, rest []byte, err error) {
	for {
		addr, size, err := parseProxyHeader(data)
		switch {
		case err != nil:
			return nil, data, err
		case size > 0 && addr.IsValid():
			return net.TCPAddrFromAddrPort(addr), data[size:], nil
		case size > 0:
			return nil, data[size:], nil
		}
		next, err := more()
		if err != nil {
			return nil, data, err
		}
		data = append(data, next...)
	}
}

// logInvalid logs that a trusted peer has sent no header: it is not set up to, or it is
// not a proxy.
func (p *proxyProtocol) logInvalid(peer string) {
	if omitted, ok := p.logThrottle.allow(time.Second); ok {
		p.log.Warn("no PROXY protocol from a trusted proxy", "peer", peer, "omitted", omitted)
	}
}
