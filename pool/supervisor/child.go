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
	"virtfs-proxy-helper/pool/ipc"
)

// server is a server process.
type server struct {
	cmd     *exec.Cmd
	control *ipc.Control
	memory  *memory
	began   time.Time
	stopped bool // told to leave
	killed  bool // by this supervisor, which has logged why
	loops   loops
}

func (s *server) pid() int { return s.cmd.Process.Pid }

// end asks the server to leave, and does not wait until it hears.
func (s *server) end(how ipc.Kind) {
	s.stopped = true
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
func (sv *supervisor) startServer(program *os.File) (*server, error) {
	cmd := self(fmt.Sprintf("/proc/self/fd/%d", ipc.ProgramFD), RoleServer)
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
	if err != nil {
		control.Close()
		memory.release()
		return nil, err
	}
	cmd.ExtraFiles = ipc.Files{
		Control: theirs, Inflight: memory.file, Progress: sv.progressFile, Program: program,
	}.Extra()
	started := sv.newLoops(sv.number)
	pipes, err := sv.log.ServerPipes(cmd)
	if err != nil {
		control.Close()
		memory.release()
		return nil, err
	}
	// A ^C at the terminal is the supervisor's alone.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := sv.Sandbox.Start(cmd, sv.export); err != nil {
		control.Close()
		memory.release()
		pipes.Close()
		return nil, fmt.Errorf("start the server: %w", err)
	}
	pipes.Read(cmd.Process.Pid)
	theirs.Close()
	supervise := func(violations *os.File) {
		go sv.Sandbox.Supervise(violations, func(call string) { sv.onViolation(cmd.Process, call) })
	}
	// One that hangs would keep all others from being started.
	late := time.AfterFunc(StartTime, func() { cmd.Process.Kill() })
	err = control.AwaitReady(supervise)
	if !late.Stop() {
		err = fmt.Errorf("the server was not ready within %v", StartTime)
	}
	if err != nil {
		control.Close()
		memory.release()
		// It may go on without its control.
		dying := time.AfterFunc(dyingTime, func() { cmd.Process.Kill() })
		status := cmd.Wait()
		dying.Stop()
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("the server died at its start: %v", status)
		}
		return nil, err
	}
	return &server{
		cmd: cmd, control: control, memory: memory, began: time.Now(), loops: started,
	}, nil
}

// onViolation acts on a system call that a server has no use for.
func (sv *supervisor) onViolation(server *os.Process, call string) {
	if sv.Sandbox.Seccomp == sandbox.SeccompLog {
		sv.log.Warn("the server makes a system call that is not on its list", "call", call, "pid", server.Pid)
		return
	}
	sv.log.Error("killing the server: it tries a system call that it has no use for", "call", call, "pid", server.Pid)
	server.Kill()
}

// watch passes on what a server says and, after its last word, that it has
// ended. No thread of it runs any more then: at most one is left that a file
// system holds in a request, and that dies when it is let go.
func (sv *supervisor) watch(s *server) {
	reaped := make(chan error, 1)
	go func() {
		if s.awaitDeath() {
			s.control.Shutdown() // what it has said before can still be read
		}
	}()
	go func() {
		for {
			m, err := s.control.Recv()
			if err != nil {
				break
			}
			sv.events <- childMessage{s, m}
		}
		go func() { reaped <- s.cmd.Wait() }()
		select {
		case err := <-reaped:
			sv.events <- ended{s, err}
		case <-time.After(dyingTime):
			s.cmd.Process.Kill() // for one that has only closed its control
			sv.events <- ended{s, errHeld}
		}
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
