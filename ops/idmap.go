package ops

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"virtfs-proxy-helper/codec"
)

// IDMap translates the ids of users, or those of groups, between guest and
// host, each way for itself; an id without a translation stays as it is. It is
// a pflag.Value, given once for each range of ids, in virtiofsd's notation:
//
//	map:GUEST:HOST:COUNT           guest:... and host:... in one
//	guest:GUEST:HOST:COUNT         COUNT guest ids from GUEST on become the host's from HOST on
//	host:HOST:GUEST:COUNT          and the other way round
//	squash-guest:GUEST:HOST:COUNT  all of them become HOST
//	squash-host:HOST:GUEST:COUNT   all of them become GUEST
//	forbid-guest:GUEST:COUNT       no request may use them: EPERM
type IDMap struct {
	toHost, toGuest []idRange // in order, none within another
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
	toHost, toGuest := m.toHost, m.toGuest
	var err error
	if kind.from == "GUEST" {
		if toHost, err = addRange(toHost, r); err != nil {
			return fmt.Errorf("guest %w", err)
		}
	} else if toGuest, err = addRange(toGuest, r); err != nil {
		return fmt.Errorf("host %w", err)
	}
	if name == "map" {
		if toGuest, err = addRange(toGuest, idRange{to, to + count - 1, from, shift}); err != nil {
			return fmt.Errorf("host %w", err)
		}
	}
	m.toHost, m.toGuest, m.given = toHost, toGuest, append(m.given, s)
	return nil
}

func addRange(ranges []idRange, r idRange) ([]idRange, error) {
	for _, other := range ranges {
		if r.first <= other.last && other.first <= r.last {
			return nil, fmt.Errorf("ids %d to %d have been given before",
				max(r.first, other.first), min(r.last, other.last))
		}
	}
	ranges = append(slices.Clone(ranges), r)
	slices.SortFunc(ranges, func(a, b idRange) int { return cmp.Compare(a.first, b.first) })
	return ranges, nil
}

// String returns the translations as they were given.
func (m *IDMap) String() string { return strings.Join(m.given, ",") }

// Type is what pflag calls the value.
func (m *IDMap) Type() string { return "map" }

// host returns the host's id for the guest's, unless that is forbidden. -1
// stays -1.
func (m *IDMap) host(id uint32) (uint32, bool) { return translate(m.toHost, id) }

// guest returns the guest's id for the host's; none is forbidden.
func (m *IDMap) guest(id uint32) (uint32, bool) { return translate(m.toGuest, id) }

func translate(ranges []idRange, id uint32) (uint32, bool) {
	for i := range ranges {
		r := &ranges[i]
		switch {
		case id > r.last:
			continue
		case id < r.first:
			return id, true
		case r.how == forbid:
			return 0, false
		case r.how == squash:
			return r.to, true
		}
		return r.to + (id - r.first), true
	}
	return id, true
}

// toHost translates the ids in a request, in place. It is EPERM if one of them
// is forbidden.
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
