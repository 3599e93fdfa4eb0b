//! The head in 8 bits: a matrix that every kernel multiplies into estimates with error radii, and the choice of the rows
//! that must be scored exactly. The mathematics is in [`crate::quant::screen`].
//!
//! Memory: panels of 32 rows, `[columns / 4, 32 rows, 4]` codes, like an unpacked ternary panel.

use std::ops::Range;

use super::{
    FloatOp, Isa,
    aligned::AlignedVec,
    arena::{Arena, Piece},
    math::{larger, largest},
    packing::{ROW_TILE, TILE_BYTES, in_parallel, rows_of_tiles},
    prefetch::Prefetch,
};
use crate::{
    quant::{
        activation::Version,
        screen::{Norms, Outliers, SplitRow, WeightRow, quantize_activations, quantize_weights, split_activations},
    },
    threads::{ColumnsMut, SharedColumns, SharedRows, WorkerPool},
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
    /// Of any of them.
    norms: Norms,
}

impl PanelBounds {
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> WeightRow {
        WeightRow { scale: self.scales[row], code_sum: self.code_sums[row], norms: self.norms }
    }

    pub(super) fn norms(&self) -> &Norms {
        &self.norms
    }

    fn set_row(&mut self, row: usize, known: WeightRow) {
        self.scales[row] = known.scale;
        self.code_sums[row] = known.code_sum;
        self.norms = self.norms.max(known.norms);
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

/// What a screen says of one token: every product lies within the radius of its tile of its estimate.
#[derive(Clone, Copy, Debug)]
pub struct Screened<'a> {
    /// Close to the products. `[rows]`; never NaN.
    pub estimates: &'a [f32],
    /// The largest estimate of each tile of [`ROW_TILE`] rows. `[rows / ROW_TILE, rounded up]`
    pub maxima: &'a [f32],
    /// How far off an estimate of the tile can be, rounding included; infinite where nothing is known, never NaN. As many.
    pub radii: &'a [f32],
}

impl<'a> Screened<'a> {
    /// The tiles: `(estimates, the largest of them, radius)`.
    #[inline(always)]
    pub(crate) fn tiles(&self) -> impl Iterator<Item = (&'a [f32], f32, f32)> + use<'a> {
        let bounds = self.maxima.iter().copied().zip(self.radii.iter().copied());
        self.estimates.chunks(ROW_TILE).zip(bounds).map(|(estimates, (max, radius))| (estimates, max, radius))
    }
}

/// Screens of some tokens, in memory allocated once.
#[derive(Debug)]
pub struct ScreenBuffer {
    // [max_tokens, rows], and twice [max_tokens, tiles]
    estimates: AlignedVec<f32>,
    maxima: AlignedVec<f32>,
    radii: AlignedVec<f32>,
    rows: usize,
}

impl ScreenBuffer {
    /// Room for `max_tokens` screens of `rows` rows.
    pub fn new(max_tokens: usize, rows: usize) -> Self {
        let tiles = || AlignedVec::new(max_tokens * rows.div_ceil(ROW_TILE));
        Self { estimates: AlignedVec::new(max_tokens * rows), maxima: tiles(), radii: tiles(), rows }
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        [&self.estimates, &self.maxima, &self.radii].map(|values| size_of_val(&values[..])).iter().sum()
    }

    /// What the screen says of token `index`.
    ///
    /// # Panics
    /// When there is no such token.
    pub fn screened(&self, index: usize) -> Screened<'_> {
        let num_tiles = self.rows.div_ceil(ROW_TILE);
        let of_tiles = index * num_tiles..(index + 1) * num_tiles;
        Screened {
            estimates: &self.estimates[index * self.rows..(index + 1) * self.rows],
            maxima: &self.maxima[of_tiles.clone()],
            radii: &self.radii[of_tiles],
        }
    }

    /// Lets several workers screen the first `num_tokens` tokens in one phase.
    ///
    /// # Panics
    /// When there is room for fewer.
    pub fn shared(&mut self, num_tokens: usize) -> SharedScreens<'_> {
        let (rows, num_tiles) = (self.rows, self.rows.div_ceil(ROW_TILE));
        SharedScreens {
            estimates: SharedColumns::new(&mut self.estimates[..num_tokens * rows], rows, ROW_TILE),
            maxima: SharedColumns::new(&mut self.maxima[..num_tokens * num_tiles], num_tiles, 1),
            radii: SharedColumns::new(&mut self.radii[..num_tokens * num_tiles], num_tiles, 1),
            rows,
        }
    }
}

/// A [`ScreenBuffer`] that the workers of one phase fill together.
#[derive(Debug)]
pub struct SharedScreens<'a> {
    estimates: SharedColumns<'a>,
    maxima: SharedColumns<'a>,
    radii: SharedColumns<'a>,
    rows: usize,
}

