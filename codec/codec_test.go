package codec

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"os"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// unhex ignores blanks, which set the fields apart.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func cstr(s string) CString { return CString(s + "\x00") }

// requests are frames as a real QEMU sent them (marked *, from testdata), or
// built by hand from the protocol's tables, with what they mean.
var requests = []struct {
	frame string
	typ   Type
	want  Request
}{
	{"02000000 0f000000 0900 2f2f72756e2e736800 00000000", // *
		Open, Request{Path: cstr("//run.sh")}},
	{"02000000 0d000000 0700 2f61622f63640a 42000080", // no NUL; flags are an i32
		Open, Request{Path: cstr("/ab/cd\n"), Flags: -0x7fffffbe}},
	{"03000000 23000000 1100 2f2f772f7372632f524541444d452e6d64 c1000000 a4010000 00000000 00000000", // *
		Create, Request{Path: cstr("//w/src/README.md"), Flags: 0xc1, Mode: 0o644}},
	{"04000000 1e000000 00000000 00000000 0800 2f2f772f6669666f a4110000 0000000000000000", // *
		Mknod, Request{Path: cstr("//w/fifo"), Mode: unix.S_IFIFO | 0o644}},
	{"04000000 1b000000 e8030000 e9030000 0500 2f6e756c6c b6210000 0301000000000000",
		Mknod, Request{UID: 1000, GID: 1001, Path: cstr("/null"), Mode: unix.S_IFCHR | 0o666, Rdev: 0x103}},
	{"05000000 11000000 00000000 00000000 0300 2f2f77 ed410000", // *
		Mkdir, Request{Path: cstr("//w"), Mode: 0o40755}},
	{"06000000 14000000 00000000 00000000 0100 61 0700 2f2f772f6c6e6b", // *
		Symlink, Request{Target: cstr("a"), Path: cstr("//w/lnk")}},
	{"07000000 1f000000 1300 2f2f772f737263332f524541444d452e6d6400 0800 2f2f772f68617264", // *
		Link, Request{Path: cstr("//w/src3/README.md"), NewPath: cstr("//w/hard")}},
	{"08000000 04000000 0200 2f00", // *
		Lstat, Request{Path: cstr("/")}},
	{"08000000 02000000 0000", Lstat, Request{Path: cstr("")}},
	{"08000000 03000000 0100 00", Lstat, Request{Path: cstr("")}},
	{"08000000 07000000 0500 2f61002f62", // cut at the first NUL
		Lstat, Request{Path: cstr("/a")}},
	{"08000000 07000000 0200 2f61 ffffff", // bytes left over
		Lstat, Request{Path: cstr("/a")}},
	{"09000000 0e000000 0800 2f2f772f6c6e6b00 00100000", // *
		Readlink, Request{Path: cstr("//w/lnk"), Size: 4096}},
	{"09000000 08000000 0200 2f61 ffffffff", Readlink, Request{Path: cstr("/a"), Size: -1}},
	{"0a000000 0b000000 0900 2f2f72756e2e736800", // *
		Statfs, Request{Path: cstr("//run.sh")}},
	{"0b000000 0e000000 0800 2f2f772f73726300 ed410000", // *
		Chmod, Request{Path: cstr("//w/src"), Mode: 0o40755}},
	{"0c000000 12000000 0800 2f2f772f73726300 00000000 00000000", // *
		Chown, Request{Path: cstr("//w/src")}},
	{"0c000000 0c000000 0200 2f61 ffffffff 64000000",
		Chown, Request{Path: cstr("/a"), UID: 0xffffffff, GID: 100}},
	{"0d000000 13000000 0900 2f2f772f6861726400 6400000000000000", // *
		Truncate, Request{Path: cstr("//w/hard"), Size: 100}},
	{"0e000000 2a000000 0800 2f2f772f73726300 7170046b00000000 0100000000000000 7170046b00000000 feffff3f00000000",
		Utime,
		Request{Path: cstr("//w/src"), Atime: Time{0x6b047071, 1}, Mtime: Time{0x6b047071, unix.UTIME_OMIT}}},
	{"0f000000 14000000 0800 2f2f772f73726332 0800 2f2f772f73726333", // *
		Rename, Request{Path: cstr("//w/src2"), NewPath: cstr("//w/src3")}},
	{"10000000 13000000 1100 2f2f772f7372632f524541444d452e6d64", // *
		Remove, Request{Path: cstr("//w/src/README.md")}},
	{"11000000 2d000000 00000000 1200 2f2f772f7372632f524541444d452e6d6400 1300 73656375726974792e6361706162696c697479",
		Lgetxattr,
		Request{Path: cstr("//w/src/README.md"), Name: cstr("security.capability")}}, // *
	{"12000000 08000000 ffff0000 0200 2f61", Llistxattr, Request{Size: 65535, Path: cstr("/a")}},
	{"13000000 1a000000 0200 2f61 0600 757365722e61 0400 00014100 03000000 01000000", Lsetxattr,
		Request{Path: cstr("/a"), Name: cstr("user.a"), Value: []byte{0, 1, 'A', 0}, Size: 3,
			Flags: unix.XATTR_CREATE}},
	{"14000000 0c000000 0200 2f61 0600 757365722e61",
		Lremovexattr, Request{Path: cstr("/a"), Name: cstr("user.a")}},
	{"15000000 0b000000 0900 2f2f72756e2e736800", GetVersion, Request{Path: cstr("//run.sh")}}, // *
}

