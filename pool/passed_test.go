package pool_test

import (
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/helpertest"
	"virtfs-proxy-helper/codec"
)

// A client attaches a descriptor whose last close waits to what it sends. The
// kernel refuses that where it can (Linux 6.16); elsewhere no other client
// notices, neither while the descriptor is dropped nor when the client has left
// and the supervisor closes the connection.
func TestPassedDescriptors(t *testing.T) {
	helpertest.NeedRoot(t)
	helpertest.EachWay(t, nil, func(t *testing.T, way helpertest.Way) {
		h := way.Start(t, helpertest.Setup{Fill: fill})
		hostile := h.Dial()
		lingering, peer := lingeringSocket(t)
		defer unix.Close(peer)
		request := frame(codec.Lstat, "/a")
		_, _, err := hostile.Conn().WriteMsgUnix(request[:1], unix.UnixRights(lingering), nil)
		go unix.Close(lingering) // the last close, if the kernel has not passed it
		if refusesDescriptors(t) {
			if err == nil {
				t.Fatal("the kernel passes descriptors to the helper")
			}
			hostile.Send(request)
			if a := hostile.Read(codec.Lstat); a.Errno != 0 {
				t.Error(a.Errno)
			}
		} else if err != nil {
			t.Fatal(err)
		}
		if way.FD {
			return
		}
		others := func() {
			t.Helper()
			c := h.Dial()
			for range 100 {
				c.Want(0, codec.Lstat, codec.Request{Path: helpertest.Path("/a")})
			}
			c.Close()
		}
		others()
		hostile.Close()
		others()
	})
}

// refusesDescriptors returns whether this kernel can refuse them.
func refusesDescriptors(t *testing.T) bool {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSRIGHTS, 0) == nil
}
