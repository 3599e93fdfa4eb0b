//! The one shape of every error body. Which status goes with it is decided in `http::error`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `{"error": {...}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorObject,
}

/// All four keys are always present.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorObject {
    /// A sentence for people.
    pub message: String,
    /// The class: `invalid_request_error`, `rate_limit_error`, `server_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The top-level request field at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<String>,
}
