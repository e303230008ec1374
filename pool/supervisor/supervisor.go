// Package supervisor is the process outside the export. It owns the socket's name
// and accepts connections; each goes to the server, the confined process that
// serves requests. The supervisor reads nothing that a guest sends.
//
// It has a descriptor of every connection, too, and the in-flight memories of
// what these have in work. So a server may die, or be replaced by a newer binary,
// and the next one goes on with all connections: QEMU itself never reconnects.
//
//	supervisor.go  the supervisor's life: connections and servers come and go
//	messages.go    what a server may say, and when
//	memory.go      in-flight memories: a slot goes from one server's to the next
//	child.go       a server as the supervisor sees it: started, watched, ended
//	peer.go        the process at the other end of a connection
//	shares.go      who gets a place when there are few
//	progress.go    what hangs: a request is logged, a server replaced
//	socket.go      the socket's name: claimed, put back, given up
//	pidfile.go     the pidfile: made, replaced, removed
//	names.go       names in directories that others may write to
//	command.go     the command: what is wrong is said, the rest is started
//	role.go        which process this is, and its environment
//	daemon.go      detached from the caller, who is told how the start went
//	terminal.go    the signals, and what a terminal's end means
//	limits.go      how many connections there are descriptors for
//	null.go        /dev/null, or a file in its place
//	mounts.go      the host's mounts below the export: watched, covered in servers
package supervisor

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops/sandbox"
	"virtfs-proxy-helper/pool"
	"virtfs-proxy-helper/pool/ipc"
	"virtfs-proxy-helper/pool/logging"
	"virtfs-proxy-helper/pool/progress"
)

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

// handOverTime is how long an old server may take to give its connections back
// once the new one serves: as long as requests may take, and their clients to
// read the answers. With the time that a server takes to start that is less than
// 10 s after SIGHUP.
const handOverTime = 5 * time.Second

// noRoomPause is how long a connection waits that the server had no descriptor
// for.
const noRoomPause = 100 * time.Millisecond

// Config is what a supervisor is to do.
type Config struct {
	Path    string // exported directory
	Sandbox sandbox.Config
	Server  pool.Config // is sent to each server
	// Socket is the name to accept connections on. It is owned by UID and GID;
	// -1 is the user that has started a rootless helper.
	Socket   string
	UID, GID int
	// FD is the number of the only connection's descriptor, without a Socket.
	FD             int
	MaxConnections int
	Workers        int  // requests that a server has in the file system at once
	Once           bool // leave with the last connection of Socket
	PIDFile        string
	LogLevel       slog.Level
	Version        string // of this program, for the log
}

// Supervisor's other inputs, which depend on how it was started.
type surroundings struct {
	conn  *os.File     // the only connection; nil with a Socket
	log   *logging.Log // run closes it
	ready func() error // called when connections are taken
}

// supervisor is a Config that runs. All is done on one goroutine (loop); others
// only wait for something and tell it.
type supervisor struct {
	Config
	surroundings
	// export is the directory, O_PATH, that --path was last resolved to.
	export atomic.Pointer[os.File]
	name   *socketName
	events chan any  // accepted, moved, childMessage, ended, started, overdue or retry
	moves  chan move // for the mover; has room for all

	progress     *progress.Memory
	progressFile *os.File // for servers to map
	number       uint32   // of the last server that was started, for its records there

	conns    map[uint32]*conn
	numbered uint64        // connections so far
	free     []uint32      // numbers
	room     chan struct{} // a place for each connection that may come
	shares   shares
	servers  map[*server]bool
	program  *os.File        // that servers are started from
	current  *server         // takes connections; nil while there is none
	starting bool            // a server is being started
	renew    bool            // SIGHUP has come meanwhile
	remount  bool            // mounts below the export have changed meanwhile
	covered  map[string]bool // mounts that the log has told of; lookAtMounts alone uses it
	gone     bool            // the log has told that the export is gone; lookAtMounts alone uses it
	pause    time.Duration

	// exportRemedy is the command that mends the export's owner, "" if that is right.
	// One goroutine at a time that starts a server uses it.
	exportRemedy string

	stopping bool
	stopped  error // what went wrong with that
	once     bool  // leave when no connection is left: there was one
}

