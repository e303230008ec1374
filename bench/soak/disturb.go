package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/model"
	"virtfs-proxy-helper/bench/proc"
	"virtfs-proxy-helper/bench/qemu"
	"virtfs-proxy-helper/bench/slowfs"
	"virtfs-proxy-helper/codec"
)

// disturbances are the values of --disturb, in the order of --help.
var disturbances = []struct {
	name, help string
	run        func(*soak, *rand.Rand) // disturbs once; nil for a disturbance of the whole run
	pause      time.Duration           // between two runs: a random one, from 1/8 to 9/8 of it
	late       bool                    // also in the last quarter, in which no server is replaced
}{
	{
		name:  "kill",
		help:  "kill -9 a server",
		run:   (*soak).kill,
		pause: 1700 * time.Millisecond,
	},
	{
		name:  "hup",
		help:  "SIGHUP to the supervisor: another server takes over",
		run:   (*soak).renew,
		pause: 4 * time.Second,
	},
	{
		name:  "cut",
		help:  "clients leave in the middle of frames, send garbage, read no answers",
		run:   (*soak).cut,
		pause: 40 * time.Millisecond,
		late:  true,
	},
	{
		name:  "hang",
		help:  "requests of others hang in a FUSE mount",
		run:   (*soak).hang,
		pause: 4 * time.Second,
		late:  true,
	},
	{
		name: "full",
		help: "some VMs live on file systems without room: ENOSPC, EDQUOT",
		late: true,
	},
	{
		name:  "emfile",
		help:  "the server gets no more descriptors for a while",
		run:   (*soak).starve,
		pause: 3 * time.Second,
		late:  true,
	},
}

// server returns the process id of one of the present servers, 0 if there is none.
func (s *soak) server(rng *rand.Rand) int {
	pids := proc.Children(s.supervisor.Process.Pid)
	if len(pids) == 0 {
		return 0
	}
	return pids[rng.IntN(len(pids))]
}

func (s *soak) kill(rng *rand.Rand) {
	pid := s.server(rng)
	if pid == 0 {
		return
	}
	killed, err := s.events.Kill(pid)
	if err != nil {
		s.wrong("kill: %v", err)
	}
	if killed {
		s.did("kill")
	}
}

func (s *soak) renew(*rand.Rand) {
	unix.Kill(s.supervisor.Process.Pid, unix.SIGHUP)
	s.did("hup")
}

// cut is a client that breaks the protocol. A few send valid requests instead, to
// check that new connections are always served.
func (s *soak) cut(rng *rand.Rand) {
	c, err := qemu.Dial(s.socket, qemu.Patience)
	if err != nil {
		s.wrong("cut: connect: %v", err)
		return
	}
	defer c.Close()
	root := codec.Request{Path: qemu.Path("/shared")}
	open, lstat := root.Append(nil, codec.Open), root.Append(nil, codec.Lstat)
	long := codec.Request{
		Path:  qemu.Path("/shared/none"),
		Name:  codec.CString("user.x"),
		Value: make([]byte, 60_000),
		Size:  1,
	}
	frame := long.Append(nil, codec.Lsetxattr)
	send := func(b []byte) {
		c.Conn().SetWriteDeadline(time.Now().Add(time.Second))
		c.Conn().Write(b)
	}
	switch rng.IntN(8) {
	case 0: // leaves at once
	case 1: // in the middle of a header
		send(lstat[:1+rng.IntN(codec.HeaderSize-1)])
	case 2: // or of a payload
		send(append(lstat, frame[:codec.HeaderSize+rng.IntN(60_000)]...))
	case 3: // before the answer
		send(append(open, open...))
	case 4: // never reads
		var many []byte
		for range 500 {
			many = append(many, lstat...)
		}
		for range 20 {
			c.Conn().SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
			if _, err := c.Conn().Write(many); err != nil {
				break
			}
		}
	case 5: // no protocol at all: the connection is closed
		garbage := make([]byte, codec.HeaderSize+rng.IntN(100))
		for i := range garbage {
			garbage[i] = byte(rng.Uint32()) | 0x80
		}
		send(garbage)
		if err := c.Ended(); err != nil {
			s.wrong("cut: garbage %x is answered: %v", garbage, err)
		}
	default:
		for range 3 {
			sent := time.Now()
			a, err := c.Do(codec.Lstat, root)
			if err != nil || a.Errno != 0 && !(a.Errno == unix.EIO && s.diedTwice(sent)) {
				s.wrong("cut: LSTAT on a new connection: %v %v", a.Errno, err)
			}
		}
	}
	s.did("cut")
}

// diedTwice reports whether two servers have died since a time: both may have been
// processing the same request, which is then answered with EIO.
func (s *soak) diedTwice(since time.Time) bool {
	return s.events.Deaths.Count(since, time.Now()) > 1
}

// hung is the number of requests that hang at once.
const hung = 6

