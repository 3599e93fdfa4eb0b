//! One choice of a request inside the engine: its tokens, how many of them are computed, and the blocks that hold them.
//! No events, no clock.

use std::{cell::RefCell, sync::Arc};

use bitnet_core::{BlockId, TokenId, checkpoint::Pooling, model::PooledStates};

use super::{Draft, GenerationRequest, TokenConstraint, block_pool::BlockHash};

/// Names a sequence for the life of the engine; ascending in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// One choice of a request.
#[derive(Debug)]
pub struct Sequence {
    /// Its name.
    pub id: SequenceId,
    /// What was asked for, shared by the choices.
    pub request: Arc<GenerationRequest>,
    /// Which choice this is.
    pub choice: u32,
    /// The prompt, then what was generated.
    pub tokens: Vec<TokenId>,
    /// What may follow `tokens`: guesses for the next step to verify, computed only to be compared with what is drawn.
    pub draft: Draft,
    /// Leading tokens whose K and V are in the cache.
    pub num_computed_tokens: usize,
    /// Leading tokens whose K and V were found in the cache, perhaps the last known one among them: then that is computed for
    /// what follows it, and not written again.
    pub num_stored_tokens: usize,
    /// Blocks of positions `0..`, in order.
    pub block_table: Vec<BlockId>,
    /// Whether it is the health probe's, which waits for nobody.
    pub is_probe: bool,
    /// Names of the leading full blocks, as far as anybody asked for them.
    pub block_names: Vec<BlockHash>,
    /// Prompt tokens that needed no computing when the sequence was first started.
    pub cached_tokens: Option<usize>,
    /// What may come next, in step with the generated tokens; the executor's to ask and to tell.
    pub constraint: Option<RefCell<Box<dyn TokenConstraint>>>,
    /// What the prompt's vector is made of, in step with the computed tokens; the executor's to add to.
    pub pooled: Option<RefCell<PooledStates>>,
}

impl Sequence {
    /// A sequence of which nothing is computed.
    pub fn new(id: SequenceId, request: Arc<GenerationRequest>, choice: u32) -> Self {
        let tokens = request.prompt.clone();
        let constraint = request.constraint.as_ref().map(|rule| RefCell::new(rule.start()));
        let pooled = request.pooling.map(|pooling| RefCell::new(PooledStates::new(pooling)));
        Self {
            id,
            request,
            choice,
            tokens,
            draft: Draft::default(),
            num_computed_tokens: 0,
            num_stored_tokens: 0,
            block_table: Vec::new(),
            is_probe: false,
            block_names: Vec::new(),
            cached_tokens: None,
            constraint,
            pooled,
        }
    }

    /// The first choice of the same request.
    pub fn first_choice(&self) -> SequenceId {
        SequenceId(self.id.0 - u64::from(self.choice))
    }

    /// Tokens of the prompt.
    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// What was generated so far.
    pub fn generated(&self) -> &[TokenId] {
        &self.tokens[self.prompt_len()..]
    }

    /// Tokens that are known but not in the cache yet.
    pub fn num_tokens_to_compute(&self) -> usize {
        self.tokens.len() - self.num_computed_tokens
    }

    /// Whether log-probabilities of the prompt are still to be said, for which all of it has to be computed. A sequence that
    /// was preempted after its first token has said them before.
    pub fn scores_prompt(&self) -> bool {
        self.request.prompt_logprobs.is_some() && self.generated().is_empty()
    }

    /// Whether each token of the prompt has to be computed for this sequence, whatever the cache holds.
    pub fn needs_every_row(&self) -> bool {
        self.scores_prompt() || self.request.pooling == Some(Pooling::Mean)
    }

    /// Whether the whole prompt is in the cache.
    pub fn is_prompt_computed(&self) -> bool {
        self.num_computed_tokens >= self.prompt_len()
    }
}