func TestDecode(t *testing.T) {
	seen := map[Type]bool{}
	for _, c := range requests {
		frame := unhex(t, c.frame)
		typ, size, err := ParseHeader(frame)
		if err != nil || typ != c.typ || size != len(frame)-HeaderSize {
			t.Errorf("%s: header: %v, %d bytes, %v", c.frame, typ, size, err)
			continue
		}
		seen[typ] = true
		var got Request
		if !got.Decode(typ, frame[HeaderSize:]) {
			t.Errorf("%s: not decoded", c.frame)
		} else if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s:\ngot  %+v\nwant %+v", c.frame, got, c.want)
		}
	}
	for typ := Open; typ < NumTypes; typ++ {
		if !seen[typ] {
			t.Errorf("no case for %v", typ)
		}
	}
}

// A frame that a client builds means to the helper what the client meant, and
// QEMU's own frames are rebuilt byte by byte where all strings have their NUL.
func TestAppend(t *testing.T) {
	for _, c := range requests {
		var got Request
		frame := c.want.Append(nil, c.typ)
		if !got.Decode(c.typ, frame[HeaderSize:]) || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v:\ngot  %+v\nwant %+v", c.typ, got, c.want)
		}
	}
	want := unhex(t, "110000002d00000000000000 1200 2f2f772f7372632f524541444d452e6d6400 "+
		"1300 73656375726974792e6361706162696c697479")
	q := Request{Path: cstr("//w/src/README.md"), Name: CString("security.capability")}
	if got := q.Append([]byte("before"), Lgetxattr); !bytes.Equal(got[len("before"):], want) {
		t.Errorf("got %x, want %x", got, want)
	}
}

// Every payload that ends too early is refused, at each of its bytes, and
// nothing outside of it is touched.
func TestDecodeShort(t *testing.T) {
	for _, c := range requests {
		var again Request
		whole := c.want.Append(nil, c.typ)[HeaderSize:] // without bytes left over
		for n := range whole {
			b := append(append([]byte{0xaa}, whole[:n]...), 0xbb)
			if again.Decode(c.typ, b[1:n+1:n+1]) {
				t.Errorf("%v: decoded from %d of %d bytes", c.typ, n, len(whole))
			}
			if b[0] != 0xaa || b[n+1] != 0xbb {
				t.Errorf("%v: wrote outside of the payload", c.typ)
			}
		}
	}
	// A string's length that runs past the frame.
	var q Request
	for _, payload := range []string{"0500 2f61", "ffff", "ffff 2f00", "00"} {
		if q.Decode(Lstat, unhex(t, payload)) {
			t.Errorf("%s: decoded", payload)
		}
	}
}

