//! Files of many pieces are saved as page by page, whatever finds, reads and orders the pieces; and nothing is made of
//! their holes.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use stillframe_pgalloc::{
    AsyncMemoryFileSave, AsyncPagesFileLoad, AsyncPagesFileSave, Direct, FileRange, LoadOptions, LoadTarget,
    MemoryFile, PAGE_SIZE, PageExtent, PagesFileSummary, PagesOffset, SaveOptions, validate_extents,
};

#[path = "support/sys/page_out.rs"]
mod sys;

const MEMORY: &str = "/dev/shm";
const DISK: &str = env!("CARGO_TARGET_TMPDIR");

/// A tmpfs file by its pages that are there: whether each has data, else it is zero.
struct Pages {
    file: Arc<File>,
    size: u64,
    pages: BTreeMap<u64, bool>,
}

impl Pages {
    /// `cut` bytes are missing of the last page.
    fn new(pages: impl Iterator<Item = (u64, bool)>, cut: u64) -> Self {
        let pages: BTreeMap<u64, bool> = pages.collect();
        let file = Arc::new(tempfile::tempfile_in(MEMORY).unwrap());
        let size = (pages.last_key_value().unwrap().0 + 1) * PAGE_SIZE - cut;
        for (&page, &data) in &pages {
            let length = PAGE_SIZE.min(size - page * PAGE_SIZE) as usize;
            file.write_all_at(&contents(page, data)[..length], page * PAGE_SIZE).unwrap();
        }
        Self { file, size, pages }
    }

    fn range(&self) -> FileRange {
        FileRange::new(0, self.size).unwrap()
    }

    /// What one thread gets that looks at each page, saving to the pages file from `offset` on.
    fn extents(&self, mut offset: u64) -> Vec<PageExtent> {
        let mut extents: Vec<PageExtent> = Vec::new();
        for (&page, _) in self.pages.iter().filter(|(_, data)| **data) {
            let file_offset = page * PAGE_SIZE;
            let length = PAGE_SIZE.min(self.size - file_offset);
            match extents.last_mut() {
                Some(last) if last.file_offset + last.length == file_offset => last.length += length,
                _ => extents.push(PageExtent { file_offset, length, pages_offset: PagesOffset(offset) }),
            }
            offset += PAGE_SIZE;
        }
        extents
    }

    fn zeros(&self) -> u64 {
        let zeros = self.pages.iter().filter(|(_, data)| !**data);
        zeros.map(|(page, _)| PAGE_SIZE.min(self.size - page * PAGE_SIZE)).sum()
    }

    fn blocks(&self) -> u64 {
        self.file.metadata().unwrap().blocks()
    }

    /// Checks what the pages file has of it.
    fn check(&self, pages_file: &File, extents: &[PageExtent]) {
        let mut page = [0; PAGE_SIZE as usize];
        for extent in extents {
            for offset in (0..extent.length).step_by(PAGE_SIZE as usize) {
                pages_file.read_exact_at(&mut page, extent.pages_offset.0 + offset).unwrap();
                let mut expected = contents((extent.file_offset + offset) / PAGE_SIZE, true);
                expected[PAGE_SIZE.min(extent.length - offset) as usize..].fill(0);
                assert!(page == expected, "the page at {:#x}", extent.file_offset + offset);
            }
        }
    }
}

fn contents(page: u64, data: bool) -> [u8; PAGE_SIZE as usize] {
    let mut contents = [0; PAGE_SIZE as usize];
    if data {
        // Not at its start, so that all of a page must be looked at.
        let place = (page * 977 % (PAGE_SIZE - 8)) as usize;
        contents[place..place + 8].copy_from_slice(&(page + 1).to_le_bytes());
        contents[0] |= (page % 3) as u8;
    }
    contents
}

/// A new file opened twice: what is done to the second one with direct I/O doesn't make the first one direct.
fn pages_file(directory: impl AsRef<Path>) -> (File, File) {
    let written = tempfile::tempfile_in(directory).unwrap();
    (File::open(format!("/proc/self/fd/{}", written.as_raw_fd())).unwrap(), written)
}

