//! What was copied of a container's filesystems before its pause, kept for the checkpoint that is expected to follow.
//!
//! It is dropped, with the pages file that it has written, when it isn't used for [`KEPT`]: while it is there, changes that
//! other containers of the pod make are watched and remembered.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use stillframe_runtime::sandbox::Ahead;

/// How long after a pause a checkpoint finds what was copied. containerd's comes at once.
const KEPT: Duration = Duration::from_secs(60);

/// At most one copy, shared with the task that drops it.
#[derive(Debug, Default)]
pub struct Copied {
    slot: Arc<Slot>,
}

/// A copy, and how many there were before it.
#[derive(Debug, Default)]
struct Slot(Mutex<(u64, Option<Ahead>)>);

impl Slot {
    /// Takes the copy, if it is the `number`th.
    fn take(&self, number: Option<u64>) -> Option<Ahead> {
        let mut copy = self.0.lock().expect("only ever replaced");
        if number.is_none_or(|number| copy.0 == number) { copy.1.take() } else { None }
    }
}

impl Copied {
    /// Keeps a copy for a while.
    pub fn keep(&self, ahead: Ahead) {
        let number = {
            let mut copy = self.slot.0.lock().expect("only ever replaced");
            *copy = (copy.0 + 1, Some(ahead));
            copy.0
        };
        let slot: Weak<Slot> = Arc::downgrade(&self.slot);
        tokio::spawn(async move {
            tokio::time::sleep(KEPT).await;
            drop(slot.upgrade().and_then(|slot| slot.take(Some(number))));
        });
    }

    /// The copy, if there is one still.
    pub fn take(&self) -> Option<Ahead> {
        self.slot.take(None)
    }
}
