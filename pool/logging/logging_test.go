package logging

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// patience bounds every wait: only what hangs takes so long.
const patience = 60 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// memory is a sink that a test can hold up.
type memory struct {
	hold sync.Mutex // while a test has it, each write waits
	mu   sync.Mutex
	b    bytes.Buffer
	fail bool
}

func (m *memory) options(o *slog.HandlerOptions) { o.ReplaceAttr = withoutTime }
func (m *memory) retries() time.Duration         { return 0 }

func (m *memory) write(_ slog.Level, line []byte) error {
	m.hold.Lock()
	defer m.hold.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail {
		return errors.New("no")
	}
	m.b.Write(line)
	return nil
}

func (m *memory) setFail(fail bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = fail
}

func (m *memory) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.b.String()
}

var droppedLines = regexp.MustCompile(`msg="(\d+) lines dropped"`)

// dropped returns how many lines a log says that it has dropped.
func dropped(log string) (n int) {
	for _, m := range droppedLines.FindAllStringSubmatch(log, -1) {
		i, _ := strconv.Atoi(m[1])
		n += i
	}
	return n
}

// A sink that is stuck makes nobody wait; each line is written once or counted.
func TestStuckSink(t *testing.T) {
	m := &memory{}
	l := newLog(slog.LevelDebug, m, nil)
	m.hold.Lock()
	const lines = 3 * maxLines
	for i := range lines {
		l.Debug("line", "number", i)
	}
	m.hold.Unlock()
	whole := func() bool { return strings.Count(m.String(), "msg=line")+dropped(m.String()) == lines }
	eventually(t, "each line is written or counted", whole)
	if n := dropped(m.String()); n < maxLines {
		t.Errorf("%d lines dropped: not much of a test", n)
	}
	l.Info("the last")
	l.Close()
	if !strings.Contains(m.String(), "the last") || !whole() {
		t.Errorf("after the end: %.200s", m.String())
	}
}

// A log that is stuck when the process ends does not keep it.
func TestStuckAtTheEnd(t *testing.T) {
	m := &memory{}
	l := newLog(slog.LevelInfo, m, nil)
	m.hold.Lock()
	defer m.hold.Unlock()
	l.Info("a line")
	l.Close()
}

// What can't be written, on a full disk, is counted when it can be again.
func TestFailingSink(t *testing.T) {
	m := &memory{}
	l := newLog(slog.LevelInfo, m, nil)
	defer l.Close()
	m.setFail(true)
	for range 7 {
		l.Info("line")
	}
	eventually(t, "all fail", func() bool { return l.writer.dropped.Load() == 7 })
	m.setFail(false)
	l.Info("again")
	eventually(t, "it is told", func() bool { return dropped(m.String()) == 7 })
}

// One message that comes all the time is limited, the others are not, and each
// line that is left out is counted.
func TestLimits(t *testing.T) {
	m := &memory{}
	l := newLog(slog.LevelInfo, m, []slog.Attr{slog.String("export", "/srv/a")})
	const lines = 3000
	for i := range lines {
		l.Info("client connected", "connection", i)
	}
	l.Error("something else")
	l.Close()
	out := m.String()
	written, left := strings.Count(out, `msg="client connected"`), 0
	for _, told := range regexp.MustCompile(`of="client connected" count=(\d+)`).FindAllStringSubmatch(out, -1) {
		n, _ := strconv.Atoi(told[1])
		left += n
	}
	if written > lines/2 || written+left != lines || !strings.Contains(out, "something else") {
		t.Errorf("%d written, %d left out of %d", written, left, lines)
	}
	if n := strings.Count(out, "\n"); strings.Count(out, "export=/srv/a") != n {
		t.Errorf("a line of %d does not say which export", n)
	}
}

