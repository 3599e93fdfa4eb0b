//! `/v1/responses`: the request. Its items become the messages of a chat request, so that there is one way to an answer;
//! what else it says comes back with the answer.

use std::borrow::Cow;

use indexmap::IndexMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json, value::RawValue};

use super::{
    ChatCompletionRequest, Content, ContentPart, FunctionCall, Message, OutputFormat, Params, PromptOptions, Role,
    ToolCall, ToolRequest,
    fields::{BodyError, Fields, read},
    objects::objects_only,
    tools::flat_tool,
};

/// A request as sent.
#[derive(Clone, Debug)]
pub struct ResponseRequest {
    /// The same in the words of chat.
    pub chat: ChatCompletionRequest,
    /// What the answer repeats.
    pub echo: ResponseEcho,
}

/// What an answer repeats of its request, defaults filled in.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ResponseEcho {
    /// What stands before the input.
    pub instructions: Option<String>,
    /// Tokens to generate at most.
    pub max_output_tokens: Option<u64>,
    /// What the caller noted down.
    pub metadata: IndexMap<String, String>,
    /// Whether several calls may be made.
    pub parallel_tool_calls: bool,
    /// `{"effort", "summary"}`; this server's models do not reason.
    pub reasoning: Value,
    /// The form of the text.
    pub text: Value,
    /// Which tool is to be called.
    pub tool_choice: Value,
    /// The tools.
    pub tools: Vec<Map<String, Value>>,
    /// Alternatives a token.
    pub top_logprobs: u64,
    /// What becomes of input that does not fit.
    pub truncation: Truncation,
    /// Who asks, in the caller's words.
    pub user: Option<String>,
}

/// What becomes of input that does not fit the context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Truncation {
    /// An error.
    #[default]
    Disabled,
    /// Its oldest items are left out.
    Auto,
}

const INPUT: &str = "input";
const LOGPROBS: &str = "message.output_text.logprobs";
/// What else `include` may name: nothing of it can be in an answer of this server.
const NEVER_INCLUDED: &[&str] = &[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
];
/// What needs a memory of earlier responses, or has no meaning here, and the values at which it asks for nothing.
const REFUSED: &[(&str, &[&str])] = &[
    ("background", &["false"]),
    ("conversation", &[]),
    ("n", &["1"]),
    ("previous_response_id", &[]),
    ("prompt", &[]),
    ("response_format", &[]),
];
const ACCEPTED: &[&str] = &["context_management", "max_tool_calls", "prompt_cache_key"];

impl ResponseRequest {
    /// Reads a body; with `strict`, unknown fields are errors.
    ///
    /// # Errors
    /// [`BodyError`], naming the field.
    pub fn from_json(body: &[u8], strict: bool) -> Result<Self, BodyError> {
        let mut fields = Fields::parse(body)?;
        for (name, harmless) in REFUSED {
            fields.refuse(name, harmless)?;
        }
        fields.accept(ACCEPTED);
        let instructions: Option<String> = fields.take("instructions")?;
        let input = fields.take_raw(INPUT).ok_or_else(|| BodyError::missing(INPUT))?;
        let messages = messages(instructions.as_deref(), &input)?;
        let top_logprobs: Option<u64> = fields.take("top_logprobs")?;
        let logprobs = included_logprobs(&mut fields)? || top_logprobs.is_some_and(|top| top > 0);
        let tools: Vec<Map<String, Value>> = fields.take("tools")?.unwrap_or_default();
        let mut echo = ResponseEcho {
            instructions,
            max_output_tokens: fields.take("max_output_tokens")?,
            metadata: IndexMap::new(),
            parallel_tool_calls: fields.peek("parallel_tool_calls")?.unwrap_or(true),
            reasoning: fields.take("reasoning")?.unwrap_or_else(|| json!({"effort": null, "summary": null})),
            text: fields.take("text")?.unwrap_or_else(|| json!({})),
            tool_choice: fields.peek("tool_choice")?.unwrap_or_else(|| "auto".into()),
            top_logprobs: top_logprobs.unwrap_or(0),
            truncation: fields.take("truncation")?.unwrap_or_default(),
            user: fields.peek("user")?,
            tools,
        };
        let mut request = ChatCompletionRequest {
            model: fields.take("model")?,
            messages,
            logprobs,
            top_logprobs: top_logprobs.filter(|_| logprobs),
            tools: ToolRequest::take_flat(&mut fields, &echo.tools)?,
            prompt: PromptOptions::take(&mut fields)?,
            params: Params::take(&mut fields)?,
        };
        set_output(&mut request.params, &mut echo.text)?;
        if echo.max_output_tokens.is_some() {
            request.params.max_tokens = echo.max_output_tokens;
            request.params.max_tokens_field = "max_output_tokens";
        }
        request.params.include_usage = true;
        echo.metadata = request.params.metadata.clone().unwrap_or_default();
        fields.finish(strict)?;
        Ok(Self { chat: request, echo })
    }
}

