//! The model's tokens as a trie of bytes, which is what masks are computed over. Special tokens are not in it: no rule can ask
//! for them, and the stop tokens are allowed by the matcher where an output may end.

use std::sync::Arc;

use bitnet_core::{TokenId, Tokenizer};
use llguidance::{
    ParserFactory,
    toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv},
};

/// The vocabulary as the grammar compiler sees it.
struct Vocabulary(TokTrie);

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.0.greedy_tokenize(bytes)
    }

    /// The model chooses how to write what is forced: any tokens that spell it are allowed.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// The compiler for `tokenizer`, with limits that bound every step to some tens of milliseconds.
pub(super) fn factory(tokenizer: &Arc<Tokenizer>, stop_tokens: &[TokenId]) -> Result<ParserFactory, String> {
    let vocab_size = tokenizer.vocab_size() as u32;
    let stop_tokens: Vec<u32> = stop_tokens.iter().map(|id| id.0).filter(|id| *id < vocab_size).collect();
    let Some(&first) = stop_tokens.first() else {
        return Err("this model has no stop token, so a constrained output could not end".to_owned());
    };
    let words: Vec<Vec<u8>> = (0..vocab_size).map(|id| word(tokenizer, TokenId(id))).collect();
    let trie = TokTrie::from(&TokRxInfo::new(vocab_size, first), &words).with_eos_tokens(&stop_tokens);
    let vocabulary: TokEnv = Arc::new(Vocabulary(trie));
    let mut factory = ParserFactory::new(&vocabulary, InferenceCapabilities::default(), &[])
        .map_err(|error| format!("the vocabulary cannot be used: {error}"))?;
    factory.quiet();
    let limits = factory.limits_mut();
    limits.verbose_errors = false;
    limits.precompute_large_lexemes = false;
    limits.max_lexer_states = 50_000;
    Ok(factory)
}

/// The bytes of `id`; none for special tokens, for those that start with the trie's own marker (no text does), and for very
/// long ones, which the trie cannot hold.
fn word(tokenizer: &Tokenizer, id: TokenId) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    let usable = !tokenizer.is_special(id) && !bytes.starts_with(&[TokTrie::SPECIAL_TOKEN_MARKER]);
    if usable && bytes.len() <= MAX_TOKEN_BYTES { bytes.to_vec() } else { Vec::new() }
}

const MAX_TOKEN_BYTES: usize = 200;
