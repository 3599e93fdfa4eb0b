//! Text <-> token ids, and incremental decoding that never emits half a character. Stub.

use crate::{checkpoint::TokenizerSource, ids::TokenId};

/// A tokenizer, immutable and shared.
#[derive(Debug)]
pub struct Tokenizer {}

/// How a text is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Prefix BOS if the model's rule says so.
    pub add_special_tokens: bool,
    /// Read `<|eot_id|>` and its like as special tokens; otherwise they stay text.
    pub parse_special: bool,
}

/// Why a tokenizer cannot be built or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The source is inconsistent; usually a file cut short or of another program.
    #[error("tokenizer: {0}")]
    Invalid(String),
    /// Encoding failed.
    #[error("cannot tokenize: {0}")]
    Encode(String),
}

impl Tokenizer {
    /// Builds the tokenizer.
    ///
    /// # Errors
    /// [`TokenizerError::Invalid`].
    pub fn from_source(source: &TokenizerSource) -> Result<Self, TokenizerError> {
        let _ = source;
        unimplemented!()
    }

    /// Number of ids it knows.
    pub fn vocab_size(&self) -> usize {
        unimplemented!()
    }

    /// Beginning-of-sequence token, if prompts start with one.
    pub fn bos(&self) -> Option<TokenId> {
        unimplemented!()
    }

    /// Text -> ids.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<TokenId>, TokenizerError> {
        let _ = (text, options);
        unimplemented!()
    }

    /// Ids -> text; bytes that are no UTF-8 become U+FFFD. Unknown ids decode to nothing.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let _ = (ids, skip_special);
        unimplemented!()
    }

    /// The exact bytes token `id` stands for (special tokens: their text; unknown ids: nothing).
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        let _ = id;
        unimplemented!()
    }

    /// Whether `id` is a special (control) token, which output text leaves out.
    pub fn is_special(&self, id: TokenId) -> bool {
        let _ = id;
        unimplemented!()
    }

    /// The id whose text is exactly `token`.
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        let _ = token;
        unimplemented!()
    }
}

/// Turns a stream of ids into text, holding back bytes until they are whole characters; what can never become one is
/// U+FFFD. The concatenation of all pushes and the finish equals [`Tokenizer::decode`] of all ids.
#[derive(Debug)]
pub struct IncrementalDecoder {}

impl IncrementalDecoder {
    /// A decoder at the start of an output.
    pub fn new(skip_special: bool) -> Self {
        let _ = skip_special;
        unimplemented!()
    }

    /// The text that token `id` completes.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: TokenId) -> String {
        let _ = (tokenizer, id);
        unimplemented!()
    }

    /// What is left at the end: U+FFFD for an incomplete character, else nothing.
    pub fn finish(&mut self) -> String {
        unimplemented!()
    }
}
