package supervisor_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// openTerminal returns a terminal that hangs up when its master is closed.
func openTerminal(t *testing.T) (master *os.File, name string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	n, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return master, fmt.Sprintf("/dev/pts/%d", n)
}

// atTerminal starts a helper in the foreground of a terminal's session, behind
// the words of before.
func atTerminal(t *testing.T, before string) (p *helpertest.Process, hangUp func() error, name string) {
	t.Helper()
	master, tty := openTerminal(t)
	name = filepath.Join(helpertest.ShortDir(t), "s")
	// The log is the test's; a shell that leads the session would not pass the
	// signal on.
	p = helpertest.Start(t, helpertest.Command{Path: "/usr/bin/setsid", Args: []string{"--ctty", "sh", "-c",
		`exec ` + before + ` "$@"`, "sh", helpertest.Ours(t),
		"-n", "-p", t.TempDir(), "-s", name, "-u", "0", "-g", "0"},
		Stdin: tty})
	helpertest.AwaitName(t, p, name)
	return p, master.Close, name
}

// A terminal that hangs up ends what was started there; SIGHUP renews there,
// too; nohup(1) keeps it.
func TestTerminalHangsUp(t *testing.T) {
	t.Parallel()
	p, hangUp, name := atTerminal(t, "")
	c := helpertest.Dial(t, name)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
	server := p.Server()
	unix.Kill(p.PID, unix.SIGHUP)
	helpertest.Eventually(t, "another server", func() bool { return p.Server() != server })
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
	if err := hangUp(); err != nil {
		t.Fatal(err)
	}
	c.WantEOF()
	if status := p.Wait(); status != 0 || !p.Logged("hung up") {
		t.Errorf("status %d\n%s", status, p.Output())
	}
}

func TestNohup(t *testing.T) {
	t.Parallel()
	p, hangUp, name := atTerminal(t, "nohup")
	server := p.Server()
	if err := hangUp(); err != nil {
		t.Fatal(err)
	}
	helpertest.Eventually(t, "it has no terminal", func() bool {
		_, tty := helpertest.Session(t, p.PID)
		return tty == 0
	})
	c := helpertest.Dial(t, name)
	c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/")})
	if strings.Contains(p.Output(), "renewing") || p.Server() != server {
		t.Errorf("renewed by the terminal:\n%s", p.Output())
	}
}
