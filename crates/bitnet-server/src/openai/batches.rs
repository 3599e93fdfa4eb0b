//! `/v1/batches`: a batch as it is told, and the lines of its files.

use indexmap::IndexMap;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};

use super::{
    fields::{BodyError, Fields},
    objects::objects_only,
    params::{metadata, metadata_form},
};

/// `POST /v1/batches`.
#[derive(Clone, Debug, JsonSchema)]
#[schemars(transform = window)]
pub struct BatchRequest {
    /// The uploaded lines.
    pub input_file_id: String,
    /// Where they go.
    pub endpoint: BatchEndpoint,
    /// What the caller notes down.
    #[schemars(with = "Option<Value>", transform = metadata_form)]
    pub metadata: Option<IndexMap<String, String>>,
}

/// Where the lines of a batch go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum BatchEndpoint {
    /// Chat.
    #[serde(rename = "/v1/chat/completions")]
    Chat,
    /// Text.
    #[serde(rename = "/v1/completions")]
    Completions,
    /// Responses.
    #[serde(rename = "/v1/responses")]
    Responses,
    /// Embeddings.
    #[serde(rename = "/v1/embeddings")]
    Embeddings,
}

impl BatchRequest {
    /// Reads a body; with `strict`, unknown fields are errors.
    ///
    /// # Errors
    /// [`BodyError`], naming the field.
    pub fn from_json(body: &[u8], strict: bool) -> Result<Self, BodyError> {
        const WINDOW: &str = "completion_window";
        let mut fields = Fields::parse(body)?;
        let request = Self {
            input_file_id: fields.require("input_file_id")?,
            endpoint: fields.require("endpoint")?,
            metadata: metadata(&mut fields)?,
        };
        if fields.require::<String>(WINDOW)? != COMPLETION_WINDOW {
            return Err(BodyError::invalid(WINDOW, format!("'{WINDOW}' must be {COMPLETION_WINDOW}.")));
        }
        fields.refuse("output_expires_after", &[])?;
        fields.finish(strict)?;
        Ok(request)
    }
}

/// `completion_window` is checked and not kept.
fn window(schema: &mut Schema) {
    if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        fields.insert("completion_window".to_owned(), json!({"const": COMPLETION_WINDOW}));
    }
    schema.insert("required".to_owned(), json!(["input_file_id", "endpoint", "completion_window"]));
}

/// The only window there is; a batch of this server takes the time it takes.
const COMPLETION_WINDOW: &str = "24h";

/// A batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BatchObject {
    /// `batch_...`.
    pub id: String,
    /// Always `batch`.
    #[serde(skip_deserializing, default = "batch")]
    pub object: &'static str,
    /// Where its lines go.
    pub endpoint: BatchEndpoint,
    /// Why it failed.
    pub errors: Option<BatchErrors>,
    /// Its lines.
    pub input_file_id: String,
    /// `24h`.
    #[serde(skip_deserializing, default = "completion_window")]
    pub completion_window: &'static str,
    /// How far it is.
    pub status: BatchStatus,
    /// Answers, once it has ended and if there are any.
    pub output_file_id: Option<String>,
    /// Answers that are errors, once it has ended and if there are any.
    pub error_file_id: Option<String>,
    /// Seconds since 1970.
    pub created_at: u64,
    /// When its lines were found well.
    pub in_progress_at: Option<u64>,
    /// Always null: batches do not expire here.
    #[serde(skip_deserializing)]
    pub expires_at: Option<u64>,
    /// When the last line was answered.
    pub finalizing_at: Option<u64>,
    /// When it was complete.
    pub completed_at: Option<u64>,
    /// When it failed.
    pub failed_at: Option<u64>,
    /// Always null.
    #[serde(skip_deserializing)]
    pub expired_at: Option<u64>,
    /// When somebody cancelled it.
    pub cancelling_at: Option<u64>,
    /// When it was cancelled.
    pub cancelled_at: Option<u64>,
    /// Lines.
    pub request_counts: RequestCounts,
    /// Tokens of the lines that are answered.
    #[serde(default)]
    pub usage: BatchUsage,
    /// What the caller noted down.
    pub metadata: Option<IndexMap<String, String>>,
}

fn batch() -> &'static str {
    "batch"
}

fn completion_window() -> &'static str {
    COMPLETION_WINDOW
}

