package main

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestHelpIsGolden(t *testing.T) {
	var out bytes.Buffer
	err := run(t.Context(), []string{"-h"}, noEnvironment, &out)
	if !errors.Is(err, flag.ErrHelp) || exitCode(err) != 0 {
		t.Errorf("error %v with exit code %d, want flag.ErrHelp and 0", err, exitCode(err))
	}
	golden := filepath.Join("testdata", "help.txt")
	if *update {
		must(t, os.WriteFile(golden, out.Bytes(), 0o644))
	}
	want, err := os.ReadFile(golden)
	must(t, err)
	if out.String() != string(want) {
		t.Errorf("the help differs from %s (-update writes it anew):\n%s", golden, out.String())
	}
}

// badUsage has every flag that can be wrong, by what is wrong with it.
var badUsage = map[string]struct {
	args string // space-separated
	env  map[string]string
	want string
}{
	"no backends":          {args: "-kube none -overrides d", want: "-replicas or -backends is required without an API server"},
	"no backends, a copy":  {args: "-overrides d", want: "-replicas or -backends is required without an API server"},
	"negative replicas":    {args: "-replicas -1", want: "-replicas must be 1 to 10000 (got -1)"},
	"many replicas":        {args: "-replicas 10001", want: "-replicas must be 1 to 10000 (got 10001)"},
	"replicas no number":   {args: "-replicas four", want: `invalid value "four" for flag -replicas: parse error`},
	"replicas too big":     {args: "-replicas 9999999999999999999", want: `invalid value "9999999999999999999" for flag -replicas: value out of range`},
	"both":                 {args: "-replicas 1 -backends h:1", want: "-replicas and -backends exclude each other: the list has the number of backends"},
	"cordon no list":       {args: "-replicas 4 -cordon 2;5", want: `invalid value "2;5" for flag -cordon: not a list of ordinals like 2,5 (got "2;5")`},
	"cordon of all":        {args: "-replicas 2 -cordon 1,0", want: "-cordon must leave a backend that is not cordoned (got 0,1 of 2)"},
	"cordon of the list":   {args: "-backends h:1,h:2 -cordon 0,1", want: "-cordon must leave a backend that is not cordoned (got 0,1 of 2)"},
	"cordon, none fixed":   {args: "-cordon 2", want: "-cordon requires -replicas or -backends (got 2 alone); without these, the StatefulSet's annotation router-cordon has the ordinals"},
	"backend without port": {args: "-backends h:1,h", want: `-backends: backend 1 must be host:port (got "h")`},
	"backend without host": {args: "-backends :9000", want: `-backends: backend 0 must be host:port (got ":9000")`},
	"backend port 0":       {args: "-backends h:0", want: `-backends: backend 0 must be host:port (got "h:0")`},
	"backend port too big": {args: "-backends h:65536", want: `-backends: backend 0 must be host:port (got "h:65536")`},
	"backend port by name": {args: "-backends h:http", want: `-backends: backend 0 must be host:port (got "h:http")`},
	"backend empty":        {args: "-backends h:1,,h:2", want: `-backends: backend 1 must be host:port (got "")`},
	"port 0":               {args: "-replicas 1 -backend-port 0", want: "-backend-port must be 1 to 65535 (got 0)"},
	"port too big":         {args: "-replicas 1 -backend-port 65536", want: "-backend-port must be 1 to 65535 (got 65536)"},
	"port no number":       {args: "-backend-port http", want: `invalid value "http" for flag -backend-port: parse error`},
	"namespace from":       {args: "-replicas 1 -namespace-from header", want: `-namespace-from must be path, host or query:NAME (got "header")`},
	"query without name":   {args: "-replicas 1 -namespace-from query:", want: `-namespace-from query:NAME must have a name of characters of [-._~a-zA-Z0-9] (got "query:")`},
	"route without /":      {args: "-replicas 1 -route ws/{namespace}", want: `-route "ws/{namespace}": it must begin with /`},
	"route of host":        {args: "-replicas 1 -namespace-from host -route /ws/{namespace}", want: "-route requires -namespace-from path (got host)"},
	"routes overlap":       {args: "-replicas 1 -route /ws/{namespace} -route /{namespace}/ws", want: "-route /ws/{namespace} and -route /{namespace}/ws overlap: a path can match both"},
	"route empty":          {args: "-route= -replicas 1", want: `invalid value "" for flag -route: it must have a path`},
	"name twice":           {args: "-replicas 1 -configmap a -configmap b,a", want: `invalid value "b,a" for flag -configmap: "a" is empty or repeated`},
	"name empty":           {args: "-replicas 1 -configmap a,,b", want: `invalid value "a,,b" for flag -configmap: "" is empty or repeated`},
	"names and labels":     {args: "-replicas 1 -configmap a -configmap b -configmap-selector c=d", want: "-configmap and -configmap-selector exclude each other (got a,b and c=d)"},
	"kube over TLS":        {args: "-replicas 1 -kube https://h:1", want: `-kube must be in-cluster, none or the http://host:port of a kubectl proxy (got "https://h:1")`},
	"kube with a path":     {args: "-replicas 1 -kube http://h:1/api", want: `-kube must be in-cluster, none or the http://host:port of a kubectl proxy (got "http://h:1/api")`},
	"kube by a word":       {args: "-replicas 1 -kube incluster", want: `-kube must be in-cluster, none or the http://host:port of a kubectl proxy (got "incluster")`},
	"hold 0":               {args: "-replicas 1 -hold 0", want: "-hold must not be 0"},
	"hold no time":         {args: "-hold 10", want: `invalid value "10" for flag -hold: parse error`},
	"handshake negative":   {args: "-replicas 1 -upgrade-timeout -1s", want: "-upgrade-timeout must not be negative (got -1s)"},
	"handshake no time":    {args: "-upgrade-timeout soon", want: `invalid value "soon" for flag -upgrade-timeout: parse error`},
	"header time 0":        {args: "-replicas 1 -header-timeout 0s", want: "-header-timeout must not be 0"},
	"header time no time":  {args: "-header-timeout ?", want: `invalid value "?" for flag -header-timeout: parse error`},
	"header too small":     {args: "-replicas 1 -max-header-bytes 1023", want: "-max-header-bytes must be 1024 to 1073741824 (got 1023)"},
	"header too big":       {args: "-replicas 1 -max-header-bytes 1073741825", want: "-max-header-bytes must be 1024 to 1073741824 (got 1073741825)"},
	"listen empty":         {args: "-replicas 1 -listen=", want: `-listen must be host:port or unix:/path (got "")`},
	"admin empty":          {args: "-replicas 1 -admin=", want: `-admin must be host:port or unix:/path (got "")`},
	"socket without path":  {args: "-replicas 1 -listen unix:", want: `-listen must be host:port or unix:/path (got "unix:")`},
	"redirect, no path":    {args: "-replicas 1 -tls-cert a -redirect unix:", want: `-redirect must be host:port or unix:/path (got "unix:")`},
	"StatefulSet empty":    {args: "-replicas 1 -statefulset=", want: `-statefulset must be a name of letters, digits, dashes, dots and underscores that begins with a letter or digit (got "")`},
	"Service empty":        {args: "-replicas 1 -service=", want: `-service must be a name of letters, digits, dashes, dots and underscores that begins with a letter or digit (got "")`},
	"Service with a port":  {args: "-replicas 1 -service headless:9000", want: `-service must be a name of letters, digits, dashes, dots and underscores that begins with a letter or digit (got "headless:9000")`},
	"ConfigMap of another": {args: "-replicas 1 -configmap edge/a", want: `-configmap must be a name of letters, digits, dashes, dots and underscores that begins with a letter or digit (got "edge/a")`},
	"Kubernetes namespace": {args: "-replicas 1", env: map[string]string{"ROUTER_KUBE_NAMESPACE": "edge "}, want: `-kube-namespace must be a name of letters, digits, dashes, dots and underscores that begins with a letter or digit (got "edge ")`},
	"path as a namespace":  {args: "-replicas 1 -kube-namespace ..", want: `-kube-namespace must be a name of letters, digits, dashes, dots and underscores that begins with a letter or digit (got "..")`},
	"hand-off's object":    {args: "-replicas 1 -handoff-configmap a/b", want: `-handoff-configmap must be a name of letters, digits, dashes, dots and underscores that begins with a letter or digit (got "a/b")`},
	"own object":           {args: "-handoff all -pod-name r -pod-uid u -statefulset db -configmap a,router-handoff-db", want: "-configmap must not have the routers' own object (got router-handoff-db, which is -handoff-configmap)"},
	"router pods empty":    {args: "-replicas 1 -router-pods=", want: `-router-pods must have a label, like app.kubernetes.io/name=router (got "")`},
	"selector of all":      {args: "-replicas 1", env: map[string]string{"ROUTER_CONFIGMAP_SELECTOR": " "}, want: `-configmap-selector must have a label, like app.kubernetes.io/name=router (got " ")`},
	"fields too few":       {args: "-replicas 1 -max-header-fields 15", want: "-max-header-fields must be at least 16 (got 15)"},
	"header no number":     {args: "-max-header-bytes 16k", want: `invalid value "16k" for flag -max-header-bytes: parse error`},
	"sessions 0":           {args: "-replicas 1 -max-sessions 0", want: "-max-sessions must be at least 1 (got 0)"},
	"sessions no number":   {args: "-max-sessions many", want: `invalid value "many" for flag -max-sessions: parse error`},
	"pending negative":     {args: "-replicas 1 -max-pending-upgrades -1", want: "-max-pending-upgrades must be at least 1 (got -1)"},
	"pending no number":    {args: "-max-pending-upgrades 1.5", want: `invalid value "1.5" for flag -max-pending-upgrades: parse error`},
	"tenant sessions":      {args: "-replicas 1 -max-sessions-per-namespace -1", want: "-max-sessions-per-namespace must be at least 0 (got -1)"},
	"tenant rate":          {args: "-replicas 1 -max-upgrades-per-second -2", want: "-max-upgrades-per-second must be at least 0 (got -2)"},
	"tenant rate, no int":  {args: "-max-upgrades-per-second 0.5", want: `invalid value "0.5" for flag -max-upgrades-per-second: parse error`},
	"age short":            {args: "-replicas 1 -max-age 999ms", want: "-max-age must be 0 or at least 1s (got 999ms)"},
	"age negative":         {args: "-replicas 1 -max-age -1h", want: "-max-age must be 0 or at least 1s (got -1h0m0s)"},
	"age no time":          {args: "-max-age 1d", want: `invalid value "1d" for flag -max-age: parse error`},
	"TCP timeout short":    {args: "-replicas 1 -tcp-user-timeout 1s", want: "-tcp-user-timeout must be 0, or 2s to 18h in whole seconds (got 1s)"},
	"TCP timeout long":     {args: "-replicas 1 -tcp-user-timeout 19h", want: "-tcp-user-timeout must be 0, or 2s to 18h in whole seconds (got 19h0m0s)"},
	"TCP timeout broken":   {args: "-replicas 1 -tcp-user-timeout 2500ms", want: "-tcp-user-timeout must be 0, or 2s to 18h in whole seconds (got 2.5s)"},
	"TCP timeout minus":    {args: "-replicas 1 -tcp-user-timeout -2s", want: "-tcp-user-timeout must be 0, or 2s to 18h in whole seconds (got -2s)"},
	"TCP timeout no time":  {args: "-tcp-user-timeout 60", want: `invalid value "60" for flag -tcp-user-timeout: parse error`},
	"idle short":           {args: "-replicas 1 -idle-timeout 999ms", want: "-idle-timeout must be 0 or at least 1s (got 999ms)"},
	"idle negative":        {args: "-replicas 1 -idle-timeout -1m", want: "-idle-timeout must be 0 or at least 1s (got -1m0s)"},
	"idle no time":         {args: "-idle-timeout never", want: `invalid value "never" for flag -idle-timeout: parse error`},
	"rate negative":        {args: "-replicas 1 -move-rate -1", want: "-move-rate must be at least 0 (got -1)"},
	"settle negative":      {args: "-replicas 1 -move-settle -1s", want: "-move-settle must not be negative (got -1s)"},
	"handoff other":        {args: "-replicas 1 -handoff both", want: `-handoff must be all, single or off (got "both")`},
	"handoff without API":  {args: "-replicas 1 -handoff all", want: "-handoff all requires an API server that gives the backends: not -kube none, -backends or -replicas"},
	"handoff without UID":  {args: "-handoff all -pod-name router-a", want: `-handoff all requires metadata.uid: -pod-uid is "", want 1 to 128 letters, digits, dots and dashes that begin with a letter or digit`},
	"pod, bad name":        {args: "-replicas 1 -pod-name -a", want: `-pod-name is "-a", want 1 to 128 letters, digits, dots and dashes that begin with a letter or digit`},
	"http neither":         {args: "-replicas 1 -http yes", want: `-http must be on or off (got "yes")`},
	"http time negative":   {args: "-replicas 1 -http-move-timeout -1s", want: "-http-move-timeout must not be negative (got -1s)"},
	"unproven negative":    {args: "-replicas 1 -handoff-proof-timeout -1s", want: "-handoff-proof-timeout must not be negative (got -1s)"},
	"settle no time":       {args: "-move-settle 1", want: `invalid value "1" for flag -move-settle: parse error`},
	"rate no number":       {args: "-move-rate 200/s", want: `invalid value "200/s" for flag -move-rate: parse error`},
	"release no path":      {args: "-replicas 1 -release release", want: `-release must be a path such as /release (got "release")`},
	"release of a URL":     {args: "-replicas 1 -release http://h/release", want: `-release must be a path such as /release (got "http://h/release")`},
	"release with a query": {args: "-replicas 1 -release /release?a", want: `-release must be a path such as /release (got "/release?a")`},
	"release, no hand-off": {args: "-replicas 1 -handoff off -release /release", want: "-release requires a hand-off: not -handoff off"},
	"memory 0":             {args: "-replicas 1 -release-retention 0", want: "-release-retention must not be 0"},
	"memory negative":      {args: "-replicas 1 -release-retention -1s", want: "-release-retention must not be negative (got -1s)"},
	"memory no time":       {args: "-release-retention 60", want: `invalid value "60" for flag -release-retention: parse error`},
	"delay negative":       {args: "-replicas 1 -drain-delay -1s", want: "-drain-delay must not be negative (got -1s)"},
	"delay no time":        {args: "-drain-delay 5", want: `invalid value "5" for flag -drain-delay: parse error`},
	"proxy protocol":       {args: "-replicas 1 -proxy-protocol v2 ", want: `-proxy-protocol must be on or off (got "v2")`},
	"peer without port":    {args: "-peers h:1,h", want: `invalid value "h:1,h" for flag -peers: "h" is not host:port`},
	"peer without host":    {args: "-peers :8001", want: `invalid value ":8001" for flag -peers: ":8001" is not host:port`},
	"proxies none":         {args: "-replicas 1 -proxy-protocol on", want: "-proxy-protocol on requires -trusted-proxies"},
	"proxies no address":   {args: "-trusted-proxies 10.0.0.0/33", want: `invalid value "10.0.0.0/33" for flag -trusted-proxies: "10.0.0.0/33" is no address, no CIDR and not unix`},
	"proxies empty":        {args: "-trusted-proxies 10.0.0.0/8,,", want: `invalid value "10.0.0.0/8,," for flag -trusted-proxies: "" is no address, no CIDR and not unix`},
	"proxies of a zone":    {args: "-trusted-proxies fe80::1%eth0", want: `invalid value "fe80::1%eth0" for flag -trusted-proxies: "fe80::1%eth0" is no address, no CIDR and not unix`},
	"proxies with a port":  {args: "-trusted-proxies 10.0.0.1:80", want: `invalid value "10.0.0.1:80" for flag -trusted-proxies: "10.0.0.1:80" is no address, no CIDR and not unix`},
	"proxies, more bits":   {args: "-trusted-proxies 10.1.0.0/8", want: `invalid value "10.1.0.0/8" for flag -trusted-proxies: "10.1.0.0/8" has bits beyond its length: it would be 10.0.0.0/8`},
	"certificate twice":    {args: "-tls-cert a,b -tls-cert a ", want: `invalid value "a" for flag -tls-cert: "a" is empty or repeated`},
	"key empty":            {args: "-tls-key a,,b ", want: `invalid value "a,,b" for flag -tls-key: "" is empty`},
	"key alone":            {args: "-replicas 1 -tls-key a", want: "-tls-key requires -tls-cert (got a alone)"},
	"TLS version":          {args: "-replicas 1 -tls-cert a -tls-key b -tls-min-version 1.1", want: `-tls-min-version must be 1.2 or 1.3 (got "1.1")`},
	"TLS version alone":    {args: "-replicas 1 -tls-min-version 1.3", want: "-tls-min-version requires -tls-cert (got 1.3 alone)"},
	"client CA alone":      {args: "-replicas 1 -tls-client-ca a", want: "-tls-client-ca requires -tls-cert (got a alone)"},
	"ticket secret alone":  {args: "-replicas 1 -tls-ticket-secret a", want: "-tls-ticket-secret requires -tls-cert (got a alone)"},
	"redirect alone":       {args: "-replicas 1 -redirect :80", want: "-redirect requires -tls-cert (got :80 alone)"},
	"forwarded from":       {args: "-forwarded-from gateway", want: `invalid value "gateway" for flag -forwarded-from: "gateway" is no address, no CIDR and not unix`},
	"proxies mapped":       {args: "-trusted-proxies ::ffff:10.0.0.0/104", want: `invalid value "::ffff:10.0.0.0/104" for flag -trusted-proxies: "::ffff:10.0.0.0/104" must be written as IPv4`},
	"drain negative":       {args: "-replicas 1 -drain-duration -1ms", want: "-drain-duration must not be negative (got -1ms)"},
	"drain no time":        {args: "-drain-duration 1d", want: `invalid value "1d" for flag -drain-duration: parse error`},
	"log format":           {args: "-replicas 1 -log-format xml", want: `-log-format must be text or json (got "xml")`},
	"log level":            {args: "-log-level loud", want: `invalid value "loud" for flag -log-level: slog: level string "loud": unknown name`},
	"unknown flag":         {args: "-verbose", want: "flag provided but not defined: -verbose"},
	"no value":             {args: "-replicas 1 -hold", want: "flag needs an argument: -hold"},
	"bad syntax":           {args: "---hold=1s", want: "bad flag syntax: ---hold=1s"},
	"argument":             {args: "-replicas 1 serve", want: `unexpected argument "serve": the router takes flags only`},
	"environment: number":  {env: map[string]string{"ROUTER_REPLICAS": "four"}, want: `ROUTER_REPLICAS="four": parse error`},
	"environment: port":    {args: "-replicas 1", env: map[string]string{"ROUTER_BACKEND_PORT": "0"}, want: "-backend-port must be 1 to 65535 (got 0)"},
	"environment: time":    {env: map[string]string{"ROUTER_DRAIN_DURATION": "30"}, want: `ROUTER_DRAIN_DURATION="30": parse error`},
	"environment: route":   {args: "-replicas 1", env: map[string]string{"ROUTER_ROUTE": "/a/{namespace} /a"}, want: `-route "/a": it must have one segment {namespace} (got 0)`},
	"environment: level":   {env: map[string]string{"ROUTER_LOG_LEVEL": "loud"}, want: `ROUTER_LOG_LEVEL="loud": slog: level string "loud": unknown name`},
}

