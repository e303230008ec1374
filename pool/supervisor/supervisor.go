// Package keeper is the process outside the export. It owns the socket's name
// and accepts connections; each goes to the server, the confined process that
// serves requests. The keeper reads nothing that a guest sends.
//
// It has a descriptor of every connection, too, and the journal of what they
// have in work. So a server may die, or be replaced by a newer binary, and the
// next one goes on with all connections: QEMU itself never reconnects.
//
//	supervisor.go  the keeper's life: connections and servers come and go
//	child.go     a server as the keeper sees it: started, watched, ended
//	socket.go     the socket's name: claimed, put back, given up
//	ipc.go       the socket pair between keeper and server
//	daemon.go    detached from the caller, who is told how the start went
package supervisor

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops/sandbox"
	"virtfs-proxy-helper/pool/inflight"
)

// StopTime is how long requests in work may take after SIGTERM.
const StopTime = 10 * time.Second

// StartTime is how long a server may take until it is ready: hundreds of times
// what it does.
const StartTime = 10 * time.Second

// How long to wait before a server is started again: not at all if the last
// one lived for steady, else twice as long as the time before.
const (
	steady   = time.Second / 2
	minPause = 10 * time.Millisecond
	maxPause = 5 * time.Second
)

// noRoomPause is how long a connection waits that the server had no descriptor
// for.
const noRoomPause = 100 * time.Millisecond

// Config is what a keeper is to do.
type Config struct {
	Export         *os.File // the directory, O_PATH: each server gets the same one
	Confine        sandbox.Config
	Socket         string   // name to accept connections on, owned by
	UID, GID       int      // or
	Conn           *os.File // the only connection
	MaxConnections int
	Once           bool // leave with the last connection
	PIDFile        string

	Program string                         // that runs, and that SIGHUP starts a server of
	Server  func(program string) *exec.Cmd // starts a server
	Output  func() io.Writer               // for what a server prints
	Log     *slog.Logger
	Ready   func() error // called when connections are taken
}

// keeper is a Config that runs. All is done on one goroutine (loop); others
// only wait for something and tell it.
type keeper struct {
	Config
	name    *Name
	journal *os.File
	events  chan any // accepted, told, ended or started

	conns   map[uint32]*conn
	free    []uint32      // numbers
	room    chan struct{} // a place for each connection that may come
	servers map[*server]bool
	program *os.File // that servers are started from
	current *server  // takes connections; nil while there is none
	turning bool     // a server is being started
	renew   bool     // SIGHUP has come meanwhile
	pause   time.Duration

	stopping bool
	stopped  error // what went wrong with that
	once     bool  // leave when no connection is left: there was one
}

// conn is a connection. Its number is its slot in the journal.
type conn struct {
	fd     int
	server *server // that serves it; nil while none does
}

// Events.
type (
	accepted struct{ fd int }
	told     struct {
		server *server
		message
	}
	ended struct {
		server *server
		err    error
	}
	started struct {
		server  *server
		program *os.File
		renewed bool
		err     error
	}
	retry struct{ id uint32 }
)

// Run keeps a server until a signal ends it, or the last connection does. An
// error before Ready is one of starting.
func (c *Config) Run() error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)

	k := &keeper{
		Config:  *c,
		events:  make(chan any),
		conns:   make(map[uint32]*conn),
		room:    make(chan struct{}, c.MaxConnections),
		servers: make(map[*server]bool),
	}
	for id := range uint32(c.MaxConnections) {
		k.free = append(k.free, uint32(c.MaxConnections)-1-id)
	}
	var err error
	if k.journal, err = inflight.Create(c.MaxConnections); err != nil {
		return err
	}
	if c.Socket != "" {
		if k.name, err = Claim(c.Socket, c.UID, c.GID); err != nil {
			return err
		}
		defer k.name.Release()
	}
	if c.PIDFile != "" {
		if err := writePIDFile(c.PIDFile); err != nil {
			return err
		}
		defer os.Remove(c.PIDFile)
	}
	if k.program, err = openProgram("/proc/self/exe"); err != nil {
		return err
	}
	if err := c.Confine.Keep(); err != nil {
		return err
	}
	if k.current, err = k.startServer(k.program); err != nil {
		return err
	}
	k.servers[k.current] = true
	defer k.killServers() // whatever the reason, none is left
	if k.name != nil {
		if err := k.name.Publish(c.Log); err != nil {
			return err
		}
		go k.accept()
	} else {
		k.room <- struct{}{}
		fd, err := unix.FcntlInt(c.Conn.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		c.Conn.Close()
		k.add(fd)
	}
	if err := c.Ready(); err != nil {
		return fmt.Errorf("whoever started this is gone: %w", err)
	}
	return k.loop(signals)
}

