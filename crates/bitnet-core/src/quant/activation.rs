//! Activations as the ternary kernels take them: one int8 code per value, one scale per token (absmax).
//!
//! `s = 127 / max(absmax(x), 1e-5)`, `q = clamp(round_half_even(x * s), -128, 127)`. The arithmetic is plain Rust without
//! branches, marked to be inlined, so that it runs at the vector width of the [`crate::kernels::Isa`] it is called in, with
//! the same bits everywhere.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::threads::SharedRows;

/// Codes of a row are followed by zeros up to a multiple of this, so kernels never handle a partial step of columns,
/// whether it has 16, 20 or 64.
pub const COLUMN_PADDING: usize = 320;

/// Quantized rows, ready for a kernel.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedActivations<'a> {
    codes: &'a [i8],
    stride: usize,
    cols: usize,
    scales: &'a [f32],
    sums: &'a [i32],
    version: Version,
    /// All codes once more, and the tokens of a block.
    blocks: Option<(&'a [i8], usize)>,
}

/// What a buffer holds: a number that no buffer had before, after every change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version(u64);

impl Version {
    /// The next.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl<'a> QuantizedActivations<'a> {
    /// Tokens (rows).
    pub fn num_tokens(&self) -> usize {
        self.scales.len()
    }

    /// Values per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The same for two that have the same buffer's codes, and the buffer was not written in between.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The codes of row `token`: [`Self::cols`] of them and then zeros, a multiple of [`COLUMN_PADDING`] in all.
    pub fn codes(&self, token: usize) -> &'a [i8] {
        &self.codes[token * self.stride..][..padded(self.cols)]
    }

    /// The rows `tokens` alone, with the blocks they are in where these are whole.
    pub fn tokens(&self, tokens: Range<usize>) -> Self {
        let width = padded(self.cols);
        let is_boundary = |token: usize, of| token.is_multiple_of(of) || token == self.num_tokens();
        let are_whole = |&(_, of): &(&[i8], usize)| is_boundary(tokens.start, of) && is_boundary(tokens.end, of);
        Self {
            codes: &self.codes[tokens.start * self.stride..tokens.end * self.stride],
            scales: &self.scales[tokens.clone()],
            sums: &self.sums[tokens.clone()],
            blocks: self
                .blocks
                .filter(are_whole)
                .map(|(codes, of)| (&codes[tokens.start * width..tokens.end * width], of)),
            ..*self
        }
    }

    /// All codes in blocks of `block_tokens` rows, of which the last may have fewer, if they were put so before:
    /// `[blocks][columns / 4, block_tokens, 4]`, with as many columns as [`Self::codes`].
    pub fn blocks(&self, block_tokens: usize) -> Option<&'a [i8]> {
        self.blocks.and_then(|(codes, of)| (of == block_tokens).then_some(codes))
    }

    /// `s` of each token; NaN when the row was not finite, so that every output of the row is NaN.
    pub fn scales(&self) -> &'a [f32] {
        self.scales
    }

    /// Sum of the codes of each token: turns a product with codes {0, 1, 2} into one with {-1, 0, 1}.
    pub fn sums(&self) -> &'a [i32] {
        self.sums
    }
}

/// Memory for quantized rows, allocated once and reused by products of different widths.
#[derive(Debug)]
pub struct ActivationBuffer {
    // codes: [max_tokens, stride]
    codes: Vec<i8>,
    stride: usize,
    scales: Vec<f32>,
    sums: Vec<i32>,
    version: Version,
    /// The codes once more, where a step has many: see [`QuantizedActivations::blocks`].
    blocks: Vec<i8>,
}

impl ActivationBuffer {
    /// Room for `max_tokens` rows of up to `max_cols` values.
    pub fn new(max_tokens: usize, max_cols: usize) -> Self {
        let mut stride = max_cols.max(1).next_multiple_of(COLUMN_PADDING);
        // Rows a multiple of a page apart would compete for the same few cache sets.
        if stride.is_multiple_of(4096) {
            stride += 64;
        }
        let (codes, scales, sums) = (vec![0; max_tokens * stride], vec![0.0; max_tokens], vec![0; max_tokens]);
        let blocks = vec![0; codes.len()];
        Self { codes, stride, scales, sums, version: Version::new(), blocks }
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.blocks.len() + 4 * (self.scales.len() + self.sums.len())
    }

