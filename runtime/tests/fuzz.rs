//! The fuzz targets over their corpus and over a bounded number of mutations of it, the same ones in each run.
//! `make fuzz` runs them with libFuzzer.

#[path = "../../fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use stillframe_pgalloc::{PageExtent, PagesMeta, PagesOffset, PrivateMemoryFileMeta};
use stillframe_runtime::manifest::{Manifest, Offsets, Part, SavedContainer, SavedFilesystem};
use stillframe_tmpfs::ResourceId;
use stillframe_tmpfs::entry::{Attributes, Entry, Kind, Timestamp, Tree, Xattr};

use targets::TARGETS;

/// Mutations of each file of a corpus, and the longest time for all of a target's on a slow machine.
const MUTATIONS: usize = 2000;
const LIMIT: Duration = Duration::from_secs(5);

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

#[test]
fn every_target_keeps_its_promises_over_its_corpus_and_mutations_of_it() {
    for (name, target) in TARGETS {
        let mut files: Vec<PathBuf> =
            fs::read_dir(corpus(name)).unwrap().map(|file| file.unwrap().path()).collect();
        files.sort();
        let inputs: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
        assert!(inputs.len() >= 5, "{name} has a corpus");
        let run = |input: &[u8], of: &str| {
            std::panic::catch_unwind(|| target(input)).unwrap_or_else(|_| {
                panic!("{name} fails at a mutation of {of}: b\"{}\"", input.escape_ascii())
            });
        };
        inputs.iter().zip(&files).for_each(|(input, file)| run(input, &file.display().to_string()));
        let (begun, mut random, mut done) = (Instant::now(), Random(0x9e37_79b9_7f4a_7c15), 0);
        for _ in 0..MUTATIONS {
            for (input, file) in inputs.iter().zip(&files) {
                let mutation = mutate(input, &inputs, &mut random);
                run(&mutation, &file.display().to_string());
                done += 1;
            }
            if begun.elapsed() > LIMIT {
                break;
            }
        }
        println!("{name}: {} files, {done} mutations", inputs.len());
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound.max(1)
    }
}

fn mutate(input: &[u8], all: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        let end = (at + 1 + random.below(40)).min(bytes.len());
        match random.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => {
                bytes[at] = [0, 0xff, 0x7f, b'/', b'=', b'0', b'9', b'-'][random.below(8)]
            }
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            5 => {
                let other = &all[random.below(all.len())];
                bytes.truncate(at);
                bytes.extend_from_slice(&other[random.below(other.len())..]);
            }
            _ if bytes.len() > 512 => {
                // Whole blocks change places.
                let (from, to) =
                    (random.below(bytes.len() / 512) * 512, random.below(bytes.len() / 512) * 512);
                bytes.copy_within(from..from + 512, to);
            }
            _ => bytes.insert(at, random.below(256) as u8),
        }
    }
    bytes
}

fn entry(parent: usize, name: &[u8], kind: Kind) -> Entry {
    let time = |sec| Timestamp { sec, nsec: 500_000_000 };
    let mut attributes =
        Attributes { mode: 0o644, uid: 5, gid: 6, mtime: time(1), atime: time(-2), ..Attributes::default() };
    if matches!(kind, Kind::HardLink { .. }) {
        attributes = Attributes::default();
    }
    Entry { parent, name: name.to_vec(), kind, attributes }
}

