//! The whole product of what may not change a logit: kernel x packing x sparse or dense x threads x batch x prefill chunk x
//! prefix hit or miss, on one layer of a tiny model.

use std::hash::{DefaultHasher, Hasher};

use bitnet_core::{
    Batch, BlockId, Checkpoint, LoadOptions, Model, TokenId, checkpoint,
    kernels::{self, TernaryKernel, packing::PackedLayout},
    kv_cache::{BLOCK_TOKENS, KvCache, KvDtype},
    model::{BatchSequence, LogitRows, ModelOptions, SparseFfn, Workspace},
    threads::WorkerPool,
};

const THREADS: [usize; 3] = [1, 2, 3];
const BATCHES: [usize; 3] = [1, 3, 8];
const CHUNKS: [usize; 4] = [1, 7, 64, 512];
/// Sequences: the first is longer than a chunk of 64, the others lie around the edges of blocks.
const LENGTHS: [usize; 8] = [67, 1, 17, 16, 3, 2, 1, 5];
const MAX_BATCH_TOKENS: usize = 512;
const MAX_CONTEXT: usize = 80;
const BLOCKS_EACH: usize = MAX_CONTEXT / BLOCK_TOKENS;

/// A hash of the logits of each position of each sequence.
type Hashes = Vec<Vec<u64>>;

#[test]
fn one_hash_of_all_logits_over_the_whole_product() {
    let checkpoint = tiny();
    let mut reference = None;
    for &kernel in kernels::available() {
        for &layout in kernel.layouts() {
            for sparse in [SparseFfn::Off, SparseFfn::On] {
                let model = load(&checkpoint, kernel, layout, sparse);
                assert_eq!(model.has_sparse_ffn(), sparse == SparseFfn::On);
                for threads in THREADS {
                    let mut engine = Engine::new(&model, threads);
                    for (batch, chunk) in BATCHES.into_iter().flat_map(|batch| CHUNKS.map(|chunk| (batch, chunk))) {
                        let label = format!(
                            "{} {} {sparse:?} {threads} threads, batch {batch}, chunk {chunk}",
                            kernel.name(),
                            layout.name()
                        );
                        let miss = engine.hashes(batch, chunk, false);
                        let expected = reference.get_or_insert_with(|| miss.clone());
                        assert_eq!(miss, *expected, "{label}, prefix miss");
                        for (hit, expected) in engine.hashes(batch, chunk, true).iter().zip(expected) {
                            assert_eq!(hit[..], expected[expected.len() - hit.len()..], "{label}, prefix hit");
                        }
                    }
                }
            }
        }
    }
}

/// The first layer of a checkpoint of the repository, whose feed-forward block is relu2's.
fn tiny() -> Checkpoint {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/public/p1_packed");
    let mut checkpoint = checkpoint::open(path.as_ref(), &LoadOptions::default()).expect("a good checkpoint");
    checkpoint.weights.layers.truncate(1);
    checkpoint.config.num_layers = 1;
    checkpoint
}

fn load(checkpoint: &Checkpoint, kernel: &'static dyn TernaryKernel, layout: PackedLayout, sparse: SparseFfn) -> Model {
    let options = ModelOptions { packing: Some(layout), sparse_ffn: sparse, ..ModelOptions::default() };
    Model::load_with(checkpoint, kernel, &options, &mut WorkerPool::new(1), &|_, _| {}).expect("a good checkpoint")
}

struct Engine<'m> {
    model: &'m Model,
    kv: KvCache,
    workspace: Workspace,
}

impl<'m> Engine<'m> {
    fn new(model: &'m Model, threads: usize) -> Self {
        let kv = KvCache::new(model, 2 * LENGTHS.len() * BLOCKS_EACH, KvDtype::F16).expect("a small cache");
        let workspace = Workspace::new(model, MAX_BATCH_TOKENS, MAX_CONTEXT, WorkerPool::new(threads));
        Self { model, kv, workspace }
    }

    /// Computes every sequence, `batch` of them at a time and at most `chunk` tokens of each a step. With `hit`, whole
    /// blocks but the last token's come from the run before, and the rest goes to other blocks.
    fn hashes(&mut self, batch: usize, chunk: usize, hit: bool) -> Hashes {
        let mut hashes = Vec::new();
        for first in (0..LENGTHS.len()).step_by(batch) {
            let group = first..LENGTHS.len().min(first + batch);
            let mut done: Vec<_> = group.clone().map(|slot| cached(slot, hit) * BLOCK_TOKENS).collect();
            let mut of_group = vec![Vec::new(); group.len()];
            while group.clone().zip(&done).any(|(slot, done)| *done < LENGTHS[slot]) {
                self.step(group.start, chunk, hit, &mut done, &mut of_group);
            }
            hashes.extend(of_group);
        }
        hashes
    }

    fn step(&mut self, first: usize, chunk: usize, hit: bool, done: &mut [usize], hashes: &mut [Vec<u64>]) {
        let slots: Vec<_> = (0..done.len()).filter(|&index| done[index] < LENGTHS[first + index]).collect();
        let inputs: Vec<_> = slots
            .iter()
            .map(|&index| {
                let (slot, start) = (first + index, done[index]);
                let len = chunk.min(LENGTHS[slot] - start);
                (start, tokens(slot, start..start + len), block_table(slot, hit))
            })
            .collect();
        let sequences: Vec<_> = inputs
            .iter()
            .map(|(start, tokens, table)| BatchSequence {
                tokens,
                start: *start,
                stored: 0,
                block_table: table,
                logits: LogitRows::All,
            })
            .collect();
        let batch = Batch::new(self.model, &self.kv, &self.workspace, &sequences).expect("a valid batch");
        self.model.forward(&batch, &mut self.kv, &mut self.workspace);
        let owners: Vec<_> =
            slots.iter().zip(&inputs).flat_map(|(&slot, (_, tokens, _))| vec![slot; tokens.len()]).collect();
        let mut owners_left = owners.iter();
        for start in (0..owners.len()).step_by(Workspace::MAX_LOGIT_ROWS) {
            let end = owners.len().min(start + Workspace::MAX_LOGIT_ROWS);
            let logits = self.model.logits(start..end, &mut self.workspace);
            for (row, &owner) in logits.chunks_exact(self.model.config().vocab_size).zip(&mut owners_left) {
                let mut hasher = DefaultHasher::new();
                row.iter().for_each(|logit| hasher.write_u32(logit.to_bits()));
                hashes[owner].push(hasher.finish());
            }
        }
        for (&index, (_, tokens, _)) in slots.iter().zip(&inputs) {
            done[index] += tokens.len();
        }
    }
}

/// Whole blocks that a hit finds: the last token is always computed.
fn cached(slot: usize, hit: bool) -> usize {
    if hit { (LENGTHS[slot] - 1) / BLOCK_TOKENS } else { 0 }
}

/// Blocks of `slot`, in no order that could be taken for granted; those a hit does not find are others.
fn block_table(slot: usize, hit: bool) -> Vec<BlockId> {
    let num_slots = 2 * LENGTHS.len();
    let block = |slot: usize, index: usize| BlockId((num_slots * (BLOCKS_EACH - 1 - index) + slot) as u32);
    let own = if hit { slot + LENGTHS.len() } else { slot };
    let cached = cached(slot, hit);
    (0..BLOCKS_EACH).map(|index| block(if index < cached { slot } else { own }, index)).collect()
}

fn tokens(slot: usize, positions: std::ops::Range<usize>) -> Vec<TokenId> {
    positions.map(|i| TokenId(((i * i * 31 + i * 7 + slot * 101) % 500) as u32)).collect()
}
