//! Settling files at the gate: by the keeper, or if that is dead by the loader itself.

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};

use stillframe_tmpfs::lazy::gate::Gate;

use super::{Keeper, Loader, Stage};
use crate::lazy::channel::{self, Message};
use crate::lazy::doors::{Door, Doors};

impl Loader {
    /// Has the keeper settle a file; does it itself where there is none any more.
    pub(super) fn settle_at_gate(&self, index: usize, loaded: bool) {
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        if let Keeper::Alive(channel, _) = &*keeper {
            let message = Message::Settle { index: index as u64, loaded };
            if channel::call(channel, message).is_ok() {
                return;
            }
        }
        self.take_place_of(&mut keeper);
        let Keeper::Dead(Some(doors)) = &*keeper else { return };
        if loaded {
            // Without a name and without an opener it is gone, and the mark with it.
            let _ = self.large[index].open_path(&self.root).and_then(|path| doors.gate().forget(&path));
        }
        doors.settle(index, if loaded { Door::Open } else { Door::Broken });
    }

    /// Takes the keeper's place at the gate, unless that is done.
    pub(super) fn replace_keeper(&self) {
        self.take_place_of(&mut self.keeper.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn take_place_of(&self, keeper: &mut Keeper) {
        if let Keeper::Alive(_, group) = keeper {
            let group = group.take();
            *keeper = Keeper::Dead(group.map(|group| self.open_doors(group)));
        }
    }

    fn open_doors(&self, group: OwnedFd) -> Arc<Doors> {
        let state = self.lock();
        let door = |stage: &Stage| match stage {
            Stage::Pending(_) | Stage::Loading => Door::Closed,
            Stage::Loaded | Stage::Open => Door::Open,
            Stage::Failed => Door::Broken,
        };
        let closed = state.stages.iter().map(door).collect();
        drop(state);
        let inodes = self.large.iter().map(|file| file.inode);
        let doors = Doors::new(Gate::from_descriptor(group), inodes, closed);
        doors.answer_for_the_dead();
        if let Err(error) = doors.attend() {
            self.put_error(0, &format!("nobody can be let in any more: {error}"));
        }
        doors
    }
}