// conn is a connection. Its number is its slot in the in-flight memories.
type conn struct {
	fd     int
	raw    bool          // no descriptors can come by it
	number uint64        // in the log, never used again
	sharer *sharer       // whose it is
	server *server       // that serves it; nil while none does
	waited bool          // for a server that had no room for it
	memory *memory       // of the last server that it was given to; nil before the first
	moving bool          // the mover prepares its slot in another memory
	late   progress.Work // that the log has told of
}

// Events.
type (
	accepted struct {
		fd   int
		raw  bool
		peer peer
	}
	moved struct {
		move
		err error
	}
	childMessage struct {
		server *server
		ipc.Message
	}
	ended struct {
		server *server
		err    error
	}
	started struct {
		server  *server
		program *os.File
		export  *os.File
		renewed bool // program and export are new
		err     error
	}
	overdue struct{ server *server } // handing over
	retry   struct{ id uint32 }
	closed  struct{ id uint32 }
)

// run keeps a server until a signal ends it, or the last connection does. An
// error before ready is the caller's to report; a later one is logged, and Told.
func (c *Config) run(around surroundings) error {
	defer around.log.Close()
	ipc.NameProcess(ipc.SupervisorName)
	started := false
	ready := around.ready
	around.ready = func() error {
		err := ready()
		started = err == nil
		return err
	}
	err := c.supervise(around)
	if err != nil && started {
		around.log.Error("the helper ends", "error", err)
		return logging.Told{Err: err}
	}
	return err
}

func (c *Config) supervise(around surroundings) error {
	log := around.log
	export, err := openExport(c.Path)
	if err != nil {
		return err
	}
	uid, gid := c.UID, c.GID
	if Rootless() && c.Socket != "" {
		if uid, gid, err = sandbox.InsideIDs(uid, gid); err != nil {
			return err
		}
	}
	if err := c.fitLimits(log); err != nil {
		return err
	}
	signals := catchSignals()

	sv := &supervisor{
		Config:       *c,
		surroundings: around,
		events:       make(chan any),
		conns:        make(map[uint32]*conn),
		room:         make(chan struct{}, c.MaxConnections),
		moves:        make(chan move, c.MaxConnections),
		servers:      make(map[*server]bool),
		shares:       shares{peers: make(map[string]*sharer)},
	}
	sv.export.Store(export)
	if err := sv.absolutePath(); err != nil {
		return err
	}
	for id := range uint32(c.MaxConnections) {
		sv.free = append(sv.free, uint32(c.MaxConnections)-1-id)
	}
	if sv.progressFile, err = progress.Create(c.MaxConnections); err != nil {
		return err
	}
	if sv.progress, err = progress.Map(sv.progressFile); err != nil {
		return err
	}
	if c.Socket != "" {
		sv.name, err = claimSocket(c.Socket, uid, gid, export, c.Sandbox.WithCaps)
		if err != nil {
			return err
		}
		defer sv.name.release()
	}
	if c.PIDFile != "" {
		file, err := writePIDFile(c.PIDFile, export)
		if err != nil {
			return err
		}
		defer file.remove(log.Logger)
	}
	if sv.program, err = openProgram("/proc/self/exe"); err != nil {
		return err
	}
	if err := c.Sandbox.DropSupervisorPrivileges(); err != nil {
		return err
	}
	remedy, err := sv.ownerRemedy(export)
	if err != nil {
		return err
	}
	sv.setExportRemedy(remedy)
	mounts, err := sandbox.MountsOf(export)
	if err != nil {
		return err
	}
	if sv.current, err = sv.startServer(sv.program, export); err != nil {
		return err
	}
	if c.Sandbox.Sandbox == sandbox.SandboxNamespace {
		go sv.watchMounts(mounts)
	}
	sv.servers[sv.current] = true
	defer sv.killServers() // whatever the reason, none is left
	go sv.move()
	if sv.name != nil {
		if err := sv.name.publish(log.Logger, sv.accept); err != nil {
			return err
		}
	} else {
		sv.room <- struct{}{}
		fd, err := unix.FcntlInt(sv.conn.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return err
		}
		sv.conn.Close()
		// What is there already may have come with descriptors.
		queued, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
		ipc.RefuseDescriptors(fd) // not before Linux 6.16
		sv.add(fd, isRaw(fd) && err == nil && queued == 0, peer{attrs: peerOf(fd).attrs})
	}
	if err := sv.ready(); err != nil {
		return fmt.Errorf("whoever started this is gone: %w", err)
	}
	sv.logStart()
	return sv.loop(signals)
}

