//! The inner loops: tiles of sums that stay in registers, and the softmax of one query. Plain Rust for
//! [`Isa::run_widening`](crate::kernels::Isa::run_widening), so everything is inlined and there are no closures.

use std::slice::{self, ChunksExact};

use super::PARTITION;
use crate::kernels::{
    RUN, Widen,
    math::{self, LANES},
    prefetch_line,
};

/// Vectors of 16 columns of a tile of sums where registers are many and wide.
pub(super) const WIDE: usize = 4;

/// Queries of a tile at most. Six times four sums, the four columns and one query's value fit 32 registers of 16 floats;
/// six times two fit 16 of 8.
pub(super) const MAX_QUERIES: usize = 6;

/// Sums, or what is added to them, side by side.
type Vectors<const V: usize> = [[f32; LANES]; V];

/// Halves as they are stored.
type Run = [[u8; 2]; RUN];

/// Calls `$function::<N, V>` with the constant `N` that equals `$n`.
macro_rules! by_queries {
    ($n:expr, $function:ident::<N, $v:ident> $arguments:tt) => {
        match $n {
            1 => $function::<1, $v> $arguments,
            2 => $function::<2, $v> $arguments,
            3 => $function::<3, $v> $arguments,
            4 => $function::<4, $v> $arguments,
            5 => $function::<5, $v> $arguments,
            6 => $function::<6, $v> $arguments,
            n => unreachable!("a tile of {n} queries"),
        }
    };
}
pub(super) use by_queries;

/// What is multiplied: keys or values, row by row.
pub(super) trait Rows<const V: usize> {
    /// `None` when there are no more.
    fn next(&mut self) -> Option<Vectors<V>>;
}

/// Values of several positions.
pub(super) trait Values: Clone {
    /// From `position` and `column` on.
    fn at(&self, position: usize, column: usize) -> Self;
}

/// Decoded: `[rows][stride]`, from `column` on.
#[derive(Clone)]
pub(super) struct Decoded<'a> {
    rows: ChunksExact<'a, f32>,
    column: usize,
}

impl<'a> Decoded<'a> {
    #[inline(always)]
    pub(super) fn new(values: &'a [f32], stride: usize) -> Self {
        Self { rows: values.chunks_exact(stride), column: 0 }
    }
}

impl<const V: usize> Rows<V> for Decoded<'_> {
    #[inline(always)]
    fn next(&mut self) -> Option<Vectors<V>> {
        self.rows.next()?[self.column..].as_chunks().0.first_chunk().copied()
    }
}

impl Values for Decoded<'_> {
    #[inline(always)]
    fn at(&self, position: usize, column: usize) -> Self {
        Self { rows: from(position, &self.rows), column }
    }
}

/// Keys of `V` blocks as they are stored, `[head_dim]` runs each, and of the blocks that are asked for meanwhile: each line
/// twice, which costs less than to find out.
#[derive(Clone)]
pub(super) struct HalfKeys<'a, H, const V: usize> {
    blocks: [slice::Iter<'a, Run>; V],
    ahead: [*const Run; V],
    widen: H,
}

impl<'a, H, const V: usize> HalfKeys<'a, H, V> {
    #[inline(always)]
    pub(super) fn new(blocks: [&'a [Run]; V], ahead: [&'a [Run]; V], widen: H) -> Self {
        Self { blocks: blocks.map(|runs| runs.iter()), ahead: ahead.map(|runs| runs.as_ptr()), widen }
    }
}

impl<H: Widen, const V: usize> Rows<V> for HalfKeys<'_, H, V> {
    #[inline(always)]
    fn next(&mut self) -> Option<Vectors<V>> {
        let mut row = [[0.0; LANES]; V];
        for ((values, block), ahead) in row.iter_mut().zip(&mut self.blocks).zip(&mut self.ahead) {
            *values = self.widen.widen(block.next()?);
            prefetch_line(ahead.cast());
            *ahead = ahead.wrapping_add(1);
        }
        Some(row)
    }
}

/// Values of a block as they are stored, `[16][runs_per_row]` runs, and of the block that is asked for meanwhile.
#[derive(Clone)]
pub(super) struct HalfValues<'a, H> {
    rows: ChunksExact<'a, Run>,
    ahead: *const Run,
    runs_per_row: usize,
    column: usize,
    widen: H,
}

impl<'a, H> HalfValues<'a, H> {
    #[inline(always)]
    pub(super) fn new(block: &'a [Run], ahead: &'a [Run], runs_per_row: usize, widen: H) -> Self {
        Self { rows: block.chunks_exact(runs_per_row), ahead: ahead.as_ptr(), runs_per_row, column: 0, widen }
    }
}

