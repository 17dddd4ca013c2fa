package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

// maxSaves is how many rooms a release saves at a time.
const maxSaves = 16

// rooms are the namespaces that this backend owns, or has owned.
//
// They do what a backend must do so that the next owner of a namespace begins with all
// that the clients of this one have seen:
//
//   - A room loads its state for its first session, and with that shuts out all earlier
//     owners (store.load). It saves it a moment after a change, and at a release.
//   - A release with step n first refuses new sessions with a lower step, then ends those
//     that are there and waits until they are over, so that nothing changes any more,
//     then saves, and only then is done.
//   - A save that the store refuses ends the sessions: the namespace has a newer owner,
//     of which this backend does not know.
type rooms struct {
	// Static after construction.
	store     store
	saveDelay time.Duration // from a change to its save
	log       *slog.Logger

	ending sync.WaitGroup // goroutines that end sessions after a refused save

	mu     sync.Mutex
	byName map[string]*room // guarded by mu
}

// room is a namespace. Its state is a count; it is in memory only while there are
// sessions, and afterwards until it is saved. For each namespace that was ever here the
// room itself remains: some 200 bytes.
type room struct {
	*rooms
	namespace string

	// transfer has one place, of the goroutine that loads or saves.
	transfer chan struct{}

	// Guarded by mu, which is never held while the store or a client is waited for.
	mu       sync.Mutex
	released int64 // the step of the last release; sessions with a lower one are refused
	step     int64 // the highest one of a session: this backend is the owner by it
	members  map[*member]struct{}
	loaded   bool  // the members have the state; a room without members loads it again
	claimed  int64 // the step with which the state was loaded; it is saved with the same
	count    int64 // the state
	unsaved  bool  // count has changed since the last save
	timer    *time.Timer
}

// member is a session in a room, from before its handshake to its end.
type member struct {
	room *room
	step int64
	left chan struct{} // closed by leave

	// Guarded by room.mu.
	ended bool   // it must not change the state any more
	end   func() // ends the session soon; nil before begin
}

func newRooms(s store, saveDelay time.Duration, log *slog.Logger) *rooms {
	return &rooms{store: s, saveDelay: saveDelay, log: log, byName: map[string]*room{}}
}

// room returns the room of the namespace; it makes one if there is none.
func (rs *rooms) room(namespace string) *room {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	r := rs.byName[namespace]
	if r == nil {
		r = &room{rooms: rs, namespace: namespace, transfer: make(chan struct{}, 1),
			members: map[*member]struct{}{}}
		rs.byName[namespace] = r
	}
	return r
}

// enter adds a session, and returns when the room has its state. It returns a staleError
// if the step is lower than that of a release or of another owner in the store, and the
// error of the store if that fails. The caller calls begin, and leave at the end.
func (rs *rooms) enter(ctx context.Context, namespace string, step int64) (*member, error) {
	r := rs.room(namespace)
	m, err := r.admit(step)
	if err != nil {
		return nil, err
	}
	if err := r.load(ctx); err != nil {
		m.leave()
		return nil, err
	}
	return m, nil
}

// admit adds a session before the state is loaded: so a release waits for it.
func (r *room) admit(step int64) (*member, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if step < r.released {
		return nil, staleError{r.released}
	}
	r.step = max(r.step, step)
	m := &member{room: r, step: step, left: make(chan struct{})}
	r.members[m] = struct{}{}
	return m, nil
}

// begin says how the session can be ended: end begins that and returns, and the session
// leaves soon after. end may be called several times. begin reports false if a release has
// come before: the session must not begin.
func (m *member) begin(end func()) bool {
	m.room.mu.Lock()
	defer m.room.mu.Unlock()
	m.end = end
	return !m.ended
}

// add raises the count and returns it. It reports false, and changes nothing, if the
// session was ended: the client must not get an answer that counts its message.
func (m *member) add() (count int64, ok bool) {
	r := m.room
	r.mu.Lock()
	defer r.mu.Unlock()
	if m.ended {
		return 0, false
	}
	r.count++
	if !r.unsaved {
		r.unsaved = true
		r.saveLater()
	}
	return r.count, true
}

// leave removes a session that changes nothing any more.
func (m *member) leave() {
	r := m.room
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.members, m)
	if len(r.members) == 0 {
		r.loaded = false // another backend may own the namespace before the next one enters
	}
	close(m.left)
}

