//! The head in 8 bits: a matrix that every kernel multiplies into estimates with error radii, and the choice of the rows
//! that must be scored exactly. The mathematics is in [`crate::quant::screen`].
//!
//! Memory: panels of 32 rows, `[columns / 4, 32 rows, 4]` codes, like an unpacked ternary panel.

use std::ops::Range;

use super::{
    FloatOp, Isa,
    arena::{Arena, Piece},
    math::LANES,
    packing::{ROW_TILE, TILE_BYTES, in_parallel},
    prefetch::Prefetch,
};
use crate::{
    quant::{
        activation::Version,
        screen::{Outliers, SplitRow, WeightRow, quantize_activations, quantize_weights, split_activations},
    },
    threads::{SharedRows, WorkerPool},
};

/// Where weights come from: writes the row given by its index.
pub type DecodeFloats<'d, E> = dyn Fn(usize, &mut [f32]) -> Result<(), E> + Sync + 'd;

/// A dense matrix `[rows, cols]` in 8 bits.
#[derive(Debug)]
pub struct ScreenMatrix {
    memory: Piece,
    bounds: Vec<PanelBounds>,
    prefetch: Prefetch,
    rows: usize,
    cols: usize,
}

/// What is known of the rows of a panel, field by field, so that the rows make a vector; padding rows are zero.
#[derive(Clone, Debug, Default)]
pub(super) struct PanelBounds {
    scales: [f32; ROW_TILE],
    code_sums: [i32; ROW_TILE],
    residual_norms: [f32; ROW_TILE],
    code_norms: [f32; ROW_TILE],
}

impl PanelBounds {
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> WeightRow {
        WeightRow {
            scale: self.scales[row],
            code_sum: self.code_sums[row],
            residual_norm: self.residual_norms[row],
            code_norm: self.code_norms[row],
        }
    }

    fn set_row(&mut self, row: usize, known: WeightRow) {
        self.scales[row] = known.scale;
        self.code_sums[row] = known.code_sum;
        self.residual_norms[row] = known.residual_norm;
        self.code_norms[row] = known.code_norm;
    }
}

impl ScreenMatrix {
    /// Packs a matrix that `decode_row` gives row by row, in parallel on `pool`.
    ///
    /// # Errors
    /// The error of the lowest row that could not be decoded.
    ///
    /// # Panics
    /// When a dimension is 0, `cols` exceeds [`MAX_COLS`](super::packing::MAX_COLS), or memory is exhausted.
    pub fn pack<E: Send>(
        rows: usize,
        cols: usize,
        isa: Isa,
        pool: &mut WorkerPool,
        decode_row: &DecodeFloats<'_, E>,
    ) -> Result<Self, E> {
        assert!(rows > 0 && (1..=super::packing::MAX_COLS).contains(&cols), "cannot pack a matrix of {rows} x {cols}");
        let (panel_bytes, num_panels) = (panel_bytes(cols), rows.div_ceil(ROW_TILE));
        let mut memory = Arena::whole(num_panels * panel_bytes);
        let mut bounds = vec![PanelBounds::default(); num_panels];
        let shared_panels = SharedRows::new(&mut memory[..], panel_bytes);
        let shared_bounds = SharedRows::new(&mut bounds, 1);
        in_parallel(num_panels, pool, &|share| {
            let panels = shared_panels.claim(share.clone()).chunks_exact_mut(panel_bytes);
            let bounds = shared_bounds.claim(share.clone());
            let (mut weights, mut codes) = (vec![0.0; cols], vec![0; cols.next_multiple_of(4)]);
            for (panel_index, (panel, bounds)) in share.zip(panels.zip(bounds)) {
                let first_row = panel_index * ROW_TILE;
                for row in 0..ROW_TILE.min(rows - first_row) {
                    decode_row(first_row + row, &mut weights).map_err(|error| (first_row + row, error))?;
                    bounds.set_row(row, isa.run(Quantize { weights: &weights, codes: &mut codes[..cols] }));
                    let words = panel.as_chunks_mut::<4>().0[row..].iter_mut().step_by(ROW_TILE);
                    for (word, codes) in words.zip(codes.as_chunks::<4>().0) {
                        *word = codes.map(i8::cast_unsigned);
                    }
                }
            }
            Ok(())
        })?;
        Ok(Self { memory, bounds, prefetch: Prefetch::default(), rows, cols })
    }

