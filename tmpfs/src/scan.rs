//! Reading a filesystem's objects, but for the contents of files, on a thread of its own, ahead of whoever takes them.
//!
//! Of a small file, opening and asking takes as long as reading and writing: on two processors both are done at the
//! same time. Objects come in batches, in the order of the walk; at most [`QUEUE`] batches wait, so at most
//! `(QUEUE + 2) * BATCH` files are open and so many attributes in memory. The thread ends when the walk does, when
//! something fails, which is the last thing that comes, or when nobody takes any more.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, Scope};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use stillframe_pgalloc::PageExtent;

use crate::entry::{PathName, Xattr};
use crate::lazy::unloaded::{Unloaded, UnloadedError, UnloadedFile};
use crate::save::SaveTreeError;
use crate::stat::Stat;
use crate::walk::{Listed, Met, Walk};
use crate::xattr::{self, Inode};

/// Most objects in a batch, and most bytes of names and xattrs before it is handed over.
const BATCH: usize = 32;
const BATCH_BYTES: usize = 256 << 10;
/// Most batches that wait.
const QUEUE: usize = 2;

/// Objects that follow each other on the walk.
#[derive(Default)]
pub(crate) struct Batch<'a> {
    names: Vec<u8>,
    objects: Vec<Object<'a>>,
    bytes: usize,
}

/// One object.
pub(crate) struct Object<'a> {
    name: Range<usize>,
    /// Number of directories that it is in: 0 for the root.
    pub(crate) depth: usize,
    pub(crate) stat: Stat,
    pub(crate) content: Content<'a>,
    pub(crate) xattrs: Vec<Xattr>,
}

/// What is in an object.
pub(crate) enum Content<'a> {
    Directory,
    /// The file, open for reading.
    File(Arc<File>),
    /// A file that isn't loaded.
    Unloaded(UnloadedFile<'a>),
    /// A file whose contents are saved already.
    Saved(Vec<PageExtent>),
    /// The target.
    Symlink(Vec<u8>),
    /// A fifo, socket or device, as its mode says.
    Node,
}

impl<'a> Batch<'a> {
    /// The objects with their names.
    pub(crate) fn objects(&mut self) -> impl Iterator<Item = (&[u8], Object<'a>)> {
        let Self { names, objects, .. } = self;
        objects.drain(..).map(|object| (&names[object.name.clone()], object))
    }
}

/// What a scan gives: batches, and at the end, if it failed, why.
pub(crate) type Scanned<'a> = Receiver<Result<Batch<'a>, SaveTreeError>>;

/// Begins to scan the filesystem whose root is `root`, open for reading; `unloaded` has files that may not be loaded yet.
pub(crate) fn scan<'scope>(
    scope: &'scope Scope<'scope, '_>,
    root: &'scope File,
    unloaded: Option<&'scope Unloaded>,
) -> Result<Scanned<'scope>, SaveTreeError> {
    let (sender, receiver) = sync_channel(QUEUE);
    let run = move || {
        let mut batch = Batch::default();
        let failed = scan_all(root, unloaded, &mut batch, &sender).err();
        // Whoever dropped the receiver wants no more.
        let _ = sender.send(Ok(batch));
        if let Some(error) = failed {
            let _ = sender.send(Err(error));
        }
    };
    let thread = Builder::new().name("tree-scan".into()).spawn_scoped(scope, run);
    thread.map_err(SaveTreeError::Thread)?;
    Ok(receiver)
}

fn scan_all<'a>(
    root: &File,
    unloaded: Option<&'a Unloaded>,
    batch: &mut Batch<'a>,
    sender: &SyncSender<Result<Batch<'a>, SaveTreeError>>,
) -> Result<(), SaveTreeError> {
    let mut walk = Walk::new(root);
    loop {
        let met = match walk.next() {
            None => return Ok(()),
            Some(Ok(met)) => met,
            Some(Err(source)) => return Err(failed("walk to", walk.path())(source)),
        };
        let (stat, content, xattrs) = read(&met, unloaded)?;
        let start = batch.names.len();
        batch.names.extend_from_slice(met.name);
        batch.bytes += met.name.len() + xattrs.iter().map(|xattr| xattr.value.len()).sum::<usize>();
        let name = start..batch.names.len();
        batch.objects.push(Object { name, depth: met.depth, stat, content, xattrs });
        let full = batch.objects.len() >= BATCH || batch.bytes >= BATCH_BYTES;
        if full && sender.send(Ok(std::mem::take(batch))).is_err() {
            return Ok(());
        }
    }
}

/// The error of a call on the object at `path`. A name or an inode that was there and is gone means that somebody
/// changes the filesystem.
pub(crate) fn failed(operation: &'static str, path: &[u8]) -> impl FnOnce(io::Error) -> SaveTreeError {
    move |source| {
        let path = PathName(path.to_vec());
        match source.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOENT | Errno::STALE | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => {
                SaveTreeError::Changed { path }
            }
            _ => SaveTreeError::Object { operation, path, source },
        }
    }
}

fn read<'a>(
    met: &Met<'_>,
    unloaded: Option<&'a Unloaded>,
) -> Result<(Stat, Content<'a>, Vec<Xattr>), SaveTreeError> {
    let fail = |operation| failed(operation, met.path);
    if let Some(dir) = met.dir {
        let stat = Stat::of(dir).map_err(fail("stat"))?;
        let xattrs = xattr::read(&Inode::Open(dir)).map_err(fail("read the xattrs of"))?;
        return Ok((stat, Content::Directory, xattrs));
    }
    // Opening before asking, so that what is told is told of what is read, and with one name looked up.
    if met.listed == Listed::Regular {
        // Opening one would be to wait for it.
        if let Some(unloaded) = unloaded {
            let path = xattr::open_path(met.parent, met.name).map_err(fail("open"))?;
            let mut stat = Stat::of(&path).map_err(fail("stat"))?;
            let mut xattrs = xattr::read(&Inode::PathOnly(&path)).map_err(fail("read the xattrs of"))?;
            let found =
                unloaded.find(&path, &mut stat, &mut xattrs).map_err(|source| SaveTreeError::Unloaded {
                    path: PathName(met.path.to_vec()),
                    source: Box::new(UnloadedError::Ask(source)),
                })?;
            if let Some(file) = found {
                return Ok((stat, Content::Unloaded(file), xattrs));
            }
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(met.parent, met.name, flags, Mode::empty());
        let file = File::from(opened.map_err(|errno| fail("open")(errno.into()))?);
        let stat = Stat::of(&file).map_err(fail("stat"))?;
        if stat.format() != libc::S_IFREG {
            return Err(SaveTreeError::Changed { path: PathName(met.path.to_vec()) });
        }
        let xattrs = xattr::read(&Inode::Open(&file)).map_err(fail("read the xattrs of"))?;
        return Ok((stat, Content::File(Arc::new(file)), xattrs));
    }
    let file = xattr::open_path(met.parent, met.name).map_err(fail("open"))?;
    let stat = Stat::of(&file).map_err(fail("stat"))?;
    let content = match stat.format() {
        libc::S_IFLNK => {
            let target = rustix::fs::readlinkat(&file, "", Vec::new());
            let target = target.map_err(|errno| fail("read the target of")(errno.into()))?;
            Content::Symlink(target.into_bytes())
        }
        libc::S_IFREG | libc::S_IFDIR => {
            return Err(SaveTreeError::Changed { path: PathName(met.path.to_vec()) });
        }
        _ => Content::Node,
    };
    let xattrs = xattr::read(&Inode::PathOnly(&file)).map_err(fail("read the xattrs of"))?;
    Ok((stat, content, xattrs))
}
