package sandbox

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// serverCaps are the capabilities that requests need; they are all that remains to
// the server.
var serverCaps = []cap.Value{
	cap.CHOWN, cap.DAC_OVERRIDE, cap.FOWNER, cap.FSETID, cap.SETGID, cap.SETUID, cap.MKNOD,
}

// supervisorCaps are what the supervisor works with: it makes and removes names.
var supervisorCaps = []cap.Value{cap.DAC_OVERRIDE, cap.FOWNER}

// Mask returns the capabilities that requests need as the kernel's bit mask.
func Mask() uint64 {
	var m uint64
	for _, v := range serverCaps {
		m |= 1 << v
	}
	return m
}

// setupCaps are the capabilities that it takes to confine a server, beside those
// that the server keeps: SETPCAP empties its bounding set.
func (c Config) setupCaps() (caps []cap.Value) {
	switch c.Sandbox {
	case SandboxNamespace:
		caps = []cap.Value{cap.SYS_ADMIN, cap.SETPCAP}
	case SandboxChroot:
		caps = []cap.Value{cap.SYS_CHROOT, cap.SETPCAP}
	default:
		caps = []cap.Value{cap.SYS_CHROOT}
	}
	if c.mapsRoot() {
		caps = append(caps, cap.SETFCAP)
	}
	return caps
}

// Check says what the process lacks to confine and to serve, or has too much, and
// what to do about it.
func (c Config) Check() error {
	if c.ReadOnly && c.Sandbox != SandboxNamespace {
		return fmt.Errorf("--readonly --sandbox=%s: "+
			"descriptors that QEMU is given could be opened again for writing, "+
			"as the mount is not read-only: use --sandbox=namespace, "+
			"or mount the export read-only and leave out --readonly", c.Sandbox)
	}
	if err := c.checkGroups(); err != nil {
		return err
	}
	have := cap.GetProc()
	var missing []string
	for _, v := range append(c.setupCaps(), serverCaps...) {
		if ok, err := have.GetFlag(cap.Effective, v); err != nil || !ok {
			missing = append(missing, strings.ToUpper(v.String()))
		}
	}
	if missing == nil {
		return nil
	}
	err := fmt.Errorf("runs as root but without %s: "+
		"grant them (docker: --cap-add; systemd: CapabilityBoundingSet=)",
		strings.Join(missing, ", "))
	if missing[0] == "CAP_SYS_ADMIN" && c.Sandbox == SandboxNamespace {
		err = fmt.Errorf("%w, or do without namespaces of its own: --sandbox=chroot", err)
	}
	return err
}

// DropSupervisorPrivileges leaves the supervisor, this process, what it needs
// to start servers and to make names. Nothing but Start uses more than the
// latter: the others lie in the permitted set, for a server inherits by execve
// what both that and the bounding set have.
func (c Config) DropSupervisorPrivileges() error {
	if c.Sandbox != SandboxNone {
		if err := c.dropSupervisorCaps(); err != nil {
			return err
		}
	}
	return c.filterSupervisor()
}

func (c Config) dropSupervisorCaps() error {
	permitted := append(c.setupCaps(), serverCaps...)
	// Where they can be had: a server takes a detached /proc/self/fd if it is
	// not in a namespace, too, and calms its runtime's monitor thread.
	for _, v := range []cap.Value{cap.SYS_ADMIN, cap.SYS_NICE} {
		if ok, _ := cap.GetProc().GetFlag(cap.Permitted, v); ok && !slices.Contains(permitted, v) {
			permitted = append(permitted, v)
		}
	}
	return drop(0, supervisorCaps, permitted, permitted)
}

// WithCaps runs f with all that the supervisor may have, to do again what it has
// done at its start.
func (c Config) WithCaps(f func() error) error { return c.withCaps(f) }

// withCaps runs f with all that the supervisor may have, on this thread alone.
// While a goroutine is locked to it, the runtime makes no threads from it that
// would have the same.
func (c Config) withCaps(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3} // pid 0: this thread
	var was [2]unix.CapUserData
	if err := unix.Capget(header, &was[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	all := was
	for i := range all {
		all[i].Effective = all[i].Permitted
	}
	if err := unix.Capset(header, &all[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	err := f()
	if err := unix.Capset(header, &was[0]); err != nil {
		panic(err) // to lower them is always allowed
	}
	return err
}

// dropAllButServerCaps leaves the server what requests need.
func dropAllButServerCaps() error { return drop(os.Getegid(), serverCaps, serverCaps, nil) }

// drop leaves the process these capabilities, the group gid alone, if it can leave
// the supplementary ones, and no way to get more. It changes all threads, those to
// come included.
func drop(gid int, effective, permitted, bounding []cap.Value) error {
	if err := cap.ResetAmbient(); err != nil {
		return fmt.Errorf("drop ambient capabilities: %w", err)
	}
	for v := range cap.MaxBits() {
		if slices.Contains(bounding, v) {
			continue
		}
		if err := cap.DropBound(v); err != nil {
			return fmt.Errorf("drop %s from the bounding set: %w", v, err)
		}
	}
	if !keepsGroups() {
		if err := cap.SetGroups(gid); err != nil { // which lowers all effective capabilities, too
			return fmt.Errorf("drop supplementary groups: %w", err)
		}
	}
	set := cap.NewSet()
	for flag, values := range map[cap.Flag][]cap.Value{
		cap.Effective: effective,
		cap.Permitted: permitted,
	} {
		if err := set.SetFlag(flag, true, values...); err != nil {
			return err
		}
	}
	if err := set.SetProc(); err != nil {
		return fmt.Errorf("keep no more than %s: %w", set, err)
	}
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}
