//! Token ids and log-probabilities in the two shapes of the wire.

use bitnet_core::{TokenId, Tokenizer, sampling::TokenLogprobs, tokenizer::IncrementalDecoder};
use indexmap::IndexMap;

use crate::{
    engine::TokenEvent,
    openai::{ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob},
};

/// JSON has no minus infinity: the least log-probability that is sent.
const LOWEST: f32 = -9999.0;

/// The text of `id` alone; bytes that are no UTF-8 become U+FFFD.
fn token_text(tokenizer: &Tokenizer, id: TokenId) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()
}

/// The entries of `tokens` for a chat choice.
pub(super) fn chat(tokenizer: &Tokenizer, tokens: &[TokenEvent]) -> ChatLogprobs {
    let top = |&(id, logprob): &(TokenId, f32)| TopLogprob {
        token: token_text(tokenizer, id),
        logprob: logprob.max(LOWEST),
        bytes: tokenizer.token_bytes(id).to_vec(),
    };
    let entry = |event: &TokenEvent| {
        let logprobs = event.logprobs.as_ref()?;
        let TopLogprob { token, logprob, bytes } = top(&(event.token, logprobs.logprob));
        Some(ChatTokenLogprob { token, logprob, bytes, top_logprobs: logprobs.top.iter().map(top).collect() })
    };
    ChatLogprobs { content: tokens.iter().filter_map(entry).collect(), refusal: None }
}

/// Builds the columns of a completion choice, and knows where in the text it is.
#[derive(Debug)]
pub(super) struct Columns {
    /// Characters of text before the next token.
    offset: usize,
    decoder: IncrementalDecoder,
}

impl Columns {
    /// At the start of a choice's text.
    pub(super) fn new() -> Self {
        Self { offset: 0, decoder: IncrementalDecoder::new(true) }
    }

    /// The prompt's columns. `hidden_bos`: its first token is not part of the text.
    pub(super) fn prompt(
        &mut self,
        tokenizer: &Tokenizer,
        tokens: &[TokenId],
        logprobs: &[Option<TokenLogprobs>],
        hidden_bos: bool,
    ) -> CompletionLogprobs {
        let mut columns = CompletionLogprobs::default();
        let mut decoder = IncrementalDecoder::new(false);
        for (index, (&token, logprobs)) in tokens.iter().zip(logprobs).enumerate() {
            push(&mut columns, tokenizer, token, logprobs.as_ref(), self.offset);
            if !(hidden_bos && index == 0) {
                self.offset += decoder.push(tokenizer, token).chars().count();
            }
        }
        self.offset += decoder.finish().chars().count();
        columns
    }

    /// The columns of generated tokens.
    pub(super) fn generated(&mut self, tokenizer: &Tokenizer, tokens: &[TokenEvent]) -> CompletionLogprobs {
        let mut columns = CompletionLogprobs::default();
        for event in tokens {
            push(&mut columns, tokenizer, event.token, event.logprobs.as_ref(), self.offset);
            self.offset += self.decoder.push(tokenizer, event.token).chars().count();
        }
        columns
    }
}

/// Appends `more` to `columns`.
pub(super) fn append(columns: &mut CompletionLogprobs, more: CompletionLogprobs) {
    columns.tokens.extend(more.tokens);
    columns.token_logprobs.extend(more.token_logprobs);
    columns.top_logprobs.extend(more.top_logprobs);
    columns.text_offset.extend(more.text_offset);
}

fn push(
    columns: &mut CompletionLogprobs,
    tokenizer: &Tokenizer,
    token: TokenId,
    logprobs: Option<&TokenLogprobs>,
    offset: usize,
) {
    columns.tokens.push(token_text(tokenizer, token));
    columns.token_logprobs.push(logprobs.map(|logprobs| logprobs.logprob.max(LOWEST)));
    columns.top_logprobs.push(logprobs.map(|logprobs| {
        let mut top = IndexMap::with_capacity(logprobs.top.len() + 1);
        // The chosen token is always among them, as clients expect; of ids with equal text the best one counts.
        for &(id, logprob) in logprobs.top.iter().chain([&(token, logprobs.logprob)]) {
            top.entry(token_text(tokenizer, id)).or_insert(logprob.max(LOWEST));
        }
        top
    }));
    columns.text_offset.push(offset);
}
