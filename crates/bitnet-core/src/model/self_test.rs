//! The part of the boot self-test that needs the model: its own weights, as they lie in memory, through the kernel and
//! through `scalar`. A whole token takes `scalar` seconds for a large model, so each matrix of each layer gives one panel of rows,
//! another one in each layer.

use std::sync::{Mutex, PoisonError};

use super::Model;
use crate::{
    kernels::{
        self, SelfTestFailure,
        packing::{PackedTernary, ROW_TILE},
    },
    quant::activation::ActivationBuffer,
    threads::WorkerPool,
};

impl Model {
    /// Multiplies a sample of the rows of every matrix by the kernel and by `scalar`, in well under 200 ms.
    ///
    /// # Errors
    /// A product where they differ.
    pub fn self_test(&self, pool: &mut WorkerPool) -> Result<(), SelfTestFailure> {
        let widest = self.layers.iter().flat_map(|layer| layer.linears()).map(PackedTernary::cols).max().unwrap_or(1);
        let values: Vec<_> = (0..widest as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as f32 - 127.0).collect();
        let failure = Mutex::new(None);
        pool.run(&|worker| {
            let share = worker.share(self.layers.len(), 1);
            let mut x = ActivationBuffer::new(1, widest);
            for (index, layer) in share.clone().zip(&self.layers[share]) {
                for matrix in layer.linears() {
                    x.quantize_row(0, &values[..matrix.cols()]);
                    if !self.is_right(matrix, index, &x) {
                        let (operation, num_tokens) = (format!("{} product of the model", self.layout.name()), 1);
                        let (rows, cols) = (matrix.rows(), matrix.cols());
                        *failure.lock().unwrap_or_else(PoisonError::into_inner) =
                            Some(SelfTestFailure { operation, rows, cols, num_tokens });
                    }
                }
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Whether the panel of `matrix` that layer `index` is asked for gives the bits of `scalar`.
    fn is_right(&self, matrix: &PackedTernary, index: usize, x: &ActivationBuffer) -> bool {
        let start = index % matrix.rows().div_ceil(ROW_TILE) * ROW_TILE;
        let rows = start..matrix.rows().min(start + ROW_TILE);
        let x = x.view(1, matrix.cols());
        let (mut ours, mut expected) = (vec![f32::NAN; rows.len()], vec![0.0; rows.len()]);
        self.kernel.gemv(&matrix.slice(rows.clone()), &x, &mut ours);
        kernels::available()[0].gemv(&matrix.slice(rows), &x, &mut expected);
        ours.iter().zip(&expected).all(|(ours, expected)| ours.to_bits() == expected.to_bits())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint, kernels::tests::Broken};

    #[test]
    fn a_model_passes_with_every_kernel_and_fails_with_a_broken_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/public/p1_packed");
        let checkpoint = checkpoint::open(path.as_ref(), &checkpoint::LoadOptions::default()).expect("a good model");
        let mut pool = WorkerPool::new(2);
        for &kernel in kernels::available() {
            let model = Model::load(&checkpoint, kernel, &mut pool, &|_, _| {}).expect("a good model");
            assert_eq!(model.self_test(&mut pool), Ok(()), "{}", kernel.name());
            let broken = Box::leak(Box::new(Broken { kernel, screen: false }));
            let model = Model::load(&checkpoint, broken, &mut pool, &|_, _| {}).expect("a good model");
            let failure = model.self_test(&mut pool).expect_err("a wrong product");
            assert!(failure.operation.ends_with("product of the model"), "{failure}");
        }
    }
}
