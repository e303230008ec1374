package ops

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// IDMap is how the ids of users, or those of groups, of guest and host belong
// together. It is a pflag.Value, given once for each range of ids, in virtiofsd's
// notation:
//
//	map:GUEST:HOST:COUNT           COUNT guest ids from GUEST on are the host's from HOST on
//	guest:GUEST:HOST:COUNT         what the guest sets as the former becomes the latter
//	host:HOST:GUEST:COUNT          the guest is told the latter for the former
//	squash-guest:GUEST:HOST:COUNT  all of them become HOST
//	squash-host:HOST:GUEST:COUNT   all of them become GUEST
//	forbid-guest:GUEST:COUNT       no request may use them: EPERM
//
// The maps are what exists: the server runs in a user namespace that has these
// ids, under the guest's numbers, and no others. So the kernel translates, for
// all that a request does. Without a map the host's ids are the guest's. The
// others act on top, and on the numbers alone that requests and answers have.
type IDMap struct {
	maps            []idRange // by the guest's ids, in order
	toHost, toGuest []idRange // in order, none within another of the same
	given           []string
}

// idRange translates the ids first to last: one by one, or all to the same.
type idRange struct {
	first, last uint32
	to          uint32
	how         translation
}

type translation int

const (
	shift translation = iota
	squash
	forbid
)

// noID is -1: it leaves an id as it is, and is none.
const noID = ^uint32(0)

// idKinds are the kinds of translations, by their names. from and to tell
// which numbers they take in front of the count.
var idKinds = map[string]struct {
	from, to string
	how      translation
}{
	"map":          {"GUEST", "HOST", shift},
	"guest":        {"GUEST", "HOST", shift},
	"host":         {"HOST", "GUEST", shift},
	"squash-guest": {"GUEST", "HOST", squash},
	"squash-host":  {"HOST", "GUEST", squash},
	"forbid-guest": {"GUEST", "", forbid},
}

// Set adds one range.
func (m *IDMap) Set(s string) error {
	name, rest, _ := strings.Cut(s, ":")
	kind, ok := idKinds[name]
	if !ok {
		return fmt.Errorf("%q is not one of "+
			"map, guest, host, squash-guest, squash-host, forbid-guest", name)
	}
	fields := []string{kind.from, kind.to, "COUNT"}
	if kind.how == forbid {
		fields = []string{kind.from, "COUNT"}
	}
	values := strings.Split(rest, ":")
	if len(values) != len(fields) {
		return fmt.Errorf("not of the form %s:%s", name, strings.Join(fields, ":"))
	}
	var n []uint32
	for i, v := range values {
		id, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			return fmt.Errorf("%s: %q is not a number from 0 to 4294967295", fields[i], v)
		}
		n = append(n, uint32(id))
	}
	from, to, count := n[0], n[0], n[len(n)-1]
	if kind.how != forbid {
		to = n[1]
	}
	if count == 0 {
		return errors.New("COUNT is 0")
	}
	// -1 is no id.
	if count > noID-from || to == noID || kind.how == shift && count > noID-to {
		return fmt.Errorf("%d ids from %d on go beyond 4294967294, the last there is",
			count, max(from, to))
	}
	r := idRange{from, from + count - 1, to, kind.how}
	next, side := *m, "guest"
	var err error
	switch {
	case name == "map":
		if next.maps, err = addRange(m.maps, r); err == nil {
			side = "host"
			_, err = addRange(inverse(m.maps), inverse([]idRange{r})[0])
		}
	case kind.from == "GUEST":
		next.toHost, err = addRange(m.toHost, r)
	default:
		side = "host"
		next.toGuest, err = addRange(m.toGuest, r)
	}
	if err != nil {
		return fmt.Errorf("%s %w", side, err)
	}
	next.given = append(next.given, s)
	*m = next
	return nil
}

// inverse returns maps by the host's ids, in order.
func inverse(maps []idRange) (hosts []idRange) {
	for _, r := range maps {
		hosts = append(hosts, idRange{r.to, r.to + (r.last - r.first), r.first, shift})
	}
	slices.SortFunc(hosts, compareRanges)
	return hosts
}

func compareRanges(a, b idRange) int { return cmp.Compare(a.first, b.first) }

func addRange(ranges []idRange, r idRange) ([]idRange, error) {
	for _, other := range ranges {
		if r.first <= other.last && other.first <= r.last {
			return nil, fmt.Errorf("ids %d to %d have been given before",
				max(r.first, other.first), min(r.last, other.last))
		}
	}
	ranges = append(slices.Clone(ranges), r)
	slices.SortFunc(ranges, compareRanges)
	return ranges, nil
}

// String returns the translations as they were given.
func (m *IDMap) String() string { return strings.Join(m.given, ",") }

// MarshalText returns what UnmarshalText, in another process, makes the same of.
func (m IDMap) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText is Set for each translation.
func (m *IDMap) UnmarshalText(text []byte) error {
	*m = IDMap{}
	if len(text) == 0 {
		return nil
	}
	for s := range strings.SplitSeq(string(text), ",") {
		if err := m.Set(s); err != nil {
			return err
		}
	}
	return nil
}

// Type is what pflag calls the value.
func (m *IDMap) Type() string { return "map" }

