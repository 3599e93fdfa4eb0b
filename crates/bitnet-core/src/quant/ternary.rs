//! Ternary weights from real numbers: the absmean rule of BitNet b1.58, and the recognition of tensors that are ternary
//! already and only stored as floats.
//!
//! One pass gathers [`WeightStatistics`], which name the [`TernaryRule`] of the tensor; a second applies it. The mean is
//! the one sum here that is not exact: it runs in `f64` in 16 lanes, so that it is the same on every machine.

/// Virtual lanes of the sum: value i of a row belongs to lane `i % 16`.
const LANES: usize = 16;

/// The floor under mean|W|, as the reference implementation has it.
const MIN_ABS_MEAN: f32 = 1e-5;

/// What one pass over a tensor learns of it.
#[derive(Clone, Debug)]
pub struct WeightStatistics {
    sums: [f64; LANES],
    count: u64,
    /// Bits of the one non-zero magnitude met so far; 0 while there is none.
    magnitude: u32,
    one_magnitude: bool,
}

/// How the real weights of a tensor become trits and a scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TernaryRule {
    /// All values are in {-scale, 0, scale}: the sign is the trit.
    Exact {
        /// The one magnitude; 0 for a tensor of zeros.
        scale: f32,
    },
    /// `clamp(round_half_even(w * multiplier), -1, 1)`, the scale being `1 / multiplier`.
    AbsMean {
        /// `1 / max(mean|W|, 1e-5)`.
        multiplier: f32,
    },
}

/// A weight that is infinite or not a number, which no rule can turn into a trit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a weight that is not finite")]
pub struct NotFinite;

impl Default for WeightStatistics {
    fn default() -> Self {
        Self { sums: [0.0; LANES], count: 0, magnitude: 0, one_magnitude: true }
    }
}

impl WeightStatistics {
    /// Takes in one row, or a part of one that begins at a multiple of 16.
    pub fn observe(&mut self, values: &[f32]) {
        for chunk in values.chunks(LANES) {
            for (sum, value) in self.sums.iter_mut().zip(chunk) {
                *sum += f64::from(value.abs());
            }
        }
        self.count += values.len() as u64;
        if self.one_magnitude {
            self.observe_magnitudes(values);
        }
    }

    /// The rule for the tensor seen.
    ///
    /// # Errors
    /// [`NotFinite`] when one of its values is not.
    pub fn rule(&self) -> Result<TernaryRule, NotFinite> {
        let mut sums = self.sums;
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                sums[lane] += sums[lane + half];
            }
        }
        // Finite values cannot overflow an f64 sum, so this sees every infinity and NaN.
        if !sums[0].is_finite() {
            return Err(NotFinite);
        }
        if self.one_magnitude {
            return Ok(TernaryRule::Exact { scale: f32::from_bits(self.magnitude) });
        }
        let mean = (sums[0] / self.count as f64) as f32;
        Ok(TernaryRule::AbsMean { multiplier: 1.0 / mean.max(MIN_ABS_MEAN) })
    }

    /// Keeps `one_magnitude` true while no two different magnitudes but zero have been met. The comparison has no early
    /// end, so that it vectorises: most rows of a ternary tensor pass it.
    fn observe_magnitudes(&mut self, values: &[f32]) {
        let bits = |value: &f32| value.abs().to_bits();
        if self.magnitude == 0 {
            self.magnitude = values.iter().map(bits).find(|&bits| bits != 0).unwrap_or(0);
        }
        let magnitude = self.magnitude;
        let others = values.iter().map(bits).fold(0, |others, bits| others | u32::from(bits != 0 && bits != magnitude));
        self.one_magnitude = others == 0;
    }
}

impl TernaryRule {
    /// Multiplies the integer sum of trits and activations.
    pub fn scale(self) -> f32 {
        match self {
            Self::Exact { scale } => scale,
            Self::AbsMean { multiplier } => 1.0 / multiplier,
        }
    }

    /// Turns weights into trits.
    pub fn apply(self, values: &[f32], out: &mut [i8]) {
        // Rounding half to even and clamping leaves a sign beyond 0.5 and 0 up to it.
        let (multiplier, threshold) = match self {
            Self::Exact { .. } => (1.0, 0.0),
            Self::AbsMean { multiplier } => (multiplier, 0.5),
        };
        for (trit, value) in out.iter_mut().zip(values) {
            let value = value * multiplier;
            *trit = i8::from(value > threshold) - i8::from(value < -threshold);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule_of(rows: &[&[f32]]) -> Result<TernaryRule, NotFinite> {
        let mut statistics = WeightStatistics::default();
        for row in rows {
            statistics.observe(row);
        }
        statistics.rule()
    }

    proptest! {
        #[test]
        fn apply_is_the_formula(values in prop::collection::vec(-4.0f32..4.0, 2..200)) {
            let mean = (values.iter().map(|v| f64::from(v.abs())).sum::<f64>() / values.len() as f64) as f32;
            let rule = rule_of(&[&values]).unwrap();
            let TernaryRule::AbsMean { multiplier } = rule else { panic!("{rule:?} of random values") };
            prop_assert!((multiplier * mean - 1.0).abs() < 1e-6);
            prop_assert_eq!(rule.scale(), 1.0 / multiplier);
            let mut out = vec![0; values.len()];
            rule.apply(&values, &mut out);
            for (trit, value) in out.iter().zip(&values) {
                prop_assert_eq!(f32::from(*trit), (value * multiplier).round_ties_even().clamp(-1.0, 1.0));
            }
        }
    }

    #[test]
    fn one_magnitude_is_exact_and_two_are_not() {
        assert_eq!(rule_of(&[&[0.0, -0.0], &[0.3, -0.3]]), Ok(TernaryRule::Exact { scale: 0.3 }));
        assert_eq!(rule_of(&[&[0.0; 5]]), Ok(TernaryRule::Exact { scale: 0.0 }));
        let mut out = [9; 4];
        TernaryRule::Exact { scale: 0.3 }.apply(&[0.3, -0.0, -0.3, 0.0], &mut out);
        assert_eq!(out, [1, 0, -1, 0]);
        let nearly = f32::from_bits(0.3f32.to_bits() + 1);
        assert!(matches!(rule_of(&[&[0.3], &[nearly]]), Ok(TernaryRule::AbsMean { .. })));
    }

    #[test]
    fn halves_round_to_even() {
        let rule = TernaryRule::AbsMean { multiplier: 0.5 };
        let mut out = [9; 4];
        rule.apply(&[1.0, -1.0, f32::from_bits(1.0f32.to_bits() + 1), -3.0], &mut out);
        assert_eq!(out, [0, 0, 1, -1]);
    }

    #[test]
    fn tiny_means_are_held_up_and_non_finite_weights_refused() {
        assert_eq!(rule_of(&[&[1e-9, 2e-9]]), Ok(TernaryRule::AbsMean { multiplier: 1.0 / 1e-5 }));
        assert_eq!(rule_of(&[&[1.0, f32::NAN]]), Err(NotFinite));
        assert_eq!(rule_of(&[&[1.0], &[f32::NEG_INFINITY]]), Err(NotFinite));
        assert!(rule_of(&[&[f32::MAX; 100]]).is_ok());
    }
}
