//! `/v1/chat/completions`: request, answer and stream.

use indexmap::IndexMap;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value, json};

use super::{
    FinishReason, Params, ToolCallDelta, ToolRequest, Usage,
    fields::{BodyError, Fields},
    objects::objects_only,
};

/// A request as sent.
#[derive(Clone, Debug, JsonSchema)]
#[schemars(transform = newer_name)]
pub struct ChatCompletionRequest {
    /// The model's name.
    pub model: Option<String>,
    /// The conversation.
    #[schemars(length(min = 1))]
    pub messages: Vec<Message>,
    /// Whether log-probabilities are wanted.
    #[schemars(with = "Option<bool>")]
    pub logprobs: bool,
    /// Alternatives a token; needs `logprobs`.
    #[schemars(range(max = 20))]
    pub top_logprobs: Option<u64>,
    /// Tools that may be called.
    #[schemars(flatten)]
    pub tools: Option<ToolRequest>,
    /// How the prompt is put together.
    #[schemars(flatten)]
    pub prompt: PromptOptions,
    /// The shared parameters.
    #[schemars(flatten)]
    pub params: Params,
}

/// One message of the conversation.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(remote = "Self")]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What was said; may be absent next to tool calls.
    pub content: Option<Content>,
    /// Name of the participant or function.
    pub name: Option<String>,
    /// Calls the assistant made.
    pub tool_calls: Option<Vec<ToolCall>>,
    /// The call this message answers.
    pub tool_call_id: Option<String>,
}

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// Instructions, by their newer name.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
    /// The result of a function call, by the older name.
    Function,
}

/// `content`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a string or an array of content parts")]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Parts, of which this server reads the text ones.
    Parts(Vec<ContentPart>),
}

/// One part of a message's content.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(remote = "Self")]
pub struct ContentPart {
    /// `text`, or a kind this server does not read.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text of a text part.
    pub text: Option<String>,
}

/// A call the assistant made earlier.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(remote = "Self")]
pub struct ToolCall {
    /// Its id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`, the only kind there is.
    #[serde(rename = "type", default = "function_kind")]
    pub kind: String,
    /// What was called.
    pub function: FunctionCall,
}

fn function_kind() -> String {
    "function".to_owned()
}

/// The function of a [`ToolCall`].
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(remote = "Self")]
pub struct FunctionCall {
    /// Its name.
    pub name: String,
    /// Its arguments: a string of JSON, or (some clients) the object itself.
    #[serde(default)]
    pub arguments: Value,
}

objects_only!(Message, ContentPart, ToolCall, FunctionCall);

