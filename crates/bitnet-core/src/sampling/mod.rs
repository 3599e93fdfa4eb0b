//! Logits -> token id: validated parameters, logits processors, sampler, log-probabilities.
//!
//! After `model`, before the engine's events. Every choice is a pure function of the row, the parameters and
//! (seed, choice, position): no state between tokens, and asking for log-probabilities changes nothing. Imports `ids`, and
//! from `kernels` the elementary functions and [`Isa`](crate::kernels::Isa), whose loops have one order of summation
//! everywhere. No text, no stop strings, no -9999.0 of the wire here.

mod candidates;
mod mask;
mod noise;
mod params;
mod processors;
mod row;
mod sampler;
#[cfg(test)]
mod tests;

pub use mask::TokenMask;
pub use params::{InvalidSamplingParam, SamplingParams};
pub use sampler::{Sampler, Score};

use crate::ids::TokenId;

/// Where in the output a token is drawn: with the seed, the whole key of its noise.
#[derive(Clone, Copy, Debug)]
pub struct SampleKey {
    /// Choice index (0..n).
    pub choice: u32,
    /// Absolute position of the token to be drawn.
    pub position: u32,
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
