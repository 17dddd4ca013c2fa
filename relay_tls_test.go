package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Types of records (RFC 8446 §5.1), alerts (§6), and a handshake message (§4).
const (
	recordAlert       = 21
	recordHandshake   = 22
	recordData        = 23
	alertCloseNotify  = 0
	alertUnexpected   = 10
	alertBadRecordMAC = 20
	alertOverflow     = 22
	alertVersion      = 70
	messageKeyUpdate  = 24
)

// recordKeys protect the records of one direction, with AES-128-GCM and SHA-256.
type recordKeys struct {
	secret []byte // of TLS 1.3; nil for TLS 1.2
	aead   cipher.AEAD
	iv     []byte
	next   uint64 // number of the next record
}

func newRecordKeys(t testing.TB, key, iv []byte) *recordKeys {
	t.Helper()
	block, err := aes.NewCipher(key)
	must(t, err)
	aead, err := cipher.NewGCM(block)
	must(t, err)
	return &recordKeys{aead: aead, iv: iv}
}

// keysOf returns the keys that come from a secret (RFC 8446 §7.3).
func keysOf(t testing.TB, secret []byte) *recordKeys {
	t.Helper()
	k := newRecordKeys(t, expandLabel(t, secret, "key", 16), expandLabel(t, secret, "iv", 12))
	k.secret = secret
	return k
}

// expandLabel is HKDF-Expand-Label (RFC 8446 §7.1) without a context.
func expandLabel(t testing.TB, secret []byte, label string, size int) []byte {
	t.Helper()
	info := fmt.Sprintf("%c%c%ctls13 %s%c", size>>8, size, 6+len(label), label, 0)
	out, err := hkdf.Expand(sha256.New, secret, info, size)
	must(t, err)
	return out
}

// update replaces the keys by the next ones (RFC 8446 §7.2).
func (k *recordKeys) update(t testing.TB) {
	t.Helper()
	*k = *keysOf(t, expandLabel(t, k.secret, "traffic upd", 32))
}

// seal returns a record. pad is how many bytes of padding it has, which TLS 1.2 does not know.
func (k *recordKeys) seal(kind byte, data []byte, pad int) []byte {
	number := binary.BigEndian.AppendUint64(nil, k.next)
	k.next++
	header := func(kind byte, size int) []byte { return []byte{kind, 3, 3, byte(size >> 8), byte(size)} }
	if k.secret == nil {
		aad := append(slices.Clone(number), header(kind, len(data))...)
		sealed := k.aead.Seal(slices.Clone(number), slices.Concat(k.iv, number), data, aad)
		return append(header(kind, len(sealed)), sealed...)
	}
	inner := slices.Concat(data, []byte{kind}, make([]byte, pad))
	head := header(recordData, len(inner)+k.aead.Overhead())
	return k.aead.Seal(head, k.nonce(number), inner, head)
}

func (k *recordKeys) nonce(number []byte) []byte {
	nonce := slices.Clone(k.iv)
	for i, b := range number {
		nonce[4+i] ^= b
	}
	return nonce
}

// open returns the type and the content of a record.
func (k *recordKeys) open(head, body []byte) (kind byte, data []byte, err error) {
	number := binary.BigEndian.AppendUint64(nil, k.next)
	k.next++
	if k.secret == nil {
		if len(body) < 24 {
			return 0, nil, fmt.Errorf("a record of %d bytes", len(body))
		}
		aad := slices.Concat(number, head[:3], []byte{byte((len(body) - 24) >> 8), byte(len(body) - 24)})
		data, err = k.aead.Open(nil, slices.Concat(k.iv, body[:8]), body[8:], aad)
		return head[0], data, err
	}
	inner, err := k.aead.Open(nil, k.nonce(number), body, head)
	if inner = bytes.TrimRight(inner, "\x00"); err != nil || len(inner) == 0 {
		return 0, nil, cmp.Or(err, errors.New("a record without a type"))
	}
	return inner[len(inner)-1], inner[:len(inner)-1], nil
}

// recordClient is a client with TLS that makes its records by itself after the handshake: so it
// can send what crypto/tls does not.
type recordClient struct {
	*net.TCPConn
	out, in *recordKeys
}

