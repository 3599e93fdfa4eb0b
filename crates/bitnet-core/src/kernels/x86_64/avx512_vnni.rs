//! AVX-512 with VNNI: `vpdpbusd` multiplies 64 unsigned codes {0, 1, 2} by 64 signed activations and adds fours of products
//! to 16 sums of 32 bits. Exact: a sum is at most 128 * 128 * [`MAX_COLS`](super::super::packing::MAX_COLS) / 4 < 2^31.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_add_epi32, _mm512_and_si512, _mm512_dpbusd_epi32, _mm512_loadu_si512,
    _mm512_set1_epi8, _mm512_set1_epi32, _mm512_setzero_si512, _mm512_srai_epi32, _mm512_srli_epi16,
    _mm512_storeu_si512,
};

use super::{PREFETCH_BYTES, PanelSums, gemm_by_blocks, gemv_by_panels};
use crate::{
    kernels::{
        Isa, TernaryKernel,
        packing::{COLUMN_TILE, PackedLayout, PackedRows, TILE_BYTES},
    },
    quant::activation::QuantizedActivations,
    threads::ColumnsMut,
};

/// Tokens multiplied at once: 2 x 12 accumulators leave eight registers for weights, masks and activations.
const BLOCK: usize = 12;

/// Proof that this CPU has AVX-512 F, BW, DQ, VL and VNNI: only [`detect`] makes one.
#[derive(Debug)]
struct Avx512Vnni {
    isa: Isa,
}

/// The kernel, on a CPU that has its instructions.
pub(super) fn detect() -> Option<&'static dyn TernaryKernel> {
    static KERNEL: std::sync::OnceLock<Avx512Vnni> = std::sync::OnceLock::new();
    let isa = Isa::avx512()?;
    is_x86_feature_detected!("avx512vnni").then(|| KERNEL.get_or_init(|| Avx512Vnni { isa }) as &dyn TernaryKernel)
}

