//! A running answer as `/v1/completions` tells it: chunks one by one, or all of them folded.

use std::sync::Arc;

use bitnet_core::Tokenizer;

use super::{
    Answer, Delta, Event, Generation, ServiceError, Settings,
    answer::Identity,
    logprobs::{self, Columns},
    prompting::TextPrompt,
};
use crate::{
    engine::PromptLogprobs,
    openai::{Completion, CompletionChoice, CompletionLogprobs, Usage},
};

/// A running text answer.
#[derive(Debug)]
pub struct TextAnswer {
    identity: Identity,
    settings: Settings,
    tokenizer: Arc<Tokenizer>,
    generation: Generation,
    prompts: Vec<TextPrompt>,
    echo: bool,
    columns: Vec<Columns>,
    closed: bool,
}

impl TextAnswer {
    pub(super) fn new(
        identity: Identity,
        settings: Settings,
        tokenizer: Arc<Tokenizer>,
        generation: Generation,
        prompts: Vec<TextPrompt>,
        echo: bool,
    ) -> Self {
        let columns = (0..generation.num_choices()).map(|_| Columns::new()).collect();
        Self { identity, settings, tokenizer, generation, prompts, echo, columns, closed: false }
    }

    fn object(&self, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> Completion {
        Completion {
            id: self.identity.id.clone(),
            object: "text_completion",
            created: self.identity.created,
            model: self.identity.model.clone(),
            choices,
            system_fingerprint: self.identity.fingerprint.clone(),
            usage,
        }
    }

    fn chunk(&self, choice: CompletionChoice) -> Completion {
        self.object(vec![choice], self.settings.include_usage.then_some(None))
    }

    /// The choice's news of `event`; text, end and their order are the caller's to arrange.
    fn choice(&mut self, event: Event) -> CompletionChoice {
        match event {
            Event::PromptDone { choice, logprobs } => self.prompt(choice, logprobs),
            Event::Delta { choice: index, delta } => {
                let Delta { text, tokens, finish, matches: _ } = delta;
                let logprobs = self.settings.logprobs.map(|_| self.columns[index].generated(&self.tokenizer, &tokens));
                let token_ids =
                    self.settings.return_token_ids.then(|| tokens.iter().map(|event| event.token.0).collect());
                CompletionChoice { text, index, logprobs, finish_reason: finish, token_ids, prompt_token_ids: None }
            }
        }
    }

    fn prompt(&mut self, index: usize, logprobs: Option<PromptLogprobs>) -> CompletionChoice {
        let prompt = &self.prompts[index / self.settings.num_choices as usize];
        let columns = logprobs
            .filter(|_| self.echo)
            .map(|logprobs| self.columns[index].prompt(&self.tokenizer, &prompt.tokens, &logprobs, prompt.hidden_bos));
        CompletionChoice {
            text: if self.echo { prompt.text.clone() } else { String::new() },
            index,
            logprobs: columns,
            finish_reason: None,
            token_ids: self.settings.return_token_ids.then(Vec::new),
            prompt_token_ids: self.settings.return_token_ids.then(|| prompt.tokens.iter().map(|id| id.0).collect()),
        }
    }
}

impl Answer for TextAnswer {
    type Chunk = Completion;
    type Whole = Completion;

    async fn next(&mut self) -> Result<Option<Vec<Completion>>, ServiceError> {
        if self.closed {
            return Ok(None);
        }
        let Some(event) = self.generation.next().await? else {
            self.closed = true;
            let usage =
                self.settings.include_usage.then(|| self.object(Vec::new(), Some(Some(self.generation.usage()))));
            return Ok(Some(usage.into_iter().collect()));
        };
        let mut choice = self.choice(event);
        let finish_reason = choice.finish_reason.take();
        let index = choice.index;
        let mut chunks = Vec::with_capacity(2);
        let has_ids = [&choice.token_ids, &choice.prompt_token_ids]
            .iter()
            .any(|ids| ids.as_ref().is_some_and(|ids| !ids.is_empty()));
        if !choice.text.is_empty()
            || has_ids
            || choice.logprobs.as_ref().is_some_and(|columns| !columns.tokens.is_empty())
        {
            chunks.push(self.chunk(choice));
        }
        if finish_reason.is_some() {
            chunks.push(self.chunk(CompletionChoice {
                text: String::new(),
                index,
                logprobs: None,
                finish_reason,
                token_ids: None,
                prompt_token_ids: None,
            }));
        }
        Ok(Some(chunks))
    }

    async fn whole(mut self) -> Result<Completion, ServiceError> {
        let mut choices: Vec<_> = (0..self.generation.num_choices()).map(|index| self.blank(index)).collect();
        while let Some(event) = self.generation.next().await? {
            let news = self.choice(event);
            let choice = &mut choices[news.index];
            choice.text += &news.text;
            choice.finish_reason = news.finish_reason;
            if let (Some(all), Some(columns)) = (&mut choice.logprobs, news.logprobs) {
                logprobs::append(all, columns);
            }
            if let (Some(all), Some(ids)) = (&mut choice.token_ids, news.token_ids) {
                all.extend(ids);
            }
            choice.prompt_token_ids = choice.prompt_token_ids.take().or(news.prompt_token_ids);
        }
        let usage = self.generation.usage();
        Ok(self.object(choices, Some(Some(usage))))
    }

    fn is_stream(&self) -> bool {
        self.settings.stream
    }
}

impl TextAnswer {
    /// A choice of which nothing is known yet.
    fn blank(&self, index: usize) -> CompletionChoice {
        CompletionChoice {
            text: String::new(),
            index,
            logprobs: self.settings.logprobs.map(|_| CompletionLogprobs::default()),
            finish_reason: None,
            token_ids: self.settings.return_token_ids.then(Vec::new),
            prompt_token_ids: None,
        }
    }
}
