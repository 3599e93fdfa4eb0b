//! A fake executor for the tests of everything above the model: its tokens are a function of the sequence alone, as the
//! real one's are, and it keeps a fake KV cache so that a wrong block table is seen.

use std::sync::Arc;

use bitnet_core::{
    TokenId,
    kv_cache::BLOCK_TOKENS,
    sampling::{SamplingParams, TokenLogprobs},
};

use super::{
    EngineConfig, EngineError, GenerationRequest, TokenEvent,
    executor::{Executor, StepOutput},
    scheduler::{ScheduledBatch, Share},
    sequence::Sequence,
};
use crate::{
    config::ClientId,
    metrics::{Metrics, MetricsLimits},
};

/// A prompt that holds this token ends with [`EngineError::NotFinite`].
pub(crate) const POISON: TokenId = TokenId(62);
/// A prompt that holds this token brings the engine thread down.
pub(crate) const PANIC: TokenId = TokenId(63);
/// Ids below this are drawn; the vocabulary has the two above as well.
pub(crate) const DRAWN_IDS: u32 = 60;

/// Chooses the next token of a sequence.
type Choose = Box<dyn FnMut(&Sequence) -> TokenId + Send>;

/// See the module.
pub(crate) struct FakeExecutor {
    choose: Choose,
    max_batch_tokens: usize,
    /// What each slot holds: K and V of a token depend on every token before it.
    slots: Vec<Option<u64>>,
}

impl FakeExecutor {
    /// Tokens by [`hashed_token`].
    pub(crate) fn new(config: &EngineConfig) -> Self {
        Self::choosing(config, |sequence| hashed_token(&sequence.tokens, &sequence.request.sampling, sequence.choice))
    }

    /// Tokens by `choose`, which may also wait, to hold the engine in a step.
    pub(crate) fn choosing(config: &EngineConfig, choose: impl FnMut(&Sequence) -> TokenId + Send + 'static) -> Self {
        let slots = vec![None; config.num_kv_blocks * BLOCK_TOKENS];
        Self { choose: Box::new(choose), max_batch_tokens: config.max_num_batched_tokens, slots }
    }

    fn slot(sequence: &Sequence, position: usize) -> usize {
        sequence.block_table[position / BLOCK_TOKENS].index() * BLOCK_TOKENS + position % BLOCK_TOKENS
    }

    fn compute(&mut self, share: &Share<'_>) -> Result<StepOutput, EngineError> {
        let sequence = share.sequence;
        let end = sequence.num_computed_tokens + share.num_tokens;
        let cached: Vec<_> = (0..end).map(|position| self.slots[Self::slot(sequence, position)]).collect();
        let known: Vec<_> = prefix_hashes(&sequence.tokens[..end]).map(Some).collect();
        assert_eq!(cached, known, "the cache does not hold this sequence");
        assert!(!sequence.request.prompt.contains(&PANIC), "the fake model panics");
        if sequence.request.prompt.contains(&POISON) {
            return Err(EngineError::NotFinite);
        }
        let mut output = StepOutput::default();
        if sequence.request.prompt_logprobs.is_some() && sequence.generated().is_empty() {
            let scored = sequence.num_computed_tokens + 1..sequence.prompt_len().min(end + 1);
            output.prompt_logprobs = scored.map(|position| score(&sequence.tokens[..=position])).collect();
        }
        if end == sequence.tokens.len() && sequence.request.max_tokens > 0 {
            output.token = Some(TokenEvent { token: (self.choose)(sequence), logprobs: None });
        }
        Ok(output)
    }
}

impl Executor for FakeExecutor {
    fn vocab_size(&self) -> usize {
        64
    }

    fn execute(&mut self, batch: &ScheduledBatch<'_>) -> Vec<Result<StepOutput, EngineError>> {
        let num_tokens: usize = batch.shares.iter().map(|share| share.num_tokens).sum();
        assert!(num_tokens <= self.max_batch_tokens, "the step is over its budget");
        for Share { sequence, num_tokens } in &batch.shares {
            assert!(*num_tokens > 0);
            let hashes = prefix_hashes(&sequence.tokens[..sequence.num_computed_tokens + num_tokens]);
            for (position, hash) in hashes.enumerate().skip(sequence.num_computed_tokens) {
                self.slots[Self::slot(sequence, position)] = Some(hash);
            }
        }
        batch.shares.iter().map(|share| self.compute(share)).collect()
    }
}

/// What the fake model says after `tokens`.
pub(crate) fn hashed_token(tokens: &[TokenId], sampling: &SamplingParams, choice: u32) -> TokenId {
    TokenId((hash(tokens) ^ sampling.seed.cast_unsigned() ^ u64::from(choice)) as u32 % DRAWN_IDS)
}

/// The fake log-probability of the last of `tokens` after those before it.
pub(crate) fn score(tokens: &[TokenId]) -> TokenLogprobs {
    TokenLogprobs { logprob: -((hash(tokens) % 1000) as f32), top: Vec::new() }
}

fn hash(tokens: &[TokenId]) -> u64 {
    prefix_hashes(tokens).last().unwrap_or(0)
}

/// A hash of each token and all before it.
fn prefix_hashes(tokens: &[TokenId]) -> impl Iterator<Item = u64> {
    tokens.iter().scan(7_u64, |hash, id| {
        *hash = (*hash ^ u64::from(id.0)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        Some(*hash)
    })
}

/// A request that takes any time.
pub(crate) fn request(prompt: &[u32], max_tokens: usize) -> GenerationRequest {
    let now = std::time::Instant::now();
    GenerationRequest {
        prompt: prompt.iter().copied().map(TokenId).collect(),
        sampling: SamplingParams::default(),
        num_choices: 1,
        max_tokens,
        min_tokens: 0,
        stop_tokens: Arc::new([]),
        logprobs: None,
        prompt_logprobs: None,
        cache_prompt: true,
        priority: 0,
        client: ClientId::local(),
        constraint: None,
        deadline: now + std::time::Duration::from_secs(3600),
        arrival: now,
    }
}

/// Metrics nobody reads.
pub(crate) fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new("test", MetricsLimits { max_num_seqs: 1, max_queue: 1 }))
}
