//! Wire request -> parsed request: ranges, defaults and combinations. Only this file makes the types below, so what
//! comes after need not check again.

use std::cmp::Ordering;

use bitnet_core::{TokenId, sampling::SamplingParams};
use indexmap::IndexMap;

use super::{ServiceError, constraint::RequestRule};
use crate::{
    grammar::{CallRule, Function, Rule},
    openai::{
        ChatCompletionRequest, CompletionRequest, FunctionDefinition, Message, OutputFormat, OutputKind, Params,
        Prompt, Stop, ToolRequest,
    },
    output::StopStrings,
    prompt::ChatOptions,
};

/// What a request may ask for, and what it gets when it does not say.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestRules {
    /// Most choices (`--max-n`).
    pub max_choices: u32,
    /// Ids in the vocabulary.
    pub vocab_size: usize,
    /// Default temperature.
    pub temperature: f32,
    /// Default nucleus.
    pub top_p: f32,
    /// Default top-k; 0 is off.
    pub top_k: u32,
    /// Default of `max_tokens`, where the operator sets one.
    pub max_tokens: Option<usize>,
}

/// A chat request that may be served.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    /// The conversation, at least one message.
    pub messages: Vec<Message>,
    /// How the prompt is put together, the tools that may be called included.
    pub prompt: ChatOptions,
    /// The rest.
    pub settings: Settings,
}

/// A text request that may be served.
#[derive(Clone, Debug)]
pub struct TextRequest {
    /// At least one prompt.
    pub prompt: Prompt,
    /// Put the prompt before the completion.
    pub echo: bool,
    /// Of the choices of each prompt, how many are told: those with the highest mean log-probability. `None`: all.
    pub num_told: Option<usize>,
    /// The rest.
    pub settings: Settings,
}

/// What chat and text requests have in common, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Checked by [`SamplingParams::validated`].
    pub sampling: SamplingParams,
    /// Whether the same request always gets the same tokens.
    pub deterministic: bool,
    /// Choices a prompt.
    pub num_choices: u32,
    /// Tokens a choice; `None`: to the end of the context.
    pub max_tokens: Option<MaxTokens>,
    /// Tokens before which nothing ends a choice.
    pub min_tokens: usize,
    /// Generate past end-of-generation tokens.
    pub ignore_eos: bool,
    /// Strings that end a choice.
    pub stop: StopStrings,
    /// Alternatives a token; `None`: no log-probabilities.
    pub logprobs: Option<usize>,
    /// Add token ids to the answer.
    pub return_token_ids: bool,
    /// Server-sent events.
    pub stream: bool,
    /// A usage chunk at the end of the stream.
    pub include_usage: bool,
    /// Random characters in each chunk.
    pub include_obfuscation: bool,
    /// What the caller noted down.
    pub metadata: Option<IndexMap<String, String>>,
    /// Whether caches may be used.
    pub cache_prompt: bool,
    /// Orders the caller's own waiting requests, lower first.
    pub priority: i64,
    /// What the output must look like.
    pub rule: Option<RequestRule>,
    /// A guess of the output.
    pub prediction: Option<String>,
}

/// `max_tokens`, and whether the caller insists on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxTokens {
    /// Tokens a choice.
    pub tokens: usize,
    /// From the request: it is an error when they do not fit. A default is cut to what fits.
    pub requested: bool,
}

/// Most alternatives a token, in both APIs.
const MAX_LOGPROBS: u64 = 20;
/// `max_tokens` of text completions when neither request nor operator says.
const COMPLETION_MAX_TOKENS: usize = 16;

