//! When guessing pays: what a row more costs a step, as measured, and how far the guesses for a sequence can be trusted. The
//! answers never depend on it. Pure: what was measured comes as an argument.
//!
//! All amounts are in plain steps of the batch at hand, in which each sequence gets one token. Every sequence has an account:
//! what accepted guesses save goes in, what rows for guesses cost goes out, and guessing stops while the account cannot pay.
//! An account starts with a third of a step and gets 1.5 % of one for each token, to try again; so speculation never makes an
//! answer slower by more than that. A token that a rule forces is no guess: its row is computed in any case, so it is computed
//! now, beside prompts too, and no account knows of it.

use std::time::{Duration, Instant};

use bitnet_core::TokenId;

use super::{
    lookup::{Draft, MAX_GUESSES, Prediction, look_up},
    sequence::Sequence,
};
use crate::config::Speculation;

/// How long steps take that only generate, by their rows.
#[derive(Clone, Debug, Default)]
pub struct StepCosts {
    /// Index is the number of rows.
    measured: Vec<Option<Measured>>,
    num_steps: u64,
    /// Whether they do not matter.
    ignored: bool,
}

#[derive(Clone, Copy, Debug)]
struct Measured {
    seconds: f64,
    at_step: u64,
}

/// What a guess for one sequence may become in the step being planned.
#[derive(Debug)]
pub struct StepPlan<'a> {
    costs: &'a StepCosts,
    /// Seconds without guesses, where they are known and still right.
    plain: Option<f64>,
    /// Whether the step computes prompts too: every row has its price then, so nothing is guessed.
    beside_prompts: bool,
    num_sequences: usize,
    num_rows: usize,
}

/// What the guesses for one sequence have come to.
#[derive(Clone, Debug)]
pub struct Guesses {
    prediction: Prediction,
    /// Saved less spent.
    account: f64,
    /// Share of guesses that come true, the latest weighing most.
    acceptance: f64,
}

impl StepCosts {
    /// Nothing measured yet; `None` when nothing is ever guessed.
    pub fn new(speculation: Speculation) -> Option<Self> {
        let ignored = speculation == Speculation::Always;
        (speculation != Speculation::Off).then(|| Self { ignored, ..Self::default() })
    }

    /// A step of `num_rows`, all of them generating or guessed, took `seconds`.
    pub fn record(&mut self, num_rows: usize, seconds: f64) {
        self.num_steps += 1;
        if num_rows >= self.measured.len() {
            self.measured.resize(num_rows + 1, None);
        }
        let at_step = self.num_steps;
        let seconds = match self.measured[num_rows] {
            None => seconds,
            Some(old) => {
                // The longer ago, the less it says. One step that was held up must not count for many.
                let weight = ((at_step - old.at_step) as f64 / STEPS_TO_FORGET).clamp(LEAST_WEIGHT, 1.0);
                old.seconds + weight * (seconds.min(2.0 * old.seconds) - old.seconds)
            }
        };
        self.measured[num_rows] = Some(Measured { seconds, at_step });
    }

    /// A step in which `num_sequences` generate, and nothing else happens unless it is `beside_prompts`. Without a fresh
    /// measurement of it as it is, there is nothing to compare with, so nothing is guessed and it is measured. Nothing is
    /// guessed beside a step that hardly takes longer than looking for guesses.
    pub fn plan(&self, num_sequences: usize, beside_prompts: bool) -> StepPlan<'_> {
        let plain = self.measured.get(num_sequences).copied().flatten();
        let is_fresh = |plain: &Measured| self.num_steps - plain.at_step < STEPS_UNTIL_STALE;
        let plain = plain.filter(|plain| is_fresh(plain) && plain.seconds >= SHORTEST_STEP);
        let plain = plain.map(|plain| plain.seconds);
        StepPlan { costs: self, plain, beside_prompts, num_sequences, num_rows: num_sequences }
    }

    /// How long a step in which `num_sequences` generate may be held up to learn what their rules foresee: what a token gets
    /// for nothing.
    pub fn patience(&self, num_sequences: usize) -> Duration {
        if self.ignored {
            return ALL_PATIENCE;
        }
        let plain = self.measured.get(num_sequences).copied().flatten().map_or(0.0, |plain| plain.seconds);
        Duration::from_secs_f64(FREE_SHARE * plain)
    }

    /// Steps' worth, over all of `num_sequences`, by which `num_rows` cost more than one row for each of them. Rows cost
    /// something, and never more than the first ones.
    fn surcharge(&self, num_sequences: usize, num_rows: usize, plain: f64) -> f64 {
        let more = (num_rows - num_sequences) as f64;
        let measured = self.measured.get(num_rows).copied().flatten().map(|measured| measured.seconds);
        let measured = measured.map(|seconds| num_sequences as f64 * (seconds / plain - 1.0));
        measured.unwrap_or(more * SURCHARGE_UNMEASURED).clamp(more * LEAST_SURCHARGE, more)
    }

    /// What each of the guesses of a step cost, in which `num_sequences` got `num_rows`.
    pub fn price(&self, num_sequences: usize, num_rows: usize) -> f64 {
        let plain = self.measured.get(num_sequences).copied().flatten();
        match plain {
            Some(plain) if num_rows > num_sequences => {
                self.surcharge(num_sequences, num_rows, plain.seconds) / (num_rows - num_sequences) as f64
            }
            _ => SURCHARGE_UNMEASURED,
        }
    }
}

