//! One hash of all logits, whatever may not change them: kernel, threads, batch, prefill chunk. And what a model with
//! weights that are not finite does: it says so in its logits, and nothing else happens.

mod common;

use std::{
    cell::Cell,
    hash::{DefaultHasher, Hasher},
};

use bitnet_core::{
    Checkpoint, TokenId,
    checkpoint::Pooling,
    kernels,
    kv_cache::KvDtype,
    model::{LogitRows, PooledStates},
};
use common::{Engine, MAX_CONTEXT, Setup, Share, golden, open};

const THREADS: [usize; 3] = [1, 2, 3];
const BATCHES: [usize; 3] = [1, 3, 8];
const CHUNKS: [usize; 4] = [1, 7, 64, 512];
const MAX_BATCH_TOKENS: usize = 512;

/// Prompt lengths: across partitions of 256 positions, at and around the edges of blocks, and single tokens.
const LENGTHS: [usize; 8] = [270, 1, 16, 17, 33, 15, 48, 5];
/// Tokens fed one a step after each prompt, while the others may still be in theirs.
const DECODED: usize = 3;

#[test]
fn logits_depend_on_no_kernel_no_packing_and_no_number_of_threads() {
    let (single, half, byte) = (KvDtype::F32, KvDtype::F16, KvDtype::Int8);
    for (model, dtype) in [("p1_packed", single), ("p1_packed", half), ("p1_packed", byte), ("p3_llama", half)] {
        let checkpoint = open(&golden(model));
        let reference = hash_of_logits(&checkpoint, dtype, setup("auto", 1), 8, 512);
        for kernel in kernels::available() {
            let layouts = kernel.layouts().iter().flat_map(|&layout| THREADS.map(|num_threads| (layout, num_threads)));
            for (layout, num_threads) in layouts {
                let setup = Setup { packing: Some(layout), ..setup(kernel.name(), num_threads) };
                let hash = hash_of_logits(&checkpoint, dtype, setup, 3, 64);
                let packing = layout.name();
                assert_eq!(hash, reference, "{model} {dtype:?} {} {packing} {num_threads} threads", kernel.name());
            }
        }
    }
}

#[test]
fn logits_depend_on_no_batch_and_no_chunk() {
    let (single, half, byte) = (KvDtype::F32, KvDtype::F16, KvDtype::Int8);
    for (model, dtype) in [("p2_master", half), ("p2_master", byte), ("p4_silu", single), ("p4_silu", half)] {
        let checkpoint = open(&golden(model));
        let reference = hash_of_logits(&checkpoint, dtype, setup("auto", 1), 2, 33);
        for batch in BATCHES {
            for chunk in CHUNKS {
                let hash = hash_of_logits(&checkpoint, dtype, setup("auto", 2), batch, chunk);
                assert_eq!(hash, reference, "{model} {dtype:?} batch {batch} chunk {chunk}");
            }
        }
    }
}

#[test]
fn a_mean_of_hidden_states_depends_on_no_kernel_no_thread_and_no_chunk() {
    let checkpoint = open(&golden("p1_packed"));
    let ids = tokens(3, 270);
    let mean = |setup: Setup, chunk: usize| {
        let mut engine = Engine::new(&checkpoint, KvDtype::F16, setup);
        let mut pooled = PooledStates::new(Pooling::Mean);
        for (i, tokens) in ids.chunks(chunk).enumerate() {
            let batch = engine.batch(&[Share { slot: 1, tokens, start: i * chunk, logits: LogitRows::All }]);
            engine.model.forward(&batch, &mut engine.kv, &mut engine.workspace);
            (0..tokens.len()).for_each(|row| pooled.add(i * chunk + row, engine.workspace.hidden_state(row)));
        }
        pooled.embedding().expect("finite values")
    };
    let expected = mean(setup("scalar", 1), 512);
    for kernel in kernels::available() {
        for (num_threads, chunk) in THREADS.into_iter().zip([7, 64, 1]) {
            assert_eq!(mean(setup(kernel.name(), num_threads), chunk), expected, "{} chunk {chunk}", kernel.name());
        }
    }
}