// recordedConn keeps what comes.
type recordedConn struct {
	net.Conn
	received []byte
}

func (c *recordedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.received = append(c.received, b[:n]...)
	return n, err
}

// newRecordClient does the handshake of a client over conn. The server is to send no tickets.
func newRecordClient(t testing.TB, conn *net.TCPConn, version uint16) *recordClient {
	t.Helper()
	var log bytes.Buffer
	recorded := &recordedConn{Conn: conn}
	client := tls.Client(recorded, &tls.Config{InsecureSkipVerify: true, MinVersion: version, MaxVersion: version,
		CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}, KeyLogWriter: &log})
	must(t, client.Handshake())
	if suite := client.ConnectionState().CipherSuite; version == tls.VersionTLS13 && suite != tls.TLS_AES_128_GCM_SHA256 {
		t.Skip("without AES in hardware TLS 1.3 chooses ", tls.CipherSuiteName(suite))
	}
	secrets := map[string][]byte{} // by label
	var clientRandom []byte
	for line := range strings.Lines(log.String()) { // the format of NSS
		fields := strings.Fields(line)
		clientRandom, _ = hex.DecodeString(fields[1])
		secrets[fields[0]], _ = hex.DecodeString(fields[2])
	}
	c := &recordClient{TCPConn: conn}
	if version == tls.VersionTLS13 {
		c.out, c.in = keysOf(t, secrets["CLIENT_TRAFFIC_SECRET_0"]), keysOf(t, secrets["SERVER_TRAFFIC_SECRET_0"])
		return c
	}
	serverRandom := recorded.received[11:43] // after the headers of the record and of the message, and a version
	keys := expandKeys(secrets["CLIENT_RANDOM"], slices.Concat([]byte("key expansion"), serverRandom, clientRandom), 40)
	c.out, c.in = newRecordKeys(t, keys[:16], keys[32:36]), newRecordKeys(t, keys[16:32], keys[36:40])
	c.out.next, c.in.next = 1, 1 // after the Finished messages
	return c
}

// expandKeys is the PRF of TLS 1.2 (RFC 5246 §5), whose seed begins with the label.
func expandKeys(secret, seed []byte, size int) (out []byte) {
	mac := func(parts ...[]byte) []byte {
		h := hmac.New(sha256.New, secret)
		h.Write(slices.Concat(parts...))
		return h.Sum(nil)
	}
	for a := mac(seed); len(out) < size; a = mac(a) {
		out = append(out, mac(a, seed)...)
	}
	return out[:size]
}

// data returns records of application data.
func (c *recordClient) data(contents ...string) (records []byte) {
	for _, content := range contents {
		records = append(records, c.out.seal(recordData, []byte(content), 0)...)
	}
	return records
}

// closeNotify returns the alert.
func (c *recordClient) closeNotify() []byte {
	return c.out.seal(recordAlert, []byte{1, alertCloseNotify}, 0)
}

// keyUpdate returns a KeyUpdate (RFC 8446 §4.6.3), and uses the next keys from then on.
func (c *recordClient) keyUpdate(t testing.TB, answered bool) []byte {
	t.Helper()
	message := []byte{messageKeyUpdate, 0, 0, 1, 0}
	if answered {
		message[4] = 1
	}
	record := c.out.seal(recordHandshake, message, 0)
	c.out.update(t)
	return record
}

// nextRecord reads a record. It follows the KeyUpdates of the router.
func (c *recordClient) nextRecord(t testing.TB) (kind byte, data []byte, err error) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	head := make([]byte, 5)
	if _, err := io.ReadFull(c, head); err != nil {
		return 0, nil, err
	}
	body := make([]byte, binary.BigEndian.Uint16(head[3:]))
	if _, err := io.ReadFull(c, body); err != nil {
		return 0, nil, err
	}
	kind, data, err = c.in.open(head, body)
	if err == nil && kind == recordHandshake && data[0] == messageKeyUpdate {
		c.in.update(t)
	}
	return kind, data, err
}

// mustRecords reads records of these types until their contents are want.
func (c *recordClient) mustRecords(t testing.TB, kind byte, want string) {
	t.Helper()
	for got := ""; got != want || len(want) == 0; {
		had, data, err := c.nextRecord(t)
		if got += string(data); err != nil || had != kind || !strings.HasPrefix(want, got) {
			t.Fatalf("a record of type %d with %.40q, %v; want type %d and %.40q", had, got, err, kind, want)
		}
	}
}

