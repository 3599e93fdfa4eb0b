//! Sampling parameters: every range of the contract is checked here, once, at the edge.

use crate::ids::TokenId;

/// Sampling parameters, validated: run `validated` once at the edge.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; 0..=2.
    pub temperature: f32,
    /// 0..=1; 1 is off. 0 is treated as greedy.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 0..=1; 0 is off.
    pub min_p: f32,
    /// -2..=2. Counts generated tokens, as presence does.
    pub frequency_penalty: f32,
    /// -2..=2.
    pub presence_penalty: f32,
    /// More than 0, at most 10; 1 is off. Looks at the prompt too.
    pub repetition_penalty: f32,
    /// At most 300 pairs, ids inside the vocabulary and each once, -100..=100; `validated` sorts them by id.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Key of the noise; drawn by the caller when the request has none.
    pub seed: i64,
}

/// A parameter outside its range. `param` is the field's wire name.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{param}: {message}")]
pub struct InvalidSamplingParam {
    /// Field name.
    pub param: &'static str,
    /// What is allowed.
    pub message: String,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Checks every range against the contract.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validated(mut self, vocab_size: usize) -> Result<Self, InvalidSamplingParam> {
        check_range("temperature", self.temperature, 0.0, 2.0)?;
        check_range("top_p", self.top_p, 0.0, 1.0)?;
        check_range("min_p", self.min_p, 0.0, 1.0)?;
        check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= MAX_REPETITION_PENALTY) {
            let message = format!("must be more than 0 and at most {MAX_REPETITION_PENALTY}");
            return Err(InvalidSamplingParam { param: "repetition_penalty", message });
        }
        self.logit_bias.sort_by_key(|(id, _)| *id);
        check_bias(&self.logit_bias, vocab_size)?;
        Ok(self)
    }

    /// Whether the best token is taken without any noise. Below the smallest useful temperature a division by it would
    /// only overflow, so that is greedy too.
    pub fn is_greedy(&self) -> bool {
        self.temperature < MIN_TEMPERATURE || self.top_p == 0.0 || self.top_k == 1
    }

    /// Whether something is done to single logits first. If not, a few can decide:
    /// [`Sampler::sample_screened`](super::Sampler::sample_screened).
    pub fn needs_whole_row(&self) -> bool {
        !self.logit_bias.is_empty()
            || self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
    }
}

/// `bias` is sorted by id.
fn check_bias(bias: &[(TokenId, f32)], vocab_size: usize) -> Result<(), InvalidSamplingParam> {
    let invalid = |message| Err(InvalidSamplingParam { param: "logit_bias", message });
    if bias.len() > MAX_LOGIT_BIAS {
        return invalid(format!("holds {} tokens, at most {MAX_LOGIT_BIAS} are allowed", bias.len()));
    }
    if let Some((id, _)) = bias.iter().find(|(id, _)| id.index() >= vocab_size) {
        return invalid(format!("token id {} is outside the vocabulary of {vocab_size}", id.0));
    }
    if let Some(pair) = bias.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return invalid(format!("token id {} is given twice", pair[0].0.0));
    }
    bias.iter().try_for_each(|&(_, value)| check_range("logit_bias", value, -100.0, 100.0))
}

/// NaN is in no range.
fn check_range(param: &'static str, value: f32, low: f32, high: f32) -> Result<(), InvalidSamplingParam> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(InvalidSamplingParam { param, message: format!("must be between {low} and {high}") })
}

const MAX_LOGIT_BIAS: usize = 300;
const MAX_REPETITION_PENALTY: f32 = 10.0;
const MIN_TEMPERATURE: f32 = 1e-5;

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(params: SamplingParams) -> &'static str {
        params.validated(10).expect_err("out of range").param
    }

    #[test]
    fn both_ends_of_every_range_are_inside() {
        for (temperature, p, penalty, repetition, bias) in
            [(0.0, 0.0, -2.0, 1e-3, -100.0), (2.0, 1.0, 2.0, 10.0, 100.0)]
        {
            let params = SamplingParams {
                temperature,
                top_p: p,
                min_p: p,
                frequency_penalty: penalty,
                presence_penalty: penalty,
                repetition_penalty: repetition,
                logit_bias: vec![(TokenId(9), bias), (TokenId(0), bias)],
                ..SamplingParams::default()
            };
            let ids: Vec<u32> = params.validated(10).expect("inside").logit_bias.iter().map(|(id, _)| id.0).collect();
            assert_eq!(ids, [0, 9]);
        }
    }

    #[test]
    fn what_is_outside_is_refused_by_its_wire_name() {
        let ok = SamplingParams::default;
        for bad in [-0.1, f32::NAN, f32::INFINITY, 2.1] {
            assert_eq!(refused(SamplingParams { temperature: bad, ..ok() }), "temperature");
            assert_eq!(refused(SamplingParams { top_p: bad, ..ok() }), "top_p");
            assert_eq!(refused(SamplingParams { min_p: bad, ..ok() }), "min_p");
        }
        for bad in [-2.1, f32::NAN, 2.1] {
            assert_eq!(refused(SamplingParams { frequency_penalty: bad, ..ok() }), "frequency_penalty");
            assert_eq!(refused(SamplingParams { presence_penalty: bad, ..ok() }), "presence_penalty");
        }
        for bad in [0.0, -1.0, f32::NAN, 10.5] {
            assert_eq!(refused(SamplingParams { repetition_penalty: bad, ..ok() }), "repetition_penalty");
        }
        let too_many = (0..301).map(|id| (TokenId(id), 0.0)).collect();
        let too_many = SamplingParams { logit_bias: too_many, ..ok() }.validated(1000);
        assert_eq!(too_many.expect_err("too many").param, "logit_bias");
        for bad in [(10, 0.0), (0, 100.5), (0, f32::NAN)] {
            let logit_bias = vec![(TokenId(bad.0), bad.1)];
            assert_eq!(refused(SamplingParams { logit_bias, ..ok() }), "logit_bias");
        }
        let logit_bias = vec![(TokenId(3), 1.0), (TokenId(3), 2.0)];
        assert_eq!(refused(SamplingParams { logit_bias, ..ok() }), "logit_bias");
    }
}
