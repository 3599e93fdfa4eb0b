//! Running a case: the same calls a step of the server makes, timed, the median of some rounds. The limits of the machine
//! are sampled before and after every round, by the same workers, and a round's share is that of its own limit.

use std::{io, time::Instant};

use bitnet_core::{
    Batch, BlockId, Model, TokenId,
    kernels::{
        TernaryKernel,
        limits::{Limits, Ruler},
    },
    kv_cache::{BLOCK_TOKENS, KvCache, KvDtype},
    model::{BatchSequence, LogitRows, Workspace},
    sampling::{SampleKey, Sampler, SamplingParams},
    threads::WorkerPool,
};

use super::cases::{Case, DECODED_TOKENS};

/// Tokens of a step, as in the server.
const MAX_BATCH_TOKENS: usize = 512;
/// Rounds of which the median counts.
const ROUNDS: usize = 5;
/// Rounds at most: one during which the machine changed is taken again while there are more than enough left.
const MAX_ROUNDS: usize = 10;
/// How far the limits before and after a round may lie apart.
const STEADY: f64 = 0.9;
/// Tokens that are really computed to fill a context; the rest are copies, which cost as much to read.
const FILLED_TOKENS: usize = 256;

/// A model and all it needs to run.
pub(super) struct Bench {
    model: Model,
    kernel: &'static dyn TernaryKernel,
    ruler: Ruler,
    kv: KvCache,
    workspace: Workspace,
    sampler: Sampler,
    greedy: SamplingParams,
}

/// What a case took, and what it takes at least.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    pub(super) tokens_per_s: f64,
    pub(super) bytes_per_token: f64,
    pub(super) macs_per_token: f64,
    pub(super) share_of_limit: f64,
    /// The machine of the round that counts.
    pub(super) limits: Limits,
}

/// The sequences of a case: their tokens' next position and their blocks.
struct Sequences {
    next: Vec<TokenId>,
    position: usize,
    block_tables: Vec<Vec<BlockId>>,
}

impl Bench {
    /// Memory for the largest of `cases`.
    ///
    /// # Errors
    /// When the system refuses the cache.
    pub(super) fn new(
        model: Model,
        kernel: &'static dyn TernaryKernel,
        pool: WorkerPool,
        kv_dtype: KvDtype,
        cases: &[Case],
    ) -> io::Result<Self> {
        let most = |of: fn(&Case) -> usize| cases.iter().map(of).max().unwrap_or(1);
        let num_blocks = most(|case| case.batch() * blocks_of(case));
        let max_context = most(|case| case.context() + case.tokens());
        let kv = KvCache::new(&model, num_blocks, kv_dtype)?;
        let mut workspace = Workspace::new(&model, MAX_BATCH_TOKENS.max(most(Case::batch)), max_context, pool);
        workspace.pin_caller();
        let ruler = Ruler::new(kernel, workspace.pool_mut());
        let sampler = Sampler::new(model.config().vocab_size);
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        Ok(Self { model, kernel, ruler, kv, workspace, sampler, greedy })
    }

    pub(super) fn model(&self) -> &Model {
        &self.model
    }

    /// Runs `case` once to warm up and then some rounds. The one with the median share of its limit counts.
    pub(super) fn measure(&mut self, case: &Case) -> Measured {
        let sequences = self.prepare(case);
        let num_tokens = (case.batch() * case.tokens()) as f64;
        let (bytes, macs) = self.cost(case);
        let (bytes_per_token, macs_per_token) = (bytes / num_tokens, macs / num_tokens);
        self.round(case, &sequences);
        let mut before = self.sample();
        let mut rounds = Vec::with_capacity(ROUNDS);
        for attempt in 0..MAX_ROUNDS {
            let tokens_per_s = num_tokens / self.round(case, &sequences);
            let after = self.sample();
            let [first, last] = [before, after].map(|limits| limits.tokens_per_s(bytes_per_token, macs_per_token));
            let is_needed = MAX_ROUNDS - attempt <= ROUNDS - rounds.len();
            if is_needed || first.min(last) >= STEADY * first.max(last) {
                let limits = before.better(&after);
                let share_of_limit = tokens_per_s / limits.tokens_per_s(bytes_per_token, macs_per_token);
                rounds.push(Measured { tokens_per_s, bytes_per_token, macs_per_token, share_of_limit, limits });
            }
            if rounds.len() == ROUNDS {
                break;
            }
            before = after;
        }
        rounds.sort_unstable_by(|a, b| a.share_of_limit.total_cmp(&b.share_of_limit));
        rounds[ROUNDS / 2]
    }

    fn sample(&mut self) -> Limits {
        self.ruler.sample(self.kernel, self.workspace.pool_mut())
    }