impl<H: Widen, const V: usize> Rows<V> for HalfValues<'_, H> {
    #[inline(always)]
    fn next(&mut self) -> Option<Vectors<V>> {
        let runs: &[Run; V] = self.rows.next()?[self.column..].first_chunk()?;
        let mut row = [[0.0; LANES]; V];
        for (v, (values, run)) in row.iter_mut().zip(runs).enumerate() {
            // Two runs a line.
            if v % 2 == 0 {
                prefetch_line(self.ahead.wrapping_add(v).cast());
            }
            *values = self.widen.widen(run);
        }
        self.ahead = self.ahead.wrapping_add(self.runs_per_row);
        Some(row)
    }
}

impl<H: Widen> Values for HalfValues<'_, H> {
    #[inline(always)]
    fn at(&self, position: usize, column: usize) -> Self {
        let (rows, column) = (from(position, &self.rows), column / RUN);
        let ahead = self.ahead.wrapping_add(position * self.runs_per_row + column);
        Self { rows, ahead, column, ..self.clone() }
    }
}

/// `rows` from `first` on.
#[inline(always)]
fn from<'a, T>(first: usize, rows: &ChunksExact<'a, T>) -> ChunksExact<'a, T> {
    let mut rows = rows.clone();
    if first > 0 {
        rows.nth(first - 1);
    }
    rows
}

/// `scores[n][..16 V] = queries[n] . keys * scale`; `queries: [N][head_dim]`, `keys: [head_dim][16 V]`, rows of `scores` are a
/// partition apart.
#[inline(always)]
pub(super) fn score<const N: usize, const V: usize>(
    queries: &[f32],
    head_dim: usize,
    keys: impl Rows<V>,
    scale: f32,
    scores: &mut [f32],
) {
    let mut rows = [queries; N];
    for n in 0..N {
        rows[n] = &queries[n * head_dim..][..head_dim];
    }
    let sums = multiply_add(rows, keys, [[[0.0; LANES]; V]; N]);
    for (sums, scores) in sums.iter().zip(scores.chunks_mut(PARTITION)) {
        for (sums, scores) in sums.iter().zip(scores.as_chunks_mut::<LANES>().0) {
            for (sum, score) in sums.iter().zip(scores) {
                *score = sum * scale;
            }
        }
    }
}

/// `acc[n][..16 V] += weights[n] . values` over `num_rows` of them; rows of `weights` are a partition apart, those of `acc`
/// `stride`.
#[inline(always)]
pub(super) fn add_values<const N: usize, const V: usize>(
    weights: &[f32],
    values: impl Rows<V>,
    num_rows: usize,
    stride: usize,
    acc: &mut [f32],
) {
    let (mut rows, mut sums) = ([weights; N], [[[0.0; LANES]; V]; N]);
    for n in 0..N {
        rows[n] = &weights[n * PARTITION..][..num_rows];
        sums[n] = *acc[n * stride..].as_chunks().0.first_chunk().expect("a whole row of sums");
    }
    let sums = multiply_add(rows, values, sums);
    for n in 0..N {
        *acc[n * stride..].as_chunks_mut().0.first_chunk_mut().expect("a whole row of sums") = sums[n];
    }
}

/// `sums[n] += a[n][k] * b[k]`, k ascending, by fused multiply-add.
#[inline(always)]
fn multiply_add<const N: usize, const V: usize>(
    mut a: [&[f32]; N],
    mut b: impl Rows<V>,
    mut sums: [Vectors<V>; N],
) -> [Vectors<V>; N] {
    let len = a[0].len();
    for a in &mut a {
        *a = &a[..len];
    }
    for k in 0..len {
        let Some(row) = b.next() else {
            unreachable!("a row for every factor");
        };
        for n in 0..N {
            let a = a[n][k];
            for v in 0..V {
                for lane in 0..LANES {
                    sums[n][v][lane] = a.mul_add(row[v][lane], sums[n][v][lane]);
                }
            }
        }
    }
    sums
}

/// Scores of one query and partition -> weights; returns their sum.
#[inline(always)]
pub(super) fn exp_and_sum(scores: &mut [[f32; LANES]], max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for step in scores {
        for score in step.iter_mut() {
            *score = math::exp_non_positive(*score - max);
        }
        for lane in 0..LANES {
            lanes[lane] += step[lane];
        }
    }
    lane_tree(&lanes)
}

/// Not inlined: the compiler would cut the lanes of the whole loop in the shape of the tree.
#[inline(never)]
fn lane_tree(lanes: &[f32; LANES]) -> f32 {
    math::lane_tree(lanes)
}

/// The largest value, NaN left out.
#[inline(always)]
pub(super) fn max_16(steps: &[[f32; LANES]]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for step in steps {
        for lane in 0..LANES {
            lanes[lane] = math::larger(lanes[lane], step[lane]);
        }
    }
    largest_lane(&lanes)
}

/// Not inlined, as [`lane_tree`].
#[inline(never)]
fn largest_lane(lanes: &[f32; LANES]) -> f32 {
    math::largest(lanes)
}
