//! Products of many tokens on AVX2, by tables of sums: three ternary weights have 27 values, so the 27 sums of three activations
//! that they can ask for are computed once, for 16 tokens a vector, and serve all rows. One addition from the first-level cache then
//! does 48 products, where a multiplication and an addition do 32: what such a CPU can multiply is no limit.
//!
//! ```text
//! for some panels of 32 rows:                                    read from memory once
//!     codes[chunk][panel][row] = which sum each group asks for
//!     for block of 32 tokens, chunk of 36 columns:               12 groups of three
//!         table[group] = the sums of the group's activations     20 KB, in the first-level cache
//!         wide += narrow, narrow = 0, if the chunk could overflow it     32 bits
//!         for row: narrow[row] += table[group][codes[row][group]]        for all groups; 16 bits
//! ```
//!
//! A group's columns are four apart, for that is how they lie in a byte: those of byte `j` of three steps of four columns.
//!
//! Sums of 16 bits are exact because no token's is farther from 0 than the magnitudes of its activations since the last flush
//! together. Seven chunks fit whatever they hold; of activations as they are, some thirty do.
#![allow(unsafe_code)]

use std::{
    arch::{
        asm,
        x86_64::{
            __m256i, _mm_cvtsi32_si128, _mm_loadu_si128, _mm256_abs_epi16, _mm256_add_epi8, _mm256_add_epi16,
            _mm256_add_epi32, _mm256_and_si256, _mm256_broadcastsi128_si256, _mm256_loadu_si256, _mm256_movemask_epi8,
            _mm256_packs_epi32, _mm256_permute2x128_si256, _mm256_set1_epi8, _mm256_set1_epi32, _mm256_setzero_si256,
            _mm256_shuffle_epi8, _mm256_sll_epi32, _mm256_slli_epi32, _mm256_srai_epi16, _mm256_srai_epi32,
            _mm256_srli_epi16, _mm256_storeu_si256, _mm256_sub_epi16, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64,
            _mm256_unpacklo_epi32, _mm256_unpacklo_epi64,
        },
    },
    cell::Cell,
};

use super::{
    PanelSums, SCRATCH, equal_blocks,
    tiles_256::{QUARTER_BYTES, load},
    write_outputs,
};
use crate::{
    kernels::{
        Output,
        aligned::AlignedVec,
        packing::{PackedRows, ROW_TILE, TILE_BYTES, rows_of_tiles},
        prefetch_all,
    },
    quant::activation::QuantizedActivations,
    threads::ColumnsMut,
};

/// Tokens of a block.
pub(super) const BLOCK: usize = VECTORS * LANES;

/// Vectors of tokens: of two, a sum of the one lies beside that of the other, and a row's codes are read once for both. (One at a
/// time is no faster on a Zen 3 core than multiplying.)
const VECTORS: usize = 2;

/// Tokens of a vector.
const LANES: usize = 16;

/// Sums of a group.
const SUMS: usize = 27;

/// Groups of a chunk, four for each word of codes.
const GROUPS: usize = 4 * WORDS;

/// Words of codes of a row of a chunk.
const WORDS: usize = 3;

/// Steps of four columns of a chunk.
const STEPS: usize = 3 * WORDS;

/// Bytes of the codes of a panel of a chunk: `[WORDS, 32 rows, 4 groups]`, each eight times the index of a sum.
const CODES: usize = WORDS * TILE_BYTES;

/// Panels whose sums are kept: 64 KB of 16 bits and 128 KB of 32, and making tables costs little beside using them.
const MAX_PANELS: usize = 32;

/// Panels worth the tables made for them, which take as long as 45 rows do.
pub(super) const MIN_PANELS: usize = 12;

/// Values of a table. An index is a byte: after the last group is room for what any byte asks for.
const TABLE: usize = (GROUPS * SUMS + 8) * BLOCK;

/// Scratch of the product in progress, kept between products.
#[derive(Default)]
struct Tables {
    /// `[chunks, panels]` of [`CODES`].
    codes: AlignedVec<u8>,
    /// `[GROUPS, SUMS, VECTORS, LANES]`
    table: AlignedVec<i16>,
    /// `[panels, ROW_TILE, VECTORS, LANES]`, 0 between products.
    narrow: AlignedVec<i16>,
    /// As `narrow`, but of each vector first the even lanes and then the odd.
    wide: AlignedVec<i32>,
}