#[test]
fn the_cache_type_is_seen() {
    let checkpoint = open(&golden("p1_packed"));
    let [single, half, byte] = [KvDtype::F32, KvDtype::F16, KvDtype::Int8]
        .map(|dtype| hash_of_logits(&checkpoint, dtype, setup("auto", 1), 8, 512));
    assert!(single != half && half != byte && byte != single);
}

#[test]
fn a_cache_of_bytes_stays_near_one_of_singles() {
    let checkpoint = open(&golden("p1_packed"));
    let ids = tokens(3, 300);
    let [single, byte] = [KvDtype::F32, KvDtype::Int8]
        .map(|dtype| Engine::new(&checkpoint, dtype, setup("auto", 1)).all_logits(&ids, 64).concat());
    let rms = |values: &mut dyn Iterator<Item = f32>| (values.map(|x| f64::from(x * x)).sum::<f64>()).sqrt();
    let distance = rms(&mut single.iter().zip(&byte).map(|(a, b)| a - b)) / rms(&mut single.iter().copied());
    assert!(distance < 0.1, "{distance}");
}

#[test]
fn weights_that_are_not_finite_reach_the_logits() {
    for bad in [f32::NAN, f32::INFINITY] {
        for poison in [attn_norm, ffn_norm, output_norm] {
            let mut checkpoint = open(&golden("p1_packed"));
            poison(&mut checkpoint, bad);
            for dtype in [KvDtype::F16, KvDtype::Int8] {
                let mut engine = Engine::new(&checkpoint, dtype, setup("auto", 2));
                for row in engine.all_logits(&tokens(0, 20), 16) {
                    assert!(row.iter().all(|logit| !logit.is_finite()), "{bad} {dtype:?}");
                }
            }
        }
    }
}

#[test]
fn a_block_of_another_request_is_never_seen() {
    let clean = open(&golden("p1_packed"));
    let mut poisoned = open(&golden("p1_packed"));
    attn_norm(&mut poisoned, f32::NAN);
    let poisoned = Engine::new(&poisoned, KvDtype::F16, setup("auto", 1));
    let mut engine = Engine::new(&clean, KvDtype::F16, setup("auto", 1));
    let prompt = tokens(1, 21);
    let expected = engine.all_logits(&prompt, 7);
    // Fill the same blocks, and more, with NaN, then use them again.
    let batch = engine.batch(&[Share { slot: 0, tokens: &tokens(2, 40), start: 0, logits: LogitRows::None }]);
    poisoned.model.forward(&batch, &mut engine.kv, &mut engine.workspace);
    assert_eq!(engine.all_logits(&prompt, 7), expected);
}

#[test]
fn a_pass_that_is_given_up_leaves_nothing_behind() {
    let mut engine = Engine::new(&open(&golden("p1_packed")), KvDtype::F16, setup("auto", 2));
    let prompt = tokens(1, 21);
    let expected = engine.all_logits(&prompt, 7);
    let batch = engine.batch(&[Share { slot: 0, tokens: &tokens(2, 40), start: 0, logits: LogitRows::All }]);
    let num_asked = Cell::new(0);
    let is_wanted = || num_asked.replace(num_asked.get() + 1) < 1;
    assert!(!engine.model.forward_while(&batch, &mut engine.kv, &mut engine.workspace, &is_wanted));
    assert_eq!(num_asked.get(), 2, "asked before each layer");
    assert_eq!(engine.all_logits(&prompt, 7), expected);
}

fn attn_norm(checkpoint: &mut Checkpoint, value: f32) {
    checkpoint.weights.layers[0].attn_norm[5] = value;
}

