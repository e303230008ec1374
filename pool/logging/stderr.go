package logging

import (
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// journalEnv holds the device and inode of the stream that systemd has connected
// to the journal: systemd.exec(5).
const journalEnv = "JOURNAL_STREAM"

// stderr writes lines to a duplicate of descriptor 2. What is open there is the
// caller's and shared with others, so its flags stay as they are: a write may
// wait as long as it likes.
type stderr struct {
	fd      int // -1 if there is none
	journal bool
}

func newStderr() *stderr {
	// Package os ends a process that writes to a closed pipe by the numbers 1
	// and 2.
	fd, err := unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		fd = -1
	}
	return &stderr{fd, isJournal(2)}
}

// isJournal tells that what is written to fd goes to the journal.
func isJournal(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil &&
		os.Getenv(journalEnv) == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// Environ is what a process that gets this one's stderr needs of its environment.
func Environ() []string {
	if !isJournal(2) {
		return nil
	}
	return []string{journalEnv + "=" + os.Getenv(journalEnv)}
}

// options leaves the time to the journal.
func (s *stderr) options(o *slog.HandlerOptions) {
	if s.journal {
		o.ReplaceAttr = withoutTime
	}
}

func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey && len(groups) == 0 {
		return slog.Attr{}
	}
	return a
}

func (s *stderr) retries() time.Duration { return 0 }

func (s *stderr) write(level slog.Level, line []byte) error {
	if s.journal {
		line = append(fmt.Appendf(nil, "<%d>", severity(level)), line...)
	}
	for len(line) > 0 {
		n, err := unix.Write(s.fd, line)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN: // the caller, or another of its processes, wants it so
			fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}
			if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
				return err
			}
		case err != nil:
			return err
		default:
			line = line[n:]
		}
	}
	return nil
}

// severity is syslog's number of a level.
func severity(level slog.Level) int {
	switch {
	case level >= slog.LevelError:
		return 3
	case level >= slog.LevelWarn:
		return 4
	case level >= slog.LevelInfo:
		return 6
	}
	return 7
}

// Told is an error that has been reported already.
type Told struct{ Err error }

func (t Told) Error() string { return t.Err.Error() }

// Unwrap returns the error itself.
func (t Told) Unwrap() error { return t.Err }

// Complain says on stderr why a command fails, in one line, and waits for that
// no longer than for a log.
func Complain(name string, err error) {
	l := ToStderr(slog.LevelError)
	l.writer.put(slog.LevelError, fmt.Appendf(nil, "%s: %v\n", name, err))
	l.Close()
}
