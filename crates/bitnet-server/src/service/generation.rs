//! A running answer: the events of all its choices, merged as they come. Dropping it cancels whatever still runs.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use bitnet_core::TokenId;
use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};

use super::{
    ServiceError,
    cache::{CachedAnswer, Recorder, SharedStream},
    choice::{Choice, Delta},
    meter::Meter,
};
use crate::{
    engine::{Prediction, PromptLogprobs, SequenceEvent, SequenceStream},
    filter::RuleHit,
    openai::{FinishReason, Usage},
};

/// What a reader of a [`Generation`] learns.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The prompt of a choice has been computed.
    PromptDone {
        /// Index of the choice.
        choice: usize,
        /// Log-probabilities of the prompt, if asked for.
        logprobs: Option<PromptLogprobs>,
    },
    /// A choice has text, tokens, or its end.
    Delta {
        /// Index of the choice.
        choice: usize,
        /// The news.
        delta: Delta,
    },
}

/// The prompt of `num_choices` neighbouring choices.
#[derive(Clone, Debug)]
pub struct PromptInfo {
    /// Its tokens.
    pub tokens: Arc<[TokenId]>,
    /// Of them, how many came from the prefix cache.
    pub cached_tokens: usize,
    /// What its choices were expected to say.
    pub prediction: Arc<[TokenId]>,
}

/// A running answer.
pub struct Generation {
    prompts: Vec<PromptInfo>,
    choices_per_prompt: usize,
    /// `None`: the choice has ended.
    choices: Vec<Option<Choice>>,
    /// How far each choice follows what was expected.
    predictions: Vec<Prediction>,
    sources: FuturesUnordered<BoxFuture<'static, (usize, SequenceEvent, Source)>>,
    completion_tokens: usize,
    first_finish: Option<FinishReason>,
    /// This reader's own: the sequences may be read by others for longer.
    deadline: Instant,
    meter: Meter,
    recorder: Option<Recorder>,
    on_match: Box<dyn Fn(&RuleHit) + Send + Sync>,
}

/// Where the events of a choice come from.
pub(super) enum Source {
    /// The engine; dropping it cancels the sequence.
    Live(SequenceStream),
    /// The engine, read by others too; the number of the next event.
    Shared(Arc<SharedStream>, usize),
    /// The response cache.
    Replay(VecDeque<SequenceEvent>),
}

impl Source {
    async fn next(mut self, choice: usize) -> (usize, SequenceEvent, Self) {
        let event = match &mut self {
            Self::Live(stream) => stream.next().await,
            Self::Shared(stream, index) => {
                let event = stream.event(*index).await;
                *index += 1;
                event
            }
            // A cached answer holds everything up to the event that ended its choice.
            Self::Replay(events) => {
                events.pop_front().unwrap_or(SequenceEvent::Failed(crate::engine::EngineError::Stopped))
            }
        };
        (choice, event, self)
    }
}

