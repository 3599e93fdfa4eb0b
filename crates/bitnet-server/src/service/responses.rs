//! A running answer as `/v1/responses` tells it: the chunks of a chat answer, in the words and the order of events of that API.

use std::sync::Arc;

use bitnet_core::Tokenizer;

use super::{
    Answer, ChatAnswer, Generation, ServiceError, Settings,
    answer::{Identity, random_id},
    chat::obfuscation,
};
use crate::openai::{
    ChatChunk, ChatChunkChoice, ErrorObject, FinishReason, IncompleteDetails, OutputItem, OutputText, PartPlace,
    ResponseEcho, ResponseError, ResponseEvent, ResponseEventBody, ResponseObject, ResponseStatus, ToolCallDelta,
};

/// A running answer.
#[derive(Debug)]
pub struct ResponseAnswer {
    chat: ChatAnswer,
    /// The last item of its output is open while `is_open`.
    response: ResponseObject,
    is_open: bool,
    finish: Option<FinishReason>,
    num_events: u64,
    is_stream: bool,
    obfuscates: bool,
    closed: bool,
}

type Events = Vec<ResponseEvent>;

impl ResponseAnswer {
    pub(super) fn new(
        identity: Identity,
        mut settings: Settings,
        echo: ResponseEcho,
        tokenizer: Arc<Tokenizer>,
        generation: Generation,
    ) -> Self {
        let response = ResponseObject {
            id: identity.id.clone(),
            object: "response",
            created_at: identity.created,
            status: ResponseStatus::InProgress,
            background: false,
            error: None,
            incomplete_details: None,
            model: identity.model.clone(),
            output: Vec::new(),
            previous_response_id: None,
            service_tier: "default",
            store: false,
            temperature: settings.sampling.temperature,
            top_p: settings.sampling.top_p,
            usage: None,
            system_fingerprint: identity.fingerprint.clone(),
            echo,
        };
        let obfuscates = std::mem::take(&mut settings.include_obfuscation);
        let is_stream = settings.stream;
        let chat = ChatAnswer::new(identity, settings, tokenizer, generation);
        Self { chat, response, is_open: false, finish: None, num_events: 0, is_stream, obfuscates, closed: false }
    }

    fn say(&mut self, events: &mut Events, kind: &'static str, body: ResponseEventBody) {
        events.push(ResponseEvent { kind, sequence_number: self.num_events, body });
        self.num_events += 1;
    }

    fn say_response(&mut self, events: &mut Events, kind: &'static str) {
        let response = Box::new(self.response.clone());
        self.say(events, kind, ResponseEventBody::Response { response });
    }

    fn chunk(&mut self, events: &mut Events, chunk: ChatChunk) {
        if let Some(Some(usage)) = chunk.usage {
            self.response.usage = Some(usage.into());
        }
        for choice in chunk.choices {
            self.choice(events, choice);
        }
    }

    fn choice(&mut self, events: &mut Events, choice: ChatChunkChoice) {
        let logprobs = choice.logprobs.map_or_else(Vec::new, |logprobs| logprobs.content);
        if let Some(text) = choice.delta.content.filter(|text| !text.is_empty() || !logprobs.is_empty()) {
            self.open_message(events);
            let place = self.place();
            if let Some(OutputItem::Message { content, .. }) = self.response.output.last_mut()
                && let Some(part) = content.last_mut()
            {
                part.text += &text;
                part.logprobs.extend_from_slice(&logprobs);
            }
            let obfuscation = self.obfuscates.then(|| obfuscation(text.len()));
            let body = ResponseEventBody::TextDelta { place, delta: text, logprobs, obfuscation };
            self.say(events, "response.output_text.delta", body);
        }
        for call in choice.delta.tool_calls {
            self.call(events, call);
        }
        if let Some(reason) = choice.finish_reason {
            self.finish = Some(reason);
            if self.response.output.is_empty() {
                self.open_message(events);
            }
            self.close(events, outcome(reason).0);
        }
    }

    fn call(&mut self, events: &mut Events, news: ToolCallDelta) {
        if let (Some(call_id), Some(name)) = (news.id, news.function.name) {
            self.open(
                events,
                OutputItem::FunctionCall {
                    id: random_id("fc_"),
                    status: ResponseStatus::InProgress,
                    call_id,
                    name,
                    arguments: String::new(),
                },
            );
        }
        let (delta, output_index) = (news.function.arguments, self.last_index());
        let Some(OutputItem::FunctionCall { id, arguments, .. }) = self.response.output.last_mut() else { return };
        if delta.is_empty() {
            return;
        }
        *arguments += &delta;
        let item_id = id.clone();
        let obfuscation = self.obfuscates.then(|| obfuscation(delta.len()));
        let body = ResponseEventBody::ArgumentsDelta { item_id, output_index, delta, obfuscation };
        self.say(events, "response.function_call_arguments.delta", body);
    }

