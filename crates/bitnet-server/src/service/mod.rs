//! The whole request path on one page: parse, reserve, screen, tokenize, fit, submit, and a running answer comes back.
//!
//! It knows the engine, prompts, filters and caches, and nothing of HTTP. Answers are streams; a whole one is a fold.

mod answer;
mod cache;
mod calls;
mod charge;
mod chat;
mod choice;
mod completion;
mod constraint;
mod embeddings;
mod error;
mod generation;
mod health;
mod lifecycle;
mod logprobs;
mod meter;
mod model;
mod observe;
mod prompting;
mod request;
mod responses;
mod tokens;

pub use answer::{Answer, unix_seconds};
pub use chat::ChatAnswer;
pub use choice::Delta;
pub use completion::TextAnswer;
pub use constraint::RequestRule;
pub use error::ServiceError;
pub use generation::{Event, Generation, PromptInfo};
pub use health::{Health, ProbeReport};
pub use lifecycle::{InFlight, Lifecycle, Phase};
pub use model::{ModelCard, ModelNames};
pub use request::{ChatRequest, MaxTokens, RequestRules, Settings, TextRequest};
pub use responses::ResponseAnswer;

use std::{
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use bitnet_core::{TokenId, Tokenizer};

use crate::{
    engine::{EngineHandle, GenerationRequest, OutputRule, SequenceStream, SubmitPermit},
    filter::ContentFilter,
    grammar::GrammarCompiler,
    limits::{ClientId, RateLimiter},
    metrics::{CacheResult, CancelCause, FilterDirection, Metrics, SecurityEvent},
    openai::{ChatCompletionRequest, CompletionRequest, ResponseRequest, Truncation},
    prompt::ChatPrompter,
    response_cache::{CacheKey, JoinableAnswers, ResponseCache},
};
use answer::Identity;
use cache::{CachedAnswer, Recorder, SharedStream, cache_key};
use charge::Charge;
use choice::Choice;
use completion::Shown;
use generation::{Source, replay};
pub use meter::CutOff;
use meter::Meter;
use prompting::encode_newest;

/// What a service is made of.
#[derive(Debug)]
pub struct Parts {
    /// The served model.
    pub card: ModelCard,
    /// Template and tokenizer.
    pub prompter: ChatPrompter,
    /// The engine.
    pub engine: EngineHandle,
    /// Tokens that end a generation.
    pub stop_tokens: Vec<TokenId>,
    /// Tokens a minute for each client; `None`: no limit.
    pub tokens_per_minute: Option<NonZeroU32>,
    /// Ranges and defaults.
    pub rules: RequestRules,
    /// The content filter, if there are rules.
    pub filter: Option<ContentFilter>,
    /// Bytes of the response cache; 0: off.
    pub response_cache_bytes: usize,
    /// Longest time from arrival to the last byte.
    pub request_timeout: Duration,
    /// Where figures go.
    pub metrics: Arc<Metrics>,
}

/// One loaded model and everything needed to answer requests with it.
#[derive(Debug)]
pub struct Service {
    card: ModelCard,
    prompter: Arc<ChatPrompter>,
    engine: EngineHandle,
    stop_tokens: Arc<[TokenId]>,
    grammars: Arc<GrammarCompiler>,
    token_limiter: RateLimiter,
    rules: RequestRules,
    filter: Option<ContentFilter>,
    cache: Arc<ResponseCache<CachedAnswer>>,
    joinable: JoinableAnswers<SharedStream>,
    request_timeout: Duration,
    metrics: Arc<Metrics>,
    probe: health::Probe,
}

/// How long an answer stays in the response cache.
const ANSWERS_KEPT_FOR: Duration = Duration::from_secs(3600);

/// Who asks, and since when.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The client.
    pub client: ClientId,
    /// When the request arrived.
    pub arrival: Instant,
    /// Whether its tokens are counted. Those of batches are not: their lines wait until nobody else does.
    pub is_limited: bool,
    /// Whether the caller's connection was cut off.
    pub cut_off: CutOff,
}

impl Service {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> Self {
        let grammars = GrammarCompiler::new(Arc::clone(parts.prompter.tokenizer()), &parts.stop_tokens);
        Self {
            card: parts.card,
            grammars: Arc::new(grammars),
            prompter: Arc::new(parts.prompter),
            engine: parts.engine,
            stop_tokens: parts.stop_tokens.into(),
            token_limiter: RateLimiter::new(parts.tokens_per_minute),
            rules: parts.rules,
            filter: parts.filter,
            cache: Arc::new(ResponseCache::new(parts.response_cache_bytes, ANSWERS_KEPT_FOR)),
            joinable: JoinableAnswers::new(),
            request_timeout: parts.request_timeout,
            metrics: parts.metrics,
            probe: health::Probe::new(),
        }
    }

