package devenv

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"syscall"
)

// account is the system user that the server runs as. The zero value is our own.
type account struct {
	name     string
	uid, gid uint32
	other    bool // not our own
}

// serverAccount is our own user, or, since Postgres refuses root, another one.
func serverAccount() (*account, error) {
	if os.Geteuid() != 0 {
		return &account{}, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		if u, err := user.Lookup(name); err == nil {
			return newAccount(u)
		}
	}
	return nil, errors.New("PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it: use another user")
}

// ownerOf is the user to whom a kept cluster belongs. Only as root can it be another's.
func ownerOf(path string) (*account, error) {
	if os.Geteuid() != 0 {
		return &account{}, nil
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	stat := info.Sys().(*syscall.Stat_t)
	name := strconv.FormatUint(uint64(stat.Uid), 10)
	if u, err := user.LookupId(name); err == nil {
		name = u.Username
	}
	return &account{name: name, uid: stat.Uid, gid: stat.Gid, other: true}, nil
}

func newAccount(u *user.User) (*account, error) {
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("user %s: %w", u.Username, err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("user %s: %w", u.Username, err)
	}
	return &account{name: u.Username, uid: uint32(uid), gid: uint32(gid), other: true}, nil
}

func (a *account) String() string {
	if a.other {
		return a.name
	}
	return "our own"
}

// credential to start a child with, without our other groups; nil for our own.
func (a *account) credential() *syscall.Credential {
	if !a.other {
		return nil
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid}
}

// own hands a file that we made to the user.
func (a *account) own(path string) error {
	if !a.other {
		return nil
	}
	if err := os.Chown(path, int(a.uid), int(a.gid)); err != nil {
		return fmt.Errorf("hand a file to user %s: %w", a.name, err)
	}
	return nil
}