fn save(
    directory: impl AsRef<Path>,
    options: SaveOptions,
    write: impl FnOnce(AsyncMemoryFileSave<'_>) -> Vec<PageExtent>,
) -> (File, PagesFileSummary, Vec<PageExtent>) {
    let (pages, written) = pages_file(directory);
    let save = AsyncPagesFileSave::new(written, options).unwrap();
    let extents = write(save.register_memory_file(&MemoryFile::main()).unwrap());
    (pages, save.finish().unwrap(), extents)
}

fn check_save(source: &Pages) {
    check_save_after(source, || {});
}

fn check_save_after(source: &Pages, before: impl Fn()) {
    let blocks = source.blocks();
    let expected = source.extents(0);
    for (directory, direct) in [(MEMORY, Direct::Auto), (DISK, Direct::Auto), (DISK, Direct::Never)] {
        for live in [false, true] {
            before();
            let options = SaveOptions { direct, ..Default::default() };
            let (pages, summary, extents) = save(directory, options, |main| {
                let write = if live {
                    main.write_live_range(&source.file, source.range())
                } else {
                    main.write_range(&source.file, source.range())
                };
                write.unwrap()
            });
            assert_eq!(source.blocks(), blocks, "saving has made pages in holes");
            assert!(extents == expected, "{live}: {} extents, expected {}", extents.len(), expected.len());
            validate_extents(&extents, source.size, summary.length).unwrap();
            source.check(&pages, &extents);
            assert_eq!(summary.zero_bytes, source.zeros(), "{live}");
            assert_eq!(summary.data_bytes, expected.iter().map(|extent| extent.length).sum::<u64>());
        }
    }
}

/// A number that looks random but is the same every time.
fn scramble(index: u64) -> u64 {
    index.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40
}

#[test]
fn scattered_pages() {
    for cut in [0, 100] {
        let pages = (0..3000).map(|index| (index * 10 + scramble(index) % 10, true));
        check_save(&Pages::new(pages, cut));
    }
}

#[test]
fn short_and_long_runs_far_apart_with_zeros_among_them() {
    for cut in [0, 1, PAGE_SIZE - 1] {
        let mut pages = Vec::new();
        let mut page = 5;
        for index in 0..700 {
            // Single pages for the most part, then some of a few, then some that are mapped or more than a buffer.
            let length = match scramble(index) % 40 {
                0 => 33 + scramble(index + 1) % 600,
                1..8 => 1 + scramble(index + 1) % 40,
                _ => 1,
            };
            for _ in 0..length {
                pages.push((page, scramble(page) % 7 > 1));
                page += 1;
            }
            page += 1 + scramble(index) % 4;
            if index % 100 == 99 {
                // Beyond 4 GiB, and then beyond 8.
                page += (2 << 30) / PAGE_SIZE;
            }
        }
        pages.push((page, true));
        check_save(&Pages::new(pages.into_iter(), cut));
    }
}

#[test]
fn long_stretches_of_zeros() {
    // 64 MiB without a hole, that begin a part with zeros, end it with zeros, or are zeros but for a page.
    let data = |page: u64| match page / 1024 {
        0..4 => false,
        4 => page % 1024 >= 70,
        5 => page % 1024 < 70,
        6 => page % 1024 == 1,
        7 => page % 1024 == 1023,
        8 => page.is_multiple_of(2),
        9..12 => !page.is_multiple_of(1024),
        _ => page == 16 * 1024 - 1,
    };
    for cut in [0, 9] {
        check_save(&Pages::new((0..16 * 1024).map(|page| (page, data(page))), cut));
    }
}

#[test]
fn pages_that_are_allocated_but_not_written_stay_so() {
    let source = Pages::new((0..3000).map(|index| (index * 7, true)), 0);
    nix::fcntl::fallocate(&source.file, nix::fcntl::FallocateFlags::empty(), 0, 1000 * PAGE_SIZE as i64)
        .unwrap();
    check_save(&source);
}

#[test]
fn many_callers_do_not_wait_for_each_other() {
    // Each call has a second thread, and each thread wants one of 16 buffers or 4 of 40 MiB.
    const CALLERS: u64 = 24;
    let sources: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let scattered = (0..2000).map(|index| (index * 3 + caller % 2, true));
            let long = (8000..8000 + 4 * 1024).map(|page| (page, page % 2 == caller % 2));
            Pages::new(scattered.chain(long), 0)
        })
        .collect();
    for directory in [MEMORY, DISK] {
        let (pages, written) = pages_file(directory);
        let save = AsyncPagesFileSave::new(written, SaveOptions::default()).unwrap();
        let main = save.register_memory_file(&MemoryFile::main()).unwrap();
        let start = Barrier::new(CALLERS as usize);
        let extents: Vec<_> = thread::scope(|scope| {
            let callers: Vec<_> = sources
                .iter()
                .map(|source| {
                    scope.spawn(|| {
                        start.wait();
                        main.write_range(&source.file, source.range()).unwrap()
                    })
                })
                .collect();
            callers.into_iter().map(|caller| caller.join().unwrap()).collect()
        });
        let summary = save.finish().unwrap();
        for (source, extents) in sources.iter().zip(&extents) {
            validate_extents(extents, source.size, summary.length).unwrap();
            source.check(&pages, extents);
            // As alone, but for where they are.
            let places = |extents: &[PageExtent]| -> Vec<u64> {
                let pages =
                    |extent: &PageExtent| (extent.file_offset..extent.file_end().unwrap()).step_by(4096);
                extents.iter().flat_map(pages).collect()
            };
            assert!(places(extents) == places(&source.extents(0)));
        }
    }
}