impl ChatRequest {
    /// Checks `wire` against `rules`.
    ///
    /// # Errors
    /// [`ServiceError::Invalid`], naming the field.
    pub fn parse(wire: ChatCompletionRequest, rules: &RequestRules) -> Result<Self, ServiceError> {
        if wire.messages.is_empty() {
            return Err(ServiceError::invalid("messages", "'messages' must hold at least one message."));
        }
        if wire.params.max_tokens == Some(0) {
            let field = wire.params.max_tokens_field;
            return Err(ServiceError::invalid(field, format!("'{field}' must be at least 1.")));
        }
        let logprobs = match (wire.logprobs, wire.top_logprobs) {
            (false, None) => None,
            (false, Some(_)) => {
                return Err(ServiceError::invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true."));
            }
            (true, top) => Some(alternatives("top_logprobs", top.unwrap_or(0))?),
        };
        let mut settings = Settings::parse(wire.params, logprobs, None, rules)?;
        let prompt = ChatOptions {
            add_generation_prompt: wire.prompt.add_generation_prompt,
            continue_final_message: wire.prompt.continue_final_message,
            tools: wire.tools.as_ref().map(|tools| tools.listed.clone()),
            extra: wire.prompt.template_variables,
            ..ChatOptions::default()
        };
        if let Some(tools) = wire.tools {
            settings.rule = Some(call_rule(tools, settings.rule)?);
        }
        Ok(Self { messages: wire.messages, prompt, settings })
    }
}

impl TextRequest {
    /// Checks `wire` against `rules`.
    ///
    /// # Errors
    /// [`ServiceError::Invalid`], naming the field.
    pub fn parse(wire: CompletionRequest, rules: &RequestRules) -> Result<Self, ServiceError> {
        if wire.prompt.is_empty() {
            return Err(ServiceError::invalid("prompt", "'prompt' must not be empty."));
        }
        wire.prompt.check_ids(rules.vocab_size).map_err(|message| ServiceError::invalid("prompt", message))?;
        let logprobs = wire.logprobs.map(|top| alternatives("logprobs", top)).transpose()?;
        let mut settings = Settings::parse(wire.params, logprobs, Some(COMPLETION_MAX_TOKENS), rules)?;
        let best_of = best_of(wire.best_of, &settings, rules.max_choices)?;
        let num_told = best_of.map(|_| settings.num_choices as usize);
        settings.num_choices = best_of.unwrap_or(settings.num_choices);
        Ok(Self { prompt: wire.prompt, echo: wire.echo, num_told, settings })
    }
}

/// `best_of`, where it says more than `n` does.
fn best_of(wire: Option<u64>, settings: &Settings, max: u32) -> Result<Option<u32>, ServiceError> {
    const PARAM: &str = "best_of";
    let n = settings.num_choices;
    match wire.map(u32::try_from) {
        None => Ok(None),
        Some(Ok(best_of)) if best_of == n => Ok(None),
        Some(Ok(best_of)) if (n..=max).contains(&best_of) && settings.stream => {
            Err(ServiceError::invalid(PARAM, "'best_of' cannot be streamed: what is best is known at the end."))
        }
        Some(Ok(best_of)) if (n..=max).contains(&best_of) => Ok(Some(best_of)),
        Some(_) => Err(ServiceError::invalid(PARAM, format!("'{PARAM}' must be between 'n' and {max}."))),
    }
}

impl Settings {
    fn parse(
        params: Params,
        logprobs: Option<usize>,
        default_max_tokens: Option<usize>,
        rules: &RequestRules,
    ) -> Result<Self, ServiceError> {
        let num_choices = num_choices(params.n, rules.max_choices)?;
        let stop = stop_strings(params.stop.clone())?;
        let sampling = sampling(&params, rules)?;
        let max_tokens = match params.max_tokens {
            Some(tokens) => Some(MaxTokens { tokens: saturated(tokens), requested: true }),
            None => rules.max_tokens.or(default_max_tokens).map(|tokens| MaxTokens { tokens, requested: false }),
        };
        let min_tokens = saturated(params.min_tokens.unwrap_or(0));
        if max_tokens.is_some_and(|max| max.requested && min_tokens > max.tokens) {
            return Err(ServiceError::invalid("min_tokens", "'min_tokens' must not exceed 'max_tokens'."));
        }
        Ok(Self {
            deterministic: sampling.temperature == 0.0 || params.seed.is_some(),
            sampling,
            num_choices,
            max_tokens,
            min_tokens,
            ignore_eos: params.ignore_eos,
            stop,
            logprobs,
            return_token_ids: params.return_token_ids,
            stream: params.stream,
            include_usage: params.include_usage,
            include_obfuscation: params.include_obfuscation,
            metadata: params.metadata,
            cache_prompt: params.cache_prompt.unwrap_or(true),
            priority: params.priority.unwrap_or(0),
            rule: params.output.map(rule),
            prediction: params.prediction,
        })
    }
}

fn rule(format: OutputFormat) -> RequestRule {
    let rule = match format.kind {
        OutputKind::JsonObject => Rule::json_object(),
        OutputKind::Schema(schema) => Rule::Schema(schema),
        OutputKind::Regex(text) => Rule::Regex(text),
        OutputKind::Choice(texts) => Rule::Choice(texts),
        OutputKind::Grammar(text) => Rule::Lark(text),
    };
    RequestRule { param: format.param, path: format.path.to_owned(), rule }
}

/// The rule of an output that may call `tools`, and without calls follows `otherwise`.
fn call_rule(tools: ToolRequest, otherwise: Option<RequestRule>) -> Result<RequestRule, ServiceError> {
    const PARAM: &str = "tools";
    let (path, otherwise) = match otherwise {
        None => (PARAM.to_owned(), None),
        Some(RequestRule { rule: Rule::Schema(schema), path, .. }) => (path, Some(schema)),
        Some(RequestRule { param, .. }) => {
            return Err(ServiceError::invalid(param, format!("'{param}' cannot be combined with '{PARAM}'.")));
        }
    };
    let function = |function: FunctionDefinition| Function {
        path: function.path,
        name: function.name,
        parameters: function.parameters,
    };
    let functions = tools.functions.into_iter().map(function).collect();
    let rule = CallRule { functions, required: tools.required, parallel: tools.parallel, otherwise };
    Ok(RequestRule { param: PARAM, path, rule: Rule::Calls(rule) })
}

fn num_choices(n: Option<u64>, max: u32) -> Result<u32, ServiceError> {
    match u32::try_from(n.unwrap_or(1)) {
        Ok(n) if (1..=max).contains(&n) => Ok(n),
        _ => Err(ServiceError::invalid("n", format!("'n' must be between 1 and {max}."))),
    }
}

fn stop_strings(stop: Option<Stop>) -> Result<StopStrings, ServiceError> {
    let strings = match stop {
        None => Vec::new(),
        Some(Stop::One(string)) => vec![string],
        Some(Stop::Many(strings)) => strings,
    };
    StopStrings::new(strings)
        .map_err(|error| ServiceError::invalid("stop", format!("Invalid value for 'stop': {error}.")))
}

fn alternatives(param: &'static str, top: u64) -> Result<usize, ServiceError> {
    if top > MAX_LOGPROBS {
        return Err(ServiceError::invalid(param, format!("'{param}' must be between 0 and {MAX_LOGPROBS}.")));
    }
    Ok(saturated(top))
}

/// Ranges are the core's to check; here the wire's wide numbers become its types, and absent ones the defaults.
fn sampling(params: &Params, rules: &RequestRules) -> Result<SamplingParams, ServiceError> {
    let number = |param: &'static str, value: Option<f64>, default: f32| match value {
        // A value that only becomes infinite as f32 is out of every range anyway, and NaN cannot be written in JSON.
        Some(value) => narrow(param, value),
        None => Ok(default),
    };
    let top_k = match params.top_k {
        None => rules.top_k,
        Some(-1) => 0,
        Some(top_k) => u32::try_from(top_k)
            .map_err(|_| ServiceError::invalid("top_k", "'top_k' must be 0 or more (0 and -1 mean off)."))?,
    };
    let raw = SamplingParams {
        temperature: number("temperature", params.temperature, rules.temperature)?,
        top_p: number("top_p", params.top_p, rules.top_p)?,
        top_k,
        min_p: number("min_p", params.min_p, 0.0)?,
        frequency_penalty: number("frequency_penalty", params.frequency_penalty, 0.0)?,
        presence_penalty: number("presence_penalty", params.presence_penalty, 0.0)?,
        repetition_penalty: number("repetition_penalty", params.repetition_penalty, 1.0)?,
        logit_bias: logit_bias(params)?,
        seed: params.seed.unwrap_or_else(rand::random),
    };
    raw.validated(rules.vocab_size)
        .map_err(|error| ServiceError::invalid(error.param, format!("Invalid value for {error}.")))
}

