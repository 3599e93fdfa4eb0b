//! Vocabulary of a GGUF file -> [`Parts`]: byte-level BPE (`gpt2`), or SentencePiece BPE (`llama`), whose merges follow from
//! the scores. Control tokens become special, user-defined ones plain added tokens, as in the file's `tokenizer.json`.

use serde_json::json;
use tokenizers::{AddedToken, PostProcessorWrapper, PreTokenizerWrapper, models::bpe::Vocab};

use super::{
    TokenizerError,
    bpe::{Bpe, BpeOptions},
    invalid,
    parts::{Parts, check_unique, split_merge},
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
    let merges = vocabulary.merges.iter().map(|merge| split_merge(merge)).collect::<Result<Vec<_>, _>>()?;
    let model = Bpe::new(vocab, merges, &BpeOptions { ignore_merges, ..BpeOptions::default() })?;
    Ok(Parts {
        normalizer: None,
        pre_tokenizer: Some(splitter),
        model,
        post_processor: special_rule(vocabulary)?,
        added: added_tokens(vocabulary, kinds),
        table: table(vocabulary, kinds, Spelling::ByteLevel)?,
    })
}

fn sentence_piece(vocabulary: &GgufVocabulary, kinds: &[TokenKind]) -> Result<Parts, TokenizerError> {
    let merges = merges_by_score(vocabulary, kinds)?;
    let mut vocab = vocab(vocabulary, kinds, |kind| kind != TokenKind::Control);
    let unknown = vocabulary.unknown.map(|id| (vocabulary.tokens[id.index()].clone(), id.0));
    vocab.extend(unknown.clone());
    let unknown = unknown.map(|(text, _)| text);
    let options = BpeOptions { byte_fallback: true, unknown, fuse_unknown: true, ..BpeOptions::default() };
    let model = Bpe::new(vocab, merges, &options)?;
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE.to_string()});
    let prefix = json!({"type": "Prepend", "prepend": SPACE.to_string()});
    let steps = if vocabulary.add_space_prefix { vec![prefix, spaces] } else { vec![spaces] };
    let normalizer = serde_json::from_value(json!({"type": "Sequence", "normalizers": steps})).map_err(invalid)?;
    let spelling = Spelling::SentencePiece { drops_leading_space: vocabulary.add_space_prefix };
    Ok(Parts {
        normalizer: Some(normalizer),
        pre_tokenizer: None,
        model,
        post_processor: special_rule(vocabulary)?,
        added: added_tokens(vocabulary, kinds),
        table: table(vocabulary, kinds, spelling)?,
    })
}

