package pool

import (
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
	"virtfs-proxy-helper/pool/inflight"
	"virtfs-proxy-helper/pool/progress"
)

// A thread that could not take back an identity ends also if the client does not
// read the answer, or has left: the connection is parked or closed then, and the
// worker would go on with another.
func TestSpoiltThreadEnds(t *testing.T) {
	for name, want := range map[string]outcome{"deaf": parks, "left": ends} {
		t.Run(name, func(t *testing.T) {
			file, err := inflight.Create(1)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			memory, err := inflight.Map(file)
			if err != nil {
				t.Fatal(err)
			}
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fds[0])
			if err := prepare(fds[0]); err != nil {
				t.Fatal(err)
			}
			request := (&codec.Request{Path: codec.CString("/\x00")}).Append(nil, codec.Lstat)
			if _, err := unix.Write(fds[1], request); err != nil {
				t.Fatal(err)
			}
			c := &conn{srv: &Server{workers: newWorkers(1, nil)}, peer: &peer{}, fd: fds[0], raw: true,
				recovered: true, slot: memory.Slot(0), progress: new(progress.Conn)}
			if n, errno := c.slot.Receive(c.fd, unix.MSG_DONTWAIT, true); n != len(request) || errno != 0 {
				t.Fatal(n, errno)
			}
			c.slot.Begin()
			c.unsent = answer{bytes: c.slot.Keep(make([]byte, codec.MaxPayload), false), fd: -1, t: codec.Lstat,
				size: len(request) - codec.HeaderSize, kept: true}
			c.turn.call.Tainted = true
			if want == ends {
				unix.Close(fds[1])
			} else {
				defer unix.Close(fds[1])
			}
			if end, sound := c.serve(); end != want || sound {
				t.Errorf("outcome %d, sound %v, want %d, false", end, sound, want)
			}
		})
	}
}
