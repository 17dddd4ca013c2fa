package main

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	certificateInterval = time.Second // between two looks at the files
	maxCertificateFile  = 1 << 20     // bytes of a file, at most: a Secret has no more
	maxCertificateChain = 128 << 10   // bytes of a certificate and its chain, at most: clients take no more
	minTicketSecret     = 32          // bytes
	maxClientSubject    = 1 << 10     // bytes of clientSubject, at most
	tryHandshakeTime    = 5 * time.Second

	// ticketTime is how long one key seals tickets, and how long an old secret still opens them.
	ticketTime         = 24 * time.Hour
	maxPreviousSecrets = 8 // that still open tickets
)

// certificateFlags has the flags of a router that terminates TLS itself.
type certificateFlags struct {
	certs        []string // of -tls-cert: files, and directories of mounted Secrets; none: no TLS
	keys         []string // of -tls-key, for each of certs that is a file, in their order
	minVersion   string   // "1.2" or "1.3"
	clientCA     string   // a file; "": clients need no certificate
	ticketSecret string   // a file, or the directory of a mounted Secret; "": a random secret
}

// certificates has what TLS handshakes with clients need: certificates, the CA of clients
// and the keys of session tickets. It reads them from files, and again when these change:
// files whose content is refused leave in force what they had before.
type certificates struct {
	// Static after construction.
	minVersion uint16
	files      []*certificateFile   // of pairs, the client CA and the ticket secret
	pairs      []*tls.Certificate   // in force, with their keys
	onRejected func(message string) // gets what is wrong with a refused file; nil: nobody does
	now        func() time.Time
	log        *slog.Logger

	inForce atomic.Pointer[tls.Config] // see config; what it points to never changes

	// Owned by run; before, by newCertificates.
	clientCAs  *x509.CertPool // nil without -tls-client-ca
	secrets    []ticketSecret // the newest first
	ticketKeys [][32]byte     // of inForce
}

// ticketSecret is a secret that keys of session tickets are derived from.
type ticketSecret struct {
	secret string
	until  time.Time // from then on, it opens no ticket; zero for that in force
}

// certificateFile is the file, or the two files of a pair, that a flag names.
type certificateFile struct {
	// Static after construction.
	flag  string
	name  string          // as the flag has it; with /secret if that is a directory of -tls-ticket-secret
	names []string        // of the files, for errors
	paths func() []string // of the files, as they are opened
	apply func(contents []string) error
	log   func() // logs what is in force

	optional bool // apply gets "" for a file that does not exist

	rejected atomic.Bool // the files have what is refused

	// Owned by run.
	seen    [sha256.Size]byte // what the last look found; see sumOf
	applied [sha256.Size]byte // what is in force
	reason  string            // why the files are refused; "" if they are not
}

// newCertificates reads all files that the flags name. An error names the flag and the
// file, and says what is wrong with it. A certificate that has expired, or is not valid yet,
// is taken with a warning in the log.
func newCertificates(flags certificateFlags, log *slog.Logger) (*certificates, error) {
	c := &certificates{minVersion: tls.VersionTLS12, now: time.Now, log: log}
	if flags.minVersion == "1.3" {
		c.minVersion = tls.VersionTLS13
	}
	if err := c.addPairs(flags); err != nil {
		return nil, err
	}
	if flags.clientCA != "" {
		c.addFile("-tls-client-ca", flags.clientCA, c.applyClientCA)
	}
	if flags.ticketSecret != "" {
		c.addTicketSecret(flags.ticketSecret)
	} else {
		c.secrets = []ticketSecret{{secret: randomSecret()}}
	}
	for _, f := range c.files {
		if err := f.readFirst(); err != nil {
			return nil, fmt.Errorf("%s %s: %w", f.flag, f.name, err)
		}
		f.log()
	}
	c.publish(ticketKeys(c.secrets, c.now()))
	return c, nil
}

