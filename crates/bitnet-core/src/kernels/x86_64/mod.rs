//! Kernels for x86-64, one instruction set a file, and what they share: the walk over panels and blocks of tokens, and the
//! epilogue. The shared code is always inlined, so that it is compiled for the instruction set of its caller.

mod avx2;
mod avx512_sparse;
mod avx512_vbmi;
mod avx512_vnni;
mod avx_vnni;

use std::cell::Cell;

use super::{
    TernaryKernel, epilogue,
    packing::{PackedRows, ROW_TILE, TILE_BYTES},
    screen::{ScreenRows, SplitActivations},
    write_screen,
};
use crate::{quant::activation::QuantizedActivations, threads::ColumnsMut};

/// What this CPU can run, slowest first.
pub(super) fn detect() -> impl Iterator<Item = &'static dyn TernaryKernel> {
    [avx2::detect(), avx_vnni::detect(), avx512_vnni::detect()].into_iter().flatten()
}

/// Sums of products of a panel's rows.
type PanelSums = [i32; ROW_TILE];

/// Calls `$function::<N> $arguments` with the constant `N`, one of the list, that equals `$n`.
macro_rules! by_tokens {
    ($n:expr, [$($count:literal)*], $function:ident::<N> $arguments:tt) => {
        match $n {
            $($count => $function::<$count> $arguments,)*
            n => unreachable!("a block of {n} tokens"),
        }
    };
    ($n:expr, [$($count:literal)*], $function:ident::<N, $flag:literal> $arguments:tt) => {
        match $n {
            $($count => $function::<$count, $flag> $arguments,)*
            n => unreachable!("a block of {n} tokens"),
        }
    };
}
use by_tokens;

/// How far ahead weights are asked for. The hardware's own prefetcher alone leaves a third of the bandwidth unused.
const PREFETCH_BYTES: usize = 8192;

