//! The part of the boot self-test that needs the model: its own weights, as they lie in memory and in the shapes they have,
//! through the kernel. A whole token takes `scalar` seconds for a large model, so each matrix gives a few panels of rows,
//! other ones in each layer: a batch of tokens is compared with each of them alone, and one of these with `scalar`.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
};

use super::Model;
use crate::{
    kernels::{
        self, Output, SelfTestFailure, TernaryKernel,
        packing::{PackedTernary, ROW_TILE},
        screen::{ScreenBuffer, ScreenInputs, ScreenMatrix, ScreenRows, Screened, SplitActivations},
    },
    quant::activation::{ActivationBuffer, QuantizedActivations},
    threads::{ColumnsMut, WorkerPool},
};

/// Numbers of tokens for which some kernel has code of its own; for the last every kernel unpacks its weights.
const BATCHES: [usize; 14] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, MAX_TOKENS];
const MAX_TOKENS: usize = 26;
/// Rows of a product: several panels, for a kernel walks over them.
const MAX_ROWS: usize = 4 * ROW_TILE;
/// As [`BATCHES`], of the head's screen, whose activations have fewer bits where there are many tokens.
const SCREENED: [usize; 14] = [1, 2, 3, 4, 5, 6, 7, 13, 16, 18, 20, 22, 24, MAX_SCREENED];
const MAX_SCREENED: usize = 25;