// hang makes requests hang for a while. All others must be served meanwhile, and
// in the end each request must be answered.
//
// A server that is killed in that time dies late: a process can't end before the
// file system has answered its threads, and there is no other server until then.
func (s *soak) hang(rng *rand.Rand) {
	sent := time.Now()
	s.hangs.Hold(slowfs.Lookups)
	defer s.hangs.Release()
	peers := make([]*qemu.Client, hung)
	for i := range peers {
		c, err := qemu.Dial(s.socket, qemu.Patience)
		if err != nil {
			s.wrong("hang: connect: %v", err)
			return
		}
		defer c.Close()
		peers[i] = c
		q := codec.Request{Path: qemu.Path(fmt.Sprintf("/hung/%d", i))}
		if err := c.Send(q.Append(nil, codec.Lstat)); err != nil {
			s.wrong("hang: send: %v", err)
		}
	}
	if !eventually(func() bool { return s.hangs.Waiting() == hung }) {
		s.wrong("hang: %d requests have come to the file system of %d", s.hangs.Waiting(), hung)
	}
	before := s.events.Answered.Load()
	if !eventually(func() bool { return s.events.Answered.Load() > before+100 || s.over.Load() }) {
		s.wrong("hang: nobody else is served meanwhile")
	}
	time.Sleep(time.Duration(rng.Int64N(int64(time.Second))))
	s.hangs.Release()
	for i, c := range peers {
		a, err := c.Receive(codec.Lstat)
		if err != nil || a.Errno != unix.ENOENT && !(a.Errno == unix.EIO && s.diedTwice(sent)) {
			s.wrong("hang: request %d is answered by %v, %v", i, a.Errno, err)
			return
		}
	}
	s.did("hang")
}

// starve lowers the limit of descriptors of a server, but not of one that is
// starting: that could not open its own.
func (s *soak) starve(rng *rand.Rand) {
	pid := s.server(rng)
	defer s.events.Poverty.Begin()()
	if pid == 0 || proc.Descriptors([]int{pid}) <= s.vms {
		return
	}
	var old unix.Rlimit
	if unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old) != nil {
		return
	}
	if unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1, Max: old.Max}, nil) != nil {
		return
	}
	time.Sleep(time.Duration(50+rng.IntN(200)) * time.Millisecond)
	unix.Prlimit(pid, unix.RLIMIT_NOFILE, &old, nil)
	s.did("emfile")
}

// fill mounts file systems with little room on the directories of some VMs:
// each eighth one gets a tmpfs, and each eighth one a subvolume with a quota of
// a btrfs in a file.
func (s *soak) fill(dirs []string) error {
	var quota []string
	for i, dir := range dirs {
		switch i % 8 {
		case 3:
			options := fmt.Sprintf("mode=0755,size=64k,nr_inodes=%d", model.TmpfsInodes)
			err := s.mount("tmpfs", filepath.Join(s.export, dir), "tmpfs", options)
			if err != nil {
				return err
			}
		case 6:
			quota = append(quota, dir)
		}
	}
	image, top := filepath.Join(s.dir, "image"), filepath.Join(s.dir, "btrfs")
	commands := [][]string{
		{"truncate", "-s", "256M", image},
		{"mkfs.btrfs", "-q", image},
		{"mkdir", top},
		{"mount", "-o", "loop", image, top},
		{"btrfs", "quota", "enable", top},
	}
	for _, dir := range quota {
		volume := filepath.Join(top, dir)
		commands = append(commands,
			[]string{"btrfs", "subvolume", "create", volume},
			[]string{"btrfs", "qgroup", "limit", "40K", volume})
	}
	for _, command := range commands {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w (package btrfs-progs?)\n%s",
				strings.Join(command, " "), err, out)
		}
		if command[0] == "mount" {
			s.mounts = append(s.mounts, top)
		}
	}
	for _, dir := range quota {
		at := filepath.Join(s.export, dir)
		if err := unix.Mount(filepath.Join(top, dir), at, "", unix.MS_BIND, ""); err != nil {
			return &os.PathError{Op: "mount", Path: at, Err: err}
		}
		s.mounts = append(s.mounts, at)
	}
	return nil
}

func (s *soak) mount(source, at, kind, options string) error {
	if err := unix.Mount(source, at, kind, unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return &os.PathError{Op: "mount", Path: at, Err: err}
	}
	s.mounts = append(s.mounts, at)
	return nil
}

// eventually waits until ok returns true, up to Patience.
func eventually(ok func() bool) bool {
	for end := time.Now().Add(qemu.Patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// cost holds the resources of the helper when it has no clients.
type cost struct {
	keeperFDs, serverFDs int
	threads              int
	memory               float64 // bytes, of both processes
}

func (s *soak) cost() (c cost, one bool) {
	supervisor := s.supervisor.Process.Pid
	pids := proc.Descendants([]int{supervisor})
	if len(pids) != 2 {
		return c, false
	}
	m := proc.MemoryOf(pids)
	return cost{proc.Descriptors(pids[:1]), proc.Descriptors(pids[1:]), m.Threads, m.PSS}, true
}