    /// Quantizes `values` into row `token`.
    ///
    /// # Panics
    /// When the row or its width exceeds what the buffer was made for.
    #[inline(always)]
    pub fn quantize_row(&mut self, token: usize, values: &[f32]) {
        self.version = Version::new();
        let row = &mut self.codes[token * self.stride..][..self.stride];
        (self.scales[token], self.sums[token]) = quantize(values, row);
    }

    /// Lets several workers quantize the first `num_tokens` rows in one phase.
    ///
    /// # Panics
    /// When the buffer has fewer rows.
    pub fn shared(&mut self, num_tokens: usize) -> SharedActivations<'_> {
        self.version = Version::new();
        SharedActivations {
            codes: SharedRows::new(&mut self.codes[..num_tokens * self.stride], self.stride),
            scales: SharedRows::new(&mut self.scales[..num_tokens], 1),
            sums: SharedRows::new(&mut self.sums[..num_tokens], 1),
            stride: self.stride,
        }
    }

    /// The first `num_tokens` rows, which must have been quantized from `cols` values each.
    ///
    /// # Panics
    /// When the buffer was made for less.
    pub fn view(&self, num_tokens: usize, cols: usize) -> QuantizedActivations<'_> {
        assert!(cols <= self.stride, "{cols} columns in rows of {}", self.stride);
        QuantizedActivations {
            codes: &self.codes[..num_tokens * self.stride],
            stride: self.stride,
            cols,
            scales: &self.scales[..num_tokens],
            sums: &self.sums[..num_tokens],
            version: self.version,
            blocks: None,
        }
    }

    /// [`Self::view`] with its codes in blocks of `block_tokens` rows too, which `fill` writes: it gets the rows, and memory for
    /// as many.
    ///
    /// # Panics
    /// As there.
    pub fn view_in_blocks(
        &mut self,
        num_tokens: usize,
        cols: usize,
        block_tokens: usize,
        fill: impl FnOnce(QuantizedActivations<'_>, &mut [i8]),
    ) -> QuantizedActivations<'_> {
        let mut blocks = std::mem::take(&mut self.blocks);
        let len = num_tokens * padded(cols);
        fill(self.view(num_tokens, cols), &mut blocks[..len]);
        self.blocks = blocks;
        QuantizedActivations { blocks: Some((&self.blocks[..len], block_tokens)), ..self.view(num_tokens, cols) }
    }
}

/// Rows of an [`ActivationBuffer`] that the workers of one phase fill together.
#[derive(Debug)]
pub struct SharedActivations<'a> {
    codes: SharedRows<'a, i8>,
    scales: SharedRows<'a, f32>,
    sums: SharedRows<'a, i32>,
    stride: usize,
}

impl<'a> SharedActivations<'a> {
    /// The rows `tokens`, exclusively.
    ///
    /// # Panics
    /// When `tokens` reaches outside or one of them was claimed before.
    pub fn claim(&self, tokens: Range<usize>) -> ActivationRows<'a> {
        ActivationRows {
            codes: self.codes.claim(tokens.clone()),
            scales: self.scales.claim(tokens.clone()),
            sums: self.sums.claim(tokens),
            stride: self.stride,
        }
    }
}

/// A worker's rows of an [`ActivationBuffer`].
#[derive(Debug)]
pub struct ActivationRows<'a> {
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
    stride: usize,
}

impl ActivationRows<'_> {
    /// Quantizes `values` into row `row`, counted from the first row claimed.
    ///
    /// # Panics
    /// When the row or its width exceeds what the buffer was made for.
    #[inline(always)]
    pub fn quantize_row(&mut self, row: usize, values: &[f32]) {
        let codes = &mut self.codes[row * self.stride..][..self.stride];
        (self.scales[row], self.sums[row]) = quantize(values, codes);
    }
}

