package supervisor

import (
	"fmt"
	"slices"

	"virtfs-proxy-helper/pool/ipc"
)

// state is how far a server has come. What it may say depends on that, for it
// may be in a guest's hands: anything that is not in the table kills it.
type state int

const (
	starting    state = iota
	greeted           // it has this version
	confined          // its filter is supervised, or it has none
	serving           // it has said that it is ready
	handingOver       // it was told to give its connections back
	stopping          // it was told to end them
	condemned         // killed: what it has said before is not heard
)

// rule is what a message has to be like.
type rule struct {
	in         []state
	body       int  // its size; text for any
	conn       bool // it is about a connection that the server has
	descriptor bool // comes with it
}

const text = -1

var afterReady = []state{serving, handingOver, stopping}

// table has a rule for each message that a server may send.
var table = map[ipc.Kind]rule{
	ipc.Hello:    {in: []state{starting}, body: 1},
	ipc.Filter:   {in: []state{greeted}, descriptor: true},
	ipc.Error:    {in: []state{starting, greeted, confined}, body: text},
	ipc.Ready:    {in: []state{confined}},
	ipc.Ended:    {in: afterReady, body: 4, conn: true},
	ipc.NoRoom:   {in: afterReady, body: 4, conn: true},
	ipc.Refused:  {in: afterReady, body: 4, conn: true},
	ipc.Returned: {in: []state{handingOver}, body: 4, conn: true},
}

// check returns what is wrong with a message from a server in that state, which
// has those connections.
func (s state) check(m ipc.Message, has func(id uint32) bool) error {
	r, ok := table[m.Kind]
	switch {
	case !ok:
		return fmt.Errorf("message %q: there is no such message", byte(m.Kind))
	case !slices.Contains(r.in, s):
		return fmt.Errorf("message %q: not now", byte(m.Kind))
	case m.Cut, r.descriptor != (m.FD >= 0):
		return fmt.Errorf("message %q: its descriptors", byte(m.Kind))
	case r.body != text && len(m.Body) != r.body:
		return fmt.Errorf("message %q: %d bytes long", byte(m.Kind), len(m.Body))
	}
	if id, _ := m.Conn(); r.conn && !has(id) {
		return fmt.Errorf("message %q: connection %d, which it has not", byte(m.Kind), id)
	}
	return nil
}
