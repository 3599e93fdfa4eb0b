//! `/v1/embeddings`: texts in, a vector each out, by models made for it. The texts of one request are prompts like any other
//! to the engine, a few of them at a time.

use std::time::{Duration, Instant};

use bitnet_core::{TokenId, checkpoint::Pooling, sampling::SamplingParams};
use futures_util::{StreamExt, TryStreamExt, stream};

use super::{Caller, Meter, Service, ServiceError};
use crate::{
    engine::{GenerationRequest, SequenceEvent, SequenceStream, SubmitError, SubmitPermit},
    openai::{
        EmbeddingList, EmbeddingObject, EmbeddingRequest, EmbeddingUsage, EmbeddingVector, FinishReason, Prompt, Usage,
    },
};

/// Inputs of one request.
const MAX_INPUTS: usize = 2048;
/// Of them, how many are with the engine at a time, and never more than half a queue: they fill a step, and leave room for
/// others.
const INPUTS_AT_ONCE: usize = 16;
/// How often an input looks for a place in a queue that is full.
const PLACE_CHECK: Duration = Duration::from_millis(10);

const INPUT: &str = "input";

/// What the engine has to say of one input.
struct Embedded {
    vector: Vec<f32>,
    cached_tokens: usize,
}

impl Service {
    /// `/v1/embeddings`.
    ///
    /// # Errors
    /// [`ServiceError`]; the first input that fails ends the whole answer.
    pub async fn embed(&self, wire: EmbeddingRequest, caller: Caller) -> Result<EmbeddingList, ServiceError> {
        self.card.names.resolve(wire.model.as_deref())?;
        let EmbeddingRequest { input, encoding_format, priority, .. } = wire;
        check_input(&input, self.card.vocab_size)?;
        let pooling = self.card.embeds()?;
        let mut place = self.reserve(1)?.pop();
        let prompts = self.text_prompts(INPUT, input).await?;
        let num_tokens = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
        let request = |(index, prompt)| self.vector_request(index, prompt, pooling, priority.unwrap_or(0), &caller);
        let prompts = prompts.into_iter().map(|prompt| prompt.tokens).enumerate();
        let requests = prompts.map(request).collect::<Result<Vec<_>, _>>()?;
        self.charge(INPUT, &requests, &caller)?.keep();

        let mut meter = Meter::new(std::sync::Arc::clone(&self.metrics), caller, requests.len(), true);
        let embedded = stream::iter(requests).map(|request| self.embedded(place.take(), request));
        let at_once = INPUTS_AT_ONCE.min(self.engine.status().max_waiting / 2).max(1);
        let embedded: Result<Vec<_>, _> = embedded.buffered(at_once).try_collect().await;
        let embedded = embedded.inspect_err(|error| meter.fail(error))?;
        let cached_tokens = embedded.iter().map(|input| input.cached_tokens).sum();
        meter.finish(FinishReason::Stop, &Usage::new(num_tokens, 0, cached_tokens));
        let object = |(index, input): (usize, Embedded)| EmbeddingObject {
            object: "embedding",
            index,
            embedding: EmbeddingVector::new(input.vector, encoding_format),
        };
        Ok(EmbeddingList {
            object: "list",
            data: embedded.into_iter().enumerate().map(object).collect(),
            model: self.card.names.id().to_owned(),
            usage: EmbeddingUsage { prompt_tokens: num_tokens, total_tokens: num_tokens },
        })
    }

    /// Input `index` as a request to the engine, if it fits the context.
    fn vector_request(
        &self,
        index: usize,
        prompt: Vec<TokenId>,
        pooling: Pooling,
        priority: i64,
        caller: &Caller,
    ) -> Result<GenerationRequest, ServiceError> {
        let context = self.card.max_model_len;
        if prompt.len() > context {
            let message = format!(
                "This model's maximum context length is {context} tokens, but input {index} has more. Please shorten it."
            );
            return Err(ServiceError::ContextLength { param: INPUT, message });
        }
        Ok(GenerationRequest {
            prompt,
            sampling: SamplingParams::default(),
            num_choices: 1,
            max_tokens: 0,
            min_tokens: 0,
            stop_tokens: [].into(),
            logprobs: None,
            prompt_logprobs: None,
            cache_prompt: true,
            priority,
            client: caller.client,
            constraint: None,
            pooling: Some(pooling),
            prediction: [].into(),
            deadline: Some(caller.arrival + self.request_timeout),
            arrival: caller.arrival,
        })
    }

    /// The vector of one input, which may have its `place` already.
    async fn embedded(
        &self,
        place: Option<SubmitPermit>,
        request: GenerationRequest,
    ) -> Result<Embedded, ServiceError> {
        let (mut vector, mut cached) = (None, 0);
        for mut events in self.enqueue(place, request).await? {
            loop {
                match events.next().await {
                    SequenceEvent::PromptDone { cached_tokens, embedding, .. } => {
                        (vector, cached) = (embedding, cached_tokens);
                    }
                    SequenceEvent::Token(_) => {}
                    SequenceEvent::Finished(_) => break,
                    SequenceEvent::Failed(error) => return Err(error.into()),
                }
            }
        }
        let vector = vector.ok_or_else(|| ServiceError::Internal("the engine gave no vector".to_owned()))?;
        Ok(Embedded { vector, cached_tokens: cached })
    }

    /// The first input of a request is refused where the queue is full; the others wait until there is room, for what was
    /// computed already would be lost.
    async fn enqueue(
        &self,
        place: Option<SubmitPermit>,
        request: GenerationRequest,
    ) -> Result<Vec<SequenceStream>, ServiceError> {
        let refused = |error| ServiceError::refused(error, self.engine.status().retry_after_seconds);
        if let Some(place) = place {
            return place.submit(request).map_err(refused);
        }
        loop {
            match self.engine.reserve().and_then(|place| place.submit(request.clone())) {
                Ok(streams) => return Ok(streams),
                Err(error @ SubmitError::Stopped) => return Err(refused(error)),
                Err(SubmitError::QueueFull | SubmitError::QueueTokens) => {}
            }
            if request.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(ServiceError::Timeout);
            }
            tokio::time::sleep(PLACE_CHECK).await;
        }
    }
}

/// At least one input, none of them empty, and only ids that there are.
fn check_input(input: &Prompt, vocab_size: usize) -> Result<(), ServiceError> {
    let is_empty = match input {
        Prompt::Texts(texts) => texts.iter().any(String::is_empty),
        Prompt::Tokens(prompts) => prompts.iter().any(Vec::is_empty),
    };
    if input.is_empty() || is_empty {
        return Err(ServiceError::invalid(INPUT, "'input' must not be empty, and hold nothing that is."));
    }
    if input.len() > MAX_INPUTS {
        return Err(ServiceError::invalid(INPUT, format!("'input' may hold at most {MAX_INPUTS} texts.")));
    }
    input.check_ids(vocab_size).map_err(|message| ServiceError::invalid(INPUT, message))
}