    /// Sees to it that a message is open, with its one part.
    fn open_message(&mut self, events: &mut Events) {
        if self.is_open && matches!(self.response.output.last(), Some(OutputItem::Message { .. })) {
            return;
        }
        let id = random_id("msg_");
        let status = ResponseStatus::InProgress;
        self.open(events, OutputItem::Message { id, status, role: "assistant", content: Vec::new() });
        if let Some(OutputItem::Message { content, .. }) = self.response.output.last_mut() {
            content.push(OutputText::default());
        }
        let body = ResponseEventBody::Part { place: self.place(), part: OutputText::default() };
        self.say(events, "response.content_part.added", body);
    }

    fn open(&mut self, events: &mut Events, item: OutputItem) {
        self.close(events, ResponseStatus::Completed);
        self.response.output.push(item.clone());
        self.is_open = true;
        let body = ResponseEventBody::Item { output_index: self.last_index(), item };
        self.say(events, "response.output_item.added", body);
    }

    /// Ends the open item, if there is one.
    fn close(&mut self, events: &mut Events, ends_as: ResponseStatus) {
        if !std::mem::take(&mut self.is_open) {
            return;
        }
        let (place, output_index) = (self.place(), self.last_index());
        let Some(last) = self.response.output.last_mut() else { return };
        let (OutputItem::Message { status, .. } | OutputItem::FunctionCall { status, .. }) = last;
        *status = ends_as;
        let item = last.clone();
        match &item {
            OutputItem::Message { content, .. } => {
                let part = content.last().cloned().unwrap_or_default();
                let (text, logprobs) = (part.text.clone(), part.logprobs.clone());
                let body = ResponseEventBody::TextDone { place: place.clone(), text, logprobs };
                self.say(events, "response.output_text.done", body);
                self.say(events, "response.content_part.done", ResponseEventBody::Part { place, part });
            }
            OutputItem::FunctionCall { id, name, arguments, .. } => {
                let body = ResponseEventBody::ArgumentsDone {
                    item_id: id.clone(),
                    output_index,
                    name: name.clone(),
                    arguments: arguments.clone(),
                };
                self.say(events, "response.function_call_arguments.done", body);
            }
        }
        self.say(events, "response.output_item.done", ResponseEventBody::Item { output_index, item });
    }

    fn end(&mut self, events: &mut Events) {
        self.closed = true;
        let (status, reason) = outcome(self.finish.unwrap_or(FinishReason::Stop));
        self.response.status = status;
        self.response.incomplete_details = reason.map(|reason| IncompleteDetails { reason });
        let complete = status == ResponseStatus::Completed;
        self.say_response(events, if complete { "response.completed" } else { "response.incomplete" });
    }

    fn last_index(&self) -> usize {
        self.response.output.len().saturating_sub(1)
    }

    fn place(&self) -> PartPlace {
        let item_id = self.response.output.last().map_or_else(String::new, |item| item.id().to_owned());
        PartPlace { item_id, output_index: self.last_index(), content_index: 0 }
    }
}

/// What an end for `reason` makes of the response, and why it is not complete.
fn outcome(reason: FinishReason) -> (ResponseStatus, Option<&'static str>) {
    match reason {
        FinishReason::Stop | FinishReason::ToolCalls => (ResponseStatus::Completed, None),
        FinishReason::Length => (ResponseStatus::Incomplete, Some("max_output_tokens")),
        FinishReason::ContentFilter => (ResponseStatus::Incomplete, Some("content_filter")),
    }
}

impl Answer for ResponseAnswer {
    type Chunk = ResponseEvent;
    type Whole = ResponseObject;

    const ENDS_WITH_DONE: bool = false;

    async fn next(&mut self) -> Result<Option<Events>, ServiceError> {
        if self.closed {
            return Ok(None);
        }
        let mut events = Vec::new();
        if self.num_events == 0 {
            self.say_response(&mut events, "response.created");
            self.say_response(&mut events, "response.in_progress");
            return Ok(Some(events));
        }
        match self.chat.next().await? {
            Some(chunks) => chunks.into_iter().for_each(|chunk| self.chunk(&mut events, chunk)),
            None => self.end(&mut events),
        }
        Ok(Some(events))
    }

    async fn whole(mut self) -> Result<ResponseObject, ServiceError> {
        while self.next().await?.is_some() {}
        Ok(self.response)
    }

    fn is_stream(&self) -> bool {
        self.is_stream
    }

    fn event_name(event: &ResponseEvent) -> Option<&'static str> {
        Some(event.kind)
    }

    fn failed(mut self, error: &ErrorObject) -> Option<ResponseEvent> {
        self.response.status = ResponseStatus::Failed;
        self.response.error = Some(ResponseError { code: "server_error", message: error.message.clone() });
        let mut events = Vec::new();
        self.say_response(&mut events, "response.failed");
        events.pop()
    }
}
