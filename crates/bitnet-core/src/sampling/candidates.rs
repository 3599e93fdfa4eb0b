//! Which ids can win the noisy choice when their logits are known but for an error.

use super::noise::{MOST_NOISE, Noise, gumbel, gumbel_bound};
use crate::kernels::{
    FloatOp,
    math::{LANES, exp, lane_tree},
    packing::ROW_TILE,
    screen::{Screened, is_below},
};

/// An id and the most its noisy score can be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    pub(super) id: u32,
    pub(super) upper: f32,
}

/// Ids, ascending, whose `logit / temperature + noise` can be the largest, ties included, when each logit lies within its
/// radius of its estimate.
///
/// ```text
/// lower[id], upper[id] = (estimate[id] -+ radius[tile of id]) / temperature + gumbel(noise.bits(id))
/// found = { id : upper[id] >= max lower }
/// ```
/// Every operation here is the one the exact score takes, and rounding is monotone: an exact score lies between the two.
/// What differs from the plain loop: tiles whose cheap upper bound stays below the best lower one so far are
/// passed over, and what was found too early is dropped at the end.
pub(super) struct NoisyCandidates<'a> {
    pub(super) screened: &'a Screened<'a>,
    pub(super) temperature: f32,
    pub(super) noise: Noise,
    pub(super) found: &'a mut Vec<Reach>,
}

impl FloatOp for NoisyCandidates<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { screened, temperature, noise, found } = self;
        found.clear();
        let mut best = f32::NEG_INFINITY;
        for ((estimates, max, radius), first) in screened.tiles().zip((0_u32..).step_by(ROW_TILE)) {
            if is_below((max + radius) / temperature + MOST_NOISE, best) {
                continue;
            }
            let mut possible = false;
            for (&estimate, id) in estimates.iter().zip(first..) {
                possible |= !is_below((estimate + radius) / temperature + gumbel_bound(noise.bits(id)), best);
            }
            if !possible {
                continue;
            }
            for (&estimate, id) in estimates.iter().zip(first..) {
                let noise = gumbel(noise.bits(id));
                let upper = (estimate + radius) / temperature + noise;
                if !is_below(upper, best) {
                    found.push(Reach { id, upper });
                }
                // NaN, of an infinite estimate, is no bound.
                let lower = (estimate - radius) / temperature + noise;
                best = if lower > best { lower } else { best };
            }
        }
        found.retain(|reach| !is_below(reach.upper, best));
    }
}

/// What the ids whose logit is less than `least` for certain add at least to a sum of exponentials.
pub(super) struct SumBelow<'a> {
    pub(super) screened: &'a Screened<'a>,
    pub(super) least: f32,
    pub(super) temperature: f32,
}

/// A lower bound of a sum of `exp(logit / temperature)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rest {
    sum: f32,
    /// The true bound is `sum * exp(reference)`.
    reference: f32,
}

impl Rest {
    /// The bound of the sum of `exp(logit / temperature - max)`. Never NaN.
    pub(super) fn relative_to(&self, max: f32) -> f64 {
        let sum = f64::from(self.sum) * f64::from(exp(self.reference - max));
        if sum.is_finite() { sum } else { 0.0 }
    }
}

impl FloatOp for SumBelow<'_> {
    type Output = Rest;

    #[inline(always)]
    fn call(self) -> Rest {
        let Self { screened, least, temperature } = self;
        let reference = least / temperature;
        let mut lanes = [0.0; LANES];
        for (estimates, _, radius) in screened.tiles() {
            for estimates in estimates.chunks(LANES) {
                for (&estimate, lane) in estimates.iter().zip(&mut lanes) {
                    let share = exp((estimate - radius) / temperature - reference);
                    *lane += if is_below(estimate + radius, least) { share } else { 0.0 };
                }
            }
        }
        Rest { sum: lane_tree(&lanes), reference }
    }
}
