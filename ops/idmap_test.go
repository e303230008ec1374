package ops

import (
	"strings"
	"testing"
)

func TestIDMap(t *testing.T) {
	const forbidden = noID - 1 // which no case translates to
	for _, c := range []struct {
		given          string
		toHost, toUser map[uint32]uint32
	}{
		{"", map[uint32]uint32{0: 0, 1000: 1000, noID - 1: noID - 1, noID: noID}, map[uint32]uint32{0: 0, noID: noID}},
		{"map:0:100000:65536",
			map[uint32]uint32{0: 100000, 1: 100001, 65535: 165535, 65536: 65536, 100000: 100000, noID: noID},
			map[uint32]uint32{100000: 0, 165535: 65535, 165536: 165536, 0: 0, 99999: 99999, noID: noID}},
		{"guest:1000:5:2",
			map[uint32]uint32{999: 999, 1000: 5, 1001: 6, 1002: 1002},
			map[uint32]uint32{5: 5, 6: 6, 1000: 1000}},
		{"host:5:1000:2", map[uint32]uint32{1000: 1000, 5: 5}, map[uint32]uint32{4: 4, 5: 1000, 6: 1001, 7: 7}},
		{"squash-guest:0:107:4294967295",
			map[uint32]uint32{0: 107, 107: 107, noID - 1: 107, noID: noID},
			map[uint32]uint32{107: 107, 0: 0}},
		{"squash-host:10:65534:5", map[uint32]uint32{10: 10}, map[uint32]uint32{9: 9, 10: 65534, 14: 65534, 15: 15}},
		{"forbid-guest:1:999",
			map[uint32]uint32{0: 0, 1: forbidden, 999: forbidden, 1000: 1000},
			map[uint32]uint32{1: 1}},
		// A guest whose user 1000 is the host's 2000, and has nothing else.
		{"map:1000:2000:1 forbid-guest:1001:4294966294 forbid-guest:0:1000 " +
			"squash-host:0:65534:2000 squash-host:2001:65534:4294965294",
			map[uint32]uint32{0: forbidden, 999: forbidden, 1000: 2000, 1001: forbidden, 2000: forbidden,
				noID - 1: forbidden, noID: noID},
			map[uint32]uint32{0: 65534, 1000: 65534, 2000: 1000, 2001: 65534, noID - 1: 65534}},
		// Each way for itself, next to each other.
		{"guest:0:10:5 guest:5:0:5 host:7:7:1 host:0:1:7",
			map[uint32]uint32{0: 10, 4: 14, 5: 0, 9: 4, 10: 10},
			map[uint32]uint32{0: 1, 6: 7, 7: 7, 8: 8}},
	} {
		var m IDMap
		for s := range strings.FieldsSeq(c.given) {
			if err := m.Set(s); err != nil {
				t.Errorf("%s: %v", s, err)
			}
		}
		if got := strings.ReplaceAll(m.String(), ",", " "); got != c.given {
			t.Errorf("%q became %q", c.given, got)
		}
		for id, want := range c.toHost {
			allowed := want != forbidden || id == forbidden && c.given == ""
			if got, ok := m.host(id); ok != allowed || ok && got != want {
				t.Errorf("%s: guest's %d is the host's %d, %v; want %d", c.given, id, got, ok, want)
			}
		}
		for id, want := range c.toUser {
			if got, ok := m.guest(id); got != want || !ok {
				t.Errorf("%s: host's %d is the guest's %d, %v; want %d", c.given, id, got, ok, want)
			}
		}
	}
}

func TestIDMapErrors(t *testing.T) {
	for _, c := range []struct{ given, want string }{
		{"", `"" is not one of map,`},
		{"1000:1000:1", `"1000" is not one of map,`},
		{"mapp:1:1:1", `"mapp" is not one of map, guest, host, squash-guest, squash-host, forbid-guest`},
		{"forbid-host:1:1", "is not one of"},
		{"map", "not of the form map:GUEST:HOST:COUNT"},
		{"map:1:1", "not of the form map:GUEST:HOST:COUNT"},
		{"map:1:1:1:1", "not of the form map:GUEST:HOST:COUNT"},
		{"host:1:1", "not of the form host:HOST:GUEST:COUNT"},
		{"squash-host:1:1", "not of the form squash-host:HOST:GUEST:COUNT"},
		{"forbid-guest:1:1:1", "not of the form forbid-guest:GUEST:COUNT"},
		{"map:a:1:1", `GUEST: "a" is not a number`},
		{"map:1::1", `HOST: "" is not a number`},
		{"map:1:-1:1", `HOST: "-1" is not a number`},
		{"map:1:1:4294967296", `COUNT: "4294967296" is not a number`},
		{"map:1:1:0", "COUNT is 0"},
		{"map:4294967295:0:1", "go beyond 4294967294"},
		{"guest:1:0:4294967295", "go beyond 4294967294"},
		{"host:0:1:4294967295", "go beyond 4294967294"},
		{"squash-guest:0:4294967295:1", "go beyond 4294967294"},
		{"forbid-guest:4294967294:2", "go beyond 4294967294"},
		{"map:0:0:10 guest:9:100:5", "guest ids 9 to 9 have been given before"},
		{"map:0:0:10 forbid-guest:0:4294967295", "guest ids 0 to 9 have been given before"},
		{"host:50:0:10 map:100:55:1", "host ids 55 to 55 have been given before"},
	} {
		var m IDMap
		var err error
		for _, s := range strings.SplitAfter(c.given, " ") {
			if err = m.Set(strings.TrimSpace(s)); err != nil {
				break
			}
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.given, err, c.want)
		}
	}
	// What is refused changes nothing: not even the half of a map that is good.
	var m IDMap
	m.Set("host:50:0:10")
	m.Set("map:100:55:1")
	if id, ok := m.host(100); id != 100 || !ok || m.String() != "host:50:0:10" {
		t.Errorf("%d, %v, %q", id, ok, m.String())
	}
}
