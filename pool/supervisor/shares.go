package supervisor

import "golang.org/x/sys/unix"

// shares has connections share --max-connections. The last quarter is for peers
// that have none, so that no VM keeps others from connecting: of one that has some,
// connections wait meanwhile, outside any server.
type shares struct {
	peers   map[string]*sharer
	last    uint64 // number of a sharer
	waiting []accepted
	told    bool // the log has told that some wait
}

// sharer is a peer that has connections.
type sharer struct {
	key    string
	number uint64 // for the server, never used again
	conns  int
}

// reserved is how many of all places are for peers that have none.
func reserved(places int) int { return places / 4 }

// take counts a connection of a peer.
func (s *shares) take(key string) *sharer {
	p := s.peers[key]
	if p == nil || key == "" {
		s.last++
		p = &sharer{key: key, number: s.last}
		if key != "" {
			s.peers[key] = p
		}
	}
	p.conns++
	return p
}

// give takes it back.
func (s *shares) give(p *sharer) {
	if p.conns--; p.conns == 0 {
		delete(s.peers, p.key)
	}
}

// mayTake tells whether a peer may have one of the places that are free.
func (s *shares) mayTake(key string, free, places int) bool {
	return free > 0 && (free > reserved(places) || s.peers[key] == nil)
}

// admit takes a connection, for which room has been made, or has it wait.
func (sv *supervisor) admit(e accepted) {
	if sv.shares.mayTake(e.peer.key, len(sv.free), sv.MaxConnections) {
		sv.add(e.fd, e.raw, e.peer)
		return
	}
	<-sv.room
	if len(sv.shares.waiting) >= reserved(sv.MaxConnections) {
		sv.log.Warn("connection refused: too many of its machine or process wait already",
			e.peer.attrs...)
		go unix.Close(e.fd)
		return
	}
	if !sv.shares.told {
		sv.shares.told = true
		sv.log.Warn("connections wait: the last places are for VMs that have none "+
			"(raise --max-connections)", e.peer.attrs...)
	}
	sv.shares.waiting = append(sv.shares.waiting, e)
}

// admitWaiting takes those who wait and may be taken now.
func (sv *supervisor) admitWaiting() {
	waiting := sv.shares.waiting
	sv.shares.waiting = nil
	for i, e := range waiting {
		if !sv.shares.mayTake(e.peer.key, len(sv.free), sv.MaxConnections) {
			sv.shares.waiting = append(sv.shares.waiting, e)
			continue
		}
		select {
		case sv.room <- struct{}{}:
			sv.add(e.fd, e.raw, e.peer)
		default: // the next client has the room
			sv.shares.waiting = append(sv.shares.waiting, waiting[i:]...)
			return
		}
	}
	sv.shares.told = len(sv.shares.waiting) > 0
}