thread_local! {
    static TABLES: Cell<Tables> = Cell::default();
}

/// A step's activations: `[token, 4 columns]`. Those of tokens that are missing are any.
type StepWords = [[i8; 4]; BLOCK];

/// As the kernel's product, in blocks of [`BLOCK`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn gemm(w: &PackedRows<'_>, x: &QuantizedActivations<'_>, out: &mut ColumnsMut<'_>, output: Output) {
    let (num_tokens, width) = (x.num_tokens(), x.codes(0).len());
    let (mut scratch, mut tables) = (SCRATCH.take(), TABLES.take());
    let of = (x.version(), num_tokens, BLOCK, width);
    let interleaved = x.blocks(BLOCK).unwrap_or_else(|| scratch.interleaved.get(of, |token| x.codes(token), None));
    let num_panels = w.rows().div_ceil(ROW_TILE);
    let num_steps = 4 * w.cols().div_ceil(w.layout().column_tile());
    let num_chunks = num_steps.div_ceil(STEPS);
    let mut panels = w.panels();
    let mut sums = [[0; ROW_TILE]; BLOCK];
    let panels_at_once = equal_blocks(num_panels, MAX_PANELS);
    for first_panel in (0..num_panels).step_by(panels_at_once) {
        let panel_range = first_panel..num_panels.min(first_panel + panels_at_once);
        let chunk_bytes = panel_range.len() * CODES;
        tables.codes.at_least(num_chunks * chunk_bytes);
        for (index, panel) in panels.by_ref().take(panel_range.len()).enumerate() {
            write_codes(panel, &mut tables.codes[index * CODES..], chunk_bytes);
        }
        for (block_index, block) in interleaved.chunks(BLOCK * width).enumerate() {
            let first_token = block_index * BLOCK;
            let num_block_tokens = block.len() / width;
            let words = block.as_chunks().0;
            let sums_of_codes = &x.sums()[first_token..][..num_block_tokens];
            multiply(&mut tables, (panel_range.len(), num_steps), words, num_block_tokens);
            for (wide, panel) in tables.wide.chunks_exact(ROW_TILE * BLOCK).zip(panel_range.clone()) {
                let rows = rows_of_tiles(panel..panel + 1, w.rows());
                if output == Output::Add {
                    // They are a row of a large matrix apart.
                    for token in 0..num_block_tokens {
                        prefetch_all(&out.row_mut(first_token + token)[rows.clone()]);
                    }
                }
                transpose_panel(wide, sums_of_codes, &mut sums);
                for (token, sums) in (first_token..num_tokens).zip(&sums[..num_block_tokens]) {
                    write_outputs(sums, x, token, w.scale(), (&mut out.row_mut(token)[rows.clone()], output));
                }
            }
        }
    }
    SCRATCH.set(scratch);
    TABLES.set(tables);
}

/// A panel's codes of 2 bits, of 4 steps a tile, as indices of sums; the panels of a chunk have `chunk_bytes`. What is missing to
/// a whole chunk asks for any sum: all of a column that is not there are zero.
///
/// A byte of three tiles holds the codes of 12 steps, of four groups: half a byte what two of them add to their index.
#[target_feature(enable = "avx2")]
fn write_codes(panel: &[u8], codes: &mut [u8], chunk_bytes: usize) {
    let first_two = const { shares_of_indices([1, 3]) };
    let last = const { shares_of_indices([9, 0]) };
    let first = const { shares_of_indices([0, 1]) };
    let last_two = const { shares_of_indices([3, 9]) };
    let (mut chunk, mut word) = (0, 0);
    for tiles in panel.chunks(3 * TILE_BYTES) {
        let mut places = [0; 4];
        for place in &mut places {
            *place = chunk + word * TILE_BYTES;
            (chunk, word) = if word + 1 < WORDS { (chunk, word + 1) } else { (chunk + chunk_bytes, 0) };
        }
        for quarter in 0..4 {
            let mut bytes = [_mm256_setzero_si256(); 3];
            for (tile, bytes) in bytes.iter_mut().take(tiles.len() / TILE_BYTES).enumerate() {
                // SAFETY: the tile's 128 bytes lie inside the panel.
                [*bytes] = unsafe { load(tiles, tile, quarter) };
            }
            let [[a, b], [c, d], [e, f]] = [halves(bytes[0]), halves(bytes[1]), halves(bytes[2])];
            let indices = [
                add_shares((first_two, a), (last, b)),
                add_shares((first, b), (last_two, c)),
                add_shares((first_two, d), (last, e)),
                add_shares((first, e), (last_two, f)),
            ];
            for (place, index) in places.iter().zip(indices) {
                if let Some(out) = codes.get_mut(place + quarter * QUARTER_BYTES..).and_then(<[u8]>::first_chunk_mut) {
                    let out: &mut [u8; QUARTER_BYTES] = out;
                    // SAFETY: 32 bytes.
                    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), index) };
                }
            }
        }
    }
}

