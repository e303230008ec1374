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

// Both sides say no to another number, to none, and to what is no number.
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
	for _, c := range []struct {
		name string
		say  func(c *Control)
		ok   bool // for the supervisor
	}{
		{"this version", hello(Version), true},
		{"another", hello(Version + 1), false},
		{"none", func(*Control) {}, false},
		{"no number", hello(), false},
		{"too much", hello(Version, 1), false},
		{"twice", func(c *Control) { hello(Version)(c); hello(Version)(c) }, false},
	} {
		ours, theirs, err := New()
		if err != nil {
			t.Fatal(err)
		}
		server := &Control{theirs}
		c.say(server)
		server.SendReady()
		if err := ours.AwaitReady(func(*os.File) {}); (err == nil) != c.ok {
			t.Errorf("%s: the supervisor finds %v", c.name, err)
		}
		ours.Close()
		server.Close()
	}
}
