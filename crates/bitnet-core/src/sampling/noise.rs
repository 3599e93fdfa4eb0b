//! Gumbel noise from a counter-based generator: a pure function of (seed, choice, position, id), so a token's noise is the
//! same whatever was drawn before, beside it or elsewhere.
//!
//! The draw's key is two 32-bit words out of SplitMix64's finalizer over the seed, then over (choice, position). An id's 32
//! bits are two rounds of a 32-bit finalizer with the words mixed in between: for one key a permutation, so no two ids of a
//! row share their bits, and 32-bit products alone, so that rows vectorise.

use super::SampleKey;
use crate::kernels::math::ln;

/// The key of one draw.
#[derive(Clone, Copy, Debug)]
pub(super) struct Noise {
    first: u32,
    second: u32,
}

impl Noise {
    pub(super) fn new(seed: i64, key: SampleKey) -> Self {
        let place = u64::from(key.choice) << 32 | u64::from(key.position);
        let mixed = mix64(mix64(seed.cast_unsigned()) ^ place);
        Self { first: mixed as u32, second: (mixed >> 32) as u32 }
    }

    /// 32 uniform bits of `id`.
    #[inline(always)]
    pub(super) fn bits(self, id: u32) -> u32 {
        mix32(mix32(id ^ self.first).wrapping_add(self.second))
    }
}

/// The Gumbel variate `-ln(-ln(1 - w))` of `bits`, where `w = (bits + 1/2) / 2^32`: between -3.2 and 22.9.
///
/// Both ends keep their precision: large noise comes from small `w`, where `-ln(1 - w)` is a series in `w`; small noise from
/// large `w`, where `1 - w` is formed from the complement of the bits.
#[inline(always)]
pub(super) fn gumbel(bits: u32) -> f32 {
    const SERIES_BELOW: u32 = 1 << 26; // w < 2^-6: the first term left out is below w^5 / 6, under half a unit
    let w = (bits as f32 + 0.5) * TWO_POW_MINUS_32;
    let rest = (!bits as f32 + 0.5) * TWO_POW_MINUS_32;
    let series = w * w.mul_add(w.mul_add(w.mul_add(w.mul_add(0.2, 0.25), 1.0 / 3.0), 0.5), 1.0);
    let exponential = if bits < SERIES_BELOW { series } else { -ln(rest) };
    -ln(exponential)
}

/// No less than `gumbel(bits)`, for a few integer operations: `-ln(-ln(1 - w)) < -ln(w)`, and `w` is at least the power of
/// two below it.
#[inline(always)]
pub(super) fn gumbel_bound(bits: u32) -> f32 {
    const ABOVE_LN_2: f32 = 0.693_2;
    let exponent = ((bits as f32).to_bits() >> 23).cast_signed() - 127; // floor(log2 bits), once in 2^24 one more
    (32 - exponent) as f32 * ABOVE_LN_2 + 1e-3
}

/// No less than any noise: that of the smallest bits.
pub(super) const MOST_NOISE: f32 = 23.0;

const TWO_POW_MINUS_32: f32 = 1.0 / 4_294_967_296.0;

#[inline(always)]
fn mix32(value: u32) -> u32 {
    let value = (value ^ value >> 16).wrapping_mul(0x21f0_aaad);
    let value = (value ^ value >> 15).wrapping_mul(0xd35a_2d97);
    value ^ value >> 15
}

fn mix64(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn edges() -> impl Iterator<Item = u32> {
        let near = |power: u32| {
            let value = 1_u64 << power;
            [value.saturating_sub(200), value - 1, value, value + 1].map(|value| value.min(u64::from(u32::MAX)) as u32)
        };
        (0..=32).flat_map(near)
    }

    #[test]
    fn noise_agrees_with_double_precision_at_every_scale() {
        for bits in edges() {
            let w = (f64::from(bits) + 0.5) / 4_294_967_296.0;
            let exact = -(-(-w).ln_1p()).ln();
            let error = (f64::from(gumbel(bits)) - exact).abs();
            assert!(error <= 4e-7 * exact.abs().max(1.0), "{bits}: {} is not {exact}", gumbel(bits));
        }
    }

    #[test]
    fn the_bound_holds_at_the_edges() {
        for bits in edges() {
            assert!(gumbel(bits) <= gumbel_bound(bits).min(MOST_NOISE), "{bits}");
        }
    }

    #[test]
    fn noise_is_frozen() {
        let noise = Noise::new(42, SampleKey { choice: 1, position: 7 });
        assert_eq!([0, 1, 128_255].map(|id| noise.bits(id)), FROZEN);
    }

    // What a seed means must never change between releases.
    const FROZEN: [u32; 3] = [21_805_676, 2_484_164_859, 2_910_481_337];

    #[test]
    fn every_part_of_the_key_matters() {
        let bits = |seed, choice, position, id| Noise::new(seed, SampleKey { choice, position }).bits(id);
        let base = bits(1, 0, 0, 0);
        for other in [bits(2, 0, 0, 0), bits(-1, 0, 0, 0), bits(1, 1, 0, 0), bits(1, 0, 1, 0), bits(1, 0, 0, 1)] {
            assert_ne!(base, other);
        }
    }

    proptest! {
        #[test]
        fn the_bound_is_never_below_the_noise(bits: u32, shift in 0_u32..32) {
            prop_assert!(gumbel(bits >> shift) <= gumbel_bound(bits >> shift).min(MOST_NOISE));
        }
    }
}
