//! AVX2 with VNNI (`vpdpbusd` on 256 bits), for CPUs without AVX-512. As [`super::avx512_vnni`] with half the width.
#![allow(unsafe_code)]

use std::arch::x86_64::{_mm256_add_epi32, _mm256_dpbusd_avx_epi32, _mm256_set1_epi8, _mm256_setzero_si256};

use super::{
    PanelSums,
    ahead::Ahead,
    by_tokens, equal_blocks, gemm_by_blocks, gemv_by_panels, num_tiles, screen_by_blocks,
    tiles_256::{broadcast, load, lowest_codes, prefetch_quarters, shift_codes, unpack, write_quarters},
};
use crate::{
    kernels::{
        Isa, Output, TernaryKernel, check_gemm, check_gemv, check_screen,
        packing::{PackedLayout, PackedRows},
        screen::{ActivationBits, ScreenRows, ScreensMut, SplitActivations},
    },
    quant::activation::QuantizedActivations,
    threads::ColumnsMut,
};

/// Packed panels: 2 x 4 accumulators, and registers for weights, those still packed, the mask and activations.
const BLOCK: usize = 4;

/// Unpacked panels: 2 x 6 accumulators leave four registers for weights and activations.
const UNPACKED_BLOCK: usize = 6;

/// Tokens of a screen from which its activations are bytes: half as many as with AVX-512, which multiplies twice as fast.
const BYTES_FROM: usize = 8;