// A server's records: what they say stays within the value of msg, on one line
// of bounded length, at a warning at most.
func TestServerRecords(t *testing.T) {
	m := &memory{}
	l := newLog(slog.LevelInfo, m, nil)
	records, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	output, w2, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &ServerPipes{log: l, records: records, output: output}
	p.Read(42)
	fmt.Fprint(w, "Ihello connection=3\n", "Eforged\n", "\n\n", "Dnot asked for\n",
		"\xffwhat\x1b[2J\n", "I\" level=ERROR msg=\"\r\n", "W")
	w.Write(bytes.Repeat([]byte("x"), 10<<20))
	fmt.Fprint(w, "\nIafter it\n", "Ino end")
	w.Close()
	fmt.Fprint(w2, "panic: the last words\n\tat x.go:1\n")
	w2.Close()
	l.Close()
	out := m.String()
	for _, want := range []string{
		`level=INFO msg="hello connection=3" server=42`,
		`level=WARN msg=forged server=42`,
		`level=WARN msg="\xffwhat\x1b[2J" server=42`,
		`level=INFO msg="\" level=ERROR msg=\"\r" server=42`,
		`level=INFO msg="after it" server=42`,
		`level=INFO msg="no end" server=42`,
		`level=WARN msg="panic: the last words" server=42`,
		`level=WARN msg="\tat x.go:1" server=42`,
	} {
		if !strings.Contains("\n"+out, "\n"+want+"\n") {
			t.Errorf("no %s in\n%.2000s", want, out)
		}
	}
	for line := range strings.Lines(out) {
		if len(line) > maxLine || !strings.HasSuffix(line, " server=42\n") || strings.HasPrefix(line, "level=ERROR") {
			t.Errorf("a line of %d bytes: %.100q", len(line), line)
		}
	}
	if strings.Contains(out, "not asked for") || strings.Count(out, "\n") != 9 {
		t.Errorf("%d lines: %.2000s", strings.Count(out, "\n"), out)
	}
}

// A server that says too much is limited by itself.
func TestServerLimits(t *testing.T) {
	m := &memory{}
	l := newLog(slog.LevelInfo, m, nil)
	records, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	output, w2, _ := os.Pipe()
	w2.Close()
	(&ServerPipes{log: l, records: records, output: output}).Read(42)
	const lines = 2000
	for i := range lines {
		fmt.Fprintf(w, "Iline %d\n", i)
	}
	w.Close()
	l.servers.Wait()
	l.Close()
	out := m.String()
	told := regexp.MustCompile(`of="server 42" count=(\d+)`).FindAllStringSubmatch(out, -1)
	left := 0
	for _, n := range told {
		i, _ := strconv.Atoi(n[1])
		left += i
	}
	if written := strings.Count(out, `msg="line `); written > lines/2 || written+left != lines {
		t.Errorf("%d written, %d left out", written, left)
	}
}

// countingSink counts the lines that could not be written.
type countingSink struct {
	sink
	failed atomic.Int32
}

func (c *countingSink) write(level slog.Level, line []byte) error {
	err := c.sink.write(level, line)
	if err != nil {
		c.failed.Add(1)
	}
	return err
}

// syslogd is a system log that a test starts, holds up and ends.
func syslogd(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	os.Remove(path)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func next(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 1<<16)
	n, err := conn.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

// The system's log is found when it comes, and again when it is restarted; one
// that does not read makes nobody wait.
func TestSyslog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	to := &countingSink{sink: &syslog{tag: "tag", paths: []string{path + "-none", path}}}
	l := newLog(slog.LevelDebug, to, nil)
	defer l.Close()
	l.Info("before it is there", "a", 1)
	eventually(t, "it can't be written", func() bool { return to.failed.Load() > 0 })
	conn := syslogd(t, path)
	form := regexp.MustCompile(`^<30>\w{3} [ \d]\d \d\d:\d\d:\d\d tag\[\d+\]: level=INFO msg="before it is there" a=1$`)
	if s := next(t, conn); !form.MatchString(s) {
		t.Errorf("%q", s)
	}
	conn.Close()
	conn = syslogd(t, path)
	l.Error("restarted")
	if s := next(t, conn); !strings.HasPrefix(s, "<27>") || !strings.HasSuffix(s, "level=ERROR msg=restarted") {
		t.Errorf("%q", s)
	}
	for range 2 * maxLines {
		l.Debug("flood")
	}
	told := 0
	for told == 0 {
		told = dropped(next(t, conn))
	}
	// A stuck one that is replaced.
	for range maxLines / 2 {
		l.Debug("flood")
	}
	old := conn
	conn = syslogd(t, path)
	defer old.Close() // it never reads again
	defer conn.Close()
	if s := next(t, conn); !strings.Contains(s, "flood") {
		t.Errorf("%q", s)
	}
}

// An old system log listens on a stream.
func TestSyslogStream(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	l := newLog(slog.LevelInfo, &syslog{tag: "tag", paths: []string{path}}, nil)
	l.Warn("one")
	l.Warn("two")
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(patience))
	var all string
	for b := make([]byte, 1024); strings.Count(all, "\x00") < 2; {
		n, err := conn.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		all += string(b[:n])
	}
	if !strings.Contains(all, "level=WARN msg=one\x00<28>") {
		t.Errorf("%q", all)
	}
	l.Close()
}
