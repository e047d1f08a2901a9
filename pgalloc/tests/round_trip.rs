//! Files are saved and loaded as they were, whatever they and their pages file lie on.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use proptest::prelude::*;
use stillframe_pgalloc::{
    AsyncPagesFileLoad, AsyncPagesFileSave, DigestTable, Direct, FileRange, LoadOptions, LoadTarget,
    MemoryFile, OnLoaded, PAGE_SIZE, PageExtent, PagesFileSummary, PagesMeta, SaveOptions, validate_extents,
};

#[path = "support/sys.rs"]
mod sys;

/// A directory on tmpfs, and one on a disk (where the tests are run from a checkout on one).
const MEMORY: &str = "/dev/shm";
const DISK: &str = env!("CARGO_TARGET_TMPDIR");

/// Where pages files are written, and how.
const DESTINATIONS: [(&str, SaveOptions); 6] = [
    (MEMORY, SaveOptions { direct: Direct::Auto, io_uring: true }),
    (MEMORY, SaveOptions { direct: Direct::Never, io_uring: true }),
    (DISK, SaveOptions { direct: Direct::Auto, io_uring: true }),
    (DISK, SaveOptions { direct: Direct::Always, io_uring: true }),
    (DISK, SaveOptions { direct: Direct::Always, io_uring: false }),
    (DISK, SaveOptions { direct: Direct::Never, io_uring: true }),
];

fn file_in(directory: &str) -> Arc<File> {
    Arc::new(tempfile::tempfile_in(directory).unwrap())
}

fn whole(file: &File) -> FileRange {
    FileRange::new(0, file.metadata().unwrap().len()).unwrap()
}

/// Bytes that differ from page to page and file to file, never a zero.
fn bytes(seed: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![(seed % 255) as u8 + 1; length];
    for (index, page) in bytes.chunks_mut(PAGE_SIZE as usize).enumerate() {
        // Not only the page's number: a page must not pass for that of another file at the same place.
        let stamp = (index.wrapping_mul(0x0101_0001) ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            | 0x0101_0101_0101_0101;
        let (head, tail) = (stamp.to_le_bytes(), page.len().min(8));
        page[..tail].copy_from_slice(&head[..tail]);
    }
    bytes
}

struct Saved {
    pages: File,
    summary: PagesFileSummary,
    files: Vec<(u64, Vec<PageExtent>)>,
}

fn save(sources: &[Arc<File>], directory: &str, options: SaveOptions) -> Saved {
    let pages = tempfile::tempfile_in(directory).unwrap();
    let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), options).unwrap();
    let main = save.register_memory_file(&MemoryFile::main()).unwrap();
    let files = sources.iter().map(|source| {
        let range = whole(source);
        (range.end(), main.write_range(source, range).unwrap())
    });
    let files = files.collect();
    let summary = save.finish().unwrap();
    Saved { pages, summary, files }
}

impl Saved {
    fn digests(&self) -> DigestTable {
        self.summary.digests.clone()
    }

    /// What every image must keep to.
    fn check(&self) {
        let length = self.summary.length;
        let metadata = self.pages.metadata().unwrap();
        assert_eq!(metadata.len(), length);
        assert!(metadata.blocks() * 512 >= length, "the pages file is sparse");
        let mut pages = 0;
        for (size, extents) in &self.files {
            validate_extents(extents, *size, length).unwrap();
            pages += extents.iter().map(|extent| extent.length.div_ceil(PAGE_SIZE)).sum::<u64>();
        }
        assert_eq!(pages * PAGE_SIZE, length);
    }

    fn load(&self) -> Vec<Arc<File>> {
        let pages = self.pages.try_clone().unwrap();
        let load = AsyncPagesFileLoad::new(pages, self.digests(), LoadOptions::default()).unwrap();
        let loaded = Arc::new(AtomicUsize::new(0));
        let (files, targets): (Vec<_>, Vec<_>) = self
            .files
            .iter()
            .map(|(size, extents)| {
                let file = file_in(MEMORY);
                let (loaded, size) = (loaded.clone(), *size);
                let on_loaded: OnLoaded = Box::new(move |file| {
                    loaded.fetch_add(1, Ordering::SeqCst);
                    file.set_len(size)
                });
                let target = LoadTarget {
                    on_loaded: Some(on_loaded),
                    ..LoadTarget::new(file.clone(), extents.clone())
                };
                (file, target)
            })
            .unzip();
        load.load_ranges_into(targets).unwrap();
        let summary = load.finish().unwrap();
        assert_eq!(summary.files as usize, self.files.len());
        assert_eq!(loaded.load(Ordering::SeqCst), self.files.len());
        assert_eq!(summary.bytes, self.summary.data_bytes);
        files
    }
}

