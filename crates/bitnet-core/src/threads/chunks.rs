//! Work stealing: a range that workers divide among themselves while they work on it.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{CacheLine, share};

/// What is left of each worker's share.
///
/// Half of what is left is taken at once: large chunks at first, for each costs some calls, and small ones at the end, for
/// nobody helps with a chunk that was taken.
#[derive(Debug, Default)]
pub(super) struct Chunks(Box<[CacheLine<AtomicU64>]>);

impl Chunks {
    /// For at most `num_threads` workers.
    pub(super) fn new(num_threads: usize) -> Self {
        Self((0..num_threads).map(|_| CacheLine::default()).collect())
    }

    /// Gives each of `num_threads` workers its share of `0..len`. Between phases only: those who take must see it.
    pub(super) fn share_out(&self, len: usize, num_threads: usize) {
        for (index, left) in self.0[..num_threads].iter().enumerate() {
            let share = share(len, index, num_threads);
            let bound = |bound| u32::try_from(bound).expect("a phase of less than 2^32 chunks");
            left.0.store(pack(bound(share.start)..bound(share.end)), Ordering::Relaxed);
        }
    }

    /// The next chunk for worker `index`, `None` when all is taken; at least `min` where so much of a share is left.
    pub(super) fn take(&self, index: usize, num_threads: usize, min: usize) -> Option<Range<usize>> {
        let from_start = |left: Range<u32>, len| (left.start..left.start + len, left.start + len..left.end);
        let from_end = |left: Range<u32>, len| (left.end - len..left.end, left.start..left.end - len);
        self.take_from(index, min, from_start).or_else(|| {
            let mut others = (1..num_threads).map(|distance| (index + distance) % num_threads);
            others.find_map(|other| self.take_from(other, min, from_end))
        })
    }

    /// A part of what is left of the share of `index`: `split` says which, of a length, and what then remains.
    fn take_from(
        &self,
        index: usize,
        min: usize,
        split: impl Fn(Range<u32>, u32) -> (Range<u32>, Range<u32>),
    ) -> Option<Range<usize>> {
        // Relaxed is enough: the range excludes, while the data itself is handed over by the start and end of the phase.
        let split = |left| {
            let left = unpack(left);
            let len = left.len().div_ceil(2).max(min).min(left.len());
            (len > 0).then(|| split(left, len as u32))
        };
        let rest = |left| split(left).map(|(_, rest)| pack(rest));
        let before = self.0[index].0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest).ok()?;
        split(before).map(|(chunk, _)| chunk.start as usize..chunk.end as usize)
    }
}

fn pack(range: Range<u32>) -> u64 {
    u64::from(range.start) << 32 | u64::from(range.end)
}

fn unpack(packed: u64) -> Range<u32> {
    (packed >> 32) as u32..packed as u32
}
