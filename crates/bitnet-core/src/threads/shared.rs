//! Buffers that the workers of one phase fill together: each row or column tile can be claimed once, by anyone, and the
//! claim is checked, so that the code above needs no `unsafe`.

use std::{
    marker::PhantomData,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// Rows of `row_len` elements, handed out as exclusive slices. Lives for one phase: borrow the buffer again for the next.
#[derive(Debug)]
pub struct SharedRows<'a, T> {
    data: *mut T,
    num_rows: usize,
    row_len: usize,
    claims: Claims,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: sharing a `SharedRows` only lets threads take exclusive slices of disjoint rows out of it, which is sending `T`s.
unsafe impl<T: Send> Sync for SharedRows<'_, T> {}
// SAFETY: it stands for a `&mut [T]`, which is `Send` when `T` is.
unsafe impl<T: Send> Send for SharedRows<'_, T> {}

impl<'a, T> SharedRows<'a, T> {
    /// Shares `data` as rows of `row_len` elements.
    ///
    /// # Panics
    /// When `data` is not a whole number of rows.
    pub fn new(data: &'a mut [T], row_len: usize) -> Self {
        assert!(row_len > 0 && data.len().is_multiple_of(row_len), "{} elements in rows of {row_len}", data.len());
        let num_rows = data.len() / row_len;
        Self { data: data.as_mut_ptr(), num_rows, row_len, claims: Claims::new(num_rows), borrow: PhantomData }
    }

    /// Rows.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// The elements of `rows`, exclusively.
    ///
    /// # Panics
    /// When `rows` reaches outside or one of them was claimed before.
    pub fn claim(&self, rows: Range<usize>) -> &'a mut [T] {
        self.claims.take(rows.clone());
        // SAFETY: the rows lie inside the slice given to `new` (`take` checks), which is borrowed mutably for `'a`, and no
        // other claim of theirs succeeds, so the result is the only reference to them.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(rows.start * self.row_len), rows.len() * self.row_len) }
    }
}

/// A row-major `[num_rows, num_columns]` matrix, handed out as column ranges: the output of a matrix product whose weight
/// rows are split among workers. Lives for one phase.
#[derive(Debug)]
pub struct SharedColumns<'a> {
    whole: ColumnsMut<'a>,
    tile: usize,
    claims: Claims,
}

// SAFETY: a shared `SharedColumns` gives no access to its elements but exclusive windows of disjoint columns.
unsafe impl Sync for SharedColumns<'_> {}

impl<'a> SharedColumns<'a> {
    /// Shares `data` as rows of `num_columns`, to be claimed in tiles of `tile` columns.
    ///
    /// # Panics
    /// When `data` is not a whole number of rows or `tile` is 0.
    pub fn new(data: &'a mut [f32], num_columns: usize, tile: usize) -> Self {
        assert!(tile > 0, "tiles have at least one column");
        Self { whole: ColumnsMut::new(data, num_columns), tile, claims: Claims::new(num_columns.div_ceil(tile)) }
    }

    /// The columns `columns` of every row, exclusively.
    ///
    /// # Panics
    /// When `columns` reaches outside, cuts a tile, or one of them was claimed before.
    pub fn claim(&self, columns: Range<usize>) -> ColumnsMut<'a> {
        let Range { start, end } = columns;
        let whole_tiles = start.is_multiple_of(self.tile)
            && (end.is_multiple_of(self.tile) || end == self.whole.num_columns)
            && start <= end;
        assert!(whole_tiles, "columns {start}..{end} are not whole tiles of {}", self.tile);
        self.claims.take(start.div_ceil(self.tile)..end.div_ceil(self.tile));
        // SAFETY: the tiles lie inside the matrix (`take` checks), which is borrowed mutably for `'a`, and no other claim of
        // theirs succeeds.
        unsafe { self.whole.window_unchecked(start..end) }
    }
}

/// Exclusive access to some columns of every row of a row-major matrix.
#[derive(Debug)]
pub struct ColumnsMut<'a> {
    data: *mut f32,
    num_rows: usize,
    num_columns: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for `&mut [f32]` slices, one per row.
unsafe impl Send for ColumnsMut<'_> {}

