package model

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/qemu"
)

// Spans remembers when something went on.
type Spans struct {
	mu   sync.Mutex
	list []*[2]time.Time // from, to; to is zero if it goes on
}

// Begin notes that it goes on until end is called.
func (s *Spans) Begin() (end func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	span := &[2]time.Time{time.Now()}
	s.list = append(s.list, span)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		span[1] = time.Now()
	}
}

// Count returns how often it went on between from and to.
func (s *Spans) Count(from, to time.Time) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, span := range s.list {
		if !span[0].After(to) && (span[1].IsZero() || !span[1].Before(from)) {
			n++
		}
	}
	return n
}

// Kill kills a server and waits until it is dead: as long as one of its threads
// lives it may answer. It returns false if there is no such process.
func (e *Events) Kill(pid int) (killed bool, err error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false, nil
	}
	defer unix.Close(fd)
	defer e.Deaths.Begin()()
	if unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) != nil {
		return false, nil
	}
	ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for end := time.Now().Add(qemu.Patience); ready[0].Revents == 0; unix.Poll(ready, 1000) {
		if time.Now().After(end) {
			return true, fmt.Errorf("server %d does not die of SIGKILL", pid)
		}
	}
	return true, nil
}