// addPairs adds the files of -tls-cert and -tls-key.
func (c *certificates) addPairs(flags certificateFlags) error {
	keys := flags.keys
	for _, cert := range flags.certs {
		pair := &tls.Certificate{}
		f := &certificateFile{flag: "-tls-cert", name: cert}
		if info, err := os.Stat(cert); err == nil && info.IsDir() {
			f.names = []string{filepath.Join(cert, "tls.crt"), filepath.Join(cert, "tls.key")}
			f.paths = func() []string { return secretPaths(cert) }
		} else if len(keys) == 0 {
			return fmt.Errorf("-tls-cert %s requires a -tls-key: only a directory has its key in it", cert)
		} else {
			f.names = []string{cert, keys[0]}
			f.paths = func() []string { return f.names }
			keys = keys[1:]
		}
		f.apply = func(contents []string) error { return c.applyPair(pair, f.names, contents) }
		f.log = func() {
			c.log.Info("certificate in force", "file", f.name, "not_after", pair.Leaf.NotAfter, "names", namesOf(pair.Leaf))
		}
		c.files, c.pairs = append(c.files, f), append(c.pairs, pair)
	}
	if len(keys) > 0 {
		return fmt.Errorf("-tls-key %s belongs to no -tls-cert: each file has one key, and a directory has its own", keys[0])
	}
	return nil
}

// secretPaths returns the paths of the files of a mounted Secret. Both are in what the
// kubelet's symbolic link ..data names now, so that they are of one version.
func secretPaths(directory string) []string {
	if target, err := os.Readlink(filepath.Join(directory, "..data")); err == nil {
		directory = filepath.Join(directory, target)
	}
	return []string{filepath.Join(directory, "tls.crt"), filepath.Join(directory, "tls.key")}
}

// addFile adds a single file, not a pair: the CAs of clients, or the secret of tickets.
func (c *certificates) addFile(flag, path string, apply func(content string) error) *certificateFile {
	paths := []string{path}
	f := &certificateFile{
		flag: flag, name: path, names: paths,
		paths: func() []string { return paths },
		apply: func(contents []string) error { return apply(contents[0]) },
		log:   func() { c.log.Info("TLS file in force", "flag", flag, "file", path) },
	}
	c.files = append(c.files, f)
	return f
}

// addTicketSecret adds the file of -tls-ticket-secret, or the file "secret" in its directory.
// The directory of an optional Secret may have no such file: meanwhile there is a random secret.
func (c *certificates) addTicketSecret(path string) {
	const flag = "-tls-ticket-secret"
	if info, err := os.Stat(path); err != nil || !info.IsDir() {
		c.addFile(flag, path, c.applyTicketSecret)
		return
	}
	file, absent := filepath.Join(path, "secret"), false
	f := c.addFile(flag, file, func(content string) error {
		if absent = content == ""; absent {
			content = randomSecret()
		}
		return c.applyTicketSecret(content)
	})
	inForce := f.log
	f.optional, f.log = true, func() {
		if absent {
			c.log.Info("no ticket secret; clients resume TLS sessions at this router only", "file", file)
			return
		}
		inForce()
	}
}

// randomSecret returns a secret of this process alone.
func randomSecret() string {
	random := make([]byte, minTicketSecret)
	rand.Read(random) // it never fails
	return string(random)
}

// config returns the configuration of the next handshake. It takes no lock.
func (c *certificates) config() *tls.Config { return c.inForce.Load() }

// run reads the files again and again until ctx ends, and derives each day's keys of
// tickets.
func (c *certificates) run(ctx context.Context) {
	for sleep(ctx, certificateInterval) == nil {
		c.look()
	}
}