fn ffn_norm(checkpoint: &mut Checkpoint, value: f32) {
    checkpoint.weights.layers[1].ffn_norm[5] = value;
}

fn output_norm(checkpoint: &mut Checkpoint, value: f32) {
    checkpoint.weights.output_norm[5] = value;
}

fn setup(kernel: &str, num_threads: usize) -> Setup {
    let kernel = kernels::select(kernel).expect("an available kernel");
    Setup { kernel, packing: None, num_threads, max_batch_tokens: MAX_BATCH_TOKENS, num_sequences: LENGTHS.len() }
}

/// The hash of every logit of every sequence, computed `batch` sequences at a time, `chunk` prompt tokens a step.
fn hash_of_logits(checkpoint: &Checkpoint, dtype: KvDtype, setup: Setup, batch: usize, chunk: usize) -> u64 {
    let mut engine = Engine::new(checkpoint, dtype, setup);
    let mut sequences: Vec<_> = LENGTHS.iter().enumerate().map(|(slot, &length)| Sequence::new(slot, length)).collect();
    for group in sequences.chunks_mut(batch) {
        while group.iter().any(|sequence| !sequence.is_done()) {
            step(&mut engine, group, chunk);
        }
    }
    let mut hasher = DefaultHasher::new();
    sequences.iter().for_each(|sequence| hasher.write_u64(sequence.hasher.finish()));
    hasher.finish()
}

/// Advances every sequence of `group` by its next share.
fn step(engine: &mut Engine, group: &mut [Sequence], chunk: usize) {
    let mut running: Vec<_> = group.iter_mut().filter(|sequence| !sequence.is_done()).collect();
    let mut room = MAX_BATCH_TOKENS;
    let mut lens = Vec::new();
    for sequence in &running {
        let len = sequence.next_len(chunk).min(room);
        room -= len;
        lens.push(len);
    }
    let shares: Vec<_> =
        running.iter().zip(&lens).filter(|(_, len)| **len > 0).map(|(sequence, &len)| sequence.share(len)).collect();
    let mut rows = Vec::new();
    engine.step(&shares, |row| rows.push(row.to_vec()));
    let mut rows = rows.iter();
    for (sequence, len) in running.iter_mut().zip(lens) {
        sequence.take(len, &mut rows);
    }
}

/// A sequence on its way: first its prompt in chunks, then a few tokens one by one.
struct Sequence {
    slot: usize,
    tokens: Vec<TokenId>,
    prompt_len: usize,
    num_computed: usize,
    hasher: DefaultHasher,
}

impl Sequence {
    fn new(slot: usize, prompt_len: usize) -> Self {
        let tokens = tokens(slot, prompt_len + DECODED);
        assert!(tokens.len() <= MAX_CONTEXT);
        Self { slot, tokens, prompt_len, num_computed: 0, hasher: DefaultHasher::new() }
    }

    fn is_done(&self) -> bool {
        self.num_computed == self.tokens.len()
    }

    fn next_len(&self, chunk: usize) -> usize {
        let prompt_left = self.prompt_len.saturating_sub(self.num_computed);
        if prompt_left > 0 { prompt_left.min(chunk) } else { 1 }
    }

    fn share(&self, len: usize) -> Share<'_> {
        let tokens = &self.tokens[self.num_computed..self.num_computed + len];
        Share { slot: self.slot, tokens, start: self.num_computed, logits: LogitRows::All }
    }

    fn take<'r>(&mut self, len: usize, rows: &mut impl Iterator<Item = &'r Vec<f32>>) {
        for row in rows.take(len) {
            row.iter().for_each(|logit| self.hasher.write_u32(logit.to_bits()));
        }
        self.num_computed += len;
    }
}

/// Token ids of no meaning, different for each `seed`.
fn tokens(seed: usize, len: usize) -> Vec<TokenId> {
    (0..len).map(|i| TokenId(((i * i * 31 + i * 7 + seed * 101) % 500) as u32)).collect()
}
