//! `/v1/embeddings`: the request.

use schemars::{JsonSchema, Schema};
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
    /// What to embed.
    #[schemars(schema_with = "prompt_forms")]
    pub input: Prompt,
}

fn fields_not_kept(schema: &mut Schema) {
    if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        fields.insert("encoding_format".to_owned(), json!({"enum": ["float", "base64", null]}));
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
        const FORMAT: &str = "encoding_format";
        let mut fields = Fields::parse(body)?;
        let input = fields.take_raw(INPUT).ok_or_else(|| BodyError::missing(INPUT))?;
        let request = Self { model: fields.take("model")?, input: Prompt::read(INPUT, &input)? };
        let format: Option<String> = fields.take(FORMAT)?;
        if format.is_some_and(|format| !["float", "base64"].contains(&format.as_str())) {
            return Err(BodyError::invalid(FORMAT, format!("'{FORMAT}' must be float or base64.")));
        }
        fields.refuse("dimensions", &[])?;
        fields.accept(&["user"]);
        fields.finish(strict)?;
        Ok(request)
    }
}