impl Generation {
    pub(super) fn new(
        prompts: Vec<PromptInfo>,
        choices: Vec<(Choice, Source)>,
        deadline: Instant,
        meter: Meter,
        recorder: Option<Recorder>,
        on_match: Box<dyn Fn(&RuleHit) + Send + Sync>,
    ) -> Self {
        let choices_per_prompt = choices.len() / prompts.len().max(1);
        let sources = FuturesUnordered::new();
        let mut stages = Vec::with_capacity(choices.len());
        for (index, (stage, source)) in choices.into_iter().enumerate() {
            stages.push(Some(stage));
            sources.push(Box::pin(source.next(index)) as BoxFuture<'static, _>);
        }
        let prediction =
            |prompt: &PromptInfo| vec![Prediction::new(Arc::clone(&prompt.prediction)); choices_per_prompt];
        Self {
            predictions: prompts.iter().flat_map(prediction).collect(),
            prompts,
            choices_per_prompt,
            choices: stages,
            sources,
            completion_tokens: 0,
            first_finish: None,
            deadline,
            meter,
            recorder,
            on_match,
        }
    }

    /// The next event; `None` when every choice has ended. Cancel-safe.
    ///
    /// # Errors
    /// The first choice that fails ends the whole answer.
    pub async fn next(&mut self) -> Result<Option<Event>, ServiceError> {
        loop {
            let next = tokio::time::timeout_at(self.deadline.into(), self.sources.next()).await;
            let Ok(next) = next else { return Err(self.fail(ServiceError::Timeout)) };
            let Some((choice, event, source)) = next else { return Ok(None) };
            if let Some(recorder) = &mut self.recorder {
                recorder.record(choice, &event);
            }
            match self.apply(choice, event) {
                Ok(event) => {
                    if self.choices[choice].is_some() {
                        self.sources.push(Box::pin(source.next(choice)));
                    } else if self.choices.iter().all(Option::is_none) {
                        self.complete();
                    }
                    if let Some(event) = event {
                        return Ok(Some(event));
                    }
                }
                Err(error) => return Err(self.fail(error)),
            }
        }
    }

    fn fail(&mut self, error: ServiceError) -> ServiceError {
        self.sources.clear();
        self.meter.fail(&error);
        error
    }

    /// Number of choices, over all prompts.
    pub fn num_choices(&self) -> usize {
        self.choices.len()
    }

    /// The prompt of choice `choice`.
    pub fn prompt_of(&self, choice: usize) -> &PromptInfo {
        &self.prompts[choice / self.choices_per_prompt]
    }

    /// Token counts up to now; each prompt counts once.
    pub fn usage(&self) -> Usage {
        let prompt_tokens = self.prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let cached_tokens = self.prompts.iter().map(|prompt| prompt.cached_tokens).sum();
        let mut usage = Usage::new(prompt_tokens, self.completion_tokens, cached_tokens);
        let details = &mut usage.completion_tokens_details;
        details.accepted_prediction_tokens = self.predictions.iter().map(Prediction::num_accepted).sum();
        details.rejected_prediction_tokens = self.predictions.iter().map(Prediction::num_rejected).sum();
        usage
    }

    /// One engine event through the stages of its choice; `None` when nothing may be told yet.
    fn apply(&mut self, index: usize, event: SequenceEvent) -> Result<Option<Event>, ServiceError> {
        let Some(choice) = &mut self.choices[index] else { return Ok(None) };
        let delta = match event {
            SequenceEvent::PromptDone { cached_tokens, logprobs, .. } => {
                if index.is_multiple_of(self.choices_per_prompt) {
                    self.prompts[index / self.choices_per_prompt].cached_tokens = cached_tokens;
                }
                return Ok(Some(Event::PromptDone { choice: index, logprobs }));
            }
            SequenceEvent::Token(token) => {
                self.completion_tokens += 1;
                self.meter.token(index);
                self.predictions[index].follow(token.token);
                choice.token(token)
            }
            SequenceEvent::Finished(reason) => choice.finish(reason),
            SequenceEvent::Failed(error) => return Err(error.into()),
        };
        delta.matches.iter().for_each(&self.on_match);
        if let Some(reason) = delta.finish {
            self.choices[index] = None;
            if index == 0 {
                self.first_finish = Some(reason);
            }
            if reason == FinishReason::ContentFilter {
                // What a filter cut is not kept: rules may change.
                self.recorder = None;
            }
        } else if delta.text.is_empty() && delta.tokens.is_empty() {
            return Ok(None);
        }
        Ok(Some(Event::Delta { choice: index, delta }))
    }

    fn complete(&mut self) {
        let usage = self.usage();
        self.meter.finish(self.first_finish.unwrap_or(FinishReason::Stop), &usage);
        if let Some(recorder) = self.recorder.take() {
            recorder.keep();
        }
    }
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generation").field("choices", &self.choices.len()).field("usage", &self.usage()).finish()
    }
}

/// Sources that replay `answer`.
pub(super) fn replay(answer: &CachedAnswer) -> Vec<Source> {
    answer.choices().map(|events| Source::Replay(events.iter().cloned().collect())).collect()
}