/// The fields of chat, less what this API calls otherwise or lacks, and its own.
impl JsonSchema for ResponseRequest {
    fn schema_name() -> Cow<'static, str> {
        "ResponseRequest".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = ChatCompletionRequest::json_schema(generator);
        let item = generator.subschema_for::<Item>();
        let truncation = generator.subschema_for::<Option<Truncation>>();
        let tool = flat_tool(generator);
        let includes = [&[LOGPROBS][..], NEVER_INCLUDED].concat();
        let text = json!({"type": ["string", "null"]});
        let object = json!({"type": ["object", "null"]});
        let own = json_schema!({
            "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": item, "minItems": 1}]},
            "instructions": text,
            "max_output_tokens": {"type": ["integer", "null"], "minimum": 1},
            "include": {"type": ["array", "null"], "items": {"enum": includes}},
            "reasoning": object,
            "text": object,
            "tools": {"type": ["array", "null"], "items": tool},
            "truncation": truncation,
        });
        if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
            for name in ["messages", "max_completion_tokens", "logprobs", "response_format", "n"] {
                fields.remove(name);
            }
            fields.extend(own.as_object().cloned().unwrap_or_default());
            fields["tool_choice"] = json!({"type": ["string", "object", "null"]});
        }
        schema.insert("required".to_owned(), json!([INPUT]));
        schema
    }
}

/// Whether `include` asks for log-probabilities.
fn included_logprobs(fields: &mut Fields) -> Result<bool, BodyError> {
    let names: Vec<String> = fields.take("include")?.unwrap_or_default();
    match names.iter().find(|name| *name != LOGPROBS && !NEVER_INCLUDED.contains(&name.as_str())) {
        Some(_) => Err(BodyError::invalid("include", format!("'include' may name {LOGPROBS} here."))),
        None => Ok(!names.is_empty() && names.iter().any(|name| name == LOGPROBS)),
    }
}

/// The form that `text` asks for, which gets its defaults.
fn set_output(params: &mut Params, text: &mut Value) -> Result<(), BodyError> {
    let Value::Object(text) = text else {
        return Err(BodyError::invalid("text", "'text' must be an object."));
    };
    let format = text.entry("format").or_insert_with(|| json!({"type": "text"}));
    if let Some(format) = OutputFormat::of_text(format)?
        && let Some(other) = params.output.replace(format)
    {
        let message = format!("'{}' cannot be combined with 'text.format'.", other.param);
        return Err(BodyError::invalid(other.param, message));
    }
    Ok(())
}

/// One item of `input`, of whatever kind.
#[derive(Deserialize, JsonSchema)]
#[serde(remote = "Self")]
struct Item {
    #[serde(rename = "type")]
    kind: Option<String>,
    role: Option<Role>,
    content: Option<Content>,
    call_id: Option<String>,
    name: Option<String>,
    arguments: Option<String>,
    output: Option<Content>,
}

