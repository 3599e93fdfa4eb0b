//! The content filter: literal and word rules over prompts and over streamed output, matched on normalised text.
//! Streamed text leaves only when no live partial match could still need it. Counting and logging are the caller's.

use std::sync::Arc;

use crate::config::{FilterAction, FilterRules, Severity};

/// The rules of one file, compiled. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ContentFilter {}

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
    /// Bytes of the text pushed so far that are settled (sent, masked): what comes with them, such as
    /// log-probabilities, may be sent too. Monotonic.
    pub settled_bytes: usize,
    /// The rule that ended the text. Nothing may be sent after this.
    pub blocked: Option<RuleHit>,
    /// Rules that matched for the first time in this text.
    pub matches: Vec<RuleHit>,
}

/// One choice's output on its way out. Pushes after a block return nothing.
#[derive(Debug)]
pub struct OutputFilter {}

impl ContentFilter {
    /// Compiles rules.
    ///
    /// # Errors
    /// [`FilterError`], naming the rule.
    pub fn new(rules: &FilterRules) -> Result<Self, FilterError> {
        let _ = rules;
        unimplemented!()
    }

    /// Checks a prompt's text.
    pub fn check_input(&self, text: &str) -> InputReport {
        let _ = text;
        unimplemented!()
    }

    /// A filter for one choice's output; `None` when no rule reads output.
    pub fn output_filter(&self) -> Option<OutputFilter> {
        unimplemented!()
    }
}

impl OutputFilter {
    /// Takes the next piece of text; returns what may be sent.
    pub fn push(&mut self, text: &str) -> Filtered {
        let _ = text;
        unimplemented!()
    }

    /// The text has ended: returns the rest.
    pub fn finish(&mut self) -> Filtered {
        unimplemented!()
    }
}
