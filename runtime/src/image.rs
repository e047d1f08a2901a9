//! The image directory: four flat files, written in an order that makes a crash harmless.
//!
//! Writing: the directory is made if it is missing and must be empty; `tree.tar`, `pages.img` and
//! `pages.meta` are written and fsynced; then `manifest.json` is written under another name, fsynced,
//! renamed, and the directory fsynced. Until that rename the directory is no image; a writer that is
//! dropped before removes what it made.
//!
//! Reading: an image is untrusted. The manifest and `pages.meta` are read and verified before anything is
//! returned; a tree is verified as it is decoded, chunk by chunk, and the pages as they are loaded. Errors name the file and the
//! offset.

mod error;
mod part;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use stillframe_pgalloc::{CHUNK_SIZE, PagesMeta, PrivateMemoryFileMeta, digest_chunks};
use stillframe_tmpfs::decode::{ReadTreeError, read_tree};
use stillframe_tmpfs::entry::Tree;

pub use crate::image::error::ImageError;
use crate::manifest::{Digest, Manifest, Offsets, Part, SavedFilesystem};
use crate::processes;
use part::{Decompressed, Stream, Verified};

/// Names of the four files.
pub const MANIFEST: &str = "manifest.json";
/// The trees.
pub const TREE: &str = "tree.tar";
/// The trees, compressed.
pub const TREE_ZSTD: &str = "tree.tar.zst";
/// Digests of the pages file, and metadata of private MemoryFiles.
pub const META: &str = "pages.meta";
/// The pages.
pub const PAGES: &str = "pages.img";
/// The manifest's name before it is committed.
const MANIFEST_NEW: &str = "manifest.json.new";
/// Largest manifest that is read: 256 MiB, some hundred thousand filesystems or a tree.tar of 800 GiB.
const MANIFEST_MAX: u64 = 256 << 20;

pub(crate) fn at<'a>(operation: &'static str, path: &'a Path) -> impl Fn(io::Error) -> ImageError + 'a {
    move |source| ImageError::File { operation, path: path.to_owned(), source }
}

/// Makes a pages file in a directory of its own, which goes when its path is dropped.
pub fn pages_apart(directory: &Path) -> Result<(File, TempPath), ImageError> {
    let directory = std::path::absolute(directory).map_err(at("find", directory))?;
    fs::create_dir_all(&directory).map_err(at("make the directory for pages", &directory))?;
    let made = tempfile::Builder::new().prefix("pages-").suffix(".img").tempfile_in(&directory);
    Ok(made.map_err(at("make a pages file in", &directory))?.into_parts())
}

/// An image that is being written.
#[derive(Debug)]
pub struct ImageWriter {
    path: PathBuf,
    /// The outermost directory that was made for it; everything from there on is ours.
    made: Option<PathBuf>,
    /// The pages file, where it is kept apart; removed when this is dropped before it is committed.
    apart: Option<TempPath>,
    committed: bool,
}

impl ImageWriter {
    /// Prepares `path`: makes it with its parents if it is missing; else it must be empty but for files of these names, which
    /// stay whatever happens.
    pub fn create(path: &Path, beside: &[String]) -> Result<Self, ImageError> {
        let path = std::path::absolute(path).map_err(at("find", path))?;
        let made = path.ancestors().take_while(|dir| !dir.exists()).last().map(Path::to_owned);
        if made.is_none() {
            for found in fs::read_dir(&path).map_err(at("list the image directory", &path))? {
                let found = found.map_err(at("list the image directory", &path))?.file_name();
                if !beside.iter().any(|name| found == name.as_str()) {
                    return Err(ImageError::NotEmpty { path, found: found.to_string_lossy().into_owned() });
                }
            }
        }
        // From here on, dropping it removes what was made.
        let writer = Self { path, made, apart: None, committed: false };
        fs::create_dir_all(&writer.path).map_err(at("make the image directory", &writer.path))?;
        Ok(writer)
    }

    /// Makes the pages file: one of the image's, or, where a directory is given, one of its own in there,
    /// which the manifest has to name.
    pub fn pages_file(&mut self, apart: Option<&Path>) -> Result<File, ImageError> {
        let Some(directory) = apart else { return self.file(PAGES) };
        let (file, path) = pages_apart(directory)?;
        self.apart = Some(path);
        Ok(file)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes a pages file that [`pages_apart`] has made for the image's.
    pub fn adopt_pages(&mut self, path: TempPath) {
        self.apart = Some(path);
    }

    /// Where the pages file is.
    pub fn pages_path(&self) -> PathBuf {
        self.apart.as_deref().map_or_else(|| self.path.join(PAGES), Path::to_owned)
    }

    /// Where the pages file is, if it is kept apart.
    pub fn pages_apart(&self) -> Option<PathBuf> {
        self.apart.as_deref().map(Path::to_owned)
    }

    /// Makes one of the files.
    pub fn file(&self, name: &str) -> Result<File, ImageError> {
        let path = self.path.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).open(&path).map_err(at("make", &path))
    }

