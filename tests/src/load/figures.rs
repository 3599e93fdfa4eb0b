//! Summaries of measured values.

use std::fmt;

/// Values in ascending order, for quantiles.
#[derive(Clone, Debug, Default)]
pub struct Sorted(Vec<f64>);

impl FromIterator<f64> for Sorted {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_unstable_by(f64::total_cmp);
        Self(values)
    }
}

impl Sorted {
    /// The value below which a share `q` (0 to 1) of all values lies; NaN when there are none.
    pub fn quantile(&self, q: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get((q * last as f64).round() as usize).copied().unwrap_or(f64::NAN)
    }

    /// The largest value; NaN when there are none.
    pub fn max(&self) -> f64 {
        self.quantile(1.0)
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Milliseconds: `p50 / p95 / p99 / max`.
impl fmt::Display for Sorted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p95, p99, max] = [0.5, 0.95, 0.99, 1.0].map(|q| self.quantile(q) * 1e3);
        write!(f, "{p50:.1} / {p95:.1} / {p99:.1} / {max:.1} ms")
    }
}

/// A number that looks random and is the same in every run.
pub fn mixed(index: u64) -> u64 {
    let z = index.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678_9abc_def1);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
