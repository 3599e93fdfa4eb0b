//! Which packing is the fastest here: fewer bytes a weight against more work to decode them. Both give the same integers, so
//! the answer, unlike any other measurement, may decide how a model runs.
//!
//! The rule: the time of one token decides. That is what someone alone waits for, memory bounds it, and a tie goes to the
//! kernel's first layout. In batches the multiplications bound it, and decoding 1.6 bits takes some of them away: on a Zen 5
//! core the 2-bit product of 8 to 16 rows is a tenth faster. A server that is always busy can be told `--packing 2bit`, at
//! the price of a quarter more memory for the body.

use super::{
    TernaryKernel,
    limits::best_of,
    packing::{PackedLayout, PackedTernary, ROW_TILE},
    prefetch::Streaming,
};
use crate::{
    quant::activation::ActivationBuffer,
    threads::{SharedRows, WorkerPool},
};

/// Columns of the matrix that is timed.
const COLS: usize = 2560;
/// More than this would only take longer: no last-level cache holds it.
const MAX_BYTES: usize = 256 << 20;
/// Passes over the matrix, of which the fastest counts.
const ROUNDS: u32 = 4;

/// Times a matrix-vector product in every layout of `kernel`, or in `layout` alone, with and without asking for weights ahead,
/// on all workers of `pool`, and returns the fastest way.
/// `weight_bytes` is what the model's weights take at 2 bits each: a model that fits the cache is judged in the cache, and
/// no more memory than the model will need is touched. Takes about two tenths of a second for a large one.
///
/// # Panics
/// When memory is exhausted.
pub fn autotune(
    kernel: &dyn TernaryKernel,
    pool: &mut WorkerPool,
    weight_bytes: usize,
    layout: Option<PackedLayout>,
) -> Streaming {
    let choices = Streaming::choices(kernel, layout);
    let mut fastest = (f64::INFINITY, choices[0]);
    if choices.len() > 1 {
        let row_bytes = PackedLayout::T32x2Bit.panel_bytes(COLS) / ROW_TILE;
        let rows = (weight_bytes.min(MAX_BYTES) / row_bytes).next_multiple_of(ROW_TILE).max(ROW_TILE);
        for choice in choices {
            let seconds = time(kernel, pool, rows, choice);
            tracing::debug!(?choice, rows, seconds, "timed a way to read weights");
            if seconds < fastest.0 {
                fastest = (seconds, choice);
            }
        }
    }
    fastest.1
}

fn time(kernel: &dyn TernaryKernel, pool: &mut WorkerPool, rows: usize, choice: Streaming) -> f64 {
    let weights = PackedTernary::arbitrary(rows, COLS, choice, pool);
    let mut x = ActivationBuffer::new(1, COLS);
    x.quantize_row(0, &[1.0; COLS]);
    let x = x.view(1, COLS);
    let mut out = vec![0.0; rows];
    best_of(ROUNDS, || {
        let shared = SharedRows::new(&mut out, 1);
        pool.run(&|worker| {
            let share = worker.share(rows, ROW_TILE);
            kernel.gemv(&weights.slice(share.clone()), &x, shared.claim(share));
        });
    })
}
