package helpertest

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// syslogFile is a system log of the test's own: a file with one line for each
// message that comes.
type syslogFile struct {
	tb     testing.TB
	file   *os.File
	socket string
	synced chan struct{}
}

// syncMark is a message of this process, which is not logged.
const syncMark = "all before this is logged"

func newSyslogFile(tb testing.TB) *syslogFile {
	tb.Helper()
	dir := ShortDir(tb)
	l := &syslogFile{tb: tb, socket: filepath.Join(dir, "log"), synced: make(chan struct{})}
	var err error
	if l.file, err = os.CreateTemp(tb.TempDir(), "syslog"); err != nil {
		tb.Fatal(err)
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: l.socket, Net: "unixgram"})
	if err != nil {
		tb.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o755, l.socket: 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			tb.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1<<18)
		for {
			n, err := conn.Read(b)
			switch message := string(b[:n]); {
			case err != nil:
				return
			case message == syncMark:
				l.synced <- struct{}{}
			default:
				l.file.WriteString(strings.TrimSuffix(message, "\n") + "\n")
			}
		}
	}()
	tb.Cleanup(func() {
		conn.Close()
		<-done
		l.file.Close()
	})
	return l
}

// sync waits until all that has been sent before is in the file.
func (l *syslogFile) sync() {
	conn, err := net.Dial("unixgram", l.socket)
	if err != nil {
		l.tb.Error(err)
		return
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(syncMark)); err != nil {
		l.tb.Error(err)
		return
	}
	<-l.synced
}

// wrap returns args as a command that sees this log, and not the machine's, at
// /dev/log: its /dev is a tmpfs in a mount namespace of its own, with the
// devices that programs expect.
func (l *syslogFile) wrap(args []string) []string {
	return append([]string{"unshare", "--mount", "--propagation", "slave", "sh", "-ec", `
		mount -t tmpfs -o mode=755 none "$0"
		for d in full null random tty urandom zero; do
			: >"$0/$d"
			mount --bind "/dev/$d" "$0/$d"
		done
		ln -s "$1" "$0/log"
		mount --move "$0" /dev
		shift
		exec "$@"`, ShortDir(l.tb), l.socket}, args...)
}