    /// To be read in that way.
    pub fn with_prefetch(self, prefetch: Prefetch) -> Self {
        Self { prefetch, ..self }
    }

    /// Rows: outputs of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of the codes and of what is known of the rows.
    pub fn bytes(&self) -> usize {
        self.memory.len() + size_of_val(&self.bounds[..])
    }

    /// The rows `rows`, for one worker.
    ///
    /// # Panics
    /// When `rows` reaches outside, or starts or ends inside a tile of [`ROW_TILE`] rows (the last row may end it).
    pub fn slice(&self, rows: Range<usize>) -> ScreenRows<'_> {
        let panels = super::packing::whole_panels(rows.clone(), self.rows);
        let panel_bytes = panel_bytes(self.cols);
        ScreenRows {
            codes: &self.memory[panels.start * panel_bytes..panels.end * panel_bytes],
            bounds: &self.bounds[panels],
            prefetch: self.prefetch,
            rows: rows.len(),
            cols: self.cols,
        }
    }
}

/// Whole tiles of rows of a [`ScreenMatrix`].
#[derive(Clone, Copy, Debug)]
pub struct ScreenRows<'a> {
    codes: &'a [u8],
    bounds: &'a [PanelBounds],
    prefetch: Prefetch,
    rows: usize,
    cols: usize,
}

impl<'a> ScreenRows<'a> {
    /// Rows: outputs of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether a product of `num_tokens` asks for the next panel.
    pub(super) fn asks_ahead(&self, num_tokens: usize) -> bool {
        self.prefetch.asks_ahead(num_tokens)
    }

    /// The codes of each panel and what is known of its rows.
    pub(super) fn panels(&self) -> impl Iterator<Item = (&'a [u8], &'a PanelBounds)> + use<'a> {
        self.codes.chunks_exact(panel_bytes(self.cols)).zip(self.bounds)
    }
}

/// Bits of the activations of a screen. Fewer are multiplied faster, and leave more rows to be scored exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationBits {
    /// A byte, and the high parts of a few.
    Eight,
    /// Two halves of 7 bits.
    Fourteen,
}

impl ActivationBits {
    /// Rows of bytes that a token has.
    const fn code_rows(self) -> usize {
        match self {
            Self::Eight => 1,
            Self::Fourteen => 2,
        }
    }
}

/// Inputs of a screen, in memory allocated once.
#[derive(Debug)]
pub struct ScreenInputs {
    // codes: [num_tokens, code rows of `bits`, stride]; of two, high halves and then low ones
    codes: Vec<i8>,
    rows: Vec<SplitRow>,
    outliers: Vec<Outliers>,
    bits: ActivationBits,
    cols: usize,
    stride: usize,
    version: Version,
}

impl ScreenInputs {
    /// Room for `max_tokens` rows of `cols` values.
    pub fn new(max_tokens: usize, cols: usize) -> Self {
        let (stride, bits) = (cols.next_multiple_of(4), ActivationBits::Fourteen);
        let codes = vec![0; bits.code_rows() * max_tokens * stride];
        let (rows, outliers) = (vec![SplitRow::default(); max_tokens], vec![Outliers::default(); max_tokens]);
        Self { codes, rows, outliers, bits, cols, stride, version: Version::new() }
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.rows[..]) + size_of_val(&self.outliers[..])
    }

    /// Takes in `x`, `[num_tokens, cols]`.
    ///
    /// # Panics
    /// When there are more tokens than the buffer was made for.
    pub fn fill(&mut self, x: &[f32], bits: ActivationBits, isa: Isa) {
        assert!(x.len() <= self.rows.len() * self.cols, "more tokens than there is room for");
        (self.bits, self.version) = (bits, Version::new());
        let codes = self.codes.chunks_exact_mut(bits.code_rows() * self.stride);
        let rows = self.rows.iter_mut().zip(&mut self.outliers).zip(codes);
        for (x, ((row, outliers), codes)) in x.chunks_exact(self.cols).zip(rows) {
            *row = match bits {
                ActivationBits::Eight => isa.run(QuantizeInput { x, codes: &mut codes[..x.len()], outliers }),
                ActivationBits::Fourteen => {
                    let (high, low) = codes.split_at_mut(self.stride);
                    isa.run(Split { x, high: &mut high[..x.len()], low: &mut low[..x.len()] })
                }
            };
        }
    }

    /// The first `num_tokens` rows.
    ///
    /// # Panics
    /// When the buffer has fewer.
    pub fn view(&self, num_tokens: usize) -> SplitActivations<'_> {
        SplitActivations {
            codes: &self.codes[..self.bits.code_rows() * num_tokens * self.stride],
            rows: &self.rows[..num_tokens],
            outliers: &self.outliers[..num_tokens],
            bits: self.bits,
            cols: self.cols,
            stride: self.stride,
            version: self.version,
        }
    }
}

