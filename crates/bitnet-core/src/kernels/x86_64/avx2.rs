//! AVX2 without VNNI: `vpmaddubsw` adds pairs of products of unsigned codes and signed activations in 16 bits. From a block of
//! tokens on nothing is multiplied: [`avx2_tables`].
//!
//! The sums of 16 bits are exact because they are flushed into sums of 32 bits in time: a product is at most 2 * 128, a pair
//! 512, and after [`FLUSH_TILES`] tiles, 4 pairs each, a lane holds at most 60 * 512 = 30,720 < 32,768.
#![allow(unsafe_code)]

use std::arch::{
    asm,
    x86_64::{
        __m256i, _mm_loadu_si128, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_cvtepi8_epi16,
        _mm256_hadd_epi32, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_permute4x64_epi64, _mm256_set1_epi8,
        _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_epi64x, _mm256_setzero_si256, _mm256_srai_epi32,
    },
};

use super::{
    PanelSums,
    ahead::Ahead,
    avx2_tables, by_tokens, equal_blocks, gemm_by_blocks, gemv_by_panels, num_tiles, screen_by_blocks,
    tiles_256::{QUARTER_BYTES, add_quarters, broadcast, load, lowest_codes, prefetch_quarters, shift_codes},
};
use crate::{
    kernels::{
        Isa, Output, TernaryKernel, check_gemm, check_gemv, check_screen,
        packing::{PackedLayout, PackedRows, ROW_TILE, TILE_BYTES},
        screen::{ActivationBits, ScreenRows, ScreensMut, SplitActivations},
    },
    quant::activation::QuantizedActivations,
    threads::ColumnsMut,
};

/// Packed panels: a quarter's 12 sums of 16 bits leave registers for codes, activations and products.
const BLOCK: usize = 12;

/// Tokens of a block of the screen, each with two halves: 2 x 6 sums.
const SCREEN_BLOCK: usize = 6;

/// Tiles between two flushes; see the bound above.
const FLUSH_TILES: usize = 15;

/// Steps of the screen between two flushes; the bound is at [`screen_gemm`].
const SCREEN_FLUSH_STEPS: usize = 256;

/// Proof that this CPU has AVX2, FMA and F16C: only [`detect`] makes one.
#[derive(Debug)]
struct Avx2 {
    isa: Isa,
}

/// The kernel, on a CPU that has its instructions.
pub(super) fn detect() -> Option<&'static dyn TernaryKernel> {
    static KERNEL: std::sync::OnceLock<Avx2> = std::sync::OnceLock::new();
    Isa::avx2_fma().map(|isa| KERNEL.get_or_init(|| Avx2 { isa }) as &dyn TernaryKernel)
}