// mustEnd reads close_notify, and then the end of the connection.
func (c *recordClient) mustEnd(t testing.TB) {
	t.Helper()
	c.mustRecords(t, recordAlert, "\x01\x00")
	mustEOF(t, c.TCPConn)
}

// mustAlert reads a fatal alert, and then until the connection is over.
func (c *recordClient) mustAlert(t testing.TB, alert byte) {
	t.Helper()
	c.mustRecords(t, recordAlert, string([]byte{2, alert}))
	mustBreak(t, c.TCPConn)
}

// recordSession is a session with a recordClient.
type recordSession struct {
	relayed
	client *recordClient
}

// startedRecords starts a session with a recordClient, and changes its other sockets before.
func startedRecords(t testing.TB, r *relay, version uint16, change func(sessionConns)) *recordSession {
	t.Helper()
	near, far := tcpPair(t)
	pairs, done := sessionConns{}, make(chan *tlsConn, 1)
	go func() {
		server := newTLSConn(near, relayTLS())
		server.Handshake()
		done <- server
	}()
	client := newRecordClient(t, far, version)
	pairs.far[clientSide], pairs.near[clientSide] = far, <-done
	pairs.near[backendSide], pairs.far[backendSide] = pair(t, "tcp")
	if change != nil {
		change(pairs)
	}
	return &recordSession{pairs.start(r, newSession("ns-01", 0, ""), [2][]byte{}), client}
}

// stickBackend makes the sockets to the backend small, and fills them: what the client sends is
// unsent, until the backend reads what is returned.
func stickBackend(pairs sessionConns) (filled int64) {
	near, far := pairs.near[backendSide], pairs.far[backendSide]
	near.(halfConn).SetWriteBuffer(16 << 10)
	far.SetReadBuffer(64 << 10)
	filled = stuff(near)
	near.SetDeadline(time.Time{})
	return filled
}

// mustReadFilled reads what stickBackend has filled the sockets with.
func mustReadFilled(t testing.TB, conn net.Conn, filled int64) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if n, err := io.CopyN(io.Discard, conn, filled); err != nil {
		t.Fatalf("read %d bytes, %v; want %d", n, err, filled)
	}
}

// Records of every size arrive, also empty ones and, with TLS 1.3, padded ones: one after the
// other, many in one segment, and cut between any two bytes. The relay counts their content.
func TestTLSRecords(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		seed := randomSeed(t)
		noise, rng := string(newNoise(seed)), rand.New(rand.NewPCG(seed, 0))
		s := startedRecords(t, quietRelay(t), version, nil)
		var up, down strings.Builder
		sends := func(parts ...[]byte) {
			for _, part := range parts {
				mustSend(t, s.client, part)
			}
		}
		record := func(size, pad int) []byte {
			up.WriteString(noise[up.Len():][:size])
			return s.client.out.seal(recordData, []byte(noise[up.Len()-size:][:size]), min(pad, 1<<14-size))
		}
		var backend sync.WaitGroup
		var got []byte
		backend.Go(func() { got, _ = io.ReadAll(s.backend) }) // until the client ends
		sizes := []int{0, 1, 2, 125, 126, 1400, 4095, 4096, 8192, 1<<14 - 1, 1 << 14}
		for range 200 {
			sizes = append(sizes, logUniform(rng, 1<<14))
		}
		for _, size := range sizes {
			sends(record(size, rng.IntN(300)))
		}
		for range 3 { // many in one segment
			var all []byte
			for len(all) < 60<<10 {
				all = append(all, record(logUniform(rng, 20), rng.IntN(3))...)
			}
			sends(all)
		}
		for cut, last := 1, 1; cut <= last; cut++ {
			whole, next := record(1, 0), record(3, 0)
			last = len(next) - 1
			// The relay has read the part when the backend has the record before it.
			sends(append(whole, next[:cut]...))
			eventually(t, "bytes carried", int64(up.Len()-3), func() int64 { return s.bytes()[clientSide] })
			sends(next[cut:])
		}
		for _, size := range append(sizes, 48<<10, 64<<10, 200_000) {
			part := noise[down.Len()%noiseSize/2:][:size]
			down.WriteString(part)
			mustWrite(t, s.backend, part)
			if size > 0 {
				s.client.mustRecords(t, recordData, part)
			}
		}
		sends(s.client.closeNotify())
		backend.Wait()
		closeWrite(t, s.backend)
		s.client.mustEnd(t)
		s.wantCause(t, causeClient)
		if string(got) != up.String() {
			t.Errorf("the backend got %d bytes, want the %d that were sent", len(got), up.Len())
		}
		wantEqual(t, "bytes", s.bytes(), [2]int64{int64(up.Len()), int64(down.Len())})
	})
}

