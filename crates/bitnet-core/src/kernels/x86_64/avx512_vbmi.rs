//! Weights of 1.6 bits on AVX-512 with VNNI and VBMI: as [`super::avx512_vnni`], which owns the kernel, with another way from
//! bytes to codes.
//!
//! A byte is a fraction of 256ths whose base-3 digits are the codes. `vpmaddubsw` multiplies by 27, which moves three digits
//! above the point, and what is left by 9, which moves the other two; a table look-up a plane picks one digit of these.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512i, _mm512_loadu_si512, _mm512_maddubs_epi16, _mm512_permutexvar_epi8, _mm512_set1_epi16,
    _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_srli_epi16, _mm512_ternarylogic_epi32,
};

use super::{
    PanelSums,
    ahead::Ahead,
    avx512_vnni::{BLOCK, block_tokens, load, load_tile, multiply_step, multiply_unpacked, store_bytes, write_sums},
    by_tokens, gemm_by_blocks, gemv_by_panels, num_tiles,
};
use crate::{
    kernels::{
        Output,
        packing::{PackedRows, TILE_BYTES},
    },
    quant::activation::QuantizedActivations,
    threads::ColumnsMut,
};

/// The digit of each plane by the number it is in: the first three planes are in a number below 27, the last two in one
/// below 9, whose tables are repeated for each 16 bytes of a vector.
static DIGITS: [[u8; 64]; 5] = [digits(9, 64), digits(3, 64), digits(1, 64), digits(3, 16), digits(1, 16)];

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
pub(super) fn gemv(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
    // One token's interleaved codes are its codes.
    gemv_by_panels(w, x, out, |panel, ahead, codes, sums| panel_gemm::<1>(panel, ahead, codes, sums));
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
pub(super) fn gemm(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
    let unpack = |panel: &[u8], unpacked: &mut [u8], ahead: Ahead, block: &[i8], sums: &mut [PanelSums]| {
        by_tokens!(sums.len(), [5 6 7 8 9 10 11 12], panel_gemm_and_unpack::<N>(panel, unpacked, ahead, block, sums));
    };
    let block_tokens = block_tokens(x.num_tokens());
    if x.num_tokens() <= BLOCK {
        gemm_by_blocks(w, x, (out, output), block_tokens, None, |panel, ahead, block, sums| match sums.len() {
            1..=4 => by_tokens!(sums.len(), [1 2 3 4], panel_gemm::<N>(panel, ahead, block, sums)),
            _ => unpack(panel, UnpackedTile([0; 5 * TILE_BYTES]).0.as_mut_slice(), ahead, block, sums),
        });
    } else {
        gemm_by_blocks(w, x, (out, output), block_tokens, Some(&unpack), |panel, ahead, block, sums| {
            multiply_unpacked(panel, ahead, block, sums);
        });
    }
}

/// ```text
/// for tile of 20 columns, plane of 4 columns, token, half of 16 rows:
///     sums[token][half] += plane of codes[tile][half] * activations[tile][plane][token]
/// ```
/// 1. The planes are written out one by one: in a loop the compiler keeps the sums in memory.
/// 2. Few tokens have several sets of sums, one a plane in turn, or they would wait for each other.
/// 3. Where it pays ([`Prefetch`](crate::kernels::prefetch::Prefetch)) the next panel is asked for.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn panel_gemm<const N: usize>(panel: &[u8], ahead: Ahead, block: &[i8], out: &mut [PanelSums]) {
    let num_tiles = num_tiles(panel, block, 5, N);
    let ahead = ahead.in_runs(num_tiles);
    let decoder = Decoder::new();
    let mut sums = [[[_mm512_setzero_si512(); 2]; N]; 5];
    for tile in 0..num_tiles {
        // SAFETY: the tile's 128 bytes lie inside the panel.
        let numbers = decoder.numbers(unsafe { load_tile(panel, ahead, tile) });
        // SAFETY: 20 codes a tile and token, checked by `num_tiles`.
        unsafe {
            let block = block.as_ptr().add(20 * N * tile);
            multiply_step::<N, 0, false>(decoder.plane::<0>(&numbers), block, &mut sums[0]);
            multiply_step::<N, 1, false>(decoder.plane::<1>(&numbers), block, &mut sums[1 % const { num_sets(N) }]);
            multiply_step::<N, 2, false>(decoder.plane::<2>(&numbers), block, &mut sums[2 % const { num_sets(N) }]);
            multiply_step::<N, 3, false>(decoder.plane::<3>(&numbers), block, &mut sums[3 % const { num_sets(N) }]);
            multiply_step::<N, 4, false>(decoder.plane::<4>(&numbers), block, &mut sums[4 % const { num_sets(N) }]);
        }
    }
    write_sums(&sums, out);
}

