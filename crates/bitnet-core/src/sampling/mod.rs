//! Logits -> token id: validated parameters, logits processors, sampler, log-probabilities. Stub.

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
    /// -2..=2.
    pub frequency_penalty: f32,
    /// -2..=2.
    pub presence_penalty: f32,
    /// More than 0; 1 is off.
    pub repetition_penalty: f32,
    /// At most 300 pairs, ids inside the vocabulary, -100..=100, ascending by id.
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
    pub fn validated(self, vocab_size: usize) -> Result<Self, InvalidSamplingParam> {
        let _ = vocab_size;
        unimplemented!()
    }
}

/// Where in the output a token is drawn: with the seed, the whole key of its noise.
#[derive(Clone, Copy, Debug)]
pub struct SampleKey {
    /// Choice index (0..n).
    pub choice: u32,
    /// Absolute position of the token to be drawn.
    pub position: u32,
}

/// Picks tokens; owns scratch so that nothing is allocated a token.
#[derive(Debug)]
pub struct Sampler {}

impl Sampler {
    /// Scratch for `vocab_size` logits.
    pub fn new(vocab_size: usize) -> Self {
        let _ = vocab_size;
        unimplemented!()
    }

    /// The next token given raw `logits` `[vocab_size]`. `prompt` and `generated` feed the penalties; `banned` ids (stop
    /// tokens before `min_tokens`) are never drawn. Deterministic in its arguments.
    ///
    /// # Errors
    /// [`NotFinite`] when a logit is NaN or +infinity.
    pub fn sample(
        &mut self,
        logits: &[f32],
        params: &SamplingParams,
        prompt: &[TokenId],
        generated: &[TokenId],
        banned: &[TokenId],
        key: SampleKey,
    ) -> Result<TokenId, NotFinite> {
        let _ = (logits, params, prompt, generated, banned, key);
        unimplemented!()
    }

    /// Log-softmax of the raw logits at `chosen`, and the `top` best (logit descending, id ascending).
    ///
    /// # Errors
    /// [`NotFinite`] when a logit is NaN or +infinity.
    pub fn logprobs(&mut self, logits: &[f32], chosen: TokenId, top: usize) -> Result<TokenLogprobs, NotFinite> {
        let _ = (logits, chosen, top);
        unimplemented!()
    }
}

/// A row of logits held a NaN or an infinity: the weights or activations did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the model produced a logit that is not finite")]
pub struct NotFinite;

/// Log-probabilities of one position.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token chosen (or of the prompt's own token).
    pub logprob: f32,
    /// The best alternatives, best first.
    pub top: Vec<(TokenId, f32)>,
}