impl TernaryKernel for Avx2 {
    fn name(&self) -> &'static str {
        "x86_64-avx2"
    }

    fn layouts(&self) -> &'static [PackedLayout] {
        &[PackedLayout::T32x2Bit]
    }

    fn isa(&self) -> Isa {
        self.isa
    }

    fn gemv(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
        check_gemv(self, w, x, out);
        // SAFETY: `self` exists only where `detect` saw every feature that is enabled there.
        unsafe { gemv(w, x, out) }
    }

    fn screen(&self, w: &ScreenRows<'_>, x: &SplitActivations<'_>, out: &mut ScreensMut<'_>) {
        check_screen(w, x, out);
        // SAFETY: as in `gemv`.
        unsafe { screen(w, x, out) }
    }

    fn multiply_registers(&self, rounds: u32) -> u64 {
        // SAFETY: as in `gemv`.
        unsafe { multiply_registers(rounds) }
    }

    fn block_tokens(&self, num_tokens: usize) -> usize {
        block_tokens(num_tokens)
    }

    fn min_tiles(&self, num_tokens: usize) -> usize {
        if tokens_in_tables(num_tokens) > 0 { avx2_tables::MIN_PANELS } else { 1 }
    }

    fn gemm(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
        check_gemm(self, w, x, out);
        // SAFETY: as above.
        unsafe { gemm(w, x, out, output) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn gemv(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
    // One token's interleaved codes are its codes.
    gemv_by_panels(w, x, out, |panel, ahead, codes, sums| panel_gemm::<1, 4>(panel, ahead, codes, sums));
}

/// How many of so many tokens tables serve, the first ones: blocks, of which the last may lack a few, for it takes as long whatever
/// is missing. (On a Zen 3 core a whole block takes 0.78 to 0.82 of the time that multiplying its tokens takes.)
fn tokens_in_tables(num_tokens: usize) -> usize {
    let rest = num_tokens % avx2_tables::BLOCK;
    if 100 * rest > 82 * avx2_tables::BLOCK { num_tokens } else { num_tokens - rest }
}

fn block_tokens(num_tokens: usize) -> usize {
    if tokens_in_tables(num_tokens) > 0 { avx2_tables::BLOCK } else { equal_blocks(num_tokens, BLOCK) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn gemm(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
    let num_tokens = x.num_tokens();
    let in_tables = tokens_in_tables(num_tokens);
    if in_tables > 0 {
        avx2_tables::gemm(w, &x.tokens(0..in_tables), &mut out.rows(0..in_tables), output);
    }
    if in_tables == num_tokens {
        return;
    }
    let (x, mut out) = (x.tokens(in_tables..num_tokens), out.rows(in_tables..num_tokens));
    let block_tokens = block_tokens(x.num_tokens());
    gemm_by_blocks(w, &x, (&mut out, output), block_tokens, None, |panel, ahead, block, sums| match sums.len() {
        1 => panel_gemm::<1, 4>(panel, ahead, block, sums),
        n @ 2..=4 => by_tokens!(n, [2 3 4], panel_gemm::<N, 2>(panel, ahead, block, sums)),
        n => by_tokens!(n, [5 6 7 8 9 10 11 12], panel_gemm::<N, 1>(panel, ahead, block, sums)),
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
fn screen(w: &ScreenRows<'_>, x: &SplitActivations<'_>, out: &mut ScreensMut<'_>) {
    assert_eq!(x.bits(), ActivationBits::Fourteen, "halves to join");
    let join = |block: &mut [i8]| join_halves(block);
    screen_by_blocks(w, x, out, 2 * SCREEN_BLOCK, Some(&join), |panel, ahead, block, sums| match sums.len() {
        2 => screen_gemm::<1, 4>(panel, ahead, block, sums),
        4 => screen_gemm::<2, 2>(panel, ahead, block, sums),
        n => by_tokens!(n / 2, [3 4 5 6], screen_gemm::<N, 1>(panel, ahead, block, sums)),
    });
}

/// ```text
/// for run of 15 tiles:                                      2 KB, which the first `Q` quarters bring into the first-level cache
///     for `Q` quarters of 8 rows:
///         for tile, plane of 4 columns, token: narrow[token] += plane of codes * activations          16 bits
///         out[token] += pairs of narrow[token]                                                        32 bits
/// ```
#[target_feature(enable = "avx2")]
fn panel_gemm<const N: usize, const Q: usize>(panel: &[u8], ahead: Ahead, block: &[i8], out: &mut [PanelSums]) {
    let num_tiles = num_tiles(panel, block, 4, N);
    let ahead = ahead.in_runs(num_tiles);
    let (mask, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi16(1));
    out.fill([0; ROW_TILE]);
    for first in (0..num_tiles).step_by(FLUSH_TILES) {
        for first_quarter in (0..4).step_by(Q) {
            let mut narrow = [[_mm256_setzero_si256(); Q]; N];
            for tile in first..num_tiles.min(first + FLUSH_TILES) {
                if first_quarter == 0 {
                    ahead.prefetch::<2>(tile);
                }
                // SAFETY: the tile's 128 bytes lie inside the panel.
                let mut quarters: [_; Q] = unsafe { load(panel, tile, first_quarter) };
                for plane in 0..4 {
                    let weights = lowest_codes(quarters, mask);
                    shift_codes(&mut quarters);
                    optimization_barrier(&mut quarters);
                    for (token, narrow) in narrow.iter_mut().enumerate() {
                        // SAFETY: 16 codes a tile and token, checked by `num_tiles`.
                        let x = unsafe { broadcast(block, (4 * tile + plane) * N + token) };
                        for (narrow, weights) in narrow.iter_mut().zip(weights) {
                            *narrow = _mm256_add_epi16(*narrow, _mm256_maddubs_epi16(weights, x));
                        }
                    }
                }
            }
            for (out, mut sums) in out.iter_mut().zip(narrow) {
                for sums in &mut sums {
                    *sums = _mm256_madd_epi16(*sums, ones);
                }
                add_quarters(sums, first_quarter, out);
            }
        }
    }
}

/// No instruction, but the compiler does not know: it would decode all planes of a tile before it multiplies the first, and keep sums
/// in memory for want of registers.
#[target_feature(enable = "avx2")]
#[inline]
fn optimization_barrier<const Q: usize>(quarters: &mut [__m256i; Q]) {
    for quarter in quarters {
        // SAFETY: no instruction at all.
        unsafe { asm!("/* {} */", inout(ymm_reg) * quarter, options(pure, nomem, nostack, preserves_flags)) };
    }
}

/// The halves of a step's activations, `[token, 2, 4]` bytes, become their codes of 14 bits, `[token, 4]`: one multiplication
/// in 16 bits then does what two in 8 bits and the addition of their pairs would.
#[target_feature(enable = "avx2")]
fn join_halves(block: &mut [i8]) {
    for codes in block.as_chunks_mut::<8>().0 {
        let [high, low] = [0, 4].map(|half| std::array::from_fn::<_, 4, _>(|code| i16::from(codes[half + code])));
        for ((bytes, high), low) in codes.as_chunks_mut::<2>().0.iter_mut().zip(high).zip(low) {
            *bytes = (128 * high + low).to_ne_bytes().map(u8::cast_signed);
        }
    }
}

/// ```text
/// for `Q` quarters of 8 rows, run of 256 steps:
///     for step of 4 columns, token: sums[token] += codes[step] * activations[step][token]
/// ```
/// Signed weights of 8 bits and activations that [`join_halves`] has joined; `out` has sums of high and low halves. A sum of a
/// row's even or odd pairs is at most 256 * 2 * 127 * 16,383 < 2^30.
#[target_feature(enable = "avx2")]
fn screen_gemm<const N: usize, const Q: usize>(panel: &[u8], ahead: Ahead, block: &[i8], out: &mut [PanelSums]) {
    let num_steps = num_tiles(panel, block, 1, 2 * N);
    out.fill([0; ROW_TILE]);
    for first_quarter in (0..4).step_by(Q) {
        let ahead = ahead.part(first_quarter / Q, 4 / Q);
        for first in (0..num_steps).step_by(SCREEN_FLUSH_STEPS) {
            let mut sums = [[[_mm256_setzero_si256(); 2]; Q]; N];
            for step in first..num_steps.min(first + SCREEN_FLUSH_STEPS) {
                // SAFETY: the step's 128 bytes lie inside the panel.
                let weights: [[_; 2]; Q] = unsafe { load_wide(panel, step, first_quarter) };
                prefetch_quarters::<Q>(ahead, num_steps, step);
                for (token, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: 8 bytes a step and token, checked by `num_tiles`.
                    let x = unsafe { broadcast_four(block, step * N + token) };
                    for (sums, weights) in sums.iter_mut().zip(weights) {
                        for (sums, weights) in sums.iter_mut().zip(weights) {
                            *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(weights, x));
                        }
                    }
                }
            }
            for (out, sums) in out.as_chunks_mut::<2>().0.iter_mut().zip(sums) {
                // Two sums a row, four rows a vector: side by side, in the order of the rows.
                let rows =
                    sums.map(|[low, high]| _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_hadd_epi32(low, high)));
                let low_bits = _mm256_set1_epi32(127);
                add_quarters(rows.map(|rows| _mm256_srai_epi32::<7>(rows)), first_quarter, &mut out[0]);
                add_quarters(rows.map(|rows| _mm256_and_si256(rows, low_bits)), first_quarter, &mut out[1]);
            }
        }
    }
}

/// Signed codes of `Q` quarters of a step, widened to 16 bits.
///
/// # Safety
/// As [`load`].
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn load_wide<const Q: usize>(panel: &[u8], step: usize, first: usize) -> [[__m256i; 2]; Q] {
    let bytes = panel.as_ptr().wrapping_add(step * TILE_BYTES + QUARTER_BYTES * first);
    let mut quarters = [[_mm256_setzero_si256(); 2]; Q];
    for (index, quarter) in quarters.as_flattened_mut().iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let codes = unsafe { _mm_loadu_si128(bytes.add(QUARTER_BYTES / 2 * index).cast()) };
        *quarter = _mm256_cvtepi8_epi16(codes);
    }
    quarters
}

/// Four codes of 14 bits, again and again.
///
/// # Safety
/// `codes` must hold the eight bytes of index `index`.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn broadcast_four(codes: &[i8], index: usize) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi64x(unsafe { codes.as_ptr().cast::<i64>().add(index).read_unaligned() })
}

/// A product and the addition of its pairs: what a multiply-accumulate takes at least without VNNI. In assembly, for a
/// compiler would see that every product is the same.
#[target_feature(enable = "avx2")]
fn multiply_registers(rounds: u32) -> u64 {
    const NUM_SUMS: usize = 12;
    let mut sums = [_mm256_setzero_si256(); NUM_SUMS];
    let (weights, x) = (_mm256_set1_epi8(1), _mm256_set1_epi8(1));
    for _ in 0..rounds {
        for sum in &mut sums {
            // SAFETY: arithmetic on registers alone.
            unsafe {
                asm!(
                    "vpmaddubsw {pairs}, {weights}, {x}",
                    "vpaddw {sum}, {sum}, {pairs}",
                    pairs = out(ymm_reg) _, weights = in(ymm_reg) weights, x = in(ymm_reg) x, sum = inout(ymm_reg) *sum,
                    options(pure, nomem, nostack),
                );
            }
        }
    }
    std::hint::black_box(sums);
    u64::from(rounds) * (NUM_SUMS * 32) as u64
}
