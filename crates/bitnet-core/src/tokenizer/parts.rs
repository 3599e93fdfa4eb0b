//! What both sources boil down to, the parts of a tokenizer, and the checks they share.

use std::collections::HashMap;

use tokenizers::{AddedToken, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper};

use super::{TokenizerError, bpe::Bpe, token_table::TokenTable};
use crate::ids::TokenId;

/// The checked parts of a tokenizer.
pub(super) struct Parts {
    pub(super) normalizer: Option<NormalizerWrapper>,
    pub(super) pre_tokenizer: Option<PreTokenizerWrapper>,
    pub(super) model: Bpe,
    pub(super) post_processor: Option<PostProcessorWrapper>,
    /// Special and user-defined tokens, which are found in a text before anything else happens to it.
    pub(super) added: Vec<(TokenId, AddedToken)>,
    pub(super) table: TokenTable,
}

/// `"left right"` as its two halves.
pub(super) fn split_merge(merge: &str) -> Result<(&str, &str), TokenizerError> {
    match merge.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => Ok((left, right)),
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

    #[test]
    fn a_merge_is_two_tokens_and_one_space() {
        assert_eq!(split_merge("a bc").unwrap(), ("a", "bc"));
        for bad in ["", " ", "ab", "a ", " b", "a b c", "a  b"] {
            assert!(split_merge(bad).is_err(), "{bad:?}");
        }
    }
}
