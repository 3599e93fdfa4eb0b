//! `/v1/embeddings`: the request.

use super::{
    Prompt,
    fields::{BodyError, Fields},
};

/// A request as sent.
#[derive(Clone, Debug)]
pub struct EmbeddingRequest {
    /// The model's name.
    pub model: Option<String>,
    /// What to embed.
    pub input: Prompt,
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