/// A file as its pages that have data, its size, and its pages that are there but zero.
#[derive(Clone, Debug)]
struct Model {
    /// Runs of pages: first page, pages, and whether they have data (else they are written zeros).
    runs: Vec<(u64, u64, bool)>,
    /// Bytes cut off the last page.
    cut: u64,
    /// Pages of hole at the end.
    hole: u64,
}

impl Model {
    fn pages(&self) -> BTreeMap<u64, bool> {
        let runs = self
            .runs
            .iter()
            .flat_map(|&(first, count, data)| (first..first + count).map(move |page| (page, data)));
        runs.collect()
    }

    fn size(&self) -> u64 {
        let pages = self.pages().last_key_value().map_or(0, |(page, _)| page + 1) + self.hole;
        (pages * PAGE_SIZE).saturating_sub(self.cut)
    }

    fn page(&self, seed: usize, page: u64) -> Vec<u8> {
        bytes(seed + page as usize, (self.size() - page * PAGE_SIZE).min(PAGE_SIZE) as usize)
    }

    fn create(&self, seed: usize) -> Arc<File> {
        let file = file_in(MEMORY);
        file.set_len(self.size()).unwrap();
        for (page, data) in self.pages() {
            let mut contents = self.page(seed, page);
            if !data {
                contents.fill(0);
            }
            file.write_all_at(&contents, page * PAGE_SIZE).unwrap();
        }
        file
    }

    /// Looks at all pages with data, their neighbours and the written zeros.
    fn check(&self, seed: usize, file: &File) {
        assert_eq!(file.metadata().unwrap().len(), self.size());
        let pages = self.pages();
        let data = pages.values().filter(|data| **data).count() as u64;
        assert_eq!(file.metadata().unwrap().blocks() * 512, data * PAGE_SIZE, "zero pages take memory");
        for (&page, &data) in &pages {
            let mut expected = self.page(seed, page);
            if !data {
                expected.fill(0);
            }
            let mut found = vec![0xee; expected.len()];
            file.read_exact_at(&mut found, page * PAGE_SIZE).unwrap();
            assert!(found == expected, "page {page}");
        }
    }
}

fn model() -> impl Strategy<Value = Model> {
    // Short runs, and some that are long enough to be mapped; near the start, and anywhere in a huge sparse file.
    let first = prop_oneof![4 => 0u64..64, 1 => 0u64..4096, 1 => 0u64..1 << 40];
    let count = prop_oneof![4 => 1u64..20, 1 => 30u64..300, 1 => 1000u64..1100];
    let run = (first, count, prop::bool::weighted(0.75));
    (prop::collection::vec(run, 0..5), 0..PAGE_SIZE, prop_oneof![3 => Just(0u64), 1 => 0u64..1 << 20])
        .prop_map(|(runs, cut, hole)| Model { runs, cut, hole })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn files_come_back_as_they_were(models in prop::collection::vec(model(), 1..8), destination in 0..DESTINATIONS.len()) {
        let (directory, options) = DESTINATIONS[destination];
        let sources: Vec<_> = models.iter().enumerate().map(|(seed, model)| model.create(seed * 1000)).collect();
        let blocks = || sources.iter().map(|source| source.metadata().unwrap().blocks()).collect::<Vec<_>>();
        let before = blocks();
        let saved = save(&sources, directory, options);
        prop_assert_eq!(before, blocks(), "saving has made pages in holes");
        saved.check();
        for (seed, (model, file)) in models.iter().zip(saved.load()).enumerate() {
            model.check(seed * 1000, &file);
        }
    }
}

#[test]
fn the_last_page_of_the_largest_file() {
    let source = file_in(MEMORY);
    let size = i64::MAX as u64;
    if let Err(error) = source.set_len(size) {
        println!("SKIPPED: the_last_page_of_the_largest_file: no such file here: {error}");
        return;
    }
    for (data, pages) in [(3, 1), (3 + 4096, 2), (200 * 4096, 201)] {
        let contents = bytes(5, data);
        source.write_all_at(&contents, size - data as u64).unwrap();
        let saved = save(std::slice::from_ref(&source), MEMORY, SaveOptions::default());
        saved.check();
        assert_eq!(saved.summary.length, pages * PAGE_SIZE);
        let mut end = vec![0; data];
        saved.load()[0].read_exact_at(&mut end, size - data as u64).unwrap();
        assert!(end == contents);
    }
}