/// From here on several blocks share the work of unpacking a panel.
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

    fn screen_bits(&self, num_tokens: usize) -> ActivationBits {
        if num_tokens < BYTES_FROM { ActivationBits::Fourteen } else { ActivationBits::Eight }
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

    fn gemm(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
        check_gemm(self, w, x, out);
        // SAFETY: as above.
        unsafe { gemm(w, x, out, output) }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn gemv(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
    // One token's interleaved codes are its codes.
    gemv_by_panels(w, x, out, |panel, ahead, codes, sums| panel_gemm::<1, 4>(panel, ahead, codes, sums));
}

fn block_tokens(num_tokens: usize) -> usize {
    equal_blocks(num_tokens, if num_tokens < UNPACK_FROM { BLOCK } else { UNPACKED_BLOCK })
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn gemm(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
    let block_tokens = block_tokens(x.num_tokens());
    if x.num_tokens() < UNPACK_FROM {
        gemm_by_blocks(w, x, (out, output), block_tokens, None, |panel, ahead, block, sums| match sums.len() {
            1 => panel_gemm::<1, 4>(panel, ahead, block, sums),
            2 => panel_gemm::<2, 4>(panel, ahead, block, sums),
            3 => panel_gemm::<3, 2>(panel, ahead, block, sums),
            _ => panel_gemm::<BLOCK, 2>(panel, ahead, block, sums),
        });
    } else {
        let multiply = |panel: &[u8], ahead: Ahead, block: &[i8], sums: &mut [PanelSums]| {
            by_tokens!(sums.len(), [1 2 3 4 5 6], multiply_unpacked::<N>(panel, ahead, block, sums));
        };
        let unpack = |panel: &[u8], unpacked: &mut [u8], ahead: Ahead, block: &[i8], sums: &mut [PanelSums]| {
            unpack(panel, unpacked);
            multiply(unpacked, ahead, block, sums);
        };
        gemm_by_blocks(w, x, (out, output), block_tokens, Some(&unpack), multiply);
    }
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn screen(w: &ScreenRows<'_>, x: &SplitActivations<'_>, out: &mut ScreensMut<'_>) {
    screen_by_blocks(w, x, out, UNPACKED_BLOCK, None, |panel, ahead, block, sums| match sums.len() {
        1 => unpacked_gemm::<1, 4, true>(panel, ahead, block, sums),
        2 => unpacked_gemm::<2, 4, true>(panel, ahead, block, sums),
        3 => unpacked_gemm::<3, 2, true>(panel, ahead, block, sums),
        4 => unpacked_gemm::<4, 2, true>(panel, ahead, block, sums),
        5 => unpacked_gemm::<5, 2, true>(panel, ahead, block, sums),
        _ => unpacked_gemm::<UNPACKED_BLOCK, 2, true>(panel, ahead, block, sums),
    });
}

/// ```text
/// for tile, plane of 4 columns, token: sums[token] += plane of codes * activations
/// ```
/// `Q` quarters of the rows at once: all, or in two passes. Two sets of sums where registers allow, or they would wait for each
/// other.
#[target_feature(enable = "avx2,avxvnni")]
fn panel_gemm<const N: usize, const Q: usize>(panel: &[u8], ahead: Ahead, block: &[i8], out: &mut [PanelSums]) {
    let num_tiles = num_tiles(panel, block, 4, N);
    let mask = _mm256_set1_epi8(3);
    for first_quarter in (0..4).step_by(Q) {
        let ahead = ahead.part(first_quarter / Q, 4 / Q).in_runs(num_tiles);
        let mut sums = [[[_mm256_setzero_si256(); Q]; N]; 2];
        for tile in 0..num_tiles {
            ahead.prefetch::<2>(tile);
            // SAFETY: the tile's 128 bytes lie inside the panel.
            let mut quarters: [_; Q] = unsafe { load(panel, tile, first_quarter) };
            for plane in 0..4 {
                let weights = lowest_codes(quarters, mask);
                shift_codes(&mut quarters);
                for (token, sums) in sums[plane % const { if N == 1 { 2 } else { 1 } }].iter_mut().enumerate() {
                    // SAFETY: 16 codes a tile and token, checked by `num_tiles`.
                    let x = unsafe { broadcast(block, (4 * tile + plane) * N + token) };
                    for quarter in 0..Q {
                        sums[quarter] = _mm256_dpbusd_avx_epi32(sums[quarter], weights[quarter], x);
                    }
                }
            }
        }
        for ((out, sums), others) in out.iter_mut().zip(sums[0]).zip(sums[1]) {
            let sums = std::array::from_fn::<_, Q, _>(|quarter| _mm256_add_epi32(sums[quarter], others[quarter]));
            write_quarters(sums, first_quarter, out);
        }
    }
}

#[target_feature(enable = "avx2,avxvnni")]
fn multiply_unpacked<const N: usize>(panel: &[u8], ahead: Ahead, block: &[i8], sums: &mut [PanelSums]) {
    unpacked_gemm::<N, 2, false>(panel, ahead, block, sums);
}

/// ```text
/// for `Q` quarters of the rows, step of 4 columns, token: sums[token] += codes[step] * activations[step][token]
/// ```
/// A `SCREEN` has signed weights and unsigned activations; else it is the other way round.
#[target_feature(enable = "avx2,avxvnni")]
fn unpacked_gemm<const N: usize, const Q: usize, const SCREEN: bool>(
    panel: &[u8],
    ahead: Ahead,
    block: &[i8],
    out: &mut [PanelSums],
) {
    let num_steps = num_tiles(panel, block, 1, N);
    for first_quarter in (0..4).step_by(Q) {
        let ahead = ahead.part(first_quarter / Q, 4 / Q);
        let mut sums = [[_mm256_setzero_si256(); Q]; N];
        for step in 0..num_steps {
            prefetch_quarters::<Q>(ahead, num_steps, step);
            // SAFETY: the step's 128 bytes lie inside the panel.
            let weights: [_; Q] = unsafe { load(panel, step, first_quarter) };
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: 4 codes a step and token, checked by `num_tiles`.
                let x = unsafe { broadcast(block, step * N + token) };
                for quarter in 0..Q {
                    let (unsigned, signed) = if SCREEN { (x, weights[quarter]) } else { (weights[quarter], x) };
                    sums[quarter] = _mm256_dpbusd_avx_epi32(sums[quarter], unsigned, signed);
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            write_quarters(sums, first_quarter, out);
        }
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
