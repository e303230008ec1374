package ops

import (
	"encoding/json"
	"reflect"
	"strings"
	"syscall"
	"testing"
)

func TestIDMap(t *testing.T) {
	const forbidden = noID - 1 // which no case translates to
	for _, c := range []struct {
		given          string
		toHost, toUser map[uint32]uint32
	}{
		{"", map[uint32]uint32{0: 0, 1000: 1000, noID - 1: noID - 1, noID: noID}, map[uint32]uint32{0: 0, noID: noID}},
		// The kernel translates: a number that no map has does not exist.
		{"map:0:100000:65536",
			map[uint32]uint32{0: 0, 65535: 65535, 65536: forbidden, 100000: forbidden, noID - 1: forbidden, noID: noID},
			map[uint32]uint32{0: 0, 65534: 65534, 65535: 65535}},
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
		// On top of a map, within its ids. The host's are known by the guest's numbers.
		{"map:0:100000:65536 squash-guest:65536:100001:1000 guest:70000:100005:10 forbid-guest:3:2 " +
			"host:100010:5:3 squash-host:100020:65534:5",
			map[uint32]uint32{2: 2, 3: forbidden, 4: forbidden, 5: 5, 65536: 1, 66535: 1, 66536: forbidden,
				70000: 5, 70009: 14, 70010: forbidden, noID: noID},
			map[uint32]uint32{9: 9, 10: 5, 12: 7, 13: 13, 20: 65534, 24: 65534, 25: 25}},
		{"map:500:1010:10 map:0:1000:10 guest:10000:1005:10 host:1008:7000:4 squash-host:1006:9:1",
			map[uint32]uint32{9: 9, 10: forbidden, 500: 500, 510: forbidden, 10000: 5, 10004: 9, 10005: 500,
				10009: 504},
			map[uint32]uint32{6: 9, 7: 7, 8: 7000, 9: 7001, 500: 7002, 501: 7003, 502: 502}},
		{"map:1000:0:1 squash-guest:0:0:1000",
			map[uint32]uint32{0: 1000, 999: 1000, 1000: 1000, 1001: forbidden}, map[uint32]uint32{1000: 1000}},
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
		in, err := m.inside()
		if err != nil {
			t.Errorf("%s: %v", c.given, err)
			continue
		}
		for id, want := range c.toHost {
			allowed := want != forbidden || id == forbidden && c.given == ""
			if got, ok := in.host(id); ok != allowed || ok && got != want {
				t.Errorf("%s: guest's %d is the host's %d, %v; want %d", c.given, id, got, ok, want)
			}
		}
		for id, want := range c.toUser {
			if got, ok := in.guest(id); got != want || !ok {
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
		{"map:0:0:10 map:9:100:5", "guest ids 9 to 9 have been given before"},
		{"map:0:50:10 map:100:55:1", "host ids 55 to 55 have been given before"},
		{"guest:0:0:10 forbid-guest:0:4294967295", "guest ids 0 to 9 have been given before"},
		{"host:50:0:10 squash-host:55:1:1", "host ids 55 to 55 have been given before"},
		// Ids of the host that no map has.
		{"map:0:1000:10 guest:100:1005:6", "host's id 1010 is needed"},
		{"map:0:1000:10 guest:100:999:2", "host's id 999 is needed"},
		{"map:0:1000:10 map:10:1011:10 guest:100:1005:10", "host's id 1010 is needed"},
		{"map:0:1000:10 squash-guest:100:0:5", "host's id 0 is needed"},
		{"map:0:1000:10 host:1005:100:6", "host's id 1010 is needed"},
		{"map:0:1000:10 squash-host:0:65534:1000", "host's id 0 is needed"},
	} {
		var m IDMap
		var err error
		for _, s := range strings.SplitAfter(c.given, " ") {
			if err = m.Set(strings.TrimSpace(s)); err != nil {
				break
			}
		}
		if err == nil {
			err = m.Check()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.given, err, c.want)
		}
	}
	// What is refused changes nothing: not even the half of a map that is good.
	var m IDMap
	m.Set("map:50:0:10")
	m.Set("map:100:5:1")
	if _, ok := m.host(100); ok || m.String() != "map:50:0:10" {
		t.Errorf("%v, %q", ok, m.String())
	}
}

func TestIDMapNamespace(t *testing.T) {
	var m IDMap
	for _, s := range []string{"map:70000:5:1", "map:0:100000:65536", "guest:1:5:1", "forbid-guest:80000:5"} {
		if err := m.Set(s); err != nil {
			t.Fatal(err)
		}
	}
	want := []syscall.SysProcIDMap{
		{ContainerID: 0, HostID: 100000, Size: 65536}, {ContainerID: 70000, HostID: 5, Size: 1},
	}
	if got := m.Namespace(); !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	m = IDMap{}
	m.Set("squash-guest:1:5:1")
	if got := m.Namespace(); got != nil {
		t.Errorf("without map: %v", got)
	}
}

// A map goes to another process as text, and is the same there.
func TestIDMapAsText(t *testing.T) {
	var m, same IDMap
	for _, s := range []string{"map:0:100000:65536", "host:5:7:1", "squash-guest:70000:5:9", "forbid-guest:80000:5"} {
		if err := m.Set(s); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(m)
		if err == nil {
			err = json.Unmarshal(b, &same)
		}
		if err != nil || !reflect.DeepEqual(m, same) {
			t.Errorf("%v: %v, became %v", m, err, same)
		}
	}
	if err := json.Unmarshal([]byte(`""`), &same); err != nil || !reflect.DeepEqual(same, IDMap{}) {
		t.Errorf("%v, %v", err, same)
	}
	if err := json.Unmarshal([]byte(`"map:0:0:1,map:0:0:1"`), &same); err == nil {
		t.Error("no error for what Set refuses")
	}
}
