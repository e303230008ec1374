package supervisor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops/sandbox"
	"virtfs-proxy-helper/pool"
	"virtfs-proxy-helper/pool/ipc"
)

// server is a server process.
type server struct {
	cmd     *exec.Cmd
	control *ipc.Control
	memory  *memory
	began   time.Time // to serve
	state   state     // the starter's, then the loop's
	stopped bool      // told to leave
	killed  bool      // by this supervisor, which has logged why
	loops   loops
}

func (s *server) pid() int { return s.cmd.Process.Pid }

// end asks the server to leave, and does not wait until it hears. Both ways may
// be asked of it, and either may come first.
func (s *server) end(how ipc.Kind) {
	s.stopped = true
	switch {
	case s.state == condemned:
	case how == ipc.HandOver:
		s.state = handingOver
	case s.state == serving:
		s.state = stopping
	}
	go s.control.Send(how, nil, nil, 0)
}

// kill ends the server whatever it does. Its death is not waited for long, even
// where awaitDeath can't tell of it.
func (s *server) kill() {
	s.killed = true
	s.cmd.Process.Kill()
	time.AfterFunc(dyingTime, s.control.Shutdown)
}

// startServer starts a server and waits until it can serve.
func (sv *supervisor) startServer(program, export *os.File) (*server, error) {
	mounts, err := sv.lookAtMounts(export)
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{
		Path: fmt.Sprintf("/proc/self/fd/%d", ipc.ProgramFD),
		Args: []string{ipc.ServerName, sv.Path},
		Env:  environment(RoleServer),
	}
	control, theirs, err := ipc.New()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	memory, err := newMemory(sv.MaxConnections)
	if err == nil {
		sv.number++
		err = control.SendHello(sv.number)
	}
	if err == nil {
		err = control.SendConfig(sv.Server)
	}
	if err != nil {
		control.Close()
		memory.release()
		return nil, err
	}
	cmd.ExtraFiles = ipc.Files{
		Control: theirs, Inflight: memory.file, Progress: sv.progressFile, Program: program,
	}.Extra()
	started := sv.newLoops(sv.number)
	null, err := openNull()
	if err != nil {
		control.Close()
		memory.release()
		return nil, err
	}
	defer null.Close()
	cmd.Stdin = null
	pipes, err := sv.log.ServerPipes(cmd)
	if err != nil {
		control.Close()
		memory.release()
		return nil, err
	}
	// A ^C at the terminal is the supervisor's alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = pool.StartCalm(func() error { return sv.Sandbox.Start(cmd, export, mounts) })
	if err != nil {
		control.Close()
		memory.release()
		pipes.Close()
		return nil, fmt.Errorf("start the server: %w", err)
	}
	pipes.Read(cmd.Process.Pid)
	theirs.Close()
	s := &server{cmd: cmd, control: control, memory: memory, loops: started}
	// One that hangs would keep all others from being started.
	late := time.AfterFunc(StartTime, func() { cmd.Process.Kill() })
	err = sv.awaitReady(s)
	if !late.Stop() {
		err = fmt.Errorf("the server was not ready within %v", StartTime)
	}
	if err != nil {
		control.Close()
		memory.release()
		cmd.Process.Kill() // for one that goes on all the same
		status := errHeld
		select {
		case status = <-s.reap():
		case <-time.After(dyingTime):
		}
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the server died at its start: %v", status)
		}
		if sv.exportRemedy != "" {
			err = fmt.Errorf("%w (the export belongs to an id that no map: has: %s)",
				err, sv.exportRemedy)
		}
		return nil, err
	}
	s.began = time.Now()
	return s, nil
}

// awaitReady waits until the server takes connections.
func (sv *supervisor) awaitReady(s *server) error {
	for {
		m, err := s.control.Recv(1)
		if err != nil {
			return err
		}
		if err := s.state.check(m, nil); err != nil {
			m.Close()
			return fmt.Errorf("the server speaks out of turn: %w", err)
		}
		switch m.Kind {
		case ipc.Hello:
			if other := m.Body[0]; other != ipc.Version {
				return &ipc.VersionError{Other: other}
			}
			s.state = greeted
			if sv.Sandbox.Seccomp == sandbox.SeccompNone {
				s.state = confined
			}
		case ipc.Filter:
			s.state = confined
			violations := os.NewFile(uintptr(m.FD), "violations")
			go sv.Sandbox.Supervise(violations, func(call string) {
				sv.onViolation(s.cmd.Process, call)
			})
		case ipc.Error:
			return errors.New(string(m.Body))
		case ipc.Ready:
			s.state = serving
			s.control.RefuseDescriptors()
			return nil
		}
	}
}

// reap waits for the end of the process, and returns what it ended with.
func (s *server) reap() <-chan error {
	reaped := make(chan error, 1)
	go func() {
		err := s.cmd.Wait()
		if errors.Is(err, exec.ErrWaitDelay) {
			err = nil
		}
		reaped <- err
	}()
	return reaped
}

// onViolation acts on a system call that a server has no use for.
func (sv *supervisor) onViolation(server *os.Process, call string) {
	if sv.Sandbox.Seccomp == sandbox.SeccompLog {
		sv.log.Warn("the server makes a system call that is not on its list",
			"call", call, "pid", server.Pid)
		return
	}
	sv.log.Error("killing the server: it tries a system call that it has no use for",
		"call", call, "pid", server.Pid)
	server.Kill()
}

// watch passes on what a server says and, after its last word, that it has
// ended. No thread of it runs any more then: at most one is left that a file
// system holds in a request, and that dies when it is let go.
//
// The end of the process counts, and not that of its socket alone: another
// process may have the server's end by then.
func (sv *supervisor) watch(s *server) {
	silent, dying, reaped := make(chan struct{}), make(chan struct{}), s.reap()
	go func() {
		defer close(silent)
		for {
			m, err := s.control.Recv(0)
			if err != nil {
				return
			}
			sv.events <- childMessage{s, m}
		}
	}()
	go func() {
		if s.awaitDeath() {
			close(dying)
		}
	}()
	go func() {
		var status error
		gone := false
		select {
		case status = <-reaped:
			gone = true
		case <-dying:
		case <-silent:
		}
		s.control.Shutdown() // what it has said before can still be read
		patience := time.After(dyingTime)
		if !gone {
			select {
			case status = <-reaped:
			case <-patience:
				s.cmd.Process.Kill() // for one that has only closed its control
				status = errHeld
			}
		}
		select {
		case <-silent:
		case <-patience: // a descriptor that it has sent holds the reader
		}
		sv.events <- ended{s, status}
	}()
}

// dyingTime is how long a dying server's threads may take to leave whatever
// they can leave: they take milliseconds.
const dyingTime = time.Second

var errHeld = errors.New("it dies, but a file system that does not answer holds a thread of it")

// awaitDeath returns when the server is dying, or false if that can't be
// waited for: before Linux 6.9. Neither the process nor its socket tells it as
// long as a single thread is held, so another one is waited for: the second,
// which is the Go runtime's monitor, lives as long as the process and uses no
// files.
func (s *server) awaitDeath() bool {
	dir, err := os.Open(fmt.Sprintf("/proc/%d/task", s.pid()))
	if err != nil {
		return false
	}
	threads, err := dir.Readdirnames(2) // in the order of their starts
	dir.Close()
	if err != nil || len(threads) < 2 {
		return false
	}
	tid, err := strconv.Atoi(threads[1])
	if err != nil {
		return false
	}
	fd, err := unix.PidfdOpen(tid, unix.PIDFD_THREAD)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if err != unix.EINTR {
			return n == 1
		}
	}
}
