//! AVX2 without VNNI: `vpmaddubsw` adds pairs of products of unsigned codes and signed activations in 16 bits.
//!
//! The sums of 16 bits are exact because they are flushed into sums of 32 bits in time: a product is at most 2 * 128, a pair
//! 512, and after [`FLUSH_TILES`] tiles, 4 pairs each, a lane holds at most 60 * 512 = 30,720 < 32,768.
#![allow(unsafe_code)]

use std::arch::{
    asm,
    x86_64::{
        __m256i, _MM_HINT_T0, _mm_prefetch, _mm256_add_epi16, _mm256_add_epi32, _mm256_and_si256, _mm256_loadu_si256,
        _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32,
        _mm256_setzero_si256, _mm256_srli_epi16, _mm256_storeu_si256,
    },
};

use super::{PanelSums, by_tokens, gemm_by_blocks, gemv_by_panels, num_tiles, screen_by_blocks};
use crate::{
    kernels::{
        Isa, TernaryKernel, check_gemm, check_gemv, check_screen,
        packing::{PackedLayout, PackedRows, TILE_BYTES},
        screen::{ScreenRows, SplitActivations},
    },
    quant::activation::QuantizedActivations,
    threads::ColumnsMut,
};

/// Tokens multiplied at once: 2 x 4 sums of 16 bits stay in registers between two flushes.
const BLOCK: usize = 4;

/// Tokens of a block of the screen, each with two halves.
const SCREEN_BLOCK: usize = BLOCK / 2;

/// From here on unpacking costs less than what it takes away from the multiplications beside it.
const UNPACK_FROM: usize = 3;