    /// Makes one of the files with these contents, durable when this returns.
    pub fn write(&self, name: &str, contents: &[u8]) -> Result<(), ImageError> {
        let path = self.path.join(name);
        let mut file = self.file(name)?;
        file.write_all(contents).map_err(at("write", &path))?;
        file.sync_all().map_err(at("sync", &path))
    }

    /// The error of writing one of the files.
    pub fn failed(&self, operation: &'static str, name: &str, source: io::Error) -> ImageError {
        ImageError::File { operation, path: self.path.join(name), source }
    }

    /// Makes it an image. All other files must be durable.
    pub fn commit(mut self, manifest: &Manifest) -> Result<(), ImageError> {
        if let Some(directory) = self.apart.as_deref().and_then(Path::parent) {
            File::open(directory).and_then(|dir| dir.sync_all()).map_err(at("sync", directory))?;
        }
        self.write(MANIFEST_NEW, &manifest.encode())?;
        let path = self.path.join(MANIFEST);
        fs::rename(self.path.join(MANIFEST_NEW), &path).map_err(at("commit", &path))?;
        self.committed = true;
        if let Some(apart) = self.apart.take() {
            let path = apart.to_path_buf();
            apart.keep().map_err(|error| at("keep", &path)(error.error))?;
        }
        let outermost = self.made.as_deref().unwrap_or(&self.path);
        for dir in self.path.ancestors() {
            File::open(dir).and_then(|dir| dir.sync_all()).map_err(at("sync", dir))?;
            if outermost.parent().is_none_or(|parent| parent == dir) {
                break;
            }
        }
        Ok(())
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        for name in [MANIFEST_NEW, TREE, TREE_ZSTD, META, PAGES] {
            let _ = fs::remove_file(self.path.join(name));
        }
        if let Some(made) = &self.made {
            for dir in self.path.ancestors().take_while(|dir| dir.starts_with(made)) {
                let _ = fs::remove_dir(dir);
            }
        }
    }
}

/// Writes a part and digests it on the way. Buffers one chunk.
#[derive(Debug)]
pub struct PartWriter {
    file: File,
    chunk: Vec<u8>,
    length: u64,
    digests: Vec<Digest>,
}

impl PartWriter {
    /// Writes to the empty `file`.
    pub fn new(file: File) -> Self {
        Self { file, chunk: Vec::with_capacity(CHUNK_SIZE as usize), length: 0, digests: Vec::new() }
    }

    /// Bytes written so far.
    pub fn position(&self) -> u64 {
        self.length
    }

    fn write_chunk(&mut self) -> io::Result<()> {
        self.digests.extend(digest_chunks(&self.chunk, CHUNK_SIZE as usize).into_iter().map(Digest));
        self.file.write_all(&self.chunk)?;
        self.chunk.clear();
        Ok(())
    }

    /// Makes the file durable and describes it.
    pub fn finish(mut self) -> io::Result<Part> {
        self.write_chunk()?;
        self.file.sync_all()?;
        Ok(Part { length: self.length, chunk_size: CHUNK_SIZE, digests: self.digests })
    }
}

impl Write for PartWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.chunk.len() == CHUNK_SIZE as usize {
            self.write_chunk()?;
        }
        let taken = bytes.len().min(CHUNK_SIZE as usize - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        self.length += taken as u64;
        Ok(taken)
    }

    /// Does nothing: only whole chunks are written, and the rest by [`PartWriter::finish`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An image whose manifest and page metadata are read and verified.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    /// The manifest.
    pub manifest: Manifest,
    /// The page metadata.
    pub meta: PagesMeta,
    /// The pages file, of the right length.
    pub pages: File,
    pages_path: PathBuf,
    /// The file of the trees, of the right length.
    trees: File,
}

