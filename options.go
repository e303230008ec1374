package main

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"

	"github.com/spf13/pflag"
)

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
	pidfile  string
	logLevel slog.Level
}

const usage = `Usage: virtfs-proxy-helper -p PATH {-s NAME -u UID -g GID | -f FD} [OPTION]...

Serves the directory PATH to VMs over QEMU's "-fsdev proxy", so that QEMU itself
runs without privilege. Start it as root; it confines itself to PATH and keeps
the capabilities that file operations need.

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
	case f.Changed("socket") && (!f.Changed("uid") || !f.Changed("gid")):
		return bad("--socket needs --uid and --gid: who may connect")
	case f.Changed("uid") && !id(uid):
		return bad("--uid %d: not a user id", uid)
	case f.Changed("gid") && !id(gid):
		return bad("--gid %d: not a group id", gid)
	case o.workers < 1 || o.workers > 1024:
		return bad("--workers %d: not within 1 to 1024", o.workers)
	}
	o.uid, o.gid = int(uid), int(gid)
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
