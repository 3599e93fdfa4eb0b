//! `GET /v1/models`.

use schemars::JsonSchema;
use serde::Serialize;

/// The list of served models.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ModelList {
    /// Always `list`.
    #[schemars(extend("const" = "list"))]
    pub object: &'static str,
    /// The models.
    pub data: Vec<ModelObject>,
}

/// One served model. Clients need the first four keys; the others are this server's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ModelObject {
    /// The name requests use.
    pub id: String,
    /// Always `model`.
    #[schemars(extend("const" = "model"))]
    pub object: &'static str,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
    /// Always `bitnet`.
    pub owned_by: &'static str,
    /// Tokens of prompt and completion together.
    pub max_model_len: usize,
    /// Other names that work.
    pub aliases: Vec<String>,
    /// What people should know about the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}
