//! Guesses of what a text says next, without a model: what followed the same words before, and the `prediction` that came
//! with a request. A guess is never trusted, so a bad one costs time and nothing else. Pure.

use std::sync::Arc;

use bitnet_core::{TokenId, kv_cache::BLOCK_TOKENS};

/// The most tokens guessed at once from a text. One more row costs a step little, because the weights are read anyway; past a
/// few, rows cost what they save.
pub const MAX_GUESSES: usize = 3;

/// The most tokens of a [`Draft`], where a rule foresees them. A row for a token that is sure to come costs what a row of a
/// prompt costs, so that a run of a block's length holds a step up no more than a short prompt does, and it takes at most one
/// more block of the cache.
pub const MAX_DRAFT: usize = BLOCK_TOKENS;

/// What may come next in one choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    /// One after the other.
    pub tokens: Vec<TokenId>,
    /// The first so many come whatever the model says; the others are guesses.
    pub num_forced: usize,
}

/// Fewer equal tokens in a row say nothing about the next one.
const SHORTEST_MATCH: usize = 2;
/// More equal tokens in a row say no more.
const LONGEST_MATCH: usize = 8;

/// What followed the longest earlier occurrence of the end of `tokens`, the latest among equals; a text that repeats itself
/// goes on doing so. At most [`MAX_GUESSES`], none when the end never occurred before.
pub fn look_up(tokens: &[TokenId]) -> Vec<TokenId> {
    let Some((last, before)) = tokens.split_last() else { return Vec::new() };
    let mut best = None;
    let mut longest = SHORTEST_MATCH - 1;
    for (at, _) in before.iter().enumerate().rev().filter(|(_, token)| *token == last) {
        let same = before[..at].iter().rev().zip(before.iter().rev()).take(LONGEST_MATCH - 1);
        let length = 1 + same.take_while(|(earlier, token)| earlier == token).count();
        if length > longest {
            (best, longest) = (Some(at), length);
        }
        if longest == LONGEST_MATCH {
            break;
        }
    }
    let Some(at) = best else { return Vec::new() };
    // What followed reaches the end itself after one round of the repetition.
    let round = &tokens[at + 1..];
    round.iter().cycle().take(MAX_GUESSES).copied().collect()
}

/// A text that the output is expected to follow, and how far it has. The output may leave it and come back: two tokens in a
/// row that stand in the text find the place again, the next one after the last place first.
#[derive(Clone, Debug, Default)]
pub struct Prediction {
    text: Arc<[TokenId]>,
    /// Where the output stands in the text: the token expected next. Kept as the last known place while it is lost.
    at: usize,
    lost: bool,
    previous: Option<TokenId>,
    num_accepted: usize,
}

impl Prediction {
    /// An output that has not begun.
    pub fn new(text: Arc<[TokenId]>) -> Self {
        Self { text, ..Self::default() }
    }

    /// What comes next if the output follows the text; empty when it has left it.
    pub fn next(&self) -> &[TokenId] {
        if self.lost { &[] } else { &self.text[self.at..] }
    }

    /// Takes note of the next token of the output.
    pub fn follow(&mut self, token: TokenId) {
        if self.next().first() == Some(&token) {
            self.at += 1;
            self.num_accepted += 1;
        } else {
            self.find(token);
        }
        self.previous = Some(token);
    }

    /// How many tokens of the output the text foresaw.
    pub fn num_accepted(&self) -> usize {
        self.num_accepted
    }

    /// How many tokens of the text the output did not take.
    pub fn num_rejected(&self) -> usize {
        self.text.len().saturating_sub(self.num_accepted)
    }

    fn find(&mut self, token: TokenId) {
        self.lost = true;
        let Some(previous) = self.previous else { return };
        let here = |at: &usize| self.text[at - 2..*at] == [previous, token];
        let from = (self.at + 1).max(2);
        let found = (from..=self.text.len()).find(here).or_else(|| (2..from.min(self.text.len() + 1)).find(here));
        if let Some(at) = found {
            (self.at, self.lost) = (at, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn the_longest_earlier_occurrence_says_what_comes_next() {
        let guesses = |tokens: &[u32]| look_up(&ids(tokens)).iter().map(|id| id.0).collect::<Vec<_>>();
        let none: [u32; 0] = [];
        assert_eq!(guesses(&[]), none);
        assert_eq!(guesses(&[1, 2, 3, 4]), none);
        assert_eq!(guesses(&[1, 9, 2, 9]), none, "one token says nothing");
        assert_eq!(guesses(&[1, 2, 3, 4, 5, 6, 1, 2]), [3, 4, 5]);
        assert_eq!(guesses(&[7, 1, 2, 30, 8, 1, 2, 40, 7, 1, 2]), [30, 8, 1], "longer beats later");
        assert_eq!(guesses(&[1, 2, 30, 8, 1, 2, 40, 9, 1, 2]), [40, 9, 1], "later beats earlier");
        assert_eq!(guesses(&[5, 5, 5]), [5, 5, 5], "a loop goes on");
        assert_eq!(guesses(&[1, 2, 1, 2, 1]), [2, 1, 2]);
        assert_eq!(guesses(&[4; 1000]), [4, 4, 4]);
    }

    #[test]
    fn an_output_may_leave_the_prediction_and_come_back() {
        let mut prediction = Prediction::new(ids(&[1, 2, 3, 4, 5, 6, 7]).into());
        let mut foreseen = Vec::new();
        for token in ids(&[1, 2, 90, 91, 4, 5, 6, 7, 8]) {
            foreseen.push(prediction.next().first() == Some(&token));
            prediction.follow(token);
        }
        assert_eq!(foreseen, [true, true, false, false, false, false, true, true, false]);
        assert_eq!((prediction.num_accepted(), prediction.num_rejected()), (4, 3));
        assert!(prediction.next().is_empty());
        let mut repeated = Prediction::new(ids(&[1, 2, 3, 1, 2, 4]).into());
        ids(&[1, 2, 9, 1, 2]).into_iter().for_each(|token| repeated.follow(token));
        assert_eq!(repeated.next(), ids(&[4]), "the next occurrence, not the first");
        ids(&[4, 1, 2]).into_iter().for_each(|token| repeated.follow(token));
        assert_eq!(repeated.next(), ids(&[3, 1, 2, 4]), "or an earlier one when there is no other");
        assert!(Prediction::default().next().is_empty());
    }

    #[test]
    fn no_output_confuses_the_place() {
        // Every text of three tokens over two ids, against every output of four.
        for text in 0..8_u32 {
            for output in 0..16_u32 {
                let bits = |value: u32, count: u32| (0..count).map(|bit| TokenId(value >> bit & 1)).collect::<Vec<_>>();
                let mut prediction = Prediction::new(bits(text, 3).into());
                bits(output, 4).into_iter().for_each(|token| prediction.follow(token));
                assert!(prediction.next().len() <= 3);
            }
        }
    }
}