/// Inputs of a screen, ready for a kernel.
#[derive(Clone, Copy, Debug)]
pub struct SplitActivations<'a> {
    codes: &'a [i8],
    rows: &'a [SplitRow],
    outliers: &'a [Outliers],
    bits: ActivationBits,
    cols: usize,
    stride: usize,
    version: Version,
}

impl<'a> SplitActivations<'a> {
    /// The same for two that have the same buffer's codes, and the buffer was not written in between.
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Tokens (rows).
    pub fn num_tokens(&self) -> usize {
        self.rows.len()
    }

    /// Values per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bits of a value.
    pub(super) fn bits(&self) -> ActivationBits {
        self.bits
    }

    /// What is known of row `token`.
    pub fn row(&self, token: usize) -> &'a SplitRow {
        &self.rows[token]
    }

    /// Rows of codes that a token has.
    pub(super) fn code_rows(&self) -> usize {
        self.bits.code_rows()
    }

    /// Codes, padded to a multiple of four: of token `row`, or high (`2 token`) and low (`2 token + 1`) halves.
    pub(super) fn codes(&self, row: usize) -> &'a [i8] {
        &self.codes[row * self.stride..][..self.stride]
    }

    /// The sums of products of a panel's rows with the high parts that no row of codes holds, of token `token`.
    #[inline(always)]
    pub(super) fn outlier_sums(&self, token: usize, panel: &[u8]) -> [i32; ROW_TILE] {
        let mut sums = [0; ROW_TILE];
        for (column, high) in self.outliers[token].iter() {
            let words: &[[u8; 4]; ROW_TILE] =
                panel[column / 4 * TILE_BYTES..].as_chunks().0.first_chunk().expect("a column of the panel");
            let shift = 24 - 8 * (column % 4);
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum += high * ((i32::from_le_bytes(*word) << shift) >> 24);
            }
        }
        sums
    }
}

/// Finds the rows whose exact values must be known, in memory allocated once.
#[derive(Debug, Default)]
pub struct Selection {
    lower_bounds: Vec<f32>,
    candidates: Vec<u32>,
}

impl Selection {
    /// The ids of all rows that can be among the `k` largest, ascending; at least `k` (or all).
    ///
    /// With `lower = estimate - radius` and `upper = estimate + radius`, let `T` be such that `k` rows have `lower >= T`.
    /// A row with `upper < T` is smaller than these `k`: it is neither one of the largest nor tied with them. Rounding
    /// cannot change this, for the exact values are `f32` too and rounding is monotone. `T` is the `k`-th largest of
    /// the maxima of groups of rows, hardly less than that of all.
    ///
    /// Anything monotone, such as a temperature and noise, may have been applied to both bounds alike.
    ///
    /// # Panics
    /// When the lengths differ or `k` is 0.
    pub fn candidates(&mut self, estimates: &[f32], radii: &[f32], k: usize, isa: Isa) -> &[u32] {
        assert!(k > 0 && estimates.len() == radii.len(), "{k} of {} and {} rows", estimates.len(), radii.len());
        self.candidates.clear();
        isa.run(Select { estimates, radii, k, selection: self });
        &self.candidates
    }
}

/// Rows of a group; the compiler makes vectors of it.
const GROUP: usize = 32;

struct Select<'a> {
    estimates: &'a [f32],
    radii: &'a [f32],
    k: usize,
    selection: &'a mut Selection,
}

