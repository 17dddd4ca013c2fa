//go:build controlplane

package e2e

import (
	"syscall"
	"time"
)

// hardship is a kind of fault that the soak has. It is undone by what begin
// returns.
type hardship struct {
	name        string
	least, most int // seconds that it lasts
	begin       func(*soak) (end func())
}

// hardships are all that the soak chooses from. Not among them are those that
// stop the router itself, unmake writes (etcd restored) or have a memory to be held
// of their own (large events).
func hardships() []hardship {
	return []hardship{
		{"compacted while cut", 2, 8, (*soak).compacted},
		{"API server killed", 2, 10, (*soak).killed},
		{"API server terminated", 5, 10, (*soak).terminated},
		{"API server paused", 2, 26, (*soak).paused},
		{"connections lost", 5, 26, (*soak).lost},
		{"all packets lost", 5, 26, (*soak).allLost},
		{"etcd paused", 2, 18, (*soak).etcdPaused},
		{"etcd killed", 2, 12, (*soak).etcdKilled},
		{"too many requests", 2, 8, (*soak).starved},
		{"token refused", 2, 10, func(s *soak) func() { return s.given("token", "none.of.yours") }},
		{"forbidden", 2, 10, (*soak).forbidden},
		{"forbidden at start", 8, 12, (*soak).withoutRoles},
		{"token gone", 2, 6, func(s *soak) func() { return s.given("token", "") }},
		{"another CA", 2, 10, func(s *soak) func() { return s.given("ca.crt", newAuthority(s.t).pem()) }},
		{"deleted", 2, 10, (*soak).deleted},
		{"replaced", 0, 0, (*soak).deleted},
		{"replaced while cut", 2, 8, (*soak).replacedMeanwhile},
		{"malformed", 2, 6, (*soak).malformed},
		{"link cut", 1, 12, (*soak).cut},
		{"cut every 3 s", 9, 15, (*soak).cutOften},
		{"kubectl proxy restarted", 1, 8, (*soak).proxyRestarted},
	}
}

func (s *soak) killed() (end func()) {
	s.kill("apiserver")
	return func() { s.component("start", "apiserver") }
}

// terminated starts the next API server before the last has ended.
func (s *soak) terminated() (end func()) {
	old := s.pid("apiserver")
	syscall.Kill(old, syscall.SIGTERM)
	s.component("start", "apiserver")
	return func() { syscall.Kill(old, syscall.SIGKILL) }
}

// withoutRoles has an API server that knows no Roles.
func (s *soak) withoutRoles() (end func()) {
	s.kill("apiserver")
	s.component("start", "apiserver", "--runtime-config=rbac.authorization.k8s.io/v1=false")
	return func() {
		s.kill("apiserver")
		s.component("start", "apiserver")
	}
}

func (s *soak) paused() (end func()) {
	s.component("pause", "apiserver")
	return func() { s.component("resume", "apiserver") }
}

func (s *soak) etcdPaused() (end func()) {
	s.component("pause", "etcd")
	return func() { s.component("resume", "etcd") }
}

func (s *soak) etcdKilled() (end func()) {
	s.kill("etcd")
	return func() { s.component("start", "etcd") }
}

func (s *soak) lost() (end func()) { return s.loseConnections(s.pod, s.podGate.addr) }

func (s *soak) allLost() (end func()) { return s.loseAll() }

// cut resets what both routers have of connections, and what they open.
func (s *soak) cut() (end func()) {
	s.podGate.cut(true)
	s.laptopGate.cut(true)
	return s.anew
}

// anew makes both routers connect again.
func (s *soak) anew() {
	s.podGate.cut(false)
	s.laptopGate.cut(false)
}

func (s *soak) cutOften() (end func()) {
	live := func(life time.Duration) {
		s.podGate.live(life)
		s.laptopGate.live(life)
		s.anew()
	}
	live(3 * time.Second)
	return func() { live(0) }
}

// compacted makes etcd forget all that the routers have seen, when they next ask.
func (s *soak) compacted() (end func()) {
	anew := s.cut()
	return func() {
		now, err := s.overrides(s.t.Context())
		if err != nil {
			s.t.Fatal(err)
		}
		s.etcd("kv/compaction", map[string]string{"revision": now.ResourceVersion})
		anew()
	}
}

func (s *soak) starved() (end func()) {
	allow := s.starve()
	asker := s.newAsker(s.token(nil))
	asker.run(8, 0)
	s.podGate.cut(false)
	return func() {
		allow()
		asker.stop()
	}
}

func (s *soak) forbidden() (end func()) {
	s.unbind()
	s.podGate.cut(false)
	return s.bindAgain
}

// given puts something into a file of the account's, and at the end what is right.
func (s *soak) given(file, content string) (end func()) {
	s.files.put(file, content)
	s.podGate.cut(false)
	return func() {
		s.files.put("token", s.token(nil))
		s.files.put("ca.crt", s.ca())
	}
}

func (s *soak) deleted() (end func()) {
	eventually(s.t, 20*time.Second, "the overrides to be deleted", func() error { return s.ledger.remove(s.t.Context()) })
	return func() {
		eventually(s.t, 20*time.Second, "the overrides to be made again", func() error { return s.ledger.create(s.t.Context()) })
	}
}

func (s *soak) replacedMeanwhile() (end func()) {
	anew := s.cut()
	s.deleted()()
	return anew
}

// malformed has entries that change nothing: of a namespace with an override, and
// of one without.
func (s *soak) malformed() (end func()) {
	spoil := func(kept, hashed any) {
		for namespace, value := range map[string]any{soakKept(0): kept, soakHashed(0): hashed} {
			eventually(s.t, 20*time.Second, "an override to be written", func() error {
				return s.ledger.spoil(s.t.Context(), namespace, value)
			})
		}
	}
	spoil("not a backend", "backend-99")
	return func() { spoil(startOwner, nil) }
}

func (s *soak) proxyRestarted() (end func()) {
	s.proxy.cmd.Process.Kill()
	<-s.proxy.done
	return func() { s.proxy = s.kubectlProxy(s.proxyAddress) }
}
