//! What the small tree consists of, one function a subject.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{FallocateFlags, FileType, IFlags, fallocate, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

use super::tree::Tree;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// Name, size, and (offset, bytes) of its data; the rest is a hole.
type Sparse<'a> = (&'a str, u64, &'a [(u64, &'a [u8])]);

/// Files by size and by where their data is.
pub fn contents(tree: &mut Tree) -> io::Result<()> {
    tree.dir(b"contents")?;
    for size in [0, 1, 4095, 4096, 4097, 65_536, 1_000_003] {
        let bytes = tree.bytes(size);
        tree.file(format!("contents/{size}-bytes").as_bytes())?.write_all(&bytes)?;
    }
    let page = tree.bytes(PAGE as usize);
    let sparse: &[Sparse<'_>] = &[
        ("zero-page-in-the-middle", 3 * PAGE, &[(0, &page), (PAGE, &[0; 4096]), (2 * PAGE, &page)]),
        ("zeros-only", 2 * PAGE + 5, &[(0, &[0; 2 * 4096 + 5])]),
        ("hole-at-start", MIB + 7, &[(MIB - 3, b"0123456789")]),
        ("hole-in-the-middle", MIB, &[(0, &page), (MIB - PAGE, &page)]),
        ("hole-at-end", 10 * MIB + 1, &[(0, b"x")]),
        ("hole-only", 10 * MIB, &[]),
        ("data-across-pages", 8 * PAGE, &[(3 * PAGE - 1, b"ab"), (6 * PAGE - 100, &page)]),
        ("a-tebibyte", TIB, &[(0, &page), (TIB / 2 + 11, &page[..1000]), (TIB - PAGE, &page)]),
    ];
    for (name, size, data) in sparse {
        let file = tree.file(format!("contents/{name}").as_bytes())?;
        file.set_len(*size)?;
        for (offset, bytes) in *data {
            file.write_all_at(bytes, *offset)?;
        }
    }
    let every_other = tree.file(b"contents/every-other-page")?;
    for index in (0..200).step_by(2) {
        every_other.write_all_at(&page, index * PAGE)?;
    }
    let allocated = tree.file(b"contents/allocated-never-written")?;
    fallocate(&allocated, FallocateFlags::empty(), 0, 5 * PAGE + 1)?;
    let beyond = tree.file(b"contents/allocated-beyond-the-end")?;
    beyond.write_all_at(b"short", 0)?;
    fallocate(&beyond, FallocateFlags::KEEP_SIZE, 0, 4 * PAGE)?;
    Ok(())
}

/// Names that only a kernel finds normal.
pub fn names(tree: &mut Tree) -> io::Result<()> {
    tree.dir(b"names")?;
    let long = [b'n'; 255];
    let long_not_utf8 = [0xe4; 255];
    let names: &[&[u8]] = &[
        b"plain",
        b"with space",
        b" leading",
        b"trailing ",
        b"new\nline",
        b"\n",
        b"tab\tbell\x07escape\x1b[31m",
        b"\x01",
        b"\x7f",
        b"\xff\xfe not utf-8 \x80",
        b"\xc3",
        "é composed".as_bytes(),
        "e\u{301} decomposed".as_bytes(),
        "\u{202e}right to left".as_bytes(),
        b"-rf",
        b"--",
        b"-",
        b"*",
        b"~",
        b"a=b%c",
        b"back\\slash",
        b"quote'\"$(id)`",
        b"...",
        b"..x",
        b".hidden",
        b".wh.looks-like-a-whiteout",
        b".wh..wh..opq",
        b"PaxHeaders.0",
        b"manifest.json",
        b"trailer!!!",
        b"con.txt",
        &long,
        &long_not_utf8,
    ];
    for name in names {
        let content = tree.bytes(name.len());
        tree.file(&[b"names/", *name].concat())?.write_all(&content)?;
    }
    Ok(())
}