impl Model {
    /// Compares products of every matrix by the kernel with `scalar`, in well under 200 ms for the 2B-4T model. `scalar`
    /// itself is the definition.
    ///
    /// # Errors
    /// A product where they differ.
    pub fn self_test(&self, pool: &mut WorkerPool) -> Result<(), SelfTestFailure> {
        if self.kernel.name() == oracle().name() {
            return Ok(());
        }
        let inputs = self.inputs();
        let failure = Mutex::new(None);
        let report = |result: Result<(), SelfTestFailure>| {
            if let Err(first) = result {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(first);
            }
        };
        // From round to round a layer's matrices meet other numbers of tokens; in a model of few layers, each all of them.
        let rounds = self.layers.len().max(BATCHES.len());
        pool.run(&|worker| {
            for round in worker.share(rounds, 1) {
                for (i, matrix) in self.layers[round % self.layers.len()].linears().into_iter().enumerate() {
                    let num_tokens = BATCHES[(round + i) % BATCHES.len()];
                    let of_its_width = inputs.iter().find(|(cols, _)| *cols == matrix.cols());
                    let (cols, x) = of_its_width.expect("inputs were made for every matrix");
                    report(self.test_product(matrix, round, x.view(num_tokens, *cols)));
                }
            }
            if let Some(screen) = &self.screen {
                report(self.test_screen(screen, worker.share(screen.rows(), ROW_TILE)));
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// [`MAX_TOKENS`] rows for every width of a matrix.
    fn inputs(&self) -> Vec<(usize, ActivationBuffer)> {
        let mut widths: Vec<_> =
            self.layers.iter().flat_map(|layer| layer.linears()).map(PackedTernary::cols).collect();
        widths.sort_unstable();
        widths.dedup();
        let quantized = |cols| {
            let mut x = ActivationBuffer::new(MAX_TOKENS, cols);
            for token in 0..MAX_TOKENS {
                x.quantize_row(token, &values(token, cols));
            }
            (cols, x)
        };
        widths.into_iter().map(quantized).collect()
    }

    fn test_product(
        &self,
        matrix: &PackedTernary,
        round: usize,
        x: QuantizedActivations<'_>,
    ) -> Result<(), SelfTestFailure> {
        // The last panel first: it may be a shorter one.
        let num_panels = matrix.rows().div_ceil(ROW_TILE);
        let last = (round + num_panels - 1) % num_panels * ROW_TILE;
        let end = matrix.rows().min(last + ROW_TILE);
        let (rows, panel) = (matrix.slice(end.next_multiple_of(ROW_TILE).saturating_sub(MAX_ROWS)..end), last..end);
        let (len, num_tokens) = (rows.rows(), x.num_tokens());
        let mut out = vec![f32::NAN; num_tokens * len];
        self.kernel.multiply(&rows, &x, &mut ColumnsMut::new(&mut out, len), Output::Replace);
        let mut alone = [f32::NAN; MAX_ROWS];
        let is_like_alone = (0..num_tokens).zip(out.chunks_exact(len)).all(|(token, out)| {
            self.kernel.gemv(&rows, &x.tokens(token..token + 1), &mut alone[..len]);
            is_equal(out, &alone[..len])
        });
        let (token, mut expected) = (round % num_tokens, vec![f32::NAN; panel.len()]);
        oracle().gemv(&matrix.slice(panel), &x.tokens(token..token + 1), &mut expected);
        if is_like_alone && is_equal(&out[(token + 1) * len - expected.len()..][..expected.len()], &expected) {
            return Ok(());
        }
        let (operation, cols) = (format!("{} product of the model", self.layout.name()), matrix.cols());
        Err(SelfTestFailure { operation, rows: matrix.rows(), cols, num_tokens })
    }

    /// Screens the ends of as many parts of the rows `share` of the head as there are numbers of tokens, and compares the last
    /// panel of each.
    fn test_screen(&self, matrix: &ScreenMatrix, share: Range<usize>) -> Result<(), SelfTestFailure> {
        let cols = matrix.cols();
        let mut inputs = ScreenInputs::new(MAX_SCREENED, cols);
        let values: Vec<f32> = (0..MAX_SCREENED).flat_map(|token| values(token, cols)).collect();
        let num_panels = share.len().div_ceil(ROW_TILE);
        let bound = |part: usize| share.end.min(share.start + num_panels * part / SCREENED.len() * ROW_TILE);
        for (part, num_tokens) in SCREENED.into_iter().enumerate() {
            let (start, end) = (bound(part), bound(part + 1));
            if start == end {
                continue;
            }
            let whole_tiles = end.next_multiple_of(ROW_TILE);
            let (rows, panel) = (start.max(whole_tiles.saturating_sub(MAX_ROWS))..end, whole_tiles - ROW_TILE..end);
            let bits = self.kernel.screen_bits(num_tokens);
            inputs.fill(&values[..num_tokens * cols], bits, self.kernel.isa());
            let x = inputs.view(num_tokens);
            let ours = screened(self.kernel, &matrix.slice(rows.clone()), &x);
            let expected = screened(oracle(), &matrix.slice(panel.clone()), &x);
            if !(0..num_tokens)
                .all(|token| is_equal(&last_tile(&ours.screened(token)), &last_tile(&expected.screened(token))))
            {
                let operation = "screen of the model".to_owned();
                return Err(SelfTestFailure { operation, rows: matrix.rows(), cols, num_tokens });
            }
        }
        Ok(())
    }
}

fn oracle() -> &'static dyn TernaryKernel {
    kernels::available()[0]
}

fn is_equal(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Codes of all sizes, without a period, other ones for each token.
fn values(token: usize, cols: usize) -> Vec<f32> {
    let first = (token * cols) as u32;
    (first..first + cols as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as f32 - 127.0).collect()
}

fn screened(kernel: &dyn TernaryKernel, rows: &ScreenRows<'_>, x: &SplitActivations<'_>) -> ScreenBuffer {
    let mut buffer = ScreenBuffer::new(x.num_tokens(), rows.rows());
    kernel.screen(rows, x, &mut buffer.shared(x.num_tokens()).claim(0..rows.rows().div_ceil(ROW_TILE)));
    buffer
}

/// All that a screen says of its last tile.
fn last_tile(screened: &Screened<'_>) -> [f32; ROW_TILE + 2] {
    let (mut all, last) = ([0.0; ROW_TILE + 2], screened.maxima.len() - 1);
    let estimates = &screened.estimates[last * ROW_TILE..];
    all[..estimates.len()].copy_from_slice(estimates);
    all[ROW_TILE..].copy_from_slice(&[screened.maxima[last], screened.radii[last]]);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::{self, Checkpoint},
        kernels::tests::{Broken, IsWrong},
        model::ModelOptions,
    };

    fn model(checkpoint: &Checkpoint, kernel: &'static dyn TernaryKernel, pool: &mut WorkerPool) -> Model {
        let options = ModelOptions { min_screened_vocab: 1, ..ModelOptions::default() };
        Model::load_with(checkpoint, kernel, &options, pool, &|_, _| {}).expect("a good model")
    }

    fn checkpoint() -> Checkpoint {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/public/p1_packed");
        checkpoint::open(path.as_ref(), &checkpoint::LoadOptions::default()).expect("a good model")
    }

    #[test]
    fn a_model_passes_with_every_kernel() {
        let (checkpoint, mut pool) = (checkpoint(), WorkerPool::new(2));
        for &kernel in kernels::available() {
            assert_eq!(model(&checkpoint, kernel, &mut pool).self_test(&mut pool), Ok(()), "{}", kernel.name());
        }
    }

    /// `kernels::self_test` would see nothing wrong with most of them.
    #[test]
    fn a_kernel_that_is_wrong_for_some_shape_of_the_model_is_found() {
        let wrong: [(IsWrong, &str); 6] = [
            (|shape| !shape.is_screen, "product of the model"),
            (|shape| shape.cols == 512 && shape.num_tokens == 1, "product of the model"),
            (|shape| shape.cols == 512 && shape.num_tokens == 5, "product of the model"),
            (|shape| shape.is_screen, "screen of the model"),
            (|shape| shape.is_screen && shape.cols == 256 && shape.num_tokens == 7, "screen of the model"),
            (|shape| shape.is_screen && shape.num_tokens == 16, "screen of the model"),
        ];
        let (checkpoint, mut pool) = (checkpoint(), WorkerPool::new(2));
        for &kernel in kernels::available() {
            for (index, (is_wrong, operation)) in wrong.into_iter().enumerate() {
                let broken = Box::leak(Box::new(Broken { kernel, is_wrong }));
                let failure = model(&checkpoint, broken, &mut pool).self_test(&mut pool).expect_err("a wrong product");
                assert!(failure.operation.ends_with(operation), "{index}: {failure}");
            }
        }
    }
}
