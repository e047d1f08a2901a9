//! What is fuzzed: each function takes any bytes and panics where a decoder breaks a promise.
//!
//! Decoders answer any input with a value or an error, and what they accept is encoded and decoded to the same again.
//! Where a checksum would keep a fuzzer out, it is mended first: hostile images have right checksums.

use stillframe_pgalloc::PagesMeta;
use stillframe_runtime::manifest::Manifest;
use stillframe_tmpfs::acl;
use stillframe_tmpfs::archive::BLOCK;
use stillframe_tmpfs::decode::decode_tree;
use stillframe_tmpfs::encode::TreeWriter;
use stillframe_tmpfs::entry::{Kind, Tree};
use stillframe_tmpfs::pax;
use xxhash_rust::xxh3::xxh3_64;

/// A function of this module.
pub type Target = fn(&[u8]);

/// All of them, by the names of their folders in `corpus`.
pub const TARGETS: [(&str, Target); 5] =
    [("tree", tree), ("meta", meta), ("manifest", manifest), ("pax", pax), ("acl", acl)];

/// Length of the pages file that a tree refers to.
const PAGES: u64 = 1 << 30;

/// An archive of `tree.tar`.
pub fn tree(data: &[u8]) {
    let _ = decode_tree(data, PAGES);
    let mut archive = data.to_vec();
    archive.chunks_exact_mut(BLOCK).for_each(mend_header);
    let Ok(tree) = decode_tree(&archive, PAGES) else { return };
    let again = decode_tree(&encode(&tree), PAGES).expect("what was decoded can be encoded and decoded");
    assert_eq!(again, tree);
    for entry in &tree.entries {
        assert!(!entry.name.contains(&b'/') && !entry.name.contains(&0) && entry.name.len() <= 255);
        assert!(tree.entries[entry.parent].kind == Kind::Directory);
    }
    assert!(tree.page_bytes(65536) >= tree.page_bytes(4096));
    assert!(tree.huge_page_bytes(4096, 2 << 20, 0, false) >= tree.page_bytes(4096));
}

fn mend_header(block: &mut [u8]) {
    if &block[257..262] == b"ustar" {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

/// The archive of a tree.
pub fn encode(tree: &Tree) -> Vec<u8> {
    let mut writer = TreeWriter::new(Vec::new());
    let path = |index: usize| tree.path(index).0[1..].to_vec();
    for (index, entry) in tree.entries.iter().enumerate() {
        let link = if let Kind::HardLink { target } = entry.kind { path(target) } else { Vec::new() };
        let appended = writer.append(&path(index), entry.parent, &entry.kind, &entry.attributes, &link);
        appended.expect("a Vec takes everything");
    }
    writer.finish().expect("a Vec takes everything")
}

/// A `pages.meta`.
pub fn meta(data: &[u8]) {
    if let Ok(meta) = PagesMeta::decode(data) {
        assert_eq!(meta.encode(), data);
    }
}

/// A `manifest.json`, or the body of one.
pub fn manifest(data: &[u8]) {
    let mut bodied = br#"{"format":"stillframe-image","version":1,"digest":""#.to_vec();
    bodied.extend_from_slice(format!("{:016x}\",\"body\":", xxh3_64(data)).as_bytes());
    bodied.extend_from_slice(data);
    bodied.push(b'}');
    for text in [data, &bodied] {
        if let Ok(manifest) = Manifest::decode(text) {
            let again =
                Manifest::decode(&manifest.encode()).expect("what was decoded can be encoded and decoded");
            assert_eq!(again, manifest);
        }
    }
}

/// An extended header.
pub fn pax(data: &[u8]) {
    let name = pax::xattr_name(data);
    assert_eq!(pax::xattr_name(&pax::xattr_key(data)), data);
    assert!(name.len() <= data.len());
    let Some(records) = pax::parse(data) else { return };
    for (key, value) in records {
        assert!(!key.contains(&b'='));
        let _ = (acl::xattr_name(key), acl::from_text(value));
    }
}

/// The text of an ACL, or its value.
pub fn acl(data: &[u8]) {
    if let Ok(value) = acl::from_text(data) {
        assert_eq!(acl::to_text(&value).expect("what has a text has one").as_bytes(), data);
    }
    if let Some(text) = acl::to_text(data) {
        assert_eq!(acl::from_text(text.as_bytes()).expect("what has a text is its value"), data);
    }
}
