package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/proc"
	"virtfs-proxy-helper/bench/qemu"
)

// cHelper is where Debian puts the C helper.
const cHelper = "/usr/lib/qemu/virtfs-proxy-helper"

func needHelper(path string) error {
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("%w: the C helper comes with: apt-get install qemu-system-common", err)
	}
	return nil
}

// program is one of the programs that are compared: its processes, and the
// clients of their connections.
type program struct {
	name    string
	export  string // the directory that it serves, if bench has made it; export.log is its stderr
	roots   []int  // process ids of the started processes, or of the peer of a socket
	pids    []int  // process ids of roots and their descendants
	cmds    []*exec.Cmd
	clients []*client
	others  neighbours
	socket  string // the name that it listens on, "" if none
	against string // the program that it is compared to
	isFloor bool
	first   float64 // bytes of memory with one connection, after some traffic
}

// launch describes the processes and connections of a program.
type launch struct {
	name        string
	path        string   // of the binary; empty to connect to socket
	args        []string // before the helper's own
	socket      string
	perClient   bool   // a process for each connection
	export      string // directory to make and serve
	connections int
	at          placement
	against     string
	neighbours  int  // number of further connections, which are not measured
	hang        bool // requests of the neighbours hang
	flood       bool // one more connection floods
}

// start starts the processes of l and connects to them. The caller stops the
// program, even if start fails.
func start(l launch) (p *program, err error) {
	p = &program{name: l.name, export: l.export, against: l.against}
	connect := func(fd int) {
		if len(p.clients) == l.connections { // all but the flood are connected
			p.others.flood = &flood{fd: fd, cpu: l.at.client}
			return
		}
		stagger := time.Duration(len(p.clients)) * time.Millisecond
		p.clients = append(p.clients, newClient(fd, l.at.client, stagger))
	}
	if l.export != "" {
		if err := os.Mkdir(l.export, 0o755); err != nil {
			return p, err
		}
	}
	if l.hang {
		err := p.others.mount(filepath.Join(l.export, hangDir), l.export+".backing")
		if err != nil {
			return p, err
		}
	}
	connections := l.connections
	if l.flood {
		connections++
	}
	socket := l.socket
	switch {
	case l.path == "":
	case l.perClient || connections+l.neighbours == 1:
		for range connections {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return p, err
			}
			theirs := os.NewFile(uintptr(fds[1]), "helper's end")
			connect(fds[0])
			args := append(l.args, "-n", "-p", l.export, "-f", "3")
			err = p.exec(l.path, args, theirs, l.at.server)
			theirs.Close()
			if err != nil {
				return p, err
			}
			if err := p.weighFirst(); err != nil {
				return p, err
			}
		}
		return p, nil
	default:
		socket = l.export + ".socket"
		p.socket = socket
		// All are one peer's, which may not have the last quarter.
		places := fmt.Sprint(2 * (connections + l.neighbours + 4))
		args := append(l.args, "-n", "-p", l.export, "-s", socket, "-u", "0", "-g", "0",
			"--max-connections", places)
		if err := p.exec(l.path, args, nil, l.at.server); err != nil {
			return p, err
		}
	}
	for range connections {
		fd, err := dial(socket, 5*time.Second)
		if err != nil {
			return p, fmt.Errorf("%s: %w%s", l.name, err, p.said())
		}
		connect(fd)
		if l.path == "" && len(p.roots) == 0 {
			cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
			if err != nil {
				return p, err
			}
			p.roots = append(p.roots, int(cred.Pid))
		}
		if err := p.weighFirst(); err != nil {
			return p, err
		}
	}
	for range l.neighbours {
		c, err := qemu.Dial(socket, patience)
		if err != nil {
			return p, fmt.Errorf("%s: %w%s", l.name, err, p.said())
		}
		p.others.clients = append(p.others.clients, c)
	}
	if l.hang {
		if err := p.others.hangThem(); err != nil {
			return p, fmt.Errorf("%s: %w%s", l.name, err, p.said())
		}
	}
	return p, nil
}

// weighFirst sets p.first when there is one connection.
func (p *program) weighFirst() error {
	if len(p.clients) != 1 {
		return nil
	}
	_, _, err := p.exchange(func(int) []request { return slices.Repeat(touchRoot, 1000) }, 0, false)
	p.first = proc.MemoryOf(proc.Descendants(p.roots)).PSS
	return err
}

