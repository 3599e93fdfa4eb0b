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
    executor::{Executor, StepOutput, StepOutputs},
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

/// Chooses the token after some tokens of a sequence: those it has, and guesses that came true.
type Choose = Box<dyn FnMut(&Sequence, &[TokenId]) -> TokenId + Send>;

/// See the module.
pub(crate) struct FakeExecutor {
    choose: Choose,
    max_batch_tokens: usize,
    /// What each slot holds: K and V of a token depend on every token before it.
    slots: Vec<Option<u64>>,
    /// Guesses that came true.
    pub(crate) num_true: usize,
}

impl FakeExecutor {
    /// Tokens by [`hashed_token`].
    pub(crate) fn new(config: &EngineConfig) -> Self {
        Self::choosing(config, |sequence, tokens| hashed_token(tokens, &sequence.request.sampling, sequence.choice))
    }

    /// Tokens by `choose`, which may also wait, to hold the engine in a step.
    pub(crate) fn choosing(
        config: &EngineConfig,
        choose: impl FnMut(&Sequence, &[TokenId]) -> TokenId + Send + 'static,
    ) -> Self {
        let slots = vec![None; config.num_kv_blocks * BLOCK_TOKENS];
        Self { choose: Box::new(choose), max_batch_tokens: config.max_num_batched_tokens, slots, num_true: 0 }
    }

    fn slot(sequence: &Sequence, position: usize) -> usize {
        sequence.block_table[position / BLOCK_TOKENS].index() * BLOCK_TOKENS + position % BLOCK_TOKENS
    }

    fn compute(&mut self, share: &Share<'_>) -> Result<StepOutput, EngineError> {
        let sequence = share.sequence;
        let end = sequence.num_computed_tokens + share.num_tokens;
        let rows = [&sequence.tokens[..end], share.draft()].concat();
        let cached: Vec<_> = (0..rows.len()).map(|position| self.slots[Self::slot(sequence, position)]).collect();
        let known: Vec<_> = prefix_hashes(&rows).map(Some).collect();
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
        if let Some(pooled) = &sequence.pooled {
            let mut pooled = pooled.borrow_mut();
            for position in sequence.num_computed_tokens..end {
                pooled.add(position, &hidden_state(&sequence.tokens[..=position]));
            }
            output.embedding = pooled.embedding().filter(|_| end == sequence.tokens.len());
        }
        if end == sequence.tokens.len() && sequence.request.max_tokens > 0 {
            for at in end..=rows.len() {
                let token = (self.choose)(sequence, &rows[..at]);
                output.tokens.push(TokenEvent { token, logprobs: None });
                if rows.get(at) != Some(&token) || sequence.request.stop_tokens.contains(&token) {
                    break;
                }
                self.num_true += 1;
            }
        }
        Ok(output)
    }
}

impl Executor for FakeExecutor {
    fn vocab_size(&self) -> usize {
        64
    }

    fn execute(&mut self, batch: &ScheduledBatch<'_>, is_wanted: &dyn Fn() -> bool) -> Option<StepOutputs> {
        let num_rows: usize = batch.shares.iter().map(|share| share.num_tokens + share.num_drafted).sum();
        assert!(num_rows <= self.max_batch_tokens, "the step is over its budget");
        for share in &batch.shares {
            let Share { sequence, num_tokens, num_drafted } = *share;
            assert!(num_tokens > 0 && (num_drafted == 0 || num_tokens == 1));
            let rows = [&sequence.tokens[..sequence.num_computed_tokens + num_tokens], share.draft()].concat();
            for (position, hash) in
                prefix_hashes(&rows).enumerate().skip(sequence.num_computed_tokens.max(sequence.num_stored_tokens))
            {
                self.slots[Self::slot(sequence, position)] = Some(hash);
            }
        }
        let outputs = batch.shares.iter().map(|share| self.compute(share)).collect();
        is_wanted().then_some(outputs)
    }
}

/// What the fake model says after `tokens`: with every third seed something that depends on the last of them alone, so that
/// it soon repeats itself.
pub(crate) fn hashed_token(tokens: &[TokenId], sampling: &SamplingParams, choice: u32) -> TokenId {
    let repeats = sampling.seed % 3 == 0;
    let seen = if repeats { &tokens[tokens.len() - 1..] } else { tokens };
    let ids = if repeats { DRAWN_IDS / 10 } else { DRAWN_IDS };
    TokenId((hash(seen) ^ sampling.seed.cast_unsigned() ^ u64::from(choice)) as u32 % ids)
}

/// The fake log-probability of the last of `tokens` after those before it.
pub(crate) fn score(tokens: &[TokenId]) -> TokenLogprobs {
    TokenLogprobs { logprob: -((hash(tokens) % 1000) as f32), top: Vec::new() }
}

/// The fake hidden state of the last of `tokens` after those before it.
pub(crate) fn hidden_state(tokens: &[TokenId]) -> [f32; 2] {
    [(hash(tokens) % 1000) as f32, 300.0]
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
        pooling: None,
        prediction: Arc::new([]),
        deadline: None,
        arrival: now,
    }
}

/// Metrics nobody reads.
pub(crate) fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new("test", MetricsLimits { max_num_seqs: 1, max_queue: 1 }))
}
