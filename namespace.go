package main

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxNameBytes is how many bytes a namespace has at most, and a key of a ConfigMap
// (https://kubernetes.io/docs/concepts/configuration/configmap/).
const maxNameBytes = 253

// expectedNamespace says what a namespace of a request must be, or "" if this one is
// valid. fromHost says that a host name has it.
func expectedNamespace(name string, fromHost bool) string {
	if fromHost {
		return expectedHostNamespace(name)
	}
	return expectedPathNamespace(name)
}

// expectedPathNamespace says what a namespace of a path or a query must be, once it is
// decoded, or "" if this one is valid.
func expectedPathNamespace(name string) string {
	if isPathNamespace(name) {
		return ""
	}
	return `a namespace of 1 to 253 bytes of UTF-8 without control characters, "/" and "\", ` +
		`other than "." and "..", also if it is decoded again and cut at a ";"`
}

// expectedHostNamespace says what a namespace of a host name must be, or "" if this one,
// in lower case, is valid.
func expectedHostNamespace(name string) string {
	if isHostNamespace(name) {
		return ""
	}
	return "a namespace of 1 to 63 characters of [-_a-z0-9], " +
		"the first label of a host name in lower case"
}

// isPathNamespace reports whether a path or a query can have the namespace, which is
// decoded.
//
// Some programs decode a path twice, and some end a segment at a semicolon. So a name is
// not valid either if that makes an empty segment of it, a dot segment, or more than one segment
// (RFC 3986 §3.3): a backend could read a path in it that is another namespace's.
func isPathNamespace[S string | []byte](name S) bool {
	if len(name) == 0 || len(name) > maxNameBytes {
		return false
	}
	for i := range len(name) {
		if !isKeyByte(name[i]) {
			return isValidEscapedNamespace(string(name))
		}
	}
	return string(name) != "." && string(name) != ".."
}

