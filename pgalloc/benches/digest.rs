//! Inner loops of saving and loading pages: digests.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use stillframe_pgalloc::{CHUNK_SIZE, digest_chunks};

fn digest(criterion: &mut Criterion) {
    let bytes: Vec<u8> = (0..16u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut group = criterion.benchmark_group("digest");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("chunks", |bencher| {
        bencher.iter(|| digest_chunks(black_box(&bytes), CHUNK_SIZE as usize));
    });
    group.finish();
}

criterion_group!(benches, digest);
criterion_main!(benches);
