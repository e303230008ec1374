// Mutations breaks a copy of the tree, one claim at a time (list.go), and names
// the claims that no test holds: those whose tests pass all the same.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// mutation is one change of the program that makes a claim untrue.
type mutation struct {
	name  string
	claim string // that it breaks
	edits []edit
	// tests are the arguments of go test: each set of them must pass without
	// the mutation, and one must fail with it.
	tests []string
}

// edit replaces text that is in the file once.
type edit struct{ file, old, new string }

const usage = `Usage: scripts/mutate [--list] [NAME...]

Applies each mutation, or those named, to a copy of the last commit, and runs
the tests that should fail. Names those that do not, and ends with status 1 if
there are any. The tests are the project's: they need root, and what scripts/test
installs. The tree that it is called in stays as it is.

`

func main() {
	list := flag.Bool("list", false, "print the mutations and what they break")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), usage)
		flag.PrintDefaults()
	}
	flag.Parse()
	if *list {
		for _, m := range mutations {
			fmt.Printf("%-24s %s\n", m.name, m.claim)
		}
		return
	}
	if err := run(flag.Args()); err != nil {
		fmt.Fprintf(os.Stderr, "mutate: %v\n", err)
		os.Exit(1)
	}
}

func run(names []string) error {
	chosen := mutations
	if len(names) > 0 {
		chosen = nil
		for _, name := range names {
			i := slices.IndexFunc(mutations, func(m mutation) bool { return m.name == name })
			if i < 0 {
				return fmt.Errorf("%s: no such mutation (see --list)", name)
			}
			chosen = append(chosen, mutations[i])
		}
	}
	dir, err := copyOfHead()
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	t := &tree{dir: dir, passed: map[string]bool{}}
	var survived []string
	for _, m := range chosen {
		began := time.Now()
		caught, err := t.try(m, signals)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		verdict := "caught"
		if !caught {
			verdict = "NOT CAUGHT: " + m.claim
			survived = append(survived, m.name)
		}
		fmt.Printf("%-24s %4.0fs  %s\n", m.name, time.Since(began).Seconds(), verdict)
	}
	if survived != nil {
		return fmt.Errorf("no test fails with %s", strings.Join(survived, ", "))
	}
	return nil
}

// copyOfHead unpacks the last commit into a directory of its own.
func copyOfHead() (string, error) {
	dir, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return "", err
	}
	archive := exec.Command("git", "archive", "--format=tar", "HEAD")
	unpack := exec.Command("tar", "-x", "-C", dir)
	archive.Stderr, unpack.Stderr = os.Stderr, os.Stderr
	if unpack.Stdin, err = archive.StdoutPipe(); err == nil {
		if err = unpack.Start(); err == nil {
			err = errors.Join(archive.Run(), unpack.Wait())
		}
	}
	if err == nil {
		err = os.Chmod(dir, 0o755) // ordinary users run what tests build there
	}
	if err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("copy the last commit: %w", err)
	}
	return dir, nil
}

// tree is the copy that is broken.
type tree struct {
	dir    string
	passed map[string]bool // tests that pass without a mutation
}

// try tells whether one of the mutation's tests fails with it. It is an error if
// one fails without, or if the mutation can't be applied or does not build.
func (t *tree) try(m mutation, signals <-chan os.Signal) (caught bool, err error) {
	for _, test := range m.tests {
		if t.passed[test] {
			continue
		}
		out, ok, err := t.test(signals, test)
		switch {
		case err != nil:
			return false, err
		case !ok:
			return false, fmt.Errorf("go test %s fails without the mutation:\n%s", test, out)
		case bytes.Contains(out, []byte("no tests to run")):
			return false, fmt.Errorf("go test %s: there is no such test", test)
		}
		t.passed[test] = true
	}
	restore, err := t.apply(m.edits)
	defer restore()
	if err != nil {
		return false, err
	}
	if out, ok, err := t.run(signals, "go", "build", "./..."); err != nil || !ok {
		return false, errors.Join(err, fmt.Errorf("the mutation does not build:\n%s", out))
	}
	for _, test := range m.tests {
		out, ok, err := t.test(signals, test)
		switch {
		case err != nil:
			return false, err
		case bytes.Contains(out, []byte("[build failed]")):
			return false, fmt.Errorf("the mutation's tests do not build:\n%s", out)
		case !ok:
			return true, nil
		}
	}
	return false, nil
}

// test runs tests, with results of this tree and no other's.
func (t *tree) test(signals <-chan os.Signal, args string) (out []byte, ok bool, err error) {
	all := append([]string{"test", "-count=1", "-timeout=5m"}, strings.Fields(args)...)
	return t.run(signals, "go", all...)
}

// apply makes the edits, and returns what takes them back.
func (t *tree) apply(edits []edit) (restore func(), err error) {
	type file struct {
		path string
		was  []byte
	}
	var changed []file
	restore = func() {
		for _, f := range slices.Backward(changed) {
			if err := os.WriteFile(f.path, f.was, 0o644); err != nil {
				panic(err) // in a copy, which goes
			}
		}
	}
	for _, e := range edits {
		path := filepath.Join(t.dir, e.file)
		was, err := os.ReadFile(path)
		if err != nil {
			return restore, err
		}
		if n := bytes.Count(was, []byte(e.old)); n != 1 {
			return restore, fmt.Errorf("%s has this %d times, not once: "+
				"bring the mutation up to date:\n%s", e.file, n, e.old)
		}
		changed = append(changed, file{path, was})
		broken := bytes.Replace(was, []byte(e.old), []byte(e.new), 1)
		if err := os.WriteFile(path, broken, 0o644); err != nil {
			return restore, err
		}
	}
	return restore, nil
}

// run runs a command in the tree; a signal ends it and is an error.
func (t *tree) run(signals <-chan os.Signal, name string, args ...string) (
	out []byte, ok bool, err error) {
	var b bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Dir = t.dir
	cmd.Stdout, cmd.Stderr = &b, &b
	cmd.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false -trimpath", "HELPER=")
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, false, err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err = <-done:
		return b.Bytes(), err == nil, nil
	case sig := <-signals:
		syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		<-done
		return nil, false, fmt.Errorf("ended by a signal: %v", sig)
	}
}