#[test]
fn what_a_mapping_put_behind_the_end_of_a_file_is_not_saved() {
    let source = file_in(MEMORY);
    let size = 200 * PAGE_SIZE + 10;
    source.write_all_at(&bytes(1, size as usize), 0).unwrap();
    sys::store(&source, 200 * PAGE_SIZE, 10, &[0xff; 100]);
    let saved = save(&[source], MEMORY, SaveOptions::default());
    let mut page = [0; PAGE_SIZE as usize];
    saved.pages.read_exact_at(&mut page, 200 * PAGE_SIZE).unwrap();
    assert!(page[10..].iter().all(|&byte| byte == 0), "bytes behind the end of the file were saved");
    assert_eq!(page[..10], bytes(1, size as usize)[200 * PAGE_SIZE as usize..]);
}

#[test]
fn zeros_are_found_and_holes_stay() {
    let source = file_in(MEMORY);
    source.write_all_at(&vec![0; 32 << 20], 0).unwrap();
    source.set_len(1 << 40).unwrap();
    let saved = save(&[source], MEMORY, SaveOptions::default());
    saved.check();
    assert_eq!((saved.summary.length, saved.summary.zero_bytes, saved.summary.data_bytes), (0, 32 << 20, 0));
    assert_eq!(saved.load()[0].metadata().unwrap().blocks(), 0);
}

#[test]
fn alternating_pages_more_than_fit_in_flight() {
    // 96 MiB of windows that each keep a page or two alive until written, with budgets of 64 MiB mapped.
    let source = file_in(MEMORY);
    source.write_all_at(&vec![0; 96 << 20], 0).unwrap();
    for index in 0..24 {
        // More than is copied, scattered.
        for page in 0..40 {
            let offset = index * (4 << 20) + page * 24 * PAGE_SIZE;
            source.write_all_at(&bytes(page as usize, 4096), offset).unwrap();
        }
    }
    for (directory, options) in [DESTINATIONS[1], DESTINATIONS[2]] {
        let saved = save(std::slice::from_ref(&source), directory, options);
        saved.check();
        assert_eq!(saved.summary.data_bytes, 24 * 40 * PAGE_SIZE);
        assert_same(&source, &saved.load()[0]);
    }
}

fn assert_same(one: &File, other: &File) {
    let size = one.metadata().unwrap().len();
    assert_eq!(size, other.metadata().unwrap().len());
    let (mut left, mut right) = (vec![0; 1 << 20], vec![1; 1 << 20]);
    for offset in (0..size).step_by(1 << 20) {
        let length = (size - offset).min(1 << 20) as usize;
        one.read_exact_at(&mut left[..length], offset).unwrap();
        other.read_exact_at(&mut right[..length], offset).unwrap();
        assert!(left[..length] == right[..length], "differs in the MiB at {offset:#x}");
    }
}

#[test]
fn two_producers_at_once() {
    for (directory, options) in DESTINATIONS {
        let sources: Vec<_> = (0..300usize)
            .map(|index| {
                let file = file_in(MEMORY);
                let length = if index % 50 == 7 { 3_000_000 + index } else { index * 37 };
                file.write_all_at(&bytes(index, length), 0).unwrap();
                file
            })
            .collect();
        let pages = tempfile::tempfile_in(directory).unwrap();
        let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), options).unwrap();
        let main = save.register_memory_file(&MemoryFile::main()).unwrap();
        let run = |parity: usize| {
            let files = sources.iter().enumerate().filter(|(index, _)| index % 2 == parity);
            files
                .map(|(index, source)| {
                    let range = whole(source);
                    let extents = match index % 3 {
                        0 => main.write_live_range(source, range),
                        _ => main.write_range(source, range),
                    };
                    (index, (range.end(), extents.unwrap()))
                })
                .collect::<Vec<_>>()
        };
        let mut files = thread::scope(|scope| {
            let other = scope.spawn(|| run(1));
            let mut files = run(0);
            files.extend(other.join().unwrap());
            files
        });
        files.sort_by_key(|(index, _)| *index);
        let summary = save.finish().unwrap();
        let saved = Saved { pages, summary, files: files.into_iter().map(|(_, file)| file).collect() };
        saved.check();
        for (source, loaded) in sources.iter().zip(saved.load()) {
            assert_same(source, &loaded);
        }
    }
}

#[test]
fn on_loaded_runs_once_after_the_last_byte_of_its_file() {
    let source = file_in(MEMORY);
    source.write_all_at(&bytes(1, 20 << 20), 0).unwrap();
    let saved = save(std::slice::from_ref(&source), MEMORY, SaveOptions::default());
    let load =
        AsyncPagesFileLoad::new(saved.pages.try_clone().unwrap(), saved.digests(), LoadOptions::default());
    let load = load.unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    for _ in 0..4 {
        let (source, count) = (source.clone(), count.clone());
        let on_loaded: OnLoaded = Box::new(move |file| {
            assert_same(&source, file);
            count.fetch_add(1, Ordering::SeqCst);
            Ok(())
        });
        let (file, extents) = (file_in(MEMORY), saved.files[0].1.clone());
        load.load_ranges_into(vec![LoadTarget {
            on_loaded: Some(on_loaded),
            ..LoadTarget::new(file, extents)
        }])
        .unwrap();
    }
    load.finish().unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 4);
}