func TestParseHeader(t *testing.T) {
	for _, c := range []struct {
		header string
		size   int
		err    error
	}{
		{"02000000 00000000", 0, nil},
		{"15000000 00000100", 65536, nil},
		{"08000000 01000100", 0, ErrSize},
		{"08000000 ffffffff", 0, ErrSize},
		{"00000000 04000000", 0, ErrType},
		{"01000000 04000000", 0, ErrType},
		{"16000000 04000000", 0, ErrType},
		{"ffffffff ffffffff", 0, ErrType},
	} {
		if _, size, err := ParseHeader(unhex(t, c.header)); size != c.size || err != c.err {
			t.Errorf("%s: %d bytes, %v; want %d, %v", c.header, size, err, c.size, c.err)
		}
	}
}

func TestAnswers(t *testing.T) {
	_, room := StringRoom([]byte("x"), 3)
	if len(room) != 3 {
		t.Fatalf("%d bytes of room", len(room))
	}
	str := func(s string) []byte {
		b, room := StringRoom(nil, len(s)+5)
		return FinishString(b, copy(room, s))
	}
	st := unix.Stat_t{Dev: 0xfe00, Ino: 10002458, Nlink: 2, Mode: 0o40755, Uid: 1, Gid: 2,
		Rdev: 3, Size: 4096, Blksize: 4096, Blocks: 8,
		Atim: unix.Timespec{Sec: 5, Nsec: 6}, Mtim: unix.Timespec{Sec: 7, Nsec: 8},
		Ctim: unix.Timespec{Sec: 9, Nsec: 10}}
	sfs := unix.Statfs_t{Type: 0xef53, Bsize: 4096, Blocks: 1, Bfree: 2, Bavail: 3, Files: 4, Ffree: 5,
		Fsid: unix.Fsid{Val: [2]int32{-1643198884, 1}}, Namelen: 255, Frsize: 4096}
	for _, c := range []struct {
		name string
		got  []byte
		want string
	}{
		{"status", AppendStatus(nil, 0), "00000000 04000000 00000000"},
		{"length", AppendStatus(nil, 14), "00000000 04000000 0e000000"},
		{"errno", AppendErrno(nil, Lstat, unix.ENOENT), "01000000 04000000 feffffff"},
		{"bare errno", AppendErrno(nil, Open, unix.ENXIO), "faffffff"},
		{"bare errno", AppendErrno(nil, Create, unix.ENOBUFS), "97ffffff"},
		{"descriptor", AppendFD(nil), "ffffff7f"},
		{"version", AppendVersion(nil, 0xfe32a982), "00000000 08000000 82a932fe 00000000"},
		{"string", str("a"), "00000000 03000000 0100 61"},
		{"empty string", str(""), "00000000 02000000 0000"},
		{"stat", AppendStat(nil, &st), `00000000 74000000
			00fe000000000000 1aa0980000000000 0200000000000000 ed410000 01000000 02000000
			0300000000000000 0010000000000000 0010000000000000 0800000000000000
			0500000000000000 0600000000000000 0700000000000000 0800000000000000 0900000000000000 0a00000000000000`},
		{"statfs", AppendStatfs(nil, &sfs), `00000000 58000000
			53ef000000000000 0010000000000000 0100000000000000 0200000000000000
			0300000000000000 0400000000000000 0500000000000000 5cc60e9effffffff 0100000000000000
			ff00000000000000 0010000000000000`},
	} {
		if want := unhex(t, strings.NewReplacer("\n", "", "\t", "").Replace(c.want)); !bytes.Equal(c.got, want) {
			t.Errorf("%s:\ngot  %x\nwant %x", c.name, c.got, want)
		}
	}
}

