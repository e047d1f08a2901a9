//! What the encoder writes, the decoder reads; what no encoder writes, it refuses by name and offset.

use proptest::prelude::*;
use stillframe_pgalloc::{PageExtent, PagesOffset};

use super::*;
use crate::encode::TreeWriter;
use crate::entry::Timestamp;

const PAGES: u64 = 1 << 30;

fn encode(tree: &Tree) -> Vec<u8> {
    let mut writer = TreeWriter::new(Vec::new());
    let path = |index: usize| tree.path(index).0[1..].to_vec();
    for (index, entry) in tree.entries.iter().enumerate() {
        let link = if let Kind::HardLink { target } = entry.kind { path(target) } else { Vec::new() };
        writer.append(&path(index), entry.parent, &entry.kind, &entry.attributes, &link).unwrap();
    }
    writer.finish().unwrap()
}

fn root() -> Entry {
    let attributes = Attributes { mode: 0o755, ..Attributes::default() };
    Entry { parent: 0, name: Vec::new(), kind: Kind::Directory, attributes }
}

fn child(name: &[u8], kind: Kind) -> Entry {
    Entry { parent: 0, name: name.to_vec(), kind, attributes: Attributes::default() }
}

/// The archive of a root directory and one more entry.
fn archive(entry: Entry) -> Vec<u8> {
    encode(&Tree { entries: vec![root(), entry] })
}

fn fault(archive: &[u8]) -> TreeFault {
    decode_tree(archive, PAGES).unwrap_err().fault
}

/// Changes the header of the entry whose name field begins with `name`, and mends its checksum.
fn change(mut archive: Vec<u8>, name: &[u8], change: impl Fn(&mut [u8])) -> Vec<u8> {
    let at = (0..archive.len()).step_by(512).find(|at| archive[*at..].starts_with(name)).unwrap();
    let header = &mut archive[at..at + 512];
    change(header);
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    archive
}

fn rename(archive: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    change(archive, from, |header| {
        header[..100].fill(0);
        header[..to.len()].copy_from_slice(to);
    })
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let file = archive(child(b"victim", Kind::Fifo));
    assert!(decode_tree(&file, PAGES).is_ok());
    for bad in [
        "/etc/passwd",
        "../x",
        "./../x",
        "./a/../x",
        "./a//x",
        "./.",
        "./..",
        "x",
        ".",
        "..",
        ".//x",
        ".//",
        "./a//",
    ] {
        assert!(
            matches!(fault(&rename(file.clone(), b"./victim", bad.as_bytes())), TreeFault::Name),
            "{bad}"
        );
    }
    assert!(matches!(fault(&rename(file.clone(), b"./victim", b"./no/x")), TreeFault::Parent));
    assert!(matches!(fault(&rename(file, b"./victim", b"./")), TreeFault::Duplicate));
    let long = archive(child(&[b'n'; 256], Kind::Fifo));
    assert!(matches!(fault(&long), TreeFault::Name));
    assert!(decode_tree(&archive(child(&[b'n'; 255], Kind::Fifo)), PAGES).is_ok());
    // A NUL can only come by an extended header; where the header's field has one, the name ends.
    let nul = archive(child(&[&b"a\0b"[..], &[b'x'; 200]].concat(), Kind::Fifo));
    assert!(matches!(fault(&nul), TreeFault::Name));
}

#[test]
fn a_parent_must_be_a_directory_that_came_before() {
    for kind in [Kind::Fifo, Kind::Symlink { target: b"/".to_vec() }, Kind::Socket] {
        let mut entries = vec![root(), child(b"p", kind), child(b"c", Kind::Fifo)];
        entries[2].parent = 1;
        assert!(matches!(fault(&encode(&Tree { entries })), TreeFault::Parent));
    }
}

#[test]
fn a_name_exists_once() {
    let entries = vec![root(), child(b"a", Kind::Fifo), child(b"a", Kind::Directory)];
    assert!(matches!(fault(&encode(&Tree { entries })), TreeFault::Duplicate));
}

