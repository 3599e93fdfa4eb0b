//! `/v1/embeddings`: request and answer.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Prompt,
    completions::prompt_forms,
    fields::{BodyError, Fields},
};

/// A request as sent.
#[derive(Clone, Debug, JsonSchema)]
#[schemars(transform = fields_not_kept)]
pub struct EmbeddingRequest {
    /// The model's name.
    pub model: Option<String>,
    /// What to embed, at most 2048 texts.
    #[schemars(schema_with = "prompt_forms")]
    pub input: Prompt,
    /// How vectors are written.
    #[schemars(with = "Option<EncodingFormat>")]
    pub encoding_format: EncodingFormat,
    /// Orders the caller's own waiting requests, lower first.
    pub priority: Option<i64>,
}

/// How a vector is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EncodingFormat {
    /// An array of numbers.
    #[default]
    Float,
    /// The bytes of its float32 numbers, little-endian.
    Base64,
}

fn fields_not_kept(schema: &mut Schema) {
    if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        fields.insert("user".to_owned(), json!({"description": "Accepted; it changes nothing."}));
    }
}

impl EmbeddingRequest {
    /// Reads a body; with `strict`, unknown fields are errors.
    ///
    /// # Errors
    /// [`BodyError`], naming the field.
    pub fn from_json(body: &[u8], strict: bool) -> Result<Self, BodyError> {
        const INPUT: &str = "input";
        let mut fields = Fields::parse(body)?;
        let input = fields.take_raw(INPUT).ok_or_else(|| BodyError::missing(INPUT))?;
        let request = Self {
            model: fields.take("model")?,
            input: Prompt::read(INPUT, &input)?,
            encoding_format: fields.take("encoding_format")?.unwrap_or_default(),
            priority: fields.take("priority")?,
        };
        // A vector of this model cut short would be another model's.
        fields.refuse("dimensions", &[])?;
        fields.accept(&["user"]);
        fields.finish(strict)?;
        Ok(request)
    }
}

/// The answer.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct EmbeddingList {
    /// Always `list`.
    #[schemars(extend("const" = "list"))]
    pub object: &'static str,
    /// One for each input, in its order.
    pub data: Vec<EmbeddingObject>,
    /// The served model.
    pub model: String,
    /// What was read.
    pub usage: EmbeddingUsage,
}

/// The vector of one input.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct EmbeddingObject {
    /// Always `embedding`.
    #[schemars(extend("const" = "embedding"))]
    pub object: &'static str,
    /// Which input.
    pub index: usize,
    /// Of length 1.
    pub embedding: EmbeddingVector,
}

/// A vector in one of the two forms.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum EmbeddingVector {
    /// Its numbers.
    Numbers(Vec<f32>),
    /// Their bytes.
    Base64(String),
}

/// `usage` of an [`EmbeddingList`].
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct EmbeddingUsage {
    /// Tokens of all inputs.
    pub prompt_tokens: usize,
    /// The same: nothing is generated.
    pub total_tokens: usize,
}

impl EmbeddingVector {
    /// `vector` in `format`.
    pub fn new(vector: Vec<f32>, format: EncodingFormat) -> Self {
        match format {
            EncodingFormat::Float => Self::Numbers(vector),
            EncodingFormat::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
                Self::Base64(BASE64_STANDARD.encode(bytes))
            }
        }
    }
}
