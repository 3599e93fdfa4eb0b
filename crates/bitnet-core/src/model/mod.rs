//! The model: a loaded checkpoint, a checked [`Batch`] in, logits out. Stub.

use crate::{
    checkpoint::{Checkpoint, LoadError, ModelConfig},
    ids::{BlockId, TokenId},
    kernels::TernaryKernel,
    kv_cache::KvCache,
    threads::WorkerPool,
};

/// Immutable weights, repacked for one kernel, and the geometry.
#[derive(Debug)]
pub struct Model {}

/// What the model's weights take in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// Anonymous memory: repacked ternary weights, norms, tables.
    pub resident: usize,
    /// Bytes of the file mapping that stay in use (embedding and head rows).
    pub mapped: usize,
}

impl Model {
    /// Repacks every ternary tensor of `checkpoint` for `kernel`, in parallel on `pool`, releasing the file's pages on the
    /// way. `progress(done, total)` is called with weights repacked so far.
    ///
    /// # Errors
    /// When the file holds an invalid code or a weight that is not finite.
    pub fn load(
        checkpoint: &Checkpoint,
        kernel: &'static dyn TernaryKernel,
        pool: &mut WorkerPool,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Self, LoadError> {
        let _ = (checkpoint, kernel, pool, progress);
        unimplemented!()
    }

    /// Geometry.
    pub fn config(&self) -> &ModelConfig {
        unimplemented!()
    }

    /// Name of the kernel in use.
    pub fn kernel_name(&self) -> &'static str {
        unimplemented!()
    }

    /// Memory of the weights.
    pub fn weight_bytes(&self) -> WeightBytes {
        unimplemented!()
    }

    /// Runs the transformer over `batch`: writes K and V of every row into `kv`, leaves the final hidden states of the rows
    /// that want logits in `workspace`. Cannot fail: `Batch` was checked when built.
    ///
    /// # Panics
    /// When `kv` or `workspace` were made for another model.
    pub fn forward(&self, batch: &Batch, kv: &mut KvCache, workspace: &mut Workspace) {
        let _ = (batch, kv, workspace);
        unimplemented!()
    }

    /// Logits `[rows.len(), vocab_size]` of rows `rows` among those that asked for them in the last `forward`, in batch
    /// order. At most [`Workspace::MAX_LOGIT_ROWS`] at once. Values may be NaN or infinite when the weights are.
    ///
    /// # Panics
    /// When `rows` reaches beyond the rows that asked, or is longer than the maximum.
    pub fn logits<'w>(&self, rows: std::ops::Range<usize>, workspace: &'w mut Workspace) -> &'w [f32] {
        let _ = (rows, workspace);
        unimplemented!()
    }
}

/// Scratch memory of the forward pass, allocated once, and the worker pool that runs it.
#[derive(Debug)]
pub struct Workspace {}

impl Workspace {
    /// The most rows one call of [`Model::logits`] scores.
    pub const MAX_LOGIT_ROWS: usize = 8;

    /// Scratch for batches of at most `max_batch_tokens` rows and `max_context` positions.
    pub fn new(model: &Model, max_batch_tokens: usize, max_context: usize, pool: WorkerPool) -> Self {
        let _ = (model, max_batch_tokens, max_context, pool);
        unimplemented!()
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        unimplemented!()
    }
}

/// One sequence's share of a step: `tokens` at positions `start..start + tokens.len()`.
#[derive(Clone, Copy, Debug)]
pub struct BatchSequence<'a> {
    /// Tokens to compute, at least one.
    pub tokens: &'a [TokenId],
    /// Absolute position of the first; everything before is already in the cache.
    pub start: usize,
    /// Blocks of positions `0..start + tokens.len()`, in order.
    pub block_table: &'a [BlockId],
    /// Which rows need logits.
    pub logits: LogitRows,
}

/// Which rows of a sequence's share need logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prompt chunk that is not the last.
    None,
    /// The last row.
    Last,
    /// Every row (echo with log-probabilities).
    All,
}

/// A checked step: every id inside the vocabulary, every block inside the cache, every position inside the context.
#[derive(Debug)]
pub struct Batch {}

/// Why a batch cannot be built. Always a defect of the caller or a request that was not validated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// No sequence, or one without tokens.
    #[error("the batch or one of its sequences is empty")]
    Empty,
    /// More rows than the workspace was made for.
    #[error("{rows} rows exceed the {max} the workspace holds")]
    TooManyRows {
        /// Rows asked for.
        rows: usize,
        /// Rows allowed.
        max: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A position at or beyond the context, or not covered by the block table.
    #[error("position {position} is outside the context or the block table")]
    PositionOutOfRange {
        /// The position.
        position: usize,
    },
    /// A block id outside the cache, or one block in two places of the batch's writes.
    #[error("block {id} is outside the cache")]
    BlockOutOfRange {
        /// The id.
        id: u32,
    },
}

impl Batch {
    /// Checks `sequences` against the model, the cache and the workspace. Rows keep the order given.
    ///
    /// # Errors
    /// [`BatchError`], naming what is wrong.
    pub fn new(
        model: &Model,
        kv: &KvCache,
        workspace: &Workspace,
        sequences: &[BatchSequence<'_>],
    ) -> Result<Self, BatchError> {
        let _ = (model, kv, workspace, sequences);
        unimplemented!()
    }

    /// Rows that asked for logits, over all sequences.
    pub fn num_logit_rows(&self) -> usize {
        unimplemented!()
    }
}
