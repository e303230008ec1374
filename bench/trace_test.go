package main

import (
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// Little-endian, as recorded: LSTAT "/", OPEN "/", and their answers.
const (
	lstatRoot = "> 080000000400000002002f00"
	enoent    = "< 0100000004000000feffffff"
	openRoot  = "> 020000000800000002002f0000000000"
	withFD    = "<fd ffffff7f"
	eacces    = "< f3ffffff"
)

func TestParseTrace(t *testing.T) {
	for _, test := range []struct {
		name  string
		lines []string
		want  []unix.Errno // of the answers
		fails string
	}{
		{name: "empty"},
		{name: "a frame and a descriptor", lines: []string{lstatRoot, enoent, openRoot, withFD},
			want: []unix.Errno{unix.ENOENT, 0}},
		{name: "pipelined", lines: []string{openRoot, lstatRoot, eacces, enoent},
			want: []unix.Errno{unix.EACCES, unix.ENOENT}},
		{name: "the last is not answered", lines: []string{lstatRoot, enoent, openRoot},
			want: []unix.Errno{unix.ENOENT}},
		{name: "no hex", lines: []string{"> xy"}, fails: "line 1"},
		{name: "no kind", lines: []string{lstatRoot, "? 00"}, fails: "line 2: neither"},
		{name: "too short", lines: []string{"> 08"}, fails: "a request of 1 bytes"},
		{name: "header lies", lines: []string{lstatRoot + "00"}, fails: "13 bytes where the header says 12"},
		{name: "no such type", lines: []string{"> 6300000000000000"}, fails: "no such request"},
		{name: "answer first", lines: []string{enoent}, fails: "without a request"},
		{name: "half an answer", lines: []string{lstatRoot, "< 0100"}, fails: "no answer to LSTAT"},
	} {
		list, err := parseTrace(strings.NewReader(strings.Join(test.lines, "\n")))
		if test.fails != "" {
			if err == nil || !strings.Contains(err.Error(), test.fails) {
				t.Errorf("%s: error %v, want %q", test.name, err, test.fails)
			}
			continue
		}
		if err != nil || len(list) != len(test.want) {
			t.Errorf("%s: %d exchanges, error %v", test.name, len(list), err)
			continue
		}
		for i, x := range list {
			if x.answer.Errno != test.want[i] {
				t.Errorf("%s: answer %d has errno %d, want %d", test.name, i, x.answer.Errno, test.want[i])
			}
		}
	}
}

func TestTraceRoundTrip(t *testing.T) {
	for _, name := range []string{"plain", "zipped.gz"} {
		name = filepath.Join(t.TempDir(), name)
		w, err := createTrace(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{openRoot, withFD} {
			kind, digits, _ := strings.Cut(line, " ")
			frame, _ := hex.DecodeString(digits)
			if err := w.line(kind, frame); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.close(); err != nil {
			t.Fatal(err)
		}
		if list, err := openTrace(name); err != nil || len(list) != 1 || list[0].typ != codec.Open {
			t.Errorf("%s: %v, %v", name, list, err)
		}
	}
}

// What was there before a trace: all that it finds and has not made.
func TestTreeBefore(t *testing.T) {
	var list []exchange
	add := func(typ codec.Type, errno unix.Errno, q codec.Request, mode uint32) {
		x := exchange{frame: q.Append(nil, typ), typ: typ, answer: codec.Answer{Errno: errno}}
		if typ == codec.Lstat && errno == 0 {
			answer := codec.AppendStat(nil, &unix.Stat_t{Mode: mode, Size: 5})
			x.answer.Payload = answer[codec.HeaderSize:]
		}
		list = append(list, x)
	}
	path := func(s string) codec.Request { return codec.Request{Path: codec.CString(s)} }
	add(codec.Lstat, 0, path("/\x00"), unix.S_IFDIR|0o755)
	add(codec.Lstat, unix.ENOENT, path("//new\x00"), 0)
	add(codec.Create, 0, path("//new"), 0)
	add(codec.Lstat, 0, path("//new\x00"), unix.S_IFREG|0o644)
	add(codec.Lstat, 0, path("//dir\x00"), unix.S_IFDIR|0o700)
	add(codec.Rename, 0, codec.Request{Path: codec.CString("//dir"), NewPath: codec.CString("//moved")}, 0)
	add(codec.Lstat, 0, path("//moved/pipe\x00"), unix.S_IFIFO|0o600) // so it was dir/pipe
	add(codec.Chmod, 0, path("//old\x00"), 0)
	add(codec.Remove, 0, path("//old"), 0)
	before := treeBefore(list)

	dir := t.TempDir()
	for range 2 { // the second empties what the first has made
		if err := os.WriteFile(filepath.Join(dir, "stray"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if os.Getuid() != 0 {
			for path, n := range before {
				n.uid, n.gid = uint32(os.Getuid()), uint32(os.Getgid())
				before[path] = n
			}
		}
		if err := before.build(dir); err != nil {
			t.Fatal(err)
		}
	}
	got := map[string]fs.FileMode{}
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if path != dir {
			info, _ := d.Info()
			got[strings.TrimPrefix(path, dir)] = info.Mode()
		}
		return err
	})
	want := map[string]fs.FileMode{"/dir": fs.ModeDir | 0o700, "/dir/pipe": fs.ModeNamedPipe | 0o600, "/old": 0o644}
	for path, mode := range want {
		if got[path] != mode {
			t.Errorf("%s is %v, want %v", path, got[path], mode)
		}
	}
	if len(got) != len(want) {
		t.Errorf("made %v", got)
	}
}