// logStart says once what is served, and how.
func (sv *supervisor) logStart() {
	where := []any{"socket", sv.Socket, "max_connections", sv.MaxConnections}
	if sv.name == nil {
		where = []any{"fd", sv.FD}
	}
	sv.log.Info("started", append([]any{"version", sv.Version, "workers", sv.Workers,
		"sandbox", string(sv.Sandbox.Sandbox), "seccomp", string(sv.Sandbox.Seccomp),
		"readonly", sv.Sandbox.ReadOnly, "rootless", Rootless()}, where...)...)
}

func (sv *supervisor) loop(signals <-chan os.Signal) error {
	sv.watch(sv.current)
	var patience <-chan time.Time
	tick := time.NewTimer(tickTime)
	for {
		select {
		case sig := <-signals:
			switch {
			case sv.stopping: // timeout(1) says it twice
			case sig == unix.SIGHUP:
				sv.log.Info("renewing: all connections go to a server " +
					"from the program that is on disk now")
				sv.renew = true
				sv.start(0)
				if sv.name != nil {
					sv.name.look()
				}
			default:
				sv.log.Info("stopping: requests in work are answered", "signal", sig.String())
				sv.stop()
				patience = time.After(ipc.StopTime + time.Second)
			}
		case <-patience:
			sv.log.Warn("stopped with connections that were not answered",
				"connections", len(sv.conns))
			return sv.stopped
		case <-tick.C:
			tick.Reset(sv.tick())
		case event := <-sv.events:
			sv.handle(event)
		}
		if (sv.Once || sv.name == nil) && sv.once && len(sv.conns) == 0 && !sv.stopping {
			sv.log.Info("stopping: the last client has left")
			sv.stop()
			patience = time.After(ipc.StopTime + time.Second)
		}
		if sv.stopping && len(sv.servers) == 0 && !sv.starting {
			return sv.stopped
		}
	}
}

func (sv *supervisor) handle(event any) {
	switch e := event.(type) {
	case accepted:
		sv.admit(e)
	case moved:
		sv.onMoved(e)
	case childMessage:
		sv.onChildMessage(e.server, e.Message)
	case ended:
		sv.serverEnded(e.server, e.err)
	case started:
		sv.serverStarted(e)
	case closed:
		sv.free = append(sv.free, e.id)
		<-sv.room
		sv.admitWaiting()
	case overdue:
		sv.endOverdue(e.server)
	case mountsChanged:
		if !sv.stopping {
			sv.log.Info("mounts below the export have changed: " +
				"all connections go to a server that has them")
			sv.remount = true
			sv.start(0)
		}
	case retry:
		if c := sv.conns[e.id]; c != nil && c.server == nil {
			sv.assign(e.id, c)
		}
	}
}

// add takes a connection that room has been made for.
func (sv *supervisor) add(fd int, raw bool, peer peer) {
	id := sv.free[len(sv.free)-1]
	sv.free = sv.free[:len(sv.free)-1]
	sv.once = true
	sv.numbered++
	c := &conn{fd: fd, raw: raw, number: sv.numbered, sharer: sv.shares.take(peer.key)}
	sv.conns[id] = c
	sv.log.Info("client connected", append([]any{"connection", c.number}, peer.attrs...)...)
	sv.assign(id, c)
}