/// Directories: empty, deep, with bits, closed.
pub fn directories(tree: &mut Tree) -> io::Result<()> {
    tree.dir(b"dirs")?;
    tree.dir(b"dirs/empty")?;
    for (name, mode) in
        [("setgid", 0o2775), ("sticky", 0o1777), ("closed", 0o000), ("all", 0o7777), ("search", 0o111)]
    {
        let path = format!("dirs/{name}");
        tree.dir(path.as_bytes())?;
        tree.last().mode(mode);
        tree.file(format!("{path}/inside").as_bytes())?.write_all(name.as_bytes())?;
    }
    let mut path = b"dirs/deep".to_vec();
    tree.dir(&path)?;
    for level in 0..64 {
        path.extend_from_slice(format!("/{level}").as_bytes());
        tree.dir(&path)?;
    }
    path.extend_from_slice(b"/bottom");
    tree.file(&path)?.write_all(b"the bottom")?;
    tree.dir(b"dirs/many")?;
    for index in 0..300 {
        tree.file(format!("dirs/many/{index}").as_bytes())?.write_all(&[index as u8])?;
    }
    Ok(())
}

/// What isn't a regular file or a directory.
pub fn kinds(tree: &mut Tree) -> io::Result<()> {
    tree.dir(b"kinds")?;
    tree.node(b"kinds/fifo", FileType::Fifo, (0, 0))?;
    tree.node(b"kinds/socket", FileType::Socket, (0, 0))?;
    tree.node(b"kinds/whiteout", FileType::CharacterDevice, (0, 0))?;
    tree.node(b"kinds/null", FileType::CharacterDevice, (1, 3))?;
    tree.node(b"kinds/char-large-numbers", FileType::CharacterDevice, (4000, 1_000_000))?;
    tree.node(b"kinds/block", FileType::BlockDevice, (7, 200))?;
    // A socket that has been bound, by a process that is gone.
    let dir = tree.dir(b"kinds/run")?;
    UnixListener::bind(format!("/proc/self/fd/{}/bound.sock", dir.as_raw_fd()))?;
    tree.adopt(b"kinds/run/bound.sock");
    for (name, target) in [
        (&b"to-a-file"[..], b"../contents/1-bytes".to_vec()),
        (b"dangling", b"/nowhere/at all".to_vec()),
        (b"to-itself", b"to-itself".to_vec()),
        (b"target-100", vec![b't'; 100]),
        (b"target-101", vec![b't'; 101]),
        (b"target-300", vec![b'u'; 300]),
        (b"target-4095", [b'/', b'v'].repeat(2047)),
        (b"target-not-utf8", b"\xff\n=\x80".to_vec()),
    ] {
        tree.symlink(&[b"kinds/", name].concat(), &target)?;
        tree.last().owner(300, 400);
    }
    Ok(())
}

/// Several names for one object.
pub fn links(tree: &mut Tree) -> io::Result<()> {
    tree.dir(b"links")?;
    tree.dir(b"links/other")?;
    let content = tree.bytes(10_000);
    tree.file(b"links/file")?.write_all(&content)?;
    tree.link(b"links/file", b"links/file-again")?;
    tree.link(b"links/file", b"links/other/file")?;
    tree.link(b"links/file", b"dirs/setgid/a-link-that-sorts-first")?;
    tree.symlink(b"links/symlink", b"file")?;
    tree.link(b"links/symlink", b"links/other/symlink")?;
    tree.node(b"links/fifo", FileType::Fifo, (0, 0))?;
    tree.link(b"links/fifo", b"links/other/fifo")?;
    tree.file(b"links/empty")?;
    tree.link(b"links/empty", b"links/other/empty")?;
    for index in 0..50 {
        tree.link(b"links/empty", format!("links/other/empty-{index}").as_bytes())?;
    }
    Ok(())
}