#[test]
fn the_first_entry_is_the_root_directory() {
    for entries in [vec![], vec![child(b"a", Kind::Fifo)]] {
        let mut writer = TreeWriter::new(Vec::new());
        for entry in &entries {
            writer.append(&entry.name, entry.parent, &entry.kind, &entry.attributes, b"").unwrap();
        }
        assert!(matches!(fault(&writer.finish().unwrap()), TreeFault::Root));
    }
    let file = change(archive(child(b"a", Kind::Fifo)), b"./\0", |header| header[156] = b'6');
    assert!(matches!(fault(&file), TreeFault::Root));
}

#[test]
fn hard_links_point_to_an_earlier_file() {
    let directory = vec![root(), child(b"d", Kind::Directory), child(b"l", Kind::HardLink { target: 1 })];
    assert!(matches!(fault(&encode(&Tree { entries: directory })), TreeFault::Link(_)));
    let mut writer = TreeWriter::new(Vec::new());
    writer.append(b"", 0, &Kind::Directory, &root().attributes, b"").unwrap();
    writer.append(b"l", 0, &Kind::HardLink { target: 0 }, &Attributes::default(), b"l").unwrap();
    assert!(matches!(fault(&writer.finish().unwrap()), TreeFault::Link(_)));
}

#[test]
fn a_path_beyond_path_max_is_named_by_its_parent_s_number() {
    // 200 directories of 255 bytes inside each other, and a file at the end with a link to it from the root.
    let mut entries = vec![root()];
    for depth in 0..200 {
        entries.push(Entry { parent: depth, ..child(&[b'd'; 255], Kind::Directory) });
    }
    entries.push(Entry { parent: 200, ..child(b"f", Kind::Fifo) });
    entries.push(child(b"l", Kind::HardLink { target: 201 }));
    // Behind what lies deep, and in the middle.
    entries.push(Entry { parent: 100, ..child(b"g", Kind::Fifo) });
    let tree = Tree { entries };
    let archive = encode(&tree);
    assert_eq!(decode_tree(&archive, PAGES).unwrap(), tree);
    // A directory takes 3 blocks, 2 of them for its name; the 15 with paths up to 8 more.
    assert!(archive.len() < 205 * 3 * 512 + 15 * 8 * 512, "{} bytes", archive.len());

    let member = |name: &str, link: &str| {
        let mut entries = vec![root(), child(b"d", Kind::Directory), child(b"f", Kind::Fifo)];
        entries.push(child(b"victim", Kind::HardLink { target: 2 }));
        change(encode(&Tree { entries }), b"./victim", |header| {
            header[..100].fill(0);
            header[..name.len()].copy_from_slice(name.as_bytes());
            header[157..257].fill(0);
            header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        })
    };
    let decoded = decode_tree(&member("@1/l", "@2"), PAGES).unwrap();
    assert_eq!((decoded.entries[3].parent, &decoded.entries[3].name[..]), (1, &b"l"[..]));
    assert_eq!(decoded.entries[3].kind, Kind::HardLink { target: 2 });
    for name in ["@2/l", "@3/l", "@4/l", "@18446744073709551615/l"] {
        assert!(matches!(fault(&member(name, "@2")), TreeFault::Parent), "{name}");
    }
    for name in
        ["@", "@/l", "@1", "@1/", "@1//", "@1/a/b", "@1/..", "@x/l", "@-1/l", "@18446744073709551616/l"]
    {
        assert!(matches!(fault(&member(name, "@2")), TreeFault::Name), "{name}");
    }
    assert!(matches!(fault(&member("@0/d", "@2")), TreeFault::Duplicate));
    for link in ["@", "@0", "@1", "@3", "@4", "@2/", "@2/x", "@18446744073709551615", "@18446744073709551616"]
    {
        assert!(matches!(fault(&member("@1/l", link)), TreeFault::Link(_)), "{link}");
    }
    let first = change(archive_of_root(), b"./\0", |header| header[..4].copy_from_slice(b"@0/x"));
    assert!(matches!(fault(&first), TreeFault::Root));
}

fn archive_of_root() -> Vec<u8> {
    encode(&Tree { entries: vec![root()] })
}

