package supervisor

import (
	"os"

	"virtfs-proxy-helper/pool/inflight"
)

// memory is the in-flight memory of one server. It is used by that, and by each
// connection that was given to it last, which may outlive it; the last user
// closes it. The loop alone counts, once the server has started; before, its starter does.
type memory struct {
	file  *os.File
	users int
}

func newMemory(connections int) (*memory, error) {
	file, err := inflight.Create(connections)
	if err != nil {
		return nil, err
	}
	return &memory{file: file, users: 1}, nil
}

func (m *memory) retain() *memory {
	m.users++
	return m
}

// release may be called of nil.
func (m *memory) release() {
	if m == nil {
		return
	}
	if m.users--; m.users == 0 {
		m.file.Close()
	}
}

// move is a connection's way to a server: its slot in that server's memory is to
// be what it is in the memory of the last one, or empty if there was none.
type move struct {
	id       uint32
	from, to *memory
}

// startMove has the mover prepare a connection's slot for the current server.
func (sv *supervisor) startMove(id uint32, c *conn) {
	c.moving = true
	if c.memory != nil {
		c.memory.retain()
	}
	sv.moves <- move{id, c.memory, sv.current.memory.retain()}
}

// move is the mover. It is a goroutine of its own, as both memories are in the
// hands of servers, and it takes memory to write to one.
func (sv *supervisor) move() {
	for m := range sv.moves {
		var err error
		if m.from != nil {
			err = inflight.Copy(m.to.file, m.from.file, m.id)
		} else {
			err = inflight.Clear(m.to.file, m.id)
		}
		sv.events <- moved{m, err}
	}
}

// onMoved gives a connection to the server that its slot was prepared for, if
// that is the current one still.
func (sv *supervisor) onMoved(e moved) {
	c := sv.conns[e.id] // it is there: no server has it, so none can end it
	c.moving = false
	e.from.release()
	switch {
	case e.err != nil:
		sv.retryAssign(e.id, c, "error", e.err)
	case sv.current != nil && sv.current.memory == e.to:
		c.memory.release()
		c.memory = e.to.retain()
		sv.assign(e.id, c)
	default:
		sv.assign(e.id, c)
	}
	e.to.release()
}
