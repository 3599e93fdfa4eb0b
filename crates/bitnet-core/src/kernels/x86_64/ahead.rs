//! What passes over weights prefetch: the weights that come after them.
#![allow(unsafe_code)]

use std::arch::x86_64::_mm_prefetch;

/// What one pass over a panel prefetches. Its addresses need not be valid.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    from: *const u8,
    /// What follows the panel.
    following: *const u8,
    /// 0 for nothing.
    bytes: usize,
}

impl Ahead {
    /// What comes `distance` bytes after what is read, if the panel is read in one pass; nothing for 0.
    pub(super) fn of(panel: &[u8], distance: usize) -> Self {
        let [from, following] = [distance, panel.len()].map(|offset| panel.as_ptr().wrapping_add(offset));
        Self { from, following, bytes: if distance > 0 { panel.len() } else { 0 } }
    }

    /// For pass `index` of several over the same panel: a part of what follows the panel, or the first would have to wait for
    /// all of it.
    #[inline(always)]
    pub(super) fn part(self, index: usize, num_passes: usize) -> Self {
        if num_passes == 1 {
            return self;
        }
        let start = self.bytes * index / num_passes;
        let from = self.following.wrapping_add(start);
        Self { from, following: from, bytes: self.bytes * (index + 1) / num_passes - start }
    }

    /// The same, step by step.
    #[inline(always)]
    pub(super) fn over(self, num_steps: usize) -> Lines {
        Lines { from: self.from, stride: self.bytes.div_ceil(num_steps.max(1)) }
    }
}

/// Lines to prefetch in each step of a pass.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    from: *const u8,
    /// Bytes a step. Rounded up: to prefetch a line again costs less than to find out.
    stride: usize,
}

impl Lines {
    /// The `N` lines of step `step`, into the cache of `HINT`.
    #[inline(always)]
    pub(super) fn prefetch<const N: usize, const HINT: i32>(self, step: usize) {
        if self.stride > 0 {
            let line = self.from.wrapping_add(step * self.stride).cast::<i8>();
            for index in 0..N {
                // SAFETY: prefetching has no effect a program can observe, whatever the address; SSE is part of x86-64.
                unsafe { _mm_prefetch::<HINT>(line.wrapping_add(64 * index)) };
            }
        }
    }
}
