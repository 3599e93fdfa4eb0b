//! The last station of an embedding model: final hidden states, row after row as steps compute them -> one vector of length 1.
//!
//! The sum of each dimension takes the positions in ascending order, so chunks cannot matter; the length is a sum in 16 lanes
//! as everywhere, then a square root and a division, never a reciprocal.

use super::Workspace;
use crate::{checkpoint::Pooling, kernels::math};

/// The length below which a vector is divided by it no more: all zeros stay zeros.
const SHORTEST: f32 = 1e-12;

/// The hidden states of one text as far as they are computed.
#[derive(Clone, Debug)]
pub struct PooledStates {
    pooling: Pooling,
    /// Of the rows so far with [`Pooling::Mean`], else the newest row. `[hidden_size]`, empty before the first.
    sums: Vec<f32>,
    num_rows: usize,
}

impl PooledStates {
    /// Of no row.
    pub fn new(pooling: Pooling) -> Self {
        Self { pooling, sums: Vec::new(), num_rows: 0 }
    }

    /// Takes the row of `position`: with [`Pooling::Mean`] each position in turn, beginning anew at 0; with
    /// [`Pooling::Last`] the newest counts.
    pub fn add(&mut self, position: usize, hidden: &[f32]) {
        if self.pooling == Pooling::Last || position == 0 {
            self.sums.clear();
            self.sums.extend_from_slice(hidden);
            self.num_rows = 1;
        } else {
            self.sums.iter_mut().zip(hidden).for_each(|(sum, value)| *sum += value);
            self.num_rows += 1;
        }
    }

    /// The vector of the rows so far; `None` when one of them was not finite.
    pub fn embedding(&self) -> Option<Vec<f32>> {
        let num_rows = self.num_rows as f32;
        let mut vector: Vec<f32> = self.sums.iter().map(|sum| sum / num_rows).collect();
        let length = math::sum_squares_16(&vector).sqrt();
        if !length.is_finite() {
            return None;
        }
        vector.iter_mut().for_each(|value| *value /= length.max(SHORTEST));
        Some(vector)
    }
}

impl Workspace {
    /// The final hidden state of row `row` among those that asked for logits in the last `forward`.
    ///
    /// # Panics
    /// When fewer asked.
    pub fn hidden_state(&self, row: usize) -> &[f32] {
        assert!(row < self.num_logit_rows, "a row that asked for no logits");
        let width = self.hidden_size();
        &self.buffers.normed[row * width..][..width]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pooled(pooling: Pooling, rows: &[(usize, [f32; 2])]) -> Option<Vec<f32>> {
        let mut states = PooledStates::new(pooling);
        rows.iter().for_each(|(position, row)| states.add(*position, row));
        states.embedding()
    }

    #[test]
    fn vectors_have_length_one() {
        let rows = [(0, [1.0, 8.0]), (1, [5.0, 0.0])];
        assert_eq!(pooled(Pooling::Mean, &rows), Some(vec![0.6, 0.8]));
        assert_eq!(pooled(Pooling::Last, &rows), Some(vec![1.0, 0.0]));
        assert_eq!(pooled(Pooling::Mean, &[(0, [0.0, 0.0])]), Some(vec![0.0, 0.0]));
    }

    #[test]
    fn a_sequence_that_begins_again_forgets_what_was() {
        let rows = [(0, [9.0, 9.0]), (1, [9.0, 9.0]), (0, [1.0, 8.0]), (1, [5.0, 0.0])];
        assert_eq!(pooled(Pooling::Mean, &rows), Some(vec![0.6, 0.8]));
    }

    #[test]
    fn what_is_not_finite_is_said() {
        for odd in [f32::NAN, f32::INFINITY, f32::MAX] {
            assert_eq!(pooled(Pooling::Mean, &[(0, [odd, 0.0])]), None);
            assert_eq!(pooled(Pooling::Last, &[(0, [odd, 0.0])]), None);
        }
    }
}
