//! Any text as a chat template, over one conversation: compiled and rendered within its limits, or refused.
#![no_main]

use bitnet_server::prompt::{ChatTemplate, Conversation};
use libfuzzer_sys::fuzz_target;
use serde_json::json;

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::new(source, Some("<s>"), Some("</s>")) else { return };
    let conversation = Conversation {
        messages: vec![
            json!({"role": "system", "content": "Be brief."}),
            json!({"role": "user", "content": "Привет <s>"}),
            json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}),
        ],
        tools: Some(json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])),
        extra: serde_json::Map::new(),
        add_generation_prompt: true,
    };
    let _ = template.render(&conversation);
});
