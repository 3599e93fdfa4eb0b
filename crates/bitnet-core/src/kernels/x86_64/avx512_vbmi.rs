//! Weights of 1.6 bits on AVX-512 with VNNI and VBMI: as [`super::avx512_vnni`], which owns the kernel, with another way from
//! bytes to codes.
//!
//! A byte is a fraction of 256ths whose base-3 digits are the codes. `vpmaddubsw` multiplies by 27, which moves three digits
//! above the point, and what is left by 9, which moves the other two; two table look-ups turn these into pairs of bits.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512i, _mm512_add_epi32, _mm512_and_si512, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_maddubs_epi16,
    _mm512_permutexvar_epi8, _mm512_set1_epi8, _mm512_set1_epi16, _mm512_setzero_si512, _mm512_shuffle_epi8,
    _mm512_srai_epi32, _mm512_srli_epi16, _mm512_ternarylogic_epi32,
};

use super::{
    PanelSums,
    avx512_vnni::{BLOCK, add_sets, broadcast, load_tile, multiply_unpacked, num_sets, store, store_bytes},
    by_tokens, gemm_by_blocks, gemv_by_panels, num_tiles,
};
use crate::{
    kernels::packing::{PackedRows, TILE_BYTES},
    quant::activation::QuantizedActivations,
    threads::ColumnsMut,
};

/// From this many tokens on, three blocks share the work of unpacking a panel.
const UNPACK_FROM: usize = 2 * BLOCK + 1;

/// The first three codes of a byte, one in each pair of bits, by their value as a base-3 number.
static FIRST_THREE: [u8; 64] = pairs_of_bits([9, 3, 1], 27);

/// The last two codes, the same way; one table for each 16 bytes of a vector.
static LAST_TWO: [u8; 64] = pairs_of_bits([3, 1, 1], 9);

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
pub(super) fn gemv(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut [f32]) {
    gemv_by_panels(w, x, out, |panel, codes| panel_gemv(panel, codes));
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
pub(super) fn gemm(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>) {
    if x.num_tokens() < UNPACK_FROM {
        gemm_by_blocks(w, x, out, BLOCK, None, |panel, block, sums| {
            by_tokens!(sums.len(), [1 2 3 4 5 6 7 8 9 10 11 12], panel_gemm::<N>(panel, block, sums));
        });
    } else {
        let unpack = |panel: &[u8], unpacked: &mut [u8]| unpack(panel, unpacked);
        gemm_by_blocks(w, x, out, BLOCK, Some(&unpack), |panel, block, sums| {
            multiply_unpacked(panel, block, sums);
        });
    }
}

/// As the product of 2-bit weights: planes masked in place, each with sums of its own that are shifted once, at the end.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn panel_gemv(panel: &[u8], codes: &[i8]) -> PanelSums {
    let num_tiles = num_tiles(panel, codes, 5, 1);
    let decoder = Decoder::new();
    let masks = [0x03, 0x0c, 0x30].map(|mask| _mm512_set1_epi8(mask));
    let mut sums = [[_mm512_setzero_si512(); 5]; 2];
    for tile in 0..num_tiles {
        // SAFETY: the tile's 128 bytes lie inside the panel.
        let halves = decoder.decode_both(unsafe { load_tile(panel, tile) });
        for plane in 0..5 {
            // SAFETY: 20 codes a tile, checked by `num_tiles`.
            let x = unsafe { broadcast(codes, 5 * tile + plane) };
            for half in 0..2 {
                let weights = _mm512_and_si512(halves[half][plane / 3], masks[plane % 3]);
                sums[half][plane] = _mm512_dpbusd_epi32(sums[half][plane], weights, x);
            }
        }
    }
    store(sums.map(|[p0, p1, p2, p3, p4]| {
        let shifted = _mm512_add_epi32(_mm512_srai_epi32::<2>(_mm512_add_epi32(p1, p4)), _mm512_srai_epi32::<4>(p2));
        _mm512_add_epi32(_mm512_add_epi32(p0, p3), shifted)
    }))
}

/// For `N` tokens planes are shifted down, so that they can share sums.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn panel_gemm<const N: usize>(panel: &[u8], block: &[i8], out: &mut [PanelSums]) {
    let num_tiles = num_tiles(panel, block, 5, N);
    let decoder = Decoder::new();
    let mask = _mm512_set1_epi8(3);
    let mut sums = [[[_mm512_setzero_si512(); 2]; N]; 4];
    let mut next = [[_mm512_setzero_si512(); 2]; 2];
    for tile in 0..=num_tiles {
        // The codes of a tile are made while those of the one before are multiplied: a step ahead of their use.
        let mut halves = next;
        if tile < num_tiles {
            // SAFETY: the tile's 128 bytes lie inside the panel.
            next = decoder.decode_both(unsafe { load_tile(panel, tile) });
        }
        if tile == 0 {
            continue;
        }
        for plane in 0..5 {
            let weights = halves.map(|half| _mm512_and_si512(half[plane / 3], mask));
            for half in &mut halves {
                half[plane / 3] = _mm512_srli_epi16::<2>(half[plane / 3]);
            }
            for (token, sums) in sums[plane % const { num_sets(N) }].iter_mut().enumerate() {
                // SAFETY: 20 codes a tile and token, checked by `num_tiles`.
                let x = unsafe { broadcast(block, (5 * (tile - 1) + plane) * N + token) };
                for half in 0..2 {
                    sums[half] = _mm512_dpbusd_epi32(sums[half], weights[half], x);
                }
            }
        }
    }
    add_sets(&sums, out);
}