/// Sets of 2 x `n` sums that stay in registers.
const fn num_sets(n: usize) -> usize {
    match n {
        0..=1 => 5,
        2..=3 => 2,
        _ => 1,
    }
}

/// The same product with a tile unpacked while the one before is multiplied: with this many sums, multiplications that wait
/// for their codes fill the queues of the processor, and those it could do meanwhile find no place.
///
/// `unpacked` is the place of one tile, or of all: then it leaves the codes of the panel as `[columns / 4, 32 rows, 4]` bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn panel_gemm_and_unpack<const N: usize>(
    panel: &[u8],
    unpacked: &mut [u8],
    ahead: Ahead,
    block: &[i8],
    out: &mut [PanelSums],
) {
    let num_tiles = num_tiles(panel, block, 5, N);
    let ahead = ahead.in_runs(num_tiles);
    let decoder = Decoder::new();
    let mut sums = [[_mm512_setzero_si512(); 2]; N];
    let unpacked = unpacked.as_chunks_mut().0;
    // By a call that is not inlined, so that the codes stay in memory: registers are for the sums.
    unpack_tile(&panel[..TILE_BYTES], &mut unpacked[0]);
    let stride = if unpacked.len() == 1 { 0 } else { 1 };
    assert!(unpacked.len() > stride * (num_tiles - 1), "tiles of an unpacked panel");
    let unpacked = unpacked.as_mut_ptr();
    for tile in 0..num_tiles {
        // After the last tile nothing follows: it is unpacked again.
        let next = (tile + 1).min(num_tiles - 1);
        // SAFETY: the tile's 128 bytes lie inside the panel.
        let numbers = decoder.numbers(unsafe { load_tile(panel, ahead, next) });
        // SAFETY: 20 codes a tile and token, checked by `num_tiles`; the places of tiles by the assertion.
        unsafe {
            let (block, tile) = (block.as_ptr().add(20 * N * tile), unpacked.add(stride * tile));
            let next = unpacked.add(stride * next);
            decoder.multiply_and_unpack::<N, 0>(tile, block, &mut sums, &numbers, next);
            decoder.multiply_and_unpack::<N, 1>(tile, block, &mut sums, &numbers, next);
            decoder.multiply_and_unpack::<N, 2>(tile, block, &mut sums, &numbers, next);
            decoder.multiply_and_unpack::<N, 3>(tile, block, &mut sums, &numbers, next);
            decoder.multiply_and_unpack::<N, 4>(tile, block, &mut sums, &numbers, next);
        }
    }
    write_sums(&[sums], out);
}

/// The codes of a tile as bytes, plane by plane.
type TileCodes = [u8; 5 * TILE_BYTES];

/// The place of one tile.
#[repr(align(64))]
struct UnpackedTile(TileCodes);

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
#[inline(never)]
fn unpack_tile(tile: &[u8], unpacked: &mut TileCodes) {
    let decoder = Decoder::new();
    assert_eq!(tile.len(), TILE_BYTES, "a tile");
    // SAFETY: the assertion.
    let numbers = decoder.numbers(unsafe { load(tile, 0) });
    let [first, second, third, fourth, fifth] = unpacked.as_chunks_mut().0 else {
        unreachable!("a tile has five planes");
    };
    store_bytes(decoder.plane::<0>(&numbers), first);
    store_bytes(decoder.plane::<1>(&numbers), second);
    store_bytes(decoder.plane::<2>(&numbers), third);
    store_bytes(decoder.plane::<3>(&numbers), fourth);
    store_bytes(decoder.plane::<4>(&numbers), fifth);
}