fn extent(file_offset: u64, length: u64, pages: u64) -> PageExtent {
    PageExtent { file_offset, length, pages_offset: PagesOffset(pages) }
}

#[test]
fn extents_stay_inside_file_and_pages() {
    let file = |size, extents| archive(child(b"f", Kind::File { size, extents }));
    assert!(decode_tree(&file(8192, vec![extent(0, 8192, 0)]), 8192).is_ok());
    for (size, extents) in [
        (4096, vec![extent(0, 8192, 0)]),
        (8192, vec![extent(0, 8192, 4096)]),
        (8192, vec![extent(1, 4096, 0)]),
        (8192, vec![extent(0, 4096, 1)]),
        (8192, vec![extent(0, 0, 0)]),
        (8192, vec![extent(4096, 4096, 0), extent(0, 4096, 4096)]),
        (8192, vec![extent(0, 4096, 0), extent(0, 4096, 4096)]),
        (i64::MAX as u64, vec![extent(u64::MAX - 4095, 4096, 0)]),
        (i64::MAX as u64, vec![extent(0, 4096, u64::MAX - 4095)]),
        (8192, vec![extent(4096, u64::MAX, 0)]),
    ] {
        let archive = file(size, extents.clone());
        let error = decode_tree(&archive, 8192).unwrap_err();
        assert!(matches!(error.fault, TreeFault::Extents(_)), "{size} {extents:?}: {error}");
        assert_eq!(error.entry.to_string(), "./f");
    }
    assert!(matches!(fault(&file(1 << 63, vec![])), TreeFault::Field("size")));
}

#[test]
fn fields_out_of_range_are_refused() {
    let device = |field: std::ops::Range<usize>, digits: &'static str| {
        let archive = archive(child(b"d", Kind::CharDevice { major: 1, minor: 1 }));
        change(archive, b"./d", move |header| header[field.clone()].copy_from_slice(digits.as_bytes()))
    };
    assert!(matches!(fault(&device(329..337, "0010000\0")), TreeFault::Field("devmajor")));
    assert!(matches!(fault(&device(337..345, "4000000\0")), TreeFault::Field("devminor")));
    assert!(matches!(fault(&device(100..108, "0100644\0")), TreeFault::Field("mode")));
    assert!(matches!(fault(&device(108..116, "zzzzzzz\0")), TreeFault::Field("uid")));
    assert!(matches!(fault(&change(device(0..0, ""), b"./d", |h| h[156] = b'7')), TreeFault::Type(_)));
    for target in [b"".to_vec(), vec![b't'; 4096]] {
        assert!(matches!(fault(&archive(child(b"l", Kind::Symlink { target }))), TreeFault::Target));
    }
    let flagged = |kind, flags| {
        let mut entry = child(b"x", kind);
        entry.attributes.flags = flags;
        fault(&archive(entry))
    };
    assert!(matches!(flagged(Kind::Directory, 1), TreeFault::Flags(1)));
    assert!(matches!(flagged(Kind::Fifo, 0x10), TreeFault::Flags(0x10)));
}

#[test]
fn an_archive_cut_anywhere_or_with_more_behind_it_is_refused() {
    let whole = archive(child(&[b'n'; 150], Kind::File { size: 5, extents: vec![] }));
    assert!(decode_tree(&whole, PAGES).is_ok());
    for length in 0..whole.len() {
        assert!(decode_tree(&whole[..length], PAGES).is_err(), "{length}");
    }
    for more in [&[0][..], &[0; 512], &[1; 512]] {
        assert!(decode_tree(&[&whole, more].concat(), PAGES).is_err());
    }
}

/// An archive that comes in pieces, and may not come to its end.
struct Pieces<'a> {
    archive: &'a [u8],
    piece: usize,
    fails: bool,
}

impl ArchiveSource for Pieces<'_> {
    fn read_more(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        let (piece, rest) = self.archive.split_at(self.archive.len().min(self.piece));
        if piece.is_empty() && self.fails {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        bytes.extend_from_slice(piece);
        self.archive = rest;
        Ok(())
    }
}

