//! Tools for models whose template knows none: the descriptions go into the system message, and calls made earlier are
//! written the way new ones are expected.

use serde_json::{Value, json};

use super::ChatMessage;

/// What the system message says about tools; `{tools}` is one line of JSON a tool.
const INSTRUCTIONS: &str = "You may call functions. These are available, one JSON description a line:\n{tools}\n\
    To call one, answer with its name and its arguments, in this form and with nothing after it:\n\
    <tool_call>{\"name\":\"function name\",\"arguments\":{\"argument\":\"value\"}}</tool_call>";

/// `messages` with the descriptions of `tools` at the end of the first system message, which is added if there is none.
pub(super) fn described(messages: &[ChatMessage], tools: &Value) -> Vec<ChatMessage> {
    let lines: Vec<_> = tools.as_array().into_iter().flatten().map(Value::to_string).collect();
    let text = INSTRUCTIONS.replace("{tools}", &lines.join("\n"));
    let mut messages = messages.to_vec();
    match messages.first_mut().filter(|message| message.role == SYSTEM) {
        Some(system) => system.content = format!("{}\n\n{text}", system.content),
        None => messages.insert(0, ChatMessage { role: SYSTEM.to_owned(), content: text, ..ChatMessage::default() }),
    }
    messages
}

/// `message` with the calls it made as text.
pub(super) fn spelled_out(mut message: ChatMessage) -> ChatMessage {
    let calls = message.tool_calls.take();
    for call in calls.iter().flat_map(|calls| calls.as_array().into_iter().flatten()) {
        let arguments = match &call["function"]["arguments"] {
            Value::String(text) => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
            value => value.clone(),
        };
        let call = json!({"name": call["function"]["name"], "arguments": arguments});
        if !message.content.is_empty() {
            message.content.push('\n');
        }
        message.content += &format!("<tool_call>{call}</tool_call>");
    }
    message
}

const SYSTEM: &str = "system";