func (k *keeper) loop(signals <-chan os.Signal) error {
	k.watch(k.current)
	var patience <-chan time.Time
	for {
		select {
		case sig := <-signals:
			switch {
			case k.stopping: // timeout(1) says it twice
			case sig == unix.SIGHUP:
				k.Log.Info("renewing: all connections go to a server from the program that is on disk now")
				k.renew = true
				k.start(0)
			default:
				k.Log.Info("stopping: requests in work are answered", "signal", sig.String())
				k.stop()
				patience = time.After(StopTime + time.Second)
			}
		case <-patience:
			return errors.New("stopped with requests in work")
		case event := <-k.events:
			k.handle(event)
		}
		if k.Once && k.once && len(k.conns) == 0 && !k.stopping {
			k.Log.Info("stopping: the last client has left")
			k.stop()
			patience = time.After(StopTime + time.Second)
		}
		if k.stopping && len(k.servers) == 0 && !k.turning {
			return k.stopped
		}
	}
}

func (k *keeper) handle(event any) {
	switch e := event.(type) {
	case accepted:
		k.add(e.fd)
	case told:
		k.hear(e.server, e.message)
	case ended:
		k.serverEnded(e.server, e.err)
	case started:
		k.serverStarted(e)
	case retry:
		if c := k.conns[e.id]; c != nil && c.server == nil {
			k.give(e.id, c)
		}
	}
}

// add takes a connection that room has been made for.
func (k *keeper) add(fd int) {
	id := k.free[len(k.free)-1]
	if err := inflight.Clear(k.journal, id); err != nil {
		k.Log.Error("connection refused", "error", fmt.Errorf("clear its journal: %w", err))
		unix.Close(fd)
		<-k.room
		return
	}
	k.free = k.free[:len(k.free)-1]
	k.once = true
	c := &conn{fd: fd}
	k.conns[id] = c
	k.Log.Info("client connected", "connection", id)
	k.give(id, c)
}

// give gives a connection to the current server, if there is one: else the
// next one gets it.
func (k *keeper) give(id uint32, c *conn) {
	c.server = k.current
	if c.server == nil {
		return
	}
	// A server that is gone is noticed in time. The loop waits for none.
	err := c.server.control.sendConn(msgConn, id, c.fd, unix.MSG_DONTWAIT)
	if err != nil && err != unix.EPIPE && err != unix.ECONNRESET {
		k.Log.Warn("connection not yet served", "connection", id, "error", err)
		k.giveLater(id, c)
	}
}

func (k *keeper) giveLater(id uint32, c *conn) {
	c.server = nil
	time.AfterFunc(noRoomPause, func() { k.events <- retry{id} })
}

// hear acts on what a server says of its connections, and on nothing else: it
// may be in a guest's hands.
func (k *keeper) hear(s *server, m message) {
	id, ok := m.conn()
	c := k.conns[id]
	if !ok || c == nil || c.server != s {
		k.Log.Error("killing the server: it speaks of a connection that it has not", "pid", s.pid())
		s.cmd.Process.Kill()
		return
	}
	switch m.kind {
	case msgEnded:
		delete(k.conns, id)
		k.free = append(k.free, id)
		unix.Close(c.fd)
		<-k.room
		k.Log.Info("client left", "connection", id)
	case msgReturned:
		k.give(id, c)
	case msgNoRoom:
		k.Log.Warn("the server has no descriptor left for a connection", "connection", id)
		k.giveLater(id, c)
	}
}