/// For each half of a byte eight times what its two codes add to an index, where they count so much.
const fn shares_of_indices([low, high]: [usize; 2]) -> [u8; 16] {
    let mut shares = [0; 16];
    let mut half = 0;
    while half < shares.len() {
        // No code is 3: what that adds may be anything.
        shares[half] = (8 * (low * (half % 4) + high * (half / 4))) as u8;
        half += 1;
    }
    shares
}

/// The low and the high halves of bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn halves(bytes: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    [_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask)]
}

/// Indices from the shares of two halves.
#[target_feature(enable = "avx2")]
#[inline]
fn add_shares(a: ([u8; 16], __m256i), b: ([u8; 16], __m256i)) -> __m256i {
    _mm256_add_epi8(look_up(a.0, a.1), look_up(b.0, b.1))
}

#[target_feature(enable = "avx2")]
#[inline]
fn look_up(table: [u8; 16], halves: __m256i) -> __m256i {
    // SAFETY: 16 bytes.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), halves)
}

/// Sets `wide` of `num_panels` panels for at most a block of tokens.
#[target_feature(enable = "avx2")]
fn multiply(tables: &mut Tables, (num_panels, num_steps): (usize, usize), words: &[[i8; 4]], num_tokens: usize) {
    let values = num_panels * ROW_TILE * BLOCK;
    let table = tables.table.at_least(TABLE);
    let narrow = tables.narrow.at_least(values);
    let wide = tables.wide.at_least(values);
    let words = &words[..num_steps * num_tokens];
    let mut reach = [_mm256_setzero_si256(); VECTORS];
    let mut is_set = false;
    let chunks = tables.codes.chunks_exact(num_panels * CODES).zip((0..words.len()).step_by(STEPS * num_tokens));
    for (codes, first_word) in chunks {
        let magnitudes = make_table(&words[first_word..], num_tokens, table);
        if !extend_reach(&mut reach, magnitudes) {
            flush(narrow, wide, is_set);
            is_set = true;
        }
        add_sums(codes, table, narrow);
    }
    flush(narrow, wide, is_set);
}

/// How far from 0 each token's sums of 16 bits can be after a chunk of such magnitudes. False where that is too far: then it is
/// how far the chunk alone takes them.
#[target_feature(enable = "avx2")]
fn extend_reach(reach: &mut [__m256i; VECTORS], magnitudes: [__m256i; VECTORS]) -> bool {
    let mut is_far = 0;
    for (reach, more) in reach.iter_mut().zip(magnitudes) {
        // At most 32,767 + 36 * 128: the highest bit of 16 says whether it is more than 32,767.
        *reach = _mm256_add_epi16(*reach, more);
        is_far |= _mm256_movemask_epi8(_mm256_srai_epi16::<15>(*reach));
    }
    if is_far != 0 {
        *reach = magnitudes;
    }
    is_far == 0
}

/// The token of a place of a row of `wide`.
fn token_at(place: usize) -> usize {
    let (vector, is_odd, index) = (place / LANES, place / 8 % 2, place % 8);
    // Four lanes are tokens, the next four those 8 on: so [`column`] packs them.
    let lane = 2 * index + is_odd;
    vector * LANES + lane % 4 + lane / 8 * 4 + lane / 4 % 2 * 8
}

