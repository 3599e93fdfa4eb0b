//! Which ids can win the noisy choice when their logits are known but for an error.

use super::noise::{Noise, gumbel, gumbel_bound};
use crate::kernels::FloatOp;

/// An id and the most its noisy score can be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    pub(super) id: u32,
    upper: f32,
}

/// Ids, ascending, whose `logit / temperature + noise` can be the largest, ties included, when each logit lies within its
/// radius of its estimate.
///
/// ```text
/// lower[id], upper[id] = (estimate[id] -+ radius[id]) / temperature + gumbel(noise.bits(id))
/// found = { id : upper[id] >= max lower }
/// ```
/// Every operation here is the one the exact score takes, and rounding is monotone: an exact score lies between the two.
/// What differs from the plain loop: groups of ids whose cheap upper bound stays below the best lower one so far are
/// passed over, and what was found too early is dropped at the end.
pub(super) struct NoisyCandidates<'a> {
    pub(super) estimates: &'a [f32],
    pub(super) radii: &'a [f32],
    pub(super) temperature: f32,
    pub(super) noise: Noise,
    pub(super) found: &'a mut Vec<Reach>,
}

impl FloatOp for NoisyCandidates<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { estimates, radii, temperature, noise, found } = self;
        found.clear();
        let mut best = f32::NEG_INFINITY;
        let groups = estimates.chunks(GROUP).zip(radii.chunks(GROUP)).zip((0_u32..).step_by(GROUP));
        for ((estimates, radii), first) in groups {
            let mut possible = false;
            for ((&estimate, &radius), id) in estimates.iter().zip(radii).zip(first..) {
                possible |= !is_below((estimate + radius) / temperature + gumbel_bound(noise.bits(id)), best);
            }
            if !possible {
                continue;
            }
            for ((&estimate, &radius), id) in estimates.iter().zip(radii).zip(first..) {
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

/// False for NaN.
#[inline(always)]
fn is_below(upper: f32, best: f32) -> bool {
    upper < best
}

/// Ids that are looked at together before any of them is looked at alone.
const GROUP: usize = 64;