func TestBadUsage(t *testing.T) {
	for name, tt := range badUsage {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			err := run(t.Context(), strings.Fields(tt.args), environment(tt.env), &out)
			if err == nil || err.Error() != tt.want {
				t.Errorf("error:\n%v\nwant:\n%s", err, tt.want)
			}
			wantEqual(t, "the exit code", exitCode(err), 2)
			if out.Len() > 0 {
				t.Errorf("output %q, want none", out.String())
			}
		})
	}
}

// TestBadUsageIsComplete fails when a flag is added and badUsage has no case of it.
func TestBadUsageIsComplete(t *testing.T) {
	anything := map[string]bool{"overrides": true} // whatever is wrong with it shows at run time
	flags := (&config{}).flags()
	flags.VisitAll(func(f *flag.Flag) {
		known := anything[f.Name]
		for _, tt := range badUsage {
			known = known || strings.Contains(tt.args, "-"+f.Name+" ") || strings.Contains(tt.args, "-"+f.Name+"=")
		}
		if !known {
			t.Errorf("no bad value of -%s in badUsage", f.Name)
		}
	})
	// Every flag that is not text rejects text, from the environment too.
	flags.VisitAll(func(f *flag.Flag) {
		if f.Value.Set("?") == nil {
			return
		}
		variable := environmentName(f.Name)
		_, err := parseConfig(nil, environment(map[string]string{variable: "?"}), io.Discard)
		if err == nil || !strings.HasPrefix(err.Error(), variable+`="?": `) || exitCode(err) != 2 {
			t.Errorf("error %v with exit code %d, want one of %s and 2", err, exitCode(err), variable)
		}
	})
}