func TestParseAnswer(t *testing.T) {
	for _, c := range []struct {
		typ   Type
		bytes string
		n     int
		errno unix.Errno
	}{
		{Open, "ffffff7f", 4, 0},
		{Open, "faffffff", 4, unix.ENXIO},
		{Open, "faffff", 0, 0},
		{Mkdir, "00000000 04000000 00000000 00", 12, 0},
		{Mkdir, "01000000 04000000 efffffff", 12, unix.EEXIST},
		{Mkdir, "01000000 04000000 efffff", 0, 0},
		{Mkdir, "010000", 0, 0},
		{Mkdir, "02000000 04000000 efffffff", -1, 0},
		{Mkdir, "01000000 05000000 efffffff00", -1, 0},
		{Readlink, "00000000 01000100", -1, 0},
	} {
		a, n := ParseAnswer(c.typ, unhex(t, c.bytes))
		if n != c.n || a.Errno != c.errno {
			t.Errorf("%v %s: %d bytes, %v; want %d, %v", c.typ, c.bytes, n, a.Errno, c.n, c.errno)
		}
	}
}

// TestTrace decodes all that a real guest sent and builds it again.
func TestTrace(t *testing.T) {
	f, err := os.Open("testdata/guest-untar.trace.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(z)
	lines.Buffer(nil, 4*MaxFrame)
	var q Request
	var typ Type
	requests, answers := 0, 0
	for lines.Scan() {
		kind, text, _ := strings.Cut(lines.Text(), " ")
		frame := unhex(t, text)
		if kind != ">" {
			answers++
			if _, n := ParseAnswer(typ, frame); n != len(frame) {
				t.Fatalf("answer to %v: %s: %d bytes", typ, text, n)
			}
			continue
		}
		requests++
		var size int
		if typ, size, err = ParseHeader(frame); err != nil || size != len(frame)-HeaderSize {
			t.Fatalf("%s: %d bytes, %v", text, size, err)
		}
		if !q.Decode(typ, bytes.Clone(frame[HeaderSize:])) {
			t.Fatalf("%v %s: not decoded", typ, text)
		}
		// What QEMU sent without a NUL has one more byte now.
		again := q.Append(nil, typ)
		if extra := len(again) - len(frame); extra < 0 || extra > 2 || extra == 0 && !bytes.Equal(again, frame) {
			t.Fatalf("%v:\nwas  %x\ngave %x", typ, frame, again)
		}
	}
	if lines.Err() != nil || requests != 30498 || answers != requests {
		t.Errorf("%d requests, %d answers, %v", requests, answers, lines.Err())
	}
}

// FuzzDecode feeds any bytes as payload of any type: what is decoded lies
// inside the payload, ends in its only NUL, and means the same once encoded.
func FuzzDecode(f *testing.F) {
	for _, c := range requests {
		f.Add(uint32(c.typ), unhex(f, c.frame)[HeaderSize:])
	}
	f.Fuzz(func(t *testing.T, typ uint32, payload []byte) {
		header := append(unhex(t, "0000000000000000"), payload...)
		putHeader(header, Type(typ), len(payload))
		kind, size, err := ParseHeader(header)
		if err != nil || size != len(payload) {
			return
		}
		var q, again Request
		guarded := append(append([]byte{0xaa}, payload...), 0xbb)
		if ok := q.Decode(kind, guarded[1:len(payload)+1]); guarded[0] != 0xaa || guarded[len(payload)+1] != 0xbb {
			t.Fatal("wrote outside of the payload")
		} else if !ok {
			return
		}
		for _, s := range []CString{q.Path, q.NewPath, q.Target, q.Name} {
			if s != nil && bytes.IndexByte(s, 0) != len(s)-1 {
				t.Fatalf("%q does not end in its only NUL", s)
			}
			if len(s) > 65535 {
				return // Append could not say so
			}
		}
		frame := q.Append(nil, kind)
		if !again.Decode(kind, frame[HeaderSize:]) || !reflect.DeepEqual(q, again) {
			t.Fatalf("%v: %+v became %+v", kind, q, again)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	frame := unhex(b, "08000000 0b000000 0900 2f2f72756e2e736800")
	var q Request
	b.ReportAllocs()
	for b.Loop() {
		t, _, _ := ParseHeader(frame)
		q.Decode(t, frame[HeaderSize:])
	}
}
