// Soak runs many synthetic VMs while servers are killed, replaced and starved,
// other clients misbehave, and file systems hang or are full. It checks that
// every answer is right, that the tree agrees with the answers, and that the
// helper releases all its resources.
//
//	soak.go      options, phases, report
//	disturb.go   the disturbances
//
// The VMs and the expected answers are those of package model. Soak observes the
// helper from outside: it detects a leaking goroutine by its thread or its memory
// only. The tests within a process count goroutines.
package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/bench/model"
	"virtfs-proxy-helper/bench/proc"
	"virtfs-proxy-helper/bench/qemu"
	"virtfs-proxy-helper/bench/slowfs"
	"virtfs-proxy-helper/codec"
)

// Resources that the helper may have more than before, when all clients have left.
const (
	// Go keeps the most threads that it has needed at a time. The connections
	// have been far more.
	moreThreads = 48
	// Bytes that the heap keeps, and slots of the in-flight memory until they are
	// used again.
	moreMemory = 32 << 20
)

type soak struct {
	helper  string
	seconds int
	seed    uint64
	vms     int
	disturb []string

	dir, export, socket string
	mounts              []string
	hangs               *slowfs.FS
	supervisor          *exec.Cmd
	exited              chan struct{} // closed when the supervisor has ended
	failed              chan struct{} // receives a value when a fault is noted

	over   atomic.Bool // the VMs stop
	late   atomic.Bool // the last quarter has begun
	events model.Events

	mu     sync.Mutex
	done   map[string]int // number of disturbances by name
	faults []string
}

func main() {
	runtime.LockOSThread() // the helper is killed when the thread that started it ends
	s := &soak{done: map[string]int{}, exited: make(chan struct{}), failed: make(chan struct{}, 1)}
	var names []string
	for _, d := range disturbances {
		names = append(names, d.name)
	}
	pflag.StringVar(&s.helper, "helper", "./virtfs-proxy-helper", "the `PROGRAM` to try")
	pflag.IntVar(&s.seconds, "seconds", 120, "how long the VMs work")
	pflag.IntVar(&s.vms, "vms", 64, "how many VMs")
	pflag.Uint64Var(&s.seed, "seed", uint64(time.Now().UnixNano()),
		"make the same requests as the run that has printed `N`")
	pflag.StringSliceVar(&s.disturb, "disturb", names, "a `LIST` of what happens meanwhile")
	pflag.Usage = func() {
		fmt.Fprintf(os.Stderr, "Usage: soak [OPTION]...\n\nOptions:\n%s\nDisturbances:\n",
			pflag.CommandLine.FlagUsages())
		for _, d := range disturbances {
			fmt.Fprintf(os.Stderr, "  %-8s %s\n", d.name, d.help)
		}
	}
	pflag.Parse()
	for _, name := range s.disturb {
		if !slices.Contains(names, name) {
			fmt.Fprintf(os.Stderr, "soak: --disturb %s: not one of %s\n",
				name, strings.Join(names, ","))
			os.Exit(2)
		}
	}
	if s.seconds < 1 || s.vms < 1 || s.vms > 512 || pflag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "soak: see --help")
		os.Exit(2)
	}
	if err := s.run(); err != nil {
		s.wrong("%v", err)
	}
	for _, fault := range s.faults {
		fmt.Println("WRONG:", fault)
	}
	if len(s.faults) > 0 {
		fmt.Printf("soak: FAILED, --seed %d\n", s.seed)
		os.Exit(1)
	}
	fmt.Println("soak: passed")
}

// wrong records a fault, and ends the work.
func (s *soak) wrong(format string, a ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, fmt.Sprintf(format, a...))
	select {
	case s.failed <- struct{}{}:
	default:
	}
}

// abort ends a soak that does not end in the ordinary way.
func (s *soak) abort(why string) {
	fmt.Printf("soak: FAILED, --seed %d: %s\n%s\n%s",
		s.seed, why, strings.Join(s.faults, "\n"), s.log())
	s.cleanUp()
	os.Exit(1)
}

func (s *soak) time() time.Duration { return time.Duration(s.seconds) * time.Second }

// did counts a disturbance.
func (s *soak) did(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done[what]++
}

func (s *soak) run() (err error) {
	defer func() { err = errors.Join(err, s.cleanUp()) }()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, unix.SIGINT, unix.SIGTERM)
	time.AfterFunc(s.time()+5*qemu.Patience, func() { s.abort("it hangs") })
	fmt.Printf("soak: %d VMs for %d s, disturbed by %s; --seed %d\n",
		s.vms, s.seconds, strings.Join(s.disturb, ","), s.seed)
	vms, err := s.prepare()
	if err != nil {
		return err
	}
	if err := s.startHelper(); err != nil {
		return err
	}
	before, _ := s.cost()
	if err := s.work(vms, interrupted); err != nil {
		return err
	}
	s.checkTrees(vms)
	after := s.checkLeaks(before)
	s.checkEnd()
	s.report(vms, before, after)
	return nil
}

