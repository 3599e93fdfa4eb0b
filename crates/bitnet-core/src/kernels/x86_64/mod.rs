//! Kernels for x86-64, one instruction set a file, and what they share: the walk over panels and blocks of tokens, and the
//! epilogue. The shared code is always inlined, so that it is compiled for the instruction set of its caller. Those without
//! AVX-512 also share the reading of tiles, [`tiles_256`].

mod ahead;
mod avx2;
mod avx2_tables;
mod avx512_sparse;
mod avx512_vbmi;
mod avx512_vnni;
mod avx_vnni;
mod tiles_256;

use std::{cell::Cell, ops::RangeInclusive};

use ahead::Ahead;

use super::{
    Output, TernaryKernel,
    aligned::AlignedVec,
    epilogue,
    interleave::interleave,
    packing::{PackedRows, ROW_TILE, TILE_BYTES, rows_of_tiles},
    prefetch_all,
    screen::{ScreenRows, ScreensMut, SplitActivations},
};
use crate::{
    quant::activation::{QuantizedActivations, Version},
    threads::ColumnsMut,
};

/// What this CPU can run, slowest first.
pub(super) fn detect() -> impl Iterator<Item = &'static dyn TernaryKernel> {
    [avx2::detect(), avx_vnni::detect(), avx512_vnni::detect()].into_iter().flatten()
}

#[cfg(test)]
pub(super) use avx512_vnni::without_gfni;

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
    ($n:expr, [$($count:literal)*], $function:ident::<N, $flag:tt> $arguments:tt) => {
        match $n {
            $($count => $function::<$count, $flag> $arguments,)*
            n => unreachable!("a block of {n} tokens"),
        }
    };
}
use by_tokens;

/// Rows of codes of a block at most.
const MAX_BLOCK: usize = 12;

/// Scratch of the product in progress, kept between products.
#[derive(Default)]
struct Scratch {
    interleaved: Interleaved,
    unpacked: AlignedVec<u8>,
}

/// Activations as blocks `[columns / 4, block_rows, 4]`: what one step of a kernel multiplies lies together.
#[derive(Default)]
struct Interleaved {
    codes: AlignedVec<i8>,
    /// What they are, for the next product with the same.
    of: Option<InterleavedOf>,
}