fn trees() -> Vec<(&'static str, Vec<u8>)> {
    let extent =
        |file_offset, length, pages| PageExtent { file_offset, length, pages_offset: PagesOffset(pages) };
    let root = || entry(0, b"", Kind::Directory);
    let file = |size, extents| Kind::File { size, extents };
    let mut rich = entry(0, b"xattrs", file(5000, vec![extent(0, 5000, 4096)]));
    let acl =
        stillframe_tmpfs::acl::from_text(b"user::rw-,user:7:r--,group::r--,mask::r--,other::---").unwrap();
    let xattr = |name: &[u8], value: &[u8]| Xattr { name: name.to_vec(), value: value.to_vec() };
    rich.attributes.xattrs = vec![xattr(b"system.posix_acl_access", &acl), xattr(b"user.%=\n", b"\0\n=")];
    (rich.attributes.uid, rich.attributes.flags) = (4_000_000_000, 0x40);
    let all = vec![
        root(),
        entry(0, b"directory", Kind::Directory),
        entry(1, &[b'n'; 255], file(0, vec![])),
        entry(
            1,
            b"sparse",
            file(i64::MAX as u64, vec![extent(1 << 40, 4096, 0), extent(1 << 50, 8192, 1 << 20)]),
        ),
        entry(0, b"link", Kind::HardLink { target: 2 }),
        entry(0, b"symlink", Kind::Symlink { target: vec![b't'; 200] }),
        entry(0, b"fifo", Kind::Fifo),
        entry(0, b"socket", Kind::Socket),
        entry(0, b"whiteout", Kind::CharDevice { major: 0, minor: 0 }),
        entry(0, b"disk", Kind::BlockDevice { major: 4095, minor: 1_048_575 }),
        rich,
    ];
    let encode = |entries| targets::encode(&Tree { entries });
    let alone = |kind| encode(vec![root(), entry(0, b"victim", kind)]);
    let renamed = |to: &[u8]| {
        let mut archive = alone(Kind::Fifo);
        let at = archive.windows(9).position(|window| window == b"./victim\0").unwrap();
        archive[at..at + 100].fill(0);
        archive[at..at + to.len()].copy_from_slice(to);
        archive
    };
    let mut cut = encode(all.clone());
    cut.truncate(cut.len() - 700);
    let mut bomb = alone(file(4096, vec![extent(0, 4096, 0)]));
    // The record's number of extents: the last 4 of its first 40 bytes.
    let record = bomb.len() - 1024 - 512;
    bomb[record + 36..record + 40].fill(0xff);
    // Names by number, since paths are too long from the 16th on; and what such names mustn't say.
    let mut deep = vec![root()];
    (0..17).for_each(|parent| deep.push(entry(parent, &[b'd'; 250], Kind::Directory)));
    deep.push(entry(17, b"f", Kind::Fifo));
    deep.push(entry(3, b"link", Kind::HardLink { target: 18 }));
    let mut below_a_link = vec![root(), entry(0, b"l", Kind::Symlink { target: b"/etc".to_vec() })];
    below_a_link.push(entry(1, b"passwd", Kind::Fifo));
    vec![
        ("empty", encode(vec![root()])),
        ("everything", encode(all)),
        ("cut", cut),
        ("a-billion-extents", bomb),
        ("parent-is-a-symlink", encode(below_a_link)),
        ("deep", encode(deep)),
        ("number-of-no-directory", renamed(b"@1/x")),
        ("number-without-end", renamed(b"@18446744073709551616/x")),
        ("number-and-path", renamed(b"@0/a/../b")),
        ("dot-dot", renamed(b"./../../etc/passwd")),
        ("absolute", renamed(b"/etc/passwd")),
        ("double-slash", renamed(b".//")),
        ("overlap", alone(file(8192, vec![extent(0, 8192, 0), extent(4096, 4096, 0)]))),
        ("overflow", alone(file(1 << 40, vec![extent(u64::MAX - 4095, 4096, u64::MAX - 4095)]))),
        ("nul", encode(vec![root(), entry(0, &[&b"a\0"[..], &[b'n'; 200]].concat(), Kind::Fifo)])),
    ]
}

fn metas() -> Vec<(&'static str, Vec<u8>)> {
    let digests = |length: u64| {
        stillframe_pgalloc::DigestTable::new(length, (0..length.div_ceil(65536)).collect()).unwrap()
    };
    let extent = PageExtent { file_offset: 4096, length: 8192, pages_offset: PagesOffset(0) };
    let private = |index| PrivateMemoryFileMeta { index, size: 1 << 20, extents: vec![extent] };
    let meta = |length, private| PagesMeta { pages_length: length, digests: digests(length), private };
    let whole = meta(200_704, vec![private(0), private(7)]).encode();
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = whole.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        bad
    };
    vec![
        ("empty", meta(0, vec![]).encode()),
        ("everything", whole.clone()),
        ("cut", whole[..whole.len() - 5].to_vec()),
        ("a-billion-digests", with(24, &1_000_000_000u64.to_le_bytes())),
        ("a-billion-files", with(32, &1_000_000_000u32.to_le_bytes())),
        ("endless", with(16, &u64::MAX.to_le_bytes())),
    ]
}