// TestFlagBeatsEnvironment gives every flag in both ways.
func TestFlagBeatsEnvironment(t *testing.T) {
	values := map[string][2]string{ // in the environment, as a flag
		"cordon": {"5", "7"}, "listen": {"h:1", "h:2"}, "admin": {"h:3", "h:4"}, "backends": {"h:5", "h:6"}, "replicas": {"2", "3"},
		"statefulset": {"a", "b"}, "service": {"c", "d"}, "backend-port": {"1", "2"},
		"kube": {"http://h:1", "http://h:2"}, "kube-namespace": {"e", "f"}, "configmap": {"g,g2", "h"}, "configmap-selector": {"i=1", "i=2"},
		"overrides": {"/i", "/j"}, "namespace-from": {"host", "query:doc"}, "route": {"/a/{namespace} /b/{namespace}", "/c/{namespace}"}, "pod-name": {"k", "l"},
		"hold": {"1s", "2s"}, "upgrade-timeout": {"3s", "4s"}, "header-timeout": {"5s", "6s"},
		"max-header-bytes": {"2000", "3000"}, "max-header-fields": {"200", "300"}, "max-sessions": {"1", "2"}, "max-pending-upgrades": {"3", "4"},
		"max-sessions-per-namespace": {"5", "6"}, "max-upgrades-per-second": {"7", "8"}, "max-age": {"9h0m0s", "10h0m0s"},
		"tcp-user-timeout": {"5s", "6s"}, "idle-timeout": {"7s", "8s"}, "move-rate": {"5", "6"}, "move-settle": {"9s", "10s"}, "handoff": {"off", "single"}, "handoff-configmap": {"a", "b"}, "pod-uid": {"u1", "u2"}, "router-pods": {"a=b", "c=d"}, "handoff-proof-timeout": {"11s", "12s"}, "http": {"on", "off"}, "http-move-timeout": {"13s", "14s"}, "drain-delay": {"1s", "2s"}, "drain-duration": {"3s", "4s"},
		"proxy-protocol": {"off", "on"}, "trusted-proxies": {"unix,10.0.0.0/8", "unix"}, "forwarded-from": {"10.0.0.0/8", "unix"}, "peers": {"10.0.0.1:8001,h:8001", "10.0.0.2:8001"},
		"tls-cert": {"a,b", "c"}, "tls-key": {"a,a", "b"}, "tls-min-version": {"1.3", "1.2"}, "tls-client-ca": {"a", "b"}, "tls-ticket-secret": {"a", "b"}, "redirect": {":80", ":81"},
		"release": {"/a", "/b"}, "release-retention": {"5s", "6s"},
		"log-format": {"json", "text"}, "log-level": {"DEBUG", "WARN"},
	}
	(&config{}).flags().VisitAll(func(f *flag.Flag) {
		if _, ok := values[f.Name]; !ok {
			t.Errorf("-%s is not in the table", f.Name)
		}
	})
	for name, value := range values {
		t.Run(name, func(t *testing.T) {
			env := map[string]string{environmentName(name): value[0]}
			if name == "proxy-protocol" {
				env["ROUTER_TRUSTED_PROXIES"] = "unix"
			}
			if name != "tls-cert" && (strings.HasPrefix(name, "tls-") || name == "redirect") {
				env["ROUTER_TLS_CERT"] = "a"
			}
			if name != "backends" && name != "replicas" {
				env["ROUTER_REPLICAS"] = "1"
			}
			wantFlag(t, nil, env, name, value[0])
			wantFlag(t, []string{"-" + name, value[1]}, env, name, value[1])
		})
	}
}