    /// `/v1/chat/completions`.
    ///
    /// # Errors
    /// [`ServiceError`], before anything was generated.
    pub async fn chat(&self, wire: ChatCompletionRequest, caller: Caller) -> Result<ChatAnswer, ServiceError> {
        let (settings, generation) = self.converse(wire, Truncation::Disabled, caller).await?;
        let identity = Identity::new("chatcmpl-", &self.card);
        Ok(ChatAnswer::new(identity, settings, Arc::clone(self.tokenizer()), generation))
    }

    /// `/v1/responses`: a chat, told in other words.
    ///
    /// # Errors
    /// [`ServiceError`], before anything was generated.
    pub async fn respond(&self, wire: ResponseRequest, caller: Caller) -> Result<ResponseAnswer, ServiceError> {
        let ResponseRequest { chat, echo } = wire;
        let conversation = self.converse(chat, echo.truncation, caller).await;
        let (settings, generation) = conversation.map_err(|error| error.about("messages", "input"))?;
        let identity = Identity::new("resp_", &self.card);
        Ok(ResponseAnswer::new(identity, settings, echo, Arc::clone(self.tokenizer()), generation))
    }

    /// From a conversation to what answers it.
    async fn converse(
        &self,
        wire: ChatCompletionRequest,
        truncation: Truncation,
        caller: Caller,
    ) -> Result<(Settings, Generation), ServiceError> {
        self.card.names.resolve(wire.model.as_deref())?;
        self.card.generates()?;
        let request = ChatRequest::parse(wire, &self.rules)?;
        let settings = request.settings;
        let context = self.card.max_model_len;
        if request.messages.len() > context && truncation == Truncation::Disabled {
            let message = format!(
                "More messages than this model's context of {context} tokens has room for. Please shorten them."
            );
            return Err(ServiceError::ContextLength { param: "messages", message });
        }
        let places = self.reserve(1)?;
        let constraint = self.constraint(settings.rule.as_ref()).await?;
        let messages = self.screened_messages(request.messages)?;
        let mut options = request.prompt;
        options.most_tokens = context;
        let continues = options.continue_final_message;
        let asked = settings.max_tokens.filter(|max| max.requested).map_or(1, |max| max.tokens);
        let room = context.saturating_sub(asked);
        let encode = move |prompter: &ChatPrompter| match truncation {
            Truncation::Disabled => prompter.encode_chat(&messages, &options),
            Truncation::Auto => encode_newest(prompter, &messages, &options, room),
        };
        let prompt = self.with_prompter(encode, "messages").await?;
        let mut requests = vec![self.fit("messages", prompt, &settings, None, constraint, &caller)?];
        let charge = self.charge("messages", &requests, &caller)?;
        self.predict(&mut requests, settings.prediction.clone()).await?;
        let generation = self.start(places, requests, &settings, continues, caller)?;
        charge.keep();
        Ok((settings, generation))
    }

    /// `/v1/completions`.
    ///
    /// # Errors
    /// [`ServiceError`], before anything was generated.
    pub async fn complete(&self, wire: CompletionRequest, caller: Caller) -> Result<TextAnswer, ServiceError> {
        self.card.names.resolve(wire.model.as_deref())?;
        self.card.generates()?;
        let TextRequest { prompt, echo, num_told, mut settings } = TextRequest::parse(wire, &self.rules)?;
        let shown_logprobs = settings.logprobs;
        // What is best is decided by log-probabilities, whether they are shown or not.
        settings.logprobs = shown_logprobs.or(num_told.map(|_| 0));
        let places = self.reserve(prompt.len())?;
        let constraint = self.constraint(settings.rule.as_ref()).await?;
        let prompts = self.text_prompts("prompt", prompt).await?;
        let prompt_logprobs = shown_logprobs.filter(|_| echo);
        let fit = |prompt: &prompting::TextPrompt| {
            self.fit("prompt", prompt.tokens.clone(), &settings, prompt_logprobs, constraint.clone(), &caller)
        };
        let mut requests = prompts.iter().map(fit).collect::<Result<Vec<_>, _>>()?;
        let charge = self.charge("prompt", &requests, &caller)?;
        self.predict(&mut requests, settings.prediction.clone()).await?;
        let generation = self.start(places, requests, &settings, true, caller)?;
        charge.keep();
        settings.logprobs = shown_logprobs;
        let identity = Identity::new("cmpl-", &self.card);
        let shown = Shown { prompts, echo, num_told };
        Ok(TextAnswer::new(identity, settings, Arc::clone(self.tokenizer()), generation, shown))
    }