#[test]
fn an_archive_is_the_same_in_pieces_of_any_size() {
    let extents = (0..100).map(|n| extent(n * 8192, 4096, n * 4096)).collect();
    let entries = vec![
        root(),
        child(&[b'n'; 150], Kind::File { size: 1 << 20, extents }),
        child(b"link", Kind::Symlink { target: vec![b't'; 1000] }),
    ];
    let whole = encode(&Tree { entries });
    let tree = decode_tree(&whole, PAGES).unwrap();
    for piece in [1, 511, 512, 513, 2000, whole.len()] {
        for length in [0, whole.len() as u64, u64::MAX] {
            let source = Pieces { archive: &whole, piece, fails: false };
            assert_eq!(read_tree(source, length, PAGES).unwrap(), tree, "{piece}");
        }
        let source = Pieces { archive: &whole[..whole.len() - 1], piece, fails: true };
        let error = read_tree(source, 0, PAGES).unwrap_err();
        assert!(matches!(error, ReadTreeError::Read(error) if error.kind() == io::ErrorKind::BrokenPipe));
        let source = Pieces { archive: &whole[..whole.len() - 1], piece, fails: false };
        let error = read_tree(source, 0, PAGES).unwrap_err();
        assert!(matches!(error, ReadTreeError::Tree(TreeError { fault: TreeFault::Trailer, .. })));
    }
}

#[test]
fn the_offset_of_a_bad_entry_is_told() {
    let mut entries = vec![root(), child(b"good", Kind::Directory)];
    entries.push(child(b"bad", Kind::Symlink { target: Vec::new() }));
    let error = decode_tree(&encode(&Tree { entries }), PAGES).unwrap_err();
    // Each of the two before takes an extended header of two blocks and a header; so does this one.
    assert_eq!((error.offset, error.entry.to_string().as_str()), (512 * 8, "./bad"));
}

#[test]
fn acls_are_text_and_bad_text_is_refused() {
    let acl = acl::from_text(b"user::rw-,user:1:r--,group::r--,mask::r--,other::---").unwrap();
    let mut entry = child(b"f", Kind::File { size: 0, extents: vec![] });
    let xattr = |name: &str, value: &[u8]| Xattr { name: name.into(), value: value.into() };
    let raw = xattr("system.posix_acl_default", &acl[..12]);
    entry.attributes.xattrs = vec![xattr("system.posix_acl_access", &acl), raw];
    let good = archive(entry.clone());
    let find = |text: &[u8]| good.windows(text.len()).position(|window| window == text);
    assert!(find(b" SCHILY.acl.access=user::rw-,user:1:r--,group::r--,mask::r--,other::---\n").is_some());
    assert!(find(b" SCHILY.xattr.system.posix_acl_default=\x02\0\0\0").is_some(), "no ACL: its bytes");
    assert_eq!(decode_tree(&good, PAGES).unwrap().entries[1], entry);

    let at = find(b"user:1:r--").unwrap();
    let mut bad = good.clone();
    bad[at] = b'U';
    let error = decode_tree(&bad, PAGES).unwrap_err();
    assert!(matches!(error.fault, TreeFault::Acl { source: AclError::Entry(1), .. }), "{error}");
    assert!(error.to_string().contains("entry \"./f\" at offset 2560"), "{error}");
    // The same xattr as text and as bytes.
    entry.attributes.xattrs =
        vec![xattr("system.posix_acl_access", &acl), xattr("system.posix_acl_access", &acl[..12])];
    assert!(matches!(fault(&archive(entry)), TreeFault::Xattr(_)));
}