// wantFlag checks what a flag is after args and env were read.
func wantFlag(t *testing.T, args []string, env map[string]string, name, want string) {
	t.Helper()
	got, err := parseConfig(args, environment(env), io.Discard)
	must(t, err)
	c := &config{}
	flags := c.flags() // whose values are the fields of c
	*c = *got
	lists := map[string]string{ // of flag.Func, whose String has nothing
		"peers": strings.Join(c.peers, ","), "configmap": strings.Join(c.configMaps, ","), "route": strings.Join(c.routes, " "),
		"tls-cert": strings.Join(c.certificates.certs, ","), "tls-key": strings.Join(c.certificates.keys, ","),
	}
	if got := flags.Lookup(name).Value.String() + lists[name]; got != want {
		t.Errorf("-%s is %q with %q and %v, want %q", name, got, args, env, want)
	}
}

// TestSpacesInLists: the items of lists with commas may have spaces around them.
func TestSpacesInLists(t *testing.T) {
	for name, want := range map[string]string{
		"configmap": "one,two", "peers": "10.0.0.1:8001,h:8001", "cordon": "2,5", "tls-cert": "/a,/b", "tls-key": "/a,/a",
		"trusted-proxies": "unix,10.0.0.0/8", "forwarded-from": "unix,10.0.0.0/8",
	} {
		env := map[string]string{"ROUTER_REPLICAS": "9", "ROUTER_TLS_CERT": "/c"}
		env[environmentName(name)] = " " + strings.ReplaceAll(want, ",", " , ") + " "
		wantFlag(t, nil, env, name, want)
	}
	backends, err := parseBackends(" h:1 , h:2 ")
	wantEqual(t, "backends", strings.Join(backends, ","), "h:1,h:2")
	must(t, err)
}