// acquire waits for the transfer's place. The caller calls yield if err is nil.
func (r *room) acquire(ctx context.Context) error {
	select {
	case r.transfer <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *room) yield() { <-r.transfer }

// load loads the state unless the members have it. What was left unsaved goes first; if
// another owner came in between it is lost, and reported.
func (r *room) load(ctx context.Context) error {
	if err := r.acquire(ctx); err != nil {
		return err
	}
	defer r.yield()
	r.mu.Lock()
	loaded, step := r.loaded, r.step
	r.mu.Unlock()
	if loaded {
		return nil
	}
	if err := r.saveChanges(ctx); err != nil {
		return err
	}
	state, err := r.store.load(ctx, r.namespace, step)
	if err != nil {
		return err
	}
	var count int64
	if state != nil {
		if err := json.Unmarshal(state, &count); err != nil {
			return fmt.Errorf("state of %s: %w", r.namespace, err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.loaded, r.claimed, r.count = true, step, count
	return nil
}

// save saves what has changed, if anything.
func (r *room) save(ctx context.Context) error {
	if err := r.acquire(ctx); err != nil {
		return err
	}
	defer r.yield()
	return r.saveChanges(ctx)
}

// saveChanges is save for the goroutine that has the transfer's place. If the store
// refuses the state for good, saveChanges logs that, drops the state, ends the sessions
// and returns nil: there is nothing left to save.
func (r *room) saveChanges(ctx context.Context) error {
	r.mu.Lock()
	count, step, unsaved := r.count, r.claimed, r.unsaved
	r.mu.Unlock()
	if !unsaved {
		return nil
	}
	state, err := json.Marshal(count)
	if err == nil {
		err = r.store.save(ctx, r.namespace, step, state)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if errors.As(err, new(staleError)) {
		r.log.Error("state lost: the namespace has another owner",
			"namespace", r.namespace, "count", count, "step", step, "error", err.Error())
		r.unsaved = false
		r.endStale()
		return nil
	}
	if err == nil {
		r.unsaved = r.count != count
	}
	if r.timer.Stop(); r.unsaved {
		r.saveLater()
	}
	return err
}

// endStale ends the sessions that have a state which another owner has replaced. Those
// that wait for the state stay: they load it anew. The caller holds mu.
func (r *room) endStale() {
	if !r.loaded {
		return
	}
	r.loaded = false
	members := r.endLocked(func(*member) bool { return true })
	r.ending.Go(func() { endAll(members) })
}

// saveLater saves after the delay, and until that works. The caller holds mu.
func (r *room) saveLater() {
	r.timer = time.AfterFunc(r.saveDelay, func() {
		ctx, cancel := context.WithTimeout(context.Background(), storeTime)
		defer cancel()
		if err := r.save(ctx); err != nil {
			r.log.Warn("cannot save; trying again",
				"namespace", r.namespace, "error", err.Error())
		}
	})
}

// endLocked marks the members that match as ended, and returns them. The caller holds mu,
// and then calls endAll without it.
func (r *room) endLocked(match func(*member) bool) (members []*member) {
	for m := range r.members {
		if match(m) {
			m.ended = true
			members = append(members, m)
		}
	}
	return members
}

// endAll ends all members at the same time, and does not wait until they have left.
func endAll(members []*member) {
	var ends sync.WaitGroup
	for _, m := range members {
		m.room.mu.Lock()
		end := m.end
		m.room.mu.Unlock()
		if end != nil { // else begin returns false
			ends.Go(end)
		}
	}
	ends.Wait()
}

// release gives the namespaces to their next owners, as of this step: it returns nil when
// no session with a lower step is left and their state is saved. It can be called again
// and again, and by several routers at the same time. A late call, with a step at which
// this backend owns the namespace once more, ends no session.
//
// After an error the namespaces are not released; their sessions are refused all the same.
func (rs *rooms) release(ctx context.Context, namespaces []string, step int64) error {
	var leaving []*member
	for _, namespace := range namespaces {
		leaving = append(leaving, rs.room(namespace).refuse(step)...)
	}
	endAll(leaving)
	for _, m := range leaving {
		select {
		case <-m.left:
		case <-ctx.Done():
			return fmt.Errorf("a session of %s has not ended", m.room.namespace)
		}
	}
	return rs.saveAll(ctx, namespaces)
}

// refuse refuses sessions with a lower step from now on, and returns those that are there.
func (r *room) refuse(step int64) []*member {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.released = max(r.released, step)
	return r.endLocked(func(m *member) bool { return m.step < step })
}

// saveAll saves the rooms of the namespaces, maxSaves at a time. It tries all of them.
func (rs *rooms) saveAll(ctx context.Context, namespaces []string) error {
	var saves sync.WaitGroup
	var failed error
	var failures int
	var mu sync.Mutex // of failed and failures
	places := make(chan struct{}, maxSaves)
	for _, namespace := range namespaces {
		places <- struct{}{}
		saves.Go(func() {
			defer func() { <-places }()
			if err := rs.room(namespace).save(ctx); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed, failures = fmt.Errorf("save %s: %w", namespace, err), failures+1
			}
		})
	}
	saves.Wait()
	if failures > 1 {
		failed = fmt.Errorf("%w (and %d more)", failed, failures-1)
	}
	return failed
}

// close saves everything. The caller has ended all sessions.
func (rs *rooms) close(ctx context.Context) error {
	rs.mu.Lock()
	namespaces := slices.Collect(maps.Keys(rs.byName))
	rs.mu.Unlock()
	err := rs.saveAll(ctx, namespaces)
	rs.ending.Wait()
	return err
}
