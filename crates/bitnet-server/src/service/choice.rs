//! One choice on its way out: tokens -> text -> stop strings -> output filter -> what may be sent, together with the
//! tokens whose text it is.

use std::sync::Arc;

use bitnet_core::{TokenId, Tokenizer};

use crate::{
    engine::{self, TokenEvent},
    filter::{Filtered, OutputFilter, RuleHit},
    openai::FinishReason,
    output::{StopStrings, TextDecoder, Withheld},
};

/// News of one choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// Text that may be sent.
    pub text: String,
    /// The tokens that may be sent with it, in order.
    pub tokens: Vec<TokenEvent>,
    /// Set when the choice has ended.
    pub finish: Option<FinishReason>,
    /// Filter rules that matched for the first time.
    pub matches: Vec<RuleHit>,
}

/// The stages of one choice. After a delta with `finish` it is to be dropped.
#[derive(Debug)]
pub(super) struct Choice {
    decoder: TextDecoder,
    filter: Option<OutputFilter>,
    withheld: Withheld<TokenEvent>,
    /// What a stop string does to the output: an end, or, where the output has a form to keep, a cut.
    stopped: FinishReason,
}

impl Choice {
    /// At the start of an output. `continues` is the token the text goes on from, in text completions: whether a space
    /// at the start belongs to the text depends on it.
    pub(super) fn new(
        tokenizer: Arc<Tokenizer>,
        stop: StopStrings,
        min_tokens: usize,
        continues: Option<TokenId>,
        filter: Option<OutputFilter>,
    ) -> Self {
        let decoder = TextDecoder::new(tokenizer, stop, min_tokens, continues);
        Self { decoder, filter, withheld: Withheld::new(), stopped: FinishReason::Stop }
    }

    /// An output that has a form to keep: only its own end is one, and a stop string cuts it short like a length limit.
    pub(super) fn with_form(self) -> Self {
        Self { stopped: FinishReason::Length, ..self }
    }

    /// Adds a token.
    pub(super) fn token(&mut self, event: TokenEvent) -> Delta {
        let piece = self.decoder.push(event.token);
        self.withheld.push(piece.end, event);
        if piece.stopped {
            return self.end(&piece.text, self.stopped);
        }
        let filtered = self.filtered(&piece.text, false);
        self.delta(filtered, None)
    }

    /// The engine ended the choice.
    pub(super) fn finish(&mut self, reason: engine::FinishReason) -> Delta {
        let piece = self.decoder.finish();
        let reason = match reason {
            _ if piece.stopped => self.stopped,
            engine::FinishReason::Stop => FinishReason::Stop,
            engine::FinishReason::Length => FinishReason::Length,
        };
        let mut delta = self.end(&piece.text, reason);
        if let (Some(end), false, Some(FinishReason::Stop | FinishReason::Length)) =
            (piece.end, piece.stopped, delta.finish)
        {
            delta.tokens.extend(self.withheld.finish(end));
        }
        delta
    }

    /// The last text, through everything.
    fn end(&mut self, text: &str, reason: FinishReason) -> Delta {
        let filtered = self.filtered(text, true);
        self.delta(filtered, Some(reason))
    }

    fn filtered(&mut self, text: &str, last: bool) -> Filtered {
        self.withheld.cleared(text);
        let Some(filter) = &mut self.filter else { return Filtered { text: text.to_owned(), ..Filtered::default() } };
        let mut filtered = filter.push(text);
        if last && filtered.blocked.is_none() {
            let rest = filter.finish();
            filtered.text += &rest.text;
            filtered.blocked = rest.blocked;
            filtered.matches.extend(rest.matches);
        }
        filtered
    }

    fn delta(&mut self, filtered: Filtered, reason: Option<FinishReason>) -> Delta {
        let finish = if filtered.blocked.is_some() { Some(FinishReason::ContentFilter) } else { reason };
        let tokens = self.withheld.release(&filtered.text);
        Delta { text: filtered.text, tokens, finish, matches: filtered.matches }
    }
}
