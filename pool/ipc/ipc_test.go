package ipc

import (
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// The supervisor closes its end when a server has ended, while another goroutine
// may still be telling that server to leave: the message must go nowhere, not
// to a descriptor that has got the same number.
func TestSendWhileClosed(t *testing.T) {
	for range 200 {
		ours, theirs, err := New()
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := ours.Send(Stop, nil, nil, 0); err != nil && err != unix.EPIPE && err != os.ErrClosed {
				t.Errorf("send: %v", err)
			}
		})
		theirs.Close()
		ours.Close()
		wg.Wait()
	}
}
