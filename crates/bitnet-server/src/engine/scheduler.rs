//! Who computes how many tokens in the next step. Pure decisions: no channels, model, clock, metrics, text or async.
//!
//! There is no prefill phase and no decode phase, only `num_computed_tokens` catching up with the tokens of each sequence:
//!
//! 1. Running sequences first, oldest first, each as many tokens as it lacks and the step's budget allows. A long prompt is
//!    chunked by the budget itself.
//! 2. When one needs a block and none is free, the newest running sequence gives its blocks up and goes back to the head of
//!    the queue. What it had is computed again later, to the same bits, so nobody sees it. The oldest can take every
//!    block, and one context fits, so something always moves.
//! 3. Then waiting sequences, strictly in order of arrival, as long as budget, places and blocks last. Each starts with the
//!    blocks that hold its beginning already. Choices of one request wait until the first has computed their prompt.
//!
//! Running and waiting are both in order of arrival, and everything running is older than everything waiting.

use std::collections::VecDeque;

use bitnet_core::{TokenId, kv_cache::BLOCK_TOKENS};

use super::{
    block_pool::BlockPool,
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
    blocks: BlockPool,
    prefixes: PrefixCache,
    waiting: VecDeque<Sequence>,
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
}

impl Scheduler {
    /// Nothing running, nothing waiting, all blocks free.
    pub fn new(limits: SchedulerLimits) -> Self {
        let blocks = BlockPool::new(limits.num_blocks);
        let prefixes = PrefixCache::new(limits.prefix_sharing);
        Self { limits, blocks, prefixes, waiting: VecDeque::new(), running: Vec::new(), num_preemptions: 0 }
    }

    /// Whether more sequences should be taken over from the submission channel.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < self.limits.max_waiting
    }

    /// Takes a sequence, the newest so far, into the queue.
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Forgets a sequence wherever it is; its blocks are free at once.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = match self.running.iter().position(|sequence| sequence.id == id) {
            Some(index) => self.running.remove(index),
            None => {
                let index = self.waiting.iter().position(|sequence| sequence.id == id)?;
                self.waiting.remove(index)?
            }
        };
        self.release_blocks(&mut sequence);
        Some(sequence)
    }

    /// Decides the next step.
    pub fn schedule(&mut self) -> ScheduledBatch<'_> {
        let mut budget = self.limits.max_num_batched_tokens;
        let mut num_tokens = Vec::with_capacity(self.limits.max_num_seqs);
        let preemptions_before = self.num_preemptions;
        while budget > 0 && num_tokens.len() < self.running.len() {
            let index = num_tokens.len();
            if self.cover_with_blocks(index) {
                num_tokens.push(self.running[index].num_tokens_to_compute().min(budget));
                budget -= num_tokens[index];
            }
        }
        // Whoever was preempted would come straight back and be preempted again.
        if self.num_preemptions == preemptions_before {
            while budget > 0 && self.admit_next() {
                let newest = &self.running[self.running.len() - 1];
                num_tokens.push(newest.num_tokens_to_compute().min(budget));
                budget -= num_tokens[num_tokens.len() - 1];
            }
        }
        let shares = self.running.iter().zip(num_tokens);
        ScheduledBatch { shares: shares.map(|(sequence, num_tokens)| Share { sequence, num_tokens }).collect() }
    }

    /// Records that a running sequence computed its share and, when that was its last known token, drew the next one.
    ///
    /// # Panics
    /// When the sequence is not running.
    pub fn advance(&mut self, id: SequenceId, num_tokens: usize, drawn: Option<TokenId>) -> &Sequence {
        let sequence =
            self.running.iter_mut().find(|sequence| sequence.id == id).expect("only running sequences compute");
        let before = sequence.num_computed_tokens;
        sequence.num_computed_tokens += num_tokens;
        self.prefixes.publish(&mut self.blocks, sequence, before);
        sequence.tokens.extend(drawn);
        sequence
    }

    /// Sequences being computed, in order of arrival.
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
            self.waiting.push_front(sequence);
            self.num_preemptions += 1;
        }
    }

    /// Starts the oldest waiting sequence if there is a place and blocks for all its tokens, with one to spare for each
    /// that runs, so that it is not preempted by the next step. Blocks that hold its start already are taken over.
    fn admit_next(&mut self) -> bool {
        let num_running = self.running.len();
        let Some(next) = self.waiting.front_mut() else { return false };
        if num_running >= self.limits.max_num_seqs || waits_for_prompt(next, &self.running) {
            return false;
        }
        let found = self.prefixes.find(&self.blocks, next);
        let growth = if num_running == 0 { 0 } else { num_running + 1 };
        let held = found.iter().filter(|block| self.blocks.is_used(**block)).count();
        if self.blocks.num_available() < blocks_of(next.tokens.len()) - held + growth {
            return false;
        }
        found.iter().for_each(|block| self.blocks.share(*block));
        next.num_computed_tokens = found.len() * BLOCK_TOKENS;
        next.cached_tokens.get_or_insert(next.num_computed_tokens);
        next.block_table = found;
        self.running.extend(self.waiting.pop_front());
        self.cover_with_blocks(num_running)
    }

    fn release_blocks(&mut self, sequence: &mut Sequence) {
        sequence.block_table.drain(..).rev().for_each(|block| self.blocks.release(block));
        sequence.num_computed_tokens = 0;
    }
}

/// Whether a choice that is about to compute its prompt soon need not: another choice of its request is at it.
fn waits_for_prompt(next: &Sequence, running: &[Sequence]) -> bool {
    let is_at_it = |other: &Sequence| other.first_choice() == next.first_choice() && !other.is_prompt_computed();
    next.prompt_len() > BLOCK_TOKENS && !next.scores_prompt() && running.iter().any(is_at_it)
}

/// Blocks that hold `num_tokens` tokens.
pub fn blocks_of(num_tokens: usize) -> usize {
    num_tokens.div_ceil(BLOCK_TOKENS)
}
