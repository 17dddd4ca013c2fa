// Bare is what httputil.ReverseProxy alone takes of the CPU: it sends each request to a
// backend that the last byte of the path chooses, so that it does not have to look for
// one. The router can hardly take less for a plain request.
package main

import (
	"flag"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

func main() {
	listen := flag.String("listen", "", "`address` for clients")
	backends := flag.String("backends", "", "`list` of addresses")
	flag.Parse()
	if *listen == "" || *backends == "" {
		flag.Usage()
		os.Exit(2)
	}
	err := http.ListenAndServe(*listen, newProxy(strings.Split(*backends, ",")))
	fmt.Fprintln(os.Stderr, "bare:", err)
	os.Exit(1)
}

// newProxy returns a proxy for backends, with what a proxy for many clients would set:
// kept-alive connections for all of them, buffers that are used again, and no
// compression of its own.
func newProxy(backends []string) http.Handler {
	var urls []*url.URL
	for _, address := range backends {
		urls = append(urls, &url.URL{Scheme: "http", Host: address})
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	transport.MaxIdleConns = 0 // no limit
	transport.MaxIdleConnsPerHost = 1024
	transport.IdleConnTimeout = time.Minute
	transport.DisableCompression = true
	transport.ForceAttemptHTTP2 = false
	return &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			path := r.In.URL.Path
			r.SetURL(urls[int(path[len(path)-1])%len(urls)])
			r.Out.Host = r.In.Host
			r.SetXForwarded()
		},
		Transport:     transport,
		FlushInterval: -1,
		BufferPool:    new(bufferPool),
	}
}

// bufferPool has the buffers of bodies.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) Get() []byte {
	if b, ok := p.pool.Get().(*[32 << 10]byte); ok {
		return b[:]
	}
	return make([]byte, 32<<10)
}

func (p *bufferPool) Put(b []byte) { p.pool.Put((*[32 << 10]byte)(b)) }
