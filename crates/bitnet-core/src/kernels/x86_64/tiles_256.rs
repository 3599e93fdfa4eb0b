//! Tiles of weights in vectors of 256 bits, for the kernels without AVX-512: a tile is four quarters of 8 rows, a vector each.
//!
//! Weights that come from memory are read in whole tiles where 16 registers hold the sums of all rows. Several passes over parts
//! of the rows read memory in strides: two for a single token left half of the bandwidth unused on a Zen 4 core.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m256i, _mm256_add_epi32, _mm256_and_si256, _mm256_loadu_si256, _mm256_set1_epi8, _mm256_set1_epi32,
    _mm256_setzero_si256, _mm256_srli_epi16, _mm256_storeu_si256,
};

use super::{PanelSums, ahead::Ahead};
use crate::kernels::packing::TILE_BYTES;

/// A vector's worth of a tile.
pub(super) const QUARTER_BYTES: usize = TILE_BYTES / 4;

/// Codes of 2 bits as bytes: `[columns / 4, 32 rows, 4]`.
#[target_feature(enable = "avx2")]
pub(super) fn unpack(panel: &[u8], unpacked: &mut [u8]) {
    let mask = _mm256_set1_epi8(3);
    let tiles = unpacked.as_chunks_mut::<{ 4 * TILE_BYTES }>().0;
    assert_eq!(tiles.len(), panel.len() / TILE_BYTES, "tiles of an unpacked panel");
    for (tile, unpacked) in tiles.iter_mut().enumerate() {
        // SAFETY: the tile's 128 bytes lie inside the panel.
        let mut quarters: [_; 4] = unsafe { load(panel, tile, 0) };
        for step in unpacked.as_chunks_mut::<TILE_BYTES>().0 {
            store_bytes(lowest_codes(quarters, mask), step);
            shift_codes(&mut quarters);
        }
    }
}

/// The codes at the bits of `mask`. Here and in all of these kernels loops, not `map`: it is compiled without their instructions
/// where it is not inlined, and then takes its vectors from memory.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn lowest_codes<const Q: usize>(mut quarters: [__m256i; Q], mask: __m256i) -> [__m256i; Q] {
    for quarter in &mut quarters {
        *quarter = _mm256_and_si256(*quarter, mask);
    }
    quarters
}

/// Moves the codes of the next plane to the lowest bits.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn shift_codes<const Q: usize>(quarters: &mut [__m256i; Q]) {
    for quarter in quarters {
        *quarter = _mm256_srli_epi16::<2>(*quarter);
    }
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

/// Prefetches in step `step` of a pass over `Q` quarters of an unpacked panel, or of a screen's.
#[inline(always)]
pub(super) fn prefetch_quarters<const Q: usize>(ahead: Ahead, num_steps: usize, step: usize) {
    if Q == 4 {
        ahead.in_runs(num_steps).prefetch::<2>(step);
    } else {
        ahead.in_order(num_steps).prefetch::<1>(step);
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

/// Sets the sums of quarters from quarter `first` on.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn write_quarters<const Q: usize>(quarters: [__m256i; Q], first: usize, out: &mut PanelSums) {
    for (out, quarter) in out.as_chunks_mut::<8>().0[first..].iter_mut().zip(quarters) {
        // SAFETY: 8 sums of 4 bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), quarter) };
    }
}

/// Adds to the sums of quarters from quarter `first` on.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn add_quarters<const Q: usize>(mut quarters: [__m256i; Q], first: usize, out: &mut PanelSums) {
    for (quarter, sums) in quarters.iter_mut().zip(&out.as_chunks::<8>().0[first..]) {
        // SAFETY: 8 sums of 4 bytes.
        *quarter = _mm256_add_epi32(*quarter, unsafe { _mm256_loadu_si256(sums.as_ptr().cast()) });
    }
    write_quarters(quarters, first, out);
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_bytes(quarters: [__m256i; 4], out: &mut [u8; TILE_BYTES]) {
    for (out, quarter) in out.as_chunks_mut::<QUARTER_BYTES>().0.iter_mut().zip(quarters) {
        // SAFETY: 32 bytes.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), quarter) };
    }
}
