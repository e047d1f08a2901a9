//! Making the names of a tree, on two threads.
//!
//! ```text
//! ready: directories that exist -> a thread makes all that is in one, in its order -> the directories in it are ready
//!                                  (a hard link to what isn't made yet: the rest waits for that)
//! ```
//!
//! All names of a directory are made by one thread at a time in the order of the tree, so that the kernel lists them as it did
//! in the saved filesystem. A link's target comes before it in the tree, so of what isn't made yet the first never
//! waits: the threads can't wait for each other for ever.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use super::worker::Worker;
use super::{BuildError, BuildOptions, Contents};
use crate::entry::{Kind, Tree};
use crate::lazy::PendingFile;
use crate::small::SmallFile;
use crate::sys::handle::FileHandle;

/// Trees with fewer entries are made by one thread.
const ALONE: usize = 1_000;

/// What was made.
#[derive(Default)]
pub(super) struct Made {
    /// Directories, and what else gets inode flags at the end, ascending.
    pub(super) handles: Vec<(usize, FileHandle)>,
    /// Files whose contents come later, in the order of the tree.
    pub(super) pending: Vec<(usize, PendingFile)>,
    /// Small ones, by directory.
    pub(super) small: Vec<(FileHandle, Vec<SmallFile>)>,
}

/// Makes all names of `tree`.
pub(super) fn make(
    root: &File,
    tree: &Tree,
    options: &BuildOptions,
    contents: Contents<'_>,
) -> Result<Made, BuildError> {
    let names = Names::new(root, tree, options, contents).map_err(failed(tree, "open", 0))?;
    let threads = if tree.entries.len() < ALONE { 1 } else { 2 };
    thread::scope(|scope| {
        for _ in 0..threads {
            let run = || names.run();
            let thread = thread::Builder::new().name("tree-names".into()).spawn_scoped(scope, run);
            if let Err(source) = thread {
                names.fail(failed(tree, "start a thread that makes", 0)(source));
            }
        }
    });
    names.finish()
}

pub(super) fn failed<'a>(
    tree: &'a Tree,
    operation: &'static str,
    index: usize,
) -> impl Fn(io::Error) -> BuildError + 'a {
    move |source| BuildError::Object { operation, path: tree.path(index), source }
}

/// A directory whose names are to be made.
pub(super) struct Task {
    /// Which of the directories.
    pub(super) number: usize,
    /// How many of its names are made.
    pub(super) done: usize,
    /// Whether what is made in it gets nothing from it but its place; `None` until that is asked.
    pub(super) plain: Option<bool>,
    /// The entry that has to be made before.
    pub(super) waits_for: Option<usize>,
}

pub(super) struct Names<'a> {
    pub(super) root: &'a File,
    pub(super) tree: &'a Tree,
    pub(super) options: &'a BuildOptions,
    pub(super) contents: Contents<'a>,
    pub(super) directories: Directories,
    /// Whether an entry is made.
    made: Vec<AtomicBool>,
    failed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ready: Vec<Task>,
    waiting: Vec<Task>,
    running: usize,
    error: Option<BuildError>,
    made: Made,
}

/// The directories of a tree, numbered in its order, with what is in each.
pub(super) struct Directories {
    pub(super) indices: Vec<usize>,
    handles: Vec<OnceLock<FileHandle>>,
    /// Of each, and one more: where its entries begin in `children`.
    starts: Vec<usize>,
    children: Vec<usize>,
}

impl Directories {
    fn new(tree: &Tree) -> Self {
        let entries = tree.entries.iter().enumerate();
        let indices: Vec<usize> =
            entries.filter(|(_, entry)| entry.kind == Kind::Directory).map(|(index, _)| index).collect();
        let handles = indices.iter().map(|_| OnceLock::new()).collect();
        let mut directories =
            Self { starts: vec![0; indices.len() + 1], indices, handles, children: Vec::new() };
        let parents: Vec<usize> =
            tree.entries.iter().skip(1).map(|entry| directories.number(entry.parent)).collect();
        parents.iter().for_each(|parent| directories.starts[parent + 1] += 1);
        for number in 1..directories.starts.len() {
            directories.starts[number] += directories.starts[number - 1];
        }
        let mut next = directories.starts.clone();
        directories.children = vec![0; parents.len()];
        for (at, parent) in parents.into_iter().enumerate() {
            directories.children[next[parent]] = at + 1;
            next[parent] += 1;
        }
        directories
    }