// look reads the files, and takes what two looks in a row have found: the first may have
// come while they were written, or between a certificate and its key.
func (c *certificates) look() {
	changed := false
	for _, f := range c.files {
		changed = c.lookAt(f) || changed
	}
	c.secrets = slices.DeleteFunc(c.secrets, func(s ticketSecret) bool {
		return !s.until.IsZero() && !c.now().Before(s.until)
	})
	keys := ticketKeys(c.secrets, c.now())
	if changed || !slices.Equal(keys, c.ticketKeys) {
		c.publish(keys)
	}
}

// lookAt reads f, and reports whether its content was taken.
func (c *certificates) lookAt(f *certificateFile) (taken bool) {
	contents, err := f.read()
	sum := sumOf(contents, err)
	if sum != f.seen {
		f.seen = sum
		return false
	}
	if sum == f.applied && f.reason == "" {
		return false
	}
	if sum != f.applied && err == nil {
		err = f.apply(contents)
		taken = err == nil
	}
	if err != nil {
		c.reject(f, err.Error())
		return false
	}
	f.applied, f.reason = sum, ""
	f.rejected.Store(false)
	f.log()
	return taken
}

// reject notes that f has what is refused, and reports it, once for each reason.
func (c *certificates) reject(f *certificateFile, reason string) {
	if f.reason == reason {
		return
	}
	f.reason = reason
	f.rejected.Store(true)
	c.log.Warn("TLS file rejected; keeping what is in force", "flag", f.flag, "file", f.name, "error", reason)
	if c.onRejected != nil {
		c.onRejected(f.flag + " " + f.name + " was rejected, and the last one stays in force: " + reason)
	}
}

// publish makes a configuration of what is in force.
func (c *certificates) publish(keys [][32]byte) {
	config := &tls.Config{
		MinVersion:                  c.minVersion,
		NextProtos:                  []string{"http/1.1"},
		DynamicRecordSizingDisabled: true,
		Time:                        c.now,
	}
	for _, pair := range c.pairs {
		config.Certificates = append(config.Certificates, *pair)
	}
	if c.clientCAs != nil {
		config.ClientCAs, config.ClientAuth = c.clientCAs, tls.RequireAndVerifyClientCert
	}
	config.SetSessionTicketKeys(keys)
	c.ticketKeys = keys
	c.inForce.Store(config)
}

// readFirst reads the files when the router starts. It reads them once more if they are
// refused: the kubelet may have replaced them meanwhile.
func (f *certificateFile) readFirst() error {
	contents, err := f.readAndApply()
	if err != nil {
		contents, err = f.readAndApply()
	}
	f.seen = sumOf(contents, err)
	f.applied = f.seen
	return err
}

func (f *certificateFile) readAndApply() (contents []string, err error) {
	if contents, err = f.read(); err == nil {
		err = f.apply(contents)
	}
	return contents, err
}

// read returns what is in the files.
func (f *certificateFile) read() (contents []string, err error) {
	for i, path := range f.paths() {
		content, ok, err := readPrefix(path, maxCertificateFile+1)
		var pathErr *fs.PathError
		switch {
		case f.optional && errors.Is(err, fs.ErrNotExist):
		case errors.As(err, &pathErr):
			// Without the path: each version of a mounted Secret has another path.
			return nil, fmt.Errorf("%s: %w", f.names[i], pathErr.Err)
		case err != nil:
			return nil, fmt.Errorf("%s: %w", f.names[i], err)
		case !ok:
			return nil, fmt.Errorf("%s is not a regular file", f.names[i])
		case content == "":
			return nil, fmt.Errorf("%s is empty", f.names[i])
		case len(content) > maxCertificateFile:
			return nil, fmt.Errorf("%s has more than %d bytes", f.names[i], maxCertificateFile)
		}
		contents = append(contents, content)
	}
	return contents, nil
}

// sumOf returns a hash of what a look has found.
func sumOf(contents []string, err error) [sha256.Size]byte {
	return sha256.Sum256(fmt.Appendf(nil, "%q %v", contents, err))
}

