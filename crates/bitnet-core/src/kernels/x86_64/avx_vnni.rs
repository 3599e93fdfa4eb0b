//! AVX2 with VNNI (`vpdpbusd` on 256 bits), for CPUs without AVX-512. As [`super::avx512_vnni`] with half the width: each
//! half of a panel, 16 rows, is a pass of its own, because 16 registers do not hold the sums of both.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m256i, _MM_HINT_T1, _mm_prefetch, _mm256_add_epi32, _mm256_and_si256, _mm256_dpbusd_avx_epi32,
    _mm256_loadu_si256, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_setzero_si256, _mm256_srai_epi32,
    _mm256_srli_epi16, _mm256_storeu_si256,
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

/// Packed panels: 2 x 4 accumulators, and registers for weights, those still packed, the mask and activations.
const BLOCK: usize = 4;

/// Unpacked panels: 2 x 6 accumulators leave four registers for weights and activations.
const UNPACKED_BLOCK: usize = 6;

/// Tokens of a block of the screen, each with two halves.
const SCREEN_BLOCK: usize = UNPACKED_BLOCK / 2;

/// From here on several blocks share the work of unpacking a slice.
const UNPACK_FROM: usize = BLOCK + 1;

/// Proof that this CPU has AVX2, FMA, F16C and AVX-VNNI: only [`detect`] makes one.
#[derive(Debug)]
struct AvxVnni {
    isa: Isa,
}

/// The kernel, on a CPU that has its instructions.
pub(super) fn detect() -> Option<&'static dyn TernaryKernel> {
    static KERNEL: std::sync::OnceLock<AvxVnni> = std::sync::OnceLock::new();
    let isa = Isa::avx2_fma()?;
    is_x86_feature_detected!("avxvnni").then(|| KERNEL.get_or_init(|| AvxVnni { isa }) as &dyn TernaryKernel)
}