/// Scratch of the product in progress, kept between products.
#[derive(Default)]
struct Scratch {
    interleaved: Vec<i8>,
    unpacked: Vec<u8>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// The product of one token: `multiply(panel, codes)` gives the sums of one panel.
#[inline(always)]
fn gemv_by_panels(
    w: &PackedRows<'_>,
    x: &QuantizedActivations<'_>,
    out: &mut [f32],
    multiply: impl Fn(&[u8], &[i8]) -> PanelSums,
) {
    for (panel, out) in w.panels().zip(out.chunks_mut(ROW_TILE)) {
        write_outputs(&multiply(panel, x.codes(0)), x, 0, w.scale(), out);
    }
}

/// Writes a packed panel as `[columns / 4, 32 rows, 4]` codes {0, 1, 2}.
type Unpack<'f> = &'f dyn Fn(&[u8], &mut [u8]);

/// The product of many tokens, in blocks of at most `block`. With `unpack`, `multiply` gets unpacked panels.
///
/// ```text
/// interleave all tokens, once for all panels
/// for panel of 32 rows:                     read from memory once
///     unpack it, where there are blocks enough to share the work
///     for block of tokens:                  the panel stays in the first or second-level cache
/// ```
#[inline(always)]
fn gemm_by_blocks(
    w: &PackedRows<'_>,
    x: &QuantizedActivations<'_>,
    out: &mut ColumnsMut<'_>,
    block: usize,
    unpack: Option<Unpack<'_>>,
    multiply: impl Fn(&[u8], &[i8], &mut [PanelSums]),
) {
    let cols = w.cols().next_multiple_of(w.layout().column_tile());
    // Blocks of one size: a small one would not fill the registers.
    let num_tokens = x.num_tokens();
    let block_tokens = num_tokens.div_ceil(num_tokens.div_ceil(block).max(1)).max(1);
    let mut scratch = SCRATCH.take();
    interleave(num_tokens, block_tokens, cols, |token| x.codes(token), &mut scratch.interleaved);
    scratch.unpacked.resize(ROW_TILE * cols, 0);
    let mut sums = [[0; ROW_TILE]; MAX_BLOCK];
    for (panel_index, mut panel) in w.panels().enumerate() {
        let rows = panel_index * ROW_TILE..w.rows().min((panel_index + 1) * ROW_TILE);
        if let Some(unpack) = unpack {
            unpack(panel, &mut scratch.unpacked);
            panel = &scratch.unpacked;
        }
        for (block_index, block) in scratch.interleaved.chunks(block_tokens * cols).enumerate() {
            let sums = &mut sums[..block.len() / cols];
            multiply(panel, block, sums);
            for (token, sums) in (block_index * block_tokens..).zip(sums) {
                write_outputs(sums, x, token, w.scale(), &mut out.row_mut(token)[rows.clone()]);
            }
        }
    }
    SCRATCH.set(scratch);
}

/// The screen of some tokens, in blocks of at most `block`: `multiply(panel, block, sums)` gives the sums of one panel for
/// pairs of high and low halves, interleaved as tokens are.
#[inline(always)]
fn screen_by_blocks(
    w: &ScreenRows<'_>,
    x: &SplitActivations<'_>,
    estimates: &mut ColumnsMut<'_>,
    radii: &mut ColumnsMut<'_>,
    block: usize,
    multiply: impl Fn(&[u8], &[i8], &mut [PanelSums]),
) {
    let cols = w.cols().next_multiple_of(4);
    let num_tokens = x.num_tokens();
    let block_tokens = num_tokens.div_ceil(num_tokens.div_ceil(block).max(1)).max(1);
    let mut scratch = SCRATCH.take();
    interleave(2 * num_tokens, 2 * block_tokens, cols, |half| x.halves(half), &mut scratch.interleaved);
    let mut sums = [[0; ROW_TILE]; MAX_BLOCK];
    for (panel_index, (panel, bounds)) in w.panels().enumerate() {
        let rows = panel_index * ROW_TILE..w.rows().min((panel_index + 1) * ROW_TILE);
        for (block_index, block) in scratch.interleaved.chunks(2 * block_tokens * cols).enumerate() {
            let sums = &mut sums[..block.len() / cols];
            multiply(panel, block, sums);
            for (token, sums) in (block_index * block_tokens..).zip(sums.as_chunks().0) {
                let (estimates, radii) = (estimates.row_mut(token), radii.row_mut(token));
                let (estimates, radii) = (&mut estimates[rows.clone()], &mut radii[rows.clone()]);
                write_screen(sums, bounds, x.row(token), estimates, radii);
            }
        }
    }
    SCRATCH.set(scratch);
}

/// The most tokens of any kernel's block.
const MAX_BLOCK: usize = 12;

/// Arranges rows of codes as blocks `[columns / 4, block_rows, 4]`: what one step of a kernel multiplies lies together.
#[inline(always)]
fn interleave<'a>(
    num_rows: usize,
    block_rows: usize,
    cols: usize,
    codes: impl Fn(usize) -> &'a [i8],
    interleaved: &mut Vec<i8>,
) {
    interleaved.resize(num_rows * cols, 0);
    for (block, first) in interleaved.chunks_mut(block_rows * cols).zip((0..num_rows).step_by(block_rows)) {
        let rows = block.len() / cols;
        let words = block.as_chunks_mut::<4>().0;
        for row in 0..rows {
            let codes = codes(first + row)[..cols].as_chunks::<4>().0;
            for (words, codes) in words.chunks_exact_mut(rows).zip(codes) {
                words[row] = *codes;
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

/// What the unchecked loads of a kernel rely on: tiles of `planes` planes, and codes for all of them and `n` tokens.
#[inline(always)]
fn num_tiles(panel: &[u8], block: &[i8], planes: usize, n: usize) -> usize {
    let num_tiles = panel.len() / TILE_BYTES;
    assert!(block.len() >= num_tiles * 4 * planes * n, "codes of {n} tokens are padded to whole tiles");
    num_tiles
}