// applyPair takes a certificate and its key as pair, if they are good. names and contents are
// those of their files.
func (c *certificates) applyPair(pair *tls.Certificate, names, contents []string) error {
	next, err := parsePair(names, contents)
	if err != nil {
		return err
	}
	now := c.now()
	if invalid := checkValidity(next.Leaf, now); invalid != nil {
		if pair.Leaf != nil && checkValidity(pair.Leaf, now) == nil {
			return fmt.Errorf("%s: %w", names[0], invalid)
		}
		c.log.Warn("certificate is not valid now", "file", names[0], "error", invalid.Error())
	}
	*pair = next
	return nil
}

// namesOf returns the names that a certificate is for.
func namesOf(certificate *x509.Certificate) string {
	names := slices.Clone(certificate.DNSNames)
	for _, ip := range certificate.IPAddresses {
		names = append(names, ip.String())
	}
	return strings.Join(names, ",")
}

// checkValidity returns an error if the certificate is not valid at that time.
func checkValidity(certificate *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(certificate.NotBefore):
		return fmt.Errorf("the certificate is not valid before %s", certificate.NotBefore.Format(time.RFC3339))
	case now.After(certificate.NotAfter):
		return fmt.Errorf("the certificate expired at %s", certificate.NotAfter.Format(time.RFC3339))
	}
	return nil
}

// parsePair returns the certificate and key of two files that have these names and
// contents. It has done a handshake with them.
func parsePair(names, contents []string) (tls.Certificate, error) {
	if _, err := parseCertificates(contents[0]); err != nil {
		return tls.Certificate{}, fmt.Errorf("%s: %w", names[0], err)
	}
	pair, err := tls.X509KeyPair([]byte(contents[0]), []byte(contents[1]))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s: %s", names[1], strings.TrimPrefix(err.Error(), "tls: "))
	}
	if size := len(slices.Concat(pair.Certificate...)); size > maxCertificateChain {
		return tls.Certificate{}, fmt.Errorf("%s: its certificates have %d bytes, want %d at most", names[0], size, maxCertificateChain)
	}
	if err := tryHandshake(pair); err != nil {
		return tls.Certificate{}, fmt.Errorf("%s: no handshake is possible with it: %w", names[0], err)
	}
	return pair, nil
}

// parseCertificates returns the certificates in a file: at least one. crypto/tls itself
// looks at the first one only, and drops broken blocks.
func parseCertificates(content string) (all []*x509.Certificate, err error) {
	blocks := 0
	for block, rest := pem.Decode([]byte(content)); block != nil; block, rest = pem.Decode(rest) {
		blocks++
		if block.Type != "CERTIFICATE" {
			continue
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of it: %w", len(all)+1, err)
		}
		all = append(all, certificate)
	}
	switch {
	case strings.Count(content, "-----BEGIN ") != blocks:
		return nil, errors.New("it has a broken PEM block")
	case len(all) == 0:
		return nil, errors.New("it has no PEM block CERTIFICATE")
	}
	return all, nil
}

// tryHandshake does a handshake in memory: crypto/tls takes keys that it can do none with.
func tryHandshake(pair tls.Certificate) error {
	client, server := net.Pipe()
	late := time.Now().Add(tryHandshakeTime) // one that is refused may wait for the other end for ever
	client.SetDeadline(late)
	server.SetDeadline(late)
	done := make(chan error, 1)
	go func() {
		err := tls.Server(server, &tls.Config{Certificates: []tls.Certificate{pair}, SessionTicketsDisabled: true}).Handshake()
		server.Close()
		done <- err
	}()
	// It is ours, and who it is for does not matter.
	err := tls.Client(client, &tls.Config{InsecureSkipVerify: true}).Handshake()
	client.Close()
	return cmp.Or(<-done, err)
}

// applyClientCA takes the CA of clients, if it is good.
func (c *certificates) applyClientCA(content string) error {
	all, err := parseCertificates(content)
	if err != nil {
		return err
	}
	c.clientCAs = x509.NewCertPool()
	for _, certificate := range all {
		c.clientCAs.AddCert(certificate)
	}
	return nil
}

