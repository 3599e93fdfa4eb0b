//! One phase of the forward pass: rows split among the workers, or kept on the calling thread when handing them out would
//! cost more than doing them.

use std::ops::Range;

use crate::{
    kernels::{Isa, TernaryKernel},
    threads::WorkerPool,
};

/// Rows of a step below which element-wise work stays on the calling thread: a few microseconds of work at most.
const MIN_ROWS_TO_SPLIT: usize = 4;

/// Who runs a step's phases, and over how many rows.
pub(super) struct Phases<'a> {
    pub(super) pool: &'a mut WorkerPool,
    pub(super) kernel: &'static dyn TernaryKernel,
    pub(super) num_rows: usize,
}

impl Phases<'_> {
    pub(super) fn isa(&self) -> Isa {
        self.kernel.isa()
    }

    /// Calls `work` with disjoint ranges that together are all rows of the step.
    pub(super) fn over_rows(&mut self, work: &(dyn Fn(Range<usize>) + Sync)) {
        let num_rows = self.num_rows;
        if num_rows < MIN_ROWS_TO_SPLIT {
            work(0..num_rows);
        } else {
            self.pool.run(&|worker| work(worker.share(num_rows, 1)));
        }
    }
}