fn timestamp() -> impl Strategy<Value = Timestamp> {
    (any::<i64>(), 0..1_000_000_000u32).prop_map(|(sec, nsec)| Timestamp { sec, nsec })
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("a name's byte", |b| *b != 0 && *b != b'/');
    let length = prop_oneof![4 => 1..20usize, 1 => 90..110usize, 1 => 250..256usize];
    length.prop_flat_map(move |length| prop::collection::vec(byte.clone(), length))
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let xattr = ("(user|trusted|security)\\.[a-z=%]{1,9}", any::<Vec<u8>>());
    let xattr = (xattr.0.prop_map(String::into_bytes), xattr.1);
    let name = prop::collection::vec((1..=255u8).prop_filter("any but NUL", |b| *b != 0), 1..40);
    let xattrs = prop::collection::btree_map(prop_oneof![xattr.0, name], xattr.1, 0..3);
    (0..0o10000u32, any::<u32>(), any::<u32>(), timestamp(), timestamp(), xattrs).prop_map(
        |(mode, uid, gid, mtime, atime, xattrs)| {
            let xattrs = xattrs.into_iter().map(|(name, value)| Xattr { name, value });
            Attributes { mode, uid, gid, mtime, atime, flags: 0, xattrs: xattrs.collect() }
        },
    )
}

fn kind() -> impl Strategy<Value = Kind> {
    let runs = prop::collection::vec((1..9u64, 1..9u64, 0..PAGES / 4096 - 9), 0..30);
    let file = (runs, 1..4097u64, any::<bool>()).prop_map(|(runs, tail, hole)| {
        let mut at = 0;
        let mut extents = Vec::new();
        for (gap, pages, place) in runs {
            at += gap * 4096;
            extents.push(PageExtent {
                file_offset: at,
                length: pages * 4096,
                pages_offset: PagesOffset(place * 4096),
            });
            at += pages * 4096;
        }
        let size = if hole { at + tail } else { at };
        Kind::File { size, extents }
    });
    let target = prop::collection::vec(1..=255u8, 1..300);
    prop_oneof![
        4 => Just(Kind::Directory),
        4 => file,
        1 => target.prop_map(|target| Kind::Symlink { target }),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
        1 => (0..1u32 << 12, 0..1u32 << 20).prop_map(|(major, minor)| Kind::CharDevice { major, minor }),
        1 => (0..1u32 << 12, 0..1u32 << 20).prop_map(|(major, minor)| Kind::BlockDevice { major, minor }),
        1 => Just(Kind::HardLink { target: usize::MAX }),
    ]
}

/// Any tree: each entry picks its parent among the directories before it, a link its target likewise.
fn tree() -> impl Strategy<Value = Tree> {
    let entry = (name(), kind(), attributes(), any::<prop::sample::Index>(), any::<prop::sample::Index>());
    (attributes(), prop::collection::vec(entry, 0..40)).prop_map(|(attributes, drawn)| {
        let mut entries = vec![Entry { attributes, ..root() }];
        for (name, mut kind, mut attributes, parent, target) in drawn {
            let of = |want: fn(&Kind) -> bool| -> Vec<usize> {
                (0..entries.len()).filter(|index| want(&entries[*index].kind)).collect()
            };
            let directories = of(|kind| *kind == Kind::Directory);
            let parent = directories[parent.index(directories.len())];
            if matches!(kind, Kind::HardLink { .. }) {
                let files = of(|kind| !matches!(kind, Kind::Directory | Kind::HardLink { .. }));
                if files.is_empty() {
                    continue;
                }
                kind = Kind::HardLink { target: files[target.index(files.len())] };
                attributes = Attributes::default();
            }
            let taken = |entry: &Entry| entry.parent == parent && entry.name == name;
            if name != b"." && name != b".." && !entries[1..].iter().any(taken) {
                entries.push(Entry { parent, name, kind, attributes });
            }
        }
        Tree { entries }
    })
}

proptest! {
    #[test]
    fn any_tree_round_trips(tree in tree()) {
        prop_assert_eq!(decode_tree(&encode(&tree), PAGES).unwrap(), tree);
    }

    #[test]
    fn a_damaged_archive_decodes_or_is_refused(tree in tree(), at: prop::sample::Index, byte: u8) {
        let mut archive = encode(&tree);
        let at = at.index(archive.len());
        archive[at] = byte;
        let _ = decode_tree(&archive, PAGES);
    }

    #[test]
    fn any_bytes_decode_or_are_refused(bytes: Vec<u8>) {
        let _ = decode_tree(&bytes, PAGES);
    }
}