// assign gives a connection to the current server, if there is one: else the
// next one gets it. No server has it: the last one is dead, or has given it back.
func (sv *supervisor) assign(id uint32, c *conn) {
	c.server = nil
	if sv.current == nil || c.moving {
		return
	}
	if c.memory != sv.current.memory {
		sv.startMove(id, c)
		return
	}
	c.server, c.late = sv.current, progress.Work{}
	sv.progress.Conn(id).End() // what the last server has left there
	// A server that is gone is noticed in time. The loop waits for none.
	n := ipc.NewConn{ID: id, Number: c.number, Peer: c.sharer.number, Raw: c.raw}
	err := c.server.control.SendNewConn(n, c.fd, unix.MSG_DONTWAIT)
	if err != nil && err != unix.EPIPE && err != unix.ECONNRESET {
		sv.retryAssign(id, c, "error", err)
	}
}

// retryAssign gives a connection to the server some time later, which is logged
// once for each connection.
func (sv *supervisor) retryAssign(id uint32, c *conn, because ...any) {
	c.server = nil
	if !c.waited {
		c.waited = true
		sv.log.Warn("connection not yet served", append(because, "connection", c.number)...)
	}
	time.AfterFunc(noRoomPause, func() { sv.events <- retry{id} })
}

// onChildMessage acts on what a server says of its connections, and on nothing
// else: it may be in a guest's hands.
func (sv *supervisor) onChildMessage(s *server, m ipc.Message) {
	if s.state == condemned {
		return
	}
	err := s.state.check(m, func(id uint32) bool {
		return sv.conns[id] != nil && sv.conns[id].server == s
	})
	if err != nil {
		sv.log.Error("killing the server: it speaks out of turn", "error", err, "pid", s.pid())
		s.state = condemned
		s.kill()
		return
	}
	id, _ := m.Conn()
	c := sv.conns[id]
	switch m.Kind {
	case ipc.Ended:
		sv.forget(id, c)
		sv.log.Info("client left", "connection", c.number)
	case ipc.Refused:
		sv.forget(id, c)
		sv.log.Error("connection closed: the server can't serve it", "connection", c.number)
	case ipc.Returned:
		sv.assign(id, c)
	case ipc.NoRoom:
		sv.retryAssign(id, c, "error", "the server has no descriptor left for it")
	}
}

// forget closes a connection, and frees its number and its room when that is done:
// the last close of a descriptor that a client has passed may wait.
func (sv *supervisor) forget(id uint32, c *conn) {
	delete(sv.conns, id)
	sv.shares.give(c.sharer)
	c.memory.release()
	go func() {
		unix.Close(c.fd)
		sv.events <- closed{id}
	}()
}

// start starts a server after a pause, unless that is being done.
func (sv *supervisor) start(pause time.Duration) {
	if sv.starting {
		return
	}
	sv.starting = true
	program, export, renewed := sv.program, sv.export.Load(), sv.renew
	sv.renew, sv.remount = false, false
	time.AfterFunc(pause, func() {
		var err error
		if renewed {
			if program, err = openProgram(executable); err == nil {
				export, err = sv.resolveExport()
			}
		}
		var s *server
		if err == nil {
			s, err = sv.startServer(program, export)
		}
		sv.events <- started{s, program, export, renewed, err}
	})
}

func (sv *supervisor) serverStarted(e started) {
	sv.starting = false
	switch {
	case e.err != nil && e.renewed:
		if e.program != nil {
			e.program.Close()
		}
		if e.export != nil && e.export != sv.export.Load() {
			e.export.Close()
		}
		sv.log.Error("the new server does not start: the old one stays", "error", e.err)
	case e.err != nil && sv.current != nil && !sv.stopping:
		sv.log.Error("no server with the mounts of now starts: the old one stays",
			"error", e.err, "pause", maxPause)
		time.AfterFunc(maxPause, func() { sv.events <- mountsChanged{} })
	case e.err != nil && sv.stopping:
		sv.stopped = e.err
	case e.err != nil:
		sv.pause = min(max(2*sv.pause, minPause), maxPause)
		sv.log.Error("the server does not start: VMs wait", "error", e.err, "pause", sv.pause)
	default:
		if e.renewed {
			sv.program.Close()
			sv.program = e.program
			sv.export.Swap(e.export).Close()
		}
		old := sv.current
		sv.current = e.server
		sv.servers[e.server] = true
		sv.watch(e.server)
		sv.log.Info("serving again", "pid", e.server.pid(), "connections", len(sv.conns))
		for id, c := range sv.conns {
			if c.server == nil {
				sv.assign(id, c)
			}
		}
		if old != nil {
			old.end(ipc.HandOver)
			time.AfterFunc(handOverTime, func() { sv.events <- overdue{old} })
		}
		if sv.stopping {
			e.server.end(ipc.Stop)
		}
	}
	if !sv.stopping && (sv.current == nil || sv.renew || sv.remount) {
		sv.start(sv.pause)
	}
}

