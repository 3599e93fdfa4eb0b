//! Which packing is the fastest here: fewer bytes a weight against more work to decode them. Both give the same integers, so
//! the answer, unlike any other measurement, may decide how a model runs.
//!
//! The rule: the geometric mean of the times of a step for one sequence, for 4, 8 and 16 decides; a tie goes to the kernel's first
//! layout. Memory bounds someone alone, whom 1.6 bits help where it is slow; multiplications bound a batch, and
//! decoding 1.6 bits takes some of them away: on a Zen 4 core the 2-bit product is a quarter slower for one token, as much
//! faster for four, and a fifteenth faster for eight. Who is always alone can be told `--packing 1.6bit`, which saves a fifth
//! of the body's memory too.

use super::{
    Output, TernaryKernel,
    arena::Arena,
    limits::seconds_of,
    packing::{PackedLayout, PackedTernary, ROW_TILE, rows_of_tiles},
    prefetch::Streaming,
};
use crate::{
    quant::activation::ActivationBuffer,
    threads::{SharedColumns, WorkerPool},
};

/// Columns of the matrices that are timed.
const COLS: usize = 2560;
/// More than this in all would only take longer: no last-level cache holds it.
const MAX_BYTES: usize = 256 << 20;
/// Tokens of the products that are timed, and in how many rounds: a pass over much memory varies the most.
const TIMED: [(usize, u32); 4] = [(1, 12), (4, 2), (8, 2), (16, 2)];
const MAX_TOKENS: usize = 16;

/// Times products in every layout of `kernel`, or in `layout` alone, with and without asking for weights ahead, on all workers
/// of `pool`, and returns the fastest way. They take turns, for the memory of a shared machine is faster in one
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
        |choice| (choice, PackedTernary::arbitrary(arena, (rows, COLS), choice, pool), TIMED.map(|_| f64::INFINITY));
    let mut timed: Vec<_> = choices.into_iter().map(matrix).collect();
    let mut x = ActivationBuffer::new(MAX_TOKENS, COLS);
    (0..MAX_TOKENS).for_each(|token| x.quantize_row(token, &[1.0; COLS]));
    let mut out = vec![0.0; MAX_TOKENS * rows];
    for (index, (num_tokens, num_rounds)) in TIMED.into_iter().enumerate() {
        let x = x.view(num_tokens, COLS);
        for _ in 0..num_rounds {
            for (_, weights, best) in &mut timed {
                let out = SharedColumns::new(&mut out[..num_tokens * rows], rows, ROW_TILE);
                let seconds = seconds_of(|| {
                    pool.run_chunks(rows / ROW_TILE, 1, &|tiles| {
                        let rows = rows_of_tiles(tiles, rows);
                        kernel.multiply(&weights.slice(rows.clone()), &x, &mut out.claim(rows), Output::Replace);
                    });
                });
                best[index] = best[index].min(seconds);
            }
        }
    }
    for (choice, _, seconds) in &timed {
        tracing::debug!(?choice, rows, ?seconds, "timed a way to read weights");
    }
    // Of all choices that come to the same for so many tokens.
    let best = |choice: Streaming, index: usize, num_tokens: usize| {
        let same = timed.iter().filter(|(other, ..)| other.for_tokens(num_tokens) == choice.for_tokens(num_tokens));
        same.map(|(_, _, seconds)| seconds[index]).fold(f64::INFINITY, f64::min)
    };
    // Their product orders like their mean.
    let time = |choice: Streaming| -> f64 {
        TIMED.iter().enumerate().map(|(index, (num_tokens, _))| best(choice, index, *num_tokens)).product()
    };
    let fastest = timed.iter().map(|(choice, ..)| *choice).min_by(|a, b| time(*a).total_cmp(&time(*b)));
    let fastest = fastest.expect("a kernel has a layout");
    // The last one first, so that the arena gets its bytes back.
    timed.into_iter().rev().for_each(drop);
    fastest
}
