package ipc

import (
	"os"
	"strings"
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

// A configuration is sent before its server is there, whole or not at all.
func TestConfig(t *testing.T) {
	for size, fits := range map[int]bool{0: true, maxConfig - 3: true, maxConfig - 2: false, 1 << 20: false} {
		ours, theirs, err := New()
		if err != nil {
			t.Fatal(err)
		}
		sent, got := strings.Repeat("x", size), ""
		switch err := ours.SendConfig(sent); {
		case (err == nil) != fits:
			t.Errorf("%d bytes: %v", size, err)
		case fits:
			if err := (&Control{theirs}).RecvConfig(&got); err != nil || got != sent {
				t.Errorf("%d bytes: %v, %d arrive", size, err, len(got))
			}
		}
		ours.Close()
		theirs.Close()
	}
}

// A server says no to another number, to none, and to what is no number.
func TestHello(t *testing.T) {
	hello := func(body ...byte) func(c *Control) { return func(c *Control) { c.Send(Hello, body, nil, 0) } }
	for _, c := range []struct {
		name string
		say  func(c *Control)
		ok   bool // for the server
	}{
		{"this version", func(c *Control) { c.SendHello(7) }, true},
		{"another", hello(Version+1, 7, 0, 0, 0), false},
		{"none", func(*Control) {}, false},
		{"another message", func(c *Control) { c.Send(Stop, nil, nil, 0) }, false},
		{"no number", hello(), false},
		{"no server's number", hello(Version), false},
	} {
		ours, theirs, err := New()
		if err != nil {
			t.Fatal(err)
		}
		server := &Control{theirs}
		c.say(ours)
		n, err := server.AwaitHello()
		if ok := err == nil && n == 7; ok != c.ok {
			t.Errorf("%s: the server finds %d, %v", c.name, n, err)
		}
		ours.Close()
		server.Close()
	}
}
