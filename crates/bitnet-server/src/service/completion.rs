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
    shown: Shown,
    columns: Vec<Columns>,
    closed: bool,
}

/// What of the prompts and choices is told.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) prompts: Vec<TextPrompt>,
    /// The prompts before their completions.
    pub(super) echo: bool,
    /// Choices of each prompt, the best ones; `None`: all.
    pub(super) num_told: Option<usize>,
}

impl TextAnswer {
    pub(super) fn new(
        identity: Identity,
        settings: Settings,
        tokenizer: Arc<Tokenizer>,
        generation: Generation,
        shown: Shown,
    ) -> Self {
        let columns = (0..generation.num_choices()).map(|_| Columns::new()).collect();
        Self { identity, settings, tokenizer, generation, shown, columns, closed: false }
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
        let prompt = &self.shown.prompts[index / self.settings.num_choices as usize];
        let columns = logprobs
            .filter(|_| self.shown.echo)
            .map(|logprobs| self.columns[index].prompt(&self.tokenizer, &prompt.tokens, &logprobs, prompt.hidden_bos));
        CompletionChoice {
            text: if self.shown.echo { prompt.text.clone() } else { String::new() },
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
        let mut scores = vec![Score::default(); choices.len()];
        while let Some(event) = self.generation.next().await? {
            if let Event::Delta { choice, delta } = &event {
                scores[*choice].add(delta);
            }
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
        if let Some(num_told) = self.shown.num_told {
            choices = best(choices, &scores, self.settings.num_choices as usize, num_told);
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

/// How likely a choice is.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    sum: f64,
    num_tokens: u32,
}

impl Score {
    fn add(&mut self, delta: &Delta) {
        for logprobs in delta.tokens.iter().filter_map(|event| event.logprobs.as_ref()) {
            self.sum += f64::from(logprobs.logprob);
            self.num_tokens += 1;
        }
    }

    /// Mean log-probability of a token.
    fn mean(self) -> f64 {
        self.sum / f64::from(self.num_tokens.max(1))
    }
}

/// Of each prompt's `num_choices` the `num_told` best ones, best first (the earlier one of equals).
fn best(
    choices: Vec<CompletionChoice>,
    scores: &[Score],
    num_choices: usize,
    num_told: usize,
) -> Vec<CompletionChoice> {
    let mut choices: Vec<_> = choices.into_iter().zip(scores).collect();
    let mut told = Vec::with_capacity(choices.len() / num_choices * num_told);
    for of_one_prompt in choices.chunks_mut(num_choices) {
        of_one_prompt.sort_by(|(_, one), (_, other)| other.mean().total_cmp(&one.mean()));
    }
    for (place, (choice, _)) in choices.into_iter().enumerate() {
        if place % num_choices < num_told {
            told.push(CompletionChoice { index: told.len(), ..choice });
        }
    }
    told
}
