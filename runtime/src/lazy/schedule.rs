//! In which order the large files are loaded: those that somebody waits for, at once; then those in the directories of
//! these, the latest first; then as they are in the image.
//!
//! Pure: no files, no locks.

use std::collections::{HashMap, HashSet};

/// Numbers of files that aren't being loaded yet.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    /// Of each file, its directory.
    directories: Vec<u64>,
    /// Of each directory, its files, the last in the image first.
    files: HashMap<u64, Vec<usize>>,
    waiting: HashSet<usize>,
    /// Directories that have had an urgent file, the latest last.
    preferred: Vec<u64>,
    next: usize,
}

impl Schedule {
    /// `directories` of all files in the order of the image; `done` says which are none of it.
    pub(crate) fn new(directories: Vec<u64>, done: impl Fn(usize) -> bool) -> Self {
        let waiting: HashSet<usize> = (0..directories.len()).filter(|index| !done(*index)).collect();
        let mut files: HashMap<u64, Vec<usize>> = HashMap::new();
        for (index, directory) in directories.iter().enumerate().rev() {
            if waiting.contains(&index) {
                files.entry(*directory).or_default().push(index);
            }
        }
        Self { directories, files, waiting, preferred: Vec::new(), next: 0 }
    }

    /// Somebody waits for file `index`. True if it is to be loaded now; false if it is being loaded already.
    pub(crate) fn take(&mut self, index: usize) -> bool {
        let taken = self.waiting.remove(&index);
        if let Some(directory) = self.directories.get(index)
            && self.preferred.last() != Some(directory)
        {
            self.preferred.push(*directory);
        }
        taken
    }

    /// The next to load.
    pub(crate) fn pop(&mut self) -> Option<usize> {
        while let Some(directory) = self.preferred.last() {
            while let Some(index) = self.files.get_mut(directory).and_then(Vec::pop) {
                if self.waiting.remove(&index) {
                    return Some(index);
                }
            }
            self.preferred.pop();
        }
        while self.next < self.directories.len() {
            self.next += 1;
            if self.waiting.remove(&(self.next - 1)) {
                return Some(self.next - 1);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_beside_a_wanted_one_come_before_the_rest() {
        let mut schedule = Schedule::new(vec![1, 1, 2, 2, 2, 1], |index| index == 3);
        assert_eq!(schedule.pop(), Some(0));
        assert!(schedule.take(4));
        assert!(!schedule.take(4), "it is being loaded");
        assert!(!schedule.take(3), "it is loaded");
        assert_eq!(schedule.pop(), Some(2));
        assert!(schedule.take(5));
        assert_eq!(schedule.pop(), Some(1));
        assert_eq!(schedule.pop(), None);
    }
}