impl StepPlan<'_> {
    /// Whether nothing is verified for a sequence with these `guesses`, whatever they are.
    fn is_over(&self, guesses: &Guesses) -> bool {
        self.beside_prompts || !self.costs.ignored && (self.plain.is_none() || guesses.account <= 0.0)
    }

    /// Rows of tokens that are sure to come.
    fn force(&mut self, num_tokens: usize) {
        self.num_rows += num_tokens;
    }

    /// How many of at most `most` guesses to verify for a sequence; they are part of the plan then.
    pub fn take(&mut self, guesses: &Guesses, most: usize) -> usize {
        if self.costs.ignored {
            return most;
        }
        let Some(plain) = self.plain else { return 0 };
        let cost = |more: usize| self.costs.surcharge(self.num_sequences, self.num_rows + more, plain);
        let before = if self.num_rows == self.num_sequences { 0.0 } else { cost(0) };
        let (mut best, mut most_saved) = (0, f64::NEG_INFINITY);
        let (mut expected, mut all_accepted) = (0.0, 1.0);
        for count in 1..=most {
            all_accepted *= guesses.acceptance;
            expected += all_accepted;
            let price = (cost(count) - before).max(0.0);
            if price <= guesses.account && expected - price > most_saved {
                (best, most_saved) = (count, expected - price);
            }
        }
        // What seems not to pay is tried once in a while: with what the account gets for nothing.
        if most_saved <= 0.0 && guesses.account < FREE_LIMIT {
            return 0;
        }
        self.num_rows += best;
        best
    }
}

impl Guesses {
    /// For a sequence whose output `prediction` foresees.
    pub fn new(prediction: Prediction) -> Self {
        Self { prediction, account: FIRST_ACCOUNT, acceptance: FIRST_ACCEPTANCE }
    }

    /// What `sequence` may say next, as far as its rule says by `until` or it is worth verifying, may still be said, and is one
    /// of `vocab_size` ids.
    pub fn propose(
        &self,
        sequence: &Sequence,
        plan: &mut StepPlan<'_>,
        until: Instant,
        max_model_len: usize,
        vocab_size: usize,
    ) -> Draft {
        let generated = sequence.generated().len();
        let tokens_left = sequence.request.max_tokens.saturating_sub(generated);
        let room = max_model_len.saturating_sub(sequence.tokens.len()).min(tokens_left);
        // The last token that may be said follows from the one before it: there is nothing to verify after it.
        let room = room.saturating_sub(1);
        // Guessing begins where the next row is a generated token's: the end of a prompt is computed with its chunk.
        if generated == 0 || room == 0 {
            return Draft::default();
        }
        let mut constraint = sequence.constraint.as_ref().map(|constraint| constraint.borrow_mut());
        let foreseen = constraint.as_mut().and_then(|constraint| constraint.upcoming(until));
        let Draft { mut tokens, num_forced } = foreseen.cloned().unwrap_or_default();
        let num_forced = num_forced.min(room);
        plan.force(num_forced);
        if plan.is_over(self) {
            tokens.truncate(num_forced);
            return Draft { tokens, num_forced };
        }
        if tokens.is_empty() {
            tokens = self.prediction.next().iter().take(MAX_GUESSES).copied().collect();
        }
        if tokens.is_empty() {
            tokens = look_up(&sequence.tokens);
        }
        let known = tokens.iter().take_while(|token| token.index() < vocab_size).count();
        let num_guessed = plan.take(self, room.min(known).saturating_sub(num_forced));
        tokens.truncate(num_forced + num_guessed);
        Draft { tokens, num_forced }
    }