impl TernaryKernel for Avx512Vnni {
    fn name(&self) -> &'static str {
        "x86_64-avx512vnni"
    }

    fn layout(&self) -> PackedLayout {
        PackedLayout::T32x2Bit
    }

    fn isa(&self) -> Isa {
        self.isa
    }

    fn gemv(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
        // SAFETY: `self` exists only where `detect` saw every feature that is enabled there.
        unsafe { gemv(w, x, out) }
    }

    fn gemm(&self, w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>) {
        // SAFETY: as above.
        unsafe { gemm(w, x, out) }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn gemv(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
    gemv_by_panels(w, x, out, |panel, codes| panel_gemv(panel, codes));
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn gemm(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>) {
    gemm_by_blocks::<BLOCK>(w, x, out, |panel, block, sums| match sums.len() {
        1 => panel_gemm::<1>(panel, block, sums),
        2 => panel_gemm::<2>(panel, block, sums),
        3 => panel_gemm::<3>(panel, block, sums),
        4 => panel_gemm::<4>(panel, block, sums),
        5 => panel_gemm::<5>(panel, block, sums),
        6 => panel_gemm::<6>(panel, block, sums),
        7 => panel_gemm::<7>(panel, block, sums),
        8 => panel_gemm::<8>(panel, block, sums),
        9 => panel_gemm::<9>(panel, block, sums),
        10 => panel_gemm::<10>(panel, block, sums),
        11 => panel_gemm::<11>(panel, block, sums),
        _ => panel_gemm::<BLOCK>(panel, block, sums),
    });
}

/// ```text
/// for tile of 16 columns, half of 16 rows, plane of 4 columns:
///     sums[half] += plane of codes[tile][half] * activations[tile][plane]
/// ```
/// 1. Planes are not shifted down but masked in place, each with sums of its own; these are exact multiples of 4^plane and
///    are shifted once, at the end.
/// 2. Eight independent sums hide the latency of the multiplication.
/// 3. Weights are prefetched into the second-level cache, across the end of the panel into the next.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panel_gemv(panel: &[u8], codes: &[i8]) -> PanelSums {
    let num_tiles = panel.len() / TILE_BYTES;
    assert!(codes.len() >= num_tiles * COLUMN_TILE, "codes are padded to whole tiles");
    let masks = [0x03, 0x0c, 0x30, 0xc0_u8].map(|mask| _mm512_set1_epi8(mask.cast_signed()));
    let mut sums = [[_mm512_setzero_si512(); 4]; 2];
    for tile in 0..num_tiles {
        // SAFETY: the tile's 128 bytes lie inside the panel.
        let halves = unsafe { load_tile(panel, tile) };
        for plane in 0..4 {
            // SAFETY: 16 codes a tile, asserted above.
            let x = unsafe { broadcast(codes, 4 * tile + plane) };
            for half in 0..2 {
                let weights = _mm512_and_si512(halves[half], masks[plane]);
                sums[half][plane] = _mm512_dpbusd_epi32(sums[half][plane], weights, x);
            }
        }
    }
    store(sums.map(|[p0, p1, p2, p3]| {
        let low = _mm512_add_epi32(p0, _mm512_srai_epi32::<2>(p1));
        _mm512_add_epi32(low, _mm512_add_epi32(_mm512_srai_epi32::<4>(p2), _mm512_srai_epi32::<6>(p3)))
    }))
}

/// As [`panel_gemv`] for `N` tokens: here planes are shifted down, so that one pair of sums per token is enough, and the
/// unpacking is shared by all tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panel_gemm<const N: usize>(panel: &[u8], block: &[i8], out: &mut [PanelSums]) {
    let num_tiles = panel.len() / TILE_BYTES;
    assert!(block.len() >= num_tiles * COLUMN_TILE * N && out.len() == N, "a block of {N} tokens");
    let mask = _mm512_set1_epi8(3);
    let mut sums = [[_mm512_setzero_si512(); 2]; N];
    for tile in 0..num_tiles {
        // SAFETY: the tile's 128 bytes lie inside the panel.
        let mut halves = unsafe { load_tile(panel, tile) };
        for plane in 0..4 {
            let weights = halves.map(|half| _mm512_and_si512(half, mask));
            halves = halves.map(|half| _mm512_srli_epi16::<2>(half));
            for (token, sums) in sums.iter_mut().enumerate() {
                // SAFETY: 16 codes a tile and token, asserted above.
                let x = unsafe { broadcast(block, (4 * tile + plane) * N + token) };
                for half in 0..2 {
                    sums[half] = _mm512_dpbusd_epi32(sums[half], weights[half], x);
                }
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        *out = store(sums);
    }
}

/// The two halves, rows 0..16 and 16..32, of a tile; asks for the weights to come.
///
/// # Safety
/// The tile must lie inside `panel`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
unsafe fn load_tile(panel: &[u8], tile: usize) -> [__m512i; 2] {
    let bytes = panel.as_ptr().wrapping_add(tile * TILE_BYTES);
    let ahead = bytes.wrapping_add(PREFETCH_BYTES).cast::<i8>();
    _mm_prefetch::<_MM_HINT_T1>(ahead);
    _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(64));
    // SAFETY: 128 bytes at `bytes`, by the caller's promise.
    unsafe { [_mm512_loadu_si512(bytes.cast()), _mm512_loadu_si512(bytes.add(64).cast())] }
}

/// Four codes, in every lane.
///
/// # Safety
/// `codes` must hold the word of index `word`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
unsafe fn broadcast(codes: &[i8], word: usize) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { codes.as_ptr().cast::<i32>().add(word).read_unaligned() })
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn store(halves: [__m512i; 2]) -> PanelSums {
    let mut sums = [0; 32];
    // SAFETY: 2 x 16 sums of 4 bytes.
    unsafe {
        _mm512_storeu_si512(sums.as_mut_ptr().cast(), halves[0]);
        _mm512_storeu_si512(sums.as_mut_ptr().add(16).cast(), halves[1]);
    }
    sums
}
