//! Logits processors: what changes single logits before anything is chosen. Order: bias, repetition penalty, frequency and
//! presence penalties, bans. Nothing here draws.

use super::SamplingParams;
use crate::ids::TokenId;

/// Applies the processors of a request; owns the token counts so that nothing is allocated a token.
#[derive(Debug)]
pub(super) struct LogitsProcessors {
    /// All zero between calls.
    counts: Vec<u32>,
}

impl LogitsProcessors {
    pub(super) fn new(vocab_size: usize) -> Self {
        Self { counts: vec![0; vocab_size] }
    }

    /// Changes `row` in place. Ids outside the row have no logit and are passed over.
    pub(super) fn apply(
        &mut self,
        row: &mut [f32],
        params: &SamplingParams,
        prompt: &[TokenId],
        generated: &[TokenId],
        banned: &[TokenId],
    ) {
        for &(id, bias) in &params.logit_bias {
            update(row, id, |logit| logit + bias);
        }
        if params.repetition_penalty != 1.0 {
            self.penalize_repetition(row, params.repetition_penalty, prompt, generated);
        }
        if params.frequency_penalty != 0.0 || params.presence_penalty != 0.0 {
            self.penalize_count(row, params.frequency_penalty, params.presence_penalty, generated);
        }
        for &id in banned {
            update(row, id, |_| f32::NEG_INFINITY);
        }
    }

    /// Once for each token seen: positive logits are divided by the penalty, negative ones multiplied.
    fn penalize_repetition(&mut self, row: &mut [f32], penalty: f32, prompt: &[TokenId], generated: &[TokenId]) {
        let seen = || prompt.iter().chain(generated);
        for &id in seen() {
            let Some(count) = self.counts.get_mut(id.index()) else { continue };
            if std::mem::replace(count, 1) == 0 {
                update(row, id, |logit| if logit > 0.0 { logit / penalty } else { logit * penalty });
            }
        }
        for &id in seen() {
            self.take_count(id);
        }
    }

    /// `logit - frequency * count - presence`, for each token generated.
    fn penalize_count(&mut self, row: &mut [f32], frequency: f32, presence: f32, generated: &[TokenId]) {
        for &id in generated {
            if let Some(count) = self.counts.get_mut(id.index()) {
                *count += 1;
            }
        }
        for &id in generated {
            let count = self.take_count(id);
            if count > 0 {
                update(row, id, |logit| logit - frequency * count as f32 - presence);
            }
        }
    }

    fn take_count(&mut self, id: TokenId) -> u32 {
        self.counts.get_mut(id.index()).map_or(0, std::mem::take)
    }
}

/// Sets a logit, never to +infinity: a tiny repetition penalty could, and a request must not break its own row.
fn update(row: &mut [f32], id: TokenId, change: impl FnOnce(f32) -> f32) {
    if let Some(logit) = row.get_mut(id.index()) {
        *logit = change(*logit).min(f32::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn each_processor_changes_its_tokens_and_the_counts_are_clean_afterwards() {
        let mut processors = LogitsProcessors::new(6);
        let params = SamplingParams {
            logit_bias: vec![(TokenId(0), -100.0), (TokenId(5), 100.0)],
            repetition_penalty: 2.0,
            frequency_penalty: 0.5,
            presence_penalty: 0.25,
            ..SamplingParams::default()
        };
        for _ in 0..2 {
            let mut row = [1.0, 2.0, -3.0, 4.0, 5.0, 6.0];
            processors.apply(&mut row, &params, &ids(&[1, 1]), &ids(&[2, 3, 3, 2, 3, 99]), &ids(&[4, 77]));
            let three = 4.0 / 2.0 - 0.5 * 3.0 - 0.25;
            assert_eq!(row, [-99.0, 1.0, -3.0 * 2.0 - 0.5 * 2.0 - 0.25, three, f32::NEG_INFINITY, 106.0]);
        }
    }

    #[test]
    fn a_tiny_repetition_penalty_stays_finite() {
        let params = SamplingParams { repetition_penalty: 1e-40, ..SamplingParams::default() };
        let mut row = [3.0, -3.0];
        LogitsProcessors::new(2).apply(&mut row, &params, &ids(&[0, 1]), &[], &[]);
        assert!(row.iter().all(|logit| logit.is_finite()), "{row:?}");
    }
}