    pub(super) fn number(&self, index: usize) -> usize {
        self.indices.binary_search(&index).expect("a parent is a directory")
    }

    pub(super) fn children(&self, number: usize) -> &[usize] {
        &self.children[self.starts[number]..self.starts[number + 1]]
    }

    pub(super) fn found(&self, number: usize, handle: FileHandle) {
        let _ = self.handles[number].set(handle);
    }

    pub(super) fn handle(&self, number: usize) -> FileHandle {
        *self.handles[number].get().expect("what is in a directory is made after it")
    }
}

impl<'a> Names<'a> {
    fn new(
        root: &'a File,
        tree: &'a Tree,
        options: &'a BuildOptions,
        contents: Contents<'a>,
    ) -> io::Result<Self> {
        let directories = Directories::new(tree);
        directories.found(0, FileHandle::of(root.as_fd())?);
        let ready = vec![Task { number: 0, done: 0, plain: None, waits_for: None }];
        Ok(Self {
            root,
            tree,
            options,
            contents,
            directories,
            made: tree.entries.iter().map(|_| AtomicBool::new(false)).collect(),
            failed: AtomicBool::new(false),
            state: Mutex::new(State { ready, ..State::default() }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: BuildError) {
        self.failed.store(true, Ordering::Relaxed);
        self.lock().error.get_or_insert(error);
        self.changed.notify_all();
    }

    fn finish(self) -> Result<Made, BuildError> {
        let State { error, mut made, .. } = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = error {
            return Err(error);
        }
        let handles = self.directories.handles.into_iter().filter_map(OnceLock::into_inner);
        made.handles.extend(self.directories.indices.into_iter().zip(handles));
        made.handles.sort_unstable_by_key(|(index, _)| *index);
        made.pending.sort_unstable_by_key(|(index, _)| *index);
        Ok(made)
    }

    /// A thread's work.
    fn run(&self) {
        let mut worker = match Worker::new(self) {
            Ok(worker) => worker,
            Err(error) => return self.fail(error),
        };
        while let Some(task) = self.take() {
            let (below, rest) = match worker.make_directory(task) {
                Ok(left) => left,
                Err(error) => return self.fail(error),
            };
            let mut state = self.lock();
            state.running -= 1;
            // So that the first of them is taken first, as it is in the pages file.
            state.ready.extend(below.into_iter().rev());
            state.waiting.extend(rest);
            drop(state);
            self.changed.notify_all();
        }
        match worker.finish() {
            Ok(mut made) => {
                let state = &mut *self.lock();
                state.made.handles.append(&mut made.handles);
                state.made.pending.append(&mut made.pending);
                state.made.small.append(&mut made.small);
            }
            Err(error) => self.fail(error),
        }
    }

    /// The next directory; waits for one. `None` when there will be no more.
    fn take(&self) -> Option<Task> {
        let mut state = self.lock();
        loop {
            if self.has_failed() {
                return None;
            }
            let next = state.ready.pop().or_else(|| {
                let waits = |task: &Task| task.waits_for.is_some_and(|target| !self.is_made(target));
                let at = state.waiting.iter().position(|task| !waits(task))?;
                Some(state.waiting.swap_remove(at))
            });
            if next.is_some() {
                state.running += 1;
                return next;
            }
            if state.running == 0 {
                assert!(state.waiting.is_empty(), "a decoded tree's links come after their targets");
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn is_made(&self, index: usize) -> bool {
        self.made[index].load(Ordering::Acquire)
    }

    pub(super) fn has_made(&self, index: usize) {
        self.made[index].store(true, Ordering::Release);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}
