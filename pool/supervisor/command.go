package supervisor

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/ops/sandbox"
	"virtfs-proxy-helper/pool/ipc"
	"virtfs-proxy-helper/pool/logging"
)

// Name is the program's name in messages, in the log and as its own argument.
const Name = ipc.SupervisorName

// Start is the command as the user has given it: it returns when the detached
// supervisor takes connections, or is the supervisor itself in the foreground.
func (c *Config) Start(foreground bool) error {
	if err := cleanEnvironment(); err != nil {
		return err
	}
	if os.Geteuid() == 0 && !Rootless() {
		if err := c.Sandbox.OwnMountNamespace(); err != nil {
			return err
		}
	}
	// Whatever descriptors the caller left open end with the next exec.
	err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC)
	if err != nil && err != unix.ENOSYS {
		return fmt.Errorf("close_range: %w", err)
	}
	if executableErr != nil {
		return fmt.Errorf("find this program: %w", executableErr)
	}
	if Rootless() {
		if err := awaitIDs(); err != nil {
			return err
		}
	}
	export, err := openExport(c.Path)
	if err != nil {
		return err
	}
	export.Close()
	var conn *os.File
	if c.Socket == "" {
		if err := checkConn(c.FD); err != nil {
			return err
		}
		conn = os.NewFile(uintptr(c.FD), "connection")
	}
	if os.Geteuid() != 0 {
		return c.startRootless(conn)
	}
	if err := c.Sandbox.Check(); err != nil {
		return err
	}
	if foreground {
		return c.run(surroundings{
			conn:  conn,
			log:   logging.ToStderr(c.LogLevel, c.exportAttr()),
			ready: func() error { return nil },
		})
	}
	return detach(self(executable, RoleSupervisor), conn)
}

// startRootless runs this command again, where its user is root, and ends as it
// does. What that inherits has the same numbers.
func (c *Config) startRootless(conn *os.File) error {
	cmd := self(executable, RoleRootless)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if conn != nil && c.FD > 2 {
		cmd.ExtraFiles = make([]*os.File, c.FD-2)
		cmd.ExtraFiles[c.FD-3] = conn
	}
	tell := func(fd int) { cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", rootlessEnv, fd)) }
	log := logging.ToStderr(c.LogLevel, c.exportAttr())
	status, err := sandbox.RunRootless(cmd, tell, log.Logger)
	log.Close()
	if err == nil {
		os.Exit(status)
	}
	return err
}

// RunDetached is the supervisor as a daemon.
func (c *Config) RunDetached() error {
	report, err := newReport()
	if err != nil {
		return err
	}
	var conn *os.File
	if c.Socket == "" {
		unix.CloseOnExec(connFD)
		conn = os.NewFile(connFD, "connection")
	}
	err = c.run(surroundings{
		conn:  conn,
		log:   logging.ToSyslog(Name, c.LogLevel, c.exportAttr()),
		ready: func() error { return errors.Join(os.Chdir("/"), report.ready()) },
	})
	if err != nil && !errors.As(err, &logging.Told{}) {
		report.error(err)
	}
	return err
}

// executable is the name of the program that runs, as it was at the start.
var executable, executableErr = os.Executable()

// self returns a program as this one in the given role, with the same options
// and nothing of the caller's environment.
func self(program string, role Role) *exec.Cmd {
	name := Name
	if role == RoleSupervisor {
		name += ": " + string(role) // as ps shows it
	}
	args := append([]string{name}, os.Args[1:]...)
	return &exec.Cmd{Path: program, Args: args, Env: environment(role)}
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
	export := os.NewFile(uintptr(fd), path)
	if err := sandbox.CheckExport(export); err != nil {
		export.Close()
		return nil, err
	}
	return export, nil
}

func checkConn(fd int) error {
	is := func(option, want int) bool {
		v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
		return err == nil && v == want
	}
	var st, log unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("--fd %d: not an open descriptor", fd)
	}
	if err := unix.Fstat(2, &log); err == nil && st.Dev == log.Dev && st.Ino == log.Ino {
		return fmt.Errorf("--fd %d: that is stderr, where this command writes what goes wrong: "+
			"a client would read it as answers", fd)
	}
	if !is(unix.SO_DOMAIN, unix.AF_UNIX) || !is(unix.SO_TYPE, unix.SOCK_STREAM) ||
		!is(unix.SO_ACCEPTCONN, 0) {
		return fmt.Errorf("--fd %d: not a connected unix stream socket", fd)
	}
	if _, err := unix.Getpeername(fd); err != nil {
		return fmt.Errorf("--fd %d: not a connected unix stream socket: %w", fd, err)
	}
	return nil
}

// exportAttr says in each line which export it is about.
func (c *Config) exportAttr() slog.Attr {
	path := c.Path
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	return slog.String("export", path)
}
