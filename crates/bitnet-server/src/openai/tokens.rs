//! `/tokenize`, `/detokenize`, `/apply-template`, by vLLM's and by llama-server's field names.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Serialize;

use super::{
    Message,
    fields::{BodyError, Fields},
};

/// `POST /tokenize`.
#[derive(Clone, Debug)]
pub struct TokenizeRequest {
    /// The model's name.
    pub model: Option<String>,
    /// What to tokenize.
    pub input: TokenizeInput,
}

/// The two forms of a tokenize request.
#[derive(Clone, Debug)]
pub enum TokenizeInput {
    /// A text, read as `/v1/completions` reads it.
    Text {
        /// The text.
        text: String,
        /// Put BOS in front if the model's rule says so.
        add_special_tokens: bool,
    },
    /// A conversation, through the chat template.
    Messages {
        /// The messages.
        messages: Vec<Message>,
        /// End with the opening of the assistant's turn.
        add_generation_prompt: bool,
    },
}

/// `POST /apply-template`.
#[derive(Clone, Debug, JsonSchema)]
pub struct ApplyTemplateRequest {
    /// The model's name.
    pub model: Option<String>,
    /// The conversation.
    #[schemars(length(min = 1))]
    pub messages: Vec<Message>,
    /// End with the opening of the assistant's turn.
    #[schemars(with = "Option<bool>")]
    pub add_generation_prompt: bool,
}

/// `POST /detokenize`.
#[derive(Clone, Debug, JsonSchema)]
pub struct DetokenizeRequest {
    /// The model's name.
    pub model: Option<String>,
    /// The ids.
    pub tokens: Vec<u32>,
}

impl TokenizeRequest {
    /// Reads a body; with `strict`, unknown fields are errors.
    ///
    /// # Errors
    /// [`BodyError`], naming the field.
    pub fn from_json(body: &[u8], strict: bool) -> Result<Self, BodyError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.take("model")?;
        let text = fields.take("prompt")?;
        let text = text.or(fields.take("content")?);
        let add_special_tokens = fields.take("add_special_tokens")?;
        let add_special_tokens = add_special_tokens.or(fields.take("add_special")?).unwrap_or(true);
        let add_generation_prompt = fields.take("add_generation_prompt")?.unwrap_or(true);
        let input = match (text, fields.take("messages")?) {
            (Some(text), None) => TokenizeInput::Text { text, add_special_tokens },
            (None, Some(messages)) => TokenizeInput::Messages { messages, add_generation_prompt },
            (None, None) => return Err(BodyError::missing("prompt")),
            (Some(_), Some(_)) => return Err(BodyError::invalid("messages", "Give 'prompt' or 'messages', not both.")),
        };
        fields.finish(strict)?;
        Ok(Self { model, input })
    }
}

/// Both forms, by both servers' names.
impl JsonSchema for TokenizeRequest {
    fn schema_name() -> Cow<'static, str> {
        "TokenizeRequest".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let text = generator.subschema_for::<Option<String>>();
        let flag = generator.subschema_for::<Option<bool>>();
        let message = generator.subschema_for::<Message>();
        json_schema!({
            "type": "object",
            "properties": {
                "model": text, "prompt": text, "content": text,
                "add_special_tokens": flag, "add_special": flag, "add_generation_prompt": flag,
                "messages": {"type": ["array", "null"], "items": message, "minItems": 1},
            },
            "anyOf": [{"required": ["prompt"]}, {"required": ["content"]}, {"required": ["messages"]}],
        })
    }
}

impl ApplyTemplateRequest {
    /// Reads a body; with `strict`, unknown fields are errors.
    ///
    /// # Errors
    /// [`BodyError`], naming the field.
    pub fn from_json(body: &[u8], strict: bool) -> Result<Self, BodyError> {
        let mut fields = Fields::parse(body)?;
        let request = Self {
            model: fields.take("model")?,
            messages: fields.require("messages")?,
            add_generation_prompt: fields.take("add_generation_prompt")?.unwrap_or(true),
        };
        fields.finish(strict)?;
        Ok(request)
    }
}

impl DetokenizeRequest {
    /// Reads a body; with `strict`, unknown fields are errors.
    ///
    /// # Errors
    /// [`BodyError`], naming the field.
    pub fn from_json(body: &[u8], strict: bool) -> Result<Self, BodyError> {
        let mut fields = Fields::parse(body)?;
        let request = Self { model: fields.take("model")?, tokens: fields.require("tokens")? };
        fields.finish(strict)?;
        Ok(request)
    }
}

/// The answer of `/tokenize`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct TokenizeResponse {
    /// The ids.
    pub tokens: Vec<u32>,
    /// How many.
    pub count: usize,
    /// Tokens the context holds.
    pub max_model_len: usize,
}

/// The answer of `/detokenize`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct DetokenizeResponse {
    /// The text.
    pub prompt: String,
    /// The text by llama-server's name.
    pub content: String,
}

/// The answer of `/apply-template`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct TemplateResponse {
    /// The conversation as the model reads it.
    pub prompt: String,
}