    /// `said` was generated by a step that verified `num_drafted` guesses at `price` each, after `num_forced` tokens.
    pub fn settle(&mut self, said: &[TokenId], num_forced: usize, num_drafted: usize, price: f64) {
        said.iter().for_each(|token| self.prediction.follow(*token));
        if self.account < FREE_LIMIT {
            self.account = (self.account + FREE_SHARE * said.len() as f64).min(FREE_LIMIT);
        }
        if num_drafted > 0 {
            let num_accepted = said.len().saturating_sub(1 + num_forced);
            self.account = (self.account + num_accepted as f64 - price * num_drafted as f64).min(MOST_SAVED);
            for _ in 0..num_accepted {
                self.acceptance += ACCEPTANCE_WEIGHT * (1.0 - self.acceptance);
            }
            if num_accepted < num_drafted {
                self.acceptance -= ACCEPTANCE_WEIGHT * self.acceptance;
            }
        }
    }
}

/// What an account starts with.
const FIRST_ACCOUNT: f64 = 0.35;
/// What an account gets for nothing, for each token: the most that speculation can cost in the long run.
const FREE_SHARE: f64 = 0.015;
/// Up to here.
const FREE_LIMIT: f64 = 1.0;
/// Longer than any rule takes.
const ALL_PATIENCE: Duration = Duration::from_secs(5);
/// What was saved before may be lost again, but not more of it than this.
const MOST_SAVED: f64 = 3.0;
/// Before anything was tried: above a half, so that the first guess is of three tokens.
const FIRST_ACCEPTANCE: f64 = 0.7;
const ACCEPTANCE_WEIGHT: f64 = 0.2;
/// A row more before it was measured: so little that it is tried, so much that it is one row at first.
const SURCHARGE_UNMEASURED: f64 = 0.3;
const LEAST_SURCHARGE: f64 = 0.02;
/// A plain step is measured anew after so many others: the context grows, the machine gets other work.
const STEPS_UNTIL_STALE: u64 = 64;
/// Seconds. To look for guesses takes some microseconds.
const SHORTEST_STEP: f64 = 0.0001;
const STEPS_TO_FORGET: f64 = 256.0;
const LEAST_WEIGHT: f64 = 0.1;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{
        super::{sequence::SequenceId, testing::request},
        *,
    };

    /// A machine on which a step of `num_rows` takes `seconds(num_rows)`, and a text of which each guess comes true by
    /// `comes_true`: (speed with guesses relative to without, guesses verified). All steps were measured before.
    fn speed(
        num_sequences: usize,
        num_tokens: usize,
        seconds: impl Fn(usize) -> f64,
        mut comes_true: impl FnMut(usize) -> bool,
    ) -> (f64, usize) {
        let mut costs = StepCosts::default();
        (num_sequences..=num_sequences * (1 + MAX_GUESSES)).rev().for_each(|rows| costs.record(rows, seconds(rows)));
        let mut all = vec![Guesses::new(Prediction::default()); num_sequences];
        let (mut said, mut spent, mut drafted) = (0, 0.0, 0);
        while said < num_tokens * num_sequences {
            let mut plan = costs.plan(num_sequences, false);
            let taken: Vec<_> = all.iter().map(|guesses| plan.take(guesses, MAX_GUESSES)).collect();
            let num_rows = num_sequences + taken.iter().sum::<usize>();
            costs.record(num_rows, seconds(num_rows));
            spent += seconds(num_rows);
            let price = costs.price(num_sequences, num_rows);
            for (guesses, count) in all.iter_mut().zip(taken) {
                let right = (0..count).take_while(|at| comes_true(said + at)).count();
                guesses.settle(&vec![TokenId(0); 1 + right], 0, count, price);
                said += 1 + right;
                drafted += count;
            }
        }
        let plain = said as f64 / num_sequences as f64 * seconds(num_sequences);
        (plain / spent, drafted)
    }

    /// Memory-bound: rows are cheap.
    fn cheap_rows(num_rows: usize) -> f64 {
        0.017 + 0.001 * num_rows as f64
    }

    /// Compute-bound: each row costs the same.
    fn dear_rows(num_rows: usize) -> f64 {
        0.004 * num_rows as f64
    }

    #[test]
    fn copies_come_fast_and_nothing_comes_slower() {
        let (copied, _) = speed(1, 200, cheap_rows, |_| true);
        assert!(copied > 3.0, "{copied}");
        for num_sequences in [1, 2, 4, 8, 16, 32] {
            for num_tokens in [16, 64, 1000] {
                for seconds in [cheap_rows, dear_rows] {
                    let least = 1.0 - FREE_SHARE - 1.1 * FIRST_ACCOUNT / num_tokens as f64;
                    let (wrong, _) = speed(num_sequences, num_tokens, seconds, |_| false);
                    assert!(wrong > least, "{wrong} with {num_sequences} x {num_tokens}");
                    let (copied, _) = speed(num_sequences, num_tokens, seconds, |_| true);
                    assert!(copied > least, "{copied} with {num_sequences} x {num_tokens}");
                }
            }
        }
        for num_sequences in [1, 2, 4] {
            let (mixed, _) = speed(num_sequences, 1000, cheap_rows, |at| at % 100 > 50);
            assert!(mixed > 1.0, "{mixed} with {num_sequences}");
        }
    }

    #[test]
    fn what_does_not_pay_is_tried_rarely() {
        let mut true_or_not = [true, false].into_iter().cycle();
        let (_, drafted) = speed(16, 1000, dear_rows, |_| true_or_not.next() == Some(true));
        assert!(drafted < 16 * 1000 / 10, "{drafted} guesses verified");
        let (_, drafted) = speed(1, 1000, cheap_rows, |_| false);
        assert!(drafted < 1000 / 5, "{drafted} guesses verified");
    }

    #[test]
    fn one_step_that_was_held_up_does_not_end_guessing() {
        let mut steps = 0;
        let held_up = std::cell::Cell::new(0);
        let seconds = |num_rows: usize| {
            held_up.set(held_up.get() + 1);
            // Both callers of one step see the same.
            if held_up.get() / 2 == 6 { 1.0 } else { cheap_rows(num_rows) }
        };
        let (copied, _) = speed(1, 2000, seconds, |_| {
            steps += 1;
            true
        });
        assert!(copied > 2.0, "{copied}");
    }

    #[test]
    fn nothing_is_guessed_that_may_not_be_said() {
        let mut costs = StepCosts::default();
        [4, 3, 2, 1].into_iter().for_each(|num_rows| costs.record(num_rows, 0.02));
        let propose = |max_tokens: usize, said: usize, max_model_len: usize, vocab_size: usize| {
            let mut sequence = Sequence::new(SequenceId(0), Arc::new(request(&[1, 2, 3, 1, 2], max_tokens)), 0);
            sequence.tokens.extend([3, 1, 2].iter().take(said).copied().map(TokenId));
            let guesses = Guesses::new(Prediction::default());
            let mut plan = costs.plan(1, false);
            guesses.propose(&sequence, &mut plan, Instant::now(), max_model_len, vocab_size).tokens
        };
        assert_eq!(propose(9, 0, 64, 64), [], "the prompt's last row is not a guess's");
        assert_eq!(propose(9, 1, 64, 64), [1, 2, 3].map(TokenId));
        assert_eq!(propose(4, 2, 64, 64), [2].map(TokenId), "of two tokens left one can be verified");
        assert_eq!(propose(4, 3, 64, 64), []);
        assert_eq!(propose(9, 1, 8, 64), [1].map(TokenId), "the context ends");
        assert_eq!(propose(9, 1, 64, 2), [1].map(TokenId), "not an id");
        let mut short = StepCosts::default();
        [4, 3, 2, 1].into_iter().for_each(|num_rows| short.record(num_rows, 0.00005));
        assert!(short.plan(1, false).is_over(&Guesses::new(Prediction::default())), "there is nothing to gain");
        let unmeasured = StepCosts::default();
        assert_eq!(
            unmeasured.plan(1, false).take(&Guesses::new(Prediction::default()), 3),
            0,
            "first measure, then guess"
        );
    }
}