// prepare makes the export, all mounts in it, and the VMs.
func (s *soak) prepare() (vms []*model.VM, err error) {
	if s.dir, err = os.MkdirTemp("", "soak-"); err != nil {
		return nil, err
	}
	s.export, s.socket = filepath.Join(s.dir, "export"), filepath.Join(s.dir, "socket")
	if err := os.Mkdir(s.export, 0o755); err != nil {
		return nil, err
	}
	if err := model.MakeShared(s.export); err != nil {
		return nil, err
	}
	var dirs []string
	for i := range s.vms {
		dirs = append(dirs, fmt.Sprintf("vm%d", i))
		if err := os.Mkdir(filepath.Join(s.export, dirs[i]), 0o755); err != nil {
			return nil, err
		}
	}
	if slices.Contains(s.disturb, "full") {
		if err := s.fill(dirs); err != nil {
			return nil, err
		}
	}
	if slices.Contains(s.disturb, "hang") {
		at, backing := filepath.Join(s.export, "hung"), filepath.Join(s.dir, "backing")
		if err := errors.Join(os.Mkdir(at, 0o755), os.Mkdir(backing, 0o755)); err != nil {
			return nil, err
		}
		if s.hangs, err = slowfs.Mount(at, backing, slowfs.Options{}); err != nil {
			return nil, err
		}
	}
	for i, dir := range dirs {
		v, err := model.NewVM(&s.events, s.export, dir, s.seed, i)
		if err != nil {
			return nil, err
		}
		vms = append(vms, v)
	}
	return vms, nil
}

// startHelper returns when a first client has been served and has left.
func (s *soak) startHelper() error {
	log, err := os.Create(filepath.Join(s.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	s.supervisor = exec.Command(s.helper,
		"-n", "-p", s.export, "-s", s.socket, "-u", "0", "-g", "0")
	s.supervisor.Stdout, s.supervisor.Stderr = log, log
	s.supervisor.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: unix.SIGTERM,
		Setpgid:   true, // ^C interrupts this process alone
	}
	if err := s.supervisor.Start(); err != nil {
		s.supervisor = nil
		return fmt.Errorf("start the helper: %w", err)
	}
	go func() {
		s.supervisor.Wait()
		close(s.exited)
	}()
	served := eventually(func() bool {
		c, err := qemu.Dial(s.socket, qemu.Patience)
		if err != nil {
			return s.ended()
		}
		defer c.Close()
		a, err := c.Do(codec.Lstat, codec.Request{Path: qemu.Path("/shared")})
		return err == nil && a.Errno == 0
	})
	if !served || s.ended() {
		return fmt.Errorf("the helper does not serve:\n%s", s.log())
	}
	if !eventually(func() bool { return bytes.Contains(s.log(), []byte("client left")) }) {
		return errors.New("the helper does not notice that its client has left")
	}
	return nil
}

func (s *soak) ended() bool {
	select {
	case <-s.exited:
		return true
	default:
		return false
	}
}

func (s *soak) log() []byte {
	b, _ := os.ReadFile(filepath.Join(s.dir, "log"))
	return b
}

// work runs the VMs for the given time, with the disturbances.
func (s *soak) work(vms []*model.VM, interrupted <-chan os.Signal) error {
	for _, v := range vms {
		var err error
		if v.Client, err = qemu.Dial(s.socket, qemu.Patience); err != nil {
			return err
		}
		defer v.Client.Close()
	}
	var all sync.WaitGroup
	for _, v := range vms {
		all.Go(func() {
			if err := v.Run(&s.over); err != nil {
				s.wrong("%s: %v", v.Dir, err)
			}
		})
	}
	var disturbers sync.WaitGroup
	for i, d := range disturbances {
		if d.run == nil || !slices.Contains(s.disturb, d.name) {
			continue
		}
		rng := rand.New(rand.NewPCG(s.seed, uint64(1000+i)))
		disturbers.Go(func() {
			for !s.over.Load() && (d.late || !s.late.Load()) {
				d.run(s, rng)
				time.Sleep(d.pause/8 + time.Duration(rng.Int64N(int64(d.pause))))
			}
		})
	}
	var err error
	late, end := time.After(s.time()*3/4), time.After(s.time())
wait:
	for {
		select {
		case <-late:
			s.late.Store(true)
		case <-end:
			break wait
		case sig := <-interrupted:
			err = fmt.Errorf("interrupted: %v", sig)
			time.AfterFunc(5*time.Second, func() { s.abort("interrupted while it hangs") })
			break wait
		case <-s.failed:
			break wait
		case <-s.exited:
			err = fmt.Errorf("the helper has ended:\n%s", s.log())
			break wait
		}
	}
	s.over.Store(true)
	all.Wait()
	disturbers.Wait()
	return err
}

func (s *soak) checkTrees(vms []*model.VM) {
	for _, v := range vms {
		if err := v.Compare(); err != nil {
			s.wrong("%s: its tree: %v", v.Dir, err)
		}
	}
}

// checkLeaks waits until the helper has no more resources than before.
func (s *soak) checkLeaks(before cost) (after cost) {
	ok := eventually(func() bool {
		var one bool
		after, one = s.cost()
		return one && after.keeperFDs == before.keeperFDs && after.serverFDs <= before.serverFDs &&
			after.threads <= before.threads+moreThreads && after.memory <= before.memory+moreMemory
	})
	if !ok {
		s.wrong("a leak: supervisor and servers are processes %v; they have %+v, and had %+v",
			proc.Children(s.supervisor.Process.Pid), after, before)
	}
	return after
}

// checkEnd ends the helper and checks its exit status, names and log.
func (s *soak) checkEnd() {
	servers := proc.Children(s.supervisor.Process.Pid)
	s.supervisor.Process.Signal(unix.SIGTERM)
	select {
	case <-s.exited:
	case <-time.After(qemu.Patience):
		s.wrong("the helper does not end on SIGTERM")
		return
	}
	if !s.supervisor.ProcessState.Success() {
		s.wrong("the helper ends with %v", s.supervisor.ProcessState)
	}
	for _, pid := range servers {
		if unix.Kill(pid, 0) == nil {
			s.wrong("server %d outlives its supervisor", pid)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, "*socket")); len(left) > 0 {
		s.wrong("names are left: %q", left)
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, ".*socket")); len(left) > 0 {
		s.wrong("names are left: %q", left)
	}
	log := string(s.log())
	if fault := proc.Faults(log); fault != "" {
		s.wrong("the helper has printed:\n%s", fault)
	}
	for line := range strings.Lines(log) {
		if strings.Contains(line, "killing the server") ||
			strings.Contains(line, "half of an answer") ||
			strings.Contains(line, "identity") {
			s.wrong("the helper has logged: %s", line)
		}
	}
}

