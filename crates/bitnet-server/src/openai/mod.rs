//! The wire: what OpenAI-compatible clients send and read, as serde types and nothing else.
//!
//! First and last station of the data path: request bytes become [`ChatCompletionRequest`] or [`CompletionRequest`] here,
//! and answers leave as the response types. Ranges, defaults and meaning are the service's; status codes are http's.

mod batches;
mod chat;
mod completions;
mod embeddings;
mod error;
mod fields;
mod files;
mod models;
mod objects;
mod output;
mod params;
mod response_events;
mod responses;
mod tokens;
mod tools;

pub use batches::{
    AnsweredLine, BatchEndpoint, BatchError, BatchErrors, BatchObject, BatchRequest, BatchStatus, BatchUsage,
    InputLine, LineResponse, OutputLine, RequestCounts,
};
pub use chat::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatCompletionRequest, ChatLogprobs, ChatTokenLogprob,
    Content, ContentPart, Delta, FunctionCall, Message, PromptOptions, ResponseMessage, Role, ToolCall, TopLogprob,
};
pub use completions::{Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Prompt};
pub use embeddings::{
    EmbeddingList, EmbeddingObject, EmbeddingRequest, EmbeddingUsage, EmbeddingVector, EncodingFormat,
};
pub use error::{ErrorBody, ErrorObject};
pub use fields::{BodyError, BodyErrorKind};
pub use files::{Deleted, FileObject, FilePurpose, Page, PageQuery};
pub use models::{ModelList, ModelObject};
pub use output::{OutputFormat, OutputKind};
pub use params::{Params, Stop};
pub use response_events::{
    IncompleteDetails, InputTokensDetails, OutputItem, OutputText, OutputTokensDetails, PartPlace, ResponseError,
    ResponseEvent, ResponseEventBody, ResponseObject, ResponseStatus, ResponseUsage,
};
pub use responses::{ResponseEcho, ResponseRequest, Truncation};
pub use tokens::{
    ApplyTemplateRequest, DetokenizeRequest, DetokenizeResponse, TemplateResponse, TokenizeInput, TokenizeRequest,
    TokenizeResponse,
};
pub use tools::{FunctionDefinition, FunctionDelta, ToolCallDelta, ToolRequest};

use schemars::JsonSchema;
use serde::Serialize;

/// `finish_reason` on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// It ended with calls of tools.
    ToolCalls,
    /// The output filter ended it.
    ContentFilter,
}

/// `usage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Usage {
    /// Tokens of all prompts, each counted once.
    pub prompt_tokens: usize,
    /// Tokens generated, over all choices.
    pub completion_tokens: usize,
    /// The sum of both.
    pub total_tokens: usize,
    /// What the prompt tokens were.
    pub prompt_tokens_details: PromptTokensDetails,
    /// What the completion tokens were.
    pub completion_tokens_details: CompletionTokensDetails,
}

/// `usage.prompt_tokens_details`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct PromptTokensDetails {
    /// Tokens that came from the prefix cache.
    pub cached_tokens: usize,
}

/// `usage.completion_tokens_details`. What was predicted says the same whether or not it made the answer faster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct CompletionTokensDetails {
    /// Always 0.
    pub reasoning_tokens: usize,
    /// Tokens of `prediction` that the output took over, where it followed it; over all choices.
    pub accepted_prediction_tokens: usize,
    /// The other tokens of `prediction`. They are no part of `completion_tokens`: nobody pays for them.
    pub rejected_prediction_tokens: usize,
}

impl Usage {
    /// The counts of one request.
    pub fn new(prompt_tokens: usize, completion_tokens: usize, cached_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
            completion_tokens_details: CompletionTokensDetails::default(),
        }
    }
}
