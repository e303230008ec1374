package logging

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A server has two pipes to its supervisor. Records go to its descriptor 1, each
// by one write: a letter for the level, the text, a newline. Descriptor 2 gets
// what the Go runtime says when the process dies.
const (
	recordFD = 1
	outputFD = 2
	// maxRecord is PIPE_BUF, up to which a write is whole or not at all.
	maxRecord = 4096
	pipeSize  = 1 << 20
)

// ForServer returns the log of this process, a server, before it is confined.
//
// Nothing that it logs, or that a library does, may open a file: the process'
// root is the guests'. So the supervisor adds the time, and should something else
// format one here, its zone is known.
func ForServer(level slog.Level) *slog.Logger {
	time.Local = time.UTC
	ignoreSignals()
	// This end alone: the supervisor's is another open file. The runtime has
	// looked at both already and takes them for what blocks.
	unix.SetNonblock(recordFD, true)
	unix.SetNonblock(outputFD, true)
	p := &recordPipe{}
	h := newHandler(p.put, func(w io.Writer) slog.Handler { return newRecordHandler(w, level) })
	log := slog.New(h)
	slog.SetDefault(log)
	return log
}

// FlushServer logs what the server has left out and dropped so far, before it ends.
func FlushServer(log *slog.Logger) {
	if h, ok := log.Handler().(*handler); ok {
		h.limiter.tellAll()
		h.put(slog.LevelWarn, nil)
	}
}

// recordPipe is the server's end. The pipe is the queue.
type recordPipe struct{ dropped atomic.Uint64 }

func (p *recordPipe) put(level slog.Level, text []byte) {
	if n := p.dropped.Swap(0); n > 0 {
		if !writeRecord(slog.LevelWarn, fmt.Appendf(nil, "%d lines dropped\n", n)) {
			p.dropped.Add(n)
		}
	}
	if len(text) > 0 && !writeRecord(level, text) {
		p.dropped.Add(1)
	}
}

func writeRecord(level slog.Level, text []byte) bool {
	const cut = "...\n"
	record := append(make([]byte, 0, maxRecord), letter(level))
	if record = append(record, text...); len(record) > maxRecord {
		record = append(record[:maxRecord-len(cut)], cut...)
	}
	for {
		n, err := unix.Write(recordFD, record)
		if err != unix.EINTR {
			return n == len(record)
		}
	}
}

func letter(level slog.Level) byte {
	switch {
	case level >= slog.LevelError:
		return 'E'
	case level >= slog.LevelWarn:
		return 'W'
	case level >= slog.LevelInfo:
		return 'I'
	}
	return 'D'
}

// levelOf is the level that the supervisor logs a record at: a warning at most,
// for it may be a lie.
func levelOf(letter byte) (level slog.Level, ok bool) {
	switch letter {
	case 'D':
		return slog.LevelDebug, true
	case 'I':
		return slog.LevelInfo, true
	}
	return slog.LevelWarn, letter == 'W' || letter == 'E'
}

// recordHandler formats a record's text: the message, then its attributes.
type recordHandler struct {
	slog.Handler // writes the attributes to b
	b            *bytes.Buffer
	w            io.Writer
}

func newRecordHandler(w io.Writer, level slog.Level) recordHandler {
	b := &bytes.Buffer{}
	return recordHandler{slog.NewTextHandler(b, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 &&
				(a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey) {
				return slog.Attr{}
			}
			return a
		},
	}), b, w}
}

// Handle is called by one goroutine at a time: handler sees to that.
func (h recordHandler) Handle(ctx context.Context, r slog.Record) error {
	h.b.Reset()
	h.b.WriteString(r.Message + " ")
	if err := h.Handler.Handle(ctx, r); err != nil {
		return err
	}
	_, err := h.w.Write(append(bytes.TrimRight(h.b.Bytes(), " \n"), '\n'))
	return err
}

func (h recordHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return recordHandler{h.Handler.WithAttrs(attrs), h.b, h.w}
}

func (h recordHandler) WithGroup(name string) slog.Handler {
	return recordHandler{h.Handler.WithGroup(name), h.b, h.w}
}

// ServerPipes are the pipes of a server that is to be started.
type ServerPipes struct {
	log                     *Log
	records, output         *os.File // this process' ends
	theirRecords, theirText *os.File
}

// ServerPipes makes the pipes for a server and gives cmd their other ends.
func (l *Log) ServerPipes(cmd *exec.Cmd) (*ServerPipes, error) {
	p := &ServerPipes{log: l}
	var err error
	if p.records, p.theirRecords, err = newPipe("records"); err != nil {
		return nil, err
	}
	if p.output, p.theirText, err = newPipe("output"); err != nil {
		p.Close()
		return nil, err
	}
	cmd.Stdout, cmd.Stderr = p.theirRecords, p.theirText
	return p, nil
}

// newPipe returns a pipe whose other end is a blocking one until the server
// changes that.
func newPipe(name string) (ours, theirs *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("pipe: %w", err)
	}
	unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize) // a smaller one does as well
	unix.SetNonblock(fds[0], true)
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}

// Close closes the pipes of a server that does not start.
func (p *ServerPipes) Close() {
	for _, f := range []*os.File{p.records, p.output, p.theirRecords, p.theirText} {
		f.Close() // nil is an error, too
	}
}

// Read logs what the server, process pid, writes, until its end.
func (p *ServerPipes) Read(pid int) {
	p.theirRecords.Close()
	p.theirText.Close()
	name := "server " + strconv.Itoa(pid)
	log := p.log.Logger.With("server", pid)
	left := atomic.Int32{}
	left.Store(2)
	for _, f := range []*os.File{p.records, p.output} {
		p.log.servers.Go(func() {
			defer f.Close()
			readLines(f, func(text []byte) {
				level, ok := slog.LevelWarn, false
				if f == p.records {
					if level, ok = levelOf(text[0]); ok {
						text = text[1:]
					}
				}
				p.log.logRecord(log, name, level, text)
			})
			if left.Add(-1) == 0 {
				p.log.handler.limiter.forget(name)
			}
		})
	}
}

// logRecord logs a server's line. Its text, all of it, is the value of one
// attribute, quoted.
func (l *Log) logRecord(log *slog.Logger, name string, level slog.Level, text []byte) {
	ctx := context.Background()
	if !log.Enabled(ctx, level) {
		return
	}
	r := serverRate
	if log.Enabled(ctx, slog.LevelDebug) {
		r = serverDebugRate
	}
	if !l.handler.limiter.allow(name, r) {
		time.Sleep(time.Millisecond) // for the pipe fills, and the server drops lines itself
		return
	}
	record := slog.NewRecord(time.Now(), level, string(text), 0)
	log.Handler().(*handler).handle(record)
}

// readLines calls line with each line's beginning, until the end of the stream.
func readLines(r io.Reader, line func([]byte)) {
	b := bufio.NewReaderSize(r, maxRecord)
	for {
		text, err := b.ReadSlice('\n')
		if text = bytes.TrimRight(text, "\n"); len(text) > 0 {
			line(text)
		}
		for err == bufio.ErrBufferFull { // the rest of this line
			_, err = b.ReadSlice('\n')
		}
		if err != nil {
			return
		}
	}
}
