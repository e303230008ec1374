// Package helpertest runs a proxy helper, this one or QEMU's own in C, for
// tests that observe it from outside the process.
//
//	helpertest.go  the binaries; processes that a test starts and ends
//	ways.go        every way of starting our helper, and tests in each of them
//	faults.go      the cases of such tests that are known to fail today
//	client.go      QEMU's side of a connection: package qemu, for tests
//	proc.go        a process as /proc shows it
//	user.go        an ordinary user to start them as
//	need.go        requirements of tests; a test is skipped where they are not met
//
// Nothing here waits for a fixed time: conditions are polled for, up to
// Patience, and then the test fails.
package helpertest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/proc"
	"virtfs-proxy-helper/bench/qemu"
)

// Patience bounds every wait. It is no measure of speed: only a process that
// hangs takes so long. The environment variable VIRTFS_TEST_PATIENCE is a factor
// for emulated machines.
var Patience = patience()

func patience() time.Duration {
	factor, err := strconv.Atoi(os.Getenv("VIRTFS_TEST_PATIENCE"))
	if err != nil || factor < 1 {
		factor = 1
	}
	return time.Duration(factor) * qemu.Patience
}

// CPath is where Debian puts the C helper, the reference for every answer.
const CPath = "/usr/lib/qemu/virtfs-proxy-helper"

var built struct {
	sync.Mutex
	dir, path string
	err       error
}

// Main is the body of TestMain: it removes the binary that Ours has built.
func Main(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// Ours returns the path of this repository's helper, which is built once, with
// the race detector if the test has it. The environment variable HELPER
// overrides the path.
func Ours(tb testing.TB) string {
	tb.Helper()
	NeedRoot(tb)
	if path := os.Getenv("HELPER"); path != "" {
		return path
	}
	built.Lock()
	defer built.Unlock()
	if built.dir == "" {
		if built.dir, built.err = os.MkdirTemp("", "helpertest"); built.err == nil {
			built.err = os.Chmod(built.dir, 0o755) // for users without privilege
			built.path = filepath.Join(built.dir, "virtfs-proxy-helper")
			args := []string{"build", "-o", built.path}
			if raceEnabled {
				args = append(args, "-race")
			}
			build := exec.Command("go", append(args, "virtfs-proxy-helper")...)
			if out, err := build.CombinedOutput(); err != nil {
				built.err = fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
			}
		}
	}
	if built.err != nil {
		tb.Fatal(built.err)
	}
	return built.path
}

// C returns the path of the C helper.
func C(tb testing.TB) string {
	tb.Helper()
	NeedRoot(tb)
	NeedProgram(tb, CPath, "qemu-system-common")
	return CPath
}

// Eventually waits until ok returns true.
func Eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(Patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("waited %v in vain: %s", Patience, what)
		}
	}
}

// Command is a process to start.
type Command struct {
	Path  string
	Args  []string
	Files []*os.File          // descriptors from 3 on; Start closes them in this process
	Cred  *syscall.Credential // nil means root without supplementary groups
	Env   []string
	Dir   string
	Stdin string // a file; /dev/null, if empty
}

// Process is a process that Start has started. It is terminated when the test
// ends. The test fails if the process has died before, or has printed a panic or
// a data race.
type Process struct {
	PID int

	tb      testing.TB
	proc    *os.Process
	state   *os.ProcessState // exit status; set before exited is closed
	log     string           // name of the file that holds the output
	sync    func()           // completes log, if not nil
	exited  chan struct{}    // closed when the process has ended
	allowed bool             // the process may end before the test does
	leaves  bool             // the process may exit with status 0 after its only client
}

// Start starts a process and writes its output to a file.
func Start(tb testing.TB, c Command) *Process {
	tb.Helper()
	NeedRoot(tb) // for its identity
	log, err := os.CreateTemp(tb.TempDir(), "log")
	if err != nil {
		tb.Fatal(err)
	}
	defer log.Close()
	if c.Cred == nil {
		c.Cred = &syscall.Credential{}
	}
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Stdout, cmd.Stderr = log, log
	if c.Stdin != "" {
		stdin, err := os.OpenFile(c.Stdin, os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			tb.Fatal(err)
		}
		defer stdin.Close()
		cmd.Stdin = stdin
	}
	cmd.ExtraFiles = c.Files
	cmd.Env = append(os.Environ(), c.Env...)
	cmd.Dir = c.Dir
	// The process does not outlive the test binary, even if that is killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c.Cred, Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	for _, f := range c.Files {
		f.Close()
	}
	return own(tb, cmd.Process, log.Name())
}

// own returns a child of this process, whose output is in log, as a Process.
func own(tb testing.TB, proc *os.Process, log string) *Process {
	p := &Process{PID: proc.Pid, tb: tb, proc: proc, log: log, exited: make(chan struct{})}
	go func() {
		p.state, _ = proc.Wait()
		close(p.exited)
	}()
	tb.Cleanup(p.stop)
	return p
}

// Output returns what the process has printed so far.
func (p *Process) Output() string {
	if p.sync != nil {
		p.sync()
	}
	b, err := os.ReadFile(p.log)
	if err != nil {
		p.tb.Fatal(err)
	}
	return string(b)
}

// Logged reports whether the process has printed text.
func (p *Process) Logged(text string) bool { return strings.Contains(p.Output(), text) }