/// Owners, modes, extended attributes.
pub fn attributes(tree: &mut Tree) -> io::Result<()> {
    tree.dir(b"attributes")?;
    for mode in [0o0000, 0o0001, 0o0777, 0o4755, 0o2755, 0o1644, 0o7777, 0o6001] {
        let file = format!("attributes/mode-{mode:04o}");
        tree.file(file.as_bytes())?.write_all(b"m")?;
        tree.last().mode(mode).owner(mode, 0);
    }
    for (uid, gid) in
        [(0, 0), (1, 2), (65_534, 65_534), (2_097_152, 2_097_151), (4_000_000_000, 4_294_967_294)]
    {
        tree.file(format!("attributes/owner-{uid}-{gid}").as_bytes())?;
        tree.last().owner(uid, gid).mode(0o4711);
    }
    let large = tree.bytes(60_000);
    let binary = b"new\nline NUL \x00 \xff = end";
    // _LINUX_CAPABILITY_U32 revision 2: cap_net_bind_service, effective.
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    tree.file(b"attributes/xattrs")?;
    tree.last()
        .xattr(b"user.plain", b"value")
        .xattr(b"user.empty", b"")
        .xattr(b"user.binary", binary)
        .xattr(b"user.key=with%signs and spaces", b"1")
        .xattr(b"user.space and\nnewline", b"2")
        .xattr(b"trusted.overlay.opaque", b"y")
        .xattr(b"trusted.binary", binary);
    tree.file(b"attributes/xattr-large")?;
    tree.last().xattr(b"trusted.large", &large);
    tree.file(b"attributes/capability")?;
    tree.last().xattr(b"security.capability", &capability).owner(5, 5).mode(0o755);
    tree.file(b"attributes/acl")?;
    tree.last().mode(0o640).xattr(b"system.posix_acl_access", &acl());
    tree.dir(b"attributes/acl-default")?;
    tree.last().mode(0o750).xattr(b"system.posix_acl_default", &acl()).xattr(b"user.on-a-directory", b"d");
    tree.symlink(b"attributes/symlink-xattr", b"xattrs")?;
    tree.last().xattr(b"trusted.on-a-symlink", b"s").owner(9, 9);
    tree.node(b"attributes/fifo-xattr", FileType::Fifo, (0, 0))?;
    tree.last().xattr(b"trusted.on-a-fifo", b"f");
    Ok(())
}

/// Times that don't fit into 32 bits, or into nothing.
pub fn times(tree: &mut Tree) -> io::Result<()> {
    tree.dir(b"times")?;
    for (name, mtime, atime) in [
        ("epoch", (0, 0), (0, 1)),
        ("before-1970", (-1, 999_999_999), (-2_000_000_000, 1)),
        ("before-1901", (-6_000_000_000, 123_456_789), (0, 0)),
        ("beyond-2038", (5_000_000_000, 1), (4_294_967_296, 999_999_999)),
        ("beyond-2242-in-tar", (8_589_934_592, 5), (16_725_225_600, 7)),
    ] {
        tree.file(format!("times/{name}").as_bytes())?;
        tree.last().times(mtime, atime);
        tree.dir(format!("times/{name}-dir").as_bytes())?;
        tree.last().times(mtime, atime);
        tree.symlink(format!("times/{name}-link").as_bytes(), name.as_bytes())?;
        tree.last().times(mtime, atime);
    }
    Ok(())
}

/// A chain of directories with long names, until the path is longer than any system call takes.
pub fn beyond_path_max(tree: &mut Tree) -> io::Result<()> {
    let mut path = b"long".to_vec();
    tree.dir(&path)?;
    while path.len() < 5000 {
        path.push(b'/');
        path.extend_from_slice(&[b'd'; 250]);
        tree.dir(&path)?;
    }
    path.extend_from_slice(b"/end");
    tree.file(&path)?.write_all(b"beyond PATH_MAX")
}

/// One file of `size` random bytes.
pub fn big(tree: &mut Tree, size: u64) -> io::Result<()> {
    let mut file = tree.file(b"big")?;
    let mut left = size;
    while left > 0 {
        let length = left.min(MIB);
        let bytes = tree.bytes(length as usize);
        file.write_all(&bytes)?;
        left -= length;
    }
    Ok(())
}

/// Flags of chattr(1). They come last of all: an immutable file can't get its times afterwards.
pub fn inode_flags(dir: &Path) -> io::Result<Vec<String>> {
    let mut left_out = Vec::new();
    for (name, flag) in
        [("1-bytes", IFlags::IMMUTABLE), ("4095-bytes", IFlags::APPEND), ("4097-bytes", IFlags::NODUMP)]
    {
        let file = std::fs::File::open(dir.join("contents").join(name))?;
        let flags = ioctl_getflags(&file)?;
        match ioctl_setflags(&file, flags | flag) {
            Err(error @ (Errno::PERM | Errno::NOTTY | Errno::OPNOTSUPP)) => {
                left_out.push(format!("contents/{name}: {flag:?}: {error}"));
            }
            other => other?,
        }
    }
    Ok(left_out)
}

/// POSIX ACL, version 2: user::rw- user:1000:rwx group::r-- mask::rwx other::---
fn acl() -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] =
        [(0x01, 6, NOBODY), (0x02, 7, 1000), (0x04, 4, NOBODY), (0x10, 7, NOBODY), (0x20, 0, NOBODY)];
    let mut out = 2u32.to_le_bytes().to_vec();
    for (tag, permission, id) in entries {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&permission.to_le_bytes());
        out.extend_from_slice(&id.to_le_bytes());
    }
    out
}