// Namespace returns the ids of the user namespace that the maps ask for, nil if
// there are none: the guest's numbers inside, the host's outside.
func (m *IDMap) Namespace() (ids []syscall.SysProcIDMap) {
	for _, r := range m.maps {
		ids = append(ids, syscall.SysProcIDMap{
			ContainerID: int(r.first), HostID: int(r.to), Size: int(r.last-r.first) + 1,
		})
	}
	return ids
}

// Check returns an error if a translation needs an id of the host that no map has.
func (m *IDMap) Check() error {
	_, err := m.inside()
	return err
}

// inside returns the translations as they are in the namespace, where the host's
// ids have the guest's numbers.
func (m *IDMap) inside() (*IDMap, error) {
	if m.maps == nil {
		return m, nil
	}
	in := &IDMap{maps: m.maps, given: m.given}
	hosts := inverse(m.maps)
	for _, r := range m.toHost {
		last := r.to
		switch r.how {
		case forbid:
			in.toHost = append(in.toHost, r)
			continue
		case shift:
			last += r.last - r.first
		}
		err := split(hosts, r.to, last, func(first, last, inside uint32) {
			part := r
			part.to = inside
			if r.how == shift {
				part.first = r.first + (first - r.to)
				part.last = part.first + (last - first)
			}
			in.toHost = append(in.toHost, part)
		})
		if err != nil {
			return nil, err
		}
	}
	for _, r := range m.toGuest {
		err := split(hosts, r.first, r.last, func(first, last, inside uint32) {
			part := idRange{inside, inside + (last - first), r.to, r.how}
			if r.how == shift {
				part.to += first - r.first
			}
			in.toGuest = append(in.toGuest, part)
		})
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(in.toGuest, compareRanges)
	return in, nil
}

// split calls part for the ids of the host from first to last, with those that one
// map has at a time and the first one's number inside.
func split(hosts []idRange, first, last uint32, part func(first, last, inside uint32)) error {
	for _, h := range hosts {
		if h.last < first {
			continue
		}
		if h.first > first {
			break
		}
		end := min(last, h.last)
		part(first, end, h.to+(first-h.first))
		if end == last {
			return nil
		}
		first = end + 1
	}
	return fmt.Errorf("the host's id %d is needed, which no map:GUEST:HOST:COUNT names: "+
		"the server has only those", first)
}

// host returns what the server takes for an id that a request has, unless that is
// forbidden or does not exist. -1 stays -1.
func (m *IDMap) host(id uint32) (uint32, bool) {
	if r := find(m.toHost, id); r != nil {
		return r.translate(id), r.how != forbid
	}
	return id, m.maps == nil || id == noID || find(m.maps, id) != nil
}

// guest returns what the guest is told for an id that the server sees; none is
// forbidden.
func (m *IDMap) guest(id uint32) (uint32, bool) {
	if r := find(m.toGuest, id); r != nil {
		return r.translate(id), true
	}
	return id, true
}

// find returns the range that has an id, or nil.
func find(ranges []idRange, id uint32) *idRange {
	for i := range ranges {
		if r := &ranges[i]; id <= r.last {
			if id < r.first {
				return nil
			}
			return r
		}
	}
	return nil
}

func (r *idRange) translate(id uint32) uint32 {
	if r.how == squash {
		return r.to
	}
	return r.to + (id - r.first)
}

// toHost translates the ids in a request, in place. It is EPERM if one of them
// is forbidden or does not exist.
func (fs *FS) toHost(t codec.Type, q *codec.Request) unix.Errno {
	ok := true
	switch t {
	case codec.Create, codec.Mknod, codec.Mkdir, codec.Symlink, codec.Chown:
		var okGID bool
		q.UID, ok = fs.uids.host(q.UID)
		q.GID, okGID = fs.gids.host(q.GID)
		ok = ok && okGID
	case codec.Lsetxattr:
		ok = !isACL(q.Name) || translateACL(q.Value, fs.uids.host, fs.gids.host)
	}
	if !ok {
		return unix.EPERM
	}
	return 0
}

// isACL tells that an extended attribute is a POSIX ACL, which has ids in it.
func isACL(name codec.CString) bool {
	switch string(name.Text()) {
	case "system.posix_acl_access", "system.posix_acl_default":
		return true
	}
	return false
}

// translateACL translates the ids in the value of a POSIX ACL, in place: as in
// linux/posix_acl_xattr.h a u32 version, then u16 tag, u16 rights, u32 id for
// each entry, all little-endian. Whether it is a good one, the kernel says.
func translateACL(value []byte, uid, gid func(uint32) (uint32, bool)) bool {
	const (
		head, entry = 4, 8
		user, group = 0x02, 0x08
	)
	if len(value) < head {
		return true
	}
	for e := value[head:]; len(e) >= entry; e = e[entry:] {
		to, id := uid, binary.LittleEndian.Uint32(e[4:])
		switch binary.LittleEndian.Uint16(e) {
		case user:
		case group:
			to = gid
		default:
			continue
		}
		id, ok := to(id)
		if !ok {
			return false
		}
		binary.LittleEndian.PutUint32(e[4:], id)
	}
	return true
}
