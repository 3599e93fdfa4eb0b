//! The parameters that chat and text completions share.

use indexmap::IndexMap;
use schemars::{JsonSchema, Schema};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Content, ContentPart, OutputFormat,
    fields::{BodyError, Fields},
    objects::objects_only,
};

/// Sampling, length and streaming parameters as sent; `None` is absent. Ranges are checked by the service.
#[derive(Clone, Debug, Default, JsonSchema)]
#[schemars(transform = fields_without_a_place)]
pub struct Params {
    /// Tokens to generate a choice at most (`max_completion_tokens` where it is given).
    pub max_tokens: Option<u64>,
    /// The field `max_tokens` came from.
    #[schemars(skip)]
    pub max_tokens_field: &'static str,
    /// Tokens before which no stop token is drawn.
    pub min_tokens: Option<u64>,
    /// 0 is greedy.
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: Option<f64>,
    /// Nucleus.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f64>,
    /// 0 and -1 are off.
    #[schemars(range(min = -1, max = 4_294_967_295_i64))]
    pub top_k: Option<i64>,
    /// Least probability relative to the best.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: Option<f64>,
    /// Penalty on tokens seen in the prompt or the output.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub repetition_penalty: Option<f64>,
    /// Penalty a generated occurrence.
    #[schemars(range(min = -2.0, max = 2.0))]
    pub frequency_penalty: Option<f64>,
    /// Penalty on generated tokens.
    #[schemars(range(min = -2.0, max = 2.0))]
    pub presence_penalty: Option<f64>,
    /// Token id (as JSON key) -> what is added to its logit.
    #[schemars(with = "Option<Value>", transform = logit_bias)]
    pub logit_bias: IndexMap<String, f64>,
    /// Key of the sampling noise.
    pub seed: Option<i64>,
    /// Strings that end a choice.
    #[schemars(with = "Option<Value>", transform = stop)]
    pub stop: Option<Stop>,
    /// Choices.
    #[schemars(range(min = 1))]
    pub n: Option<u64>,
    /// Server-sent events instead of one object.
    #[schemars(with = "Option<bool>")]
    pub stream: bool,
    /// A usage chunk at the end of the stream.
    #[schemars(rename = "stream_options", with = "Option<StreamOptions>")]
    pub include_usage: bool,
    /// Random characters in each chunk of a stream, so that its size tells nothing.
    #[schemars(skip)]
    pub include_obfuscation: bool,
    /// What the caller notes down with the request; it comes back with the answer.
    #[schemars(with = "Option<Value>", transform = metadata_form)]
    pub metadata: Option<IndexMap<String, String>>,
    /// Generate on past the end-of-generation tokens.
    #[schemars(with = "Option<bool>")]
    pub ignore_eos: bool,
    /// Add `token_ids` and `prompt_token_ids` to each choice.
    #[schemars(with = "Option<bool>")]
    pub return_token_ids: bool,
    /// `false` keeps the request away from the caches.
    pub cache_prompt: Option<bool>,
    /// Orders the caller's own waiting requests, lower first.
    pub priority: Option<i64>,
    /// What the output must look like.
    #[schemars(flatten)]
    pub output: Option<OutputFormat>,
    /// A guess of the output, which never changes it.
    pub prediction: Option<String>,
}

/// `stop`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a string or an array of strings")]
pub enum Stop {
    /// One string.
    One(String),
    /// Several.
    Many(Vec<String>),
}

#[derive(Default, Deserialize, JsonSchema)]
#[serde(remote = "Self")]
struct StreamOptions {
    include_usage: Option<bool>,
    include_obfuscation: Option<bool>,
}

/// `prediction`: a guess of the output. It never changes the tokens.
#[derive(Deserialize)]
#[serde(remote = "Self")]
struct Prediction {
    #[serde(rename = "type")]
    kind: String,
    content: Content,
}

objects_only!(StreamOptions, Prediction);

