//! Making the parts of an image durable, all at the same time: for a filesystem with a journal that is one transaction, and
//! one after the other they are three.

use std::thread::{self, Builder};

use stillframe_pgalloc::{PagesFileSummary, PagesMeta, PrivateMemoryFileMeta, SettledPagesFile};

use crate::checkpoint::error::CheckpointCause;
use crate::checkpoint::pages_failed;
use crate::image::{self, ImageWriter, PartWriter};
use crate::manifest::Part;

/// Writes `pages.meta`, with these private MemoryFiles, and makes it, the pages file and the trees' durable. Gives what was
/// saved to the pages file, and the parts of the trees and of `pages.meta`.
pub(crate) fn make_durable(
    pages: SettledPagesFile,
    (tree, tree_name): (PartWriter, &str),
    private: Vec<PrivateMemoryFileMeta>,
    image: &ImageWriter,
) -> Result<(PagesFileSummary, Part, Part), CheckpointCause> {
    let summary = pages.summary();
    let (pages_length, digests) = (summary.length, summary.digests.clone());
    let meta = PagesMeta { pages_length, digests, private }.encode();
    let part = Part::of(&meta);
    thread::scope(|scope| {
        let thread = |name: &str| Builder::new().name(name.to_owned());
        let tree = thread("sync-tree").spawn_scoped(scope, || tree.finish());
        let tree = tree.map_err(CheckpointCause::Thread)?;
        let meta = thread("sync-meta").spawn_scoped(scope, move || image.write(image::META, &meta));
        let meta = meta.map_err(CheckpointCause::Thread)?;
        let pages = pages.finish().map_err(|source| pages_failed(&image.pages_path(), source))?;
        let tree = tree.join().expect("writing a part doesn't panic");
        let tree = tree.map_err(|source| image.failed("write", tree_name, source))?;
        meta.join().expect("writing a file doesn't panic")?;
        Ok((pages, tree, part))
    })
}
