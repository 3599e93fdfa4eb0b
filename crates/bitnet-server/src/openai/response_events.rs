//! `/v1/responses`: the answer, and the events of its stream.

use schemars::JsonSchema;
use serde::Serialize;

use super::{ChatTokenLogprob, ResponseEcho, Usage};

/// The answer; in a stream, what is known of it so far.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ResponseObject {
    /// `resp_...`, the same throughout a stream.
    pub id: String,
    /// Always `response`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created_at: u64,
    /// How far it is.
    pub status: ResponseStatus,
    /// Always false.
    pub background: bool,
    /// Why it failed.
    pub error: Option<ResponseError>,
    /// Why it is not complete.
    pub incomplete_details: Option<IncompleteDetails>,
    /// The served model.
    pub model: String,
    /// Messages and calls, in order.
    pub output: Vec<OutputItem>,
    /// Always null: nothing is kept.
    pub previous_response_id: Option<String>,
    /// Always `default`.
    pub service_tier: &'static str,
    /// Always false: nothing is kept.
    pub store: bool,
    /// As used.
    pub temperature: f32,
    /// As used.
    pub top_p: f32,
    /// Token counts, at the end.
    pub usage: Option<ResponseUsage>,
    /// Which weights, kernel and version answered.
    pub system_fingerprint: String,
    /// What the request said.
    #[serde(flatten)]
    pub echo: ResponseEcho,
}

/// How far a response or an item of it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseStatus {
    /// More may follow.
    InProgress,
    /// It ended by itself.
    Completed,
    /// Something cut it short.
    Incomplete,
    /// It ended with an error.
    Failed,
}

/// `error` of a failed response.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ResponseError {
    /// A word for programs.
    pub code: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// `incomplete_details`.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct IncompleteDetails {
    /// `max_output_tokens` or `content_filter`.
    pub reason: &'static str,
}

/// One item of the output.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    /// What the assistant says.
    Message {
        /// `msg_...`.
        id: String,
        /// How far it is.
        status: ResponseStatus,
        /// Always `assistant`.
        role: &'static str,
        /// None or one part.
        content: Vec<OutputText>,
    },
    /// A call of a function.
    FunctionCall {
        /// `fc_...`.
        id: String,
        /// How far it is.
        status: ResponseStatus,
        /// `call_...`: the result names it.
        call_id: String,
        /// The function.
        name: String,
        /// JSON.
        arguments: String,
    },
}

impl OutputItem {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Message { id, .. } | Self::FunctionCall { id, .. } => id,
        }
    }
}

/// A part of a message.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
#[serde(tag = "type", rename = "output_text")]
pub struct OutputText {
    /// What is said.
    pub text: String,
    /// Always empty; clients demand the key.
    pub annotations: [(); 0],
    /// One entry a token, if asked for.
    pub logprobs: Vec<ChatTokenLogprob>,
}

/// `usage` by the names of this API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ResponseUsage {
    /// Tokens of the prompt.
    pub input_tokens: usize,
    /// What they were.
    pub input_tokens_details: InputTokensDetails,
    /// Tokens generated.
    pub output_tokens: usize,
    /// What they were.
    pub output_tokens_details: OutputTokensDetails,
    /// The sum of both.
    pub total_tokens: usize,
}

/// `usage.input_tokens_details`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct InputTokensDetails {
    /// Tokens that came from the prefix cache.
    pub cached_tokens: usize,
    /// Always 0: the cache costs nothing; clients demand the key.
    pub cache_write_tokens: usize,
}

/// `usage.output_tokens_details`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct OutputTokensDetails {
    /// Always 0.
    pub reasoning_tokens: usize,
}

impl From<Usage> for ResponseUsage {
    fn from(usage: Usage) -> Self {
        let cached_tokens = usage.prompt_tokens_details.cached_tokens;
        Self {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputTokensDetails { cached_tokens, cache_write_tokens: 0 },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputTokensDetails { reasoning_tokens: 0 },
            total_tokens: usage.total_tokens,
        }
    }
}

/// One event of a stream.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ResponseEvent {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// 0, 1, ... without gaps.
    pub sequence_number: u64,
    /// What it says.
    #[serde(flatten)]
    pub body: ResponseEventBody,
}

/// What an event says, by its kind.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum ResponseEventBody {
    /// The response as it is now.
    Response {
        /// The response.
        response: Box<ResponseObject>,
    },
    /// An item begins or ends.
    Item {
        /// Its place.
        output_index: usize,
        /// The item.
        item: OutputItem,
    },
    /// A part begins or ends.
    Part {
        /// Of which item.
        #[serde(flatten)]
        place: PartPlace,
        /// The part.
        part: OutputText,
    },
    /// More text.
    TextDelta {
        /// Of which part.
        #[serde(flatten)]
        place: PartPlace,
        /// The text.
        delta: String,
        /// Of the new tokens, if asked for.
        logprobs: Vec<ChatTokenLogprob>,
        /// Random characters, if asked for.
        #[serde(skip_serializing_if = "Option::is_none")]
        obfuscation: Option<String>,
    },
    /// All of the text.
    TextDone {
        /// Of which part.
        #[serde(flatten)]
        place: PartPlace,
        /// The text.
        text: String,
        /// Of all tokens, if asked for.
        logprobs: Vec<ChatTokenLogprob>,
    },
    /// More of the arguments of a call.
    ArgumentsDelta {
        /// The call.
        item_id: String,
        /// Its place.
        output_index: usize,
        /// The piece.
        delta: String,
        /// Random characters, if asked for.
        #[serde(skip_serializing_if = "Option::is_none")]
        obfuscation: Option<String>,
    },
    /// All of the arguments of a call.
    ArgumentsDone {
        /// The call.
        item_id: String,
        /// Its place.
        output_index: usize,
        /// The function.
        name: String,
        /// The arguments.
        arguments: String,
    },
}

/// Where a part of a message is.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct PartPlace {
    /// The message.
    pub item_id: String,
    /// Its place.
    pub output_index: usize,
    /// The part's place in it: always 0.
    pub content_index: usize,
}