impl Params {
    /// Takes the shared fields.
    pub(super) fn take(fields: &mut Fields) -> Result<Self, BodyError> {
        let stream_options = fields.take::<StreamOptions>("stream_options")?.unwrap_or_default();
        let params = Self {
            max_tokens: fields.take("max_tokens")?,
            max_tokens_field: "max_tokens",
            min_tokens: fields.take("min_tokens")?,
            temperature: fields.take("temperature")?,
            top_p: fields.take("top_p")?,
            top_k: fields.take("top_k")?,
            min_p: fields.take("min_p")?,
            repetition_penalty: fields.take("repetition_penalty")?,
            frequency_penalty: fields.take("frequency_penalty")?,
            presence_penalty: fields.take("presence_penalty")?,
            logit_bias: fields.take_short("logit_bias")?.unwrap_or_default(),
            seed: fields.take("seed")?,
            stop: fields.take_short("stop")?,
            n: fields.take("n")?,
            stream: fields.take("stream")?.unwrap_or(false),
            include_usage: stream_options.include_usage.unwrap_or(false),
            include_obfuscation: stream_options.include_obfuscation.unwrap_or(false),
            metadata: metadata(fields)?,
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            return_token_ids: fields.take("return_token_ids")?.unwrap_or(false),
            cache_prompt: fields.take("cache_prompt")?,
            priority: fields.take("priority")?,
            output: OutputFormat::take(fields)?,
            prediction: prediction(fields)?,
        };
        fields.accept(ACCEPTED);
        for (name, harmless) in REFUSED {
            fields.refuse(name, harmless)?;
        }
        Ok(params)
    }
}

fn prediction(fields: &mut Fields) -> Result<Option<String>, BodyError> {
    const NAME: &str = "prediction";
    let Some(prediction) = fields.take::<Prediction>(NAME)? else { return Ok(None) };
    if prediction.kind != "content" {
        return Err(BodyError::invalid(NAME, "'prediction.type' must be content."));
    }
    match prediction.content {
        Content::Text(text) => Ok(Some(text)),
        Content::Parts(parts) => {
            let text = |part: ContentPart| part.text.filter(|_| part.kind == "text");
            let texts: Option<Vec<_>> = parts.into_iter().map(text).collect();
            let message = "'prediction.content' may hold text parts only.";
            texts.map(|texts| Some(texts.concat())).ok_or_else(|| BodyError::invalid(NAME, message))
        }
    }
}

pub(super) fn metadata(fields: &mut Fields) -> Result<Option<IndexMap<String, String>>, BodyError> {
    const NAME: &str = "metadata";
    let metadata = fields.take::<IndexMap<String, String>>(NAME)?;
    let fits = |(key, value): (&String, &String)| key.chars().count() <= 64 && value.chars().count() <= 512;
    match &metadata {
        Some(pairs) if pairs.len() > 16 || !pairs.iter().all(fits) => {
            let message = "'metadata' may hold 16 pairs, with keys of 64 and values of 512 characters at most.";
            Err(BodyError::invalid(NAME, message))
        }
        _ => Ok(metadata),
    }
}

fn logit_bias(schema: &mut Schema) {
    let bias = json!({"type": "number", "minimum": -100, "maximum": 100});
    schema.insert("type".to_owned(), json!(["object", "null"]));
    schema.insert("maxProperties".to_owned(), 300.into());
    schema.insert("patternProperties".to_owned(), json!({"^[0-9]+$": bias}));
    schema.insert("additionalProperties".to_owned(), false.into());
}

fn stop(schema: &mut Schema) {
    let text = json!({"type": "string", "minLength": 1, "maxLength": 256, "description": "At most 256 bytes."});
    let texts = json!({"type": "array", "items": text, "maxItems": 4});
    schema.insert("anyOf".to_owned(), json!([text, texts, {"type": "null"}]));
}

pub(super) fn metadata_form(schema: &mut Schema) {
    schema.insert("type".to_owned(), json!(["object", "null"]));
    schema.insert("maxProperties".to_owned(), 16.into());
    schema.insert("propertyNames".to_owned(), json!({"maxLength": 64}));
    schema.insert("additionalProperties".to_owned(), json!({"type": "string", "maxLength": 512}));
}

/// Fields that are read without a place in [`Params`].
fn fields_without_a_place(schema: &mut Schema) {
    if let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        let prediction = json!({
            "type": ["object", "null"], "required": ["type", "content"],
            "properties": {
                "type": {"const": "content"},
                "content": {"type": ["string", "array"], "items": {"type": "object", "required": ["type"]}},
            },
        });
        fields.insert("prediction".to_owned(), prediction);
        for name in ACCEPTED {
            fields.entry(*name).or_insert_with(|| json!({"description": "Accepted; it does not change the tokens."}));
        }
    }
}

/// Fields that are taken note of elsewhere or nowhere: they never change the tokens.
const ACCEPTED: &[&str] = &[
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
];

/// Fields that would change the answer in a way this server cannot, and the values at which they do not.
const REFUSED: &[(&str, &[&str])] = &[
    ("audio", &[]),
    ("grammar", &[r#""""#]),
    ("include_stop_str_in_output", &["false"]),
    ("json_schema", &[]),
    ("logits_processors", &["[]"]),
    ("modalities", &[r#"["text"]"#]),
    ("prompt_logprobs", &[]),
    ("skip_special_tokens", &["true"]),
    ("stop_token_ids", &["[]"]),
    ("use_beam_search", &["false"]),
];