func (s *soak) report(vms []*model.VM, before, after cost) {
	var answers [codec.NumTypes]int
	errnos, doubts, sum := map[unix.Errno]int{}, 0, 0
	for _, v := range vms {
		doubts += v.Doubts
		for t, n := range v.Answers {
			answers[t] += n
			sum += n
		}
		for errno, n := range v.Errnos {
			errnos[errno] += n
		}
	}
	fmt.Printf("answers: %d; %d times EIO or EMFILE left open what had been done, "+
		"and the tree told\n", sum, doubts)
	for t := codec.Open; t < codec.NumTypes; t++ {
		fmt.Printf("  %-13v %8d\n", t, answers[t])
	}
	mostFirst := func(a, b unix.Errno) int { return cmp.Compare(errnos[b], errnos[a]) }
	for _, errno := range slices.SortedFunc(maps.Keys(errnos), mostFirst) {
		fmt.Printf("  %-13s %8d\n", cmp.Or(unix.ErrnoName(errno), "success"), errnos[errno])
	}
	fmt.Println("disturbances:")
	for _, d := range disturbances {
		if n := s.done[d.name]; d.run != nil {
			fmt.Printf("  %-13s %8d\n", d.name, n)
		}
	}
	fmt.Printf("helper, before and after: descriptors of the supervisor %d %d, "+
		"of the server %d %d; threads %d %d; memory %.1f %.1f MiB\n",
		before.keeperFDs, after.keeperFDs,
		before.serverFDs, after.serverFDs,
		before.threads, after.threads,
		before.memory/(1<<20), after.memory/(1<<20))
}

// cleanUp ends all processes, unmounts all file systems and removes all files.
func (s *soak) cleanUp() (err error) {
	if s.supervisor != nil && !s.ended() {
		supervisor := s.supervisor.Process.Pid
		for _, pid := range append(proc.Children(supervisor), supervisor) {
			unix.Kill(pid, unix.SIGKILL)
		}
		<-s.exited
	}
	if s.hangs != nil {
		err = s.hangs.Close()
	}
	for _, at := range slices.Backward(s.mounts) {
		err = errors.Join(err, unix.Unmount(at, unix.MNT_DETACH))
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}
