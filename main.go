// Virtfs-proxy-helper is the privileged helper behind QEMU's "-fsdev proxy": a
// drop-in replacement of QEMU's own that serves many VMs on one socket.
//
// It runs as two processes, started one by the other from this file:
//
//	supervisor  outside the export: owns the socket's name, accepts connections
//	server  confined to the export: serves the requests
//
// A third, the command as the user started it, waits until the supervisor takes
// connections, and returns; with --nodaemon it is the supervisor itself. An ordinary
// user's runs all that in a user namespace, as root there, and waits for it.
//
// The Go runtime would keep descriptors of the cgroup's CPU quota, outside the
// export, and look at them every second: the server sets its processors itself.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0
package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops"
	"virtfs-proxy-helper/ops/sandbox"
	"virtfs-proxy-helper/pool"
	"virtfs-proxy-helper/pool/inflight"
	"virtfs-proxy-helper/pool/supervisor"
)

const name = "virtfs-proxy-helper"

// roleEnv tells a process that this program has started what it is to be.
const roleEnv = "VIRTFS_PROXY_HELPER_ROLE"

const (
	roleSupervisor = "supervisor" // detached
	roleServer = "server"
)

// rootlessEnv tells all processes of a helper that an ordinary user has started
// that they are in a user namespace; its value is the descriptor that the first
// of them waits at.
const rootlessEnv = "VIRTFS_PROXY_HELPER_ROOTLESS"

