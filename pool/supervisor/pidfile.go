package supervisor

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pidFile holds this process' number.
type pidFile struct {
	path string
	dir  int      // owned
	base string   // the name in dir
	file *os.File // open, so that no other file gets its inode number
	id   fileID
}

// newName is the name of a pidfile in its private directory.
const newName = "new"

// writePIDFile makes the file path, with mode 0644, in one step. It replaces
// another pidfile, and nothing else.
func writePIDFile(path string, export *os.File) (_ *pidFile, err error) {
	p := &pidFile{path: path, base: filepath.Base(path)}
	if p.dir, err = openDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("--pidfile: %w", err)
	}
	if err = checkOutside(path, p.dir, export); err == nil {
		if err = p.write(); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("--pidfile: %w", err)
	}
	return p, nil
}

func (p *pidFile) write() error {
	private, err := tempPrivate(p.dir, p.base)
	if err != nil {
		return err
	}
	defer private.remove()
	fd, err := unix.Openat(private.fd, newName,
		unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	p.file = os.NewFile(uintptr(fd), p.path)
	if p.id, err = idOf(fd, ""); err != nil {
		return err
	}
	_, err = fmt.Fprintf(p.file, "%d\n", os.Getpid())
	if err := errors.Join(err, p.file.Chmod(0o644)); err != nil {
		return errors.Join(err, unix.Unlinkat(private.fd, newName, 0))
	}
	if err := p.place(private); err != nil {
		if p.id.is(private.fd, newName) {
			unix.Unlinkat(private.fd, newName, 0)
		}
		return err
	}
	return nil
}

// place moves the file from private to its name.
func (p *pidFile) place(private *privateDir) error {
	for range 100 {
		err := rename(private.fd, newName, p.dir, p.base, unix.RENAME_NOREPLACE)
		if err != unix.EEXIST {
			return err
		}
		old, err := p.replaceable()
		if err == unix.ENOENT {
			continue
		}
		if err != nil {
			return err
		}
		err = unix.Renameat2(private.fd, newName, p.dir, p.base, unix.RENAME_EXCHANGE)
		switch {
		case err == unix.ENOENT:
			continue
		case err == unix.EINVAL: // the file system can't: there is no file for a moment
			if err := private.discard(p.dir, p.base, old); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		case old.is(private.fd, newName):
			return unix.Unlinkat(private.fd, newName, 0)
		}
		// Another file has got the name meanwhile: it gets it back.
		err = unix.Renameat2(private.fd, newName, p.dir, p.base, unix.RENAME_EXCHANGE)
		if err != nil || !p.id.is(private.fd, newName) {
			return errors.Join(errExchanged, private.putBack(newName, p.dir, p.base))
		}
	}
	return errExchanged
}

var errExchanged = errors.New("the name is exchanged all the time")

// replaceable returns the file that has the name, if that is a pidfile.
func (p *pidFile) replaceable() (fileID, error) {
	fd, err := unix.Openat(p.dir, p.base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fileID{}, err
	}
	defer unix.Close(fd)
	id, err := idOf(fd, "")
	if err != nil {
		return id, err
	}
	if id.kind != unix.S_IFREG {
		return id, errors.New("exists and is not a regular file: remove it, or choose another name")
	}
	f, err := os.Open(fdPath(fd))
	if err != nil {
		return id, err
	}
	defer f.Close()
	if number, err := readNumber(f); err != nil || number < 0 {
		return id, errors.New("exists and is not a pidfile: remove it, or choose another name")
	}
	return id, nil
}

// readNumber reads the number in a pidfile; an empty one has 0.
func readNumber(f *os.File) (int, error) {
	b := make([]byte, 64)
	n, err := f.ReadAt(b, 0)
	if err != io.EOF {
		return 0, errors.Join(err, errors.New("too long"))
	}
	text := strings.TrimSpace(string(b[:n]))
	if text == "" {
		return 0, nil
	}
	return strconv.Atoi(text)
}

// remove removes the file if it is still the one that was made, with this
// process' number.
func (p *pidFile) remove(log *slog.Logger) {
	defer p.close()
	if number, err := readNumber(p.file); err != nil || number != os.Getpid() {
		return
	}
	private, err := tempPrivate(p.dir, p.base)
	if err == nil {
		err = private.discard(p.dir, p.base, p.id)
		private.remove()
	}
	if err != nil {
		log.Warn("the pidfile stays", "pidfile", p.path, "error", err)
	}
}

func (p *pidFile) close() {
	if p.file != nil {
		p.file.Close()
	}
	unix.Close(p.dir)
}