func TestDefaultsOfThePlace(t *testing.T) {
	host, err := os.Hostname()
	must(t, err)
	pod := map[string]string{"KUBERNETES_SERVICE_HOST": "10.96.0.1"}
	tests := map[string]struct {
		args string
		env  map[string]string
		kube string
		pod  string
	}{
		"laptop":                  {"", nil, "http://127.0.0.1:8080", host},
		"laptop with a directory": {"-overrides /d", nil, "none", host},
		"pod":                     {"", pod, "in-cluster", host},
		"pod with a directory":    {"-overrides /d", pod, "in-cluster", host},
		"alone":                   {"-kube none", pod, "none", host},
		"as said":                 {"-kube none -overrides /d -pod-name r", pod, "none", "r"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"-replicas", "1"}, strings.Fields(tt.args)...)
			c, err := parseConfig(args, environment(tt.env), io.Discard)
			must(t, err)
			if c.kube != tt.kube || c.podName != tt.pod {
				t.Errorf("kube %q, pod %q; want %q, %q", c.kube, c.podName, tt.kube, tt.pod)
			}
		})
	}
}

// TestPodName: with each -handoff the name is one that can be in a field of the head. That of a
// host is made one.
func TestPodName(t *testing.T) {
	for _, mode := range []string{"all", "single", "off"} {
		args := []string{"-kube", "http://h:1", "-handoff", mode, "-pod-uid", "u1", "-pod-name", "router\r\nX-Evil: 1"}
		if _, err := parseConfig(args, noEnvironment, io.Discard); exitCode(err) != 2 {
			t.Errorf("error %v of -pod-name with -handoff=%s, want one of usage", err, mode)
		}
	}
	for host, want := range map[string]string{
		"router-1.example": "router-1.example", "my_host": "my-host", "-a\r\nb": "a--b", "": "router", "_": "router",
	} {
		wantEqual(t, "the name on the host "+host, podNameOf(host), want)
	}
}

