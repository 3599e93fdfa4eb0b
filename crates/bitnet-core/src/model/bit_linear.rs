//! BitLinear over the workers: quantized rows in, projected rows out. Each worker takes whole tiles of the weight's rows.

use super::phases::Phases;
use crate::{
    kernels::{
        TernaryKernel,
        packing::{PackedTernary, ROW_TILE},
    },
    quant::activation::QuantizedActivations,
    threads::{ColumnsMut, SharedColumns, Worker},
};

/// `outputs[i] = weights[i](x)` for `(weights, outputs)` pairs that share their input, in one phase.
/// `x: [num_rows, cols]`, `outputs[i]: [num_rows, weights[i].rows()]`
pub(super) fn project<const N: usize>(
    phases: &mut Phases<'_>,
    x: QuantizedActivations<'_>,
    projections: [(&PackedTernary, &mut [f32]); N],
) {
    let kernel = phases.kernel;
    let projections = projections.map(|(w, out)| (w, SharedColumns::new(out, w.rows(), ROW_TILE)));
    phases.pool.run(&|worker| {
        for (w, out) in &projections {
            multiply(kernel, worker, w, &x, out);
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
    phases.pool.run(&|worker| {
        let mut projected = multiply(kernel, worker, w, &x, &projected);
        let mut residual = residual.claim(worker.share(w.rows(), ROW_TILE));
        for row in 0..num_rows {
            for (sum, term) in residual.row_mut(row).iter_mut().zip(projected.row_mut(row)) {
                *sum += *term;
            }
        }
    });
}

/// This worker's columns of `w(x)`.
fn multiply<'a>(
    kernel: &dyn TernaryKernel,
    worker: &Worker,
    w: &PackedTernary,
    x: &QuantizedActivations<'_>,
    out: &SharedColumns<'a>,
) -> ColumnsMut<'a> {
    let share = worker.share(w.rows(), ROW_TILE);
    let mut columns = out.claim(share.clone());
    if !share.is_empty() {
        kernel.multiply(&w.slice(share), x, &mut columns);
    }
    columns
}
