//! Bounded memory: page-aligned buffers out of a [`BufferPool`], and a [`Budget`] for bytes that are mapped.
//!
//! Both block who asks for more than there is until somebody gives back, by dropping. The bounds are what keeps a
//! save that is faster than its disk from taking all memory.
//!
//! Nobody who waits for one of them may hold what its owner needs to give back. The owners are the writer and loader
//! threads, which ask for nothing.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

/// Locks, also what a thread that panicked has left: no state here is broken half-way through.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits, like [`lock`].
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// At most `limit` buffers of `length` bytes, made when they are first needed and then used again.
#[derive(Debug)]
pub(crate) struct BufferPool {
    length: usize,
    state: Mutex<PoolState>,
    returned: Condvar,
}

#[derive(Debug)]
struct PoolState {
    free: Vec<MmapMut>,
    /// Buffers that may still be made.
    unmade: usize,
    /// Who waits for one. To wake nobody would be a system call, too.
    waiting: usize,
}

impl BufferPool {
    pub(crate) fn new(length: usize, limit: usize) -> Arc<Self> {
        let state = Mutex::new(PoolState { free: Vec::new(), unmade: limit, waiting: 0 });
        Arc::new(Self { length, state, returned: Condvar::new() })
    }

    /// Length of each buffer in bytes.
    pub(crate) fn length(&self) -> usize {
        self.length
    }

    /// A buffer, with whatever it held before; waits until there is one.
    pub(crate) fn take(self: &Arc<Self>) -> io::Result<PageBuffer> {
        let mut state = lock(&self.state);
        loop {
            if let Some(map) = state.free.pop() {
                return Ok(PageBuffer { map: Some(map), pool: self.clone() });
            }
            if state.unmade > 0 {
                // An anonymous mapping is page-aligned, which direct I/O needs, and zero-filled.
                let map = MmapMut::map_anon(self.length)?;
                state.unmade -= 1;
                return Ok(PageBuffer { map: Some(map), pool: self.clone() });
            }
            state.waiting += 1;
            state = wait(&self.returned, state);
            state.waiting -= 1;
        }
    }
}

/// A page-aligned buffer; goes back to its pool when dropped.
#[derive(Debug)]
pub(crate) struct PageBuffer {
    /// `None` only while dropping.
    map: Option<MmapMut>,
    pool: Arc<BufferPool>,
}

impl Deref for PageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().expect("a buffer has its memory until it is dropped")
    }
}

impl DerefMut for PageBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().expect("a buffer has its memory until it is dropped")
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        let mut state = lock(&self.pool.state);
        state.free.extend(self.map.take());
        if state.waiting > 0 {
            drop(state);
            self.pool.returned.notify_one();
        }
    }
}

/// A number of bytes that can be taken and given back.
#[derive(Debug)]
pub(crate) struct Budget {
    available: Mutex<u64>,
    returned: Condvar,
}

impl Budget {
    pub(crate) fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { available: Mutex::new(bytes), returned: Condvar::new() })
    }

    /// Takes `bytes`, no more than the whole budget; waits until so many are there.
    pub(crate) fn take(self: &Arc<Self>, bytes: u64) -> Permit {
        let mut available = lock(&self.available);
        while *available < bytes {
            available = wait(&self.returned, available);
        }
        *available -= bytes;
        Permit { bytes, budget: self.clone() }
    }
}

/// Bytes taken out of a [`Budget`]; gives them back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    bytes: u64,
    budget: Arc<Budget>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        *lock(&self.budget.available) += self.bytes;
        // All: what was given back may serve several that wait, or not the one that is woken first.
        self.budget.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn a_pool_makes_no_more_than_its_limit_and_wakes_who_waits() {
        let pool = BufferPool::new(8192, 2);
        let (first, second) = (pool.take().unwrap(), pool.take().unwrap());
        assert_eq!(first.as_ptr() as usize % 4096, 0);
        let (sender, receiver) = mpsc::channel();
        let waiter = thread::spawn({
            let pool = pool.clone();
            move || sender.send(pool.take().unwrap().as_ptr() as usize).unwrap()
        });
        assert!(receiver.try_recv().is_err());
        let address = second.as_ptr() as usize;
        drop(second);
        assert_eq!(receiver.recv().unwrap(), address);
        waiter.join().unwrap();
    }

    #[test]
    fn a_budget_is_given_back() {
        let budget = Budget::new(10);
        let (six, four) = (budget.take(6), budget.take(4));
        let waiter = thread::spawn({
            let budget = budget.clone();
            move || drop(budget.take(10))
        });
        drop(six);
        drop(four);
        waiter.join().unwrap();
    }
}
