//! Kernels for x86-64, one instruction set a file, and what they share: the walk over panels and blocks of tokens, and the
//! epilogue. The shared code is always inlined, so that it is compiled for the instruction set of its caller.

mod avx2;
mod avx512_vnni;
mod avx_vnni;

use std::cell::Cell;

use super::{
    TernaryKernel, epilogue,
    packing::{COLUMN_TILE, PackedRows, ROW_TILE},
};
use crate::{quant::activation::QuantizedActivations, threads::ColumnsMut};

/// What this CPU can run, slowest first.
pub(super) fn detect() -> impl Iterator<Item = &'static dyn TernaryKernel> {
    [avx2::detect(), avx_vnni::detect(), avx512_vnni::detect()].into_iter().flatten()
}

/// Sums of products of the codes {0, 1, 2} of a panel's rows.
type PanelSums = [i32; ROW_TILE];

/// How far ahead weights are asked for. The hardware's own prefetcher alone leaves a third of the bandwidth unused.
const PREFETCH_BYTES: usize = 8192;

/// Bytes of activations kept interleaved at once: with a panel of weights they fit the second-level cache.
const CHUNK_BYTES: usize = 384 * 1024;

thread_local! {
    /// Interleaved activations of the product in progress, kept between products.
    static INTERLEAVED: Cell<Vec<i8>> = const { Cell::new(Vec::new()) };
}

/// The product of one token: `multiply(panel, codes)` gives the sums of one panel.
#[inline(always)]
fn gemv_by_panels(
    w: &PackedRows<'_>,
    x: &QuantizedActivations<'_>,
    out: &mut [f32],
    multiply: impl Fn(&[u8], &[i8]) -> PanelSums,
) {
    super::check_gemv(w, x, out);
    for (panel, out) in w.panels().zip(out.chunks_mut(ROW_TILE)) {
        write_outputs(&multiply(panel, x.codes(0)), x, 0, w.scale(), out);
    }
}

/// The product of many tokens, in blocks of at most `BLOCK`: `multiply(panel, block, sums)` gives the sums of one panel for
/// `sums.len()` tokens, whose codes are interleaved in `block`: `[columns / 4, num_tokens, 4]`.
///
/// ```text
/// for chunk of tokens that fits the cache:      interleave it, once for all panels
///     for panel of 32 rows:                     read from memory once a chunk
///         for block of tokens in chunk:         the panel stays in the first-level cache
/// ```
#[inline(always)]
fn gemm_by_blocks<const BLOCK: usize>(
    w: &PackedRows<'_>,
    x: &QuantizedActivations<'_>,
    out: &mut ColumnsMut<'_>,
    multiply: impl Fn(&[u8], &[i8], &mut [PanelSums]),
) {
    super::check_gemm(w, x, out);
    let cols = w.cols().next_multiple_of(COLUMN_TILE);
    let chunk_tokens = (CHUNK_BYTES / (BLOCK * cols)).max(1) * BLOCK;
    let mut interleaved = INTERLEAVED.take();
    let mut sums = [[0; ROW_TILE]; BLOCK];
    for first in (0..x.num_tokens()).step_by(chunk_tokens) {
        let end = x.num_tokens().min(first + chunk_tokens);
        interleave::<BLOCK>(x, first..end, cols, &mut interleaved);
        for (panel_index, panel) in w.panels().enumerate() {
            let row = panel_index * ROW_TILE;
            let rows = row..w.rows().min(row + ROW_TILE);
            for (block_index, block) in interleaved.chunks(BLOCK * cols).enumerate() {
                let sums = &mut sums[..block.len() / cols];
                multiply(panel, block, sums);
                for (token, sums) in (first + block_index * BLOCK..).zip(sums) {
                    write_outputs(sums, x, token, w.scale(), &mut out.row_mut(token)[rows.clone()]);
                }
            }
        }
    }
    INTERLEAVED.set(interleaved);
}

/// Arranges `tokens` as blocks `[columns / 4, num_tokens, 4]`: what one step of a kernel multiplies lies together.
fn interleave<const BLOCK: usize>(
    x: &QuantizedActivations<'_>,
    tokens: std::ops::Range<usize>,
    cols: usize,
    interleaved: &mut Vec<i8>,
) {
    interleaved.resize(tokens.len() * cols, 0);
    for (block, first) in interleaved.chunks_mut(BLOCK * cols).zip(tokens.step_by(BLOCK)) {
        let num_tokens = block.len() / cols;
        let words = block.as_chunks_mut::<4>().0;
        for index in 0..num_tokens {
            let codes = x.codes(first + index)[..cols].as_chunks::<4>().0;
            for (word, codes) in words[index..].iter_mut().step_by(num_tokens).zip(codes) {
                *word = *codes;
            }
        }
    }
}

/// Codes are weight + 1, so the sum of the activations is taken off; then the epilogue.
#[inline(always)]
fn write_outputs(sums: &PanelSums, x: &QuantizedActivations<'_>, token: usize, scale: f32, out: &mut [f32]) {
    let (sum_of_codes, s) = (x.sums()[token], x.scales()[token]);
    let values = sums.map(|sum| epilogue(sum - sum_of_codes, s, scale));
    out.copy_from_slice(&values[..out.len()]);
}
