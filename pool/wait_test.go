package pool

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Only the end of the stream is a client's leaving, not what the kernel lacks
// for a moment.
func TestReceived(t *testing.T) {
	for _, c := range []struct {
		n     int
		errno unix.Errno
		want  int
	}{
		{7, 0, 7}, {0, 0, -1}, {-1, unix.ECONNRESET, -1}, {-1, unix.EBADF, -1},
		{-1, unix.EAGAIN, 0}, {-1, unix.EINTR, 0}, {-1, unix.ENOMEM, 0}, {-1, unix.ENOBUFS, 0},
	} {
		if got := received(c.n, c.errno); got != c.want {
			t.Errorf("received(%d, %v) = %d, want %d", c.n, c.errno, got, c.want)
		}
	}
}