/// SentencePiece merges the pair whose token scores highest. So each way to split a token in two tokens is a merge, ranked by
/// the token's score; between equals the longer left half goes first, as in converted `tokenizer.json` files.
fn merges_by_score<'a>(
    vocabulary: &'a GgufVocabulary,
    kinds: &[TokenKind],
) -> Result<Vec<(&'a str, &'a str)>, TokenizerError> {
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
    Ok(merges.into_iter().map(|(_, _, left, right)| (left, right)).collect())
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

/// BOS before and EOS after every text, if the file says so.
fn special_rule(vocabulary: &GgufVocabulary) -> Result<Option<PostProcessorWrapper>, TokenizerError> {
    let [bos, eos] = [(vocabulary.add_bos, vocabulary.bos, "bos"), (vocabulary.add_eos, vocabulary.eos, "eos")].map(
        |(wanted, id, name)| match (wanted, id) {
            (false, _) => Ok(None),
            (true, Some(id)) => Ok(Some((id, &vocabulary.tokens[id.index()]))),
            (true, None) => {
                let what = format!("tokenizer.ggml.add_{name}_token is true, but there is no {name}_token_id");
                Err(TokenizerError::Invalid(what))
            }
        },
    );
    let (bos, eos) = (bos?, eos?);
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let special =
        |token: Option<(TokenId, &String)>| token.map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": 0}}));
    let text = |id: &str| [special(bos), Some(json!({"Sequence": {"id": id, "type_id": 0}})), special(eos)];
    let tokens = bos.into_iter().chain(eos);
    let tokens = tokens.map(|(id, text)| (text.clone(), json!({"id": text, "ids": [id.0], "tokens": [text]})));
    let rule = json!({
        "type": "TemplateProcessing",
        "single": text("A").into_iter().flatten().collect::<Vec<_>>(),
        "pair": text("A").into_iter().chain(text("B")).flatten().collect::<Vec<_>>(),
        "special_tokens": tokens.collect::<serde_json::Map<_, _>>(),
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
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => (LLAMA3_PATTERN, true),
        "smaug-bpe" | "dbrx" => (LLAMA3_PATTERN, false),
        "qwen2" | "deepseek-r1-qwen" => (QWEN2_PATTERN, false),
        "default" | "gpt-2" | "gpt2" => (GPT2_PATTERN, false),
        _ => {
            return Err(TokenizerError::Invalid(format!(
                "tokenizer.ggml.pre is {name:?}, which this program does not know; known are llama-bpe, falcon3, \
                 smaug-bpe, qwen2, gpt-2 and default"
            )));
        }
    };
    let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let splitter = json!({"type": "Sequence", "pretokenizers": [split, bytes]});
    Ok(PreTokenizer { splitter: serde_json::from_value(splitter).map_err(invalid)?, ignore_merges })
}

const SPACE: char = '\u{2581}';

/// Splitting a piece everywhere is quadratic in its length; real ones have at most 48 bytes.
const MAX_PIECE_BYTES: usize = 256;

const LLAMA3_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const GPT2_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const QWEN2_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::{EncodeOptions, Tokenizer, parts::tests::byte_vocabulary};

    const READ: EncodeOptions = EncodeOptions { add_special_tokens: true, parse_special: true };
    const PLAIN: EncodeOptions = EncodeOptions { add_special_tokens: false, parse_special: false };

    fn load(vocabulary: &GgufVocabulary) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::from_parts(build(vocabulary)?)
    }

    fn encode(tokenizer: &Tokenizer, text: &str, options: EncodeOptions) -> Vec<u32> {
        tokenizer.encode(text, options).unwrap().into_iter().map(|id| id.0).collect()
    }

    /// `<unk> <s> </s>`, 256 byte tokens from 3, and a handful of pieces from 259.
    fn llama_vocabulary() -> GgufVocabulary {
        let control = ["<unk>", "<s>", "</s>"].map(|text| (text.to_owned(), 0.0, 3));
        let bytes = (0..=255u8).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6));
        let pieces = ["▁", "t", "h", "e", "▁t", "he", "▁the", "th", "▁th"];
        let scores = [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -3.0, -4.0, -5.0];
        let pieces = pieces.into_iter().zip(scores).map(|(text, score)| (text.to_owned(), score, 1));
        let all: Vec<(String, f32, i32)> = control.into_iter().chain(bytes).chain(pieces).collect();
        GgufVocabulary {
            model: "llama".to_owned(),
            tokens: all.iter().map(|(text, ..)| text.clone()).collect(),
            scores: all.iter().map(|(_, score, _)| *score).collect(),
            token_types: all.iter().map(|(.., token_type)| *token_type).collect(),
            bos: Some(TokenId(1)),
            eos: Some(TokenId(2)),
            unknown: Some(TokenId(0)),
            add_bos: true,
            add_space_prefix: true,
            ..GgufVocabulary::default()
        }
    }

    #[test]
    fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
        let tokenizer = load(&llama_vocabulary()).unwrap();
        // ▁t, then he, then ▁t+he; th never gets its turn.
        assert_eq!(encode(&tokenizer, "the", READ), [1, 265]);
        assert_eq!(encode(&tokenizer, "the the", PLAIN), [265, 265]);
        assert_eq!(encode(&tokenizer, "é", PLAIN), [259, 3 + 0xC3, 3 + 0xA9]);
        assert_eq!(encode(&tokenizer, "the</s>", READ), [1, 265, 2]);
        assert!(!encode(&tokenizer, "the</s>", PLAIN).contains(&2));
        let ids: Vec<TokenId> = [1, 265, 259, 3 + 0xC3, 3 + 0xA9, 2].map(TokenId).to_vec();
        assert_eq!(tokenizer.decode(&ids, true), "the é");
        assert_eq!(tokenizer.decode(&ids, false), "<s> the é</s>");
        assert_eq!(tokenizer.token_bytes(TokenId(3 + 0xC3)), [0xC3]);
        assert_eq!(tokenizer.token_bytes(TokenId(265)), b" the");
    }

    #[test]
    fn a_text_ends_with_eos_where_the_file_says_so() {
        let both = load(&GgufVocabulary { add_eos: true, ..llama_vocabulary() }).unwrap();
        assert_eq!(encode(&both, "the", READ), [1, 265, 2]);
        let eos = GgufVocabulary { add_bos: false, add_eos: true, ..llama_vocabulary() };
        assert_eq!(encode(&load(&eos).unwrap(), "the", READ), [265, 2]);
        assert!(load(&GgufVocabulary { eos: None, ..eos }).is_err());
    }

    #[test]
    fn sentence_piece_without_space_prefix_keeps_texts_as_they_are() {
        let tokenizer = load(&GgufVocabulary { add_space_prefix: false, ..llama_vocabulary() }).unwrap();
        assert_eq!(encode(&tokenizer, "the", PLAIN), [260, 264]);
        assert_eq!(tokenizer.decode(&[TokenId(265)], false), " the");
    }

    #[test]
    fn types_make_tokens_special_user_defined_or_plain() {
        let mut vocabulary = byte_vocabulary();
        vocabulary.tokens.extend(["<|end|>", "<tool>"].map(str::to_owned));
        vocabulary.token_types = vec![1; 256];
        vocabulary.token_types.extend([3, 4]);
        let tokenizer = load(&vocabulary).unwrap();
        assert_eq!(encode(&tokenizer, "<|end|><tool>", READ), [256, 257]);
        let plain = encode(&tokenizer, "<|end|><tool>", PLAIN);
        assert_eq!(plain, [b"<|end|>".map(u32::from).as_slice(), &[257]].concat());
        assert!(tokenizer.is_special(TokenId(256)) && !tokenizer.is_special(TokenId(257)));
        assert_eq!(tokenizer.bos(), None);
        assert_eq!(tokenizer.special_texts().collect::<Vec<_>>(), ["<|end|>"]);
    }

    #[test]
    fn ignore_merges_takes_a_whole_piece_that_no_merge_reaches() {
        let mut vocabulary = byte_vocabulary();
        vocabulary.tokens.extend(["th", "the"].map(str::to_owned));
        vocabulary.merges = vec!["t h".to_owned()];
        assert_eq!(encode(&load(&vocabulary).unwrap(), "the", PLAIN), [257]);
        vocabulary.pre = Some("smaug-bpe".to_owned());
        assert_eq!(encode(&load(&vocabulary).unwrap(), "the", PLAIN), [256, u32::from(b'e')]);
    }

    #[test]
    fn inconsistent_vocabularies_are_refused_with_a_reason() {
        type Defect = fn(&mut GgufVocabulary);
        let cases: [(&str, Defect); 14] = [
            ("\"bert\"", |v| v.model = "bert".to_owned()),
            ("\"chameleon\"", |v| (v.model, v.pre) = ("gpt2".to_owned(), Some("chameleon".to_owned()))),
            ("missing or empty", |v| v.tokens.clear()),
            ("267 token types", |v| v.token_types.truncate(267)),
            ("unknown type -7", |v| v.token_types[9] = -7),
            ("5 scores", |v| v.scores.truncate(5)),
            ("0 scores", |v| v.scores.clear()),
            ("tokens 3 and 9 are both", |v| v.tokens[9] = v.tokens[3].clone()),
            ("<0x-1>", |v| v.tokens[9] = "<0x-1>".to_owned()),
            ("bos_token_id is 268", |v| v.bos = Some(TokenId(268))),
            ("eos_token_id is 4294967295", |v| v.eos = Some(TokenId(u32::MAX))),
            ("no bos_token_id", |v| v.bos = None),
            ("300 bytes", |v| v.tokens[262] = "e".repeat(300)),
            ("names \"zz\"", |v| (v.model, v.merges) = ("gpt2".to_owned(), vec!["h zz".to_owned()])),
        ];
        for (reason, break_it) in cases {
            let mut vocabulary = llama_vocabulary();
            break_it(&mut vocabulary);
            let error = load(&vocabulary).expect_err(reason).to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_text_survives_sentence_piece(text in "[the ]{0,24}|\\PC{0,24}") {
            // SentencePiece cannot tell U+2581 from a space.
            prop_assume!(!text.contains('\u{2581}'));
            for add_space_prefix in [true, false] {
                let tokenizer = load(&GgufVocabulary { add_space_prefix, ..llama_vocabulary() }).unwrap();
                let ids = tokenizer.encode(&text, PLAIN).unwrap();
                prop_assert_eq!(tokenizer.decode(&ids, false), text.clone());
            }
        }

        #[test]
        fn broken_metadata_is_an_error_or_a_tokenizer_but_never_a_panic(
            tokens in proptest::collection::vec("[ab▁<>x0Ġ ]{0,6}|<0x[0-9A-F-]{1,3}>", 0..24),
            token_types in proptest::collection::vec(0i32..8, 0..24),
            merges in proptest::collection::vec("[ab▁ Ġ]{0,6}", 0..6),
            same_length: bool,
            special in 0u32..32,
            llama: bool,
        ) {
            let scores = vec![f32::NAN; tokens.len()];
            let token_types = if same_length { vec![1; tokens.len()] } else { token_types };
            let model = if llama { "llama" } else { "gpt2" }.to_owned();
            let id = Some(TokenId(special));
            let vocabulary = GgufVocabulary { model, tokens, token_types, scores, merges, bos: id, unknown: id, add_bos: special % 2 == 0, ..GgufVocabulary::default() };
            if let Ok(tokenizer) = load(&vocabulary) {
                let ids = tokenizer.encode("ab <0x41> a▁b", READ).unwrap();
                let _text = tokenizer.decode(&ids, false);
            }
        }
    }
}
