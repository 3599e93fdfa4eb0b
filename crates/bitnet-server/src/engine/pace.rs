//! How fast the engine is, as measured, and what that means for somebody who has to wait. Takes time as an argument.

/// Running averages of speed and of the size of requests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    tokens_per_second: Option<f64>,
    prompt_tokens_per_second: Option<f64>,
    tokens_per_sequence: Option<f64>,
}

/// Most tokens of prompts in one step, so that it stays short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptTokens {
    /// Beside sequences that generate.
    pub beside_others: usize,
    /// When there are none.
    pub alone: usize,
}

impl Pace {
    /// A step computed `num_tokens` in `seconds`, `prompt_tokens` of them in prompts.
    pub(super) fn step(&mut self, num_tokens: usize, prompt_tokens: usize, seconds: f64) {
        // A few rows say more about the step than about their own cost.
        if prompt_tokens >= LEAST_PROMPT_TOKENS {
            average(&mut self.prompt_tokens_per_second, prompt_tokens as f64 / seconds.max(1e-6));
        }
        average(&mut self.tokens_per_second, num_tokens as f64 / seconds.max(1e-6));
    }

    /// A sequence ended after `num_tokens`, prompt and output together.
    pub(super) fn finished(&mut self, num_tokens: usize) {
        average(&mut self.tokens_per_sequence, num_tokens as f64);
    }

    /// Tokens of prompts that a step has time for.
    pub(super) fn prompt_tokens(&self) -> PromptTokens {
        PromptTokens {
            beside_others: self.prompt_tokens_within(SECONDS_BESIDE_OTHERS),
            alone: self.prompt_tokens_within(SECONDS_ALONE),
        }
    }

    fn prompt_tokens_within(&self, seconds: f64) -> usize {
        let tokens = self.prompt_tokens_per_second.map_or(PROMPT_TOKENS_UNMEASURED, |speed| (speed * seconds) as usize);
        tokens.max(LEAST_PROMPT_TOKENS)
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

/// What a step with prompts may take beside generating sequences, with a fifth of the 250 ms bound left for those.
const SECONDS_BESIDE_OTHERS: f64 = 0.2;
/// What a step of prompts alone may take, on however slow a machine: so a step that takes a multiple of it is a stall.
const SECONDS_ALONE: f64 = 2.0;
/// Fewer rows would cost almost as much: the weights are read for each step.
const LEAST_PROMPT_TOKENS: usize = 16;
/// Before the first prompt was measured.
const PROMPT_TOKENS_UNMEASURED: usize = 64;

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
        assert_eq!(pace.prompt_tokens_within(0.2), 64);
        pace.step(9, 4, 100.0);
        assert_eq!(pace.prompt_tokens_within(0.2), 64, "a few rows measure nothing");
        pace.step(501, 500, 1.0);
        assert_eq!(pace.prompt_tokens_within(0.2), 100);
        (0..100).for_each(|_| pace.step(100, 20, 1.0));
        assert_eq!(pace.prompt_tokens_within(0.2), 16, "a step has some use");
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