    /// Bytes read and int8 multiply-accumulates of a round. K and V count where they are read anew for every token, in
    /// decode; the floating-point work of attention is counted nowhere.
    fn cost(&self, case: &Case) -> (f64, f64) {
        let step = self.model.step_cost();
        let (num_steps, num_heads) = match case {
            Case::Prefill { tokens } => (tokens.div_ceil(MAX_BATCH_TOKENS), 1),
            Case::Decode { .. } => (DECODED_TOKENS, case.batch() * DECODED_TOKENS),
        };
        let kv_tokens = match case {
            Case::Prefill { .. } => 0,
            Case::Decode { batch, context } => batch * DECODED_TOKENS * (context + DECODED_TOKENS / 2),
        };
        let num_logit_steps = if matches!(case, Case::Prefill { .. }) { 1 } else { num_steps };
        let kv_bytes = kv_tokens as f64 * (self.kv.bytes_per_block() / BLOCK_TOKENS) as f64;
        let bytes = (num_steps * step.body_bytes + num_logit_steps * step.head_bytes) as f64 + kv_bytes;
        let macs =
            (case.batch() * case.tokens()) as f64 * step.body_macs as f64 + num_heads as f64 * step.head_macs as f64;
        (bytes, macs)
    }

    /// Blocks of their own for every sequence of `case`, the context filled.
    fn prepare(&mut self, case: &Case) -> Sequences {
        let per_sequence = blocks_of(case);
        let table = |index: usize| (0..per_sequence).map(|i| BlockId((index * per_sequence + i) as u32)).collect();
        let block_tables: Vec<Vec<BlockId>> = (0..case.batch()).map(table).collect();
        let next = (0..case.batch()).map(|index| self.some_token(index)).collect();
        let sequences = Sequences { next, position: case.context(), block_tables };
        if case.context() > 0 {
            let filled = case.context().min(FILLED_TOKENS);
            self.prefill(filled, &sequences.block_tables[0]);
            let num_filled = filled.div_ceil(BLOCK_TOKENS);
            for to in num_filled..case.batch() * per_sequence {
                self.kv.copy_block(BlockId((to % num_filled) as u32), BlockId(to as u32));
            }
        }
        sequences
    }

    fn round(&mut self, case: &Case, sequences: &Sequences) -> f64 {
        let start = Instant::now();
        match case {
            Case::Prefill { tokens } => self.prefill(*tokens, &sequences.block_tables[0]),
            Case::Decode { .. } => self.decode(sequences),
        }
        start.elapsed().as_secs_f64()
    }

    /// A prompt, in chunks, to its first token.
    fn prefill(&mut self, num_tokens: usize, block_table: &[BlockId]) {
        let prompt: Vec<TokenId> = (0..num_tokens).map(|index| self.some_token(index)).collect();
        for (chunk, start) in prompt.chunks(MAX_BATCH_TOKENS).zip((0..).step_by(MAX_BATCH_TOKENS)) {
            let is_last = start + chunk.len() == num_tokens;
            let logits = if is_last { LogitRows::Last } else { LogitRows::None };
            self.step(&[BatchSequence { tokens: chunk, start, stored: 0, block_table, logits }]);
        }
    }

    /// One round of every sequence, each token the greedy one after the last.
    fn decode(&mut self, sequences: &Sequences) {
        let mut next = sequences.next.clone();
        for start in sequences.position..sequences.position + DECODED_TOKENS {
            let tables = next.chunks(1).zip(&sequences.block_tables);
            let batch: Vec<_> = tables
                .map(|(tokens, block_table)| BatchSequence {
                    tokens,
                    start,
                    stored: 0,
                    block_table,
                    logits: LogitRows::Last,
                })
                .collect();
            let chosen = self.step(&batch);
            next = chosen;
        }
    }

    /// One step; the greedy token of every row that asked for logits.
    fn step(&mut self, sequences: &[BatchSequence<'_>]) -> Vec<TokenId> {
        let batch = Batch::new(&self.model, &self.kv, &self.workspace, sequences).expect("a batch within its limits");
        self.model.forward(&batch, &mut self.kv, &mut self.workspace);
        let num_rows = batch.num_logit_rows();
        let mut chosen = Vec::with_capacity(num_rows);
        let group = if self.model.has_screen() { Workspace::MAX_SCREENED_ROWS } else { Workspace::MAX_LOGIT_ROWS };
        for first in (0..num_rows).step_by(group) {
            let rows = first..num_rows.min(first + group);
            if self.model.has_screen() {
                self.model.screen(rows.clone(), &mut self.workspace);
                chosen.extend(rows.map(|row| self.choose_screened(row)));
            } else {
                let vocab_size = self.model.config().vocab_size;
                let logits = self.model.logits(rows, &mut self.workspace);
                chosen.extend(logits.chunks_exact(vocab_size).map(|row| {
                    // Some weights of a broken file may not be finite; their speed is as good as any.
                    self.sampler.sample(row, &self.greedy, &[], &[], &[], KEY).unwrap_or(TokenId(0))
                }));
            }
        }
        chosen
    }

    fn choose_screened(&mut self, row: usize) -> TokenId {
        let (screened, mut scorer) = self.model.screened(row, &mut self.workspace);
        let score = &mut |ids: &[u32], logits: &mut [f32]| scorer.score(ids, logits);
        let chosen = self.sampler.sample_screened(screened, None, &self.greedy, KEY, score);
        chosen.ok().flatten().unwrap_or(TokenId(0))
    }

    fn some_token(&self, index: usize) -> TokenId {
        TokenId((index * 7919 % self.model.config().vocab_size) as u32)
    }
}

/// Greedy choices have no noise.
const KEY: SampleKey = SampleKey { choice: 0, position: 0 };

/// Blocks of one sequence of `case`.
fn blocks_of(case: &Case) -> usize {
    (case.context() + case.tokens()).div_ceil(BLOCK_TOKENS)
}
