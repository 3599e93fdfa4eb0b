//! Text <-> token ids, and incremental decoding that never emits half a character.
//!
//! The `tokenizers` crate finds special tokens, normalizes and splits; `bpe.rs` merges. The parts come from a
//! `tokenizer.json` (`json.rs`) or from the vocabulary of a GGUF file (`gguf.rs`), and the exact bytes of every token are
//! kept in `token_table.rs`. This room knows tokens and text, not models, prompts or templates.

mod bpe;
mod byte_level;
mod gguf;
mod incremental;
mod json;
mod parts;
mod token_table;

pub use incremental::IncrementalDecoder;

use tokenizers::{
    AddedToken, AddedVocabulary, Encoding, NormalizerWrapper, OffsetType, PostProcessor as _, PostProcessorWrapper,
    PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper, Token,
    models::bpe::{BPE, Vocab},
};

use crate::{checkpoint::TokenizerSource, ids::TokenId};
use bpe::Bpe;
use byte_level::ByteLevel;
use parts::Parts;
use token_table::TokenTable;

/// A tokenizer, immutable and shared.
pub struct Tokenizer {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    model: Bpe,
    /// The short way, for tokenizers of the common kind.
    byte_level: Option<ByteLevel>,
    /// What `add_special_tokens` puts before and after the ids of a text.
    around: [Vec<TokenId>; 2],
    /// Finds special and user-defined tokens in a text.
    added: AddedVocabulary,
    /// The same, blind to special tokens.
    added_plain: AddedVocabulary,
    table: TokenTable,
    bos: Option<TokenId>,
}

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
        let parts = match source {
            TokenizerSource::HuggingFace { json, .. } => json::parse(json)?,
            TokenizerSource::Gguf(vocabulary) => gguf::build(vocabulary)?,
        };
        Self::from_parts(parts)
    }

    /// Number of ids it knows: the largest id plus one.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// Beginning-of-sequence token, if prompts start with one.
    pub fn bos(&self) -> Option<TokenId> {
        self.bos
    }

    /// Text -> ids.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<TokenId>, TokenizerError> {
        let ids = match &self.byte_level {
            Some(byte_level) => byte_level.encode(&self.model, text, options.parse_special, &[], usize::MAX),
            None => {
                let added = if options.parse_special { &self.added } else { &self.added_plain };
                self.encode_pieces(added.extract_and_normalize(self.normalizer.as_ref(), text))?
            }
        };
        Ok(self.finish(ids, options.add_special_tokens))
    }

    /// Text -> ids, special tokens read as such, where characters of the text stand in for others: each `(stand_in,
    /// original)` takes its place back only after the special tokens were found. So a text that writes `<|eot_id|>` with
    /// a stand-in for its first character keeps it as plain text, and everything else tokenizes as if nothing had been
    /// replaced. Stand-ins should be private or unassigned characters, which no normalizer touches.
    ///
    /// A text of more than `most` tokens need not be read to its end: other tokens come back then, and more than `most`.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode_with_stand_ins(
        &self,
        text: &str,
        stand_ins: &[(char, char)],
        add_special_tokens: bool,
        most: usize,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let ids = match &self.byte_level {
            Some(byte_level) => byte_level.encode(&self.model, text, true, stand_ins, most),
            None => {
                let mut pieces = self.added.extract_and_normalize(self.normalizer.as_ref(), text);
                let restored = pieces.normalize(|piece| {
                    piece.map(|c| original_of(c, stand_ins));
                    Ok(())
                });
                restored.map_err(encode_error)?;
                self.encode_pieces(pieces)?
            }
        };
        Ok(self.finish(ids, add_special_tokens))
    }

    /// Ids -> text; bytes that are no UTF-8 become U+FFFD. Unknown ids decode to nothing.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let mut decoder = IncrementalDecoder::new(skip_special);
        let mut text: String = ids.iter().map(|&id| decoder.push(self, id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// The exact bytes token `id` stands for (special tokens: their text; unknown ids: nothing).
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.table.bytes(id)
    }

    /// Whether `id` is a special (control) token, which output text leaves out.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.table.is_special(id)
    }

    /// The id whose text is exactly `token`.
    pub fn token_id(&self, token: &str) -> Option<TokenId> {
        self.added.get_vocab().get(token).copied().or_else(|| self.model.id(token)).map(TokenId)
    }

    /// The texts that [`Self::encode`] reads as special tokens, in no particular order.
    pub fn special_texts(&self) -> impl Iterator<Item = &str> {
        self.added.get_added_tokens_decoder().values().filter(|token| token.special).map(|token| token.content.as_str())
    }

    /// Whether a text's leading space is an artefact of encoding (SentencePiece), which decoding takes away.
    fn drops_leading_space(&self) -> bool {
        self.table.drops_leading_space()
    }

    fn from_parts(parts: Parts) -> Result<Self, TokenizerError> {
        let added = added_vocabulary(&parts)?;
        let mut added_plain = added.clone();
        added_plain.set_encode_special_tokens(true);
        let byte_level = ByteLevel::of(&parts)?;
        let around = around(parts.post_processor.as_ref())?;
        // What an empty prompt becomes is what every prompt starts with.
        let bos = around.iter().flatten().next().copied();
        let Parts { normalizer, pre_tokenizer, model, table, .. } = parts;
        Ok(Self { normalizer, pre_tokenizer, model, byte_level, around, added, added_plain, table, bos })
    }

    fn encode_pieces(&self, mut pieces: PreTokenizedString) -> Result<Vec<TokenId>, TokenizerError> {
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces).map_err(encode_error)?;
        }
        // Only the ids are wanted: texts and offsets of tokens stay empty.
        let token = |id| Token::new(id, String::new(), (0, 0));
        let tokenized = pieces.tokenize(|piece| Ok(self.model.encode(piece.get()).into_iter().map(token).collect()));
        tokenized.map_err(encode_error)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(encode_error)?;
        Ok(encoding.get_ids().iter().copied().map(TokenId).collect())
    }

    fn finish(&self, ids: Vec<TokenId>, add_special_tokens: bool) -> Vec<TokenId> {
        let [before, after] = &self.around;
        if add_special_tokens && !(before.is_empty() && after.is_empty()) {
            [before.as_slice(), &ids, after].concat()
        } else {
            ids
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .finish_non_exhaustive()
    }
}