    /// Places for `count` prompts, taken before any work is done for them: all or none.
    fn reserve(&self, count: usize) -> Result<Vec<SubmitPermit>, ServiceError> {
        let max = self.engine.status().max_waiting;
        if count > max {
            return Err(ServiceError::invalid("prompt", format!("One request may hold at most {max} prompts here.")));
        }
        let refused = |error| ServiceError::refused(error, self.engine.status().retry_after_seconds);
        (0..count).map(|_| self.engine.reserve().map_err(refused)).collect()
    }

    /// `prompt` as a request to the engine, if it fits the context.
    fn fit(
        &self,
        param: &'static str,
        prompt: Vec<TokenId>,
        settings: &Settings,
        prompt_logprobs: Option<usize>,
        constraint: Option<Arc<dyn OutputRule>>,
        caller: &Caller,
    ) -> Result<GenerationRequest, ServiceError> {
        let (context, len) = (self.card.max_model_len, prompt.len());
        if prompt.is_empty() {
            return Err(ServiceError::invalid(param, format!("'{param}' holds no tokens.")));
        }
        let room = context.saturating_sub(len);
        // What nobody asked for is no reason to refuse a request: it ends where the caller's minute does.
        let limit = self.token_limiter.limit().filter(|_| caller.is_limited);
        let allowed =
            limit.map_or(room, |limit| (limit as usize).saturating_sub(len) / settings.num_choices.max(1) as usize);
        let most = room.min(allowed).max(1);
        let max_tokens = match settings.max_tokens {
            Some(max) if max.requested => max.tokens,
            Some(max) => max.tokens.min(most),
            None => most,
        };
        if max_tokens > room {
            // Of a prompt that is too long alone, not even the tokenizer knows how long it is.
            let asked = if len > context { format!("more than {context}") } else { len.to_string() };
            let message = format!(
                "This model's maximum context length is {context} tokens, but {asked} tokens of prompt and {max_tokens} of \
                 completion were asked for. Please shorten the prompt or lower max_tokens."
            );
            return Err(ServiceError::ContextLength { param, message });
        }
        Ok(GenerationRequest {
            prompt,
            sampling: settings.sampling.clone(),
            num_choices: settings.num_choices,
            max_tokens,
            // A constrained output ends where its rule says.
            min_tokens: if constraint.is_some() { 0 } else { settings.min_tokens },
            stop_tokens: match (settings.ignore_eos, &constraint) {
                (true, None) => Arc::new([]),
                _ => Arc::clone(&self.stop_tokens),
            },
            logprobs: settings.logprobs,
            prompt_logprobs,
            cache_prompt: settings.cache_prompt,
            priority: settings.priority,
            client: caller.client,
            constraint,
            pooling: None,
            prediction: Arc::new([]),
            deadline: Some(caller.arrival + self.request_timeout),
            arrival: caller.arrival,
        })
    }