// A client ends its stream by close_notify, alone or with its last bytes, and with a FIN or
// without one. The backend may go on. It fails if the end overtakes unsent bytes, if what
// follows close_notify is carried, or if the client gets no close_notify, or no FIN.
func TestTLSHalfClose(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		for name, tt := range map[string]struct{ fin, stuck bool }{
			"close_notify": {}, "with a FIN": {fin: true},
			"a backend that is slow": {stuck: true}, "with a FIN, a backend that is slow": {true, true},
		} {
			t.Run("the client ends, "+name, func(t *testing.T) {
				filled := int64(0)
				s := startedRecords(t, quietRelay(t), version, func(pairs sessionConns) {
					if tt.stuck {
						filled = stickBackend(pairs)
					}
				})
				mustSend(t, s.client, slices.Concat(s.client.data("question", "?"), s.client.closeNotify(), s.client.data("lost")))
				if tt.fin {
					closeWrite(t, s.client)
				}
				mustReadFilled(t, s.backend, filled)
				mustRead(t, s.backend, "question?")
				mustEOF(t, s.backend)
				for range 3 {
					mustWrite(t, s.backend, "answer")
					s.client.mustRecords(t, recordData, "answer")
				}
				s.backend.Close()
				s.client.mustEnd(t)
				s.wantCause(t, causeClient)
				wantEqual(t, "bytes", s.bytes(), [2]int64{9, 18})
			})
		}
		t.Run("the backend ends", func(t *testing.T) {
			s := startedRecords(t, quietRelay(t), version, nil)
			mustWrite(t, s.backend, "last")
			closeWrite(t, s.backend)
			s.client.mustRecords(t, recordData, "last")
			s.client.mustEnd(t)
			mustSend(t, s.client, s.client.data("answer"))
			mustRead(t, s.backend, "answer")
			mustSend(t, s.client, append(s.client.data("last"), s.client.closeNotify()...))
			mustRead(t, s.backend, "last")
			mustEOF(t, s.backend)
			s.wantCause(t, causeBackend)
		})
		t.Run("the backend ends, and then the client without close_notify", func(t *testing.T) {
			s := startedRecords(t, quietRelay(t), version, nil)
			closeWrite(t, s.backend)
			s.client.mustEnd(t)
			closeWrite(t, s.client)
			mustEOF(t, s.backend)
			s.wantCause(t, causeBackend)
		})
	})
}

// If a side has ended, and a client that reads late takes close_notify only when all bytes
// before it are read, it gets that all the same. It fails if the session is over before.
func TestTLSLateReader(t *testing.T) {
	for i, first := range []string{"the client ends first", "the backend ends first"} {
		t.Run(first, func(t *testing.T) {
			for n := 200 << 10; n < 500<<10; n += 10 << 10 { // about what the sockets and the router take
				s := startedOver(t, quietRelay(t), "tls-unix", "unix")
				if side(i) == clientSide {
					closeWrite(t, s.client)
				}
				var backend sync.WaitGroup
				backend.Go(func() {
					s.backend.SetDeadline(time.Now().Add(patience))
					s.backend.Write(make([]byte, n)) // its failure shows at the client
					s.backend.CloseWrite()
				})
				s.waitStuck(backendSide)
				if side(i) == backendSide {
					closeWrite(t, s.client)
				}
				mustReadAll(t, s.client, int64(n))
				backend.Wait()
				waitFor(t, s.relay)
			}
		})
	}
}