/// Column `j` of four, of 16 tokens.
#[target_feature(enable = "avx2")]
#[inline]
fn column(words: [__m256i; 2], j: i32) -> __m256i {
    let shift = _mm_cvtsi32_si128(24 - 8 * j);
    let [low, high] = words;
    let low = _mm256_srai_epi32::<24>(_mm256_sll_epi32(low, shift));
    _mm256_packs_epi32(low, _mm256_srai_epi32::<24>(_mm256_sll_epi32(high, shift)))
}

/// The sums of the groups of the chunk that `words` begin with, and of each token the magnitudes of its activations together.
///
/// Sum `d0 + 3 d1 + 9 d2` of a group is `(d0 - 1) a + (d1 - 1) b + (d2 - 1) c`.
#[target_feature(enable = "avx2")]
fn make_table(words: &[[i8; 4]], num_tokens: usize, table: &mut [i16]) -> [__m256i; VECTORS] {
    assert!(table.len() >= TABLE);
    let mut last = [[[0; 4]; BLOCK]; STEPS];
    let steps: [&StepWords; STEPS] = if words.len() >= (STEPS - 1) * num_tokens + BLOCK {
        std::array::from_fn(|step| words[step * num_tokens..].first_chunk().expect("words of a block"))
    } else {
        for (step, words) in last.iter_mut().zip(words.chunks_exact(num_tokens)) {
            step[..num_tokens].copy_from_slice(words);
        }
        last.each_ref()
    };
    let zero = _mm256_setzero_si256();
    let mut magnitudes = [zero; VECTORS];
    for (word, steps) in steps.as_chunks::<3>().0.iter().enumerate() {
        for vector in 0..VECTORS {
            let mut columns = [[zero; 2]; 3];
            for (columns, step) in columns.iter_mut().zip(steps) {
                for (half, columns) in columns.iter_mut().enumerate() {
                    let tokens = &step[vector * LANES + 8 * half..][..8];
                    // SAFETY: 8 words of 4 bytes.
                    *columns = unsafe { _mm256_loadu_si256(tokens.as_ptr().cast()) };
                }
            }
            for j in 0..4 {
                let group = 4 * word + j as usize;
                let [a, b, c] = [column(columns[0], j), column(columns[1], j), column(columns[2], j)];
                for column in [a, b, c] {
                    magnitudes[vector] = _mm256_add_epi16(magnitudes[vector], _mm256_abs_epi16(column));
                }
                let first = table.as_mut_ptr().wrapping_add(group * SUMS * BLOCK + vector * LANES);
                for (d2, c) in [_mm256_sub_epi16(zero, c), zero, c].into_iter().enumerate() {
                    for (d1, bc) in [_mm256_sub_epi16(c, b), c, _mm256_add_epi16(c, b)].into_iter().enumerate() {
                        let abc = [_mm256_sub_epi16(bc, a), bc, _mm256_add_epi16(bc, a)];
                        for (d0, sum) in abc.into_iter().enumerate() {
                            let place = first.wrapping_add((9 * d2 + 3 * d1 + d0) * BLOCK);
                            // SAFETY: a group's sums lie inside the table, of which the length was checked.
                            unsafe { _mm256_storeu_si256(place.cast(), sum) };
                        }
                    }
                }
            }
        }
    }
    magnitudes
}

/// Adds to each row's sums those that its codes ask for.
#[target_feature(enable = "avx2")]
fn add_sums(codes: &[u8], table: &[i16], narrow: &mut [i16]) {
    assert!(table.len() >= TABLE);
    let panels = narrow.chunks_exact_mut(ROW_TILE * BLOCK);
    for (codes, narrow) in codes.as_chunks::<CODES>().0.iter().zip(panels) {
        let codes = codes.as_chunks::<4>().0;
        for (row, sums) in narrow.chunks_exact_mut(BLOCK).enumerate() {
            let mut vectors = [_mm256_setzero_si256(); VECTORS];
            for (index, vector) in vectors.iter_mut().enumerate() {
                // SAFETY: two vectors of 16 sums.
                *vector = unsafe { _mm256_loadu_si256(sums.as_ptr().add(LANES * index).cast()) };
            }
            for word in 0..WORDS {
                let mut indices = u32::from_le_bytes(codes[word * ROW_TILE + row]);
                // No instruction, but the compiler does not know: it would load each byte, and loads are what there are most of.
                // SAFETY: no instruction at all.
                unsafe { asm!("/* {0:e} */", inout(reg) indices, options(pure, nomem, nostack, preserves_flags)) };
                for j in 0..4 {
                    // The byte is eight times an index of `BLOCK` values of two bytes.
                    let start = 2 * (4 * word + j) * SUMS * BLOCK + usize::from(indices as u8) * (2 * BLOCK / 8);
                    indices >>= 8;
                    for (index, vector) in vectors.iter_mut().enumerate() {
                        let sum = table.as_ptr().wrapping_byte_add(start + 32 * index);
                        // SAFETY: whatever the byte, it asks for what lies inside the table, of which the length was checked.
                        *vector = _mm256_add_epi16(*vector, unsafe { _mm256_loadu_si256(sum.cast()) });
                    }
                }
            }
            for (index, vector) in vectors.into_iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm256_storeu_si256(sums.as_mut_ptr().add(LANES * index).cast(), vector) };
            }
        }
    }
}

