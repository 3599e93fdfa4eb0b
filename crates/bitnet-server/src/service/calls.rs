//! The tool calls of one choice: pieces of its text -> the deltas of the wire, and their fold.

use serde_json::Value;

use super::Delta;
use crate::{
    grammar::{CALL_END, CALL_START},
    openai::{FinishReason, FunctionCall, FunctionDelta, ToolCall, ToolCallDelta},
    output::{CallPiece, CallReader},
};

/// Finds the calls in the text of one choice.
#[derive(Clone, Debug)]
pub(super) struct ChoiceCalls(CallReader);

impl ChoiceCalls {
    /// At the start of an output.
    pub(super) fn new() -> Self {
        Self(CallReader::new(CALL_START, CALL_END))
    }

    /// The news of calls in `delta`, whose text loses them and whose end may become another.
    pub(super) fn read(&mut self, delta: &mut Delta) -> Vec<ToolCallDelta> {
        let text = std::mem::take(&mut delta.text);
        let mut pieces = self.0.push(&text);
        if delta.finish.is_some() {
            pieces.extend(self.0.finish());
        }
        let begun = pieces.iter().filter(|piece| matches!(piece, CallPiece::Start(_))).count();
        let mut next = self.0.num_calls() - begun;
        let mut news = Vec::new();
        for piece in pieces {
            match piece {
                CallPiece::Text(text) => delta.text += &text,
                CallPiece::Start(name) => {
                    news.push(started(next, name));
                    next += 1;
                }
                CallPiece::Arguments(arguments) => add_arguments(&mut news, next.saturating_sub(1), arguments),
            }
        }
        if delta.finish == Some(FinishReason::Stop) {
            // The model cannot end inside a call, so it was a stop string: a cut.
            delta.finish = Some(match (self.0.is_inside_call(), self.0.num_calls()) {
                (true, _) => FinishReason::Length,
                (false, 0) => FinishReason::Stop,
                (false, _) => FinishReason::ToolCalls,
            });
        }
        news
    }
}

/// One delta a call: clients take two of one index in the same chunk for two calls.
fn add_arguments(news: &mut Vec<ToolCallDelta>, index: usize, arguments: String) {
    match news.last_mut().filter(|last| last.index == index) {
        Some(last) => last.function.arguments += &arguments,
        None => {
            let function = FunctionDelta { name: None, arguments };
            news.push(ToolCallDelta { index, id: None, kind: None, function });
        }
    }
}

fn started(index: usize, name: String) -> ToolCallDelta {
    let id = format!("call_{:024x}", rand::random::<u128>() >> 32);
    let function = FunctionDelta { name: Some(name), arguments: String::new() };
    ToolCallDelta { index, id: Some(id), kind: Some("function"), function }
}

/// Adds `delta` to the whole calls of a choice.
pub(super) fn append(calls: &mut Vec<ToolCall>, delta: ToolCallDelta) {
    match (delta.function.name, calls.last_mut()) {
        (Some(name), _) => calls.push(ToolCall {
            id: delta.id,
            kind: "function".to_owned(),
            function: FunctionCall { name, arguments: Value::String(delta.function.arguments) },
        }),
        (None, Some(ToolCall { function: FunctionCall { arguments: Value::String(text), .. }, .. })) => {
            *text += &delta.function.arguments;
        }
        (None, _) => {}
    }
}