impl Image {
    /// Opens the image in the directory `path`.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        fs::read_dir(path).map_err(at("open the image directory", path))?;
        let manifest = match open_part(&path.join(MANIFEST)) {
            Err(ImageError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::NoManifest(path.to_owned()));
            }
            other => other?,
        };
        let mut text = Vec::new();
        manifest.take(MANIFEST_MAX).read_to_end(&mut text).map_err(at("read", &path.join(MANIFEST)))?;
        let manifest = Manifest::decode(&text)
            .map_err(|source| ImageError::Manifest { path: path.to_owned(), source })?;
        let meta = part::read(&path.join(META), &manifest.meta)?;
        let meta =
            PagesMeta::decode(&meta).map_err(|source| ImageError::Meta { path: path.join(META), source })?;
        for filesystem in &manifest.filesystems {
            let Offsets::PrivateFile { index, .. } = filesystem.offsets else { continue };
            if meta.private.iter().all(|private| private.index != index) {
                let id = filesystem.resource_id.clone();
                return Err(ImageError::NoPrivateFile { path: path.join(META), id, index });
            }
        }
        let pages_path = manifest.pages_path.clone().unwrap_or_else(|| path.join(PAGES));
        if meta.pages_length != manifest.pages_length {
            let (expected, found) = (manifest.pages_length, meta.pages_length);
            return Err(ImageError::Length { path: pages_path, expected, found });
        }
        let pages = open_sized(&pages_path, manifest.pages_length)?;
        let trees = open_sized(&path.join(tree_name(&manifest)), manifest.tree.length)?;
        processes::verify(path, &manifest.processes)?;
        let mut image = Self { path: path.to_owned(), manifest, meta, pages, pages_path, trees };
        // Nobody has carried it along with the rest: whether it is still the one is found out before it is used.
        if image.manifest.pages_path.is_some() {
            image.verify_pages()?;
        }
        Ok(image)
    }

    /// The pages file's path.
    pub fn pages_path(&self) -> &Path {
        &self.pages_path
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the whole pages file and compares its digests; restoring does this by itself.
    pub fn verify_pages(&mut self) -> Result<(), ImageError> {
        let path = self.pages_path.clone();
        let mut chunk = Vec::new();
        let mut start = 0;
        self.pages.rewind().map_err(at("read", &path))?;
        while start < self.manifest.pages_length {
            chunk.clear();
            (&mut self.pages).take(CHUNK_SIZE).read_to_end(&mut chunk).map_err(at("read", &path))?;
            let end = (start + CHUNK_SIZE).min(self.manifest.pages_length);
            if self.meta.digests.verify(start, &chunk).is_err() {
                return Err(ImageError::Damaged { path, start, end });
            }
            start = end;
        }
        Ok(())
    }

    /// The private MemoryFile of filesystem number `index` of the manifest, if it is in one.
    pub fn private_file(&self, index: usize) -> Option<&PrivateMemoryFileMeta> {
        match self.manifest.filesystems[index].offsets {
            Offsets::PagesFile => None,
            Offsets::PrivateFile { index, .. } => {
                self.meta.private.iter().find(|private| private.index == index)
            }
        }
    }

    /// The tree of filesystem number `index` of the manifest; its extents are offsets in its private
    /// MemoryFile where it has one, else in the pages file.
    pub fn decode_tree(&self, index: usize) -> Result<Tree, ImageError> {
        let pages = self.private_file(index).map_or(self.manifest.pages_length, |private| private.size);
        let SavedFilesystem { resource_id: id, tree_start, tree_end, tree_length, .. } =
            &self.manifest.filesystems[index];
        let path = self.path.join(tree_name(&self.manifest));
        let (start, end) = (*tree_start, *tree_end);
        let stored =
            Verified { file: &self.trees, path: &path, part: &self.manifest.tree, range: start..end };
        let failed = |error| match error {
            ReadTreeError::Tree(source) => {
                ImageError::Tree { path: self.path.clone(), id: id.clone(), source: Box::new(source) }
            }
            ReadTreeError::Read(source) => source
                .downcast()
                .unwrap_or_else(|source| ImageError::Compressed { path: path.clone(), start, end, source }),
        };
        let Some(expected) = *tree_length else {
            return read_tree(stored, end - start, pages).map_err(failed);
        };
        let decoder = zstd::Decoder::with_buffer(Stream::new(stored));
        let decoder = decoder.map_err(|error| failed(error.into()))?;
        // One byte more would be one too many.
        let mut archive = decoder.take(expected + 1);
        let tree = read_tree(Decompressed(&mut archive), expected, pages);
        if !matches!(tree, Err(ReadTreeError::Read(_))) {
            io::copy(&mut archive, &mut io::sink()).map_err(|error| failed(error.into()))?;
            if archive.limit() != 1 {
                return Err(ImageError::TreeLength { path, id: id.clone(), expected });
            }
        }
        tree.map_err(failed)
    }
}

fn tree_name(manifest: &Manifest) -> &'static str {
    if manifest.has_compressed_trees() { TREE_ZSTD } else { TREE }
}

/// Opens a file of an image: neither follows a link nor waits for a fifo's writer.
pub(crate) fn open_part(path: &Path) -> Result<File, ImageError> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = match opened {
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return Err(ImageError::NotAFile(path.to_owned()));
        }
        other => other.map_err(at("open", path))?,
    };
    if !file.metadata().map_err(at("stat", path))?.is_file() {
        return Err(ImageError::NotAFile(path.to_owned()));
    }
    Ok(file)
}

pub(crate) fn open_sized(path: &Path, expected: u64) -> Result<File, ImageError> {
    let file = open_part(path)?;
    let found = file.metadata().map_err(at("stat", path))?.len();
    if found != expected {
        return Err(ImageError::Length { path: path.to_owned(), expected, found });
    }
    Ok(file)
}