#[test]
fn a_page_behind_one_that_comes_and_goes_is_found() {
    const LAST: u64 = 100;
    let source = Pages::new([(0, true), (LAST, true)].into_iter(), 0);
    let (stop, mut missed) = (AtomicBool::new(false), 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
                | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
            while !stop.load(Ordering::Relaxed) {
                nix::fcntl::fallocate(&source.file, punch, 0, PAGE_SIZE as i64).unwrap();
                source.file.write_all_at(&contents(0, true), 0).unwrap();
            }
        });
        save(MEMORY, SaveOptions::default(), |main| {
            let saved = || main.write_live_range(&source.file, source.range()).unwrap();
            let has_last = |extents: &Vec<PageExtent>| {
                extents.last().is_some_and(|last| last.file_offset == LAST * PAGE_SIZE)
            };
            missed = (0..20_000).filter(|_| !has_last(&saved())).count();
            stop.store(true, Ordering::Relaxed);
            Vec::new()
        });
    });
    assert_eq!(missed, 0, "saves without the last page");
}

/// Swap space in a file of its own, gone when dropped.
struct Swap(tempfile::NamedTempFile);

impl Swap {
    fn new(test: &str) -> Option<Self> {
        let file = tempfile::NamedTempFile::new_in(DISK).unwrap();
        file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        file.as_file().write_all_at(&vec![0; 32 << 20], 0).unwrap();
        file.as_file().sync_all().unwrap();
        for program in ["mkswap", "swapon"] {
            match Command::new(program).arg(file.path()).output() {
                Ok(output) if output.status.success() => {}
                other => {
                    println!("SKIPPED: {test}: no swap space: {program}: {other:?}");
                    return None;
                }
            }
        }
        Some(Self(file))
    }

    /// Bytes in it, from /proc/swaps.
    fn used(&self) -> u64 {
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap();
        let path = self.0.path().to_str().unwrap();
        let line = swaps.lines().find(|line| line.starts_with(path)).expect("it is in use");
        line.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let done = Command::new("swapoff").arg(self.0.path()).status().unwrap();
        assert!(done.success() || thread::panicking());
    }
}

#[test]
fn swapped_pages_are_data() {
    let test = "swapped_pages_are_data";
    for (apart, name) in [(10, "scattered"), (1, "in one run")] {
        let Some(swap) = Swap::new(test) else { return };
        let source = Pages::new((0..2000).map(|index| (index * apart, index % 50 > 0)), 0);
        let page_out = || sys::page_out(&source.file, source.pages.keys().copied());
        page_out();
        println!("{name}: {} of {} bytes are swapped out", swap.used(), 2000 * PAGE_SIZE);
        if swap.used() < 1000 * PAGE_SIZE {
            println!("SKIPPED: {test}: the kernel doesn't swap out enough");
            return;
        }
        check_save_after(&source, page_out);
    }
}

#[test]
fn what_is_scattered_is_loaded() {
    let source = Pages::new((0..3000).map(|index| (index * 10 + scramble(index) % 10, index % 5 > 0)), 100);
    let (pages, summary, extents) =
        save(DISK, SaveOptions::default(), |main| main.write_range(&source.file, source.range()).unwrap());
    let load = AsyncPagesFileLoad::new(pages, summary.digests, LoadOptions::default()).unwrap();
    let file = Arc::new(tempfile::tempfile_in(MEMORY).unwrap());
    load.load_ranges_into(vec![LoadTarget::new(file.clone(), extents)]).unwrap();
    load.finish().unwrap();
    file.set_len(source.size).unwrap();
    for &page in source.pages.keys() {
        let (mut left, mut right) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
        let length = PAGE_SIZE.min(source.size - page * PAGE_SIZE) as usize;
        source.file.read_exact_at(&mut left[..length], page * PAGE_SIZE).unwrap();
        file.read_exact_at(&mut right[..length], page * PAGE_SIZE).unwrap();
        assert!(left == right, "page {page}");
    }
}