/// Tiles between two flushes; see the bound above.
const FLUSH_TILES: usize = 15;

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

    fn screen(
        &self,
        w: &ScreenRows<'_>,
        x: &SplitActivations<'_>,
        estimates: &mut ColumnsMut<'_>,
        radii: &mut ColumnsMut<'_>,
    ) {
        check_screen(w, x, estimates, radii);
        // SAFETY: as in `gemv`.
        unsafe { screen(w, x, estimates, radii) }
    }

    fn multiply_registers(&self, rounds: u32) -> u64 {
        // SAFETY: as in `gemv`.
        unsafe { multiply_registers(rounds) }
    }

    fn gemm(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>) {
        check_gemm(self, w, x, out);
        // SAFETY: as above.
        unsafe { gemm(w, x, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn gemv(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
    // One token's interleaved codes are its codes.
    let ahead = w.ahead(1);
    gemv_by_panels(w, x, out, |panel, codes, sums| panel_gemm::<1>(panel, ahead, codes, sums));
}

#[target_feature(enable = "avx2,fma,f16c")]
fn gemm(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>) {
    let ahead = w.ahead(x.num_tokens());
    if x.num_tokens() < UNPACK_FROM {
        gemm_by_blocks(w, x, out, BLOCK, None, |panel, block, sums| {
            by_tokens!(sums.len(), [1 2], panel_gemm::<N>(panel, ahead, block, sums));
        });
    } else {
        let unpack = |panel: &[u8], unpacked: &mut [u8]| unpack(panel, ahead, unpacked);
        gemm_by_blocks(w, x, out, BLOCK, Some(&unpack), |panel, block, sums| {
            by_tokens!(sums.len(), [1 2 3 4], unpacked_gemm::<N>(panel, block, sums));
        });
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn screen(w: &ScreenRows<'_>, x: &SplitActivations<'_>, estimates: &mut ColumnsMut<'_>, radii: &mut ColumnsMut<'_>) {
    let ahead = w.ahead(x.num_tokens());
    screen_by_blocks(w, x, estimates, radii, SCREEN_BLOCK, |panel, block, sums| {
        by_tokens!(sums.len(), [2 4], screen_gemm::<N>(panel, ahead, block, sums));
    });
}

/// ```text
/// for half of 16 rows, run of 15 tiles:
///     for tile, plane of 4 columns, token: narrow[token] += plane of codes * activations     16 bits
///     wide[token] += pairs of narrow[token]                                                  32 bits
/// ```
#[target_feature(enable = "avx2")]
fn panel_gemm<const N: usize>(panel: &[u8], ahead: usize, block: &[i8], out: &mut [PanelSums]) {
    let num_tiles = num_tiles(panel, block, 4, N);
    let (mask, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi16(1));
    for half in 0..2 {
        let mut wide = [[_mm256_setzero_si256(); 2]; N];
        for first in (0..num_tiles).step_by(FLUSH_TILES) {
            let mut narrow = [[_mm256_setzero_si256(); 2]; N];
            for tile in first..num_tiles.min(first + FLUSH_TILES) {
                // SAFETY: the half tile's 64 bytes lie inside the panel.
                let mut quarters = unsafe { load_half_tile(panel, ahead, tile, half) };
                for plane in 0..4 {
                    let weights = quarters.map(|quarter| _mm256_and_si256(quarter, mask));
                    quarters = quarters.map(|quarter| _mm256_srli_epi16::<2>(quarter));
                    for (token, narrow) in narrow.iter_mut().enumerate() {
                        // SAFETY: 16 codes a tile and token, checked by `num_tiles`.
                        let x = unsafe { broadcast(block, (4 * tile + plane) * N + token) };
                        for quarter in 0..2 {
                            let pairs = _mm256_maddubs_epi16(weights[quarter], x);
                            narrow[quarter] = _mm256_add_epi16(narrow[quarter], pairs);
                        }
                    }
                }
            }
            for (wide, narrow) in wide.iter_mut().zip(narrow) {
                for quarter in 0..2 {
                    wide[quarter] = _mm256_add_epi32(wide[quarter], _mm256_madd_epi16(narrow[quarter], ones));
                }
            }
        }
        for (out, wide) in out.iter_mut().zip(wide) {
            add_half(wide, half, out);
        }
    }
}

/// Codes of 2 bits as bytes: `[columns / 4, 32 rows, 4]`.
#[target_feature(enable = "avx2")]
fn unpack(panel: &[u8], ahead: usize, unpacked: &mut [u8]) {
    let mask = _mm256_set1_epi8(3);
    let tiles = unpacked.as_chunks_mut::<{ 4 * TILE_BYTES }>().0;
    assert_eq!(tiles.len(), panel.len() / TILE_BYTES, "tiles of an unpacked panel");
    for (tile, unpacked) in tiles.iter_mut().enumerate() {
        for half in 0..2 {
            // SAFETY: the half tile's 64 bytes lie inside the panel.
            let mut quarters = unsafe { load_half_tile(panel, ahead, tile, half) };
            for step in unpacked.as_chunks_mut::<TILE_BYTES>().0 {
                store_bytes(quarters.map(|quarter| _mm256_and_si256(quarter, mask)), half, step);
                quarters = quarters.map(|quarter| _mm256_srli_epi16::<2>(quarter));
            }
        }
    }
}

/// ```text
/// for half of 16 rows, run of 60 steps:
///     for step of 4 columns, token: narrow[token] += codes[step] * activations[step][token]      16 bits
///     wide[token] += pairs of narrow[token]                                                      32 bits
/// ```
#[target_feature(enable = "avx2")]
fn unpacked_gemm<const N: usize>(panel: &[u8], block: &[i8], out: &mut [PanelSums]) {
    let num_steps = num_tiles(panel, block, 1, N);
    let ones = _mm256_set1_epi16(1);
    for half in 0..2 {
        let mut wide = [[_mm256_setzero_si256(); 2]; N];
        for first in (0..num_steps).step_by(4 * FLUSH_TILES) {
            let mut narrow = [[_mm256_setzero_si256(); 2]; N];
            for step in first..num_steps.min(first + 4 * FLUSH_TILES) {
                // SAFETY: the step's 128 bytes lie inside the panel.
                let weights = unsafe { load_half(panel, step, half) };
                for (token, narrow) in narrow.iter_mut().enumerate() {
                    // SAFETY: 4 codes a step and token, checked by `num_tiles`.
                    let x = unsafe { broadcast(block, step * N + token) };
                    for quarter in 0..2 {
                        let pairs = _mm256_maddubs_epi16(weights[quarter], x);
                        narrow[quarter] = _mm256_add_epi16(narrow[quarter], pairs);
                    }
                }
            }
            for (wide, narrow) in wide.iter_mut().zip(narrow) {
                for quarter in 0..2 {
                    wide[quarter] = _mm256_add_epi32(wide[quarter], _mm256_madd_epi16(narrow[quarter], ones));
                }
            }
        }
        for (out, wide) in out.iter_mut().zip(wide) {
            add_half(wide, half, out);
        }
    }
}

/// As [`unpacked_gemm`] for signed weights of 8 bits and unsigned activations of 7: a pair of products is at most
/// 2 * 127 * 127 = 32,258, so there is room for one only.
#[target_feature(enable = "avx2")]
fn screen_gemm<const N: usize>(panel: &[u8], ahead: usize, block: &[i8], out: &mut [PanelSums]) {
    let num_steps = num_tiles(panel, block, 1, N);
    let ones = _mm256_set1_epi16(1);
    for half in 0..2 {
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for step in 0..num_steps {
            // SAFETY: the step's 128 bytes lie inside the panel.
            let weights = unsafe { load_half_tile(panel, ahead, step, half) };
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: 4 codes a step and token, checked by `num_tiles`.
                let x = unsafe { broadcast(block, step * N + token) };
                for quarter in 0..2 {
                    let fours = _mm256_madd_epi16(_mm256_maddubs_epi16(x, weights[quarter]), ones);
                    sums[quarter] = _mm256_add_epi32(sums[quarter], fours);
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            add_half(sums, half, out);
        }
    }
}

/// [`load_half`], and asks for the weights that come `ahead` bytes later, 0 for none.
///
/// # Safety
/// The tile must lie inside `panel`.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn load_half_tile(panel: &[u8], ahead: usize, tile: usize, half: usize) -> [__m256i; 2] {
    if ahead > 0 {
        let line = panel.as_ptr().wrapping_add(tile * TILE_BYTES + 64 * half + ahead / 2);
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    }
    // SAFETY: the caller's promise.
    unsafe { load_half(panel, tile, half) }
}

/// Rows `16 * half..16 * half + 16` of a tile, or of a step of an unpacked panel.
///
/// # Safety
/// The tile must lie inside `panel`.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn load_half(panel: &[u8], tile: usize, half: usize) -> [__m256i; 2] {
    let bytes = panel.as_ptr().wrapping_add(tile * TILE_BYTES + 64 * half);
    // SAFETY: 64 bytes at `bytes`, by the caller's promise.
    unsafe { [_mm256_loadu_si256(bytes.cast()), _mm256_loadu_si256(bytes.add(32).cast())] }
}

/// Four codes, in every lane.
///
/// # Safety
/// `codes` must hold the word of index `word`.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn broadcast(codes: &[i8], word: usize) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { codes.as_ptr().cast::<i32>().add(word).read_unaligned() })
}

#[target_feature(enable = "avx2")]
#[inline]
fn add_half(quarters: [__m256i; 2], half: usize, out: &mut PanelSums) {
    for (out, quarter) in out[16 * half..][..16].as_chunks_mut::<8>().0.iter_mut().zip(quarters) {
        // SAFETY: 8 sums of 4 bytes, read and written.
        unsafe {
            let sum = _mm256_add_epi32(_mm256_loadu_si256(out.as_ptr().cast()), quarter);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), sum);
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_bytes(quarters: [__m256i; 2], half: usize, out: &mut [u8; TILE_BYTES]) {
    let out = &mut out[64 * half..][..64];
    // SAFETY: 2 x 32 bytes.
    unsafe {
        _mm256_storeu_si256(out.as_mut_ptr().cast(), quarters[0]);
        _mm256_storeu_si256(out.as_mut_ptr().add(32).cast(), quarters[1]);
    }
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