impl FloatOp for Select<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { estimates, radii, k, selection: Selection { lower_bounds, candidates } } = self;
        if k >= estimates.len() {
            candidates.extend(0..estimates.len() as u32);
            return;
        }
        lower_bounds.clear();
        if estimates.len() / GROUP >= 4 * k {
            largest_lower_bounds(estimates, radii, lower_bounds);
        } else {
            let bounds = estimates.iter().zip(radii).map(|(estimate, radius)| estimate - radius);
            lower_bounds.extend(bounds.map(|lower| larger(f32::NEG_INFINITY, lower)));
        }
        let descending = |a: &f32, b: &f32| b.total_cmp(a);
        let (_, &mut threshold, _) = lower_bounds.select_nth_unstable_by(k - 1, descending);
        let (groups, rest) = estimates.as_chunks::<GROUP>();
        let (radii_of_groups, radii_of_rest) = radii.as_chunks::<GROUP>();
        for ((estimates, radii), first) in groups.iter().zip(radii_of_groups).zip((0..).step_by(GROUP)) {
            extend_by_possible(estimates, radii, threshold, first, candidates);
        }
        let first = estimates.len() - rest.len();
        extend_by_possible(rest, radii_of_rest, threshold, first as u32, candidates);
    }
}

/// The largest lower bound of each group of [`GROUP`] rows (of the last rows: of fewer). Rows of a group are 16 apart, so that
/// no vector is reduced.
#[inline(always)]
fn largest_lower_bounds(estimates: &[f32], radii: &[f32], lower_bounds: &mut Vec<f32>) {
    for (estimates, radii) in estimates.chunks(GROUP * LANES).zip(radii.chunks(GROUP * LANES)) {
        let mut max = [f32::NEG_INFINITY; LANES];
        let (steps, rest) = estimates.as_chunks::<LANES>();
        let (radii, radii_of_rest) = radii.as_chunks::<LANES>();
        for (estimates, radii) in steps.iter().zip(radii) {
            for lane in 0..LANES {
                max[lane] = larger(max[lane], estimates[lane] - radii[lane]);
            }
        }
        for ((max, estimate), radius) in max.iter_mut().zip(rest).zip(radii_of_rest) {
            *max = larger(*max, estimate - radius);
        }
        lower_bounds.extend_from_slice(&max);
    }
}

/// NaN, of an infinite estimate or of noise, never counts as large.
#[inline(always)]
fn larger(max: f32, lower: f32) -> f32 {
    if lower > max { lower } else { max }
}

/// Appends the ids, from `first` on, of the rows of a group that are no smaller than `threshold` for certain.
#[inline(always)]
fn extend_by_possible(estimates: &[f32], radii: &[f32], threshold: f32, first: u32, candidates: &mut Vec<u32>) {
    let mut any = false;
    for (&estimate, &radius) in estimates.iter().zip(radii) {
        any |= is_possible(estimate, radius, threshold);
    }
    if any {
        let ids = estimates.iter().zip(radii).zip(first..);
        let ids = ids.filter(|((estimate, radius), _)| is_possible(**estimate, **radius, threshold));
        candidates.extend(ids.map(|(_, id)| id));
    }
}

/// Negated, so that NaN is kept.
#[inline(always)]
#[allow(clippy::neg_cmp_op_on_partial_ord)]
fn is_possible(estimate: f32, radius: f32, threshold: f32) -> bool {
    !(estimate + radius < threshold)
}

struct Quantize<'a> {
    weights: &'a [f32],
    codes: &'a mut [i8],
}

impl FloatOp for Quantize<'_> {
    type Output = WeightRow;

    #[inline(always)]
    fn call(self) -> WeightRow {
        quantize_weights(self.weights, self.codes)
    }
}

struct Split<'a> {
    x: &'a [f32],
    high: &'a mut [i8],
    low: &'a mut [i8],
}

impl FloatOp for Split<'_> {
    type Output = SplitRow;

    #[inline(always)]
    fn call(self) -> SplitRow {
        split_activations(self.x, self.high, self.low)
    }
}

struct QuantizeInput<'a> {
    x: &'a [f32],
    codes: &'a mut [i8],
    outliers: &'a mut Outliers,
}

impl FloatOp for QuantizeInput<'_> {
    type Output = SplitRow;

    #[inline(always)]
    fn call(self) -> SplitRow {
        quantize_activations(self.x, self.codes, self.outliers)
    }
}

const fn panel_bytes(cols: usize) -> usize {
    cols.div_ceil(4) * TILE_BYTES
}