/// Codes of 1.6 bits as bytes: `[columns / 4, 32 rows, 4]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn unpack(panel: &[u8], unpacked: &mut [u8]) {
    let decoder = Decoder::new();
    let tiles = unpacked.as_chunks_mut::<{ 5 * TILE_BYTES }>().0;
    assert_eq!(tiles.len(), panel.len() / TILE_BYTES, "tiles of an unpacked panel");
    for (tile, unpacked) in tiles.iter_mut().enumerate() {
        // SAFETY: the tile's 128 bytes lie inside the panel.
        let [low, high] = unsafe { load_tile(panel, tile) }.map(|half| decoder.planes(half));
        for (plane, step) in unpacked.as_chunks_mut().0.iter_mut().enumerate() {
            store_bytes([low[plane], high[plane]], step);
        }
    }
}

/// The constants of the way from bytes to codes.
#[derive(Clone, Copy)]
struct Decoder {
    even_by_27: __m512i,
    odd_by_27: __m512i,
    even_by_9: __m512i,
    high_bytes: __m512i,
    first_three: __m512i,
    last_two: __m512i,
}

impl Decoder {
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    #[inline]
    fn new() -> Self {
        // SAFETY: both tables have 64 bytes.
        let [first_three, last_two] =
            unsafe { [_mm512_loadu_si512(FIRST_THREE.as_ptr().cast()), _mm512_loadu_si512(LAST_TWO.as_ptr().cast())] };
        Self {
            even_by_27: _mm512_set1_epi16(27),
            odd_by_27: _mm512_set1_epi16(27 << 8),
            even_by_9: _mm512_set1_epi16(9),
            high_bytes: _mm512_set1_epi16(0xff00_u16.cast_signed()),
            first_three,
            last_two,
        }
    }

    /// The codes of planes 0, 1, 2 and of planes 3, 4, in the pairs of bits from the lowest up.
    ///
    /// Always inlined, which the compiler grants only to functions without target features: a call a tile costs more than
    /// the multiplications.
    #[inline(always)]
    fn decode(&self, bytes: __m512i) -> [__m512i; 2] {
        // Bits of the first operand where the mask has ones, else of the second.
        const SELECT: i32 = 0xca;
        // SAFETY: `new` needs the features used here, so the CPU that made `self` has them.
        unsafe {
            // 16-bit products: the digits above the point in the high byte, the fraction in the low one. The high bytes
            // of the even products move down, those of the odd ones are where they belong.
            let even = _mm512_maddubs_epi16(bytes, self.even_by_27);
            let odd = _mm512_maddubs_epi16(bytes, self.odd_by_27);
            let first = _mm512_ternarylogic_epi32::<SELECT>(self.high_bytes, odd, _mm512_srli_epi16::<8>(even));
            let even = _mm512_maddubs_epi16(even, self.even_by_9);
            let odd = _mm512_maddubs_epi16(odd, self.even_by_9);
            let last = _mm512_ternarylogic_epi32::<SELECT>(self.high_bytes, odd, _mm512_srli_epi16::<8>(even));
            [_mm512_permutexvar_epi8(first, self.first_three), _mm512_shuffle_epi8(self.last_two, last)]
        }
    }

    /// [`Self::decode`] of both halves of a tile.
    #[inline(always)]
    fn decode_both(&self, [low, high]: [__m512i; 2]) -> [[__m512i; 2]; 2] {
        [self.decode(low), self.decode(high)]
    }

    /// The codes of each plane, one a byte.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
    #[inline]
    fn planes(&self, bytes: __m512i) -> [__m512i; 5] {
        let mask = _mm512_set1_epi8(3);
        let [a, b] = self.decode(bytes);
        let shifted = [a, _mm512_srli_epi16::<2>(a), _mm512_srli_epi16::<4>(a), b, _mm512_srli_epi16::<2>(b)];
        shifted.map(|codes| _mm512_and_si512(codes, mask))
    }
}

/// A table from a number below `count` to its digits: the one of weight `weights[i]` goes to the bits `2 i` and `2 i + 1`.
/// Repeated every 16 bytes when it is that short. A weight of 1 that comes twice repeats a digit nobody looks at.
const fn pairs_of_bits(weights: [usize; 3], count: usize) -> [u8; 64] {
    let period = if count <= 16 { 16 } else { 64 };
    let mut table = [0; 64];
    let mut index = 0;
    while index < 64 {
        let number = index % period;
        if number < count {
            let mut digit = 0;
            while digit < 3 {
                table[index] |= ((number / weights[digit] % 3) << (2 * digit)) as u8;
                digit += 1;
            }
        }
        index += 1;
    }
    table
}
