//! One phase of the forward pass: rows split among the workers, or kept on the calling thread when handing them out would
//! cost more than doing them.

use std::ops::Range;

use crate::{
    kernels::{Isa, TernaryKernel, interleave},
    quant::activation::{ActivationBuffer, QuantizedActivations},
    threads::{SharedRows, WorkerPool},
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

    /// The rows of the step, quantized from `cols` values each, as its products take them: in blocks, each made by one worker for
    /// all, or by the products themselves where there is but one, which is sooner done than handed over.
    pub(super) fn inputs<'x>(&mut self, x: &'x mut ActivationBuffer, cols: usize) -> QuantizedActivations<'x> {
        let num_rows = self.num_rows;
        let block_tokens = self.kernel.block_tokens(num_rows);
        if block_tokens == 1 || num_rows <= block_tokens {
            return x.view(num_rows, cols);
        }
        x.view_in_blocks(num_rows, cols, block_tokens, |x, blocks| {
            let cols = x.codes(0).len();
            let blocks = SharedRows::new(blocks, cols);
            self.pool.run_chunks(num_rows.div_ceil(block_tokens), 1, &|chunk| {
                let first = chunk.start * block_tokens;
                let out = blocks.claim(first..num_rows.min(chunk.end * block_tokens));
                interleave(block_tokens, cols, |row| x.codes(first + row), out);
            });
        })
    }
}
