//! RMSNorm, and the quantization of its result for the linear layers that follow.

use super::phases::Phases;
use crate::{
    kernels::{FloatOp, math},
    quant::activation::{ActivationBuffer, ActivationRows},
    threads::SharedRows,
};

/// The weights of one RMSNorm.
#[derive(Clone, Copy)]
pub(super) struct RmsNorm<'a> {
    pub(super) weight: &'a [f32],
    /// Values the mean is over: those of the row, and the zeros that are not kept.
    pub(super) count: usize,
    pub(super) eps: f32,
}

impl<'a> RmsNorm<'a> {
    /// Over rows as wide as `weight`.
    pub(super) fn new(weight: &'a [f32], eps: f32) -> Self {
        Self { weight, count: weight.len(), eps }
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight`
    #[inline(always)]
    pub(super) fn apply(&self, x: &[f32], out: &mut [f32]) {
        let inverse = self.inverse_rms(x);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
            *out = x * inverse * weight;
        }
    }

    /// As [`RmsNorm::apply`], in place.
    #[inline(always)]
    pub(super) fn apply_in_place(&self, x: &mut [f32]) {
        let inverse = self.inverse_rms(x);
        for (x, weight) in x.iter_mut().zip(self.weight) {
            *x = *x * inverse * weight;
        }
    }

    #[inline(always)]
    fn inverse_rms(&self, x: &[f32]) -> f32 {
        1.0 / (math::sum_squares_16(x) / self.count as f32 + self.eps).sqrt()
    }
}

/// The codes of `norm(x)` into `quantized`. All are `[num_rows, width]`. What has codes is of no more use: unless `is_kept`,
/// every worker writes its rows of `normed` to one place, for all of them would go through memory.
pub(super) fn normalize(
    phases: &mut Phases<'_>,
    norm: RmsNorm<'_>,
    x: &[f32],
    normed: &mut [f32],
    is_kept: bool,
    quantized: &mut ActivationBuffer,
) {
    let width = norm.weight.len();
    let (isa, shared) = (phases.isa(), quantized.shared(phases.num_rows));
    let normed = SharedRows::new(normed, width);
    phases.over_rows(&|rows| {
        let x = &x[rows.start * width..rows.end * width];
        let kept = if is_kept { rows.clone() } else { rows.start..rows.end.min(rows.start + 1) };
        isa.run(Normalize { norm, x, normed: normed.claim(kept), quantized: shared.claim(rows) });
    });
}

/// Codes of `x` (`[num_rows, width]`) into `quantized`, after `norm` in place when there is one.
pub(super) fn normalize_in_place(
    phases: &mut Phases<'_>,
    norm: Option<RmsNorm<'_>>,
    x: &mut [f32],
    quantized: &mut ActivationBuffer,
) {
    let width = x.len() / phases.num_rows;
    let (isa, shared) = (phases.isa(), quantized.shared(phases.num_rows));
    let x = SharedRows::new(x, width);
    phases.over_rows(&|rows| {
        isa.run(NormalizeInPlace { norm, width, x: x.claim(rows.clone()), quantized: shared.claim(rows) });
    });
}

struct Normalize<'a> {
    norm: RmsNorm<'a>,
    x: &'a [f32],
    /// All rows, or one.
    normed: &'a mut [f32],
    quantized: ActivationRows<'a>,
}

impl FloatOp for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        let width = self.norm.weight.len();
        let num_kept = self.normed.len() / width;
        for (row, x) in self.x.chunks_exact(width).enumerate() {
            let normed = &mut self.normed[row % num_kept * width..][..width];
            self.norm.apply(x, normed);
            self.quantized.quantize_row(row, normed);
        }
    }
}

struct NormalizeInPlace<'a> {
    norm: Option<RmsNorm<'a>>,
    width: usize,
    x: &'a mut [f32],
    quantized: ActivationRows<'a>,
}

impl FloatOp for NormalizeInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        for (row, x) in self.x.chunks_exact_mut(self.width).enumerate() {
            if let Some(norm) = &self.norm {
                norm.apply_in_place(x);
            }
            self.quantized.quantize_row(row, x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divides_by_the_root_mean_square_and_multiplies_by_the_weight() {
        let norm = RmsNorm::new(&[1.0, 2.0, -1.0, 0.5], 0.0);
        let mut out = [0.0; 4];
        norm.apply(&[3.0, -3.0, 3.0, -3.0], &mut out);
        assert_eq!(out, [1.0, -2.0, -1.0, -0.5]);
        let mut x = [3.0, -3.0, 3.0, -3.0];
        norm.apply_in_place(&mut x);
        assert_eq!(x, out);
    }

    #[test]
    fn epsilon_keeps_a_zero_row_at_zero() {
        let mut x = [0.0; 20];
        RmsNorm::new(&[1.0; 20], 1e-5).apply_in_place(&mut x);
        assert_eq!(x, [0.0; 20]);
    }
}
