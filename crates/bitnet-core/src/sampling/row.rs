//! Passes over one row of logits: maximum, sum of exponentials, cuts and the noisy maximum, in the orders numerics fixes.
//! Each is a plain loop, compiled for the CPU's vector width by [`Isa::run`](crate::kernels::Isa::run).

use super::{
    NotFinite,
    noise::{Noise, gumbel, gumbel_bound},
};
use crate::kernels::{
    FloatOp,
    math::{LANES, exp, lane_tree},
};

/// A token's place in a ranking: score descending, id ascending.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) score: f32,
    pub(super) id: u32,
}

impl Candidate {
    /// Best first. Scores are never NaN here; 0.0 and -0.0 are equal, as in every comparison below.
    pub(super) fn rank(&self, other: &Self) -> std::cmp::Ordering {
        if self.score == other.score { self.id.cmp(&other.id) } else { other.score.total_cmp(&self.score) }
    }
}

/// The largest value. Fails on NaN and +infinity, and when all is -infinity: nothing could be drawn.
pub(super) struct FiniteMax<'a>(pub(super) &'a [f32]);

impl FloatOp for FiniteMax<'_> {
    type Output = Result<f32, NotFinite>;

    #[inline(always)]
    fn call(self) -> Self::Output {
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut bad = [0_u32; LANES];
        let (steps, tail) = self.0.as_chunks::<LANES>();
        for step in steps {
            for lane in 0..LANES {
                max[lane] = if step[lane] > max[lane] { step[lane] } else { max[lane] };
                bad[lane] |= u32::from(!is_legal(step[lane]));
            }
        }
        let max = max.iter().chain(tail).fold(f32::NEG_INFINITY, |max, &value| max.max(value));
        let legal = bad.iter().all(|&bad| bad == 0) && tail.iter().copied().all(is_legal);
        if legal && max > f32::NEG_INFINITY { Ok(max) } else { Err(NotFinite) }
    }
}

/// False for NaN too.
#[inline(always)]
fn is_legal(logit: f32) -> bool {
    logit < f32::INFINITY
}

/// `sum(exp(value - max))`: 16 lanes by id mod 16, then the tree.
pub(super) struct SumExp<'a> {
    pub(super) row: &'a [f32],
    pub(super) max: f32,
}

impl FloatOp for SumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn call(self) -> f32 {
        let mut lanes = [0.0; LANES];
        let (steps, tail) = self.row.as_chunks::<LANES>();
        for step in steps {
            for lane in 0..LANES {
                lanes[lane] += exp(step[lane] - self.max);
            }
        }
        for (lane, value) in tail.iter().enumerate() {
            lanes[lane] += exp(value - self.max);
        }
        lane_tree(&lanes)
    }
}

/// [`SumExp`] of a row of which only the values of `ids`, ascending, are not -infinity: the same bits.
pub(super) fn sum_exp_by_id(values: &[f32], ids: &[u32], max: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for (value, &id) in values.iter().zip(ids) {
        lanes[id as usize % LANES] += exp(value - max);
    }
    lane_tree(&lanes)
}

/// Divides every value by the temperature.
pub(super) struct Scale<'a> {
    pub(super) row: &'a mut [f32],
    pub(super) temperature: f32,
}

impl FloatOp for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.row.iter_mut().for_each(|value| *value /= self.temperature);
    }
}

/// Excludes (-infinity) what ranks after `last`.
pub(super) struct CutAfter<'a> {
    pub(super) row: &'a mut [f32],
    pub(super) last: Candidate,
}

impl FloatOp for CutAfter<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (id, value) in (0_u32..).zip(self.row) {
            let after = (*value < self.last.score) | ((*value == self.last.score) & (id > self.last.id));
            *value = if after { f32::NEG_INFINITY } else { *value };
        }
    }
}

/// The id of the largest `value + noise(id)`, the lower one of equals: a draw from the softmax of the row, without a sum.
///
/// ```text
/// argmax over id of row[id] + gumbel(noise.bits(id))
/// ```
/// What differs: the row's maximum `start` is scored first, and ids whose cheap upper bound stays below the best so far are
/// skipped in groups. The bound is no less than the noise and rounding is monotonic, so the answer is the plain loop's.
pub(super) struct NoisyArgmax<'a> {
    pub(super) row: &'a [f32],
    pub(super) start: u32,
    pub(super) noise: Noise,
}

impl FloatOp for NoisyArgmax<'_> {
    type Output = u32;

    #[inline(always)]
    fn call(self) -> u32 {
        let Self { row, start, noise } = self;
        let mut best = Candidate { score: row[start as usize] + gumbel(noise.bits(start)), id: start };
        let (groups, tail) = row.as_chunks::<GROUP>();
        let mut first = 0;
        for group in groups {
            let mut reach = [f32::NEG_INFINITY; GROUP];
            for lane in 0..GROUP {
                reach[lane] = group[lane] + gumbel_bound(noise.bits(first + lane as u32));
            }
            if reach.iter().fold(false, |any, &reach| any | (reach >= best.score)) {
                score_group(group, first, noise, &mut best);
            }
            first += GROUP as u32;
        }
        score_group(tail, first, noise, &mut best);
        best.id
    }
}

fn score_group(group: &[f32], first: u32, noise: Noise, best: &mut Candidate) {
    for (id, value) in (first..).zip(group) {
        let bits = noise.bits(id);
        if value + gumbel_bound(bits) < best.score {
            continue;
        }
        let score = value + gumbel(bits);
        if score > best.score || (score == best.score && id < best.id) {
            *best = Candidate { score, id };
        }
    }
}

/// The lowest id whose value is `max`.
pub(super) fn first_of(row: &[f32], max: f32) -> u32 {
    row.iter().position(|&value| value == max).expect("the maximum of a row is in it") as u32
}

/// Collects in `best` the `count` best finite candidates of `row`, best first.
pub(super) fn select_best(row: &[f32], count: usize, best: &mut Vec<Candidate>) {
    best.clear();
    if count == 0 {
        return;
    }
    // Only what beats the worst of `count` candidates seen so far can be among the best; of equals the earlier id stays.
    let mut bound = f32::NEG_INFINITY;
    let mut first = 0;
    for group in row.chunks(GROUP) {
        if group.iter().fold(false, |any, &value| any | (value > bound)) {
            let above = (first..).zip(group).filter(|(_, value)| **value > bound);
            best.extend(above.map(|(id, &score)| Candidate { score, id }));
        }
        if best.len() >= 2 * count + GROUP {
            best.select_nth_unstable_by(count - 1, Candidate::rank);
            best.truncate(count);
            bound = best[count - 1].score;
        }
        first += GROUP as u32;
    }
    best.sort_unstable_by(Candidate::rank);
    best.truncate(count);
}

/// Ids that are looked at together before any of them is looked at alone.
const GROUP: usize = 64;