    /// Counts the tokens of `requests`, whose prompts came in field `param`, as those of the caller: all that may be computed,
    /// before any of it is. Given back unless they are kept.
    fn charge(&self, param: &str, requests: &[GenerationRequest], caller: &Caller) -> Result<Charge<'_>, ServiceError> {
        let (limiter, client) = (&self.token_limiter, caller.client);
        if !caller.is_limited {
            return Ok(Charge { limiter, client, tokens: 0 });
        }
        let tokens = |request: &GenerationRequest| {
            request.max_tokens.saturating_mul(request.num_choices as usize).saturating_add(request.prompt.len())
        };
        let total = requests.iter().map(tokens).fold(0, usize::saturating_add);
        let tokens = u32::try_from(total).unwrap_or(u32::MAX);
        let refused = |refused| ServiceError::refused_by_limit(refused, "tokens", Some((param, total)));
        limiter.take(&client, tokens).map_err(refused)?;
        Ok(Charge { limiter, client, tokens })
    }

    /// The tokens of each client.
    pub fn token_limiter(&self) -> &RateLimiter {
        &self.token_limiter
    }

    /// Submits `requests`, reads along where the same ones run, or replays what they got before. `continues`: the text goes on from the prompt's.
    fn start(
        &self,
        places: Vec<SubmitPermit>,
        requests: Vec<GenerationRequest>,
        settings: &Settings,
        continues: bool,
        caller: Caller,
    ) -> Result<Generation, ServiceError> {
        let num_choices = requests.len() * settings.num_choices as usize;
        let info = |request: &GenerationRequest| PromptInfo {
            tokens: request.prompt.as_slice().into(),
            cached_tokens: 0,
            prediction: Arc::clone(&request.prediction),
        };
        let prompts: Vec<_> = requests.iter().map(info).collect();
        let stage = |index: usize| {
            let prompt = &prompts[index / settings.num_choices as usize].tokens;
            let continues = prompt.last().copied().filter(|_| continues);
            let filter = self.filter.as_ref().and_then(ContentFilter::output_filter);
            let tokenizer = Arc::clone(self.tokenizer());
            let choice = Choice::new(tokenizer, settings.stop.clone(), settings.min_tokens, continues, filter);
            if settings.rule.as_ref().is_some_and(RequestRule::is_closed) { choice.with_form() } else { choice }
        };
        let stages: Vec<_> = (0..num_choices).map(stage).collect();

        let key = (settings.deterministic && settings.cache_prompt && self.cache.is_enabled())
            .then(|| cache_key(&self.card.fingerprint, &caller.client, &requests, &settings.stop));
        let cached = key.as_ref().and_then(|key| self.cache.get(key, Instant::now()));
        let (sources, live, result) = match (&cached, key) {
            (Some(answer), _) => (replay(answer), false, CacheResult::Hit),
            (None, Some(key)) => {
                let (sources, joined) = self.join_or_submit(key, places, requests)?;
                (sources, !joined, if joined { CacheResult::Hit } else { CacheResult::Miss })
            }
            (None, None) => {
                (self.submit(places, requests)?.into_iter().map(Source::Live).collect(), true, CacheResult::Bypass)
            }
        };
        self.metrics.record_response_cache(result);
        let recorder = key
            .filter(|_| cached.is_none())
            .map(|key| Recorder::new(Arc::clone(&self.cache), Arc::clone(&self.metrics), key, num_choices));
        let deadline = caller.arrival + self.request_timeout;
        let meter = Meter::new(Arc::clone(&self.metrics), caller, num_choices, live);
        let choices = stages.into_iter().zip(sources).collect();
        Ok(Generation::new(prompts, choices, deadline, meter, recorder, self.on_match()))
    }

    /// Reads along when the same answer is under way, and `true`; else starts it. The sequence has no deadline of its own then:
    /// it lives until the last of its readers has left, each at its own.
    fn join_or_submit(
        &self,
        key: CacheKey,
        places: Vec<SubmitPermit>,
        mut requests: Vec<GenerationRequest>,
    ) -> Result<(Vec<Source>, bool), ServiceError> {
        requests.iter_mut().for_each(|request| request.deadline = None);
        let start =
            || self.submit(places, requests).map(|streams| streams.into_iter().map(SharedStream::new).collect());
        let (streams, joined) = self.joinable.join_or_start(key, start)?;
        Ok((streams.into_iter().map(|stream| Source::Shared(stream, 0)).collect(), joined))
    }

    fn submit(
        &self,
        places: Vec<SubmitPermit>,
        requests: Vec<GenerationRequest>,
    ) -> Result<Vec<SequenceStream>, ServiceError> {
        let mut streams = Vec::new();
        for (place, request) in places.into_iter().zip(requests) {
            let refused = |error| ServiceError::refused(error, self.engine.status().retry_after_seconds);
            streams.extend(place.submit(request).map_err(refused)?);
        }
        Ok(streams)
    }

    /// What is recorded when a rule matches generated text.
    fn on_match(&self) -> Box<dyn Fn(&crate::filter::RuleHit) + Send + Sync> {
        let metrics = Arc::clone(&self.metrics);
        Box::new(move |hit| {
            observe::rule_hit(&metrics, FilterDirection::Output, hit);
            if hit.action == crate::config::FilterAction::Block {
                metrics.record_security(SecurityEvent::ResponseFiltered);
                metrics.record_cancelled(CancelCause::Filter);
            }
        })
    }

    /// The served model.
    pub fn card(&self) -> &ModelCard {
        &self.card
    }

    /// The engine, for its status and its end.
    pub fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Template and tokenizer.
    pub fn prompter(&self) -> &ChatPrompter {
        &self.prompter
    }

    /// Tokens that end a generation.
    pub fn stop_tokens(&self) -> &Arc<[TokenId]> {
        &self.stop_tokens
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        self.prompter.tokenizer()
    }
}
