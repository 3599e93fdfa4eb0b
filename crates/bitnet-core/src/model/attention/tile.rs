//! The inner loops: tiles of sums that stay in registers, and the softmax of one query. Plain Rust for
//! [`Isa::run`](crate::kernels::Isa::run), so everything is inlined and there are no closures.

use super::PARTITION;
use crate::kernels::math::{self, LANES};

/// Columns of a tile of sums where registers are many and wide: two vectors of 16.
pub(super) const WIDE: usize = 2 * LANES;

/// Queries of a tile of `W` columns at most: enough independent sums to hide the latency of an addition, few enough for
/// them, the columns and one query's value to fit the registers (32 of 16 floats, or 16 of 8).
pub(super) const fn max_queries<const W: usize>() -> usize {
    if W == WIDE { 8 } else { 6 }
}

/// Calls `$function::<N, W>` with the constant `N` that equals `$n`.
macro_rules! by_queries {
    ($n:expr, $function:ident::<N, $w:ident> $arguments:tt) => {
        match $n {
            1 => $function::<1, $w> $arguments,
            2 => $function::<2, $w> $arguments,
            3 => $function::<3, $w> $arguments,
            4 => $function::<4, $w> $arguments,
            5 => $function::<5, $w> $arguments,
            6 => $function::<6, $w> $arguments,
            7 => $function::<7, $w> $arguments,
            8 => $function::<8, $w> $arguments,
            n => unreachable!("a tile of {n} queries"),
        }
    };
}
pub(super) use by_queries;

/// `scores[n][..W] = queries[n] . keys * scale`; `keys: [head_dim][W]`, rows of `scores` are a partition apart.
#[inline(always)]
pub(super) fn score<const N: usize, const W: usize>(queries: &[&[f32]], keys: &[f32], scale: f32, scores: &mut [f32]) {
    let queries = *queries.first_chunk::<N>().expect("a whole tile");
    let sums = multiply_add(queries, keys, W, [[0.0; W]; N]);
    for (sums, scores) in sums.iter().zip(scores.chunks_mut(PARTITION)) {
        for (score, sum) in scores.iter_mut().zip(sums) {
            *score = sum * scale;
        }
    }
}

/// `acc[n][..W] += weights[n] . values`; rows of `weights` are a partition apart, `num_positions` of them count. Rows of
/// `values` and `acc` are `stride` apart.
#[inline(always)]
pub(super) fn add_values<const N: usize, const W: usize>(
    weights: &[f32],
    num_positions: usize,
    values: &[f32],
    stride: usize,
    acc: &mut [f32],
) {
    let (mut rows, mut sums) = ([weights; N], [[0.0; W]; N]);
    for n in 0..N {
        rows[n] = &weights[n * PARTITION..][..num_positions];
        sums[n] = *acc[n * stride..].first_chunk().expect("a whole row of sums");
    }
    let sums = multiply_add(rows, values, stride, sums);
    for (n, sums) in sums.iter().enumerate() {
        acc[n * stride..][..W].copy_from_slice(sums);
    }
}

/// `sums[n] += a[n][k] * b[k]`, k ascending, by fused multiply-add; rows of `b` are `stride` apart.
#[inline(always)]
fn multiply_add<const N: usize, const W: usize>(
    mut a: [&[f32]; N],
    b: &[f32],
    stride: usize,
    mut sums: [[f32; W]; N],
) -> [[f32; W]; N] {
    let len = a[0].len();
    for a in &mut a {
        *a = &a[..len];
    }
    assert!(len.saturating_sub(1) * stride + W <= b.len(), "a row for every factor");
    for (k, row) in (0..len).zip(b.chunks(stride)) {
        // A copy, or every use would load it again.
        let row = *row.first_chunk::<W>().expect("a whole row");
        for n in 0..N {
            let a = a[n][k];
            for w in 0..W {
                sums[n][w] = a.mul_add(row[w], sums[n][w]);
            }
        }
    }
    sums
}

/// Scores of one query and partition -> weights; returns their maximum and sum.
#[inline(always)]
pub(super) fn softmax(scores: &mut [f32], num_visible: usize) -> [f32; 2] {
    // Whole vectors: what is added here weighs exactly nothing.
    let num_padded = num_visible.next_multiple_of(LANES);
    scores[num_visible..num_padded].fill(f32::NEG_INFINITY);
    let steps = scores[..num_padded].as_chunks_mut::<LANES>().0;
    let max = max_16(steps);
    let mut lanes = [0.0; LANES];
    for step in steps {
        for score in step.iter_mut() {
            *score = math::exp(*score - max);
        }
        for lane in 0..LANES {
            lanes[lane] += step[lane];
        }
    }
    [max, lane_tree(&lanes)]
}

/// Not inlined: the compiler would cut the lanes of the whole loop in the shape of the tree.
#[inline(never)]
fn lane_tree(lanes: &[f32; LANES]) -> f32 {
    math::lane_tree(lanes)
}

/// The largest value, NaN left out.
#[inline(always)]
fn max_16(steps: &[[f32; LANES]]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for step in steps {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], step[lane]);
        }
    }
    let mut max = f32::NEG_INFINITY;
    for lane in lanes {
        max = larger(max, lane);
    }
    max
}

#[inline(always)]
fn larger(max: f32, value: f32) -> f32 {
    if value > max { value } else { max }
}