impl<'a> ColumnsMut<'a> {
    /// All columns of `data`, rows of `num_columns`.
    ///
    /// # Panics
    /// When `data` is not a whole number of rows.
    pub fn new(data: &'a mut [f32], num_columns: usize) -> Self {
        assert!(num_columns > 0 && data.len().is_multiple_of(num_columns), "{} in rows of {num_columns}", data.len());
        let num_rows = data.len() / num_columns;
        Self { data: data.as_mut_ptr(), num_rows, num_columns, row_stride: num_columns, borrow: PhantomData }
    }

    /// Rows.
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Columns of this window.
    pub fn num_columns(&self) -> usize {
        self.num_columns
    }

    /// The window's part of row `row`.
    ///
    /// # Panics
    /// When there is no such row.
    #[inline]
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.num_rows, "row {row} of {}", self.num_rows);
        // SAFETY: the row exists and this window has its columns to itself; `&mut self` excludes a second slice.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.row_stride), self.num_columns) }
    }

    /// A narrower window: `columns` count from this window's first.
    ///
    /// # Panics
    /// When `columns` reaches outside.
    pub fn window(&mut self, columns: Range<usize>) -> ColumnsMut<'_> {
        assert!(columns.start <= columns.end && columns.end <= self.num_columns, "{columns:?} of {}", self.num_columns);
        // SAFETY: inside this window, which the result borrows mutably.
        unsafe { self.window_unchecked(columns) }
    }

    /// The same columns of some rows.
    ///
    /// # Panics
    /// When `rows` reaches outside.
    pub fn rows(&mut self, rows: Range<usize>) -> ColumnsMut<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.num_rows, "rows {rows:?} of {}", self.num_rows);
        // As in `window_unchecked`: where no row is left there may be no memory.
        ColumnsMut { data: self.data.wrapping_add(rows.start * self.row_stride), num_rows: rows.len(), ..*self }
    }

    /// # Safety
    /// `columns` must lie inside this window, and nobody else may use them while the result lives.
    unsafe fn window_unchecked<'w>(&self, columns: Range<usize>) -> ColumnsMut<'w> {
        ColumnsMut {
            // With no rows there may be no memory behind the pointer: it is never used then, and `wrapping_add` keeps
            // even its computation defined.
            data: self.data.wrapping_add(columns.start),
            num_rows: self.num_rows,
            num_columns: columns.len(),
            row_stride: self.row_stride,
            borrow: PhantomData,
        }
    }
}

/// Words of claims that are kept in place: enough for every phase of a step, a tile of 16 or more rows of the largest
/// vocabulary included, so that nothing is allocated there.
const WORDS_IN_PLACE: usize = 160;

/// One bit per row or tile: set once it has been handed out.
#[derive(Debug)]
struct Claims {
    in_place: [AtomicU64; WORDS_IN_PLACE],
    /// The words after those; empty, and then not allocated, but for matrices that are packed at load.
    allocated: Box<[AtomicU64]>,
    len: usize,
}

impl Claims {
    fn new(len: usize) -> Self {
        let in_place = [const { AtomicU64::new(0) }; WORDS_IN_PLACE];
        let num_allocated = len.div_ceil(64).saturating_sub(WORDS_IN_PLACE);
        Self { in_place, allocated: (0..num_allocated).map(|_| AtomicU64::new(0)).collect(), len }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.in_place.get(index).unwrap_or_else(|| &self.allocated[index - WORDS_IN_PLACE])
    }

    /// Marks `range`; panics when it reaches outside or a part of it was marked before.
    fn take(&self, range: Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.len, "claim of {range:?} out of {}", self.len);
        let mut index = range.start;
        while index < range.end {
            let (word, bit) = (index / 64, index % 64);
            let count = (64 - bit).min(range.end - index);
            let mask = (u64::MAX >> (64 - count)) << bit;
            // Relaxed is enough: the bits exclude, while the data itself is handed over by the start and end of the phase.
            let before = self.word(word).fetch_or(mask, Ordering::Relaxed);
            assert!(before & mask == 0, "{range:?} was claimed before");
            index += count;
        }
    }
}
