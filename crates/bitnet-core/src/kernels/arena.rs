//! Memory for packed weights: one mapping for all of a model's, in huge pages. Weights are streamed through once a token, and
//! misses in the translation tables would cost a sixth of the bandwidth; a mapping for each matrix would leave most of a small
//! one, and the ends of a large one, on small pages.
#![allow(unsafe_code)]

use std::{
    ops::{Deref, DerefMut},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use memmap2::{MmapMut, MmapRaw};

use crate::threads::{SharedRows, WorkerPool};

/// Less than this does not get a huge page: clearing it would cost more than it saves.
const HUGE_PAGE: usize = 2 << 20;

/// No other page is smaller.
const SMALL_PAGE: usize = 4096;

/// Memory to be taken piece by piece. What was not taken was never touched, so it takes no memory.
#[derive(Debug)]
pub struct Arena(Arc<Pages>);

#[derive(Debug)]
struct Pages {
    map: MmapRaw,
    /// Bytes from the start that are taken.
    used: AtomicUsize,
}

/// A piece of an [`Arena`], which lives as long as it does. Its bytes are what they were when it was taken: zero, or left by
/// a piece that was dropped.
#[derive(Debug)]
pub(super) struct Piece {
    pages: Arc<Pages>,
    start: usize,
    len: usize,
}

impl Arena {
    /// Room for `capacity` bytes, aligned to pages.
    ///
    /// # Panics
    /// When the address space is exhausted.
    pub fn new(capacity: usize) -> Self {
        let map = MmapMut::map_anon(capacity.max(1)).expect("memory for packed weights");
        #[cfg(target_os = "linux")]
        if capacity >= HUGE_PAGE
            && let Err(error) = map.advise(memmap2::Advice::HugePage)
        {
            tracing::debug!(%error, "no huge pages for weights");
        }
        Self(Arc::new(Pages { map: map.into(), used: AtomicUsize::new(0) }))
    }

    /// All of a new arena.
    pub(super) fn whole(len: usize) -> Piece {
        Self::new(len).take(len)
    }

    /// Bytes, taken or not.
    pub(super) fn capacity(&self) -> usize {
        self.0.map.len()
    }

    /// Has the system clear the pages of the next `len` bytes, or of as many as are left, by all workers. Left to whoever
    /// writes first, one of them would wait while the other clears the huge page of a whole matrix, or both would clear it.
    pub fn touch_next(&self, len: usize, pool: &mut WorkerPool) {
        let used = self.0.used.load(Ordering::Relaxed);
        let page_end = |offset: usize| offset.next_multiple_of(HUGE_PAGE).min(self.capacity());
        // Dropped at once, and the last: its bytes are the next again.
        let mut next = self.take(page_end(used.saturating_add(len)) - used);
        touch(&mut next[page_end(used) - used..], pool);
    }

    /// The next `len` bytes.
    ///
    /// # Panics
    /// When fewer are left.
    pub(super) fn take(&self, len: usize) -> Piece {
        let room = |used: usize| used.checked_add(len).filter(|end| *end <= self.0.map.len());
        let start = self.0.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room);
        Piece { pages: Arc::clone(&self.0), start: start.expect("an arena as large as what is packed into it"), len }
    }
}

/// Writes to every page, in parallel: memory never written is one page of zeros that stays in the cache.
pub(super) fn touch(memory: &mut [u8], pool: &mut WorkerPool) {
    fn touch_alone(memory: &mut [u8]) {
        memory.iter_mut().step_by(SMALL_PAGE).for_each(|byte| *byte = 0);
    }
    let (pages, rest) = memory.as_chunks_mut::<HUGE_PAGE>();
    touch_alone(rest);
    let num_pages = pages.len();
    let shared = SharedRows::new(pages, 1);
    pool.run(&|worker| touch_alone(shared.claim(worker.share(num_pages, 1)).as_flattened_mut()));
}

impl Drop for Piece {
    fn drop(&mut self) {
        // The last piece gives its bytes back; any other's are lost until the arena goes.
        let _ =
            self.pages.used.compare_exchange(self.start + self.len, self.start, Ordering::AcqRel, Ordering::Relaxed);
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `take` found the bytes inside the map, which `pages` keeps. No other piece has them: `used` has passed them,
        // and goes back before them only when this piece is dropped.
        unsafe { std::slice::from_raw_parts(self.pages.map.as_ptr().add(self.start), self.len) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pages.map.as_mut_ptr().add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_apart_and_the_last_can_be_given_back() {
        let arena = Arena::new(100);
        let (mut first, mut second, last) = (arena.take(40), arena.take(50), arena.take(10));
        first.fill(1);
        second.fill(2);
        assert!(first.iter().all(|&byte| byte == 1) && last.iter().all(|&byte| byte == 0));
        drop(first);
        drop(last);
        assert_eq!(arena.take(10).start, 90, "the first is not the last");
        drop(second);
        assert_eq!(arena.take(60).start, 40);
        assert!(arena.take(60).iter().take(50).all(|&byte| byte == 2), "and outlives nobody's arena");
        arena.touch_next(usize::MAX / 2, &mut WorkerPool::new(2));
        assert_eq!(arena.take(60).start, 40, "what was only touched is still to be taken");
    }

    #[test]
    #[should_panic(expected = "an arena as large")]
    fn more_than_there_is_cannot_be_taken() {
        let _ = (Arena::new(100).take(60), Arena::new(100).take(101));
    }
}