impl Serialize for ToolCall {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl Serialize for FunctionCall {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl ChatCompletionRequest {
    /// Reads a body; with `strict`, unknown fields are errors.
    ///
    /// # Errors
    /// [`BodyError`], naming the field.
    pub fn from_json(body: &[u8], strict: bool) -> Result<Self, BodyError> {
        let mut fields = Fields::parse(body)?;
        let max_completion_tokens = fields.take("max_completion_tokens")?;
        let mut request = Self {
            model: fields.take("model")?,
            messages: fields.require("messages")?,
            logprobs: fields.take("logprobs")?.unwrap_or(false),
            top_logprobs: fields.take("top_logprobs")?,
            tools: ToolRequest::take(&mut fields)?,
            prompt: PromptOptions::take(&mut fields)?,
            params: Params::take(&mut fields)?,
        };
        if max_completion_tokens.is_some() {
            request.params.max_tokens = max_completion_tokens;
            request.params.max_tokens_field = "max_completion_tokens";
        }
        for (name, harmless) in REFUSED {
            fields.refuse(name, harmless)?;
        }
        fields.finish(strict)?;
        Ok(request)
    }
}

/// How a conversation becomes a prompt.
#[derive(Clone, Debug, Default, JsonSchema)]
pub struct PromptOptions {
    /// Whether the prompt ends where the assistant begins to speak; by default it does, unless a message is continued.
    #[schemars(with = "Option<bool>")]
    pub add_generation_prompt: bool,
    /// The output goes on from the last message.
    #[schemars(with = "Option<bool>")]
    pub continue_final_message: bool,
    /// Variables of the chat template.
    #[schemars(rename = "chat_template_kwargs", with = "Option<Value>", transform = template_variables)]
    pub template_variables: Map<String, Value>,
}

/// Template variables a caller may set: switches that published templates know. Others could reach places that are not the
/// caller's to write.
const TEMPLATE_VARIABLES: &[&str] =
    &["enable_thinking", "thinking", "reasoning_effort", "date_string", "tools_in_user_message"];

impl PromptOptions {
    pub(super) fn take(fields: &mut Fields) -> Result<Self, BodyError> {
        const ADD: &str = "add_generation_prompt";
        const CONTINUE: &str = "continue_final_message";
        const VARIABLES: &str = "chat_template_kwargs";
        let continue_final_message = fields.take(CONTINUE)?.unwrap_or(false);
        let add_generation_prompt = fields.take::<bool>(ADD)?;
        let template_variables: Map<String, Value> = fields.take(VARIABLES)?.unwrap_or_default();
        if continue_final_message && add_generation_prompt == Some(true) {
            return Err(BodyError::invalid(CONTINUE, format!("'{CONTINUE}' cannot be combined with '{ADD}'.")));
        }
        for (name, value) in &template_variables {
            if !TEMPLATE_VARIABLES.contains(&name.as_str()) {
                let known = TEMPLATE_VARIABLES.join(", ");
                let message = format!("'{VARIABLES}' may set {known}.");
                return Err(BodyError::unsupported(VARIABLES, message));
            }
            if value.is_object() || value.is_array() || value.as_str().is_some_and(|text| text.len() > 256) {
                return Err(BodyError::invalid(VARIABLES, format!("'{VARIABLES}' takes switches and short texts.")));
            }
        }
        let add_generation_prompt = add_generation_prompt.unwrap_or(!continue_final_message);
        Ok(Self { add_generation_prompt, continue_final_message, template_variables })
    }
}

/// `max_completion_tokens` is read in place of `max_tokens`, so the request has no field of that name.
fn newer_name(schema: &mut Schema) {
    if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        let description = "Tokens to generate a choice at most; wins over `max_tokens`.";
        let schema = json!({"type": ["integer", "null"], "minimum": 1, "description": description});
        fields.insert("max_completion_tokens".to_owned(), schema);
        fields["max_tokens"]["minimum"] = 1.into();
    }
}

fn template_variables(schema: &mut Schema) {
    let value = json!({"type": ["string", "number", "boolean", "null"], "maxLength": 256});
    let variables: Map<String, Value> =
        TEMPLATE_VARIABLES.iter().map(|name| ((*name).to_owned(), value.clone())).collect();
    schema.insert("type".to_owned(), json!(["object", "null"]));
    schema.insert("properties".to_owned(), variables.into());
    schema.insert("additionalProperties".to_owned(), false.into());
}

/// Fields of chat alone that would change the answer in a way this server cannot, and the values at which they do not.
const REFUSED: &[(&str, &[&str])] = &[
    ("chat_template", &[]),
    ("documents", &["[]"]),
    ("echo", &["false"]),
    ("function_call", &[r#""none""#, r#""auto""#]),
    ("functions", &["[]"]),
    ("web_search_options", &[]),
];

/// The whole answer.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ChatCompletion {
    /// `chatcmpl-...`.
    pub id: String,
    /// Always `chat.completion`.
    #[schemars(extend("const" = "chat.completion"))]
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The served model.
    pub model: String,
    /// One a choice, in order.
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    pub usage: Usage,
    /// Which weights, kernel and version answered.
    pub system_fingerprint: String,
    /// What the request noted down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<IndexMap<String, String>>,
    /// Ids of the prompt, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// One choice of a whole answer.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ChatChoice {
    /// 0..n.
    pub index: usize,
    /// What the assistant says.
    pub message: ResponseMessage,
    /// Log-probabilities if asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Ids generated, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Ids of the prompt, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// The assistant's message.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ResponseMessage {
    /// Always `assistant`.
    #[schemars(extend("const" = "assistant"))]
    pub role: &'static str,
    /// The text; empty rather than null, unless there are calls.
    pub content: Option<String>,
    /// Always null; clients demand the key.
    pub refusal: Option<String>,
    /// Calls of tools, if any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// `logprobs` of a chat choice.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ChatLogprobs {
    /// One entry a generated token.
    pub content: Vec<ChatTokenLogprob>,
    /// Always null; clients demand the key.
    pub refusal: Option<Vec<ChatTokenLogprob>>,
}

/// A generated token and its log-probability.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ChatTokenLogprob {
    /// Its text; bytes that are no UTF-8 are U+FFFD here.
    pub token: String,
    /// Natural logarithm; never below -9999.
    pub logprob: f32,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
    /// The best alternatives, best first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// An alternative to a generated token.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct TopLogprob {
    /// Its text; bytes that are no UTF-8 are U+FFFD here.
    pub token: String,
    /// Natural logarithm; never below -9999.
    pub logprob: f32,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
}

/// One event of a stream.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ChatChunk {
    /// `chatcmpl-...`, the same throughout.
    pub id: String,
    /// Always `chat.completion.chunk`: clients assert it.
    #[schemars(extend("const" = "chat.completion.chunk"))]
    pub object: &'static str,
    /// Seconds since 1970, the same throughout.
    pub created: u64,
    /// The served model.
    pub model: String,
    /// Which weights, kernel and version answered.
    pub system_fingerprint: String,
    /// The choice that has news; none in the usage chunk.
    pub choices: Vec<ChatChunkChoice>,
    /// Outer `None`: no such key; inner `None`: `null`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
    /// Random characters, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub obfuscation: Option<String>,
    /// Ids of the prompt, if asked for, in the role chunks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// The news of one choice.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ChatChunkChoice {
    /// 0..n.
    pub index: usize,
    /// What is new.
    pub delta: Delta,
    /// Log-probabilities of the new tokens if asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended, in the last chunk of the choice.
    pub finish_reason: Option<FinishReason>,
    /// New ids, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Ids of the prompt, if asked for, in the role chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// `delta`: the role once, then text, then nothing.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct Delta {
    /// `assistant`, in the first chunk of a choice only: clients concatenate it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// New text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// News of tool calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
}
