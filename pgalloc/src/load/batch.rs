//! Small files, each opened only when it is its turn.

use std::fs::File;
use std::io;

use crate::page::PageExtent;

/// Files that one loader thread loads one after the other. They are numbered from 0, and loaded in that order.
///
/// The first that can't be opened, loaded or finished is the load's failure: those behind it stay as they are.
pub trait FileBatch: Send {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A file's contents.
    fn extents(&self, index: usize) -> &[PageExtent];

    /// Opens a file for writing.
    ///
    /// # Errors
    ///
    /// It can't be.
    fn open(&mut self, index: usize) -> io::Result<File>;

    /// Finishes a file whose last byte has been written.
    ///
    /// # Errors
    ///
    /// It can't be.
    fn loaded(&mut self, index: usize, file: &File) -> io::Result<()>;
}
