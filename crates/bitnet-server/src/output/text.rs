//! Token ids -> text: incremental decoding, then stop strings.

use std::sync::Arc;

use bitnet_core::{TokenId, Tokenizer, tokenizer::IncrementalDecoder};

use super::{StopMatcher, StopStrings};

/// Turns the tokens of one choice into text.
#[derive(Debug)]
pub struct TextDecoder {
    tokenizer: Arc<Tokenizer>,
    decoder: IncrementalDecoder,
    matcher: StopMatcher,
    /// Tokens before which stop strings are not looked for.
    min_tokens: usize,
    tokens_seen: usize,
    bytes_decoded: usize,
}

/// What one token brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text that may leave as far as stop strings go.
    pub text: String,
    /// Where the token's text ends, in bytes of the whole decoded text; `None` while it is part of a character that
    /// later tokens have to complete.
    pub end: Option<usize>,
    /// A stop string was found: generate no more.
    pub stopped: bool,
}

impl TextDecoder {
    /// At the start of an output. `continues` is the token the text goes on from, if it does: a tokenizer that drops the
    /// space at the start of a text must not drop it in the middle.
    pub fn new(tokenizer: Arc<Tokenizer>, stop: StopStrings, min_tokens: usize, continues: Option<TokenId>) -> Self {
        let mut decoder = IncrementalDecoder::new(true);
        if let Some(token) = continues {
            decoder.push(&tokenizer, token);
            decoder.finish();
        }
        Self { tokenizer, decoder, matcher: StopMatcher::new(stop), min_tokens, tokens_seen: 0, bytes_decoded: 0 }
    }

    /// Adds `token`.
    pub fn push(&mut self, token: TokenId) -> Piece {
        let decoded = self.decoder.push(&self.tokenizer, token);
        self.bytes_decoded += decoded.len();
        self.tokens_seen += 1;
        let silent = self.tokenizer.is_special(token) || self.tokenizer.token_bytes(token).is_empty();
        let end = (silent || !decoded.is_empty()).then_some(self.bytes_decoded);
        let text = if self.tokens_seen < self.min_tokens { decoded } else { self.matcher.push(&decoded) };
        Piece { text, end, stopped: self.matcher.stopped() }
    }

    /// The output is over: what was held back, and U+FFFD for a character that stayed incomplete. A stop string may still
    /// turn up in it.
    pub fn finish(&mut self) -> Piece {
        let decoded = self.decoder.finish();
        self.bytes_decoded += decoded.len();
        let text = self.matcher.push(&decoded) + &self.matcher.finish();
        Piece { text, end: Some(self.bytes_decoded), stopped: self.matcher.stopped() }
    }
}