/// `value` as f32, without letting one outside a range slip in by rounding: 2.00000001 is not 2.
fn narrow(param: &'static str, value: f64) -> Result<f32, ServiceError> {
    let narrowed = value as f32;
    if !narrowed.is_finite() {
        return Err(ServiceError::invalid(param, format!("Invalid value for '{param}': {value:e} is out of range.")));
    }
    let exact = f64::from(narrowed);
    // Ranges end at whole numbers: a value that only rounds to one keeps to its own side of it. Next to 0 there is no need.
    Ok(match value.partial_cmp(&exact) {
        Some(Ordering::Greater) if narrowed.fract() == 0.0 && narrowed != 0.0 => narrowed.next_up(),
        Some(Ordering::Less) if narrowed.fract() == 0.0 && narrowed != 0.0 => narrowed.next_down(),
        _ => narrowed,
    })
}

fn logit_bias(params: &Params) -> Result<Vec<(TokenId, f32)>, ServiceError> {
    let mut pairs = Vec::with_capacity(params.logit_bias.len().min(300));
    for (key, bias) in &params.logit_bias {
        let id = key.parse().map_err(|_| {
            let key: String = key.chars().take(40).collect();
            ServiceError::invalid("logit_bias", format!("'logit_bias' maps token ids, and '{key}' is none."))
        })?;
        pairs.push((TokenId(id), narrow("logit_bias", *bias)?));
    }
    pairs.sort_by_key(|(id, _)| *id);
    if pairs.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Err(ServiceError::invalid("logit_bias", "'logit_bias' names a token id twice."));
    }
    Ok(pairs)
}

fn saturated(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