// TestHandoffDefault: the mode is what the place needs, or what was asked for, and never
// less.
func TestHandoffDefault(t *testing.T) {
	pod := map[string]string{
		"KUBERNETES_SERVICE_HOST": "10.96.0.1", "ROUTER_POD_NAME": "router-a", "ROUTER_POD_UID": "u1",
	}
	tests := map[string]struct {
		args string
		env  map[string]string
		want string
	}{
		"laptop":                  {"", nil, "single"},
		"laptop, asked for":       {"-handoff all -pod-name a -pod-uid u", nil, "all"},
		"pod":                     {"", pod, "all"},
		"pod, asked for":          {"-handoff single", pod, "single"},
		"pod with a fixed number": {"-replicas 4", pod, "single"},
		"pod with fixed backends": {"-backends h:1", pod, "single"},
		"pod without API server":  {"-kube none -overrides /d -replicas 4", pod, "single"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c, err := parseConfig(strings.Fields(tt.args), environment(tt.env), io.Discard)
			must(t, err)
			wantEqual(t, "-handoff", c.handoff, tt.want)
			wantEqual(t, "-handoff-configmap", c.handoffObjectName, "router-handoff-backend")
		})
	}
	delete(pod, "ROUTER_POD_UID")
	if _, err := parseConfig(nil, environment(pod), io.Discard); exitCode(err) != 2 {
		t.Errorf("error %v in a pod without -pod-uid, want one of usage", err)
	}
}

// environment is a getenv.
func environment(pairs map[string]string) func(string) string {
	return func(name string) string { return pairs[name] }
}