// isValidEscapedNamespace is isPathNamespace for a name that is not a key of a ConfigMap.
func isValidEscapedNamespace(name string) bool {
	if !utf8.ValidString(name) {
		return false
	}
	name = string(decodeAll(name))
	segment, _, _ := strings.Cut(name, ";")
	return segment != "" && segment != "." && segment != ".." && !strings.ContainsAny(name, `/\`) &&
		!strings.ContainsFunc(name, unicode.IsControl)
}

// isHostNamespace reports whether a host name can have the namespace as its first label.
// A label has 1 to 63 bytes (RFC 1035 §2.3.4) and no dot. It must be in lower case,
// since host names ignore case (RFC 4343). DNS allows an underscore (RFC 2181 §11), and
// browsers send it.
func isHostNamespace[S string | []byte](s S) bool {
	for i := 0; i < len(s); i++ {
		if !isHostNamespaceByte(s[i]) {
			return false
		}
	}
	return 1 <= len(s) && len(s) <= 63
}

func isHostNamespaceByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

// isKeyByte reports whether a key of a ConfigMap can have c.
func isKeyByte(c byte) bool {
	return isHostNamespaceByte(c) || 'A' <= c && c <= 'Z' || c == '.'
}

// keyEscape begins the escape of a byte in a key: _xC3 is the byte 0xC3.
const keyEscape = "_x"

// namespaceKey returns the key of a ConfigMap for the overrides of the namespace, and the
// name of its file in a directory. A key has [-._a-zA-Z0-9] only, and does not begin with
// two dots: the kubelet has files with such names where a ConfigMap is mounted. So these
// bytes of a namespace are escaped, as _x and two upper-case hexadecimal digits:
//
//   - each that a key cannot have: "my room" is my_x20room, "café" is caf_xC3_xA9;
//   - a _ that would begin an escape: "a_x20" is a_x5Fx20;
//   - a dot at the beginning, before another one: "..a" is _x2E.a.
//
// All others stand for themselves. So a namespace has one key. It may be longer than
// maxNameBytes: then there can be no override.
func namespaceKey(name string) string {
	var key []byte // of the part of name before done
	done := 0
	for i := range len(name) {
		c := name[i]
		if isKeyByte(c) && !(c == '_' && isEscape(name[i:], keyEscape)) &&
			!(i == 0 && strings.HasPrefix(name, "..")) {
			continue
		}
		key = append(key, name[done:i]...)
		key = fmt.Appendf(key, keyEscape+"%02X", c)
		done = i + 1
	}
	if done == 0 {
		return name
	}
	return string(append(key, name[done:]...))
}

// keyNamespace returns the namespace of a key of a ConfigMap. ok is false if the key is
// too long, or is not the one that namespaceKey gives to the namespace.
func keyNamespace(key []byte) (name []byte, ok bool) {
	if len(key) > maxNameBytes {
		return nil, false
	}
	plain := len(key) < 2 || key[0] != '.' || key[1] != '.'
	for i, c := range key {
		plain = plain && isKeyByte(c) && !(c == '_' && isEscape(key[i:], keyEscape))
	}
	if plain {
		return key, true
	}
	name = decodeEscapes(key, keyEscape)
	return name, namespaceKey(string(name)) == string(key)
}

// expectedKey says what the key of an override must be, or "" if this one is valid.
func expectedKey(key string, fromHost bool) string {
	name := string(decodeEscapes(key, keyEscape))
	if want := expectedNamespace(name, fromHost); want != "" {
		return want
	}
	switch right := namespaceKey(name); {
	case len(right) > maxNameBytes:
		return "a key of 1 to 253 characters"
	case right != key:
		return "the key " + right
	}
	return ""
}

// decodeEscapes returns s with each escape, the prefix and two hexadecimal digits,
// decoded once. All else stays as it is.
func decodeEscapes[S string | []byte](s S, prefix string) []byte {
	decoded := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		c := s[i]
		if isEscape(s[i:], prefix) {
			i += len(prefix)
			c = unhex(s[i])<<4 | unhex(s[i+1])
			i++
		}
		decoded = append(decoded, c)
	}
	return decoded
}

// decodeAll returns s with its percent escapes decoded, also those that this makes, until
// none is left. What is no escape stays, so all that some program could find in s, however
// often it decodes, is in the result. It takes time for each byte of s once.
func decodeAll(s string) []byte {
	decoded := make([]byte, 0, len(s))
	for i := range len(s) {
		decoded = append(decoded, s[i])
		for at := len(decoded) - len("%41"); at >= 0 && isEscape(decoded[at:], "%"); at -= 2 {
			decoded = append(decoded[:at], unhex(decoded[at+1])<<4|unhex(decoded[at+2]))
		}
	}
	return decoded
}

// isEscape reports whether s begins with the prefix and two hexadecimal digits. Those of
// a key are in upper case.
func isEscape[S string | []byte](s S, prefix string) bool {
	n := len(prefix)
	if len(s) < n+2 || string(s[:n]) != prefix {
		return false
	}
	for _, c := range []byte(s[n : n+2]) {
		isLower := 'a' <= c && c <= 'f' && prefix != keyEscape
		if !isLower && (c < 'A' || c > 'F') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// unhex returns the value of a hexadecimal digit.
func unhex(digit byte) byte {
	if digit <= '9' {
		return digit - '0'
	}
	return digit&0xF + 9 // A is 0x41, a is 0x61
}

// showNamespace returns the namespace, or what else a key may be, as people read it: in
// quotes, with escapes as in Go, if it has a space, a quote, or what cannot be seen.
func showNamespace(name string) string {
	needsQuotes := func(c rune) bool {
		return c == ' ' || c == '"' || c == utf8.RuneError || !unicode.IsPrint(c)
	}
	if strings.ContainsFunc(name, needsQuotes) {
		return strconv.Quote(name)
	}
	return name
}