// exec starts a process that has file, if not nil, as descriptor 3. All its
// threads, and its children, inherit its CPU.
func (p *program) exec(path string, args []string, file *os.File, cpu int) error {
	cmd := exec.Command(path, args...)
	log, err := os.OpenFile(p.export+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it does not outlive bench
	if file != nil {
		cmd.ExtraFiles = []*os.File{file}
	}
	started := make(chan error)
	starter() <- func() {
		var before unix.CPUSet
		err := unix.SchedGetaffinity(0, &before)
		if err == nil {
			err = pinThread(cpu)
		}
		if err == nil {
			err = cmd.Start()
		}
		started <- errors.Join(err, unix.SchedSetaffinity(0, &before))
	}
	if err := <-started; err != nil {
		return err
	}
	p.cmds = append(p.cmds, cmd)
	p.roots = append(p.roots, cmd.Process.Pid)
	return nil
}

// starter runs functions on a thread that never ends: the kernel sends Pdeathsig
// when the thread that has started the process ends.
var starter = sync.OnceValue(func() chan<- func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for f := range work {
			f()
		}
	}()
	return work
})

// dial connects to a name. It waits until a program listens there, up to patience.
func dial(name string, patience time.Duration) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: name})
		if err == nil {
			return fd, nil
		}
		if time.Now().After(deadline) {
			unix.Close(fd)
			return -1, fmt.Errorf("connecting to %s: %w", name, err)
		}
	}
}

// said returns the last lines that the processes wrote on stderr, for an error
// message.
func (p *program) said() string {
	text, _ := os.ReadFile(p.export + ".log")
	if len(text) == 0 {
		return ""
	}
	lines := strings.Split(string(bytes.TrimSpace(text)), "\n")
	return "; its last words:\n" + strings.Join(lines[max(len(lines)-5, 0):], "\n")
}

// stop closes the connections and ends the processes that start has started,
// by force if they don't leave within seconds.
func (p *program) stop() {
	for _, c := range p.clients {
		close(c.work)
	}
	for _, cmd := range p.cmds {
		cmd.Process.Signal(syscall.SIGTERM)
	}
	for _, cmd := range p.cmds {
		force := time.AfterFunc(5*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		force.Stop()
	}
}

// exchange sends requests(i) on every client i, and returns when all are answered.
// It returns the time from the first request to the last answer and, if timed,
// the latencies of each client, in nanoseconds.
func (p *program) exchange(
	requests func(i int) []request, pause time.Duration, timed bool,
) (wall float64, elapsed [][]int64, err error) {
	var done sync.WaitGroup
	elapsed = make([][]int64, len(p.clients))
	jobs := make([]job, len(p.clients))
	longest := time.Duration(0)
	for i := range p.clients {
		jobs[i] = job{requests: requests(i), pause: pause, done: &done}
		if timed {
			elapsed[i] = make([]int64, len(jobs[i].requests))
			jobs[i].elapsed = elapsed[i]
		}
		longest = max(longest, time.Duration(len(jobs[i].requests))*pause)
	}
	// A client blocks in reads without a time limit.
	var late atomic.Bool
	watchdog := time.AfterFunc(longest+30*time.Second, func() {
		late.Store(true)
		for _, c := range p.clients {
			c.qemu.Shutdown()
		}
	})
	defer watchdog.Stop()
	done.Add(len(p.clients))
	for i, c := range p.clients {
		c.work <- jobs[i]
	}
	done.Wait()
	began, ended := int64(math.MaxInt64), int64(0)
	for i, c := range p.clients {
		if c.err != nil {
			if late.Load() {
				c.err = errors.New("no answer for 30 seconds")
			}
			return 0, nil, fmt.Errorf("%s, connection %d: %w%s", p.name, i, c.err, p.said())
		}
		if len(jobs[i].requests) > 0 {
			began, ended = min(began, c.began), max(ended, c.ended)
		}
	}
	return float64(ended - began), elapsed, nil
}

// wrong returns the number of answers of another kind than expected, and a
// description of the first of them.
func (p *program) wrong() (n int, first string) {
	for _, c := range p.clients {
		n += c.wrong
		if first == "" {
			first = c.firstWrong
		}
	}
	return n, first
}
