//! A model with its cache and workspace, driven one step at a time: what the integration tests share.

use std::path::{Path, PathBuf};

use bitnet_core::{
    Batch, BlockId, Checkpoint, LoadOptions, Model, TokenId, checkpoint,
    kernels::{self, TernaryKernel, packing::PackedLayout},
    kv_cache::{BLOCK_TOKENS, KvCache, KvDtype},
    model::{BatchSequence, LogitRows, ModelOptions, SparseFfn, Workspace},
    threads::WorkerPool,
};

/// Positions each sequence has room for.
pub(crate) const MAX_CONTEXT: usize = 384;

/// What may never change a logit.
#[derive(Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) kernel: &'static dyn TernaryKernel,
    /// `None`: the kernel's first.
    pub(crate) packing: Option<PackedLayout>,
    pub(crate) num_threads: usize,
    pub(crate) max_batch_tokens: usize,
    pub(crate) num_sequences: usize,
}

impl Default for Setup {
    fn default() -> Self {
        let kernel = kernels::select("auto").expect("there is always one");
        Self { kernel, packing: None, num_threads: 1, max_batch_tokens: 64, num_sequences: 1 }
    }
}

pub(crate) struct Engine {
    pub(crate) model: Model,
    pub(crate) kv: KvCache,
    pub(crate) workspace: Workspace,
    num_blocks: usize,
}

/// One sequence's share of a step, its blocks being those of `slot`.
pub(crate) struct Share<'a> {
    pub(crate) slot: usize,
    pub(crate) tokens: &'a [TokenId],
    pub(crate) start: usize,
    pub(crate) logits: LogitRows,
}

impl Engine {
    pub(crate) fn new(checkpoint: &Checkpoint, dtype: KvDtype, setup: Setup) -> Self {
        Self::with_sparse_ffn(checkpoint, dtype, setup, SparseFfn::Off)
    }

    pub(crate) fn with_sparse_ffn(
        checkpoint: &Checkpoint,
        dtype: KvDtype,
        setup: Setup,
        sparse_ffn: SparseFfn,
    ) -> Self {
        let mut pool = WorkerPool::new(setup.num_threads);
        let packing = setup.packing.or(Some(setup.kernel.layout()));
        let options = ModelOptions { packing, sparse_ffn, ..ModelOptions::default() };
        let model =
            Model::load_with(checkpoint, setup.kernel, &options, &mut pool, &|_, _| {}).expect("a good checkpoint");
        let num_blocks = setup.num_sequences * MAX_CONTEXT / BLOCK_TOKENS;
        let kv = KvCache::new(&model, num_blocks, dtype).expect("a small cache");
        let workspace = Workspace::new(&model, setup.max_batch_tokens, MAX_CONTEXT, pool);
        Self { model, kv, workspace, num_blocks }
    }

    /// The blocks of `slot`: descending and interleaved with the other slots', so that no order is taken for granted.
    pub(crate) fn block_table(&self, slot: usize) -> Vec<BlockId> {
        let per_slot = MAX_CONTEXT / BLOCK_TOKENS;
        let num_slots = self.num_blocks / per_slot;
        (0..per_slot).map(|i| BlockId((self.num_blocks - 1 - i * num_slots - slot) as u32)).collect()
    }

    /// Builds the batch of one step.
    pub(crate) fn batch(&self, shares: &[Share<'_>]) -> Batch {
        let tables: Vec<_> = shares.iter().map(|share| self.block_table(share.slot)).collect();
        let sequences: Vec<_> = shares
            .iter()
            .zip(&tables)
            .map(|(share, block_table)| BatchSequence {
                tokens: share.tokens,
                start: share.start,
                stored: 0,
                block_table,
                logits: share.logits,
            })
            .collect();
        Batch::new(&self.model, &self.kv, &self.workspace, &sequences).expect("a valid batch")
    }

    /// Runs one step; hands each row of logits that was asked for to `take`, in batch order.
    pub(crate) fn step(&mut self, shares: &[Share<'_>], mut take: impl FnMut(&[f32])) {
        let batch = self.batch(shares);
        self.model.forward(&batch, &mut self.kv, &mut self.workspace);
        let num_rows = batch.num_logit_rows();
        for start in (0..num_rows).step_by(Workspace::MAX_LOGIT_ROWS) {
            let end = (start + Workspace::MAX_LOGIT_ROWS).min(num_rows);
            let logits = self.model.logits(start..end, &mut self.workspace);
            logits.chunks_exact(self.model.config().vocab_size).for_each(&mut take);
        }
    }

    /// Logits of every position of `ids`, from the beginning of a sequence, `chunk` tokens a step.
    pub(crate) fn all_logits(&mut self, ids: &[TokenId], chunk: usize) -> Vec<Vec<f32>> {
        let mut rows = Vec::with_capacity(ids.len());
        for (i, tokens) in ids.chunks(chunk).enumerate() {
            let share = Share { slot: 0, tokens, start: i * chunk, logits: LogitRows::All };
            self.step(&[share], |row| rows.push(row.to_vec()));
        }
        rows
    }
}

/// A file or directory of the golden checkpoints.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/public").join(name)
}

pub(crate) fn open(path: &Path) -> Checkpoint {
    checkpoint::open(path, &LoadOptions::default()).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