fn manifests() -> Vec<(&'static str, Vec<u8>)> {
    let filesystem = |path: &str, tree_start, tree_end| SavedFilesystem {
        resource_id: ResourceId::new("c", path),
        aliases: Vec::new(),
        offsets: Offsets::PagesFile,
        tree_start,
        tree_end,
        tree_length: None,
        options: "size=1g".to_owned(),
        files: 1,
        entries: 2,
        logical_bytes: u64::MAX,
        data_bytes: 4,
    };
    let manifest = |filesystems| Manifest {
        stillframe: "0".to_owned(),
        created: 0,
        tree: Part::of(&[0; 70_000]),
        meta: Part::of(b"x"),
        pages_length: 4096,
        pages_path: None,
        containers: vec![SavedContainer { name: "c".to_owned(), named: true }],
        pod: None,
        filesystems,
        processes: Vec::new(),
    };
    let good = manifest(vec![filesystem("/a", 0, 50_000), filesystem("/b\n\u{e9}", 50_000, 70_000)]);
    let body = |manifest: &Manifest| serde_json::to_vec(manifest).unwrap();
    let mut long = good.clone();
    long.tree.length = u64::MAX;
    vec![
        ("good", good.encode()),
        ("body", body(&good)),
        ("overlap", body(&manifest(vec![filesystem("/a", 0, 50_000), filesystem("/b", 1, 70_000)]))),
        ("twice", body(&manifest(vec![filesystem("/a", 0, 50_000), filesystem("/a", 50_000, 70_000)]))),
        ("long", body(&long)),
        ("deep", [vec![b'['; 5000], vec![b']'; 5000]].concat()),
        ("version", br#"{"format":"stillframe-image","version":2}"#.to_vec()),
    ]
}

fn texts(of: &str) -> Vec<(&'static str, Vec<u8>)> {
    let acl: [(&str, &[u8]); 7] = [
        ("least", b"user::rwx,group::r-x,other::---"),
        ("full", b"user::rw-,user:0:r--,user:1000:---,group::r--,group:5:rwx,mask::rwx,other::---"),
        (
            "value",
            b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x04\0\x05\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff",
        ),
        ("id", b"user::rwx,user:4294967295:r--,group::r-x,mask::r--,other::---"),
        ("zeros", b"user::rwx,user:00001:r--,group::r-x,mask::r--,other::---"),
        ("order", b"other::---,group::r-x,user::rwx"),
        ("names", b"user::rwx,user:root:r--,group::r-x,mask::r--,other::---"),
    ];
    let pax: [(&str, &[u8]); 7] = [
        ("one", b"6 a=b\n"),
        ("many", b"11 path=ab\n25 mtime=-1.000000500000\n28 SCHILY.xattr.user.x=\n=\0\n\n"),
        ("escapes", b"30 SCHILY.xattr.user.%25%3D%=\n\n"),
        ("acl", b"54 SCHILY.acl.access=user::rwx,group::r-x,other::---\n"),
        ("long", b"18446744073709551615 a=b\n"),
        ("short", b"3 a=b\n"),
        ("none", b"0 \n"),
    ];
    let list = if of == "acl" { acl } else { pax };
    list.iter().map(|(name, text)| (*name, text.to_vec())).collect()
}

#[test]
#[ignore = "writes the corpus"]
fn write_corpus() {
    for (name, _) in TARGETS {
        let inputs = match name {
            "tree" => trees(),
            "meta" => metas(),
            "manifest" => manifests(),
            _ => texts(name),
        };
        fs::create_dir_all(corpus(name)).unwrap();
        for (file, input) in inputs {
            fs::write(corpus(name).join(file), input).unwrap();
        }
    }
}
