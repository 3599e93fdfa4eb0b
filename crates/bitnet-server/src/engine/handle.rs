//! The async side of the engine: [`EngineHandle::reserve`] a place, then submit, then read one receiver a choice.
//! One bounded channel, nothing else. Dropping a [`SequenceStream`] cancels its sequence.

use std::{sync::Arc, time::Instant};

use bitnet_core::{
    TokenId,
    sampling::{SamplingParams, TokenLogprobs},
};

/// A validated request in token ids: the only thing the engine understands.
#[derive(Clone, Debug)]
pub struct GenerationRequest {
    /// Prompt, at least one token, shorter than the context.
    pub prompt: Vec<TokenId>,
    /// Sampling parameters, validated.
    pub sampling: SamplingParams,
    /// Choices to generate, at least one; choice `i` draws with key `(seed, i, position)`.
    pub num_choices: u32,
    /// Tokens to generate a choice at most; 0 only scores the prompt.
    pub max_tokens: usize,
    /// Stop tokens are not drawn before this many tokens.
    pub min_tokens: usize,
    /// Tokens that end a choice (empty with `ignore_eos`). A stop token is the last [`TokenEvent`] of its choice.
    pub stop_tokens: Arc<[TokenId]>,
    /// Alternatives wanted with each token's log-probability; `None`: no log-probabilities.
    pub logprobs: Option<usize>,
    /// Alternatives wanted with each prompt token's log-probability (echo); `None`: none.
    pub prompt_logprobs: Option<usize>,
    /// When the request's time is up.
    pub deadline: Instant,
    /// Arrival, for queue-time metrics.
    pub arrival: Instant,
}

/// What a sequence says, in order: prompt log-probabilities if asked, tokens, one terminal event.
#[derive(Clone, Debug, PartialEq)]
pub enum SequenceEvent {
    /// The prompt has been computed; `cached_tokens` of it came from the prefix cache.
    PromptDone {
        /// Prompt tokens that needed no computing.
        cached_tokens: usize,
        /// One entry for each prompt token when asked for; the first has none.
        logprobs: Option<PromptLogprobs>,
    },
    /// One generated token.
    Token(TokenEvent),
    /// The end; nothing follows.
    Finished(FinishReason),
    /// The end by an error; nothing follows.
    Failed(EngineError),
}

/// Log-probabilities of a prompt; `[0]` is `None`, entry `i` is that of token `i` given those before.
pub type PromptLogprobs = Vec<Option<TokenLogprobs>>;

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// The token.
    pub token: TokenId,
    /// Present when log-probabilities were asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why a sequence ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was drawn.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

/// Why a sequence ended badly. None of them takes the process down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// A logit was NaN or infinite: the weights or activations hold one.
    #[error("the model produced a value that is not finite")]
    NotFinite,
    /// The deadline passed.
    #[error("the request ran into its time limit")]
    Timeout,
    /// The server is shutting down and the drain time is over.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The engine thread has ended.
    #[error("the engine has stopped")]
    Stopped,
}

/// Why a request was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many requests wait as may.
    #[error("the queue is full")]
    QueueFull,
    /// The engine no longer takes requests.
    #[error("the engine has stopped")]
    Stopped,
}

/// A place in the queue, taken before the prompt is tokenized; given back when dropped.
#[derive(Debug)]
pub struct SubmitPermit {}

impl SubmitPermit {
    /// Submits `request`: one stream a choice, in order.
    ///
    /// # Errors
    /// [`SubmitError::Stopped`].
    pub fn submit(self, request: GenerationRequest) -> Result<Vec<SequenceStream>, SubmitError> {
        let _ = request;
        unimplemented!()
    }
}

/// Events of one sequence. Dropping it cancels the sequence.
#[derive(Debug)]
pub struct SequenceStream {}

impl SequenceStream {
    /// The next event; after a terminal one, or when the engine died, `Failed(Stopped)`.
    pub async fn next(&mut self) -> SequenceEvent {
        unimplemented!()
    }
}

/// A snapshot for `/health` and `/stats`, read from atomics.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineStatus {
    /// Sequences being computed.
    pub running: usize,
    /// Requests waiting.
    pub waiting: usize,
    /// Most requests that may wait.
    pub max_waiting: usize,
    /// Whether the engine thread lives.
    pub alive: bool,
    /// Seconds since the engine last completed a step, while there is work; 0 when idle.
    pub stalled_seconds: f64,
    /// Seconds until a place is likely to be free, from the measured speed (for `Retry-After`), 1..=60.
    pub retry_after_seconds: u32,
}

/// The way to the engine thread; cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineHandle {}

impl EngineHandle {
    /// Takes a place in the queue, before any work is done for the request.
    ///
    /// # Errors
    /// [`SubmitError::QueueFull`], [`SubmitError::Stopped`].
    pub fn reserve(&self) -> Result<SubmitPermit, SubmitError> {
        unimplemented!()
    }

    /// What the engine is doing.
    pub fn status(&self) -> EngineStatus {
        unimplemented!()
    }
}
