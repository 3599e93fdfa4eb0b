//! The text side of a Hugging Face directory: tokenizer bytes, chat template, generation defaults. Nothing here builds a
//! tokenizer or renders a template.
//!
//! `tokenizer.json` is scanned once for the few tokens that have to be known by name; its vocabulary is passed over.

use std::{collections::HashMap, fmt, path::Path};

use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::{
    GenerationDefaults, LoadError, TokenizerSource,
    generation::{self, EndOfTurn},
    hugging_face::{read_file, read_json},
};
use crate::ids::TokenId;

/// Longest `tokenizer.json`; that of a vocabulary of 250,000 tokens has about 20 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// Longest `tokenizer_config.json` or template.
const MAX_TEXT_BYTES: u64 = 16 << 20;

/// Longest `generation_config.json`.
const MAX_GENERATION_BYTES: u64 = 128 << 10;

/// Most added tokens that are looked at.
const MAX_ADDED_TOKENS: usize = 65_536;

/// What the small files of the directory say.
pub(super) struct Text {
    pub(super) tokenizer: Option<TokenizerSource>,
    pub(super) chat_template: Option<String>,
    pub(super) generation: GenerationDefaults,
}

/// Reads them. `config_ends` and `config_bos` are what `config.json` says.
///
/// # Errors
/// When a file is there but is not what its name says.
pub(super) fn read(
    dir: &Path,
    config_ends: &[u64],
    config_bos: Option<u64>,
    vocab_size: usize,
    notes: &mut Vec<String>,
) -> Result<Text, LoadError> {
    let json = if_there(&dir.join("tokenizer.json"), |path| read_file(path, MAX_TOKENIZER_BYTES))?;
    let known = match &json {
        Some(json) => serde_json::from_slice::<KnownTokens>(json).map_err(|error| LoadError::Json {
            path: dir.join("tokenizer.json"),
            problem: format!("is not a tokenizer: {error}"),
        })?,
        None => KnownTokens::default(),
    };
    let config: TokenizerConfig =
        if_there(&dir.join("tokenizer_config.json"), |path| read_json(path, MAX_TEXT_BYTES))?.unwrap_or_default();
    let generation: Value =
        if_there(&dir.join("generation_config.json"), |path| read_json(path, MAX_GENERATION_BYTES))?
            .unwrap_or_default();

    let id_of = |token: &Option<String>| token.as_ref().and_then(|token| known.ids.get(token)).copied();
    let bos = id_of(&config.bos_token.0).or(config_bos).or_else(|| ids(&generation, "bos_token_id").first().copied());
    let mut ends = ids(&generation, "eos_token_id");
    ends.extend_from_slice(config_ends);
    ends.extend(id_of(&config.eos_token.0));
    ends.sort_unstable();
    ends.dedup();

    let template_file = if_there(&dir.join("chat_template.jinja"), |path| read_file(path, MAX_TEXT_BYTES))?;
    let chat_template =
        match template_file {
            Some(bytes) => Some(String::from_utf8(bytes).map_err(|_| LoadError::Json {
                path: dir.join("chat_template.jinja"),
                problem: "is not UTF-8".into(),
            })?),
            None => config.chat_template.0,
        };
    if json.is_none() {
        let sentence_piece = dir.join("tokenizer.model").exists();
        notes.push(match sentence_piece {
            true => {
                "no tokenizer.json, only tokenizer.model: convert it (AutoTokenizer.save_pretrained writes one)".into()
            }
            false => "no tokenizer.json: text cannot be read or written, only token ids".into(),
        });
    }
    let tokenizer = json.map(|json| TokenizerSource::HuggingFace { json, bos: inside(bos, vocab_size, notes) });
    let generation = generation::defaults(sampling(&generation), &ends, known.end_of_turn, vocab_size, notes);
    Ok(Text { tokenizer, chat_template, generation })
}

/// A token id, or a list of them.
pub(super) fn ids(json: &Value, key: &str) -> Vec<u64> {
    match json.get(key) {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
        Some(value) => value.as_u64().into_iter().collect(),
        None => Vec::new(),
    }
}

/// Reads `path`, or answers `None` when there is no such file.
fn if_there<T>(path: &Path, read: impl FnOnce(&Path) -> Result<T, LoadError>) -> Result<Option<T>, LoadError> {
    match read(path) {
        Ok(value) => Ok(Some(value)),
        Err(LoadError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn inside(id: Option<u64>, vocab_size: usize, notes: &mut Vec<String>) -> Option<TokenId> {
    let id = id?;
    let inside = u32::try_from(id).ok().filter(|_| id < vocab_size as u64);
    if inside.is_none() {
        notes.push(format!("dropped: beginning-of-sequence id {id} is outside the vocabulary"));
    }
    inside.map(TokenId)
}

/// `do_sample: false` is how a file asks for greedy decoding.
fn sampling(generation: &Value) -> generation::Sampling {
    let number = |key: &str| generation.get(key).and_then(Value::as_f64).map(|value| value as f32);
    let greedy = generation.get("do_sample").and_then(Value::as_bool) == Some(false);
    let top_k = generation.get("top_k").and_then(Value::as_u64).and_then(|top_k| u32::try_from(top_k).ok());
    generation::Sampling {
        temperature: if greedy { Some(0.0) } else { number("temperature") },
        top_p: number("top_p"),
        top_k,
    }
}

/// The keys of `tokenizer_config.json` that matter.
#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    bos_token: TokenText,
    eos_token: TokenText,
    chat_template: Template,
}

/// A token as a string or as an object with `content`.
#[derive(Default)]
struct TokenText(Option<String>);

/// A template as a string, or the one called `default` in a list of named ones.
#[derive(Default)]
struct Template(Option<String>);

#[derive(serde::Deserialize)]
struct WithContent {
    content: String,
}

#[derive(serde::Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl<'de> Deserialize<'de> for TokenText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = TokenText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a token")
            }

            fn visit_unit<E>(self) -> Result<TokenText, E> {
                Ok(TokenText(None))
            }

            fn visit_str<E>(self, text: &str) -> Result<TokenText, E> {
                Ok(TokenText(Some(text.into())))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<TokenText, A::Error> {
                let token = WithContent::deserialize(serde::de::value::MapAccessDeserializer::new(map))?;
                Ok(TokenText(Some(token.content)))
            }
        }
        deserializer.deserialize_any(Text)
    }
}

