//! `/v1/completions`: request and answer. Streamed and whole answers have the same shape.

use indexmap::IndexMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Serialize;
use serde_json::value::RawValue;

use super::{
    FinishReason, Params, Usage,
    fields::{BodyError, Fields, read},
};

/// A request as sent.
#[derive(Clone, Debug, JsonSchema)]
pub struct CompletionRequest {
    /// The model's name.
    pub model: Option<String>,
    /// What to continue.
    #[schemars(schema_with = "prompt_forms")]
    pub prompt: Prompt,
    /// Put the prompt before the completion.
    #[schemars(with = "Option<bool>")]
    pub echo: bool,
    /// Alternatives a token.
    #[schemars(range(max = 20))]
    pub logprobs: Option<u64>,
    /// Choices to generate, of which the `n` best are told.
    #[schemars(range(min = 1))]
    pub best_of: Option<u64>,
    /// The shared parameters.
    #[schemars(flatten)]
    pub params: Params,
}

/// The four forms of `prompt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// One text, or several.
    Texts(Vec<String>),
    /// Token ids of one prompt, or of several.
    Tokens(Vec<Vec<u32>>),
}

impl CompletionRequest {
    /// Reads a body; with `strict`, unknown fields are errors.
    ///
    /// # Errors
    /// [`BodyError`], naming the field.
    pub fn from_json(body: &[u8], strict: bool) -> Result<Self, BodyError> {
        let mut fields = Fields::parse(body)?;
        let prompt = fields.take_raw("prompt").ok_or_else(|| BodyError::missing("prompt"))?;
        let request = Self {
            model: fields.take("model")?,
            prompt: Prompt::read("prompt", &prompt)?,
            echo: fields.take("echo")?.unwrap_or(false),
            logprobs: fields.take("logprobs")?,
            best_of: fields.take("best_of")?,
            params: Params::take(&mut fields)?,
        };
        fields.refuse("suffix", &[r#""""#])?;
        fields.finish(strict)?;
        Ok(request)
    }
}

impl Prompt {
    /// Prompts in the request.
    pub fn len(&self) -> usize {
        match self {
            Self::Texts(texts) => texts.len(),
            Self::Tokens(prompts) => prompts.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Token ids must be inside a vocabulary of `vocab_size`.
    ///
    /// # Errors
    /// A sentence that names the first one that is not.
    pub fn check_ids(&self, vocab_size: usize) -> Result<(), String> {
        let Self::Tokens(prompts) = self else { return Ok(()) };
        match prompts.iter().flatten().find(|id| **id as usize >= vocab_size) {
            Some(id) => Err(format!("Token id {id} is outside the vocabulary of {vocab_size} ids.")),
            None => Ok(()),
        }
    }

    /// The first two characters tell the form, so that a long list of ids is read once and into integers.
    pub(super) fn read(name: &str, raw: &RawValue) -> Result<Self, BodyError> {
        let mut start = raw.get().bytes().filter(|byte| !byte.is_ascii_whitespace());
        match (start.next(), start.next()) {
            (Some(b'"'), _) => Ok(Self::Texts(vec![read(name, raw)?])),
            (Some(b'['), Some(b'[')) => Ok(Self::Tokens(read(name, raw)?)),
            (Some(b'['), Some(b'"' | b']')) => Ok(Self::Texts(read(name, raw)?)),
            (Some(b'['), Some(b'0'..=b'9' | b'-')) => Ok(Self::Tokens(vec![read(name, raw)?])),
            _ => Err(BodyError::invalid(
                name,
                format!(
                    "'{name}' must be a string, an array of strings, an array of token ids or an array of such arrays."
                ),
            )),
        }
    }
}

/// What [`Prompt::read`] takes.
pub(super) fn prompt_forms(generator: &mut SchemaGenerator) -> Schema {
    let ids = generator.subschema_for::<Vec<u32>>();
    json_schema!({"anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "array", "items": ids, "minItems": 1},
    ]})
}

/// The answer, or one event of its stream.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Completion {
    /// `cmpl-...`, the same throughout a stream.
    pub id: String,
    /// Always `text_completion`.
    #[schemars(extend("const" = "text_completion"))]
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model.
    pub model: String,
    /// One a choice; in a stream the one that has news.
    pub choices: Vec<CompletionChoice>,
    /// Which weights, kernel and version answered.
    pub system_fingerprint: String,
    /// Outer `None`: no such key; inner `None`: `null`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// One choice.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct CompletionChoice {
    /// The text.
    pub text: String,
    /// `prompt * n + k`.
    pub index: usize,
    /// Log-probabilities if asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// Why it ended; `null` until then.
    pub finish_reason: Option<FinishReason>,
    /// Ids generated, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Ids of the prompt, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// Log-probabilities in the columns of the completions API.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
pub struct CompletionLogprobs {
    /// Each token's text.
    pub tokens: Vec<String>,
    /// Each token's log-probability; the first of a prompt has none.
    pub token_logprobs: Vec<Option<f32>>,
    /// The best alternatives, best first; null where nothing was predicted.
    pub top_logprobs: Vec<Option<IndexMap<String, f32>>>,
    /// Where each token starts in the text, in characters.
    pub text_offset: Vec<usize>,
}
