//! Ternary weights in memory: which kernel can read them, tile sizes, alignment.
//!
//! Layout T32.2 (2 bits a weight): tiles of 32 rows x 16 columns are 128 bytes, the tiles of 32 rows lie one after the other
//! along the columns (a panel). Within a tile, row `r`'s word of 4 bytes is at `4 * r`; its byte `b` holds the columns
//! `4 * p + b` in the bit pairs `p = 0..4`, as code = weight + 1. Rows of one column step are neighbours, so a vector of words
//! is a vector of rows: no sums across lanes, and 4 activations are one broadcast word. Rows are padded to 32 and columns to
//! 16 with weight 0.
//!
//! Layout T32.16 (1.6 bits a weight): the same with five codes a byte, so a tile has 20 columns. A byte holds the base-3
//! number `v` of its codes, plane 0 first, as the fraction `ceil(256 v / 243) / 256`: multiplying by 3 moves the next code
//! above the point.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use super::{
    arena::{self, Arena, Piece},
    prefetch::{Prefetch, Streaming},
};
use crate::threads::{SharedRows, WorkerPool};

/// Rows of a tile: the granularity in which weights are split among workers.
pub const ROW_TILE: usize = 32;
/// Bytes of a tile: a word of four for each of its rows.
pub const TILE_BYTES: usize = 4 * ROW_TILE;
/// The most columns: every integer sum of a kernel, a plane of codes still shifted included, stays inside i32.
pub const MAX_COLS: usize = 1 << 16;

/// How codes are arranged in memory. All layouts give the same integers; which is faster depends on the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackedLayout {
    /// 2 bits a weight, tiles of 32 rows x 16 columns.
    T32x2Bit,
    /// Five trits a byte, 1.6 bits a weight, tiles of 32 rows x 20 columns.
    T32x5Trit,
}

impl PackedLayout {
    /// Every layout.
    pub const ALL: [Self; 2] = [Self::T32x2Bit, Self::T32x5Trit];

    /// `2bit` or `1.6bit`, as `--packing` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::T32x2Bit => "2bit",
            Self::T32x5Trit => "1.6bit",
        }
    }

    /// Codes of a byte: each is a plane of 4 columns of a tile.
    pub const fn planes(self) -> usize {
        match self {
            Self::T32x2Bit => 4,
            Self::T32x5Trit => 5,
        }
    }

    /// Columns of a tile.
    pub const fn column_tile(self) -> usize {
        4 * self.planes()
    }

    /// Bytes of a panel: 32 rows of `cols` columns.
    pub const fn panel_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.column_tile()) * TILE_BYTES
    }

    /// Bytes of all panels of a matrix.
    pub const fn matrix_bytes(self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(ROW_TILE) * self.panel_bytes(cols)
    }
}

/// Where weights come from: writes the -1, 0, +1 of a row, given by its index, into the slice, one per column.
pub type DecodeRow<'d, E> = dyn Fn(usize, &mut [i8]) -> Result<(), E> + Sync + 'd;

/// A ternary matrix in the layout of one kernel, with its scale.
#[derive(Debug)]
pub struct PackedTernary {
    memory: Piece,
    layout: PackedLayout,
    prefetch: Prefetch,
    rows: usize,
    cols: usize,
    scale: f32,
}

impl PackedTernary {
    /// [`Self::pack_into`] an arena of its own.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there, and when memory is exhausted.
    pub fn pack<E: Send>(
        rows: usize,
        cols: usize,
        scale: f32,
        layout: PackedLayout,
        pool: &mut WorkerPool,
        decode_row: &DecodeRow<'_, E>,
    ) -> Result<Self, E> {
        let arena = Arena::new(layout.matrix_bytes(rows, cols));
        Self::pack_into(&arena, (rows, cols), scale, layout, pool, decode_row)
    }