// endOverdue takes the connections from an old server that does not give them
// back: its clients do not read their answers, a file system holds a request, or
// the server is stopped or hostile.
func (sv *supervisor) endOverdue(s *server) {
	if !sv.servers[s] || sv.stopping {
		return
	}
	left := 0
	for _, c := range sv.conns {
		if c.server == s {
			left++
		}
	}
	sv.log.Warn("killing the old server: it has not given all connections back",
		"pid", s.pid(), "connections", left, "after", handOverTime)
	s.kill()
}

// serverEnded goes on without a server, whose last word has been heard.
func (sv *supervisor) serverEnded(s *server, err error) {
	delete(sv.servers, s)
	s.state = condemned // a word that comes late is not heard
	s.control.Close()
	s.memory.release()
	lived := time.Since(s.began)
	if s == sv.current {
		sv.current = nil
	}
	lost := 0
	for id, c := range sv.conns {
		if c.server == s {
			lost++
			sv.assign(id, c)
		}
	}
	switch {
	case s.stopped && (err == nil || s.killed):
		return
	case sv.stopping && errors.Is(err, errHeld):
		sv.log.Warn("stopped with a request that a file system does not answer",
			"pid", s.pid(), "connections", lost)
		return
	case sv.stopping:
		sv.stopped = fmt.Errorf("the server died: %w", err)
		return
	case err == nil:
		err = errors.New("it left without being told to")
	}
	if sv.current != nil { // it was handing over
		sv.log.Error("an old server died: the new one goes on",
			"error", err, "pid", s.pid(), "connections", lost)
		return
	}
	if sv.pause = min(max(2*sv.pause, minPause), maxPause); lived > steady {
		sv.pause = 0
	}
	sv.log.Error("the server died: VMs wait for the next one",
		"error", err, "pid", s.pid(), "lived", lived.Round(time.Millisecond),
		"connections", lost, "pause", sv.pause)
	sv.start(sv.pause)
}

// stop lets the servers answer what is in work. One that is being started gets
// its connections first.
func (sv *supervisor) stop() {
	sv.stopping = true
	if sv.name != nil {
		sv.name.release()
	}
	for s := range sv.servers {
		s.end(ipc.Stop)
	}
}

// killServers ends what stop has not.
func (sv *supervisor) killServers() {
	for s := range sv.servers {
		s.cmd.Process.Kill()
	}
}

// isRaw returns whether the kernel refuses descriptors that a client attaches.
func isRaw(fd int) bool {
	passes, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSRIGHTS)
	return err == nil && passes == 0
}

// accept takes connections until the listener is shut down, which it closes
// then. Beyond MaxConnections clients wait in the backlog, and so they do while
// there is no descriptor or memory for them.
func (sv *supervisor) accept(listener int) {
	defer unix.Close(listener)
	var told error // of what accept4 says now
	for {
		// No place is taken before a client is there: another listener's may wait.
		fds := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		}
		select {
		case sv.room <- struct{}{}:
		default:
			sv.log.Warn("as many connections as --max-connections allows: "+
				"more wait until one leaves", "connections", sv.MaxConnections)
			sv.room <- struct{}{}
		}
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		if err == nil {
			told = nil
			sv.events <- accepted{fd, isRaw(fd), peerOf(fd)}
			continue
		}
		<-sv.room
		switch err {
		case unix.EINVAL: // shut down, and no client waits any more
			return
		case unix.EINTR, unix.ECONNABORTED:
		default:
			if err != told {
				told = err
				sv.log.Warn("can't accept a connection yet", "error", err)
			}
			time.Sleep(noRoomPause)
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
