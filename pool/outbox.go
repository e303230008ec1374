package pool

import "sync"

// outbox sends messages on a goroutine of its own: putting one in never waits,
// for the supervisor may be stopped. Its length is bounded by its user: there is
// one message for each connection, whose number is not used again before that
// has been read.
type outbox[T any] struct {
	send func(T) error

	mu      sync.Mutex
	waiting []T
	sending bool
	empty   sync.Cond // of mu
}

// goneConn says that a connection has been closed.
type goneConn struct {
	id    uint32
	ended bool
}

func newOutbox[T any](send func(T) error) *outbox[T] {
	o := &outbox[T]{send: send}
	o.empty.L = &o.mu
	return o
}

func (o *outbox[T]) put(message T) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.waiting = append(o.waiting, message)
	if !o.sending {
		o.sending = true
		go o.run()
	}
}

func (o *outbox[T]) run() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.waiting) > 0 {
		messages := o.waiting
		o.waiting = nil
		o.mu.Unlock()
		for _, m := range messages {
			o.send(m) // fails without a supervisor, and nobody is to be told then
		}
		o.mu.Lock()
	}
	o.sending = false
	o.empty.Broadcast()
}

// flush waits until all messages are sent.
func (o *outbox[T]) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.sending {
		o.empty.Wait()
	}
}
