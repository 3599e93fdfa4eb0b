//! How the rows of one step are shared out between the running sequences. Pure.
//!
//! Those that need one token come first, then prompts, the least served client's first and no more of them than keeps the step
//! short. A prompt is waited for as a whole, so it gains nothing from sharing its steps: when its client is so far behind all
//! others that this part of it leaves it the least served, it goes alone, and those that generate wait for one step, never for
//! two in a row.

use super::{fairness::ServiceCounters, sequence::Sequence};

/// Most rows of a step with prompts, so that it stays short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepRows {
    /// In all, beside sequences that generate.
    pub beside_others: usize,
    /// When there are none. A prompt is cut into parts of this size or larger, none of twice as much.
    pub alone: usize,
}

/// The budget of the steps, and what it remembers of the last one.
#[derive(Debug)]
pub struct StepBudget {
    max_num_batched_tokens: usize,
    /// Whether others waited in the last step for a prompt that went alone.
    others_waited: bool,
}

impl StepBudget {
    /// Before the first step.
    pub fn new(max_num_batched_tokens: usize) -> Self {
        Self { max_num_batched_tokens, others_waited: false }
    }

    /// What each of the `running` sequences computes in the next step, and the rows left for guesses.
    pub fn share(
        &mut self,
        running: &[Sequence],
        counters: &ServiceCounters,
        step_rows: StepRows,
    ) -> (Vec<usize>, usize) {
        let mut num_tokens = vec![0; running.len()];
        let lone = if self.others_waited { None } else { lone_prompt(running, counters, step_rows) };
        self.others_waited = lone.is_some();
        if let Some(index) = lone {
            num_tokens[index] = step_rows.part(running[index].num_tokens_to_compute()).min(self.max_num_batched_tokens);
            return (num_tokens, 0);
        }
        let mut order: Vec<usize> = (0..running.len()).collect();
        order.sort_by_key(|&index| {
            let sequence = &running[index];
            (!sequence.is_probe, is_prompt(sequence), counters.served(sequence.request.client))
        });
        let mut budget = self.max_num_batched_tokens;
        let most_of_prompts = step_rows.most_of_prompts(running);
        for index in order {
            let sequence = &running[index];
            if is_prompt(sequence) {
                budget = budget.min(most_of_prompts);
            }
            num_tokens[index] = sequence.num_tokens_to_compute().min(budget);
            budget -= num_tokens[index];
        }
        (num_tokens, budget)
    }
}

impl StepRows {
    /// Most tokens of the prompts among `running` in one step.
    fn most_of_prompts(self, running: &[Sequence]) -> usize {
        let num_generating = running.iter().filter(|sequence| !is_prompt(sequence)).count();
        if num_generating > 0 {
            return self.beside_others.saturating_sub(num_generating).max(LEAST_PROMPT_TOKENS);
        }
        self.part(running.iter().map(Sequence::num_tokens_to_compute).sum())
    }

    /// What a step of prompts alone takes of `num_tokens`: one of equal parts, so that none is too small to be worth a step.
    fn part(self, num_tokens: usize) -> usize {
        let num_parts = (num_tokens / self.alone).max(1);
        num_tokens.div_ceil(num_parts)
    }
}

/// The prompt for which all others wait, if there is one. Nobody is waited for while a health probe runs.
fn lone_prompt(running: &[Sequence], counters: &ServiceCounters, step_rows: StepRows) -> Option<usize> {
    if running.iter().any(|sequence| sequence.is_probe) {
        return None;
    }
    let client = |sequence: &Sequence| sequence.request.client;
    let served = |sequence: &Sequence| counters.served(client(sequence));
    let prompts = running.iter().enumerate().filter(|(_, sequence)| is_prompt(sequence));
    let (index, prompt) = prompts.min_by_key(|(_, sequence)| served(sequence))?;
    let after = served(prompt) + step_rows.part(prompt.num_tokens_to_compute()) as u64;
    let least_of_others = running.iter().filter(|other| client(other) != client(prompt)).map(served).min()?;
    (after <= least_of_others).then_some(index)
}

fn is_prompt(sequence: &Sequence) -> bool {
    sequence.num_tokens_to_compute() > 1
}

/// Tokens of prompts beside sequences that generate, however slow these are: prompts must come to an end.
pub const LEAST_PROMPT_TOKENS: usize = 16;