// applyTicketSecret takes the secret of tickets, if it is long enough. The one before it
// opens tickets for ticketTime more.
func (c *certificates) applyTicketSecret(content string) error {
	if len(content) < minTicketSecret {
		return fmt.Errorf("it must have at least %d bytes (got %d)", minTicketSecret, len(content))
	}
	if len(c.secrets) > 0 {
		c.secrets[0].until = c.now().Add(ticketTime)
	}
	c.secrets = slices.Insert(c.secrets, 0, ticketSecret{secret: content})
	c.secrets = c.secrets[:min(len(c.secrets), 1+maxPreviousSecrets)]
	return nil
}

// ticketKeys returns the keys of session tickets at this time. The first seals them. The
// others open those that were sealed yesterday, or with a secret before, or by a router
// whose clock is already at tomorrow.
func ticketKeys(secrets []ticketSecret, now time.Time) (keys [][32]byte) {
	today := now.Unix() / int64(ticketTime/time.Second)
	for _, s := range secrets {
		for _, day := range []int64{today, today - 1, today + 1} {
			keys = append(keys, ticketKey(s.secret, day))
		}
	}
	return keys
}

// ticketKey returns the key of a day, counted from 1970: HMAC-SHA256 (RFC 2104), a
// pseudorandom function of the secret.
func ticketKey(secret string, day int64) (key [32]byte) {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte("router session ticket key"))
	binary.Write(mac, binary.BigEndian, day) // a hash has no errors
	mac.Sum(key[:0])
	return key
}

// writeMetrics writes when the certificates in force expire, and which files are refused.
// A nil c, of a router that does not terminate TLS, writes nothing.
func (c *certificates) writeMetrics(m metricsWriter) {
	if c == nil {
		return
	}
	expiry := m.family("router_tls_certificate_expiry_timestamp_seconds", "gauge",
		"When the certificate in force expires, in seconds since 1970.")
	for i, certificate := range c.config().Certificates {
		expiry(unixSeconds(certificate.Leaf.NotAfter), "certificate", c.files[i].name)
	}
	rejected := m.family("router_tls_file_rejected", "gauge",
		"1 while what the files have is refused, and what they had before is in force.")
	files := map[string]bool{} // two flags may have the same file
	for _, f := range c.files {
		files[f.name] = files[f.name] || f.rejected.Load()
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		rejected(boolToFloat(files[name]), "file", name)
	}
}

// clientSubject returns the subject of the client's verified certificate, as RFC 2253
// writes it, in printable ASCII: another byte is \XX (RFC 2253 §2.4). It returns "" without
// such a certificate, where state may be nil, and for a subject that it cannot write without
// a loss: a part of a name could be the name of somebody else. Such a one is longer than
// maxClientSubject, or has what is no character.
func clientSubject(state *tls.ConnectionState) string {
	if state == nil || len(state.VerifiedChains) == 0 {
		return ""
	}
	return subjectText(state.VerifiedChains[0][0].RawSubject)
}

// subjectText returns the text of a subject in DER; see clientSubject. It does not use the
// pkix.Name that package x509 makes of it, which has but one CommonName, and another order.
func subjectText(der []byte) string {
	var subject pkix.RDNSequence
	if rest, err := asn1.Unmarshal(der, &subject); err != nil || len(rest) > 0 {
		return ""
	}
	for _, attribute := range slices.Concat(subject...) {
		if text, ok := attribute.Value.(string); !ok || strings.ContainsRune(text, utf8.RuneError) {
			return ""
		}
	}
	var b strings.Builder
	for _, char := range []byte(subject.String()) {
		if char < ' ' || char > '~' {
			fmt.Fprintf(&b, `\%02X`, char)
			continue
		}
		b.WriteByte(char)
	}
	if b.Len() > maxClientSubject {
		return ""
	}
	return b.String()
}
