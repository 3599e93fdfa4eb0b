//! How fast the engine is, as measured, and what that means for somebody who has to wait. Takes time as an argument.

/// Running averages of speed and of the size of requests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    tokens_per_second: Option<f64>,
    tokens_per_sequence: Option<f64>,
}

impl Pace {
    /// A step computed `num_tokens` in `seconds`.
    pub(super) fn step(&mut self, num_tokens: usize, seconds: f64) {
        average(&mut self.tokens_per_second, num_tokens as f64 / seconds.max(1e-6));
    }

    /// A sequence ended after `num_tokens`, prompt and output together.
    pub(super) fn finished(&mut self, num_tokens: usize) {
        average(&mut self.tokens_per_sequence, num_tokens as f64);
    }

    /// Seconds until a place in the queue is likely to be free: until one of the running sequences ends and the next one
    /// starts. `most_tokens` is what has to be computed at most until then; sequences rarely take all they may, so the usual
    /// size of a sequence counts when it is smaller.
    pub(super) fn retry_after_seconds(&self, most_tokens: usize) -> u32 {
        let Some(tokens_per_second) = self.tokens_per_second else { return 1 };
        let tokens = self.tokens_per_sequence.unwrap_or(f64::INFINITY).min(most_tokens as f64);
        (tokens / tokens_per_second).ceil().clamp(1.0, 60.0) as u32
    }
}

/// The newest value weighs a tenth.
fn average(mean: &mut Option<f64>, value: f64) {
    *mean = Some(mean.map_or(value, |mean| mean + (value - mean) * 0.1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_time_is_what_is_left_over_the_measured_speed() {
        let mut pace = Pace::default();
        assert_eq!(pace.retry_after_seconds(1_000_000), 1, "nothing measured, nothing promised");
        pace.step(10, 1.0);
        assert_eq!(pace.retry_after_seconds(75), 8);
        assert_eq!(pace.retry_after_seconds(0), 1);
        assert_eq!(pace.retry_after_seconds(1_000_000), 60);
        pace.finished(40);
        assert_eq!(pace.retry_after_seconds(1_000_000), 4, "sequences are shorter than they may be");
        (0..100).for_each(|_| pace.step(1, 1.0));
        assert_eq!(pace.retry_after_seconds(1_000_000), 40, "the speed of now counts");
    }
}