/// Codes of a row of `cols` values and the zeros behind them.
fn padded(cols: usize) -> usize {
    cols.next_multiple_of(COLUMN_PADDING)
}

/// Writes the codes of `values` and the zeros behind them; returns `s` and the sum of the codes.
#[inline(always)]
fn quantize(values: &[f32], codes: &mut [i8]) -> (f32, i32) {
    let (codes, padding) = codes[..padded(values.len())].split_at_mut(values.len());
    padding.fill(0);
    let absmax = absmax(values);
    if !absmax.is_finite() {
        codes.fill(0);
        return (f32::NAN, 0);
    }
    let s = 127.0 / absmax.max(1e-5);
    let mut sum = 0;
    for (code, value) in codes.iter_mut().zip(values) {
        let q = round_half_even(value * s).clamp(-128, 127);
        *code = q as i8;
        sum += q;
    }
    (s, sum)
}

/// The largest magnitude; not finite when any value is not. Compared as integers, where NaN ranks above infinity: a
/// floating-point maximum would drop it.
#[inline(always)]
pub(crate) fn absmax(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |max, value| max.max(value.to_bits() & 0x7fff_ffff)))
}

/// Rounds `|value| < 2^22` to the nearest integer, ties to even: adding 1.5 * 2^23 leaves the integer in the low bits of
/// the mantissa, rounded by the addition itself.
#[inline(always)]
pub(crate) fn round_half_even(value: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (value + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits()).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes_of(values: &[f32]) -> (Vec<i8>, f32, i32) {
        let mut buffer = ActivationBuffer::new(1, values.len());
        buffer.quantize_row(0, values);
        let view = buffer.view(1, values.len());
        (view.codes(0)[..values.len()].to_vec(), view.scales()[0], view.sums()[0])
    }

    #[test]
    fn follows_the_formula_with_ties_to_even() {
        // absmax 127, so s is 1 and the values are what gets rounded.
        let values = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 0.499_999_97, -2.500_000_2, 0.0];
        let (codes, s, sum) = codes_of(&values);
        assert_eq!(s, 1.0);
        assert_eq!(codes, [127, 0, 2, 2, 0, -2, -127, 0, -3, 0]);
        assert_eq!(sum, -1);
    }

    #[test]
    fn agrees_with_the_standard_library_on_many_values() {
        let values: Vec<f32> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) as f32 / 1e6) - 2147.0).collect();
        let (codes, s, sum) = codes_of(&values);
        let absmax = values.iter().fold(0f32, |max, v| max.max(v.abs()));
        assert_eq!(s.to_bits(), (127.0 / absmax).to_bits());
        let expected: Vec<i8> = values.iter().map(|v| (v * s).round_ties_even().clamp(-128.0, 127.0) as i8).collect();
        assert_eq!(codes, expected);
        assert_eq!(sum, expected.iter().map(|&q| i32::from(q)).sum::<i32>());
    }

    #[test]
    fn tiny_rows_use_the_floor() {
        let (codes, s, _) = codes_of(&[1e-7, -4e-6]);
        assert_eq!(s.to_bits(), (127.0f32 / 1e-5).to_bits());
        assert_eq!(codes, [1, -51]);
    }

    #[test]
    fn values_that_are_not_finite_poison_the_scale() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for position in [0, 7, 40] {
                let mut values = [1.0; 41];
                values[position] = bad;
                let (codes, s, sum) = codes_of(&values);
                assert!(s.is_nan() && sum == 0 && codes.iter().all(|&q| q == 0), "{bad} at {position}");
            }
        }
    }

    #[test]
    fn padding_is_zero_when_rows_get_narrower() {
        let mut buffer = ActivationBuffer::new(2, 200);
        buffer.quantize_row(1, &[1.0; 200]);
        buffer.shared(2).claim(1..2).quantize_row(0, &[1.0; 70]);
        let view = buffer.view(2, 70);
        assert_eq!(view.codes(1).len(), COLUMN_PADDING);
        assert!(view.codes(1)[70..].iter().all(|&q| q == 0));
        assert_eq!(view.sums()[1], 70 * 127);
    }
}
