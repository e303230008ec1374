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
	"math"
	"os"
	"path/filepath"
	"runtime/debug"

	"github.com/spf13/pflag"

	"virtfs-proxy-helper/pool"
	"virtfs-proxy-helper/pool/logging"
	"virtfs-proxy-helper/pool/supervisor"
)

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, errDone) {
		if !errors.As(err, &logging.Told{}) {
			logging.Complain(supervisor.Name, err)
		}
		os.Exit(1)
	}
}

func run(args []string) error {
	role, err := supervisor.CurrentRole()
	if err != nil {
		return err
	}
	if role == supervisor.RoleServer { // it is told what to do by its supervisor alone
		return pool.Run()
	}
	opts, err := parseOptions(args)
	switch {
	case err != nil:
		return err
	case role == supervisor.RoleSupervisor:
		return opts.RunDetached()
	}
	return opts.Start(opts.nodaemon)
}

// errDone says that the options have been answered: --help, --version.
var errDone = errors.New("done")

// options are what the command and the supervisor are told by their arguments.
type options struct {
	supervisor.Config
	nodaemon bool
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
	var level, busyPoll string
	var uid, gid int64
	f := pflag.NewFlagSet(supervisor.Name, pflag.ContinueOnError)
	f.SortFlags = false
	f.Usage = func() {}
	f.StringVarP(&o.Path, "path", "p", "", "`PATH` of the directory to export")
	f.StringVarP(&o.Socket, "socket", "s", "", "listen on the unix socket `NAME`")
	f.Int64VarP(&uid, "uid", "u", -1, "user that may connect to NAME, by number (`UID`)")
	f.Int64VarP(&gid, "gid", "g", -1, "group that may connect to NAME, by number (`GID`)")
	f.IntVarP(&o.FD, "fd", "f", -1,
		"serve one client on the inherited connected socket `FD` (QEMU: sock_fd=)")
	f.BoolVarP(&o.nodaemon, "nodaemon", "n", false,
		"stay in the foreground and log to stderr, not to syslog")
	f.BoolVar(&o.Once, "once", false,
		"leave when the last client of NAME has left (with -f always so)")
	f.IntVar(&o.Workers, "workers", 256,
		"serve at most `N` VMs at once, of 1 to 1024, each by a thread while it asks;\n"+
			"more take turns")
	f.StringVar(&busyPoll, "busy-poll", "on",
		"on or off: ask for a busy VM's next request again and again, where that is\n"+
			"faster, at the price of CPU time: `HOW`")
	f.IntVar(&o.MaxConnections, "max-connections", 1024,
		"at most `N` VMs at once, of 1 to 65536; more wait until one leaves")
	f.BoolVar(&o.Server.FS.ReadOnly, "readonly", false,
		"let no request change anything: EROFS, as on a read-only mount")
	f.Var(&o.Server.FS.UIDs, "translate-uid",
		"translate user ids, in virtiofsd's notation; may be repeated. "+
			"`MAP` is map:GUEST:HOST:COUNT,\n"+
			"guest:GUEST:HOST:COUNT, host:HOST:GUEST:COUNT, squash-guest:GUEST:HOST:COUNT,\n"+
			"squash-host:HOST:GUEST:COUNT or forbid-guest:GUEST:COUNT. "+
			"What map: names is all\n"+
			"that exists, in a user namespace; the others act on top. Give map: for users\n"+
			"and groups")
	f.Var(&o.Server.FS.GIDs, "translate-gid", "translate group ids by `MAP`, likewise")
	f.StringVar((*string)(&o.Sandbox.Sandbox), "sandbox", "namespace",
		"confine the server by namespace, chroot or, for debugging, none: `HOW`")
	f.StringVar((*string)(&o.Sandbox.Seccomp), "seccomp", "kill",
		"kill a server that makes a system call it has no use for; "+
			"for debugging, log it or do none of that: `HOW`")
	f.StringVar(&o.PIDFile, "pidfile", "",
		"write the process to signal to `FILE`; SIGTERM ends it, requests in work first")
	f.StringVar(&level, "log-level", "info",
		"debug (each request), info, warn or error: `LEVEL` of what is logged")
	showVersion := f.Bool("version", false, "print the version and leave")
	help := f.BoolP("help", "h", false, "print this and leave")

	err := f.Parse(args)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w (see --help)", err)
	case *help:
		fmt.Print(usage, f.FlagUsages())
		return nil, errDone
	case *showVersion:
		fmt.Println(supervisor.Name, buildVersion())
		return nil, errDone
	}
	bad := func(format string, a ...any) (*options, error) {
		return nil, fmt.Errorf(format+" (see --help)", a...)
	}
	id := func(v int64) bool { return v >= 0 && v < 1<<32-1 }
	switch {
	case f.NArg() > 0:
		return bad("unexpected argument %q", f.Arg(0))
	case o.Path == "":
		return bad("no directory to export: give --path")
	case f.Changed("socket") && f.Changed("fd"):
		return bad("--socket and --fd contradict each other: give one")
	case !f.Changed("socket") && !f.Changed("fd"):
		return bad("nowhere to serve: give --socket with --uid and --gid, or --fd")
	case f.Changed("socket") && o.Socket == "":
		return bad("--socket: the name is empty")
	case f.Changed("fd") && (o.FD < 0 || o.FD > math.MaxInt32):
		return bad("--fd %d: not a descriptor", o.FD)
	case f.Changed("socket") && (!f.Changed("uid") || !f.Changed("gid")) &&
		os.Geteuid() == 0 && !supervisor.Rootless():
		return bad("--socket needs --uid and --gid: who may connect")
	case f.Changed("uid") && !id(uid):
		return bad("--uid %d: not a user id", uid)
	case f.Changed("gid") && !id(gid):
		return bad("--gid %d: not a group id", gid)
	case o.MaxConnections < 1 || o.MaxConnections > 65536:
		return bad("--max-connections %d: not within 1 to 65536", o.MaxConnections)
	case o.Workers < 1 || o.Workers > 1024:
		return bad("--workers %d: not within 1 to 1024", o.Workers)
	case busyPoll != "on" && busyPoll != "off":
		return bad("--busy-poll %q: not one of on, off", busyPoll)
	case !o.Sandbox.Sandbox.Valid():
		return bad("--sandbox %q: not one of namespace, chroot, none", o.Sandbox.Sandbox)
	case !o.Sandbox.Seccomp.Valid():
		return bad("--seccomp %q: not one of kill, log, none", o.Sandbox.Seccomp)
	}
	o.UID, o.GID, o.Version = int(uid), int(gid), buildVersion()
	o.Sandbox.ReadOnly = o.Server.FS.ReadOnly
	if err := o.Server.FS.UIDs.Check(); err != nil {
		return bad("--translate-uid: %w", err)
	}
	if err := o.Server.FS.GIDs.Check(); err != nil {
		return bad("--translate-gid: %w", err)
	}
	o.Sandbox.UIDs, o.Sandbox.GIDs = o.Server.FS.UIDs.Namespace(), o.Server.FS.GIDs.Namespace()
	if o.PIDFile != "" { // the daemon leaves this directory before it removes the file
		if o.PIDFile, err = filepath.Abs(o.PIDFile); err != nil {
			return nil, fmt.Errorf("--pidfile: %w", err)
		}
	}
	if err := o.LogLevel.UnmarshalText([]byte(level)); err != nil {
		return bad("--log-level %q: not one of debug, info, warn, error", level)
	}
	o.Server.LogLevel = o.LogLevel
	o.Server.Sandbox, o.Server.Workers = o.Sandbox, o.Workers
	o.Server.NoBusyPoll = busyPoll == "off"
	return o, nil
}

// version is set by packagers: go build -ldflags "-X main.version=1.2.3".
var version string

// buildVersion returns version; without it what the go command has noted, the
// module's version or the commit.
func buildVersion() string {
	const unknown = "(devel)" // the go command's word, too
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return unknown
	}
	if v := info.Main.Version; v != "" && v != unknown {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return unknown
}
