//! `tokenizer.json` -> [`Parts`]. Only BPE models: every 1-bit model has one. The model is read by our own types, because
//! its merges must be checked before the `tokenizers` crate sees them; all other parts are the crate's.

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{AddedToken, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, models::bpe::Vocab};

use super::{
    TokenizerError,
    bpe::{Bpe, BpeOptions},
    invalid,
    parts::{Parts, split_merge},
    token_table::{Spelling, TokenEntry, TokenTable, parse_byte_token},
};
use crate::ids::TokenId;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedEntry>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<Value>,
    model: BpeModel,
}

#[derive(Deserialize)]
struct AddedEntry {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct BpeModel {
    vocab: Vocab,
    merges: Vec<Merge>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
}

/// `"left right"` in older files, `["left", "right"]` in newer ones.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Line(String),
    Pair(String, String),
}

/// What is left to look at when a file is not what was expected.
#[derive(Deserialize)]
struct Outline {
    model: Kind,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    kind: String,
}

pub(super) fn parse(json: &[u8]) -> Result<Parts, TokenizerError> {
    let file: File = serde_json::from_slice(json).map_err(|error| explain(json, &error))?;
    let File { added_tokens, normalizer, pre_tokenizer, post_processor, decoder, model } = file;
    refuse_exotic(&model)?;
    let byte_fallback = model.byte_fallback.unwrap_or(false);
    let table = table(&model.vocab, &added_tokens, decoder.as_ref(), byte_fallback)?;
    let options = BpeOptions {
        ignore_merges: model.ignore_merges.unwrap_or(false),
        byte_fallback,
        unknown: model.unk_token,
        fuse_unknown: model.fuse_unk.unwrap_or(false),
    };
    let merges = model.merges.iter().map(|merge| match merge {
        Merge::Line(line) => split_merge(line),
        Merge::Pair(left, right) => Ok((left.as_str(), right.as_str())),
    });
    let merges = merges.collect::<Result<Vec<_>, _>>()?;
    let model = Bpe::new(model.vocab, merges, &options)?;
    let added = added_tokens.into_iter().map(|entry| (TokenId(entry.id), entry.token)).collect();
    Ok(Parts { normalizer, pre_tokenizer, model, post_processor, added, table })
}

/// Another kind of model fails somewhere inside; its name says more than that place.
fn explain(json: &[u8], error: &serde_json::Error) -> TokenizerError {
    match serde_json::from_slice::<Outline>(json) {
        Ok(Outline { model: Kind { kind } }) if kind != "BPE" => {
            TokenizerError::Invalid(format!("tokenizer.json holds a {kind} model; only BPE is supported"))
        }
        _ => invalid(format_args!("tokenizer.json: {error}")),
    }
}

fn refuse_exotic(model: &BpeModel) -> Result<(), TokenizerError> {
    let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if affixes.into_iter().flatten().any(|affix| !affix.is_empty())
        || model.dropout.is_some_and(|dropout| dropout != 0.0)
    {
        let what = "tokenizer.json: BPE with dropout, a subword prefix or a word suffix is not supported";
        return Err(TokenizerError::Invalid(what.to_owned()));
    }
    Ok(())
}

fn table(
    vocab: &Vocab,
    added: &[AddedEntry],
    decoder: Option<&Value>,
    byte_fallback: bool,
) -> Result<TokenTable, TokenizerError> {
    let ids = vocab.values().copied().chain(added.iter().map(|entry| entry.id));
    let len = ids.max().map_or(0, |id| id as usize + 1);
    // The table is as long as the largest id, so that must be in proportion to what the file holds.
    let count = vocab.len() + added.len();
    if len > 2 * count + 1024 {
        return Err(TokenizerError::Invalid(format!("id {} in a vocabulary of {count} tokens", len - 1)));
    }
    let mut entries: Vec<Option<TokenEntry<'_>>> = vec![None; len];
    for (text, &id) in vocab {
        let byte = byte_fallback && parse_byte_token(text).is_some();
        if entries[id as usize].replace(TokenEntry { text, special: false, byte }).is_some() {
            return Err(TokenizerError::Invalid(format!("id {id} belongs to two tokens")));
        }
    }
    for AddedEntry { id, token } in added {
        let other = entries[*id as usize].is_some_and(|entry| entry.text != token.content);
        if other || vocab.get(&token.content).is_some_and(|known| known != id) {
            let what = format!("added token {:?} and the vocabulary disagree about id {id}", token.content);
            return Err(TokenizerError::Invalid(what));
        }
        let byte = entries[*id as usize].is_some_and(|entry| entry.byte);
        entries[*id as usize] = Some(TokenEntry { text: &token.content, special: token.special, byte });
    }
    TokenTable::build(&entries, spelling(decoder))
}

