//! What the tokenizer test programs share: sources made from a `tokenizer.json`, and vectors of text and ids.

use std::path::Path;

use bitnet_core::{
    TokenId, Tokenizer,
    checkpoint::{GgufVocabulary, TokenizerSource},
    tokenizer::EncodeOptions,
};
use serde_json::Value;

/// A text and the ids it must become.
#[derive(Debug, serde::Deserialize)]
pub struct Vector {
    /// The text.
    pub text: String,
    /// Its ids, without BOS.
    pub ids: Vec<u32>,
}

/// Reads JSON.
///
/// # Panics
/// When the file is missing or of another shape, naming it.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The same tokenizer from its file and from a GGUF vocabulary made of it, each with a name for messages.
///
/// # Panics
/// When the file is missing or no tokenizer.
pub fn both_sources(json_path: &Path, bos: u32) -> [(&'static str, Tokenizer); 2] {
    let json = std::fs::read(json_path).expect("tokenizer.json can be read");
    let gguf = gguf_vocabulary(&serde_json::from_slice(&json).expect("tokenizer.json is JSON"), bos);
    let json = TokenizerSource::HuggingFace { json, bos: Some(TokenId(bos)) };
    let build = |source: &TokenizerSource| Tokenizer::from_source(source).expect("the tokenizer is built");
    [("tokenizer.json", build(&json)), ("GGUF vocabulary", build(&TokenizerSource::Gguf(gguf)))]
}

/// What a GGUF converter would write for this `tokenizer.json`.
///
/// # Panics
/// When it has another shape.
pub fn gguf_vocabulary(json: &Value, bos: u32) -> GgufVocabulary {
    let added = json["added_tokens"].as_array().expect("added tokens").iter();
    let added = added.map(|token| (token["content"].as_str().expect("content"), &token["id"], 3));
    let vocab = json["model"]["vocab"].as_object().expect("a vocabulary").iter();
    let mut tokens: Vec<(u64, &str, i32)> = vocab
        .map(|(text, id)| (text.as_str(), id, 1))
        .chain(added)
        .map(|(text, id, token_type)| (id.as_u64().expect("an id"), text, token_type))
        .collect();
    tokens.sort_unstable();
    GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some("llama-bpe".to_owned()),
        tokens: tokens.iter().map(|(_, text, _)| (*text).to_owned()).collect(),
        token_types: tokens.iter().map(|(_, _, token_type)| *token_type).collect(),
        merges: json["model"]["merges"].as_array().expect("merges").iter().map(merge_line).collect(),
        bos: Some(TokenId(bos)),
        add_bos: true,
        ..GgufVocabulary::default()
    }
}

fn merge_line(merge: &Value) -> String {
    match merge.as_str() {
        Some(line) => line.to_owned(),
        None => format!("{} {}", merge[0].as_str().expect("left"), merge[1].as_str().expect("right")),
    }
}

/// Every text gives its ids, and ids give back the text.
///
/// # Panics
/// When one does not.
pub fn check_vectors(name: &str, tokenizer: &Tokenizer, vectors: &[Vector]) {
    let options = EncodeOptions { add_special_tokens: false, parse_special: true };
    for Vector { text, ids } in vectors {
        let got = raw(&tokenizer.encode(text, options).expect("encodes"));
        assert_eq!(&got, ids, "{name}: {text:?}");
        assert_eq!(&tokenizer.decode(&typed(ids), false), text, "{name}: decoding {ids:?}");
    }
}

/// Ids as plain numbers.
pub fn raw(ids: &[TokenId]) -> Vec<u32> {
    ids.iter().map(|id| id.0).collect()
}

/// Plain numbers as ids.
pub fn typed(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}