// A client whose stream ends without close_notify may have sent more: the cause says so. After
// a Close frame nothing more can come. What came before arrives.
func TestTLSTruncated(t *testing.T) {
	bye := string(closeFrame(1000, "bye", true))
	eachVersion(t, func(t *testing.T, version uint16) {
		for name, tt := range map[string]struct {
			data string
			part int // bytes of a record before the end
			ends func(t testing.TB, conn *net.TCPConn)
			want cause
		}{
			"between records":                   {"data", 0, func(t testing.TB, conn *net.TCPConn) { closeWrite(t, conn) }, causeTruncated},
			"nothing before":                    {"", 0, func(t testing.TB, conn *net.TCPConn) { closeWrite(t, conn) }, causeTruncated},
			"within a header":                   {"data", 3, func(t testing.TB, conn *net.TCPConn) { closeWrite(t, conn) }, causeTruncated},
			"within a record":                   {"data", 20, func(t testing.TB, conn *net.TCPConn) { closeWrite(t, conn) }, causeTruncated},
			"after a Close frame":               {bye, 0, func(t testing.TB, conn *net.TCPConn) { closeWrite(t, conn) }, causeClient},
			"within what follows a Close frame": {bye, 20, func(t testing.TB, conn *net.TCPConn) { closeWrite(t, conn) }, causeClient},
			"a reset":                           {"data", 0, func(_ testing.TB, conn *net.TCPConn) { reset(conn) }, causeClientError},
		} {
			for _, stuck := range []bool{false, true} {
				if stuck && tt.want == causeClientError {
					continue // the kernel drops what came before
				}
				t.Run(fmt.Sprint(name, ", stuck ", stuck), func(t *testing.T) {
					filled := int64(0)
					s := startedRecords(t, quietRelay(t), version, func(pairs sessionConns) {
						if stuck {
							filled = stickBackend(pairs)
						}
					})
					if tt.data != "" {
						mustSend(t, s.client, s.client.data(tt.data))
					}
					if tt.want == causeClientError {
						mustRead(t, s.backend, tt.data)
					}
					mustSend(t, s.client, s.client.data("lost")[:tt.part])
					tt.ends(t, s.client.TCPConn)
					if tt.want != causeClientError {
						mustReadFilled(t, s.backend, filled)
						mustRead(t, s.backend, tt.data)
						mustEOF(t, s.backend)
					}
					if tt.want == causeClient {
						s.client.Close()
						s.backend.Close()
					}
					s.wantCause(t, tt.want)
				})
			}
		}
	})
}

// sealed is a record of a type.
func sealed(kind byte, data string) func(testing.TB, *recordClient) []byte {
	return func(_ testing.TB, c *recordClient) []byte { return c.out.seal(kind, []byte(data), 0) }
}