objects_only!(Item);

fn messages(instructions: Option<&str>, input: &RawValue) -> Result<Vec<Message>, BodyError> {
    let mut messages = Vec::new();
    if let Some(text) = instructions {
        messages.push(message(Role::Developer, Content::Text(text.to_owned())));
    }
    if input.get().starts_with('"') {
        messages.push(message(Role::User, Content::Text(read(INPUT, input)?)));
        return Ok(messages);
    }
    let items: Vec<Item> = read(INPUT, input)?;
    if items.is_empty() {
        return Err(BodyError::invalid(INPUT, "'input' must hold at least one item."));
    }
    for (index, item) in items.into_iter().enumerate() {
        add_item(&mut messages, index, item)?;
    }
    Ok(messages)
}

/// Adds `item`; a call belongs to the assistant's message before it.
fn add_item(messages: &mut Vec<Message>, index: usize, item: Item) -> Result<(), BodyError> {
    let missing = |field: &str| BodyError::invalid(INPUT, format!("'input[{index}].{field}' is required."));
    match item.kind.as_deref().unwrap_or("message") {
        "message" => {
            let content = text_parts(index, item.content.ok_or_else(|| missing("content"))?)?;
            messages.push(message(item.role.ok_or_else(|| missing("role"))?, content));
        }
        "function_call" => {
            let function = FunctionCall {
                name: item.name.ok_or_else(|| missing("name"))?,
                arguments: Value::String(item.arguments.ok_or_else(|| missing("arguments"))?),
            };
            let id = Some(item.call_id.ok_or_else(|| missing("call_id"))?);
            let call = ToolCall { id, kind: "function".to_owned(), function };
            match messages.last_mut().filter(|last| last.role == Role::Assistant) {
                Some(last) => last.tool_calls.get_or_insert_default().push(call),
                None => messages.push(Message {
                    tool_calls: Some(vec![call]),
                    ..message(Role::Assistant, Content::Text(String::new()))
                }),
            }
        }
        "function_call_output" => {
            let content = text_parts(index, item.output.ok_or_else(|| missing("output"))?)?;
            let tool_call_id = Some(item.call_id.ok_or_else(|| missing("call_id"))?);
            messages.push(Message { tool_call_id, ..message(Role::Tool, content) });
        }
        // Thoughts of another model: they are no part of the conversation.
        "reasoning" => {}
        "item_reference" => {
            let message = "Items of type 'item_reference' need stored responses, which this server does not keep.";
            return Err(BodyError::unsupported(INPUT, message));
        }
        _ => {
            let message = format!("'input[{index}].type' is not supported by this server.");
            return Err(BodyError::unsupported(INPUT, message));
        }
    }
    Ok(())
}

fn message(role: Role, content: Content) -> Message {
    Message { role, content: Some(content), name: None, tool_calls: None, tool_call_id: None }
}

/// The text of `content` in the words of chat.
fn text_parts(index: usize, content: Content) -> Result<Content, BodyError> {
    let Content::Parts(parts) = content else { return Ok(content) };
    let mut texts = Vec::with_capacity(parts.len());
    for part in parts {
        match (part.kind.as_str(), part.text) {
            ("input_text" | "output_text" | "text", text @ Some(_)) => {
                texts.push(ContentPart { kind: "text".to_owned(), text });
            }
            // What a model would not say.
            ("refusal", _) => {}
            ("input_text" | "output_text" | "text", None) => {
                return Err(BodyError::invalid(INPUT, format!("'input[{index}]' has a text part without 'text'.")));
            }
            _ => {
                let message = format!("'input[{index}]' has a content part of a type that this server does not read.");
                return Err(BodyError::unsupported(INPUT, message));
            }
        }
    }
    Ok(Content::Parts(texts))
}