impl BatchObject {
    /// A batch of which nothing has happened yet.
    pub fn new(id: String, request: BatchRequest, created_at: u64) -> Self {
        Self {
            id,
            object: batch(),
            endpoint: request.endpoint,
            errors: None,
            input_file_id: request.input_file_id,
            completion_window: COMPLETION_WINDOW,
            status: BatchStatus::Validating,
            output_file_id: None,
            error_file_id: None,
            created_at,
            in_progress_at: None,
            expires_at: None,
            finalizing_at: None,
            completed_at: None,
            failed_at: None,
            expired_at: None,
            cancelling_at: None,
            cancelled_at: None,
            request_counts: RequestCounts::default(),
            usage: BatchUsage::default(),
            metadata: request.metadata,
        }
    }
}

/// How far a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BatchStatus {
    /// Its lines are being looked at.
    Validating,
    /// They are not what they should be, or there was no room for the answers.
    Failed,
    /// Its lines are being answered.
    InProgress,
    /// Its files are being closed.
    Finalizing,
    /// Every line has its answer.
    Completed,
    /// Somebody cancelled it; lines under way come to their end.
    Cancelling,
    /// It ended early.
    Cancelled,
}

impl BatchStatus {
    /// Whether nothing can change any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Cancelled)
    }
}

/// Lines of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RequestCounts {
    /// All.
    pub total: u64,
    /// Answered.
    pub completed: u64,
    /// Answered with an error.
    pub failed: u64,
}

/// Tokens of a batch, or of one answer by the names of any endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct BatchUsage {
    /// Of prompts.
    #[serde(alias = "prompt_tokens")]
    pub input_tokens: u64,
    /// Of them.
    #[serde(alias = "prompt_tokens_details")]
    pub input_tokens_details: BatchInputDetails,
    /// Generated.
    #[serde(alias = "completion_tokens")]
    pub output_tokens: u64,
    /// Of them.
    #[serde(skip_deserializing)]
    pub output_tokens_details: BatchOutputDetails,
    /// Both.
    pub total_tokens: u64,
}

/// Of a batch's prompts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct BatchInputDetails {
    /// Found in the prefix cache.
    pub cached_tokens: u64,
}

/// Of what a batch generated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BatchOutputDetails {
    /// Always 0.
    pub reasoning_tokens: u64,
}

impl std::ops::AddAssign for BatchUsage {
    fn add_assign(&mut self, other: Self) {
        self.input_tokens += other.input_tokens;
        self.input_tokens_details.cached_tokens += other.input_tokens_details.cached_tokens;
        self.output_tokens += other.output_tokens;
        self.total_tokens += other.total_tokens;
    }
}

/// `errors` of a batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BatchErrors {
    /// Always `list`.
    #[serde(skip_deserializing, default = "list")]
    pub object: &'static str,
    /// The errors.
    pub data: Vec<BatchError>,
}

fn list() -> &'static str {
    "list"
}

impl BatchErrors {
    /// A list of `data`.
    pub fn new(data: Vec<BatchError>) -> Self {
        Self { object: list(), data }
    }
}

/// What is wrong with a line, or with the batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BatchError {
    /// A word for programs.
    pub code: String,
    /// A sentence for people.
    pub message: String,
    /// The field of the line.
    pub param: Option<String>,
    /// The line, from 1.
    pub line: Option<u64>,
}

objects_only!(InputLine);

/// One line of an input file.
#[derive(Clone, Debug, Deserialize)]
#[serde(remote = "Self")]
pub struct InputLine {
    /// What tells its answer from the others.
    pub custom_id: String,
    /// Always `POST`.
    pub method: String,
    /// Where it goes.
    pub url: BatchEndpoint,
    /// The request.
    pub body: Box<RawValue>,
}

/// One line of an output or error file.
#[derive(Clone, Debug, Serialize)]
pub struct OutputLine<'a> {
    /// `batch_req_...`.
    pub id: String,
    /// The one of the input line.
    pub custom_id: &'a str,
    /// What a caller would have got.
    pub response: LineResponse,
    /// Always null: an answer that is an error is an answer.
    pub error: Option<()>,
}

/// The answer of a line.
#[derive(Clone, Debug, Serialize)]
pub struct LineResponse {
    /// HTTP's.
    pub status_code: u16,
    /// As in logs.
    pub request_id: String,
    /// The body.
    pub body: Box<RawValue>,
}

/// What of an output line says that its input line is done, and what it took.
#[derive(Clone, Debug, Deserialize)]
pub struct AnsweredLine {
    /// The one of the input line.
    pub custom_id: String,
    /// The answer.
    #[serde(default)]
    response: AnsweredResponse,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct AnsweredResponse {
    body: Option<AnsweredBody>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct AnsweredBody {
    usage: Option<BatchUsage>,
}

impl AnsweredLine {
    /// The tokens it took; an error took none.
    pub fn usage(&self) -> BatchUsage {
        self.response.body.as_ref().and_then(|body| body.usage).unwrap_or_default()
    }
}