/// The crate numbers added tokens itself unless its model knows them; a model of nothing but those tokens makes it keep
/// the ids of the file.
fn added_vocabulary(parts: &Parts) -> Result<AddedVocabulary, TokenizerError> {
    let ids = parts.added.iter().map(|(id, token)| (token.content.clone(), id.0)).collect();
    let numbering = BPE::builder().vocab_and_merges::<Vocab>(ids, vec![]).build().map_err(invalid)?;
    let tokens: Vec<AddedToken> = parts.added.iter().map(|(_, token)| token.clone()).collect();
    let mut added = AddedVocabulary::new();
    added.add_tokens(tokens, &numbering, parts.normalizer.as_ref()).map_err(invalid)?;
    Ok(added)
}

/// What the post-processor puts before and after a text, found out with a text of one token that no vocabulary has.
fn around(post_processor: Option<&PostProcessorWrapper>) -> Result<[Vec<TokenId>; 2], TokenizerError> {
    let Some(post_processor) = post_processor else { return Ok([vec![], vec![]]) };
    let probe = Encoding::from_tokens(vec![Token::new(u32::MAX, String::new(), (0, 0))], 0);
    let processed = post_processor.process(probe, None, true).map_err(invalid)?;
    let half = |ids: &[u32]| ids.iter().copied().map(TokenId).collect();
    let mut halves = processed.get_ids().split(|&id| id == u32::MAX).map(half);
    Ok([halves.next().unwrap_or_default(), halves.next().unwrap_or_default()])
}

/// The character that `c` stands in for, or `c` itself.
fn original_of(c: char, stand_ins: &[(char, char)]) -> char {
    stand_ins.iter().find(|(stand_in, _)| *stand_in == c).map_or(c, |(_, original)| *original)
}

fn invalid(error: impl std::fmt::Display) -> TokenizerError {
    TokenizerError::Invalid(error.to_string())
}

fn encode_error(error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Encode(error.to_string())
}
