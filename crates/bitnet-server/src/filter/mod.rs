//! The content filter: literal and word rules over prompts and over streamed output, matched on normalised text.
//! Streamed text leaves only when no live partial match could still need it. Counting and logging are the caller's.
//!
//! text -> `normalise` (one character to none or more) -> `scanner` (automaton, spans in source characters) -> here:
//! what is sent, masked or stopped.

mod normalise;
mod scanner;

#[cfg(test)]
mod tests;

use std::{collections::VecDeque, sync::Arc};

use crate::config::{FilterAction, FilterRules, Severity};

use scanner::{Automata, Scanner, Span};

/// What a masked character becomes.
const MASK: char = '*';

/// The rules of one file, compiled. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ContentFilter {
    rules: Arc<[RuleHit]>,
    input: Option<Arc<Automata>>,
    output: Option<Arc<Automata>>,
}

/// Why rules could not be compiled.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FilterError {
    /// Nothing is left of a pattern once normalised: it held only accents or invisible characters.
    #[error("rule `{rule}`: nothing is left of the pattern {pattern:?} after normalisation")]
    EmptyPattern {
        /// The rule's id.
        rule: String,
        /// The pattern as written.
        pattern: String,
    },
    /// A kind of match that is not compiled; the rules file refuses it too.
    #[error("rule `{rule}`: match = \"regex\" is not supported by this version: use literal or word")]
    UnsupportedMatch {
        /// The rule's id.
        rule: String,
    },
    /// The automaton would be too large.
    #[error("the filter's patterns are too large together")]
    TooLarge,
}

/// A rule that matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleHit {
    /// The rule's id.
    pub rule_id: Arc<str>,
    /// The rule's category.
    pub category: Arc<str>,
    /// What the rule does.
    pub action: FilterAction,
    /// How grave the rule is.
    pub severity: Severity,
}

/// What becomes of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputVerdict {
    /// Nothing to change.
    Allow,
    /// Go on with this text instead.
    Mask(String),
    /// Refuse it.
    Block(RuleHit),
}

/// A verdict and the rules that matched, each once, in the file's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputReport {
    /// What becomes of the prompt.
    pub verdict: InputVerdict,
    /// Every rule that matched, for metrics and the log.
    pub matches: Vec<RuleHit>,
}

/// What may be sent now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filtered {
    /// Text that may be sent; masked where a rule says so.
    pub text: String,
    /// Bytes of the text pushed so far that are settled (sent as they were or masked): what comes with them, such as
    /// log-probabilities, may be sent too. Never falls.
    pub settled_bytes: usize,
    /// The rule that ended the text. Nothing may be sent after this.
    pub blocked: Option<RuleHit>,
    /// Rules that matched for the first time in this text.
    pub matches: Vec<RuleHit>,
}

/// One choice's output on its way out. Pushes after a block return nothing.
#[derive(Debug)]
pub struct OutputFilter {
    rules: Arc<[RuleHit]>,
    scanner: Scanner,
    /// Characters not yet sent; the first is number `num_released` of the text.
    held: VecDeque<HeldChar>,
    num_released: usize,
    settled_bytes: usize,
    /// By rule: whether it has matched.
    seen: Vec<bool>,
    ended: bool,
}

#[derive(Clone, Copy, Debug)]
struct HeldChar {
    char: char,
    masked: bool,
}

impl ContentFilter {
    /// Compiles rules.
    ///
    /// # Errors
    /// [`FilterError`], naming the rule.
    pub fn new(rules: &FilterRules) -> Result<Self, FilterError> {
        let hit = |rule: &crate::config::FilterRule| RuleHit {
            rule_id: rule.id.as_str().into(),
            category: rule.category.as_str().into(),
            action: rule.action,
            severity: rule.severity,
        };
        Ok(Self {
            rules: rules.rules.iter().map(hit).collect(),
            input: Automata::compile(rules, |direction| direction.reads_input())?.map(Arc::new),
            output: Automata::compile(rules, |direction| direction.reads_output())?.map(Arc::new),
        })
    }