func main() {
	opts, err := parseOptions(os.Args[1:])
	switch {
	case errors.Is(err, errDone):
		return
	case err != nil:
	case os.Getenv(roleEnv) == roleServer:
		err = serve(opts)
	case os.Getenv(roleEnv) == roleSupervisor:
		err = superviseDetached(opts)
	default:
		err = start(opts)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

// errDone says that the options have been answered: --help, --version.
var errDone = errors.New("done")

type options struct {
	path     string
	fd       int // -1 unless given
	socket   string
	uid, gid int // -1 unless given
	nodaemon bool
	once     bool
	workers  int

	maxConnections int

	fs       ops.Options
	sandbox  sandbox.Config
	pidfile  string
	logLevel slog.Level
}

const usage = `Usage: virtfs-proxy-helper -p PATH {-s NAME -u UID -g GID | -f FD} [OPTION]...

Serves the directory PATH to VMs over QEMU's "-fsdev proxy", so that QEMU itself
runs without privilege. It confines itself to PATH and keeps the capabilities
that file operations need. Start it as root; or as yourself, without -u and -g:
the guest's root is you then, its other users are from your range in /etc/subuid.

  virtfs-proxy-helper -p /srv/share -s /run/share.sock -u 64055 -g 64055
  qemu-system-x86_64 ... -fsdev proxy,id=fs0,socket=/run/share.sock \
                         -device virtio-9p-pci,fsdev=fs0,mount_tag=share
  guest# mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 share /mnt

Any number of VMs may share one NAME: it is put back when QEMU removes it. The
command returns when NAME takes connections; whatever is wrong is told before.

Options:
`

func parseOptions(args []string) (*options, error) {
	o := &options{}
	var level string
	var uid, gid int64
	f := pflag.NewFlagSet(name, pflag.ContinueOnError)
	f.SortFlags = false
	f.Usage = func() {}
	f.StringVarP(&o.path, "path", "p", "", "`PATH` of the directory to export")
	f.StringVarP(&o.socket, "socket", "s", "", "listen on the unix socket `NAME`")
	f.Int64VarP(&uid, "uid", "u", -1, "user that may connect to NAME, by number (`UID`)")
	f.Int64VarP(&gid, "gid", "g", -1, "group that may connect to NAME, by number (`GID`)")
	f.IntVarP(&o.fd, "fd", "f", -1, "serve one client on the inherited connected socket `FD` (QEMU: sock_fd=)")
	f.BoolVarP(&o.nodaemon, "nodaemon", "n", false, "stay in the foreground and log to stderr, not to syslog")
	f.BoolVar(&o.once, "once", false, "leave when the last client of NAME has left (with -f always so)")
	f.IntVar(&o.workers, "workers", 64, "at most `N` requests in the file system at once, of 1 to 1024")
	f.IntVar(&o.maxConnections, "max-connections", 1024, "at most `N` VMs at once, of 1 to 65536; more wait until one leaves")
	f.BoolVar(&o.fs.ReadOnly, "readonly", false, "let no request change anything: EROFS, as on a read-only mount")
	f.Var(&o.fs.UIDs, "translate-uid", "translate user ids, in virtiofsd's notation; may be repeated. `MAP` is map:GUEST:HOST:COUNT,\n"+
		"guest:GUEST:HOST:COUNT, host:HOST:GUEST:COUNT, squash-guest:GUEST:HOST:COUNT,\nsquash-host:HOST:GUEST:COUNT or forbid-guest:GUEST:COUNT")
	f.Var(&o.fs.GIDs, "translate-gid", "translate group ids by `MAP`, likewise")
	f.StringVar((*string)(&o.sandbox.Sandbox), "sandbox", "namespace", "confine the server by namespace, chroot or, for debugging, none: `HOW`")
	f.StringVar((*string)(&o.sandbox.Seccomp), "seccomp", "kill", "kill a server that makes a system call it has no use for; for debugging, log it or do none of that: `HOW`")
	f.StringVar(&o.pidfile, "pidfile", "", "write the process to signal to `FILE`; SIGTERM ends it, requests in work first")
	f.StringVar(&level, "log-level", "info", "debug (each request), info, warn or error: `LEVEL` of what is logged")
	version := f.Bool("version", false, "print the version and leave")
	help := f.BoolP("help", "h", false, "print this and leave")

	err := f.Parse(args)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w (see --help)", err)
	case *help:
		fmt.Print(usage, f.FlagUsages())
		return nil, errDone
	case *version:
		fmt.Println(name, buildVersion())
		return nil, errDone
	}
	bad := func(format string, a ...any) (*options, error) {
		return nil, fmt.Errorf(format+" (see --help)", a...)
	}
	id := func(v int64) bool { return v >= 0 && v < 1<<32-1 }
	switch {
	case f.NArg() > 0:
		return bad("unexpected argument %q", f.Arg(0))
	case o.path == "":
		return bad("no directory to export: give --path")
	case f.Changed("socket") && f.Changed("fd"):
		return bad("--socket and --fd contradict each other: give one")
	case !f.Changed("socket") && !f.Changed("fd"):
		return bad("nowhere to serve: give --socket with --uid and --gid, or --fd")
	case f.Changed("socket") && o.socket == "":
		return bad("--socket: the name is empty")
	case f.Changed("fd") && o.fd < 0:
		return bad("--fd %d: not a descriptor", o.fd)
	case f.Changed("socket") && (!f.Changed("uid") || !f.Changed("gid")) && os.Geteuid() == 0 && !rootless():
		return bad("--socket needs --uid and --gid: who may connect")
	case f.Changed("uid") && !id(uid):
		return bad("--uid %d: not a user id", uid)
	case f.Changed("gid") && !id(gid):
		return bad("--gid %d: not a group id", gid)
	case o.maxConnections < 1 || o.maxConnections > 65536:
		return bad("--max-connections %d: not within 1 to 65536", o.maxConnections)
	case o.workers < 1 || o.workers > 1024:
		return bad("--workers %d: not within 1 to 1024", o.workers)
	case !o.sandbox.Sandbox.Valid():
		return bad("--sandbox %q: not one of namespace, chroot, none", o.sandbox.Sandbox)
	case !o.sandbox.Seccomp.Valid():
		return bad("--seccomp %q: not one of kill, log, none", o.sandbox.Seccomp)
	}
	o.uid, o.gid = int(uid), int(gid)
	o.sandbox.ReadOnly = o.fs.ReadOnly && o.sandbox.Sandbox == sandbox.SandboxNamespace
	if o.pidfile != "" { // the daemon leaves this directory before it removes the file
		if o.pidfile, err = filepath.Abs(o.pidfile); err != nil {
			return nil, fmt.Errorf("--pidfile: %w", err)
		}
	}
	if err := o.logLevel.UnmarshalText([]byte(level)); err != nil {
		return bad("--log-level %q: not one of debug, info, warn, error", level)
	}
	return o, nil
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(unknown)"
}

// start is the command as the user gave it.
func start(opts *options) error {
	// Whatever descriptors the caller left open end with the next exec.
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil && err != unix.ENOSYS {
		return fmt.Errorf("close_range: %w", err)
	}
	if executableErr != nil {
		return fmt.Errorf("find this program: %w", executableErr)
	}
	if rootless() {
		if err := awaitIDs(); err != nil {
			return err
		}
	}
	export, err := openExport(opts.path)
	if err != nil {
		return err
	}
	export.Close()
	var conn *os.File
	if opts.socket == "" {
		if err := checkConn(opts.fd); err != nil {
			return err
		}
		conn = os.NewFile(uintptr(opts.fd), "connection")
	}
	if os.Geteuid() != 0 {
		return startRootless(opts, conn)
	}
	if err := opts.sandbox.Check(); err != nil {
		return err
	}
	if opts.nodaemon {
		return supervise(opts, conn, func() io.Writer { return os.Stderr }, func() error { return nil })
	}
	return supervisor.Detach(self(executable, roleSupervisor), conn)
}

// startRootless runs this command again, where its user is root, and ends as it
// does. What that inherits has the same numbers.
func startRootless(opts *options, conn *os.File) error {
	cmd := self(executable, "")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if conn != nil && opts.fd > 2 {
		cmd.ExtraFiles = make([]*os.File, opts.fd-2)
		cmd.ExtraFiles[opts.fd-3] = conn
	}
	tell := func(fd int) { cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", rootlessEnv, fd)) }
	status, err := sandbox.RunRootless(cmd, tell, newLog(opts, os.Stderr))
	if err == nil {
		os.Exit(status)
	}
	return err
}

func rootless() bool { return os.Getenv(rootlessEnv) != "" }

func awaitIDs() error {
	fd, err := strconv.Atoi(os.Getenv(rootlessEnv))
	if err != nil {
		return err
	}
	return sandbox.AwaitIDs(fd)
}

// superviseDetached is the supervisor as a daemon.
func superviseDetached(opts *options) error {
	report := supervisor.NewReport()
	var conn *os.File
	if opts.socket == "" {
		unix.CloseOnExec(supervisor.ConnFD)
		conn = os.NewFile(supervisor.ConnFD, "connection")
	}
	ready := false
	err := supervise(opts, conn, func() io.Writer { return supervisor.Syslog(name) }, func() error {
		ready = true
		return errors.Join(os.Chdir("/"), report.Ready())
	})
	if err != nil && !ready {
		report.Error(err)
	}
	return err
}

// descriptors is how many a process may need: one for each connection, a few
// for each request in the file system, and what it has anyway.
func (o *options) descriptors() uint64 { return uint64(o.maxConnections + 4*o.workers + 64) }

// supervise is the supervisor. Its log and the servers' go to output.
func supervise(opts *options, conn *os.File, output func() io.Writer, ready func() error) error {
	export, err := openExport(opts.path)
	if err != nil {
		return err
	}
	uid, gid := opts.uid, opts.gid
	if rootless() && opts.socket != "" {
		if uid, gid, err = sandbox.InsideIDs(uid, gid); err != nil {
			return err
		}
	}
	log := newLog(opts, output())
	if err := sandbox.Descriptors(opts.descriptors()); err != nil {
		log.Warn("VMs may be told EMFILE", "error", err)
	}
	k := supervisor.Config{
		Export:  export,
		Sandbox: opts.sandbox,
		Socket:  opts.socket, UID: uid, GID: gid,
		Conn:           conn,
		MaxConnections: opts.maxConnections,
		Once:           opts.once || opts.socket == "",
		PIDFile:        opts.pidfile,
		Program:        executable,
		Server:         func(program string) *exec.Cmd { return self(program, roleServer) },
		Output:         output,
		Log:            log,
		Ready:          ready,
	}
	err = k.Run()
	if err != nil {
		log.Error("the helper ends", "error", err)
	}
	return err
}

// serve is the server. It gets its connections from the supervisor, and ends when
// told to; or, should the supervisor be gone, with its last client.
func serve(opts *options) error {
	// They are the supervisor's; systemd sends them to all processes of a service.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	log := newLog(opts, os.Stderr)
	if err := pool.CalmMonitor(); err != nil {
		log.Warn("sparse traffic will cost more CPU than it must", "error", err)
	}
	control := supervisor.ServerControl()
	server, err := newServer(opts, control, log)
	if err != nil {
		control.SendError(err)
		return err
	}
	if err := control.SendReady(); err != nil {
		return err
	}
	handOver, err := control.Serve(func(fd int, id uint32) {
		if err := server.Add(fd, id); err != nil {
			log.Error("connection refused", "connection", id, "error", err)
		}
	})
	switch {
	case err != nil:
		log.Error("the supervisor died: serving on until the last client has left", "error", err)
		<-server.Empty()
	case handOver:
		<-server.HandOver()
	default:
		select {
		case <-server.Drain():
		case <-time.After(supervisor.StopTime):
			return fmt.Errorf("stopped with %d connections in work", server.Serving())
		}
	}
	return nil
}

func newServer(opts *options, control *supervisor.Control, log *slog.Logger) (*pool.Server, error) {
	j, err := inflight.Map(supervisor.ServerJournal())
	if err != nil {
		return nil, err
	}
	if opts.fs.Sysctls, err = ops.ReadSysctls(); err != nil {
		return nil, err
	}
	inside, err := opts.sandbox.Enter(supervisor.ExportFD, log)
	if err != nil {
		return nil, err
	}
	if inside.Violations != nil {
		if err := control.SendFilter(inside.Violations); err != nil {
			return nil, fmt.Errorf("send the filter: %w", err)
		}
		inside.Violations.Close()
	}
	fs, err := ops.New(inside.FDs, opts.fs, log)
	if err != nil {
		return nil, err
	}
	return pool.NewServer(fs, j, opts.workers, func(id uint32, ended bool) { control.SendGone(id, ended) }, log)
}

// executable is the name of the program that runs, as it was at the start.
var executable, executableErr = os.Executable()

// self returns a program as this one in the given role, with nothing of the
// caller's environment.
func self(program, role string) *exec.Cmd {
	cmd := &exec.Cmd{Path: program, Args: append([]string{name}, os.Args[1:]...), Env: []string{roleEnv + "=" + role}}
	if rootless() {
		cmd.Env = append(cmd.Env, rootlessEnv+"="+os.Getenv(rootlessEnv))
	}
	return cmd
}

// openExport and checkConn say early and clearly what would fail later.
func openExport(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS)
	}
	if err != nil {
		return nil, fmt.Errorf("--path: export %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

func checkConn(fd int) error {
	is := func(option, want int) bool {
		v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
		return err == nil && v == want
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
		return fmt.Errorf("--fd %d: not an open descriptor", fd)
	}
	if !is(unix.SO_DOMAIN, unix.AF_UNIX) || !is(unix.SO_TYPE, unix.SOCK_STREAM) || !is(unix.SO_ACCEPTCONN, 0) {
		return fmt.Errorf("--fd %d: not a connected unix stream socket", fd)
	}
	if _, err := unix.Getpeername(fd); err != nil {
		return fmt.Errorf("--fd %d: not a connected unix stream socket: %w", fd, err)
	}
	return nil
}

func newLog(opts *options, out io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: opts.logLevel})).
		With("export", filepath.Base(opts.path))
}
