package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// enterScratch starts bench anew, with --scratch, on a fresh ext4 in memory.
// Measured on whatever lies below /tmp, the file system drowns the helper: an
// ext4 without an in-flight memory, for example, needs a millisecond for a create after
// some thousand removes, for it looks at each inode that was freed lately.
//
// The file system is mounted in a mount namespace of this process alone: it
// goes when the process does, in whatever way. enterScratch returns only if
// that didn't work.
func enterScratch() error {
	parent := "/dev/shm"
	if _, err := os.Stat(parent); err != nil {
		parent = os.TempDir()
	}
	dir, err := os.MkdirTemp(parent, "bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// A namespace is a thread's: this one starts mount, and becomes the new
	// process.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	image, files := filepath.Join(dir, "image"), filepath.Join(dir, "fs")
	for _, command := range [][]string{
		{"truncate", "-s", "2G", image}, // of which only what is used takes memory
		{"mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", image},
		{"mkdir", files},
		{"mount", "-o", "loop,commit=60", image, files},
	} {
		if text, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w %s", strings.Join(command, " "), err, text)
		}
	}
	return unix.Exec(self, append(os.Args, "--scratch="+dir), os.Environ())
}

// leaveScratch removes what enterScratch has made.
func leaveScratch(dir string) {
	unix.Unmount(filepath.Join(dir, "fs"), unix.MNT_DETACH)
	os.RemoveAll(dir)
}