#[test]
fn a_private_memory_file_is_saved_and_loaded_verbatim() {
    let host = tempfile::tempfile_in(DISK).unwrap();
    host.write_all_at(&bytes(3, 5_000_000), 1 << 30).unwrap();
    host.write_all_at(&bytes(4, 10), 0).unwrap();
    host.set_len((5 << 30) + 123).unwrap();
    let pages = tempfile::tempfile_in(DISK).unwrap();
    let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), SaveOptions::default()).unwrap();
    let meta = MemoryFile::private(host.try_clone().unwrap()).save_to(&save).unwrap();
    let summary = save.finish().unwrap();
    let meta = PagesMeta { pages_length: summary.length, digests: summary.digests, private: vec![meta] };
    let meta = PagesMeta::decode(&meta.encode()).unwrap();

    let target = tempfile::tempfile_in(DISK).unwrap();
    target.write_all_at(&bytes(9, 10_000), 777).unwrap();
    let load = AsyncPagesFileLoad::new(pages, meta.digests, LoadOptions::default()).unwrap();
    MemoryFile::private(target.try_clone().unwrap()).load_from(&load, &meta.private[0]).unwrap();
    load.finish().unwrap();
    assert_eq!(target.metadata().unwrap().len(), (5 << 30) + 123);
    for (offset, length) in [(0, 20_000), (1 << 30, 5_100_000), (5 << 30, 123)] {
        let (mut left, mut right) = (vec![0; length], vec![1; length]);
        host.read_exact_at(&mut left, offset).unwrap();
        target.read_exact_at(&mut right, offset).unwrap();
        assert!(left == right, "differs behind {offset:#x}");
    }
    assert!(target.metadata().unwrap().blocks() * 512 < 8 << 20, "holes were filled");
}

#[test]
fn after_a_drain_sources_may_change_and_more_is_saved() {
    for (directory, options) in DESTINATIONS {
        let pages = tempfile::tempfile_in(directory).unwrap();
        let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), options).unwrap();
        let main = save.register_memory_file(&MemoryFile::main()).unwrap();
        save.drain().unwrap();
        let mut files = Vec::new();
        // By reference, with some pages copied before and behind.
        for (seed, length) in [(1, 5000), (2, 30 << 20), (3, 5000), (4, 20 << 20)] {
            let source = file_in(MEMORY);
            source.write_all_at(&bytes(seed, length), 0).unwrap();
            files.push((length as u64, main.write_range(&source, whole(&source)).unwrap()));
            if length > 5000 {
                save.drain().unwrap();
                // Pages that something still refers to would be gone.
                source.set_len(0).unwrap();
            }
        }
        let summary = save.finish().unwrap();
        let saved = Saved { pages, summary, files };
        saved.check();
        for (seed, file) in (1..).zip(saved.load()) {
            let mut found = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == bytes(seed, found.len()), "file {seed} in {directory}");
        }
    }
}

#[test]
fn a_live_file_is_saved_with_what_was_read() {
    const SIZE: u64 = 8 << 20;
    let range = FileRange::new(0, SIZE).unwrap();
    let source = file_in(MEMORY);
    source.write_all_at(&bytes(0, SIZE as usize), 0).unwrap();
    let (stop, stopped) = mpsc::channel::<()>();
    let writer = thread::spawn({
        let source = source.clone();
        move || {
            let mut round = 0;
            while let Err(mpsc::TryRecvError::Empty) = stopped.try_recv() {
                round += 1;
                source.write_all_at(&bytes(round, 300_000), (round as u64 * 70_001) % SIZE).unwrap();
                source.set_len((round as u64 * 1_234_567) % SIZE).unwrap();
                source.set_len(SIZE).unwrap();
            }
        }
    });
    for (directory, options) in DESTINATIONS {
        let pages = tempfile::tempfile_in(directory).unwrap();
        let save = AsyncPagesFileSave::new(pages.try_clone().unwrap(), options).unwrap();
        let main = save.register_memory_file(&MemoryFile::main()).unwrap();
        let files = (0..20).map(|_| (SIZE, main.write_live_range(&source, range).unwrap())).collect();
        let summary = save.finish().unwrap();
        // Whatever it was, it is what the digests say.
        let saved = Saved { pages, summary, files };
        saved.check();
        saved.load();
    }
    drop(stop);
    writer.join().unwrap();
}