#[derive(PartialEq)]
struct InterleavedOf {
    version: Version,
    /// The first of the rows: a part of a buffer has the version of the whole.
    first: *const i8,
    num_rows: usize,
    block_rows: usize,
    cols: usize,
    /// Whether they were then changed, which one kernel does.
    is_prepared: bool,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// The product of one token: `multiply(panel, ahead, codes, sums)` sets the sums of one panel.
#[inline(always)]
fn gemv_by_panels(
    w: &PackedRows<'_>,
    x: &QuantizedActivations<'_>,
    out: &mut [f32],
    multiply: impl Fn(&[u8], Ahead, &[i8], &mut [PanelSums]),
) {
    let asks = w.asks_ahead(1);
    let mut sums = [[0; ROW_TILE]];
    for (panel, out) in w.panels().zip(out.chunks_mut(ROW_TILE)) {
        multiply(panel, Ahead::of(panel, asks), x.codes(0), &mut sums);
        write_outputs(&sums[0], x, 0, w.scale(), (out, Output::Replace));
    }
}

/// `(panel, unpacked, ahead, block, sums)`: sets the sums of one panel and block, and writes the panel's tiles as
/// `[columns / 4, 32 rows, 4]` codes {0, 1, 2}.
type Unpack<'f> = &'f dyn Fn(&[u8], &mut [u8], Ahead, &[i8], &mut [PanelSums]);

/// The product of many tokens, in blocks of `block_tokens`. `multiply(panel, ahead, block, sums)` sets the sums of one panel and
/// block. With `unpack`, which takes the first block, it gets unpacked panels.
///
/// ```text
/// interleave all tokens, once for all panels, where the caller has not done it for all workers
/// for panel of 32 rows:                     read from memory once
///     for block of tokens:                  the panel, unpacked by the first, stays in the second-level cache
/// ```
#[inline(always)]
fn gemm_by_blocks(
    w: &PackedRows<'_>,
    x: &QuantizedActivations<'_>,
    (out, output): (&mut ColumnsMut<'_>, Output),
    block_tokens: usize,
    unpack: Option<Unpack<'_>>,
    multiply: impl Fn(&[u8], Ahead, &[i8], &mut [PanelSums]),
) {
    let (num_tokens, width) = (x.num_tokens(), x.codes(0).len());
    let unpacked_len = ROW_TILE * w.cols().next_multiple_of(w.layout().column_tile());
    let num_blocks = num_tokens.div_ceil(block_tokens);
    let asks = w.asks_ahead(num_tokens);
    let mut sums = [[0; ROW_TILE]; MAX_BLOCK];
    let mut scratch = SCRATCH.take();
    let Scratch { interleaved, unpacked } = &mut scratch;
    let of = (x.version(), num_tokens, block_tokens, width);
    let interleaved = x.blocks(block_tokens).unwrap_or_else(|| interleaved.get(of, |token| x.codes(token), None));
    for (panel_index, panel) in w.panels().enumerate() {
        let rows = rows_of_tiles(panel_index..panel_index + 1, w.rows());
        let mut codes = panel;
        let ahead = Ahead::of(panel, asks);
        for (index, block) in interleaved.chunks(block_tokens * width).enumerate() {
            let sums = &mut sums[..block.len() / width];
            let ahead = ahead.part(index, num_blocks);
            if output == Output::Add {
                // They are a row of a large matrix apart.
                for token in index * block_tokens..index * block_tokens + sums.len() {
                    prefetch_all(&out.row_mut(token)[rows.clone()]);
                }
            }
            match unpack {
                Some(unpack) if index == 0 => {
                    let unpacked = unpacked.at_least(unpacked_len);
                    unpack(panel, unpacked, ahead, block, sums);
                    codes = unpacked;
                }
                _ => multiply(codes, ahead, block, sums),
            }
            for (token, sums) in (index * block_tokens..).zip(sums) {
                write_outputs(sums, x, token, w.scale(), (&mut out.row_mut(token)[rows.clone()], output));
            }
        }
    }
    SCRATCH.set(scratch);
}

/// Changes interleaved activations as a kernel likes them.
type Prepare<'f> = &'f dyn Fn(&mut [i8]);

/// The screen of some tokens, in blocks of at most `block` rows of codes: `multiply(panel, ahead, block, sums)` sets the sums
/// of one panel for them, interleaved as tokens are, and as `prepare` leaves them.
#[inline(always)]
fn screen_by_blocks(
    w: &ScreenRows<'_>,
    x: &SplitActivations<'_>,
    out: &mut ScreensMut<'_>,
    block: usize,
    prepare: Option<Prepare<'_>>,
    multiply: impl Fn(&[u8], Ahead, &[i8], &mut [PanelSums]),
) {
    let cols = w.cols().next_multiple_of(4);
    let num_tokens = x.num_tokens();
    let code_rows = x.code_rows();
    let block_tokens = equal_blocks(num_tokens, block / code_rows);
    let num_blocks = num_tokens.div_ceil(block_tokens);
    let mut sums = [[0; ROW_TILE]; MAX_BLOCK];
    let mut scratch = SCRATCH.take();
    let of = (x.version(), code_rows * num_tokens, code_rows * block_tokens, cols);
    let interleaved = scratch.interleaved.get(of, |row| x.codes(row), prepare);
    for (panel_index, (panel, bounds)) in w.panels().enumerate() {
        let ahead = Ahead::of(panel, w.asks_ahead(num_tokens));
        for (index, block) in interleaved.chunks(code_rows * block_tokens * cols).enumerate() {
            let sums = &mut sums[..block.len() / cols];
            multiply(panel, ahead.part(index, num_blocks), block, sums);
            for (token, sums) in (index * block_tokens..).zip(sums.chunks_exact(code_rows)) {
                let sums = match *sums {
                    [high, low] => [high, low],
                    _ => [x.outlier_sums(token, panel), sums[0]],
                };
                out.write(token, panel_index, &sums, bounds, x.row(token));
            }
        }
    }
    SCRATCH.set(scratch);
}

/// Tokens of a block when all blocks have the same, and at most `most`: a small one would not fill the registers.
#[inline(always)]
fn equal_blocks(num_tokens: usize, most: usize) -> usize {
    num_tokens.div_ceil(num_tokens.div_ceil(most).max(1)).max(1)
}

impl Interleaved {
    /// The rows `codes(0..num_rows)`, of `cols` columns, in blocks of `block_rows`.
    #[inline(always)]
    fn get<'a>(
        &mut self,
        (version, num_rows, block_rows, cols): (Version, usize, usize, usize),
        codes: impl Fn(usize) -> &'a [i8],
        prepare: Option<Prepare<'_>>,
    ) -> &[i8] {
        let (first, is_prepared) = (codes(0).as_ptr(), prepare.is_some());
        let of = Some(InterleavedOf { version, first, num_rows, block_rows, cols, is_prepared });
        if self.of != of {
            self.of = None;
            let interleaved = self.codes.at_least(num_rows * cols);
            interleave(block_rows, cols, codes, interleaved);
            if let Some(prepare) = prepare {
                prepare(interleaved);
            }
            self.of = of;
        }
        &self.codes[..num_rows * cols]
    }
}

/// The outputs of a panel's rows, of which the last may be padding.
#[inline(always)]
fn write_outputs(
    sums: &PanelSums,
    x: &QuantizedActivations<'_>,
    token: usize,
    scale: f32,
    (out, output): (&mut [f32], Output),
) {
    let (sum_of_codes, s) = (x.sums()[token], x.scales()[token]);
    // What is not written there at once, but kept and then copied, is copied by a call.
    match (out.as_mut_array(), output) {
        (Some(out), Output::Replace) => scale_sums::<false>(sums, sum_of_codes, s, scale, out),
        (Some(out), Output::Add) => scale_sums::<true>(sums, sum_of_codes, s, scale, out),
        (None, _) => {
            let mut values = [0.0; ROW_TILE];
            scale_sums::<false>(sums, sum_of_codes, s, scale, &mut values);
            for (out, value) in out.iter_mut().zip(values) {
                *out = if output == Output::Add { *out + value } else { value };
            }
        }
    }
}

/// Codes are weight + 1, so the sum of the activations is taken off; then the epilogue. `ADD`s to `out`, or replaces it.
#[inline(always)]
fn scale_sums<const ADD: bool>(sums: &PanelSums, sum_of_codes: i32, s: f32, scale: f32, out: &mut [f32; ROW_TILE]) {
    // Loops, not closures: only what is inlined is compiled for the instruction set.
    if DIVISORS.contains(&s) {
        let divisor = Divisor::new(s);
        for (out, sum) in out.iter_mut().zip(sums) {
            let value = divisor.divide((sum - sum_of_codes) as f32) * scale;
            *out = if ADD { *out + value } else { value };
        }
    } else {
        for (out, sum) in out.iter_mut().zip(sums) {
            let value = epilogue(sum - sum_of_codes, s, scale);
            *out = if ADD { *out + value } else { value };
        }
    }
}

/// What [`Divisor`] divides by: nothing it computes leaves the normal numbers when the dividend is an integer.
const DIVISORS: RangeInclusive<f32> = 1.0 / (1_u64 << 40) as f32..=(1_u64 << 40) as f32;

/// Divides many numbers by one, to the bit of a division, by multiplying: every output of a product is divided, and these CPUs
/// begin a multiplication each cycle, but a division only every few.
///
/// `q`, the dividend times a reciprocal of twice the precision, is the quotient or a neighbour of it: off by half a place, for
/// the last rounding, and 2^-23 of one for those before. So the remainder `a - q s` is exact, and the quotient is what
/// `q + remainder * reciprocal` rounds to, because the reciprocal is a rounded one (Markstein, "Computation of elementary
/// functions on the IBM RISC System/6000 processor", 1990, theorem 8).
struct Divisor {
    s: f32,
    reciprocal: f32,
    /// What the reciprocal is short of.
    rest: f32,
}

impl Divisor {
    #[inline(always)]
    fn new(s: f32) -> Self {
        let reciprocal = 1.0 / s;
        Self { s, reciprocal, rest: (-reciprocal).mul_add(s, 1.0) * reciprocal }
    }