// start starts a server after a pause, unless that is being done.
func (k *keeper) start(pause time.Duration) {
	if k.turning {
		return
	}
	k.turning = true
	program, renewed := k.program, k.renew
	k.renew = false
	time.AfterFunc(pause, func() {
		var err error
		if renewed {
			program, err = openProgram(k.Program)
		}
		var s *server
		if err == nil {
			s, err = k.startServer(program)
		}
		k.events <- started{s, program, renewed, err}
	})
}

func (k *keeper) serverStarted(e started) {
	k.turning = false
	switch {
	case e.err != nil && e.renewed:
		if e.program != nil {
			e.program.Close()
		}
		k.Log.Error("the new server does not start: the old one stays", "error", e.err)
	case e.err != nil && k.stopping:
		k.stopped = e.err
	case e.err != nil:
		k.pause = min(max(2*k.pause, minPause), maxPause)
		k.Log.Error("the server does not start: VMs wait", "error", e.err, "pause", k.pause)
	default:
		if e.renewed {
			k.program.Close()
			k.program = e.program
		}
		old := k.current
		k.current = e.server
		k.servers[e.server] = true
		k.watch(e.server)
		k.Log.Info("serving again", "pid", e.server.pid(), "connections", len(k.conns))
		for id, c := range k.conns {
			if c.server == nil {
				k.give(id, c)
			}
		}
		if old != nil {
			old.end(msgHandOver)
		}
		if k.stopping {
			e.server.end(msgStop)
		}
	}
	if !k.stopping && (k.current == nil || k.renew) {
		k.start(k.pause)
	}
}

// serverEnded goes on without a server, whose last word has been heard.
func (k *keeper) serverEnded(s *server, err error) {
	delete(k.servers, s)
	s.control.Close()
	lived := time.Since(s.began)
	if s == k.current {
		k.current = nil
	}
	lost := 0
	for id, c := range k.conns {
		if c.server == s {
			lost++
			k.give(id, c)
		}
	}
	switch {
	case s.stopped && err == nil:
		return
	case k.stopping:
		k.stopped = fmt.Errorf("the server died: %w", err)
		return
	case err == nil:
		err = errors.New("it left without being told to")
	}
	if k.current != nil { // it was handing over
		k.Log.Error("an old server died: the new one goes on", "error", err, "pid", s.pid(), "connections", lost)
		return
	}
	if k.pause = min(max(2*k.pause, minPause), maxPause); lived > steady {
		k.pause = 0
	}
	k.Log.Error("the server died: VMs wait for the next one", "error", err, "pid", s.pid(), "lived", lived.Round(time.Millisecond), "connections", lost, "pause", k.pause)
	k.start(k.pause)
}

// stop lets the servers answer what is in work. One that is being started gets
// its connections first.
func (k *keeper) stop() {
	k.stopping = true
	if k.name != nil {
		k.name.Release()
	}
	for s := range k.servers {
		s.end(msgStop)
	}
}

// killServers ends what stop has not.
func (k *keeper) killServers() {
	for s := range k.servers {
		s.cmd.Process.Kill()
	}
}

// accept takes connections until the listener is shut down. Beyond
// MaxConnections clients wait in the backlog, and so they do while there is no
// descriptor or memory for them.
func (k *keeper) accept() {
	for {
		select {
		case k.room <- struct{}{}:
		default:
			k.Log.Warn("as many connections as --max-connections allows: more wait until one leaves", "connections", k.MaxConnections)
			k.room <- struct{}{}
		}
		for {
			fd, _, err := unix.Accept4(k.name.Listener, unix.SOCK_CLOEXEC)
			if err == nil {
				k.events <- accepted{fd}
				break
			}
			switch err {
			case unix.EINVAL: // Release has shut the listener down
				return
			case unix.EINTR, unix.ECONNABORTED:
			default:
				k.Log.Warn("can't accept a connection yet", "error", err)
				time.Sleep(noRoomPause)
			}
		}
	}
}

// openProgram returns a program that is to be started by its descriptor: its
// name may hold another version by now.
func openProgram(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open the program", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func writePIDFile(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return fmt.Errorf("--pidfile: %w", err)
	}
	_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("--pidfile: %w", err)
	}
	return nil
}
