//! The gate of the feed-forward block: `m = activation(gate) * up`.

use super::{norm::RmsNorm, phases::Phases};
use crate::{
    checkpoint::Activation,
    kernels::{FloatOp, math},
    quant::activation::{ActivationBuffer, ActivationRows},
    threads::SharedRows,
};

/// `gate = activation(gate) * up`, normalized by `norm` when there is one, and its codes into `quantized`.
/// `gate`, `up: [num_rows, width]`
pub(super) fn activate(
    phases: &mut Phases<'_>,
    activation: Activation,
    norm: Option<RmsNorm<'_>>,
    gate: &mut [f32],
    up: &[f32],
    quantized: &mut ActivationBuffer,
) {
    let width = up.len() / phases.num_rows;
    let (isa, shared) = (phases.isa(), quantized.shared(phases.num_rows));
    let gate = SharedRows::new(gate, width);
    phases.over_rows(&|rows| {
        let up = &up[rows.start * width..rows.end * width];
        let (gate, quantized) = (gate.claim(rows.clone()), shared.claim(rows));
        isa.run(Activate { activation, norm, width, gate, up, quantized });
    });
}

struct Activate<'a> {
    activation: Activation,
    norm: Option<RmsNorm<'a>>,
    width: usize,
    gate: &'a mut [f32],
    up: &'a [f32],
    quantized: ActivationRows<'a>,
}

impl FloatOp for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        let rows = self.gate.chunks_exact_mut(self.width).zip(self.up.chunks_exact(self.width));
        for (row, (gate, up)) in rows.enumerate() {
            match self.activation {
                Activation::Relu2 => multiply(relu2, gate, up),
                Activation::Silu => multiply(silu, gate, up),
            }
            if let Some(norm) = &self.norm {
                norm.apply_in_place(gate);
            }
            self.quantized.quantize_row(row, gate);
        }
    }
}

/// `gate = activation(gate) * up`
#[inline(always)]
fn multiply(activation: impl Fn(f32) -> f32, gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = activation(*gate) * up;
    }
}

/// `max(x, 0)^2`; NaN stays NaN.
#[inline(always)]
fn relu2(x: f32) -> f32 {
    let positive = if x < 0.0 { 0.0 } else { x };
    positive * positive
}

/// `x * sigmoid(x)`
#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + math::exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relu2_is_the_square_of_what_is_positive() {
        assert_eq!([-3.0, -0.0, 0.5, 3.0, f32::INFINITY].map(relu2), [0.0, 0.0, 0.25, 9.0, f32::INFINITY]);
        assert!(relu2(f32::NAN).is_nan());
    }

    #[test]
    fn silu_agrees_with_double_precision_and_saturates() {
        for i in -400..=400 {
            let x = i as f32 / 20.0;
            let exact = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(silu(x)) - exact).abs() <= 3e-7 * exact.abs(), "{x}");
        }
        assert_eq!([silu(-200.0), silu(200.0)], [0.0, 200.0]);
        assert!(silu(f32::NAN).is_nan());
    }
}
