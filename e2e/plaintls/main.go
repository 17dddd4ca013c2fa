// Plaintls is a server of package net/http with TLS, for e2e/tlsfuzz.sh: what the router does
// otherwise than that is the router's own. It logs where it listens, as the router does.
package main

import (
	"crypto/tls"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: plaintls CERTIFICATE KEY")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("{\"msg\":\"serving\",\"listen\":%q}\n", l.Addr())
	server := &http.Server{TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}}
	log.Fatal(server.ServeTLS(l, os.Args[1], os.Args[2]))
}