    #[inline(always)]
    fn divide(&self, a: f32) -> f32 {
        let q = a.mul_add(self.reciprocal, a * self.rest);
        let remainder = (-q).mul_add(self.s, a);
        remainder.mul_add(self.reciprocal, q)
    }
}

/// What the unchecked loads of a kernel rely on: tiles of `planes` planes, and codes for all of them and `n` tokens.
#[inline(always)]
fn num_tiles(panel: &[u8], block: &[i8], planes: usize, n: usize) -> usize {
    let num_tiles = panel.len() / TILE_BYTES;
    assert!(block.len() >= num_tiles * 4 * planes * n, "codes of {n} tokens are padded to whole tiles");
    num_tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reciprocal_gives_the_bits_of_the_division() {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(0xda94_2042_e4dd_58b5).wrapping_add(0x9e37_79b9);
            (state >> 33) as u32
        };
        let extremes = [*DIVISORS.start(), *DIVISORS.end(), 1.0, 127.0 / 1e-5, 1.999_999_9, 1.000_000_1, 3.0];
        for round in 0..300_000 {
            // All mantissas, and the exponents of the range.
            let random = f32::from_bits((87 + next() % 80) << 23 | next() & 0x7f_ffff);
            let s = extremes.get(round % 1000).copied().unwrap_or(random);
            let divisor = Divisor::new(s);
            let integers = [0, 1, -1, i32::MAX, i32::MIN, 1 << 24].map(|sum| sum as f32);
            let any: [f32; 10] = std::array::from_fn(|_| (next().cast_signed() >> (next() % 31)) as f32);
            // Quotients as close as can be to where the rounding changes.
            let close: [f32; 10] = std::array::from_fn(|_| {
                let halfway = 1.0 + f64::from(next() & 0x7f_ffff) / 8_388_608.0 + 1.0 / 16_777_216.0;
                f32::from_bits(((halfway * f64::from(s)) as f32).to_bits().wrapping_add(next() % 3).wrapping_sub(1))
            });
            for a in integers.into_iter().chain(any).chain(close) {
                assert_eq!(divisor.divide(a).to_bits(), (a / s).to_bits(), "{a} / {s}");
            }
        }
    }
}
