//! Dead channels of the feed-forward block: those whose row of `gate` or of `up` has no weight but zeros. Their
//! `activation(gate) * up` is exactly zero for every token, so the rows and their columns of `down` need not be kept.
//!
//! Dropping them changes no bit. The integer sums lose terms of zero alone, a maximum of magnitudes too. The sum of squares
//! of the norm has 16 lanes by `channel mod 16`, so what stays keeps its lane and its order there; lanes are filled up to
//! equal lengths with dead channels, whose squares add nothing; and the mean stays one over all channels there were.

use super::sparse::is_bounded;
use crate::{
    checkpoint::LayerTensors,
    kernels::{math::LANES, packing::PackedTernary},
};

/// Zero times a factor is zero when the factor is finite: the square of no gate and no product of `up` exceeds this.
const BOUND: f32 = 1e18;

/// The channels of a layer that have to be kept, in the order in which they must lie; `None` when that is all of them.
pub(super) fn kept(layer: &LayerTensors, gate: &PackedTernary, up: &PackedTernary) -> Option<Vec<usize>> {
    let channels = gate.rows();
    let is_zero_exact = [gate, up].iter().all(|linear| is_bounded(&layer.ffn_norm, linear.scale(), BOUND));
    if !is_zero_exact || !channels.is_multiple_of(LANES) {
        return None;
    }
    // A weight of the norm that is not finite makes a zero NaN.
    let has_finite_norm = |channel: usize| layer.ffn_sub_norm.as_ref().is_none_or(|norm| norm[channel].is_finite());
    let is_dead =
        |channel: &usize| (gate.is_zero_row(*channel) || up.is_zero_row(*channel)) && has_finite_norm(*channel);
    let lane = |lane: usize| (lane..channels).step_by(LANES).partition(is_dead);
    let lanes: [(Vec<usize>, Vec<usize>); LANES] = std::array::from_fn(lane);
    // A matrix has at least one row and column.
    let len = lanes.iter().map(|(_, alive)| alive.len()).max().unwrap_or(0).max(1);
    let in_place = |i: usize| lanes.iter().filter_map(move |(dead, alive)| alive.iter().chain(dead).nth(i));
    (len * LANES < channels).then(|| (0..len).flat_map(in_place).copied().collect())
}
