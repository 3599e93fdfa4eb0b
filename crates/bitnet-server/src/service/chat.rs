//! A running answer as `/v1/chat/completions` tells it: chunks one by one, or all of them folded.

use std::sync::Arc;

use bitnet_core::Tokenizer;

use super::{
    Answer, Delta, Event, Generation, ServiceError, Settings,
    answer::Identity,
    calls::{self, ChoiceCalls},
    logprobs,
};
use crate::{
    engine::TokenEvent,
    openai::{
        self, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, FinishReason, ResponseMessage, ToolCall, Usage,
    },
};

/// A running chat answer.
#[derive(Debug)]
pub struct ChatAnswer {
    identity: Identity,
    settings: Settings,
    tokenizer: Arc<Tokenizer>,
    generation: Generation,
    /// One a choice, where calls may be made.
    calls: Vec<ChoiceCalls>,
    opened: bool,
    closed: bool,
}

const ASSISTANT: &str = "assistant";

impl ChatAnswer {
    pub(super) fn new(
        identity: Identity,
        settings: Settings,
        tokenizer: Arc<Tokenizer>,
        generation: Generation,
    ) -> Self {
        let calls = settings.rule.as_ref().filter(|rule| rule.has_calls()).map(|_| ChoiceCalls::new());
        let calls = calls.map_or_else(Vec::new, |calls| vec![calls; generation.num_choices()]);
        Self { identity, settings, tokenizer, generation, calls, opened: false, closed: false }
    }

    /// The chunk that says `choices`.
    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        let said = choices.iter().map(|choice| choice.delta.content.as_deref().unwrap_or_default().len()).sum();
        ChatChunk {
            obfuscation: self.settings.include_obfuscation.then(|| obfuscation(said)),
            id: self.identity.id.clone(),
            object: "chat.completion.chunk",
            created: self.identity.created,
            model: self.identity.model.clone(),
            system_fingerprint: self.identity.fingerprint.clone(),
            choices,
            usage: self.settings.include_usage.then_some(usage),
            prompt_token_ids: None,
        }
    }

    /// One chunk a choice with the role, before anything else is said.
    fn opening(&self) -> Vec<ChatChunk> {
        let open = |index| {
            let prompt_token_ids = self.prompt_token_ids(index);
            let delta = openai::Delta { role: Some(ASSISTANT), content: Some(String::new()), tool_calls: Vec::new() };
            let choice = ChatChunkChoice { delta, prompt_token_ids: prompt_token_ids.clone(), ..empty(index) };
            ChatChunk { prompt_token_ids, ..self.chunk(vec![choice], None) }
        };
        (0..self.generation.num_choices()).map(open).collect()
    }

    fn news(&mut self, index: usize, mut delta: Delta) -> impl Iterator<Item = ChatChunk> {
        let tool_calls = self.calls.get_mut(index).map_or_else(Vec::new, |calls| calls.read(&mut delta));
        let tokens_show = self.settings.logprobs.is_some() || self.settings.return_token_ids;
        let has_tokens = tokens_show && !delta.tokens.is_empty();
        let content = (!delta.text.is_empty() || !tool_calls.is_empty() || has_tokens).then(|| {
            let text = (!delta.text.is_empty() || tool_calls.is_empty()).then_some(delta.text);
            let choice = ChatChunkChoice {
                delta: openai::Delta { role: None, content: text, tool_calls },
                logprobs: self.logprobs(&delta.tokens),
                token_ids: self.token_ids(&delta.tokens),
                ..empty(index)
            };
            self.chunk(vec![choice], None)
        });
        let finish = delta.finish.map(|reason| {
            let choice = ChatChunkChoice { finish_reason: Some(reason), ..empty(index) };
            self.chunk(vec![choice], None)
        });
        content.into_iter().chain(finish)
    }

    fn logprobs(&self, tokens: &[TokenEvent]) -> Option<openai::ChatLogprobs> {
        self.settings.logprobs.map(|_| logprobs::chat(&self.tokenizer, tokens))
    }

    fn token_ids(&self, tokens: &[TokenEvent]) -> Option<Vec<u32>> {
        self.settings.return_token_ids.then(|| tokens.iter().map(|event| event.token.0).collect())
    }

    fn prompt_token_ids(&self, index: usize) -> Option<Vec<u32>> {
        let ids = || self.generation.prompt_of(index).tokens.iter().map(|id| id.0).collect();
        self.settings.return_token_ids.then(ids)
    }
}

