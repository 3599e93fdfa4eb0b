//! Vocabulary of a GGUF file -> [`Parts`]: byte-level BPE (`gpt2`), or SentencePiece BPE (`llama`), whose merges follow from
//! the scores. Control tokens become special, user-defined ones plain added tokens, as in the file's `tokenizer.json`.

use serde_json::{Value, json};
use tokenizers::{AddedToken, PostProcessorWrapper, PreTokenizerWrapper, models::bpe::Vocab};

use super::{
    TokenizerError, invalid,
    parts::{BpeOptions, Parts, bpe, check_unique, split_merge},
    token_table::{Spelling, TokenEntry, TokenTable},
};
use crate::{checkpoint::GgufVocabulary, ids::TokenId};

pub(super) fn build(vocabulary: &GgufVocabulary) -> Result<Parts, TokenizerError> {
    let kinds = kinds(vocabulary)?;
    check_unique((0u32..).zip(vocabulary.tokens.iter().map(String::as_str)))?;
    match vocabulary.model.as_str() {
        "gpt2" => byte_level(vocabulary, &kinds),
        "llama" => sentence_piece(vocabulary, &kinds),
        other => Err(TokenizerError::Invalid(format!(
            "tokenizer.ggml.model is {other:?}; only \"gpt2\" and \"llama\" are supported"
        ))),
    }
}

/// What a token is for (`tokenizer.ggml.token_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenKind {
    /// Text (1 normal, 5 unused).
    Text,
    /// 3 control, 2 unknown: never text.
    Control,
    /// 4 user-defined: text that is one token wherever it stands.
    UserDefined,
    /// 6: one byte, `<0xNN>`.
    Byte,
}

/// The kind of every token; ids and lengths are checked on the way.
fn kinds(vocabulary: &GgufVocabulary) -> Result<Vec<TokenKind>, TokenizerError> {
    let GgufVocabulary { tokens, token_types, .. } = vocabulary;
    if tokens.is_empty() {
        return Err(TokenizerError::Invalid("tokenizer.ggml.tokens is missing or empty".to_owned()));
    }
    if !token_types.is_empty() && token_types.len() != tokens.len() {
        let what = format!("{} tokens, but {} token types", tokens.len(), token_types.len());
        return Err(TokenizerError::Invalid(what));
    }
    let mut kinds = vec![TokenKind::Text; tokens.len()];
    for (id, token_type) in token_types.iter().enumerate() {
        kinds[id] = match token_type {
            0 | 1 | 5 => TokenKind::Text,
            2 | 3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            6 => TokenKind::Byte,
            _ => return Err(TokenizerError::Invalid(format!("token {id} has the unknown type {token_type}"))),
        };
    }
    let named = [("bos", vocabulary.bos), ("eos", vocabulary.eos), ("unknown", vocabulary.unknown)];
    for (name, id) in named.into_iter().filter_map(|(name, id)| Some((name, id?))) {
        let Some(kind) = kinds.get_mut(id.index()) else {
            let what = format!("{name}_token_id is {}, but there are {} tokens", id.0, tokens.len());
            return Err(TokenizerError::Invalid(what));
        };
        // Without types, the named tokens are all that is known to be special.
        if token_types.is_empty() {
            *kind = TokenKind::Control;
        }
    }
    Ok(kinds)
}

fn byte_level(vocabulary: &GgufVocabulary, kinds: &[TokenKind]) -> Result<Parts, TokenizerError> {
    let PreTokenizer { splitter, ignore_merges } = pre_tokenizer(vocabulary.pre.as_deref().unwrap_or("default"))?;
    // Control tokens are no text, so the model does not know them.
    let vocab = vocab(vocabulary, kinds, |kind| kind != TokenKind::Control);
    let merges = vocabulary.merges.iter().map(|merge| split_merge(merge)).collect::<Result<_, _>>()?;
    let model = bpe(vocab, merges, &BpeOptions { ignore_merges, ..BpeOptions::default() })?;
    Ok(Parts {
        normalizer: None,
        pre_tokenizer: Some(splitter),
        model,
        post_processor: bos_rule(vocabulary)?,
        added: added_tokens(vocabulary, kinds),
        table: table(vocabulary, kinds, Spelling::ByteLevel)?,
    })
}

fn sentence_piece(vocabulary: &GgufVocabulary, kinds: &[TokenKind]) -> Result<Parts, TokenizerError> {
    let vocab = vocab(vocabulary, kinds, |kind| kind != TokenKind::Control);
    let merges = merges_by_score(vocabulary, kinds)?;
    let options = BpeOptions { byte_fallback: true, ..BpeOptions::default() };
    let model = bpe(vocab, merges, &options)?;
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE.to_string()});
    let prefix = json!({"type": "Prepend", "prepend": SPACE.to_string()});
    let steps = if vocabulary.add_space_prefix { vec![prefix, spaces] } else { vec![spaces] };
    let normalizer = serde_json::from_value(json!({"type": "Sequence", "normalizers": steps})).map_err(invalid)?;
    let spelling = Spelling::SentencePiece { drops_leading_space: vocabulary.add_space_prefix };
    Ok(Parts {
        normalizer: Some(normalizer),
        pre_tokenizer: None,
        model,
        post_processor: bos_rule(vocabulary)?,
        added: added_tokens(vocabulary, kinds),
        table: table(vocabulary, kinds, spelling)?,
    })
}

