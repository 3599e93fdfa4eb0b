//! Who runs, and who computes how many tokens in the next step. Pure decisions: no channels, model, clock, metrics, text or async.
//!
//! There is no prefill phase and no decode phase, only `num_computed_tokens` catching up with the tokens of each sequence:
//!
//! 1. Running sequences get blocks for all their tokens, in the order in which they started. When none is free, the newest one
//!    gives its own up and waits. What it had is computed again later (or found in the cache), to the same bits, so nobody
//!    sees it. The oldest can take every block, and one context fits, so something always moves.
//! 2. Waiting sequences start while places and blocks last: those that were preempted first, then the least served client's
//!    (its own order is priority, then arrival). Each takes over the blocks that hold its beginning already; choices of
//!    one request wait until the first has computed their prompt. A client with nothing running may take one place more than
//!    there are, so that it never waits for another's long answers; a health probe needs no place.
//! 3. The rows of the step are shared out by [`StepBudget`]. What is left of them verifies guesses, which never take a block
//!    from anybody.

use bitnet_core::{TokenId, kv_cache::BLOCK_TOKENS};

use super::{
    Draft,
    block_pool::BlockPool,
    budget::{StepBudget, StepRows},
    fairness::ServiceCounters,
    prefix_cache::PrefixCache,
    sequence::{Sequence, SequenceId},
};
use crate::config::PrefixSharing;

/// What the scheduler may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Most sequences running.
    pub max_num_seqs: usize,
    /// Most tokens computed in one step.
    pub max_num_batched_tokens: usize,
    /// Blocks of the KV cache; every sequence fits into them alone.
    pub num_blocks: usize,
    /// Sequences waiting beyond which [`Scheduler::has_room`] is false.
    pub max_waiting: usize,
    /// Who finds whose prefixes.
    pub prefix_sharing: PrefixSharing,
}

/// The sequences of the engine and the blocks they hold.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    budget: StepBudget,
    blocks: BlockPool,
    prefixes: PrefixCache,
    counters: ServiceCounters,
    waiting: Vec<Sequence>,
    /// In the order in which they started; a probe stands before all others.
    running: Vec<Sequence>,
    num_preemptions: u64,
}

/// What one step computes: at most the budget's tokens, each sequence at most once, its blocks allocated.
#[derive(Debug)]
pub struct ScheduledBatch<'a> {
    /// Shares in order of arrival.
    pub shares: Vec<Share<'a>>,
}

/// One sequence's share of a step.
#[derive(Clone, Copy, Debug)]
pub struct Share<'a> {
    /// Whose.
    pub sequence: &'a Sequence,
    /// Tokens to compute from `sequence.num_computed_tokens` on, at least one.
    pub num_tokens: usize,
    /// Leading tokens of the sequence's draft to compute after them; none unless `num_tokens` is one, the last known.
    pub num_drafted: usize,
}

impl Scheduler {
    /// Nothing running, nothing waiting, all blocks free.
    pub fn new(limits: SchedulerLimits) -> Self {
        let blocks = BlockPool::new(limits.num_blocks);
        let prefixes = PrefixCache::new(limits.prefix_sharing);
        let budget = StepBudget::new(limits.max_num_batched_tokens);
        Self {
            limits,
            budget,
            blocks,
            prefixes,
            counters: ServiceCounters::default(),
            waiting: Vec::new(),
            running: Vec::new(),
            num_preemptions: 0,
        }
    }

