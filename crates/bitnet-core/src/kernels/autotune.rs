//! Which packing is the fastest here: fewer bytes a weight against more work to decode them. Both give the same integers, so
//! the answer, unlike any other measurement, may decide how a model runs.
//!
//! The rule: the time of one token decides. That is what someone alone waits for, memory bounds it, and a tie goes to the
//! kernel's first layout. In batches the multiplications bound it, and decoding 1.6 bits takes some of them away: on a Zen 5
//! core the 2-bit product of 8 to 16 rows is a tenth faster. A server that is always busy can be told `--packing 2bit`, at
//! the price of a quarter more memory for the body.

use super::{
    TernaryKernel,
    arena::Arena,
    limits::seconds_of,
    packing::{PackedLayout, PackedTernary, ROW_TILE},
    prefetch::Streaming,
};
use crate::{
    quant::activation::ActivationBuffer,
    threads::{SharedRows, WorkerPool},
};

/// Columns of the matrices that are timed.
const COLS: usize = 2560;
/// More than this in all would only take longer: no last-level cache holds it.
const MAX_BYTES: usize = 256 << 20;
/// Passes over each matrix, of which the fastest counts.
const ROUNDS: u32 = 12;

/// Times a matrix-vector product in every layout of `kernel`, or in `layout` alone, with and without asking for weights ahead,
/// on all workers of `pool`, and returns the fastest way. They take turns, for the memory of a shared machine is faster in one
/// moment and slower in the next.
/// What is read lies where the model's weights will: a model that fits the cache is judged in the cache, and the system
/// clears that memory only once. `arena` is left as it was found.
pub fn autotune(
    kernel: &dyn TernaryKernel,
    pool: &mut WorkerPool,
    arena: &Arena,
    layout: Option<PackedLayout>,
) -> Streaming {
    let choices = Streaming::choices(kernel, layout);
    let panels_bytes = PackedLayout::T32x2Bit.panel_bytes(COLS) * choices.len();
    let rows = arena.capacity().min(MAX_BYTES) / panels_bytes * ROW_TILE;
    if choices.len() == 1 || rows == 0 {
        return choices[0];
    }
    let matrix =
        |choice: Streaming| (choice, PackedTernary::arbitrary(arena, (rows, COLS), choice, pool), f64::INFINITY);
    let mut timed: Vec<_> = choices.into_iter().map(matrix).collect();
    let mut x = ActivationBuffer::new(1, COLS);
    x.quantize_row(0, &[1.0; COLS]);
    let (x, mut out) = (x.view(1, COLS), vec![0.0; rows]);
    for _ in 0..ROUNDS {
        for (_, weights, best) in &mut timed {
            let shared = SharedRows::new(&mut out, 1);
            let seconds = seconds_of(|| {
                pool.run(&|worker| {
                    let share = worker.share(rows, ROW_TILE);
                    kernel.gemv(&weights.slice(share.clone()), &x, shared.claim(share));
                });
            });
            *best = best.min(seconds);
        }
    }
    for (choice, _, seconds) in &timed {
        tracing::debug!(?choice, rows, seconds, "timed a way to read weights");
    }
    let fastest = timed.iter().min_by(|(_, _, a), (_, _, b)| a.total_cmp(b)).expect("a kernel has a layout").0;
    // The last one first, so that the arena gets its bytes back.
    timed.into_iter().rev().for_each(drop);
    fastest
}
