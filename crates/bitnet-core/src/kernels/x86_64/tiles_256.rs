//! Tiles of weights in vectors of 256 bits, for the kernels without AVX-512: a tile is four quarters of 8 rows, a vector each.
//!
//! Weights that come from memory are read in whole tiles where 16 registers hold the sums of all rows. Several passes over parts
//! of the rows read memory in strides: two for a single token left half of the bandwidth unused on a Zen 4 core.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m256i, _MM_HINT_T1, _mm_prefetch, _mm256_add_epi32, _mm256_and_si256, _mm256_loadu_si256, _mm256_set1_epi8,
    _mm256_set1_epi32, _mm256_setzero_si256, _mm256_srli_epi16, _mm256_storeu_si256,
};

use super::PanelSums;
use crate::kernels::packing::TILE_BYTES;

/// A vector's worth of a tile.
pub(super) const QUARTER_BYTES: usize = TILE_BYTES / 4;

/// Codes of 2 bits as bytes: `[columns / 4, 32 rows, 4]`.
#[target_feature(enable = "avx2")]
pub(super) fn unpack(panel: &[u8], ahead: usize, unpacked: &mut [u8]) {
    let mask = _mm256_set1_epi8(3);
    let tiles = unpacked.as_chunks_mut::<{ 4 * TILE_BYTES }>().0;
    assert_eq!(tiles.len(), panel.len() / TILE_BYTES, "tiles of an unpacked panel");
    for (tile, unpacked) in tiles.iter_mut().enumerate() {
        // SAFETY: the tile's 128 bytes lie inside the panel.
        let mut quarters = unsafe { load_tile(panel, ahead, tile) };
        for step in unpacked.as_chunks_mut::<TILE_BYTES>().0 {
            store_bytes(quarters.map(|quarter| _mm256_and_si256(quarter, mask)), step);
            quarters = quarters.map(|quarter| _mm256_srli_epi16::<2>(quarter));
        }
    }
}

/// A tile of packed weights; asks for the one that comes `ahead` bytes later, 0 for none.
///
/// # Safety
/// The tile must lie inside `panel`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn load_tile(panel: &[u8], ahead: usize, tile: usize) -> [__m256i; 4] {
    prefetch_step::<4, _MM_HINT_T1>(panel, ahead, tile, 0);
    // SAFETY: the caller's promise.
    unsafe { load(panel, tile, 0) }
}

/// `Q` quarters from quarter `first` on, of a tile, or of a step of an unpacked panel.
///
/// # Safety
/// The tile must lie inside `panel`, and so many quarters inside the tile.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn load<const Q: usize>(panel: &[u8], tile: usize, first: usize) -> [__m256i; Q] {
    let bytes = panel.as_ptr().wrapping_add(tile * TILE_BYTES + QUARTER_BYTES * first);
    let mut quarters = [_mm256_setzero_si256(); Q];
    for (index, quarter) in quarters.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *quarter = unsafe { _mm256_loadu_si256(bytes.add(QUARTER_BYTES * index).cast()) };
    }
    quarters
}

/// Asks for weights in step `step` of a pass over the quarters `first..first + Q` of a slice, 0 `ahead` for none. Where one pass
/// has all quarters, for the step that comes `ahead` bytes later, into the cache of `HINT`. Several passes ask for parts of what
/// follows the slice, or the first would have to wait for all of it; into the second-level cache, for the first one is taken by
/// the slice itself.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn prefetch_step<const Q: usize, const HINT: i32>(slice: &[u8], ahead: usize, step: usize, first: usize) {
    if ahead == 0 {
        return;
    }
    if Q == 4 {
        let line = slice.as_ptr().wrapping_add(TILE_BYTES * step + ahead).cast::<i8>();
        _mm_prefetch::<HINT>(line);
        _mm_prefetch::<HINT>(line.wrapping_add(64));
    } else {
        let num_steps = slice.len() / TILE_BYTES;
        let offset = slice.len() + QUARTER_BYTES * (first * num_steps + Q * step);
        _mm_prefetch::<_MM_HINT_T1>(slice.as_ptr().wrapping_add(offset).cast());
    }
}

/// Four codes, in every lane.
///
/// # Safety
/// `codes` must hold the word of index `word`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) unsafe fn broadcast(codes: &[i8], word: usize) -> __m256i {
    // SAFETY: the caller's promise.
    _mm256_set1_epi32(unsafe { codes.as_ptr().cast::<i32>().add(word).read_unaligned() })
}

/// Adds the sums of quarters from quarter `first` on.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn add_quarters<const Q: usize>(quarters: [__m256i; Q], first: usize, out: &mut PanelSums) {
    for (out, quarter) in out.as_chunks_mut::<8>().0[first..].iter_mut().zip(quarters) {
        // SAFETY: 8 sums of 4 bytes, read and written.
        unsafe {
            let sum = _mm256_add_epi32(_mm256_loadu_si256(out.as_ptr().cast()), quarter);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), sum);
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_bytes(quarters: [__m256i; 4], out: &mut [u8; TILE_BYTES]) {
    for (out, quarter) in out.as_chunks_mut::<QUARTER_BYTES>().0.iter_mut().zip(quarters) {
        // SAFETY: 32 bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), quarter) };
    }
}
