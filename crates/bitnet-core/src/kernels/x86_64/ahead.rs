//! What passes over weights prefetch: the weights that come after them.

use crate::kernels::prefetch_line;

/// Runs of lines that are asked for by turns. The hardware goes on by itself where somebody reads line after line, some lines
/// ahead and no further than a page: of one run that is too few where multiplications take as long as memory does, and all
/// wait at the end of each page. (On an Emerald Rapids core four runs are a tenth to a fifth faster than one, and as fast as
/// eight.)
pub(super) const RUNS: usize = 4;

/// What one pass over a panel prefetches: all or a part of the next one. Its addresses need not be valid.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    from: *const u8,
    /// 0 for nothing.
    bytes: usize,
}

impl Ahead {
    /// What follows `panel` in memory, if that is to be asked for.
    pub(super) fn of(panel: &[u8], is_asked_for: bool) -> Self {
        Self { from: panel.as_ptr_range().end, bytes: if is_asked_for { panel.len() } else { 0 } }
    }

    /// For pass `index` of several over the same panel.
    #[inline(always)]
    pub(super) fn part(self, index: usize, num_passes: usize) -> Self {
        let start = self.bytes * index / num_passes;
        Self { from: self.from.wrapping_add(start), bytes: self.bytes * (index + 1) / num_passes - start }
    }

    /// The same in so many steps, for passes that take as long as memory does.
    #[inline(always)]
    pub(super) fn in_runs(self, num_steps: usize) -> Lines<RUNS> {
        self.over(num_steps)
    }

    /// The same in so many steps, line after line, for passes that multiply for long: it takes fewer instructions.
    #[inline(always)]
    pub(super) fn in_order(self, num_steps: usize) -> Lines<1> {
        self.over(num_steps)
    }

    #[inline(always)]
    fn over<const R: usize>(self, num_steps: usize) -> Lines<R> {
        let steps_per_run = num_steps.div_ceil(R).max(1);
        let stride = self.bytes.div_ceil(R * steps_per_run);
        Lines { from: self.from, stride, run: stride * steps_per_run }
    }
}

/// Lines to prefetch in each step of a pass, of `R` runs by turns.
#[derive(Clone, Copy)]
pub(super) struct Lines<const R: usize> {
    from: *const u8,
    /// Bytes a step. Rounded up: to prefetch a line again costs less than to find out.
    stride: usize,
    /// Bytes of a run.
    run: usize,
}

impl<const R: usize> Lines<R> {
    /// The `N` lines of step `step`, into the second-level cache.
    #[inline(always)]
    pub(super) fn prefetch<const N: usize>(self, step: usize) {
        if self.stride > 0 {
            let line = self.from.wrapping_add(step % R * self.run + step / R * self.stride);
            for index in 0..N {
                prefetch_line(line.wrapping_add(64 * index));
            }
        }
    }
}
