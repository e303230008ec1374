package logging

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"
)

var syslogPaths = []string{"/dev/log", "/var/run/syslog", "/var/run/log"}

const (
	facilityDaemon = 3 << 3
	// syslogTime bounds a write to a system log that does not read.
	syslogTime = time.Second
)

// syslog writes lines to the system's log, as syslog(3) does. The connection is
// made anew when it fails: the system's log may start later than this process, and
// may be started again. Package log/syslog waits without end for one that is stuck.
type syslog struct {
	tag    string
	paths  []string // of its socket, the first that is there
	conn   net.Conn // nil while there is none
	stream bool     // lines end with a NUL
}

func (s *syslog) options(o *slog.HandlerOptions) { o.ReplaceAttr = withoutTime }

func (s *syslog) retries() time.Duration { return time.Second }

func (s *syslog) write(level slog.Level, line []byte) error {
	priority, now := facilityDaemon|severity(level), time.Now().Format(time.Stamp)
	msg := fmt.Appendf(nil, "<%d>%s %s[%d]: %s",
		priority, now, s.tag, os.Getpid(), line[:len(line)-1])
	var err error
	for range 2 { // the second time on a new connection
		if s.conn == nil {
			if err = s.dial(); err != nil {
				return err
			}
		}
		text := msg
		if s.stream {
			text = append(text, 0)
		}
		if err = s.conn.SetWriteDeadline(time.Now().Add(syslogTime)); err == nil {
			_, err = s.conn.Write(text)
		}
		if err == nil {
			return nil
		}
		s.conn.Close()
		s.conn = nil
	}
	return err
}

func (s *syslog) dial() error {
	var errs error
	for _, path := range s.paths {
		for _, network := range []string{"unixgram", "unix"} {
			d := net.Dialer{Timeout: syslogTime}
			conn, err := d.Dial(network, path)
			if err == nil {
				s.conn, s.stream = conn, network == "unix"
				return nil
			}
			errs = errors.Join(errs, err)
		}
	}
	return errs
}