// Signal sends a signal that may end the process.
func (p *Process) Signal(sig syscall.Signal) {
	p.tb.Helper()
	p.allowed = true
	if err := p.proc.Signal(sig); err != nil {
		p.tb.Fatalf("signal %v: %v\n%s", sig, err, p.Output())
	}
}

// Wait waits for the end of the process and returns its exit status, -1 if a
// signal ended it.
func (p *Process) Wait() int {
	p.tb.Helper()
	p.allowed = true
	select {
	case <-p.exited:
	case <-time.After(Patience):
		p.tb.Fatalf("process %d has not ended\n%s", p.PID, p.Output())
	}
	return p.state.ExitCode()
}

// Alive reports whether the process has not ended.
func (p *Process) Alive() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// Server returns the process id of the server: the child of our supervisor.
func (p *Process) Server() int {
	p.tb.Helper()
	var pid int
	Eventually(p.tb, "the supervisor has a server", func() bool {
		pids := Children(p.PID)
		if len(pids) == 1 {
			pid = pids[0]
		}
		return len(pids) == 1
	})
	return pid
}

func (p *Process) stop() {
	if !p.Alive() && !p.allowed && !(p.leaves && p.state.Success()) {
		p.tb.Errorf("the helper died: %v\n%s", p.state, p.Output())
	}
	server := Children(p.PID)
	p.proc.Signal(unix.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(Patience):
		p.tb.Errorf("process %d does not end on SIGTERM", p.PID)
		for _, pid := range append(server, p.PID) {
			unix.Kill(pid, unix.SIGKILL)
		}
		<-p.exited
	}
	output := p.Output()
	if bad := proc.Faults(output); bad != "" {
		p.tb.Errorf("the helper printed:\n%s", bad)
	}
	if p.tb.Failed() {
		p.tb.Logf("process %d printed:\n%s", p.PID, output)
	}
}

// Run runs a command to its end and returns its exit status and output. A
// daemon that the command leaves must not write to that output.
func Run(tb testing.TB, c Command) (status int, output string) {
	tb.Helper()
	p := Start(tb, c)
	status = p.Wait()
	return status, p.Output()
}

// Pair starts a helper of dir, as QEMU does for sock_fd=, and returns the
// client on the other end of the socket pair.
func Pair(tb testing.TB, path, dir string, options ...string) (*Process, *Client) {
	tb.Helper()
	ours, theirs := SocketPair(tb)
	p := Start(tb, Command{
		Path:  path,
		Args:  append([]string{"-n", "-p", dir, "-f", "3"}, options...),
		Files: []*os.File{theirs},
	})
	p.leaves = true
	return p, NewClient(tb, ours)
}

// SocketPair returns both ends of a connection, which end with exec.
func SocketPair(tb testing.TB) (a, b *os.File) {
	tb.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "client's end"), os.NewFile(uintptr(fds[1]), "helper's end")
}

// Listen starts a helper of dir that listens on a name, which it returns.
func Listen(tb testing.TB, path, dir string, options ...string) (*Process, string) {
	tb.Helper()
	name := filepath.Join(ShortDir(tb), "socket")
	p := Start(tb, Command{
		Path: path,
		Args: append([]string{"-n", "-p", dir, "-s", name, "-u", "0", "-g", "0"}, options...),
	})
	AwaitName(tb, p, name)
	return p, name
}

// AwaitName waits until p listens on name. It tries to connect a socket of the
// wrong type, which the helper does not notice.
func AwaitName(tb testing.TB, p *Process, name string) {
	tb.Helper()
	Eventually(tb, "the helper listens on "+name, func() bool {
		if !p.Alive() {
			tb.Fatalf("the helper has ended\n%s", p.Output())
		}
		return Listening(tb, name)
	})
}

// Listening reports whether some process has the socket of that name.
func Listening(tb testing.TB, name string) bool {
	tb.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer unix.Close(fd)
	return unix.Connect(fd, &unix.SockaddrUnix{Name: name}) == unix.EPROTOTYPE && listens(name)
}

// listens reports whether listen(2), which follows bind(2), has been called for the
// name's socket: the kernel's table shows it with the flag SO_ACCEPTCON.
func listens(name string) bool {
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return false
	}
	var st unix.Stat_t
	if unix.Stat(name, &st) != nil {
		return false
	}
	for line := range bytes.Lines(table) {
		f := bytes.Fields(line)
		if len(f) == 8 && string(f[3]) == "00010000" && isBoundTo(string(f[7]), &st) {
			return true
		}
	}
	return false
}

// isBoundTo reports whether path, as bound, is the socket st: our helper binds a
// private name.
func isBoundTo(path string, st *unix.Stat_t) bool {
	var is unix.Stat_t
	return unix.Stat(path, &is) == nil && is.Ino == st.Ino && is.Dev == st.Dev
}

// ShortDir returns a directory whose name is short enough for sockets in it. The
// name of TempDir is longer, as it includes the test's.
func ShortDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "t")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Tmpfs mounts a tmpfs for the test and returns its directory.
func Tmpfs(tb testing.TB) string {
	tb.Helper()
	NeedRoot(tb)
	dir := ShortDir(tb)
	if err := unix.Mount("none", dir, "tmpfs", 0, "mode=755"); err != nil {
		tb.Fatalf("mount a tmpfs: %v", err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			tb.Error(err)
		}
	})
	return dir
}
