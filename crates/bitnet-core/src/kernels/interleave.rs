//! Codes of activations in the order in which products of many tokens multiply them: what one step takes lies together.

#[cfg(target_arch = "x86_64")]
use std::{
    arch::x86_64::{__m128i, _mm_unpackhi_epi32, _mm_unpackhi_epi64, _mm_unpacklo_epi32, _mm_unpacklo_epi64},
    mem::transmute,
};

/// The rows `codes(0..)` of `cols` codes, a multiple of four, as blocks of `block_rows` rows, of which the last may have fewer:
/// `interleaved: [blocks][cols / 4, block_rows, 4]`.
///
/// # Panics
/// When a row is shorter or `interleaved` is no whole number of rows.
#[inline(always)]
pub fn interleave<'a>(block_rows: usize, cols: usize, codes: impl Fn(usize) -> &'a [i8], interleaved: &mut [i8]) {
    for (block, first) in interleaved.chunks_mut(block_rows * cols).zip((0..).step_by(block_rows)) {
        let rows = block.len() / cols;
        let words = block.as_chunks_mut::<4>().0;
        for row in (0..rows).step_by(4) {
            let row_words = |i: usize| codes(first + row + i)[..cols].as_chunks::<4>().0;
            if rows - row >= 4 {
                interleave_four([row_words(0), row_words(1), row_words(2), row_words(3)], row, rows, words);
            } else {
                for i in 0..rows - row {
                    for (column, word) in row_words(i).iter().enumerate() {
                        words[column * rows + row + i] = *word;
                    }
                }
            }
        }
    }
}

/// `words[column][row + i] = codes[i][column]`
#[inline(always)]
fn interleave_four(codes: [&[[i8; 4]]; 4], row: usize, block_rows: usize, words: &mut [[i8; 4]]) {
    let mut columns = words.chunks_exact_mut(block_rows);
    let [a, b, c, d] = codes;
    let fours = a.as_chunks().0.iter().zip(b.as_chunks().0).zip(c.as_chunks().0.iter().zip(d.as_chunks().0));
    for ((a, b), (c, d)) in fours {
        for (words, column) in transpose([a, b, c, d]).iter().zip(&mut columns) {
            column[row..][..4].copy_from_slice(words);
        }
    }
    for (column, index) in columns.zip(a.len() / 4 * 4..) {
        for (word, codes) in column[row..].iter_mut().zip(codes) {
            *word = codes[index];
        }
    }
}

/// `[column][row]` of four words of each of four rows.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(unsafe_code)]
fn transpose([a, b, c, d]: [&[[i8; 4]; 4]; 4]) -> [[[i8; 4]; 4]; 4] {
    // SAFETY: 16 bytes are a vector and a vector is 16 bytes, whatever their bits; SSE2 is part of x86-64.
    unsafe {
        let [a, b, c, d] = transmute::<[[[i8; 4]; 4]; 4], [__m128i; 4]>([*a, *b, *c, *d]);
        let [ab_low, ab_high] = [_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)];
        let [cd_low, cd_high] = [_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d)];
        transmute::<[__m128i; 4], [[[i8; 4]; 4]; 4]>([
            _mm_unpacklo_epi64(ab_low, cd_low),
            _mm_unpackhi_epi64(ab_low, cd_low),
            _mm_unpacklo_epi64(ab_high, cd_high),
            _mm_unpackhi_epi64(ab_high, cd_high),
        ])
    }
}

/// As above.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transpose([a, b, c, d]: [&[[i8; 4]; 4]; 4]) -> [[[i8; 4]; 4]; 4] {
    std::array::from_fn(|column| [a[column], b[column], c[column], d[column]])
}
