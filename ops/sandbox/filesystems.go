package sandbox

import (
	"bytes"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// filesystem is the decision about a kind of file system.
type filesystem struct {
	// covered means that a mount of it below the export is hidden from guests, and
	// that it can't be the export.
	covered bool
	// magic is f_type of statfs(2). It is set where covered is, unless allowed file
	// systems have the same.
	magic uint32
}

// filesystems are the names in /proc/filesystems. Covered is what shows the
// kernel's objects instead of stored files: its links lead out of the export, and
// its files change the host. Allowed is what holds files of its own, on a disk, in
// memory or in the network. Autofs is allowed, as it holds nothing but the names
// of mounts, and where one is there these are looked at themselves.
var filesystems = func() map[string]filesystem {
	all := map[string]filesystem{
		"aafs":         {true, unix.AAFS_MAGIC},
		"anon_inode":   {true, unix.ANON_INODE_FS_MAGIC},
		"anon_inodefs": {true, unix.ANON_INODE_FS_MAGIC},
		"apparmorfs":   {true, unix.AAFS_MAGIC},
		"bdev":         {true, unix.BDEVFS_MAGIC},
		"binder":       {true, unix.BINDERFS_SUPER_MAGIC},
		"binfmt_misc":  {true, unix.BINFMTFS_MAGIC},
		"bpf":          {true, unix.BPF_FS_MAGIC},
		"cgroup":       {true, unix.CGROUP_SUPER_MAGIC},
		"cgroup2":      {true, unix.CGROUP2_SUPER_MAGIC},
		"configfs":     {true, 0x62656570},
		"cpuset":       {true, unix.CGROUP_SUPER_MAGIC},
		"cxl":          {true, 0xc310c310},
		"dax":          {true, unix.DAXFS_MAGIC},
		"debugfs":      {true, unix.DEBUGFS_MAGIC},
		"devmem":       {true, unix.DEVMEM_MAGIC},
		"devpts":       {true, unix.DEVPTS_SUPER_MAGIC},
		"devtmpfs":     {true, 0}, // tmpfs, or ramfs, by its magic
		"dlmfs":        {true, 0x76a9f425},
		"dmabuf":       {true, unix.DMA_BUF_MAGIC},
		"drm":          {true, 0x010203ff},
		"efivarfs":     {true, unix.EFIVARFS_MAGIC},
		"functionfs":   {true, 0xa647361},
		"fusectl":      {true, 0x65735543},
		"gadgetfs":     {true, 0xaee71ee7},
		"guest_memfd":  {true, unix.GUEST_MEMFD_MAGIC},
		"hugetlbfs":    {true, unix.HUGETLBFS_MAGIC},
		"ipathfs":      {true, 0x726a77},
		"mqueue":       {true, 0x19800202},
		"mtd_inodefs":  {true, unix.MTD_INODE_FS_MAGIC},
		"nfsd":         {true, 0x6e667364},
		"nsfs":         {true, unix.NSFS_MAGIC},
		"nullfs":       {true, unix.NULL_FS_MAGIC},
		"openpromfs":   {true, unix.OPENPROM_SUPER_MAGIC},
		"oprofilefs":   {true, 0x6f70726f},
		"pidfs":        {true, unix.PID_FS_MAGIC},
		"pipefs":       {true, unix.PIPEFS_MAGIC},
		"proc":         {true, unix.PROC_SUPER_MAGIC},
		"pstore":       {true, unix.PSTOREFS_MAGIC},
		"qibfs":        {true, 0x726a77},
		"resctrl":      {true, unix.RDTGROUP_SUPER_MAGIC},
		"rpc_pipefs":   {true, 0x67596969},
		"s390_hypfs":   {true, 0x687970},
		"secretmem":    {true, unix.SECRETMEM_MAGIC},
		"securityfs":   {true, unix.SECURITYFS_MAGIC},
		"selinuxfs":    {true, unix.SELINUX_MAGIC},
		"smackfs":      {true, unix.SMACK_MAGIC},
		"sockfs":       {true, unix.SOCKFS_MAGIC},
		"spufs":        {true, 0x23c9b64e},
		"sysfs":        {true, unix.SYSFS_MAGIC},
		"tracefs":      {true, unix.TRACEFS_MAGIC},
		"usbfs":        {true, unix.USBDEVICE_SUPER_MAGIC},
		"vxtafs":       {true, 0},
		"xenfs":        {true, unix.XENFS_SUPER_MAGIC},
	}
	const allowed = `
		9p adfs affs afs apfs aufs autofs bcachefs beegfs befs bfs btrfs ceph cifs coda cramfs
		ecryptfs efs erofs esdfs exfat exfat-fuse exfs ext2 ext3 ext4 f2fs fhgfs freevxfs
		fuse fuseblk
		gfs2 gpfs hfs hfsplus hmdfs hostfs hpfs incremental-fs isofs iso9660 jffs2 jfs lustre
		minix mmfs msdos ncpfs nfs nfs4 nilfs2 ntfs ntfs3 ntfsplus ocfs2 omfs orangefs overlay panfs
		prl_fs pvfs2 qnx4 qnx6 ramfs reiser4 reiserfs romfs rootfs sdcardfs shiftfs smb3 smbfs
		squashfs sysv tmpfs ubifs udf ufs unionfs v7 v9fs vboxsf vfat virtiofs vmhgfs vxfs
		wekafs xenix xfs zfs zonefs`
	for _, name := range strings.Fields(allowed) {
		all[name] = filesystem{}
	}
	return all
}()

// covers tells that a file system of this name, as in mountinfo, is covered. A
// name that nobody has decided about is covered if it needs no device (nodev in
// /proc/filesystems): it may be one of the kernel's.
func covers(name string) bool {
	name, _, _ = strings.Cut(name, ".") // fuse.sshfs
	if fs, decided := filesystems[name]; decided {
		return fs.covered
	}
	b, err := os.ReadFile("/proc/filesystems")
	return err != nil || !bytes.Contains(append([]byte("\n"), b...), []byte("\n\t"+name+"\n"))
}

// coveredMagic returns the name of the covered file system that has this f_type.
func coveredMagic(magic uint32) (name string, ok bool) {
	for name, fs := range filesystems {
		if fs.covered && fs.magic != 0 && fs.magic == magic {
			return name, true
		}
	}
	return "", false
}
