//! Rotary position embedding: angles of a position, and the half-rotation of one row of heads.
//!
//! Angles follow Hugging Face: frequencies and the product with the position in f32; sine and cosine of that angle in
//! f64 by our own mathematics library, rounded once, so every machine gets the same bits.

use super::{batch::Row, phases::Phases};
use crate::{checkpoint::ModelConfig, kernels::FloatOp, threads::SharedRows};

/// Inverse frequencies of one head's pairs.
#[derive(Debug)]
pub(super) struct Rope {
    inverse_frequencies: Vec<f32>,
}

impl Rope {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let frequency = |pair: usize| {
            let exponent = (2 * pair) as f32 / config.head_dim as f32;
            1.0 / libm::pow(f64::from(config.rope_theta), f64::from(exponent)) as f32
        };
        let factor = |pair: usize| config.rope_freq_factors.as_ref().map_or(1.0, |factors| factors[pair]);
        Self { inverse_frequencies: (0..config.head_dim / 2).map(|pair| frequency(pair) / factor(pair)).collect() }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.inverse_frequencies.as_slice())
    }

    /// Writes the cosines, then the sines of `position`'s angles: `head_dim` values.
    fn angles(&self, position: usize, out: &mut [f32]) {
        let (cos, sin) = out.split_at_mut(self.inverse_frequencies.len());
        for ((&frequency, cos), sin) in self.inverse_frequencies.iter().zip(cos).zip(sin) {
            let angle = f64::from(position as f32 * frequency);
            *cos = libm::cos(angle) as f32;
            *sin = libm::sin(angle) as f32;
        }
    }
}

/// Writes the angles of every row of the step: `out: [num_rows, head_dim]`.
pub(super) fn prepare(phases: &mut Phases<'_>, rope: &Rope, rows: &[Row], out: &mut [f32]) {
    let head_dim = 2 * rope.inverse_frequencies.len();
    let out = SharedRows::new(out, head_dim);
    phases.over_rows(&|range| {
        let angles = out.claim(range.clone()).chunks_exact_mut(head_dim);
        rows[range].iter().zip(angles).for_each(|(row, angles)| rope.angles(row.position, angles));
    });
}

/// Rotates `q` (`[num_rows, num_heads, head_dim]`) and `k` (`[num_rows, num_kv_heads, head_dim]`) in place.
pub(super) fn apply(phases: &mut Phases<'_>, angles: &[f32], q: &mut [f32], k: &mut [f32]) {
    let (isa, num_rows) = (phases.isa(), phases.num_rows);
    let head_dim = angles.len() / num_rows;
    let (q_width, k_width) = (q.len() / num_rows, k.len() / num_rows);
    let (q, k) = (SharedRows::new(q, q_width), SharedRows::new(k, k_width));
    phases.over_rows(&|rows| {
        let angles = &angles[rows.start * head_dim..rows.end * head_dim];
        isa.run(Rotate { head_dim, width: q_width, angles, rows: q.claim(rows.clone()) });
        isa.run(Rotate { head_dim, width: k_width, angles, rows: k.claim(rows) });
    });
}

struct Rotate<'a> {
    head_dim: usize,
    width: usize,
    angles: &'a [f32],
    rows: &'a mut [f32],
}

impl FloatOp for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (row, angles) in self.rows.chunks_exact_mut(self.width).zip(self.angles.chunks_exact(self.head_dim)) {
            rotate(row, angles);
        }
    }
}

/// Rotates every head of `row` (`[num_heads, head_dim]`) in place: pairs are `(i, i + head_dim / 2)`.
#[inline(always)]
fn rotate(row: &mut [f32], angles: &[f32]) {
    let half = angles.len() / 2;
    let (cos, sin) = angles.split_at(half);
    for head in row.chunks_exact_mut(angles.len()) {
        let (first, second) = head.split_at_mut(half);
        for i in 0..half {
            let (a, b) = (first[i], second[i]);
            first[i] = a * cos[i] - b * sin[i];
            second[i] = b * cos[i] + a * sin[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::test_config;

    #[test]
    fn position_zero_changes_nothing() {
        let rope = Rope::new(&test_config());
        let (mut angles, mut row) = ([0.0; 8], [1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0]);
        rope.angles(0, &mut angles);
        rotate(&mut row, &angles);
        assert_eq!(row, [1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0]);
    }

    #[test]
    fn pairs_are_half_a_head_apart_and_turn_by_their_frequency() {
        let config = ModelConfig { rope_theta: 10_000.0, ..test_config() };
        let mut angles = [0.0; 8];
        Rope::new(&config).angles(3, &mut angles);
        let mut row = [0.0; 16];
        row[1] = 1.0; // first half of head 0, pair 1: frequency 10000^(-2/8) = 0.1
        row[8 + 4 + 2] = 1.0; // second half of head 1, pair 2: frequency 0.01
        rotate(&mut row, &angles);
        let close = |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 1e-7, "{a} {b}");
        close(row[1], 0.3f64.cos());
        close(row[5], 0.3f64.sin());
        close(row[14], 0.03f64.cos());
        close(row[10], -0.03f64.sin());
    }

    #[test]
    fn frequency_factors_divide() {
        let config = ModelConfig { rope_freq_factors: Some(vec![1.0, 2.0, 4.0, 8.0]), ..test_config() };
        let (with, without) = (Rope::new(&config), Rope::new(&test_config()));
        for pair in 0..4 {
            assert_eq!(with.inverse_frequencies[pair] * (1 << pair) as f32, without.inverse_frequencies[pair]);
        }
    }
}