    /// Checks a prompt's text.
    pub fn check_input(&self, text: &str) -> InputReport {
        let Some(automata) = &self.input else {
            return InputReport { verdict: InputVerdict::Allow, matches: Vec::new() };
        };
        let mut scanner = Scanner::new(Arc::clone(automata));
        let mut spans = Vec::new();
        text.chars().for_each(|char| scanner.push(char, &mut spans));
        scanner.finish(&mut spans);

        let mut matched: Vec<usize> = spans.iter().map(|span| span.rule).collect();
        matched.sort_unstable();
        matched.dedup();
        let matches: Vec<RuleHit> = matched.iter().map(|rule| self.rules[*rule].clone()).collect();
        let block = matches.iter().find(|hit| hit.action == FilterAction::Block);
        let masks: Vec<&Span> =
            spans.iter().filter(|span| self.rules[span.rule].action == FilterAction::Mask).collect();
        let verdict = match block {
            Some(hit) => InputVerdict::Block(hit.clone()),
            None if masks.is_empty() => InputVerdict::Allow,
            None => InputVerdict::Mask(masked_text(text, &masks)),
        };
        InputReport { verdict, matches }
    }

    /// A filter for one choice's output; `None` when no rule reads output.
    pub fn output_filter(&self) -> Option<OutputFilter> {
        let automata = Arc::clone(self.output.as_ref()?);
        Some(OutputFilter {
            rules: Arc::clone(&self.rules),
            scanner: Scanner::new(automata),
            held: VecDeque::new(),
            num_released: 0,
            settled_bytes: 0,
            seen: vec![false; self.rules.len()],
            ended: false,
        })
    }
}

impl OutputFilter {
    /// Takes the next piece of text; returns what may be sent. How the text is cut into pieces changes nothing of the
    /// whole.
    pub fn push(&mut self, text: &str) -> Filtered {
        let mut filtered = Filtered::default();
        let mut spans = Vec::new();
        for char in text.chars() {
            if self.ended {
                break;
            }
            self.held.push_back(HeldChar { char, masked: false });
            self.scanner.push(char, &mut spans);
            self.apply(&mut spans, &mut filtered);
        }
        if !self.ended {
            self.release_until(self.first_live(), &mut filtered);
        }
        filtered.settled_bytes = self.settled_bytes;
        filtered
    }

    /// The text has ended: returns the rest.
    pub fn finish(&mut self) -> Filtered {
        let mut filtered = Filtered::default();
        if !self.ended {
            let mut spans = Vec::new();
            self.scanner.finish(&mut spans);
            self.apply(&mut spans, &mut filtered);
        }
        if !self.ended {
            self.release_until(self.scanner.num_chars(), &mut filtered);
            self.ended = true;
        }
        filtered.settled_bytes = self.settled_bytes;
        filtered
    }

    /// Does what the rules of `spans` say. After a block the text ends where the match begins, or before, where another
    /// match might have begun: the text that would have told is not generated any more.
    fn apply(&mut self, spans: &mut Vec<Span>, filtered: &mut Filtered) {
        let mut block: Option<usize> = None;
        let mut cut = self.first_live();
        for span in spans.drain(..) {
            let hit = &self.rules[span.rule];
            if !std::mem::replace(&mut self.seen[span.rule], true) {
                filtered.matches.push(hit.clone());
            }
            match hit.action {
                FilterAction::Flag => {}
                FilterAction::Mask => {
                    let range = span.first - self.num_released..span.end - self.num_released;
                    self.held.range_mut(range).for_each(|held| held.masked = true);
                }
                FilterAction::Block => {
                    block = Some(block.map_or(span.rule, |rule| rule.min(span.rule)));
                    cut = cut.min(span.first);
                }
            }
        }
        if let Some(rule) = block {
            self.release_until(cut, filtered);
            self.held.clear();
            self.ended = true;
            filtered.blocked = Some(self.rules[rule].clone());
        }
    }

    /// The first character that a match which has begun may still need; all before it are settled.
    fn first_live(&self) -> usize {
        self.scanner.first_live().unwrap_or(self.scanner.num_chars())
    }

    fn release_until(&mut self, end: usize, filtered: &mut Filtered) {
        let count = end.saturating_sub(self.num_released);
        for held in self.held.drain(..count.min(self.held.len())) {
            filtered.text.push(if held.masked { MASK } else { held.char });
            self.num_released += 1;
            self.settled_bytes += held.char.len_utf8();
        }
    }
}

/// `text` with every character of `masks` replaced.
fn masked_text(text: &str, masks: &[&Span]) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    for span in masks {
        chars[span.first..span.end].fill(MASK);
    }
    chars.into_iter().collect()
}
