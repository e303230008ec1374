// Package logging is how both processes log. A call never waits: what can't be
// written in time is dropped and counted, and a later line tells the count.
//
//	logging.go  the supervisor's log: one queue, one goroutine that writes
//	stderr.go   lines for stderr, or for journald behind it
//	syslog.go   lines for the system's log
//	limit.go    how often one message is logged
//	server.go   the server's log: records on a pipe, and their reader
//
// # Trust
//
// The supervisor's log may be a file, a terminal or a pipe that is stuck or
// closed at its other end: that costs lines, nothing else. A server's records
// come from a process that a guest may have taken over: the supervisor bounds
// their length and rate, quotes them and chooses their level.
package logging

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os/signal"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxLines = 4096 // in the queue
	maxLine  = 8192 // bytes of one line, the rest is cut off
	// flushTime bounds how long a process that ends waits for its log.
	flushTime = time.Second
)

// Log is the log of the supervisor, or of a command.
type Log struct {
	*slog.Logger
	handler *handler
	writer  *writer
	servers sync.WaitGroup // readers of servers' records
}

// sink is where lines go. Its write may wait.
type sink interface {
	options(*slog.HandlerOptions) // how it wants lines
	write(level slog.Level, line []byte) error
	// retries is the pause before a line that could not be written is written
	// again; without one the line is dropped.
	retries() time.Duration
}

// ToStderr returns a log of lines on stderr, each with these attributes.
func ToStderr(level slog.Level, attrs ...slog.Attr) *Log {
	return newLog(level, newStderr(), attrs)
}

// ToSyslog returns a log of lines in the system's log, under the name tag.
func ToSyslog(tag string, level slog.Level, attrs ...slog.Attr) *Log {
	return newLog(level, &syslog{tag: tag, paths: syslogPaths}, attrs)
}

func newLog(level slog.Level, to sink, attrs []slog.Attr) *Log {
	ignoreSignals()
	w := &writer{
		sink:    to,
		lines:   make(chan line, maxLines),
		closing: make(chan struct{}),
		done:    make(chan struct{}),
	}
	opts := &slog.HandlerOptions{Level: level}
	to.options(opts)
	text := func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, opts).WithAttrs(attrs) }
	h := newHandler(w.put, text)
	w.told = func(n uint64) line {
		var b bytes.Buffer
		r := slog.NewRecord(time.Now(), slog.LevelWarn, fmt.Sprintf("%d lines dropped", n), 0)
		text(&b).Handle(context.Background(), r)
		return line{slog.LevelWarn, b.Bytes()}
	}
	l := &Log{Logger: slog.New(h), handler: h, writer: w}
	slog.SetDefault(l.Logger) // which is that of package log, too
	go w.run()
	return l
}

// ignoreSignals keeps a process alive whose log's reader has left, and running
// where the log is a terminal that belongs to another job.
func ignoreSignals() { signal.Ignore(unix.SIGPIPE, unix.SIGTTOU) }

// Close writes what has been logged, servers' last records included, as far as
// that takes no longer than flushTime. Nothing is written afterwards.
func (l *Log) Close() {
	late := time.After(flushTime)
	read := make(chan struct{})
	go func() {
		l.servers.Wait()
		close(read)
	}()
	select {
	case <-read:
	case <-late:
		late = time.After(flushTime)
	}
	l.handler.limiter.tellAll()
	close(l.writer.closing)
	select {
	case <-l.writer.done:
	case <-late:
	}
}

type line struct {
	level slog.Level
	text  []byte // with its newline
}

// writer is the queue, and the goroutine that empties it.
type writer struct {
	sink    sink
	lines   chan line
	dropped atomic.Uint64
	told    func(dropped uint64) line
	closing chan struct{}
	done    chan struct{}
}

// put queues a line. It never waits.
func (w *writer) put(level slog.Level, text []byte) {
	if len(text) > maxLine {
		text = append(text[:maxLine-4:maxLine-4], "...\n"...)
	}
	select {
	case w.lines <- line{level, bytes.Clone(text)}:
	default:
		w.dropped.Add(1)
	}
}

func (w *writer) run() {
	defer close(w.done)
	lastTold := time.Now()
	for closing := false; ; {
		select {
		case l := <-w.lines:
			if !w.write(l) {
				w.dropped.Add(1)
				continue
			}
		case <-w.closing:
			closing = true
		}
		// Not after each line, where more are dropped all the time.
		if len(w.lines) == 0 || time.Since(lastTold) > time.Second {
			if n := w.dropped.Swap(0); n > 0 {
				lastTold = time.Now()
				if !w.write(w.told(n)) {
					w.dropped.Add(n)
				}
			}
		}
		if closing && len(w.lines) == 0 {
			return
		}
	}
}

func (w *writer) write(l line) bool {
	for {
		if err := w.sink.write(l.level, l.text); err == nil {
			return true
		}
		if w.sink.retries() == 0 {
			return false
		}
		select {
		case <-time.After(w.sink.retries()):
		case <-w.closing:
			return w.sink.write(l.level, l.text) == nil
		}
	}
}

// handler is slog's text handler, with limits and with a line's level beside it.
type handler struct {
	slog.Handler // writes to *output
	*output
	limiter *limiter
}

// output is where all handlers of a log write to, one line at a time.
type output struct {
	mu    sync.Mutex // only memory is written under it
	level slog.Level
	put   func(level slog.Level, line []byte)
}

func (o *output) Write(p []byte) (int, error) {
	o.put(o.level, p)
	return len(p), nil
}

func newHandler(put func(slog.Level, []byte), text func(io.Writer) slog.Handler) *handler {
	h := &handler{output: &output{put: put}}
	h.Handler = text(h.output)
	h.limiter = newLimiter(h.handle)
	return h
}

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	// Who asks for debug lines asks for each of them.
	if r.Level > slog.LevelDebug && !h.limiter.allow(r.Message, messageRate) {
		return nil
	}
	h.handle(r)
	return nil
}

func (h *handler) handle(r slog.Record) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.level = r.Level
	h.Handler.Handle(context.Background(), r)
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &handler{h.Handler.WithAttrs(attrs), h.output, h.limiter}
}

func (h *handler) WithGroup(name string) slog.Handler {
	return &handler{h.Handler.WithGroup(name), h.output, h.limiter}
}
