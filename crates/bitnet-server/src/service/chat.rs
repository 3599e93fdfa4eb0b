//! A running answer as `/v1/chat/completions` tells it: chunks one by one, or all of them folded.

use std::sync::Arc;

use bitnet_core::Tokenizer;

use super::{Answer, Delta, Event, Generation, ServiceError, Settings, answer::Identity, logprobs};
use crate::{
    engine::TokenEvent,
    openai::{self, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, FinishReason, ResponseMessage, Usage},
};

/// A running chat answer.
#[derive(Debug)]
pub struct ChatAnswer {
    identity: Identity,
    settings: Settings,
    tokenizer: Arc<Tokenizer>,
    generation: Generation,
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
        Self { identity, settings, tokenizer, generation, opened: false, closed: false }
    }

    /// The chunk that says `choices`.
    fn chunk(&self, choices: Vec<ChatChunkChoice>, usage: Option<Usage>) -> ChatChunk {
        ChatChunk {
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
            let delta = openai::Delta { role: Some(ASSISTANT), content: Some(String::new()) };
            let choice = ChatChunkChoice { delta, prompt_token_ids: prompt_token_ids.clone(), ..empty(index) };
            ChatChunk { prompt_token_ids, ..self.chunk(vec![choice], None) }
        };
        (0..self.generation.num_choices()).map(open).collect()
    }

    fn news(&self, index: usize, delta: Delta) -> impl Iterator<Item = ChatChunk> {
        let tokens_show = self.settings.logprobs.is_some() || self.settings.return_token_ids;
        let content = (!delta.text.is_empty() || (tokens_show && !delta.tokens.is_empty())).then(|| {
            let delta_content = openai::Delta { role: None, content: Some(delta.text) };
            let choice = ChatChunkChoice {
                delta: delta_content,
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
        while let Some(event) = self.generation.next().await? {
            if let Event::Delta { choice, delta } = event {
                parts[choice].text += &delta.text;
                parts[choice].tokens.extend(delta.tokens);
                parts[choice].finish = delta.finish;
            }
        }
        let choice = |(index, part): (usize, Delta)| ChatChoice {
            index,
            logprobs: self.logprobs(&part.tokens),
            token_ids: self.token_ids(&part.tokens),
            prompt_token_ids: self.prompt_token_ids(index),
            message: ResponseMessage { role: ASSISTANT, content: part.text, refusal: None },
            // Every choice has ended: the last delta of each says why.
            finish_reason: part.finish.unwrap_or(FinishReason::Stop),
        };
        Ok(ChatCompletion {
            choices: parts.into_iter().enumerate().map(choice).collect(),
            object: "chat.completion",
            created: self.identity.created,
            usage: self.generation.usage(),
            prompt_token_ids: self.prompt_token_ids(0),
            id: self.identity.id,
            model: self.identity.model,
            system_fingerprint: self.identity.fingerprint,
        })
    }

    fn is_stream(&self) -> bool {
        self.settings.stream
    }
}