/// Moves the sums of 16 bits to those of 32, which are set before or are not.
#[target_feature(enable = "avx2")]
fn flush(narrow: &mut [i16], wide: &mut [i32], is_set: bool) {
    for (narrow, wide) in narrow.as_chunks_mut::<LANES>().0.iter_mut().zip(wide.as_chunks_mut::<LANES>().0) {
        let [even, odd] = [0, 8].map(|start| wide.as_mut_ptr().wrapping_add(start).cast::<__m256i>());
        // SAFETY: 16 values of each.
        unsafe {
            let sums = _mm256_loadu_si256(narrow.as_ptr().cast());
            let mut low = _mm256_srai_epi32::<16>(_mm256_slli_epi32::<16>(sums));
            let mut high = _mm256_srai_epi32::<16>(sums);
            if is_set {
                low = _mm256_add_epi32(_mm256_loadu_si256(even), low);
                high = _mm256_add_epi32(_mm256_loadu_si256(odd), high);
            }
            _mm256_storeu_si256(even, low);
            _mm256_storeu_si256(odd, high);
            _mm256_storeu_si256(narrow.as_mut_ptr().cast(), _mm256_setzero_si256());
        }
    }
}

/// `sums[token][row]` of a panel, as if codes were weight + 1.
#[target_feature(enable = "avx2")]
fn transpose_panel(wide: &[i32], sums_of_codes: &[i32], sums: &mut [PanelSums; BLOCK]) {
    for (eight, rows) in wide.as_chunks::<BLOCK>().0.as_chunks::<8>().0.iter().enumerate() {
        for first in (0..BLOCK).step_by(8) {
            let mut vectors = [_mm256_setzero_si256(); 8];
            for (vector, row) in vectors.iter_mut().zip(rows) {
                // SAFETY: 8 values.
                *vector = unsafe { _mm256_loadu_si256(row[first..][..8].as_ptr().cast()) };
            }
            for (place, vector) in (first..).zip(transpose(vectors)) {
                let token = token_at(place);
                let Some(&sum_of_codes) = sums_of_codes.get(token) else { continue };
                let vector = _mm256_add_epi32(vector, _mm256_set1_epi32(sum_of_codes));
                // SAFETY: 8 values.
                unsafe { _mm256_storeu_si256(sums[token][8 * eight..][..8].as_mut_ptr().cast(), vector) };
            }
        }
    }
}

/// Eight rows of eight values, as columns.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose([a, b, c, d, e, f, g, h]: [__m256i; 8]) -> [__m256i; 8] {
    let (low, high) = (transpose_halves(a, b, c, d), transpose_halves(e, f, g, h));
    let mut columns = [_mm256_setzero_si256(); 8];
    for index in 0..4 {
        columns[index] = _mm256_permute2x128_si256::<0x20>(low[index], high[index]);
        columns[index + 4] = _mm256_permute2x128_si256::<0x31>(low[index], high[index]);
    }
    columns
}

/// The same of four values of each half of four rows.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose_halves(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> [__m256i; 4] {
    let [ab_low, ab_high] = [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)];
    let [cd_low, cd_high] = [_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d)];
    [
        _mm256_unpacklo_epi64(ab_low, cd_low),
        _mm256_unpackhi_epi64(ab_low, cd_low),
        _mm256_unpacklo_epi64(ab_high, cd_high),
        _mm256_unpackhi_epi64(ab_high, cd_high),
    ]
}