    /// Packs a matrix `[rows, cols]` that `decode_row` gives row by row, in parallel on `pool`. It takes
    /// [`PackedLayout::matrix_bytes`] of `arena`.
    ///
    /// # Errors
    /// The error of the lowest row that could not be decoded.
    ///
    /// # Panics
    /// When a dimension is 0, `cols` exceeds [`MAX_COLS`], a decoded weight is not ternary, or `arena` has too little left.
    pub fn pack_into<E: Send>(
        arena: &Arena,
        (rows, cols): (usize, usize),
        scale: f32,
        layout: PackedLayout,
        pool: &mut WorkerPool,
        decode_row: &DecodeRow<'_, E>,
    ) -> Result<Self, E> {
        assert!(rows > 0 && (1..=MAX_COLS).contains(&cols), "cannot pack a matrix of {rows} x {cols}");
        let panel_bytes = layout.panel_bytes(cols);
        let num_panels = rows.div_ceil(ROW_TILE);
        let mut memory = arena.take(layout.matrix_bytes(rows, cols));
        let panels = SharedRows::new(&mut memory[..], panel_bytes);
        in_parallel(num_panels, pool, &|share| {
            let mut codes = vec![0; ROW_TILE * cols.next_multiple_of(layout.column_tile())];
            let packed = panels.claim(share.clone());
            for (panel, bytes) in share.zip(packed.chunks_exact_mut(panel_bytes)) {
                let first_row = panel * ROW_TILE;
                decode_panel(first_row..rows.min(first_row + ROW_TILE), cols, &mut codes, decode_row)?;
                match layout {
                    PackedLayout::T32x2Bit => pack_panel(&codes, bytes, pack_2bit),
                    PackedLayout::T32x5Trit => pack_panel(&codes, bytes, pack_5trit),
                }
            }
            Ok(())
        })?;
        Ok(Self { memory, layout, prefetch: Prefetch::default(), rows, cols, scale })
    }

    /// A matrix of some weights, for timing: written, so that it is in memory, but not worth packing.
    pub(super) fn arbitrary(
        arena: &Arena,
        (rows, cols): (usize, usize),
        Streaming { layout, prefetch }: Streaming,
        pool: &mut WorkerPool,
    ) -> Self {
        let mut memory = arena.take(layout.matrix_bytes(rows, cols));
        arena::touch(&mut memory, pool);
        Self { memory, layout, prefetch, rows, cols, scale: 1.0 }
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

    /// Bytes of the packed codes.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// What the integer product is multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Whether row `row` has no weight but zeros.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn is_zero_row(&self, row: usize) -> bool {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        const ZEROS: u32 = u32::from_le_bytes([1; 4]);
        let zeros = match self.layout {
            PackedLayout::T32x2Bit => pack_2bit([ZEROS; 4]),
            PackedLayout::T32x5Trit => pack_5trit([ZEROS; 5]),
        };
        let panel_bytes = self.layout.panel_bytes(self.cols);
        let panel = &self.memory[row / ROW_TILE * panel_bytes..][..panel_bytes];
        panel.as_chunks::<4>().0[row % ROW_TILE..].iter().step_by(ROW_TILE).all(|word| *word == zeros)
    }

    /// The rows `rows`, for one worker.
    ///
    /// # Panics
    /// When `rows` reaches outside, or starts or ends inside a tile of [`ROW_TILE`] rows (the last row may end it).
    pub fn slice(&self, rows: Range<usize>) -> PackedRows<'_> {
        let panels = whole_panels(rows.clone(), self.rows);
        let panel_bytes = self.layout.panel_bytes(self.cols);
        PackedRows {
            codes: &self.memory[panels.start * panel_bytes..panels.end * panel_bytes],
            layout: self.layout,
            prefetch: self.prefetch,
            rows: rows.len(),
            cols: self.cols,
            scale: self.scale,
        }
    }
}

/// Whole tiles of rows of a [`PackedTernary`].
#[derive(Clone, Copy, Debug)]
pub struct PackedRows<'a> {
    codes: &'a [u8],
    layout: PackedLayout,
    prefetch: Prefetch,
    rows: usize,
    cols: usize,
    scale: f32,
}

impl<'a> PackedRows<'a> {
    /// Rows: outputs of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What the integer product is multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The arrangement of the codes.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Whether a product of `num_tokens` asks for the next panel.
    pub(super) fn asks_ahead(&self, num_tokens: usize) -> bool {
        self.prefetch.asks_ahead(num_tokens)
    }

    /// The packed bytes of each panel of 32 rows, in order: [`PackedLayout::panel_bytes`] of them, aligned to 64.
    pub(super) fn panels(&self) -> std::slice::ChunksExact<'a, u8> {
        self.codes.chunks_exact(self.layout.panel_bytes(self.cols))
    }
}

