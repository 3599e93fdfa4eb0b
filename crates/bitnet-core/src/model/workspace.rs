//! Scratch memory of the forward pass, allocated once.

use std::ops::Range;

use super::{Model, attention, lm_head, sparse::SparseScratch};
use crate::{
    checkpoint::ModelConfig,
    kernels::{
        aligned::AlignedVec,
        screen::{ScreenBuffer, ScreenInputs},
    },
    quant::activation::ActivationBuffer,
    threads::WorkerPool,
};

/// Scratch memory of the forward pass, allocated once, and the worker pool that runs it.
#[derive(Debug)]
pub struct Workspace {
    pub(super) pool: WorkerPool,
    pub(super) buffers: Buffers,
    /// Rows of `buffers.normed` that hold final hidden states.
    pub(super) num_logit_rows: usize,
    /// Those of them that were screened.
    pub(super) screened_rows: Range<usize>,
    config: ModelConfig,
    max_batch_tokens: usize,
    max_context: usize,
}

/// Activations of a step; the first dimension is `max_batch_tokens` unless it says otherwise. Pages are zero and untouched
/// until a step is large enough to need them.
#[derive(Debug)]
pub(super) struct Buffers {
    /// The residual stream, `[hidden_size]`.
    pub(super) x: AlignedVec<f32>,
    /// `[hidden_size]`; after a step the final hidden states of the rows that want logits.
    pub(super) normed: AlignedVec<f32>,
    /// Input of the next linear layer.
    pub(super) quantized: ActivationBuffer,
    /// Cosines and sines, `[head_dim]`.
    pub(super) angles: AlignedVec<f32>,
    /// `[num_heads, head_dim]`
    pub(super) q: AlignedVec<f32>,
    /// `[num_kv_heads, head_dim]`
    pub(super) k: AlignedVec<f32>,
    /// `[num_kv_heads, head_dim]`
    pub(super) v: AlignedVec<f32>,
    /// `[num_heads, head_dim]`
    pub(super) attended: AlignedVec<f32>,
    /// What a block adds to the residual stream, `[hidden_size]`.
    pub(super) projected: AlignedVec<f32>,
    /// `[intermediate_size]`
    pub(super) gate: AlignedVec<f32>,
    /// `[intermediate_size]`
    pub(super) up: AlignedVec<f32>,
    /// For the feed-forward block of a single row, if the model skips channels.
    pub(super) sparse: SparseScratch,
    /// `[num_threads, attention::scratch_len]`
    pub(super) attention: AlignedVec<f32>,
    /// `[attention::partials_len]`
    pub(super) partials: AlignedVec<f32>,
    /// A few decoded rows of the head a thread, `[num_threads, lm_head::ROWS, hidden_size]`.
    pub(super) head_rows: AlignedVec<f32>,
    /// `[MAX_LOGIT_ROWS, vocab_size]`
    pub(super) logits: AlignedVec<f32>,
    /// For the head's screen, if the model has one: `MAX_SCREENED_ROWS` hidden states, and what it says of them.
    pub(super) screen_inputs: ScreenInputs,
    pub(super) screens: ScreenBuffer,
}

/// The part of [`Buffers`] that one step uses: `[num_rows, ..]` each.
pub(super) struct StepBuffers<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) normed: &'a mut [f32],
    pub(super) quantized: &'a mut ActivationBuffer,
    pub(super) angles: &'a mut [f32],
    pub(super) q: &'a mut [f32],
    pub(super) k: &'a mut [f32],
    pub(super) v: &'a mut [f32],
    pub(super) attended: &'a mut [f32],
    pub(super) projected: &'a mut [f32],
    pub(super) gate: &'a mut [f32],
    pub(super) up: &'a mut [f32],
    pub(super) sparse: &'a mut SparseScratch,
    /// All of it, whatever the rows.
    pub(super) attention: &'a mut [f32],
    /// All of it.
    pub(super) partials: &'a mut [f32],
}

impl Workspace {
    /// The most rows one call of [`Model::logits`] scores.
    pub const MAX_LOGIT_ROWS: usize = 8;
    /// The most rows one call of [`Model::screen`] looks at.
    pub const MAX_SCREENED_ROWS: usize = 32;

