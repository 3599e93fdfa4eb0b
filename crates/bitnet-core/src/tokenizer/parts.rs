//! What both sources boil down to: the parts of a tokenizer, and the one place where the BPE model is put together,
//! because the crate panics on some inconsistent merges.

use std::collections::HashMap;

use tokenizers::{
    AddedToken, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    models::bpe::{BPE, BpeBuilder, Vocab},
};

use super::{TokenizerError, invalid, token_table::TokenTable};
use crate::ids::TokenId;

/// The checked parts of a tokenizer.
pub(super) struct Parts {
    pub(super) normalizer: Option<NormalizerWrapper>,
    pub(super) pre_tokenizer: Option<PreTokenizerWrapper>,
    pub(super) model: BPE,
    pub(super) post_processor: Option<PostProcessorWrapper>,
    /// Special and user-defined tokens, which are found in a text before anything else happens to it.
    pub(super) added: Vec<(TokenId, AddedToken)>,
    pub(super) table: TokenTable,
}

/// Switches of a BPE model.
#[derive(Clone, Debug, Default)]
pub(super) struct BpeOptions {
    /// A piece that is a token is taken whole, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Characters without a token become `<0xNN>` tokens.
    pub(super) byte_fallback: bool,
    /// The token of last resort.
    pub(super) unknown: Option<String>,
    /// A run of unknown characters is one token.
    pub(super) fuse_unknown: bool,
}

/// The BPE model of `vocab` and `merges`, the earlier merge first.
///
/// The crate's cache of pieces is off: it holds up to 80 MB a thread when fed with long random words, and a piece is
/// almost always a token already or short.
pub(super) fn bpe(vocab: Vocab, merges: Vec<(String, String)>, options: &BpeOptions) -> Result<BPE, TokenizerError> {
    check_merges(&vocab, &merges)?;
    let mut builder = BpeBuilder::new()
        .cache_capacity(0)
        .ignore_merges(options.ignore_merges)
        .byte_fallback(options.byte_fallback)
        .fuse_unk(options.fuse_unknown);
    if let Some(unknown) = &options.unknown {
        if !vocab.contains_key(unknown) {
            return Err(TokenizerError::Invalid(format!("the unknown token {unknown:?} is not in the vocabulary")));
        }
        builder = builder.unk_token(unknown.clone());
    }
    builder.vocab_and_merges(vocab, merges).build().map_err(invalid)
}

/// The crate slices by the length of the longest token, so a merge into a token that is not there would panic.
fn check_merges(vocab: &Vocab, merges: &[(String, String)]) -> Result<(), TokenizerError> {
    let mut merged = String::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        for token in [left, right, &merged] {
            if !vocab.contains_key(token) {
                let token: String = token.chars().take(64).collect();
                return Err(TokenizerError::Invalid(format!("merge {rank} names {token:?}, which is no token")));
            }
        }
    }
    Ok(())
}

/// `"left right"` as its two halves.
pub(super) fn split_merge(merge: &str) -> Result<(String, String), TokenizerError> {
    match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
            Ok((left.to_owned(), right.to_owned()))
        }
        _ => {
            let merge: String = merge.chars().take(64).collect();
            Err(TokenizerError::Invalid(format!("merge {merge:?} is not two tokens with a space between them")))
        }
    }
}

/// Fails if two ids have the same text, which would make encoding and decoding disagree.
pub(super) fn check_unique<'a>(tokens: impl Iterator<Item = (u32, &'a str)>) -> Result<(), TokenizerError> {
    let mut seen: HashMap<&str, u32> = HashMap::new();
    for (id, token) in tokens {
        if let Some(first) = seen.insert(token, id) {
            let token: String = token.chars().take(64).collect();
            return Err(TokenizerError::Invalid(format!("tokens {first} and {id} are both {token:?}")));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::checkpoint::GgufVocabulary;

    /// A byte-level vocabulary of the 256 bytes alone, id = byte.
    pub(in crate::tokenizer) fn byte_vocabulary() -> GgufVocabulary {
        let mut others = (0x100u32..).filter_map(char::from_u32);
        let tokens = (0..=255u8)
            .map(|byte| match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte).to_string(),
                _ => others.next().unwrap().to_string(),
            })
            .collect();
        GgufVocabulary { model: "gpt2".to_owned(), pre: Some("llama-bpe".to_owned()), tokens, ..Default::default() }
    }

    fn vocab(tokens: &[&str]) -> Vocab {
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id as u32)).collect()
    }

    #[test]
    fn merges_that_would_panic_inside_the_crate_are_refused() {
        let pair = |a: &str, b: &str| vec![(a.to_owned(), b.to_owned())];
        for merges in [pair("aa", "bb"), pair("a", "x"), pair("x", "a")] {
            assert!(bpe(vocab(&["a", "aa", "bb"]), merges, &BpeOptions::default()).is_err());
        }
        assert!(bpe(vocab(&["a", "aa"]), pair("a", "a"), &BpeOptions::default()).is_ok());
        let unknown = BpeOptions { unknown: Some("?".to_owned()), ..BpeOptions::default() };
        assert!(bpe(vocab(&["a"]), vec![], &unknown).is_err());
    }

    #[test]
    fn a_merge_is_two_tokens_and_one_space() {
        assert_eq!(split_merge("a bc").unwrap(), ("a".to_owned(), "bc".to_owned()));
        for bad in ["", " ", "ab", "a ", " b", "a b c", "a  b"] {
            assert!(split_merge(bad).is_err(), "{bad:?}");
        }
    }
}