/// The constants of the way from bytes to codes. Its methods are always inlined, which the compiler grants only to functions
/// without target features: a call a tile costs more than the multiplications.
#[derive(Clone, Copy)]
struct Decoder {
    even_by_27: __m512i,
    odd_by_27: __m512i,
    even_by_9: __m512i,
    high_bytes: __m512i,
    digits: [__m512i; 5],
}

/// The two numbers in each byte of a vector: of three digits, and of two.
type Numbers = [__m512i; 2];

impl Decoder {
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    #[inline]
    fn new() -> Self {
        Self {
            even_by_27: _mm512_set1_epi16(27),
            odd_by_27: _mm512_set1_epi16(27 << 8),
            even_by_9: _mm512_set1_epi16(9),
            high_bytes: _mm512_set1_epi16(0xff00_u16.cast_signed()),
            // SAFETY: every table has 64 bytes.
            digits: DIGITS.each_ref().map(|table| unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }),
        }
    }

    #[inline(always)]
    fn numbers(&self, [first, second]: [__m512i; 2]) -> [Numbers; 2] {
        [self.numbers_of(first), self.numbers_of(second)]
    }

    #[inline(always)]
    fn numbers_of(&self, bytes: __m512i) -> Numbers {
        // Bits of the first operand where the mask has ones, else of the second.
        const SELECT: i32 = 0xca;
        // SAFETY: `new` needs the features used here, so the CPU that made `self` has them.
        unsafe {
            // 16-bit products: the digits above the point in the high byte, the fraction in the low one. The high bytes
            // of the even products move down, those of the odd ones are where they belong.
            let even = _mm512_maddubs_epi16(bytes, self.even_by_27);
            let odd = _mm512_maddubs_epi16(bytes, self.odd_by_27);
            let of_three = _mm512_ternarylogic_epi32::<SELECT>(self.high_bytes, odd, _mm512_srli_epi16::<8>(even));
            let even = _mm512_maddubs_epi16(even, self.even_by_9);
            let odd = _mm512_maddubs_epi16(odd, self.even_by_9);
            let of_two = _mm512_ternarylogic_epi32::<SELECT>(self.high_bytes, odd, _mm512_srli_epi16::<8>(even));
            [of_three, of_two]
        }
    }

    /// Multiplies plane `P` of `tile`, and puts the codes of `numbers` into that of `next`.
    ///
    /// # Safety
    /// `block` must hold the codes of the step; `tile` and `next`, which may be one, must be places of tiles.
    #[inline(always)]
    unsafe fn multiply_and_unpack<const N: usize, const P: usize>(
        &self,
        tile: *const TileCodes,
        block: *const i8,
        sums: &mut [[__m512i; 2]; N],
        numbers: &[Numbers; 2],
        next: *mut TileCodes,
    ) {
        // SAFETY: the CPU as in `numbers_of`; the rest by the caller's promise, with one reference at a time.
        unsafe {
            multiply_step::<N, P, false>(load(&*tile, P), block, sums);
            store_bytes(self.plane::<P>(numbers), &mut *next.cast::<[u8; TILE_BYTES]>().add(P));
        }
    }

    /// The codes of plane `P`, one a byte.
    #[inline(always)]
    fn plane<const P: usize>(&self, [first, second]: &[Numbers; 2]) -> [__m512i; 2] {
        [self.plane_of::<P>(*first), self.plane_of::<P>(*second)]
    }

    #[inline(always)]
    fn plane_of<const P: usize>(&self, [of_three, of_two]: Numbers) -> __m512i {
        // SAFETY: as in `numbers_of`.
        unsafe {
            if P < 3 {
                _mm512_permutexvar_epi8(of_three, self.digits[P])
            } else {
                _mm512_shuffle_epi8(self.digits[P], of_two)
            }
        }
    }
}

/// A table from a number to its base-3 digit of weight `weight`, repeated every `period` bytes.
const fn digits(weight: usize, period: usize) -> [u8; 64] {
    let mut table = [0; 64];
    let mut index = 0;
    while index < 64 {
        table[index] = (index % period / weight % 3) as u8;
        index += 1;
    }
    table
}