    /// Scratch for batches of at most `max_batch_tokens` rows and `max_context` positions.
    pub fn new(model: &Model, max_batch_tokens: usize, max_context: usize, pool: WorkerPool) -> Self {
        let max_screened_rows = if model.has_screen() { Self::MAX_SCREENED_ROWS.min(max_batch_tokens) } else { 0 };
        let sparse_channels = if model.has_sparse_ffn() { model.config().intermediate_size } else { 0 };
        let limits = BufferLimits { max_batch_tokens, max_context, max_screened_rows, sparse_channels };
        let buffers = Buffers::new(model.config(), &limits, pool.num_threads());
        let config = model.config().clone();
        Self { pool, buffers, num_logit_rows: 0, screened_rows: 0..0, config, max_batch_tokens, max_context }
    }

    /// Pins the calling thread beside the pool's workers: see [`WorkerPool::pin_caller`].
    pub fn pin_caller(&self) {
        self.pool.pin_caller();
    }

    /// The workers, for measuring between two steps what they could do at most.
    pub fn pool_mut(&mut self) -> &mut WorkerPool {
        &mut self.pool
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.buffers.bytes()
    }

    /// The most rows of a batch.
    pub fn max_batch_tokens(&self) -> usize {
        self.max_batch_tokens
    }

    /// The most positions of a sequence.
    pub fn max_context(&self) -> usize {
        self.max_context
    }

    /// Width of a hidden state.
    pub(super) fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    /// Whether it was made for `model`, or one of the same geometry.
    pub(super) fn fits(&self, model: &Model) -> bool {
        self.config == *model.config()
    }
}

struct BufferLimits {
    max_batch_tokens: usize,
    max_context: usize,
    max_screened_rows: usize,
    sparse_channels: usize,
}

impl Buffers {
    fn new(config: &ModelConfig, limits: &BufferLimits, num_threads: usize) -> Self {
        let BufferLimits { max_batch_tokens, max_screened_rows, .. } = *limits;
        let ModelConfig { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size, .. } = *config;
        let (q_width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
        let rows = |width: usize| AlignedVec::new(max_batch_tokens * width);
        Self {
            x: rows(hidden_size),
            normed: rows(hidden_size),
            quantized: ActivationBuffer::new(max_batch_tokens, hidden_size.max(intermediate_size).max(q_width)),
            angles: rows(head_dim),
            q: rows(q_width),
            k: rows(kv_width),
            v: rows(kv_width),
            attended: rows(q_width),
            projected: rows(hidden_size),
            gate: rows(intermediate_size),
            up: rows(intermediate_size),
            sparse: SparseScratch::new(limits.sparse_channels),
            attention: AlignedVec::new(num_threads * attention::scratch_len(config)),
            partials: AlignedVec::new(attention::partials_len(config, limits.max_context, num_threads)),
            head_rows: AlignedVec::new(num_threads * lm_head::ROWS * hidden_size),
            logits: AlignedVec::new(Workspace::MAX_LOGIT_ROWS * vocab_size),
            screen_inputs: ScreenInputs::new(max_screened_rows, hidden_size),
            screens: ScreenBuffer::new(max_screened_rows, vocab_size),
        }
    }

    /// The buffers of a step of `num_rows`.
    pub(super) fn for_step(&mut self, config: &ModelConfig, num_rows: usize) -> StepBuffers<'_> {
        let ModelConfig { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, .. } = *config;
        let (q_width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
        StepBuffers {
            x: &mut self.x[..num_rows * hidden_size],
            normed: &mut self.normed[..num_rows * hidden_size],
            quantized: &mut self.quantized,
            angles: &mut self.angles[..num_rows * head_dim],
            q: &mut self.q[..num_rows * q_width],
            k: &mut self.k[..num_rows * kv_width],
            v: &mut self.v[..num_rows * kv_width],
            attended: &mut self.attended[..num_rows * q_width],
            projected: &mut self.projected[..num_rows * hidden_size],
            gate: &mut self.gate[..num_rows * intermediate_size],
            up: &mut self.up[..num_rows * intermediate_size],
            sparse: &mut self.sparse,
            attention: &mut self.attention,
            partials: &mut self.partials,
        }
    }

    fn bytes(&self) -> usize {
        let row_buffers = [&self.x, &self.normed, &self.angles, &self.q, &self.k, &self.v, &self.attended];
        let block_buffers = [&self.projected, &self.gate, &self.up, &self.attention, &self.partials];
        let head_buffers = [&self.head_rows, &self.logits];
        let floats = row_buffers.iter().chain(&block_buffers).chain(&head_buffers);
        floats.map(|buffer| size_of_val(&buffer[..])).sum::<usize>()
            + self.quantized.bytes()
            + self.sparse.bytes()
            + self.screen_inputs.bytes()
            + self.screens.bytes()
    }
}