/// SentencePiece merges the pair whose token scores highest. So each way to split a token in two tokens is a merge, ranked by
/// the token's score; between equals the longer left half goes first, as in converted `tokenizer.json` files.
fn merges_by_score(vocabulary: &GgufVocabulary, kinds: &[TokenKind]) -> Result<Vec<(String, String)>, TokenizerError> {
    let GgufVocabulary { tokens, scores, .. } = vocabulary;
    if scores.len() != tokens.len() {
        return Err(TokenizerError::Invalid(format!("{} tokens, but {} scores", tokens.len(), scores.len())));
    }
    let pieces = vocab(vocabulary, kinds, |kind| matches!(kind, TokenKind::Text | TokenKind::UserDefined));
    let mut merges: Vec<(f32, usize, &str, &str)> = Vec::new();
    for ((token, &score), &kind) in tokens.iter().zip(scores).zip(kinds) {
        if !matches!(kind, TokenKind::Text | TokenKind::UserDefined) {
            continue;
        }
        if token.len() > MAX_PIECE_BYTES {
            return Err(TokenizerError::Invalid(format!("a token of {} bytes; pieces are short", token.len())));
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if pieces.contains_key(left) && pieces.contains_key(right) {
                merges.push((score, left.chars().count(), left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    Ok(merges.into_iter().map(|(_, _, left, right)| (left.to_owned(), right.to_owned())).collect())
}

fn vocab(vocabulary: &GgufVocabulary, kinds: &[TokenKind], keep: impl Fn(TokenKind) -> bool) -> Vocab {
    let tokens = (0u32..).zip(&vocabulary.tokens).zip(kinds);
    tokens.filter(|(_, kind)| keep(**kind)).map(|((id, token), _)| (token.clone(), id)).collect()
}

fn added_tokens(vocabulary: &GgufVocabulary, kinds: &[TokenKind]) -> Vec<(TokenId, AddedToken)> {
    let tokens = (0u32..).zip(&vocabulary.tokens).zip(kinds);
    let added = tokens.filter(|(_, kind)| matches!(kind, TokenKind::Control | TokenKind::UserDefined));
    let added = added.map(|((id, token), &kind)| {
        let token = AddedToken::from(token.clone(), kind == TokenKind::Control).normalized(false);
        (TokenId(id), token)
    });
    added.collect()
}

fn table(vocabulary: &GgufVocabulary, kinds: &[TokenKind], spelling: Spelling) -> Result<TokenTable, TokenizerError> {
    let entry =
        |(token, kind)| TokenEntry { text: token, special: kind == TokenKind::Control, byte: kind == TokenKind::Byte };
    let tokens = vocabulary.tokens.iter().map(String::as_str).zip(kinds.iter().copied());
    let entries: Vec<Option<TokenEntry<'_>>> = tokens.map(entry).map(Some).collect();
    TokenTable::build(&entries, spelling)
}

/// BOS before every prompt, if the file says so.
fn bos_rule(vocabulary: &GgufVocabulary) -> Result<Option<PostProcessorWrapper>, TokenizerError> {
    if !vocabulary.add_bos {
        return Ok(None);
    }
    let Some(bos) = vocabulary.bos else {
        let what = "tokenizer.ggml.add_bos_token is true, but there is no bos_token_id";
        return Err(TokenizerError::Invalid(what.to_owned()));
    };
    let text = &vocabulary.tokens[bos.index()];
    let special = json!({"SpecialToken": {"id": text, "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let rule = json!({
        "type": "TemplateProcessing",
        "single": [special, sequence("A")],
        "pair": [special, sequence("A"), special, sequence("B")],
        "special_tokens": {(text.as_str()): {"id": text, "ids": [bos.0], "tokens": [text]}},
    });
    serde_json::from_value(rule).map(Some).map_err(invalid)
}

struct PreTokenizer {
    splitter: PreTokenizerWrapper,
    ignore_merges: bool,
}

/// `tokenizer.ggml.pre`: a name for the regular expression that cuts a text into pieces, and for a quirk.
fn pre_tokenizer(name: &str) -> Result<PreTokenizer, TokenizerError> {
    let (pattern, ignore_merges) = match name {
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => (Some(LLAMA3_PATTERN), true),
        "smaug-bpe" | "dbrx" => (Some(LLAMA3_PATTERN), false),
        "qwen2" | "deepseek-r1-qwen" => (Some(QWEN2_PATTERN), false),
        "default" | "gpt-2" | "gpt2" => (None, false),
        _ => {
            return Err(TokenizerError::Invalid(format!(
                "tokenizer.ggml.pre is {name:?}, which this program does not know; known are llama-bpe, falcon3, \
                 smaug-bpe, qwen2, gpt-2 and default"
            )));
        }
    };
    let bytes = |use_regex: bool| -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
    };
    let splitter = match pattern {
        Some(pattern) => {
            let split =
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
        }
        None => bytes(true),
    };
    Ok(PreTokenizer { splitter: serde_json::from_value(splitter).map_err(invalid)?, ignore_merges })
}

const SPACE: char = '\u{2581}';

/// Splitting a piece everywhere is quadratic in its length; real ones have at most 48 bytes.
const MAX_PIECE_BYTES: usize = 256;

const LLAMA3_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const QWEN2_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