impl<'a> SharedScreens<'a> {
    /// The rows of `tiles`, exclusively.
    ///
    /// # Panics
    /// When `tiles` reaches outside or one of them was claimed before.
    pub fn claim(&self, tiles: Range<usize>) -> ScreensMut<'a> {
        ScreensMut {
            estimates: self.estimates.claim(rows_of_tiles(tiles.clone(), self.rows)),
            maxima: self.maxima.claim(tiles.clone()),
            radii: self.radii.claim(tiles),
        }
    }
}

/// A worker's tiles of the screens of some tokens.
#[derive(Debug)]
pub struct ScreensMut<'a> {
    pub(super) estimates: ColumnsMut<'a>,
    pub(super) maxima: ColumnsMut<'a>,
    pub(super) radii: ColumnsMut<'a>,
}

impl ScreensMut<'_> {
    /// Writes what the sums of tile `tile`, counted from the first claimed, with the high and low parts of one token's codes say.
    #[inline(always)]
    pub(super) fn write(
        &mut self,
        token: usize,
        tile: usize,
        sums: &[[i32; ROW_TILE]; 2],
        rows: &PanelBounds,
        x: &SplitRow,
    ) {
        let estimates = &mut self.estimates.row_mut(token)[tile * ROW_TILE..];
        let max = if let Some(estimates) = estimates.first_chunk_mut::<ROW_TILE>() {
            estimate(sums, rows, x, estimates);
            largest(estimates)
        } else {
            let mut values = [0.0; ROW_TILE];
            estimate(sums, rows, x, &mut values);
            estimates.copy_from_slice(&values[..estimates.len()]);
            // Padding has estimates, too.
            values[estimates.len()..].fill(f32::NEG_INFINITY);
            largest(&values)
        };
        self.maxima.row_mut(token)[tile] = max;
        self.radii.row_mut(token)[tile] = x.radius(rows.norms());
    }
}

#[inline(always)]
fn estimate([high, low]: &[[i32; ROW_TILE]; 2], rows: &PanelBounds, x: &SplitRow, estimates: &mut [f32; ROW_TILE]) {
    for row in 0..ROW_TILE {
        estimates[row] = rows.row(row).estimate(x, high[row], low[row]);
    }
}

/// The largest value of each tile of `estimates`, which the screen did not write itself.
pub fn maxima_of(estimates: &[f32], maxima: &mut Vec<f32>, isa: Isa) {
    isa.run(Maxima { estimates, maxima });
}

struct Maxima<'a> {
    estimates: &'a [f32],
    maxima: &'a mut Vec<f32>,
}

impl FloatOp for Maxima<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.maxima.clear();
        let (tiles, rest) = self.estimates.as_chunks::<ROW_TILE>();
        for tile in tiles {
            self.maxima.push(largest(tile));
        }
        if !rest.is_empty() {
            self.maxima.push(rest.iter().fold(f32::NEG_INFINITY, |max, &value| larger(max, value)));
        }
    }
}

/// Finds the rows whose exact values must be known to find the `k` largest, in memory allocated once.
///
/// First [`Selection::promising`] ones, `k` where there are so many: let `T` be the smallest of their exact values. A row that
/// cannot reach `T` is smaller than these `k`: it is neither one of the largest nor tied with them. So the rest of
/// [`Selection::reaching`] decide. Rounding cannot change this, for the exact values are `f32` too and rounding is monotone.
#[derive(Debug, Default)]
pub struct Selection {
    /// The maximum of each tile, and its index.
    maxima: Vec<(f32, u32)>,
    ids: Vec<u32>,
}

impl Selection {
    /// The largest estimates of the `k` tiles that have the largest; of fewer where there are no more.
    pub fn promising(&mut self, screened: &Screened<'_>, k: usize) -> &[u32] {
        self.maxima.clear();
        self.maxima.extend(screened.maxima.iter().copied().zip(0..));
        let k = k.min(self.maxima.len());
        if let Some(last) = k.checked_sub(1) {
            self.maxima.select_nth_unstable_by(last, |(a, _), (b, _)| b.total_cmp(a));
        }
        self.ids.clear();
        self.ids.extend(self.maxima[..k].iter().map(|&(max, tile)| {
            let first = tile as usize * ROW_TILE;
            let place = screened.estimates[first..].iter().position(|&estimate| estimate == max);
            (first + place.unwrap_or(0)) as u32
        }));
        &self.ids
    }

    /// The ids of all rows that can be as large as `least`, ascending; of all where it is NaN.
    pub fn reaching(&mut self, screened: &Screened<'_>, least: f32) -> &[u32] {
        self.ids.clear();
        for ((estimates, max, radius), first) in screened.tiles().zip((0..).step_by(ROW_TILE)) {
            if !is_below(max + radius, least) {
                let ids = estimates.iter().zip(first..);
                self.ids.extend(ids.filter(|(estimate, _)| !is_below(**estimate + radius, least)).map(|(_, id)| id));
            }
        }
        &self.ids
    }
}

/// Whether what is `upper` at most is less than `least` for certain: not where either is NaN.
#[inline(always)]
pub(crate) fn is_below(upper: f32, least: f32) -> bool {
    upper < least
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