// What TLS refuses ends the session, with an alert for the client. The backend gets what came
// before, and an end. Nothing of it arrives, and nothing after it.
func TestTLSRefused(t *testing.T) {
	const both, since13 = 0, tls.VersionTLS13
	broken := func(_ testing.TB, c *recordClient) []byte {
		record := c.data("broken")
		record[len(record)-1] ^= 1
		return record
	}
	raw := func(record string) func(testing.TB, *recordClient) []byte {
		return func(testing.TB, *recordClient) []byte { return []byte(record) }
	}
	for name, tt := range map[string]struct {
		version uint16
		bad     func(testing.TB, *recordClient) []byte
		alert   byte
	}{
		"a record that was changed":   {both, broken, alertBadRecordMAC},
		"a record of another session": {both, raw("\x17\x03\x03\x00\x20" + strings.Repeat("x", 32)), alertBadRecordMAC},
		"a record that is too long":   {both, raw("\x17\x03\x03\x60\x00"), alertOverflow},
		"HTTP":                        {both, raw("GET / HTTP/1.1\r\n\r\n"), alertVersion},
		"another type":                {both, sealed(99, "?"), alertUnexpected},
		"a ClientHello, to renegotiate": {tls.VersionTLS12, sealed(recordHandshake, "\x01\x00\x00\x29\x03\x03"+strings.Repeat("r", 32)+
			"\x00\x00\x02\xc0\x2b\x01\x00"), alertUnexpected},
		"a ChangeCipherSpec":        {tls.VersionTLS12, sealed(20, "\x01"), alertUnexpected},
		"another handshake message": {since13, sealed(recordHandshake, "\x14\x00\x00\x00"), alertUnexpected},
		"data within a message": {since13, func(t testing.TB, c *recordClient) []byte {
			return append(sealed(recordHandshake, "\x18\x00")(t, c), c.data("x")...)
		}, alertUnexpected},
		"empty records without an end": {both, func(_ testing.TB, c *recordClient) []byte { return c.data(make([]string, 50)...) }, alertUnexpected},
		"KeyUpdates without an end": {since13, func(t testing.TB, c *recordClient) (all []byte) {
			for range 50 {
				all = append(all, c.keyUpdate(t, false)...)
			}
			return all
		}, alertUnexpected},
	} {
		for version, versionName := range map[uint16]string{tls.VersionTLS12: "TLS 1.2", tls.VersionTLS13: "TLS 1.3"} {
			if tt.version != both && tt.version != version {
				continue
			}
			t.Run(versionName+", "+name, func(t *testing.T) {
				s := startedRecords(t, quietRelay(t), version, nil)
				mustSend(t, s.client, slices.Concat(s.client.data("before"), tt.bad(t, s.client), s.client.data("after")))
				mustRead(t, s.backend, "before")
				mustEOF(t, s.backend)
				s.client.mustAlert(t, tt.alert)
				s.wantCause(t, causeClientError)
				wantEqual(t, "bytes", s.bytes(), [2]int64{6, 0})
			})
		}
	}
}

// A session keeps little of a message that does not end, and is over.
func TestTLSMessageWithoutEnd(t *testing.T) {
	s := startedRecords(t, quietRelay(t), tls.VersionTLS13, nil)
	all := slices.Concat(s.client.data("before"), sealed(recordHandshake, "\x04\x00\xff\xff")(t, s.client))
	for range 48 { // KiB: less than the whole message, which would be refused
		all = append(all, sealed(recordHandshake, strings.Repeat("x", 1<<10))(t, s.client)...)
	}
	s.client.Write(all) // the session may end before it has taken all
	mustRead(t, s.backend, "before")
	mustEOF(t, s.backend)
	s.wantCause(t, causeClientError)
}

// A client may use new keys at any time (RFC 8446 §4.6.3), and ask the router to do so. Nothing
// is lost in either direction.
func TestTLSKeyUpdate(t *testing.T) {
	s := startedRecords(t, quietRelay(t), tls.VersionTLS13, nil)
	for n := range 20 {
		text := fmt.Sprint("up ", n)
		update := s.client.keyUpdate(t, n%2 == 0)
		cut := n % len(update) // the message in two segments
		mustSend(t, s.client, update[:cut])
		mustSend(t, s.client, append(update[cut:], s.client.data(text)...))
		mustRead(t, s.backend, text)
		if n%2 == 0 {
			s.client.mustRecords(t, recordHandshake, string([]byte{messageKeyUpdate, 0, 0, 1, 0}))
		}
		text = fmt.Sprint("down ", n)
		mustWrite(t, s.backend, text)
		s.client.mustRecords(t, recordData, text)
	}
	mustSend(t, s.client, s.client.closeNotify())
	mustEOF(t, s.backend)
	s.backend.Close()
	s.client.mustEnd(t)
	s.wantCause(t, causeClient)
	wantEqual(t, "bytes", s.bytes(), [2]int64{90, 130})
}

// A client that moves or is drained gets its Close frame at the end of a frame, close_notify,
// and a FIN, in this order.
func TestTLSCloseGracefully(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		for cause, code := range map[cause]uint16{causeMoved: closeServiceRestart, causeDrain: closeGoingAway} {
			t.Run(cause.String(), func(t *testing.T) {
				s := startedRecords(t, quietRelay(t), version, nil)
				frame := frameBytes(0x81, false, 9, []byte("last text"))
				mustSend(t, s.backend, frame[:5])
				s.client.mustRecords(t, recordData, string(frame[:5]))
				s.closeGracefully(cause, nil)
				mustFrames(t, s.backend, true, goesAway)
				mustSend(t, s.backend, append(frame[5:], closeFrame(1001, "", false)...))
				s.client.mustRecords(t, recordData, string(frame[5:])+
					string(closeFrame(code, map[uint16]string{1001: "going away", 1012: "service restart"}[code], false)))
				mustSend(t, s.client, append(s.client.data(string(closeFrame(1000, "", true))), s.client.closeNotify()...))
				s.client.mustEnd(t)
				mustEOF(t, s.backend)
				s.wantCause(t, cause)
				wantEqual(t, "sessions that were cut", s.relay.cut[cause].Load(), 0)
			})
		}
	})
}