/// Random letters that fill `said` bytes up to a multiple of [`OBFUSCATED_BYTES`].
pub(super) fn obfuscation(said: usize) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let letter = |_| char::from(LETTERS[usize::from(rand::random::<u8>() % 64)]);
    (0..OBFUSCATED_BYTES - said % OBFUSCATED_BYTES).map(letter).collect()
}

/// Longer than almost any token's text.
const OBFUSCATED_BYTES: usize = 32;

fn empty(index: usize) -> ChatChunkChoice {
    ChatChunkChoice {
        index,
        delta: openai::Delta::default(),
        logprobs: None,
        finish_reason: None,
        token_ids: None,
        prompt_token_ids: None,
    }
}

impl Answer for ChatAnswer {
    type Chunk = ChatChunk;
    type Whole = ChatCompletion;

    async fn next(&mut self) -> Result<Option<Vec<ChatChunk>>, ServiceError> {
        if self.closed {
            return Ok(None);
        }
        let event = self.generation.next().await?;
        let mut chunks = if self.opened { Vec::new() } else { self.opening() };
        self.opened = true;
        match event {
            Some(Event::PromptDone { .. }) => {}
            Some(Event::Delta { choice, delta }) => chunks.extend(self.news(choice, delta)),
            None => {
                self.closed = true;
                if self.settings.include_usage {
                    chunks.push(self.chunk(Vec::new(), Some(self.generation.usage())));
                }
            }
        }
        Ok(Some(chunks))
    }

    async fn whole(mut self) -> Result<ChatCompletion, ServiceError> {
        let mut parts = vec![Delta::default(); self.generation.num_choices()];
        let mut tool_calls = vec![Vec::new(); parts.len()];
        while let Some(event) = self.generation.next().await? {
            if let Event::Delta { choice, mut delta } = event {
                for call in self.calls.get_mut(choice).map_or_else(Vec::new, |calls| calls.read(&mut delta)) {
                    calls::append(&mut tool_calls[choice], call);
                }
                parts[choice].text += &delta.text;
                parts[choice].tokens.extend(delta.tokens);
                parts[choice].finish = delta.finish;
            }
        }
        let choice = |(index, (part, tool_calls)): (usize, (Delta, Vec<ToolCall>))| ChatChoice {
            index,
            logprobs: self.logprobs(&part.tokens),
            token_ids: self.token_ids(&part.tokens),
            prompt_token_ids: self.prompt_token_ids(index),
            message: ResponseMessage {
                role: ASSISTANT,
                content: (tool_calls.is_empty() || !part.text.is_empty()).then_some(part.text),
                refusal: None,
                tool_calls,
            },
            // Every choice has ended: the last delta of each says why.
            finish_reason: part.finish.unwrap_or(FinishReason::Stop),
        };
        Ok(ChatCompletion {
            choices: parts.into_iter().zip(tool_calls).enumerate().map(choice).collect(),
            object: "chat.completion",
            created: self.identity.created,
            usage: self.generation.usage(),
            prompt_token_ids: self.prompt_token_ids(0),
            metadata: self.settings.metadata,
            id: self.identity.id,
            model: self.identity.model,
            system_fingerprint: self.identity.fingerprint,
        })
    }

    fn is_stream(&self) -> bool {
        self.settings.stream
    }
}