/// The rows of `tiles`, of which the last may be short: there are `num_rows`.
pub fn rows_of_tiles(tiles: Range<usize>, num_rows: usize) -> Range<usize> {
    tiles.start * ROW_TILE..num_rows.min(tiles.end * ROW_TILE)
}

/// The panels that hold `rows`, whole tiles of `num_rows` rows.
///
/// # Panics
/// When they are not.
pub(super) fn whole_panels(rows: Range<usize>, num_rows: usize) -> Range<usize> {
    let Range { start, end } = rows;
    let whole_tiles = start.is_multiple_of(ROW_TILE)
        && (end.is_multiple_of(ROW_TILE) || end == num_rows)
        && start <= end
        && end <= num_rows;
    assert!(whole_tiles, "rows {start}..{end} of {num_rows} are not whole tiles");
    start.div_ceil(ROW_TILE)..end.div_ceil(ROW_TILE)
}

/// Splits panels among the workers of `pool`; `pack` says which row it failed at. The error of the lowest row counts.
pub(super) fn in_parallel<E: Send>(
    num_panels: usize,
    pool: &mut WorkerPool,
    pack: &(dyn Fn(Range<usize>) -> Result<(), (usize, E)> + Sync),
) -> Result<(), E> {
    let first_error: Mutex<Option<(usize, E)>> = Mutex::new(None);
    pool.run(&|worker| {
        if let Err((row, error)) = pack(worker.share(num_panels, 1)) {
            let mut first = first_error.lock().unwrap_or_else(PoisonError::into_inner);
            if first.as_ref().is_none_or(|(lowest, _)| row < *lowest) {
                *first = Some((row, error));
            }
        }
    });
    match first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Decodes `rows` into `codes` (`[ROW_TILE, cols padded]`) as weight + 1. Padding rows and columns get weight 0.
fn decode_panel<E>(
    rows: Range<usize>,
    cols: usize,
    codes: &mut [i8],
    decode_row: &DecodeRow<'_, E>,
) -> Result<(), (usize, E)> {
    let row_len = codes.len() / ROW_TILE;
    for (index, codes) in codes.chunks_exact_mut(row_len).enumerate() {
        codes.fill(0);
        let row = rows.start + index;
        if row < rows.end {
            decode_row(row, &mut codes[..cols]).map_err(|error| (row, error))?;
        }
        let mut ternary = true;
        for code in codes {
            ternary &= (-1..=1).contains(code);
            *code += 1;
        }
        assert!(ternary, "row {row} was decoded to something that is not ternary");
    }
    Ok(())
}

/// Arranges `codes` (`[ROW_TILE, cols padded]`) as tiles; `pack` makes four bytes of the words of their planes.
fn pack_panel<const PLANES: usize>(codes: &[i8], panel: &mut [u8], pack: impl Fn([u32; PLANES]) -> [u8; 4]) {
    for (row, codes) in codes.chunks_exact(codes.len() / ROW_TILE).enumerate() {
        let words = panel.as_chunks_mut::<4>().0[row..].iter_mut().step_by(ROW_TILE);
        let columns = codes.as_chunks::<4>().0.as_chunks::<PLANES>().0;
        for (packed, columns) in words.zip(columns) {
            *packed = pack(columns.map(|codes| u32::from_le_bytes(codes.map(i8::cast_unsigned))));
        }
    }
}

fn pack_2bit(planes: [u32; 4]) -> [u8; 4] {
    (planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6).to_le_bytes()
}

fn pack_5trit(planes: [u32; 5]) -> [u8; 4] {
    /// The fraction of each number; at most ceil(256 * 242 / 243) = 255.
    const FRACTIONS: [u8; 243] = {
        let mut fractions = [0; 243];
        let mut number = 0;
        while number < fractions.len() {
            fractions[number] = (256 * number).div_ceil(243) as u8;
            number += 1;
        }
        fractions
    };
    // Four numbers at once: none reaches 243, so none carries into its neighbour.
    let numbers = planes.iter().fold(0, |numbers, codes| 3 * numbers + codes);
    numbers.to_le_bytes().map(|number| FRACTIONS[usize::from(number)])
}
