//! BitLinear over the workers: quantized rows in, projected rows out. Workers take whole tiles of the weight's rows.

use super::phases::Phases;
use crate::{
    kernels::{
        Output,
        packing::{PackedTernary, ROW_TILE, rows_of_tiles},
    },
    quant::activation::QuantizedActivations,
    threads::SharedColumns,
};

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
    phases.pool.run_chunks(num_tiles, min_chunk(phases), &|chunk| {
        for (w, out, tiles) in &projections {
            let part = chunk.start.max(tiles.start)..chunk.end.min(tiles.end);
            if !part.is_empty() {
                let rows = rows_of_tiles(part.start - tiles.start..part.end - tiles.start, w.rows());
                kernel.multiply(&w.slice(rows.clone()), &x, &mut out.claim(rows), Output::Replace);
            }
        }
    });
}

/// The residual stream, and what is added to it.
pub(super) struct Residual<'a> {
    /// `[num_rows, width]`
    pub(super) x: &'a mut [f32],
    /// As large, scratch.
    pub(super) term: &'a mut [f32],
    /// Whether `term` will be looked at.
    pub(super) is_traced: bool,
}

/// `residual.x += w(x)`: each product is rounded before it is added. For a trace it is computed once more, alone.
pub(super) fn project_and_add(
    phases: &mut Phases<'_>,
    x: QuantizedActivations<'_>,
    w: &PackedTernary,
    residual: Residual<'_>,
) {
    if residual.is_traced {
        project(phases, x, [(w, residual.term)]);
    }
    let kernel = phases.kernel;
    let residual = SharedColumns::new(residual.x, w.rows(), ROW_TILE);
    phases.pool.run_chunks(w.rows().div_ceil(ROW_TILE), min_chunk(phases), &|tiles| {
        let rows = rows_of_tiles(tiles, w.rows());
        kernel.multiply(&w.slice(rows.clone()), &x, &mut residual.claim(rows), Output::Add);
    });
}

/// Tiles of weights whose product with a step's rows takes some microseconds, long beside handing it out.
fn min_chunk(phases: &Phases<'_>) -> usize {
    phases.kernel.min_tiles(phases.num_rows).max(8_usize.div_ceil(phases.num_rows))
}