impl TernaryKernel for AvxVnni {
    fn name(&self) -> &'static str {
        "x86_64-avxvnni"
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

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn gemv(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
    let ahead = w.ahead(1);
    gemv_by_panels(w, x, out, |panel, codes, sums| panel_gemv(panel, ahead, codes, &mut sums[0]));
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn gemm(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>) {
    let ahead = w.ahead(x.num_tokens());
    if x.num_tokens() < UNPACK_FROM {
        gemm_by_blocks(w, x, out, BLOCK, None, |panel, block, sums| {
            by_tokens!(sums.len(), [1 2 3 4], panel_gemm::<N>(panel, ahead, block, sums));
        });
    } else {
        let unpack = |panel: &[u8], unpacked: &mut [u8]| unpack(panel, ahead, unpacked);
        gemm_by_blocks(w, x, out, UNPACKED_BLOCK, Some(&unpack), |panel, block, sums| {
            by_tokens!(sums.len(), [1 2 3 4 5 6], unpacked_gemm::<N, false>(panel, 0, block, sums));
        });
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn screen(w: &ScreenRows<'_>, x: &SplitActivations<'_>, estimates: &mut ColumnsMut<'_>, radii: &mut ColumnsMut<'_>) {
    let ahead = w.ahead(x.num_tokens());
    screen_by_blocks(w, x, estimates, radii, SCREEN_BLOCK, |panel, block, sums| {
        by_tokens!(sums.len(), [2 4 6], unpacked_gemm::<N, true>(panel, ahead, block, sums));
    });
}

/// Planes masked in place, each with sums of its own that are shifted once, at the end.
#[target_feature(enable = "avx2,avxvnni")]
fn panel_gemv(panel: &[u8], ahead: usize, codes: &[i8], out: &mut PanelSums) {
    let num_tiles = num_tiles(panel, codes, 4, 1);
    let masks = [0x03, 0x0c, 0x30, 0xc0_u8].map(|mask| _mm256_set1_epi8(mask.cast_signed()));
    for half in 0..2 {
        let mut sums = [[_mm256_setzero_si256(); 4]; 2];
        for tile in 0..num_tiles {
            // SAFETY: the half tile's 64 bytes lie inside the panel.
            let quarters = unsafe { load_half_tile(panel, ahead, tile, half) };
            for plane in 0..4 {
                // SAFETY: 16 codes a tile, checked by `num_tiles`.
                let x = unsafe { broadcast(codes, 4 * tile + plane) };
                for quarter in 0..2 {
                    let weights = _mm256_and_si256(quarters[quarter], masks[plane]);
                    sums[quarter][plane] = _mm256_dpbusd_avx_epi32(sums[quarter][plane], weights, x);
                }
            }
        }
        let sums = sums.map(|[p0, p1, p2, p3]| {
            let low = _mm256_add_epi32(p0, _mm256_srai_epi32::<2>(p1));
            _mm256_add_epi32(low, _mm256_add_epi32(_mm256_srai_epi32::<4>(p2), _mm256_srai_epi32::<6>(p3)))
        });
        add_half(sums, half, out);
    }
}

/// Planes shifted down, so that they can share sums: two sets where registers allow, or sums would wait for each other.
#[target_feature(enable = "avx2,avxvnni")]
fn panel_gemm<const N: usize>(panel: &[u8], ahead: usize, block: &[i8], out: &mut [PanelSums]) {
    let num_tiles = num_tiles(panel, block, 4, N);
    let mask = _mm256_set1_epi8(3);
    for half in 0..2 {
        let mut sums = [[[_mm256_setzero_si256(); 2]; N]; 2];
        for tile in 0..num_tiles {
            // SAFETY: the half tile's 64 bytes lie inside the panel.
            let mut quarters = unsafe { load_half_tile(panel, ahead, tile, half) };
            for plane in 0..4 {
                let weights = quarters.map(|quarter| _mm256_and_si256(quarter, mask));
                quarters = quarters.map(|quarter| _mm256_srli_epi16::<2>(quarter));
                for (token, sums) in sums[plane % const { if N <= 2 { 2 } else { 1 } }].iter_mut().enumerate() {
                    // SAFETY: 16 codes a tile and token, checked by `num_tiles`.
                    let x = unsafe { broadcast(block, (4 * tile + plane) * N + token) };
                    for quarter in 0..2 {
                        sums[quarter] = _mm256_dpbusd_avx_epi32(sums[quarter], weights[quarter], x);
                    }
                }
            }
        }
        for (token, out) in out.iter_mut().enumerate() {
            let sum = |quarter: usize| _mm256_add_epi32(sums[0][token][quarter], sums[1][token][quarter]);
            add_half([sum(0), sum(1)], half, out);
        }
    }
}

/// Codes of 2 bits as bytes: `[columns / 4, 32 rows, 4]`.
#[target_feature(enable = "avx2,avxvnni")]
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
/// for half of 16 rows, step of 4 columns, token: sums[token] += codes[step] * activations[step][token]
/// ```
/// A `SCREEN` has signed weights, which come from memory, and unsigned activations; else it is the other way round, and
/// weights were unpacked just before.
#[target_feature(enable = "avx2,avxvnni")]
fn unpacked_gemm<const N: usize, const SCREEN: bool>(panel: &[u8], ahead: usize, block: &[i8], out: &mut [PanelSums]) {
    let num_steps = num_tiles(panel, block, 1, N);
    for half in 0..2 {
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for step in 0..num_steps {
            // SAFETY: the step's 128 bytes lie inside the panel.
            let weights =
                unsafe { if SCREEN { load_half_tile(panel, ahead, step, half) } else { load_half(panel, step, half) } };
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: 4 codes a step and token, checked by `num_tiles`.
                let x = unsafe { broadcast(block, step * N + token) };
                for quarter in 0..2 {
                    let (unsigned, signed) = if SCREEN { (x, weights[quarter]) } else { (weights[quarter], x) };
                    sums[quarter] = _mm256_dpbusd_avx_epi32(sums[quarter], unsigned, signed);
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
#[target_feature(enable = "avx2,avxvnni")]
#[inline]
unsafe fn load_half_tile(panel: &[u8], ahead: usize, tile: usize, half: usize) -> [__m256i; 2] {
    if ahead > 0 {
        let line = panel.as_ptr().wrapping_add(tile * TILE_BYTES + 64 * half + ahead);
        _mm_prefetch::<_MM_HINT_T1>(line.cast());
    }
    // SAFETY: the caller's promise.
    unsafe { load_half(panel, tile, half) }
}

/// Rows `16 * half..16 * half + 16` of a tile, or of a step of an unpacked panel.
///
/// # Safety
/// The tile must lie inside `panel`.
#[target_feature(enable = "avx2,avxvnni")]
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
#[target_feature(enable = "avx2,avxvnni")]
#[inline]
unsafe fn broadcast(codes: &[i8], word: usize) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { codes.as_ptr().cast::<i32>().add(word).read_unaligned() })
}

#[target_feature(enable = "avx2,avxvnni")]
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

#[target_feature(enable = "avx2,avxvnni")]
#[inline]
fn store_bytes(quarters: [__m256i; 2], half: usize, out: &mut [u8; TILE_BYTES]) {
    let out = &mut out[64 * half..][..64];
    // SAFETY: 2 x 32 bytes.
    unsafe {
        _mm256_storeu_si256(out.as_mut_ptr().cast(), quarters[0]);
        _mm256_storeu_si256(out.as_mut_ptr().add(32).cast(), quarters[1]);
    }
}

/// 12 independent sums, more than the latency of the multiplication times its rate.
#[target_feature(enable = "avx2,avxvnni")]
fn multiply_registers(rounds: u32) -> u64 {
    const NUM_SUMS: usize = 12;
    let mut sums = [_mm256_setzero_si256(); NUM_SUMS];
    let (weights, x) = (std::hint::black_box(_mm256_set1_epi8(1)), std::hint::black_box(_mm256_set1_epi8(1)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, weights, x);
        }
    }
    std::hint::black_box(sums);
    u64::from(rounds) * (NUM_SUMS * 32) as u64
}
