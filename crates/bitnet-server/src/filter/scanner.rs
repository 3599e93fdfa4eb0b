//! The automaton and one pass over a text: characters in, spans of matches out, and at any time the first character
//! that a match which has begun may still need. Aho-Corasick over the UTF-8 of normalised text: the depth of its state is
//! the length of the longest suffix that begins some pattern, which is exactly what must be held back.

use std::{collections::VecDeque, sync::Arc};

use aho_corasick::{
    Anchored, MatchKind as Semantics,
    automaton::{Automaton, StateID},
    nfa::contiguous::NFA,
};

use crate::config::{Direction, FilterRules, MatchKind};

use super::{FilterError, normalise::fold};

/// The patterns of one direction.
#[derive(Debug)]
pub(super) struct Automata {
    nfa: NFA,
    start: StateID,
    /// By state: bytes of the longest suffix of the text that begins a pattern.
    depths: Vec<u32>,
    /// By pattern of `nfa`.
    patterns: Vec<Pattern>,
}

#[derive(Clone, Copy, Debug)]
struct Pattern {
    /// Index in the rules file.
    rule: usize,
    num_bytes: usize,
    whole_word: bool,
}

/// A match, in characters of the source text: `first..end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) rule: usize,
    pub(super) first: usize,
    pub(super) end: usize,
}

/// One pass over one text.
#[derive(Debug)]
pub(super) struct Scanner {
    automata: Arc<Automata>,
    state: StateID,
    num_chars: usize,
    /// The normalised bytes that begin a pattern, as many as the state is deep.
    live: VecDeque<LiveByte>,
    /// Whole-word matches that still need to see what follows.
    pending: Vec<Span>,
    previous: Option<char>,
    folded: Vec<char>,
}

#[derive(Clone, Copy, Debug)]
struct LiveByte {
    /// The source character it comes from.
    source: usize,
    /// Whether a letter or digit stands before the character.
    after_word_char: bool,
}

impl Automata {
    /// Compiles the rules whose direction is wanted; `None` when there is none.
    pub(super) fn compile(
        rules: &FilterRules,
        wanted: impl Fn(Direction) -> bool,
    ) -> Result<Option<Self>, FilterError> {
        let mut texts = Vec::new();
        let mut patterns = Vec::new();
        for (index, rule) in rules.rules.iter().enumerate().filter(|(_, rule)| wanted(rule.direction)) {
            if rule.kind == MatchKind::Regex {
                return Err(FilterError::UnsupportedMatch { rule: rule.id.clone() });
            }
            for pattern in &rule.patterns {
                let text = normalised(pattern);
                if text.is_empty() {
                    return Err(FilterError::EmptyPattern { rule: rule.id.clone(), pattern: pattern.clone() });
                }
                let whole_word = rule.kind == MatchKind::Word;
                patterns.push(Pattern { rule: index, num_bytes: text.len(), whole_word });
                texts.push(text);
            }
        }
        if texts.is_empty() {
            return Ok(None);
        }
        let too_large = |_| FilterError::TooLarge;
        let nfa = NFA::builder().match_kind(Semantics::Standard).build(&texts).map_err(too_large)?;
        let start = nfa.start_state(Anchored::No).map_err(|_| FilterError::TooLarge)?;
        let depths = depths(&nfa, start, &texts);
        Ok(Some(Self { nfa, start, depths, patterns }))
    }

    fn depth(&self, state: StateID) -> usize {
        self.depths.get(state.as_usize()).map_or(0, |depth| *depth as usize)
    }
}

impl Scanner {
    pub(super) fn new(automata: Arc<Automata>) -> Self {
        Self {
            state: automata.start,
            automata,
            num_chars: 0,
            live: VecDeque::new(),
            pending: Vec::new(),
            previous: None,
            folded: Vec::new(),
        }
    }

    /// Takes the next character; appends the matches that are certain now.
    pub(super) fn push(&mut self, c: char, spans: &mut Vec<Span>) {
        let mut folded = std::mem::take(&mut self.folded);
        folded.clear();
        fold(c, &mut folded);
        for normal in &folded {
            if !repeats_space(self.previous, *normal) {
                self.step(*normal, spans);
            }
        }
        self.folded = folded;
        self.num_chars += 1;
    }

    /// The text has ended: what waited to see a word's end has seen it.
    pub(super) fn finish(&mut self, spans: &mut Vec<Span>) {
        spans.append(&mut self.pending);
        self.live.clear();
    }

    /// The first character that a match which has begun may still need. A pending one is a whole pattern, so the state
    /// is at least as deep.
    pub(super) fn first_live(&self) -> Option<usize> {
        self.live.front().map(|byte| byte.source)
    }

    /// Characters taken.
    pub(super) fn num_chars(&self) -> usize {
        self.num_chars
    }

    fn step(&mut self, normal: char, spans: &mut Vec<Span>) {
        if normal.is_alphanumeric() {
            self.pending.clear();
        } else {
            spans.append(&mut self.pending);
        }
        let after_word_char = self.previous.is_some_and(char::is_alphanumeric);
        for byte in normal.encode_utf8(&mut [0; 4]).bytes() {
            self.state = self.automata.nfa.next_state(Anchored::No, self.state, byte);
            self.live.push_back(LiveByte { source: self.num_chars, after_word_char });
        }
        self.previous = Some(normal);
        self.collect_matches(spans);
        let dead = self.live.len().saturating_sub(self.automata.depth(self.state));
        self.live.drain(..dead);
    }

    fn collect_matches(&mut self, spans: &mut Vec<Span>) {
        let nfa = &self.automata.nfa;
        if !nfa.is_match(self.state) {
            return;
        }
        for index in 0..nfa.match_len(self.state) {
            let pattern = self.automata.patterns[nfa.match_pattern(self.state, index).as_usize()];
            // No pattern that ends here is longer than the state was deep before its bytes were appended.
            let begin = self.live[self.live.len() - pattern.num_bytes];
            let span = Span { rule: pattern.rule, first: begin.source, end: self.num_chars + 1 };
            if !pattern.whole_word {
                spans.push(span);
            } else if !begin.after_word_char {
                self.pending.push(span);
            }
        }
    }
}

/// A whole pattern as matching sees text.
pub(super) fn normalised(pattern: &str) -> String {
    let mut folded = Vec::new();
    pattern.chars().for_each(|c| fold(c, &mut folded));
    let mut text = String::new();
    for normal in folded {
        if !repeats_space(text.chars().next_back(), normal) {
            text.push(normal);
        }
    }
    text
}

/// Runs of spaces are one space.
fn repeats_space(previous: Option<char>, normal: char) -> bool {
    normal == ' ' && previous == Some(' ')
}

/// Each prefix of a pattern is a state of its own; walking the patterns finds them and their lengths.
fn depths(nfa: &NFA, start: StateID, patterns: &[String]) -> Vec<u32> {
    let mut depths = Vec::new();
    for pattern in patterns {
        let mut state = start;
        for (depth, byte) in (1_u32..).zip(pattern.bytes()) {
            state = nfa.next_state(Anchored::No, state, byte);
            if depths.len() <= state.as_usize() {
                depths.resize(state.as_usize() + 1, 0);
            }
            depths[state.as_usize()] = depth;
        }
    }
    depths
}
