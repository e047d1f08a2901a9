//! Inner loops of saving and restoring a tree: formatting and decoding its archive.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use stillframe_pgalloc::{PageExtent, PagesOffset};
use stillframe_tmpfs::decode::decode_tree;
use stillframe_tmpfs::encode::TreeWriter;
use stillframe_tmpfs::entry::{Attributes, Kind};

const FILES: u64 = 10_000;

fn encode() -> Vec<u8> {
    let mut writer = TreeWriter::new(Vec::new());
    let attributes = Attributes { mode: 0o644, ..Attributes::default() };
    writer.append(b"", 0, &Kind::Directory, &attributes, b"").expect("a Vec takes it");
    for number in 0..FILES {
        if number % 100 == 0 {
            writer
                .append(format!("{number}").as_bytes(), 0, &Kind::Directory, &attributes, b"")
                .expect("a Vec takes it");
        }
        let pages_offset = PagesOffset(number * 4096);
        let extents = vec![PageExtent { file_offset: 0, length: 4096, pages_offset }];
        let path = format!("{}/file-{number}", number / 100 * 100);
        let file = Kind::File { size: 4096, extents };
        let parent = 1 + number as usize / 100 * 101;
        writer.append(path.as_bytes(), parent, &file, &attributes, b"").expect("a Vec takes it");
    }
    writer.finish().expect("a Vec takes it")
}

fn tree(criterion: &mut Criterion) {
    let archive = encode();
    let mut group = criterion.benchmark_group("tree");
    group.throughput(Throughput::Elements(FILES));
    group.bench_function("encode", |bencher| bencher.iter(encode));
    group.bench_function("decode", |bencher| {
        bencher.iter(|| decode_tree(black_box(&archive), FILES * 4096).expect("it was encoded"));
    });
    group.finish();
}

criterion_group!(benches, tree);
criterion_main!(benches);
