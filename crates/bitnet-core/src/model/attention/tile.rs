//! The inner loops: tiles of sums that stay in registers, and the softmax of one query. Plain Rust for
//! [`Isa::run_widening`](crate::kernels::Isa::run_widening), so everything is inlined and there are no closures.

use std::ops::Range;

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
pub(super) type Vectors<const V: usize> = [[f32; LANES]; V];

/// Halves as they are stored.
type Run = [[u8; 2]; RUN];

/// Calls `$function::<N, ..>` with the constant `N` that equals `$n`.
macro_rules! by_queries {
    ($n:expr, $function:ident::<N $(, $v:ident)?> $arguments:tt) => {
        match $n {
            1 => $function::<1 $(, $v)?> $arguments,
            2 => $function::<2 $(, $v)?> $arguments,
            3 => $function::<3 $(, $v)?> $arguments,
            4 => $function::<4 $(, $v)?> $arguments,
            5 => $function::<5 $(, $v)?> $arguments,
            6 => $function::<6 $(, $v)?> $arguments,
            n => unreachable!("a tile of {n} queries"),
        }
    };
}
pub(super) use by_queries;

/// What is multiplied: keys or values, row by row.
pub(super) trait Rows<const V: usize>: Copy {
    /// Those of `range`.
    fn part(&self, range: Range<usize>) -> Self;

    fn len(&self) -> usize;

    fn at(&self, index: usize) -> Vectors<V>;
}

/// Decoded.
impl<const V: usize> Rows<V> for &[Vectors<V>] {
    #[inline(always)]
    fn part(&self, range: Range<usize>) -> Self {
        &self[range]
    }

    #[inline(always)]
    fn len(&self) -> usize {
        <[_]>::len(self)
    }

    #[inline(always)]
    fn at(&self, index: usize) -> Vectors<V> {
        self[index]
    }
}

/// Halves as they are stored, row by row in `V` places, and what is asked for meanwhile: each line twice, which costs less than
/// to find out.
#[derive(Clone, Copy)]
pub(super) struct Halves<'a, H, const V: usize> {
    /// All of one length.
    runs: [&'a [Run]; V],
    ahead: [*const Run; V],
    widen: H,
}

impl<'a, H, const V: usize> Halves<'a, H, V> {
    #[inline(always)]
    pub(super) fn new(mut runs: [&'a [Run]; V], ahead: [&'a [Run]; V], widen: H) -> Self {
        let len = runs[0].len();
        for runs in &mut runs {
            *runs = &runs[..len];
        }
        Self { runs, ahead: ahead.map(<[_]>::as_ptr), widen }
    }
}

impl<H: Widen, const V: usize> Rows<V> for Halves<'_, H, V> {
    #[inline(always)]
    fn part(&self, range: Range<usize>) -> Self {
        let mut part = *self;
        for (runs, ahead) in part.runs.iter_mut().zip(&mut part.ahead) {
            (*runs, *ahead) = (&runs[range.clone()], ahead.wrapping_add(range.start));
        }
        part
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.runs[0].len()
    }

    #[inline(always)]
    fn at(&self, index: usize) -> Vectors<V> {
        let mut row = [[0.0; LANES]; V];
        for ((values, runs), ahead) in row.iter_mut().zip(&self.runs).zip(&self.ahead) {
            *values = self.widen.widen(&runs[index]);
            prefetch_line(ahead.wrapping_add(index).cast());
        }
        row
    }
}

/// What rows are multiplied by: one factor a row and query.
trait Factors<const N: usize> {
    fn at(&self, index: usize) -> [f32; N];
}

/// Row by row.
impl<const N: usize> Factors<N> for &[[f32; N]] {
    #[inline(always)]
    fn at(&self, index: usize) -> [f32; N] {
        self[index]
    }
}

/// Query by query.
impl<const N: usize> Factors<N> for [&[f32]; N] {
    #[inline(always)]
    fn at(&self, index: usize) -> [f32; N] {
        let mut factors = [0.0; N];
        for n in 0..N {
            factors[n] = self[n][index];
        }
        factors
    }
}

/// Copies `N` queries to `tile: [head_dim][N]`.
pub(super) fn transpose<'q, const N: usize>(tile: &mut [f32], query: impl Fn(usize) -> &'q [f32]) {
    let rows: [&[f32]; N] = std::array::from_fn(query);
    for (index, cells) in tile.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        *cells = rows.at(index);
    }
}

/// `scores[n][first..][..16 V] = queries[n] . keys * scale`; `queries: [head_dim][N]`, `keys: [head_dim][16 V]`.
#[inline(always)]
pub(super) fn score<const N: usize, const V: usize>(
    queries: &[f32],
    keys: impl Rows<V>,
    scale: f32,
    scores: &mut [[f32; PARTITION]],
    first: usize,
) {
    let queries = &queries.as_chunks::<N>().0[..keys.len()];
    let sums = multiply_add(queries, keys, [[[0.0; LANES]; V]; N]);
    for (sums, scores) in sums.iter().zip(scores) {
        for (sums, scores) in sums.iter().zip(scores[first..].as_chunks_mut::<LANES>().0) {
            for (sum, score) in sums.iter().zip(scores) {
                *score = sum * scale;
            }
        }
    }
}

/// `acc[n][..16 V] += weights[n][first..] . values`; rows of `acc` are `stride` apart.
#[inline(always)]
pub(super) fn add_values<const N: usize, const V: usize>(
    weights: &[[f32; PARTITION]],
    first: usize,
    values: impl Rows<V>,
    stride: usize,
    acc: &mut [f32],
) {
    let (mut factors, mut sums) = ([&weights[0][..]; N], [[[0.0; LANES]; V]; N]);
    for n in 0..N {
        factors[n] = &weights[n][first..][..values.len()];
        sums[n] = *acc[n * stride..].as_chunks().0.first_chunk().expect("a whole row of sums");
    }
    let sums = multiply_add(factors, values, sums);
    for n in 0..N {
        *acc[n * stride..].as_chunks_mut().0.first_chunk_mut().expect("a whole row of sums") = sums[n];
    }
}

/// `sums[n] += factors[k][n] * rows[k]`, k ascending, by fused multiply-add.
#[inline(always)]
fn multiply_add<const N: usize, const V: usize>(
    factors: impl Factors<N>,
    rows: impl Rows<V>,
    mut sums: [Vectors<V>; N],
) -> [Vectors<V>; N] {
    for k in 0..rows.len() {
        let (row, factors) = (rows.at(k), factors.at(k));
        for n in 0..N {
            for v in 0..V {
                for lane in 0..LANES {
                    sums[n][v][lane] = factors[n].mul_add(row[v][lane], sums[n][v][lane]);
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
