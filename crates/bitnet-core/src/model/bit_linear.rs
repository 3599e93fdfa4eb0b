//! BitLinear over the workers: quantized rows in, projected rows out. Workers take whole tiles of the weight's rows.

use super::phases::Phases;
use crate::{
    kernels::packing::{PackedTernary, ROW_TILE, rows_of_tiles},
    quant::activation::QuantizedActivations,
    threads::SharedColumns,
};

/// Products that are added while they are near: a quarter of a second-level cache.
const NEAR_VALUES: usize = 1 << 16;

/// `outputs[i] = weights[i](x)` for `(weights, outputs)` pairs that share their input, in one phase.
/// `x: [num_rows, cols]`, `outputs[i]: [num_rows, weights[i].rows()]`
pub(super) fn project<const N: usize>(
    phases: &mut Phases<'_>,
    x: QuantizedActivations<'_>,
    projections: [(&PackedTernary, &mut [f32]); N],
) {
    let kernel = phases.kernel;
    let mut num_tiles = 0;
    let projections = projections.map(|(w, out)| {
        let first = num_tiles;
        num_tiles += w.rows().div_ceil(ROW_TILE);
        (w, SharedColumns::new(out, w.rows(), ROW_TILE), first..num_tiles)
    });
    phases.pool.run_chunks(num_tiles, min_chunk(phases.num_rows), &|chunk| {
        for (w, out, tiles) in &projections {
            let part = chunk.start.max(tiles.start)..chunk.end.min(tiles.end);
            if !part.is_empty() {
                let rows = rows_of_tiles(part.start - tiles.start..part.end - tiles.start, w.rows());
                kernel.multiply(&w.slice(rows.clone()), &x, &mut out.claim(rows));
            }
        }
    });
}

/// `residual += w(x)`: the product is rounded first, into `projected`. Both are `[num_rows, w.rows()]`.
pub(super) fn project_and_add(
    phases: &mut Phases<'_>,
    x: QuantizedActivations<'_>,
    w: &PackedTernary,
    projected: &mut [f32],
    residual: &mut [f32],
) {
    let (kernel, num_rows) = (phases.kernel, phases.num_rows);
    let projected = SharedColumns::new(projected, w.rows(), ROW_TILE);
    let residual = SharedColumns::new(residual, w.rows(), ROW_TILE);
    // What is added is still in the second-level cache.
    let tiles_at_once = (NEAR_VALUES / (num_rows * ROW_TILE)).max(1);
    phases.pool.run_chunks(w.rows().div_ceil(ROW_TILE), min_chunk(num_rows), &|tiles| {
        for first in tiles.clone().step_by(tiles_at_once) {
            let rows = rows_of_tiles(first..tiles.end.min(first + tiles_at_once), w.rows());
            let (mut projected, mut residual) = (projected.claim(rows.clone()), residual.claim(rows.clone()));
            kernel.multiply(&w.slice(rows), &x, &mut projected);
            for row in 0..num_rows {
                for (sum, term) in residual.row_mut(row).iter_mut().zip(projected.row_mut(row)) {
                    *sum += *term;
                }
            }
        }
    });
}

/// Tiles of weights whose product with a step's rows takes some microseconds, long beside handing it out.
fn min_chunk(num_rows: usize) -> usize {
    8_usize.div_ceil(num_rows)
}