/// How the tokens are spelled follows from how the file decodes them.
fn spelling(decoder: Option<&Value>) -> Spelling {
    let mut steps = Vec::new();
    if let Some(decoder) = decoder {
        flatten(decoder, &mut steps);
    }
    let is = |step: &Value, kind: &str| step["type"] == kind;
    if steps.iter().any(|step| is(step, "ByteLevel")) {
        return Spelling::ByteLevel;
    }
    let metaspace = steps.iter().find(|step| is(step, "Metaspace"));
    let replaces = steps.iter().any(|step| is(step, "Replace") && step["pattern"]["String"] == "\u{2581}");
    let strips = steps.iter().any(|step| is(step, "Strip") && step["content"] == " " && step["start"] != 0);
    match metaspace {
        Some(step) => Spelling::SentencePiece { drops_leading_space: step["prepend_scheme"] != "never" },
        None if replaces => Spelling::SentencePiece { drops_leading_space: strips },
        None => Spelling::Verbatim,
    }
}

fn flatten<'a>(decoder: &'a Value, steps: &mut Vec<&'a Value>) {
    match decoder["decoders"].as_array() {
        Some(inner) => inner.iter().for_each(|step| flatten(step, steps)),
        None => steps.push(decoder),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        checkpoint::TokenizerSource,
        tokenizer::{EncodeOptions, Tokenizer},
    };

    fn small() -> Value {
        json!({
            "added_tokens": [{
                "id": 4, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            }],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3}, "merges": ["a b"]}
        })
    }

    fn load(json: &Value) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::from_source(&TokenizerSource::HuggingFace { json: json.to_string().into_bytes(), bos: None })
    }

    fn refusal(json: &Value) -> String {
        load(json).unwrap_err().to_string()
    }

    #[test]
    fn both_forms_of_merges_are_read() {
        let mut file = small();
        for merges in [json!(["a b"]), json!([["a", "b"]])] {
            file["model"]["merges"] = merges;
            let options = EncodeOptions { add_special_tokens: true, parse_special: true };
            let ids = load(&file).unwrap().encode("ab ba<|end|>", options).unwrap();
            assert_eq!(ids, [2, 3, 1, 0, 4].map(TokenId));
        }
    }

    #[test]
    fn inconsistent_files_are_refused_with_a_reason() {
        let mut ids = small();
        ids["model"]["vocab"]["b"] = json!(4_000_000_000u32);
        assert!(refusal(&ids).contains("id 4000000000"));
        let mut twice = small();
        twice["model"]["vocab"]["b"] = json!(0);
        assert!(refusal(&twice).contains("two tokens"));
        let mut clash = small();
        clash["added_tokens"][0]["id"] = json!(2);
        assert!(refusal(&clash).contains("disagree"));
        let mut merge = small();
        merge["model"]["merges"] = json!(["ab ab"]);
        assert!(refusal(&merge).contains("\"abab\""));
        let mut unigram = small();
        unigram["model"] = json!({"type": "Unigram", "vocab": [["a", 0.0]]});
        assert!(refusal(&unigram).contains("Unigram"));
        let mut suffix = small();
        suffix["model"]["end_of_word_suffix"] = json!("</w>");
        assert!(refusal(&suffix).contains("suffix"));
        assert!(refusal(&json!([])).contains("tokenizer.json"));
    }

    #[test]
    fn the_decoder_tells_the_spelling() {
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let llama =
            json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]});
        assert_eq!(spelling(Some(&llama)), Spelling::SentencePiece { drops_leading_space: true });
        assert_eq!(spelling(Some(&json!({"type": "ByteLevel"}))), Spelling::ByteLevel);
        assert_eq!(spelling(None), Spelling::Verbatim);
    }
}
