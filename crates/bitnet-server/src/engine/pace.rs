//! How fast the engine is, as measured, and what that means for somebody who has to wait. Takes time as an argument.

use super::budget::{LEAST_PROMPT_TOKENS, StepRows};

/// Running averages of speed and of the size of requests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    tokens_per_second: Option<f64>,
    /// Of steps with prompts.
    prompt_rows_per_second: Option<f64>,
    tokens_per_sequence: Option<f64>,
}

impl Pace {
    /// A step computed `num_tokens` in `seconds`, `prompt_tokens` of them in prompts.
    pub(super) fn step(&mut self, num_tokens: usize, prompt_tokens: usize, seconds: f64) {
        // A few rows say more about the step than about their own cost.
        if prompt_tokens >= LEAST_PROMPT_TOKENS {
            average(&mut self.prompt_rows_per_second, num_tokens as f64 / seconds.max(1e-6));
        }
        average(&mut self.tokens_per_second, num_tokens as f64 / seconds.max(1e-6));
    }

    /// A sequence ended after `num_tokens`, prompt and output together.
    pub(super) fn finished(&mut self, num_tokens: usize) {
        average(&mut self.tokens_per_sequence, num_tokens as f64);
    }

    /// Rows for which a step with prompts has time.
    pub(super) fn step_rows(&self) -> StepRows {
        StepRows {
            beside_others: self.rows_within(SECONDS_BESIDE_OTHERS),
            alone: self.rows_within(SECONDS_ALONE).max(LEAST_ROWS_ALONE),
        }
    }

    fn rows_within(&self, seconds: f64) -> usize {
        self.prompt_rows_per_second.map_or(ROWS_UNMEASURED, |speed| (speed * seconds) as usize)
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

/// What a step with prompts may take beside generating sequences. Their rows fill the step, so short parts cost little, and a
/// newcomer waits for the step under way.
const SECONDS_BESIDE_OTHERS: f64 = 0.15;
/// What a step of prompts alone may take, up to its double: so a newcomer does not wait for long, and a step that takes a multiple
/// of it is a stall.
const SECONDS_ALONE: f64 = 0.25;
/// Fewer rows alone would cost more each: the weights are read for each step.
const LEAST_ROWS_ALONE: usize = 32;
/// Before the first prompt was measured.
const ROWS_UNMEASURED: usize = 64;

/// The newest value weighs a tenth.
fn average(mean: &mut Option<f64>, value: f64) {
    *mean = Some(mean.map_or(value, |mean| mean + (value - mean) * 0.1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_beside_others_get_what_fits_the_time() {
        let mut pace = Pace::default();
        assert_eq!(pace.rows_within(0.2), 64);
        pace.step(9, 4, 100.0);
        assert_eq!(pace.rows_within(0.2), 64, "a few rows measure nothing");
        pace.step(501, 500, 1.0);
        assert_eq!(pace.rows_within(0.2), 100, "all rows count");
        (0..100).for_each(|_| pace.step(20, 20, 1.0));
        assert_eq!(pace.step_rows().alone, 32, "a step has some use");
    }

    #[test]
    fn waiting_time_is_what_is_left_over_the_measured_speed() {
        let mut pace = Pace::default();
        assert_eq!(pace.retry_after_seconds(1_000_000), 1, "nothing measured, nothing promised");
        pace.step(10, 0, 1.0);
        assert_eq!(pace.retry_after_seconds(75), 8);
        assert_eq!(pace.retry_after_seconds(0), 1);
        assert_eq!(pace.retry_after_seconds(1_000_000), 60);
        pace.finished(40);
        assert_eq!(pace.retry_after_seconds(1_000_000), 4, "sequences are shorter than they may be");
        (0..100).for_each(|_| pace.step(1, 0, 1.0));
        assert_eq!(pace.retry_after_seconds(1_000_000), 40, "the speed of now counts");
    }
}