// askForKeys asks for new keys again and again, and reads none of the answers. It returns when the
// router reads no more, or has ended the session.
func askForKeys(t testing.TB, r *relay) *recordSession {
	t.Helper()
	s := startedRecords(t, r, tls.VersionTLS13, func(pairs sessionConns) {
		// The client's read buffer stays as it is: a kernel that has to shrink it may drop even
		// acknowledgements, and then nothing goes on.
		far, near := pairs.far[clientSide], socket(pairs.near[clientSide])
		near.SetWriteBuffer(4 << 10)
		far.SetWriteBuffer(16 << 10)
		near.SetReadBuffer(64 << 10)
	})
	go io.Copy(io.Discard, s.backend) // until the test ends
	for range 200 {
		var all []byte
		for range 100 {
			all = append(all, append(s.client.keyUpdate(t, true), s.client.data("x")...)...)
		}
		s.client.SetWriteDeadline(time.Now().Add(3 * time.Second))
		if _, err := s.client.Write(all); err != nil {
			return s
		}
	}
	t.Fatal("the router answers for ever")
	return nil
}

// A client that asks for new keys and does not read the answers is read no more, or its session
// is over. That can be ended, too.
func TestTLSUnreadAnswers(t *testing.T) {
	s := askForKeys(t, quietRelay(t))
	s.end(causeDrain)
	waitFor(t, s.relay)
}

// What comes with the request, in the same records, in others of the same segment, or with
// close_notify, arrives once the session is open, on both ways of a handshake.
func TestTLSEarlyData(t *testing.T) {
	backend := startStub(t, "127.0.0.1:0", func(conn net.Conn, br *bufio.Reader) {
		io.WriteString(conn, switching+"early")
		got, _ := io.ReadAll(br)
		fmt.Fprintf(conn, "got %s", got)
	})
	p := startProxy(t, []string{backend.addr}, map[string]string{}, func(p *proxy) { p.tls = newTLSServer(relayTLS) })
	eachVersion(t, func(t *testing.T, version uint16) {
		both(t, func(t *testing.T, request string) {
			for name, flight := range map[string]func(c *recordClient) []byte{
				"one record":     func(c *recordClient) []byte { return c.data(request + "first") },
				"two records":    func(c *recordClient) []byte { return c.data(request, "first") },
				"a record cut":   func(c *recordClient) []byte { return c.data(request[:20], request[20:]+"fi", "rst") },
				"empty records":  func(c *recordClient) []byte { return c.data("", request, "", "first", "") },
				"a large record": func(c *recordClient) []byte { return c.data(request+strings.Repeat("f", 9<<10), "first") },
			} {
				t.Run(name, func(t *testing.T) {
					c := newRecordClient(t, dial(t, p.addr).(*net.TCPConn), version)
					mustSend(t, c, append(flight(c), c.closeNotify()...))
					var answer string
					for !strings.HasSuffix(answer, "first") {
						kind, data, err := c.nextRecord(t)
						if err != nil || kind != recordData {
							t.Fatalf("type %d, %q, %v after %q", kind, data, err, answer)
						}
						answer += string(data)
					}
					want := "earlygot first"
					if name == "a large record" {
						want = "earlygot " + strings.Repeat("f", 9<<10) + "first"
					}
					if _, body, _ := strings.Cut(answer, "\r\n\r\n"); !strings.HasPrefix(answer, "HTTP/1.1 101 ") || body != want {
						t.Errorf("the client reads %q, want a 101 and %q", answer, want)
					}
					c.mustEnd(t)
				})
			}
		})
	})
	waitFor(t, p.relay)
	wantEqual(t, "clients that ended first", p.relay.ended[causeClient].Load(), 20)
}