impl<'de> Deserialize<'de> for Template {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Template;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a chat template, or a list of named ones")
            }

            fn visit_unit<E>(self) -> Result<Template, E> {
                Ok(Template(None))
            }

            fn visit_str<E>(self, text: &str) -> Result<Template, E> {
                Ok(Template(Some(text.into())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Template, A::Error> {
                let mut default = None;
                while let Some(NamedTemplate { name, template }) = list.next_element()? {
                    if name == "default" {
                        default = Some(template);
                    }
                }
                Ok(Template(default))
            }
        }
        deserializer.deserialize_any(Text)
    }
}

/// The tokens of `tokenizer.json` that are known by name: the added ones, and the ends of a turn wherever they stand.
#[derive(Default)]
struct KnownTokens {
    ids: HashMap<String, u64>,
    end_of_turn: EndOfTurn,
}

#[derive(serde::Deserialize)]
struct AddedToken {
    id: u64,
    content: String,
}

impl<'de> Deserialize<'de> for KnownTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut known = Self::default();
        deserializer.deserialize_map(Scan { known: &mut known, level: Level::File })?;
        Ok(known)
    }
}

/// Walks through `tokenizer.json`, keeping only what [`KnownTokens`] wants.
struct Scan<'a> {
    known: &'a mut KnownTokens,
    level: Level,
}

/// Where in the file the walk is.
#[derive(Clone, Copy)]
enum Level {
    File,
    AddedTokens,
    Model,
    Vocabulary,
}

impl<'de> DeserializeSeed<'de> for Scan<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Scan<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a part of a tokenizer")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { known, level } = self;
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            let inner = match (level, &*key) {
                (Level::File, "added_tokens") => Level::AddedTokens,
                (Level::File, "model") => Level::Model,
                (Level::Model, "vocab") => Level::Vocabulary,
                (Level::Vocabulary, token) => {
                    known.end_of_turn.observe(token, map.next_value()?);
                    continue;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            map.next_value_seed(Scan { known, level: inner })?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        if !matches!(self.level, Level::AddedTokens) {
            // The vocabulary of a unigram model is a list.
            while list.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        }
        while let Some(AddedToken { id, content }) = list.next_element()? {
            self.known.end_of_turn.observe(&content, id);
            if self.known.ids.len() < MAX_ADDED_TOKENS {
                self.known.ids.insert(content, id);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_by_name_wherever_they_stand() {
        let json = r#"{"version":"1.0","added_tokens":[{"id":7,"content":"<s>","special":true}],
            "model":{"type":"BPE","vocab":{"a":0,"<|eot_id|>":3},"merges":["a b"]}}"#;
        let known: KnownTokens = serde_json::from_str(json).unwrap();
        assert_eq!(known.ids.get("<s>"), Some(&7));
        let generation =
            generation::defaults(generation::Sampling::default(), &[], known.end_of_turn, 10, &mut Vec::new());
        assert_eq!(generation.stop_tokens, [TokenId(3)]);
        let unigram = r#"{"added_tokens":null,"model":{"vocab":[["a",-1.5]]}}"#;
        assert!(serde_json::from_str::<KnownTokens>(unigram).is_ok());
    }

    #[test]
    fn tokens_and_templates_come_in_two_forms() {
        let config = |json: &str| serde_json::from_str::<TokenizerConfig>(json).unwrap();
        let plain = config(r#"{"bos_token":"<s>","eos_token":null,"chat_template":"x","unknown":[1]}"#);
        assert_eq!(
            (plain.bos_token.0.as_deref(), plain.eos_token.0, plain.chat_template.0.as_deref()),
            (Some("<s>"), None, Some("x"))
        );
        let rich = config(
            r#"{"bos_token":{"content":"<s>","lstrip":false},
            "chat_template":[{"name":"tool_use","template":"t"},{"name":"default","template":"d"}]}"#,
        );
        assert_eq!((rich.bos_token.0.as_deref(), rich.chat_template.0.as_deref()), (Some("<s>"), Some("d")));
    }

    #[test]
    fn do_sample_false_is_temperature_zero() {
        let read = |json: &str| sampling(&serde_json::from_str(json).unwrap());
        assert_eq!(read(r#"{"do_sample":false,"temperature":0.6}"#).temperature, Some(0.0));
        assert_eq!(read(r#"{"temperature":0.6,"top_k":50}"#).temperature, Some(0.6));
        assert_eq!(read("{}").temperature, None);
        assert_eq!(ids(&serde_json::json!({"eos": [1, 2], "bos": 3}), "eos"), [1, 2]);
    }
}
