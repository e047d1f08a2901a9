//! An archive that is made in pieces and compressed before the freeze, so that under it only those pieces are made again in which
//! something has changed.
//!
//! ```text
//! prepare -> altered (attributes, contents) -> those pieces again
//!         -> other names                    -> all of it again
//! ```
//!
//! A piece is the members of some hundred names that follow each other in the walk, compressed by itself: pieces one after the
//! other are the compressed archive. A member depends on its inode, on its path and on its number, and a further name of a file
//! on the first: so a piece in which an inode has several names is never made again alone.

use std::collections::HashSet;
use std::{io, iter};

use crate::archive::TRAILER;
use crate::id_map::Ids;
use crate::live::Live;
use crate::live::model::{Cursor, Mark};
use crate::live::verify::Trouble;
use crate::save::{Position, SaveTreeError, Saver, TreeSummary};

/// Bytes of archive after which a piece ends.
const PIECE: usize = 256 << 10;

/// Compresses bytes, so that what it makes of two runs of bytes stands for both one after the other.
pub type Compress<'a> = &'a mut dyn FnMut(&[u8]) -> io::Result<Vec<u8>>;

/// A compressed archive.
#[derive(Debug)]
pub struct Compressed {
    /// What it was compressed to.
    pub pieces: Vec<Vec<u8>>,
    /// Its length uncompressed.
    pub length: u64,
    /// What is in it.
    pub summary: TreeSummary,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pieces {
    pieces: Vec<Piece>,
    /// Inodes that have changed since.
    altered: HashSet<u64>,
}

#[derive(Debug)]
struct Piece {
    /// Where the walk was before it.
    mark: Mark,
    position: Position,
    names: usize,
    /// Whether an inode with several names is in it.
    links: bool,
    length: usize,
    compressed: Vec<u8>,
    summary: TreeSummary,
}

impl Live {
    /// Makes the archive of what was read so far. If that contradicts itself, since the filesystem is in use, it is left to
    /// [`Self::compressed`].
    pub fn prepare(&mut self, ids: &Ids, compress: Compress<'_>) {
        self.pieces = None;
        let Ok(names) = self.model.count_names() else { return };
        self.names = names;
        match self.all_pieces(ids, compress) {
            Ok(pieces) => self.keep(pieces),
            Err(trouble) => {
                let error = self.because(trouble);
                tracing::debug!(%error, "the archive isn't made before the freeze");
            }
        }
    }

    /// The archive, compressed; after `verify`.
    pub fn compressed(&mut self, ids: &Ids, compress: Compress<'_>) -> Result<Compressed, SaveTreeError> {
        let pieces = match self.pieces.take() {
            Some(Pieces { pieces, altered }) => self.renew(pieces, &altered, ids, compress),
            None => self.all_pieces(ids, compress),
        };
        let pieces = pieces.map_err(|trouble| self.because(trouble))?;
        let trailer = compress(&TRAILER).map_err(SaveTreeError::Tree)?;
        let mut summary = TreeSummary::default();
        pieces.iter().for_each(|piece| summary += piece.summary);
        let length = pieces.iter().map(|piece| piece.length as u64).sum::<u64>() + TRAILER.len() as u64;
        let pieces = pieces.into_iter().map(|piece| piece.compressed).chain([trailer]).collect();
        Ok(Compressed { pieces, length, summary })
    }

    /// Something of the inode has changed since it was read first.
    pub(super) fn alter(&mut self, inode: u64) {
        if let Some(pieces) = &mut self.pieces {
            pieces.altered.insert(inode);
        }
    }

    /// Keeps them, and remembers which inode is in which.
    fn keep(&mut self, pieces: Vec<Piece>) {
        let mut walk = Cursor::new(&self.model);
        let mut inodes = Vec::with_capacity(self.model.nodes.len());
        while let Ok(Some(visit)) = walk.next() {
            inodes.push(visit.inode);
        }
        let numbers = (0..).zip(&pieces).flat_map(|(number, piece)| iter::repeat_n(number, piece.names));
        // Of an inode with several names any will do: no piece with such a one is made again alone.
        for (inode, number) in inodes.into_iter().zip(numbers) {
            self.model.nodes.entry(inode).and_modify(|node| node.piece = number);
        }
        self.pieces = Some(Pieces { pieces, altered: HashSet::new() });
    }

    fn all_pieces(&self, ids: &Ids, compress: Compress<'_>) -> Result<Vec<Piece>, Trouble> {
        let mut pieces = Vec::new();
        let mut walk = Cursor::new(&self.model);
        let mut saver = Saver::of_saved(ids, Vec::with_capacity(2 * PIECE));
        loop {
            let piece = self.piece(&mut walk, usize::MAX, &mut saver, compress)?;
            if piece.names == 0 {
                return Ok(pieces);
            }
            pieces.push(piece);
        }
    }

    /// Makes those again in which an inode was altered.
    fn renew(
        &self,
        mut pieces: Vec<Piece>,
        altered: &HashSet<u64>,
        ids: &Ids,
        compress: Compress<'_>,
    ) -> Result<Vec<Piece>, Trouble> {
        let numbers = altered.iter().filter_map(|inode| self.model.nodes.get(inode));
        let numbers: HashSet<usize> = numbers.map(|node| node.piece as usize).collect();
        if numbers.iter().any(|number| pieces.get(*number).is_none_or(|piece| piece.links)) {
            return self.all_pieces(ids, compress);
        }
        for number in numbers {
            let old = &mut pieces[number];
            let mut walk = Cursor::resume(&self.model, &old.mark)?;
            let mut saver = Saver::resume(ids, Vec::with_capacity(2 * PIECE), old.position.clone());
            let new = self.piece(&mut walk, old.names, &mut saver, compress)?;
            // What has got another name since isn't what it was.
            if new.links || new.names != old.names {
                return self.all_pieces(ids, compress);
            }
            *old = new;
        }
        Ok(pieces)
    }

    /// The next piece, of at most so many names; or exactly so many, if `names` says so.
    fn piece(
        &self,
        walk: &mut Cursor<'_>,
        names: usize,
        saver: &mut Saver<'_, Vec<u8>>,
        compress: Compress<'_>,
    ) -> Result<Piece, Trouble> {
        let exactly = names != usize::MAX;
        let (mark, position) = (walk.mark(), saver.position());
        let (mut met, mut links) = (0, false);
        while met < names && (exactly || saver.written().0.len() < PIECE) {
            let Some(visit) = walk.next()? else { break };
            links |= self.names.get(&visit.inode).is_some_and(|names| *names > 1);
            self.append(visit, saver)?;
            met += 1;
        }
        let (archive, summary) = saver.written();
        let compressed = compress(archive).map_err(|error| Trouble::Save(SaveTreeError::Tree(error)))?;
        let length = archive.len();
        archive.clear();
        let summary = std::mem::take(summary);
        Ok(Piece { mark, position, names: met, links, length, compressed, summary })
    }
}