    /// Whether more sequences should be taken over from the submission channel.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < self.limits.max_waiting
    }

    /// Takes a sequence, the newest so far, into the queue.
    pub fn add(&mut self, sequence: Sequence) {
        self.counters.arrive(sequence.request.client);
        self.waiting.push(sequence);
    }

    /// Forgets a sequence wherever it is; its blocks are free at once.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = match self.running.iter().position(|sequence| sequence.id == id) {
            Some(index) => self.running.remove(index),
            None => {
                let index = self.waiting.iter().position(|sequence| sequence.id == id)?;
                self.waiting.remove(index)
            }
        };
        self.counters.leave(sequence.request.client);
        self.release_blocks(&mut sequence);
        Some(sequence)
    }

    /// Decides the next step.
    pub fn schedule(&mut self, step_rows: StepRows) -> ScheduledBatch<'_> {
        let preemptions_before = self.num_preemptions;
        let mut covered = 0;
        while covered < self.running.len() && self.cover_with_blocks(covered) {
            covered += 1;
        }
        // Whoever was preempted would come straight back and be preempted again.
        if self.num_preemptions == preemptions_before {
            while self.admit_next() {}
        }
        let (num_tokens, budget) = self.budget.share(&self.running, &self.counters, step_rows);
        let num_drafted = self.cover_drafts(budget);
        let shares = self.running.iter().zip(num_tokens).zip(num_drafted);
        let share = |((sequence, num_tokens), num_drafted)| Share { sequence, num_tokens, num_drafted };
        ScheduledBatch { shares: shares.map(share).filter(|share| share.num_tokens > 0).collect() }
    }

    /// Notes what each running sequence may say next, for the next step to verify where there is room.
    pub fn draft(&mut self, mut propose: impl FnMut(&Sequence) -> Draft) {
        for sequence in &mut self.running {
            sequence.draft = propose(sequence);
        }
    }

    /// Records that a running sequence computed its share and, when that ended with its last known token, what it drew: the
    /// next token, then those after guesses that came true, whose keys and values are computed with it.
    ///
    /// # Panics
    /// When the sequence is not running.
    pub fn advance(&mut self, id: SequenceId, num_tokens: usize, drawn: &[TokenId]) -> &Sequence {
        let sequence =
            self.running.iter_mut().find(|sequence| sequence.id == id).expect("only running sequences compute");
        let before = sequence.num_computed_tokens;
        sequence.tokens.extend_from_slice(drawn);
        sequence.draft = Draft::default();
        let num_computed = num_tokens + drawn.len().saturating_sub(1);
        sequence.num_computed_tokens += num_computed;
        self.prefixes.publish(&mut self.blocks, sequence, before);
        self.counters.charge(sequence.request.client, num_computed);
        sequence
    }

    /// Sequences being computed, in the order in which they started.
    pub fn running(&self) -> &[Sequence] {
        &self.running
    }

    /// Sequences not being computed, in order of arrival.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &Sequence> {
        self.waiting.iter()
    }

    /// The blocks.
    pub fn blocks(&self) -> &BlockPool {
        &self.blocks
    }

    /// How often a sequence gave its blocks up.
    pub fn num_preemptions(&self) -> u64 {
        self.num_preemptions
    }

    /// Makes running sequence `index` hold a block for each of its tokens, at the cost of the newest ones. False when it was
    /// itself the newest and had to go.
    fn cover_with_blocks(&mut self, index: usize) -> bool {
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            if sequence.block_table.len() >= blocks_of(sequence.tokens.len()) {
                return true;
            }
            match self.blocks.allocate() {
                Some(block) => sequence.block_table.push(block),
                None => self.preempt_newest(),
            }
        }
        false
    }

    fn preempt_newest(&mut self) {
        if let Some(mut sequence) = self.running.pop() {
            self.release_blocks(&mut sequence);
            self.waiting.push(sequence);
            self.num_preemptions += 1;
        }
    }

    /// Starts the waiting sequence whose turn it is, if there are blocks for all its tokens, with one to spare for each that
    /// runs, so that it is not preempted by the next step. A probe makes itself room.
    fn admit_next(&mut self) -> bool {
        let Some(index) = self.next_in_turn() else { return false };
        let next = &mut self.waiting[index];
        let found = self.prefixes.find(&self.blocks, next);
        let held = found.iter().filter(|block| self.blocks.is_used(**block)).count();
        let needed = blocks_of(next.tokens.len()) - held;
        let is_probe = next.is_probe;
        let growth = if self.running.is_empty() || is_probe { 0 } else { self.running.len() + 1 };
        let newest_is_user = self.running.last().is_some_and(|newest| !newest.is_probe);
        if is_probe && newest_is_user && self.blocks.num_available() < needed {
            self.preempt_newest();
        }
        if self.blocks.num_available() < needed + growth {
            return false;
        }
        let mut next = self.waiting.remove(index);
        found.iter().for_each(|block| self.blocks.share(*block));
        next.num_stored_tokens = found.len() * BLOCK_TOKENS;
        next.num_computed_tokens = next.num_stored_tokens.min(next.tokens.len() - 1);
        next.cached_tokens.get_or_insert(next.num_computed_tokens);
        next.block_table = found;
        let at = if is_probe { 0 } else { self.running.len() };
        self.running.insert(at, next);
        self.cover_with_blocks(at)
    }

    /// The waiting sequence to start next, if there is a place for it.
    fn next_in_turn(&self) -> Option<usize> {
        let turn = |sequence: &Sequence| {
            let started = sequence.cached_tokens.is_some();
            let served = if started { 0 } else { self.counters.served(sequence.request.client) };
            (!sequence.is_probe, !started, served, sequence.request.priority, sequence.id)
        };
        let wanted: usize = self.running.iter().map(Sequence::num_tokens_to_compute).sum();
        let places = self.limits.max_num_seqs + self.running.iter().filter(|sequence| sequence.is_probe).count();
        let may_start = |sequence: &Sequence| {
            let is_new = !self.running.iter().any(|other| other.request.client == sequence.request.client);
            let has_budget = is_new || wanted < self.limits.max_num_batched_tokens;
            let has_place = self.running.len() < places + usize::from(is_new);
            sequence.is_probe || (has_budget && has_place && !waits_for_prompt(sequence, &self.running))
        };
        let candidates = self.waiting.iter().enumerate().filter(|(_, sequence)| may_start(sequence));
        candidates.min_by_key(|(_, sequence)| turn(sequence)).map(|(index, _)| index)
    }

    /// How many guesses of each running sequence are verified in this step: as many as `budget` has rows and free blocks
    /// have room for.
    fn cover_drafts(&mut self, mut budget: usize) -> Vec<usize> {
        let Self { running, blocks, .. } = self;
        let cover = |sequence: &mut Sequence| {
            let wanted =
                if sequence.num_tokens_to_compute() == 1 { sequence.draft.tokens.len().min(budget) } else { 0 };
            while sequence.block_table.len() < blocks_of(sequence.tokens.len() + wanted) {
                let Some(block) = blocks.allocate() else { break };
                sequence.block_table.push(block);
            }
            let room = sequence.block_table.len() * BLOCK_TOKENS - sequence.tokens.len();
            let num_drafted = wanted.min(room);
            budget -= num_drafted;
            num_drafted
        };
        running.iter_mut().map(cover).collect()
    }

    fn release_blocks(&mut self, sequence: &mut Sequence) {
        sequence.block_table.drain(..).rev().for_each(|block| self.blocks.release(block));
        (sequence.num_computed_tokens, sequence.num_stored_tokens) = (0, 0);
        sequence.draft = Draft::default();
    }
}

/// Whether a choice that is about to compute its prompt soon need not: another choice of its request is at it.
fn waits_for_prompt(next: &Sequence, running: &[Sequence]) -> bool {
    let is_at_it = |other: &Sequence| other.first_choice() == next.first_choice() && !other.is_prompt_computed();
    next.prompt_len() > BLOCK_TOKENS && !next.needs_every_row() && running.iter().any(is_at_it)
}

/// Blocks that hold `num_tokens` tokens.
pub fn blocks_of(num_tokens: usize) -> usize {
    num_tokens.div_ceil(BLOCK_TOKENS)
}
