//! Saves any mounted tmpfs into an image directory's tree and pages, with the library alone.
//!
//! `save_tmpfs MOUNTPOINT DIRECTORY`. Nobody may write to the filesystem meanwhile. What a checkpoint of a
//! container adds to this is freezing it, and the manifest (`stillframe_runtime::image`).

use std::error::Error;
use std::fs::File;
use std::path::Path;

use stillframe_pgalloc::{AsyncPagesFileSave, MemoryFile, PagesMeta, SaveOptions};
use stillframe_tmpfs::Ids;
use stillframe_tmpfs::mount::open_view;
use stillframe_tmpfs::save::save_tree;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(mountpoint), Some(directory)) = (arguments.next(), arguments.next()) else {
        return Err("usage: save_tmpfs MOUNTPOINT DIRECTORY".into());
    };
    let (mountpoint, directory) = (Path::new(&mountpoint), Path::new(&directory));

    let pages_file =
        File::options().read(true).write(true).create_new(true).open(directory.join("pages.img"))?;
    let pages = AsyncPagesFileSave::new(pages_file, SaveOptions::default())?;
    let memory_file = MemoryFile::main();
    let memory = pages.register_memory_file(&memory_file)?;

    let view = open_view(mountpoint)?;
    let tree = File::create_new(directory.join("tree.tar"))?;
    let (tree, saved) = save_tree(&view, &Ids::default(), &memory, tree)?;
    tree.sync_all()?;

    let pages = pages.finish()?;
    let meta = PagesMeta { pages_length: pages.length, digests: pages.digests, private: Vec::new() };
    std::fs::write(directory.join("pages.meta"), meta.encode())?;
    println!("{} files, {} bytes of data in {} bytes of pages", saved.files, saved.data_bytes, pages.length);
    Ok(())
}
