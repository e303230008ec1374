package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/proc"
	"virtfs-proxy-helper/bench/qemu"
	"virtfs-proxy-helper/bench/slowfs"
	"virtfs-proxy-helper/codec"
)

// Other connections to the same helper while connections are measured (--hang):
//
//	calm     they are idle
//	hung     each waits for a file system that does not answer
//	flooded  they are idle, and one more sends requests without waiting for answers
//
// The others are compared to the first.

// patience bounds waits that are not measured and have no watchdog.
const patience = 30 * time.Second

// hangDir is the mount point, in a program's export, of the file system that hangs.
const hangDir = "hang"

// neighbours are a program's connections that are not measured.
type neighbours struct {
	clients []*qemu.Client
	fs      *slowfs.FS // nil unless they hang
	flood   *flood     // nil unless one floods
}

// mount mounts the file system that hangs. Where the host's mounts are private,
// a helper that runs already would not see it. backing becomes an empty directory.
func (n *neighbours) mount(dir, backing string) (err error) {
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Mkdir(backing, 0o755)); err != nil {
		return err
	}
	if n.fs, err = slowfs.Mount(dir, backing, slowfs.Options{}); err == nil {
		n.fs.Hold(slowfs.Lookups)
	}
	return err
}

// hangThem sends a request for each neighbour to the file system that hangs, and
// returns when all requests hang there.
func (n *neighbours) hangThem() error {
	for i, c := range n.clients {
		q := codec.Request{Path: qemu.Path("//" + hangDir + "/" + strconv.Itoa(i))}
		if err := c.Send(q.Append(nil, codec.Lstat)); err != nil {
			return err
		}
	}
	deadline := time.Now().Add(patience)
	for n.fs.Waiting() < len(n.clients) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d requests hang: see --workers of the helper",
				n.fs.Waiting(), len(n.clients))
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// leave releases the requests that hang, checks their answers, and closes the
// connections.
func (n *neighbours) leave() (err error) {
	if n.fs != nil {
		hung := n.fs.Waiting()
		err = n.fs.Close()
		for i, c := range n.clients[:min(hung, len(n.clients))] {
			if a, e := c.Receive(codec.Lstat); e != nil || a.Errno == 0 {
				err = errors.Join(err, fmt.Errorf(
					"released, request %d of %d that hung is answered %x, %v",
					i, hung, a.Raw, e))
				break
			}
		}
	}
	for _, c := range n.clients {
		c.Close()
	}
	if n.flood != nil {
		unix.Close(n.flood.fd)
	}
	*n = neighbours{}
	return err
}

// flood is a connection that sends LSTATs as fast as the socket takes them,
// while another thread reads the answers.
type flood struct {
	fd, cpu  int
	stopping atomic.Bool
	total    atomic.Int64 // number of requests, set before the last batch is sent; else 0
	ended    chan error   // receives the result of each thread

	answered float64 // requests answered in all floods
	seconds  float64 // duration of all floods
	began    time.Time
}

const floodBatch = 64

func (f *flood) start() {
	timeout := unix.Timeval{Sec: int64(patience.Seconds())}
	unix.SetsockoptTimeval(f.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)
	f.stopping.Store(false)
	f.total.Store(0)
	f.ended = make(chan error, 2)
	f.began = time.Now()
	var frames []byte
	for range floodBatch {
		frames = append(frames, touchRoot[0].frame...)
	}
	go func() { f.ended <- f.send(frames) }()
	go func() { f.ended <- f.receive() }()
}

// send sends batches until stop is called. It sets total before the last one.
func (f *flood) send(frames []byte) error {
	if err := claimThread(f.cpu); err != nil {
		return err
	}
	for sent := int64(floodBatch); ; sent += floodBatch {
		last := f.stopping.Load()
		if last {
			f.total.Store(sent)
		}
		for rest := frames; len(rest) > 0; {
			n, err := unix.Write(f.fd, rest)
			if err != nil && err != unix.EINTR {
				return err
			}
			rest = rest[max(n, 0):]
		}
		if last {
			return nil
		}
	}
}

func (f *flood) receive() error {
	if err := claimThread(f.cpu); err != nil {
		return err
	}
	const size = codec.HeaderSize + codec.StatSize
	buf := make([]byte, 1<<16)
	for bytes := int64(0); ; {
		n, err := unix.Read(f.fd, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return unix.ECONNRESET
		}
		bytes += int64(n)
		if total := f.total.Load(); total > 0 && bytes >= total*size {
			f.answered += float64(total)
			// A surplus answer would follow at once.
			surplus := []unix.PollFd{{Fd: int32(f.fd), Events: unix.POLLIN}}
			unix.Poll(surplus, 50)
			if bytes > total*size || surplus[0].Revents != 0 {
				return fmt.Errorf("%d requests are answered with more than %d bytes",
					total, total*size)
			}
			return nil
		}
	}
}

// stop returns when every request is answered.
func (f *flood) stop() error {
	f.stopping.Store(true)
	err := errors.Join(<-f.ended, <-f.ended)
	f.seconds += time.Since(f.began).Seconds()
	return err
}

// connects measures a chunk of n new clients, one after the other: the time of
// each from connect(2) to its first answer.
func (c *cell) connects(p *program, n int) (wall, cpu float64, elapsed []int64, err error) {
	done := make(chan struct{})
	go func() { // on a thread that ends with it
		defer close(done)
		if err = claimThread(c.at.client); err != nil {
			return
		}
		settle()
		start, began := proc.CPUTime(p.pids), nanotime()
		for len(elapsed) < n && err == nil {
			var ns int64
			if ns, err = connectOnce(p.socket); err == nil {
				elapsed = append(elapsed, ns)
			}
		}
		wall = float64(nanotime() - began)
		settle()
		cpu = proc.CPUTime(p.pids) - start
	}()
	<-done
	return
}

func connectOnce(name string) (elapsed int64, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	timeout := unix.Timeval{Sec: int64(patience.Seconds())}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return 0, err
	}
	address := &unix.SockaddrUnix{Name: name}
	frame := touchRoot[0].frame
	client := qemu.NewBlocking(fd)
	began := nanotime()
	if err := unix.Connect(fd, address); err != nil {
		return 0, fmt.Errorf("connecting to %s: %w", name, err)
	}
	if err := client.Send(frame); err != nil {
		return 0, err
	}
	err = client.Read(codec.Lstat)
	elapsed = nanotime() - began
	var a qemu.Answer
	if err == nil {
		a, err = client.Answer(codec.Lstat)
	}
	if err != nil || len(a.Payload) != codec.StatSize {
		return 0, fmt.Errorf("a new client is answered %d bytes: %w", len(a.Payload), err)
	}
	return elapsed, nil
}
