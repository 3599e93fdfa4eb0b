//! What a GGUF file means: metadata keys -> [`ModelConfig`], tokenizer, template and generation defaults, with the
//! defects of published files repaired and noted.

use super::{
    Activation, Checkpoint, FileSummary, GenerationDefaults, GgufVocabulary, LoadError, LoadOptions, MappedBytes,
    ModelConfig, Pooling, TokenizerSource,
    generation::{self, EndOfTurn},
    geometry::{self, RopeScaling},
    gguf::{Array, Gguf, GgufError, TensorInfo, Value},
    names::{self, Conventions, Naming},
    pooling,
    table::{Encoding, RawTensor, TensorTable},
};
use crate::ids::TokenId;

/// Most BPE merges for each token of the vocabulary; published vocabularies have about two.
const MAX_MERGES_PER_TOKEN: usize = 8;

/// The chat template of bitnet-b1.58-2B-4T; the one inside the published GGUF is a placeholder.
const TRUE_CHAT_TEMPLATE: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}\
    {% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}{{ content }}\
    {% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// What betrays the placeholder.
const PLACEHOLDER_MARK: &str = "BITNETAssistant";

/// Builds the checkpoint from a parsed container and the bytes it borrows from.
///
/// # Errors
/// [`LoadError`] other than those of paths and containers.
pub(super) fn read(gguf: &Gguf<'_>, file: &MappedBytes, options: &LoadOptions) -> Result<Checkpoint, LoadError> {
    let keys = Keys { gguf };
    let architecture = Architecture::of(keys)?;
    if keys.integer("split.count")?.is_some_and(|count| count > 1) {
        return Err(LoadError::unsupported("one part of a split GGUF file", "merge the parts into one file first"));
    }
    let mut notes = Vec::new();
    let mut table = tensor_table(gguf, file)?;
    let config = model_config(keys, architecture, &mut table)?;
    let conventions = Conventions {
        naming: Naming::Gguf,
        sub_norms: architecture != Architecture::Llama,
        tied: None,
        interleaved_heads: architecture == Architecture::Llama,
        scale_divides: false,
        i2s_layout: options.i2s_layout,
    };
    let weights = names::assemble(&mut table, &config, conventions)?;
    names::note_float_linears(&weights, &mut notes);

    let mut vocabulary = vocabulary(gguf, config.vocab_size)?;
    const BOS: &str = "tokenizer.ggml.bos_token_id";
    if let (Some(vocabulary), Some(id)) = (&vocabulary, keys.integer(BOS)?)
        && vocabulary.bos.is_none()
    {
        notes.push(format!("dropped: beginning-of-sequence id {id} is outside the vocabulary"));
    }
    let pooling = pooling(keys)?;
    if let (Some(_), Some(vocabulary)) = (pooling, &mut vocabulary) {
        vocabulary.add_eos = keys.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    }
    let mut chat_template = keys.string("tokenizer.chat_template")?.map(str::to_owned);
    if architecture == Architecture::BitNetB158 {
        repair(vocabulary.as_mut(), &mut chat_template, &mut notes);
    }
    let generation = generation_defaults(keys, vocabulary.as_ref(), config.vocab_size, &mut notes)?;
    let summary =
        FileSummary { format: "gguf".into(), file_bytes: file.bytes().len() as u64, tensors: table.summary() };
    let tokenizer = vocabulary.map(TokenizerSource::Gguf);
    Ok(Checkpoint { config, weights, tokenizer, chat_template, generation, pooling, summary, notes })
}

/// `tokenizer.ggml.*`, unrepaired; `None` when the file has no tokens. At most `max_tokens` of them are accepted.
///
/// # Errors
/// When a key has the wrong type, the arrays differ in length, or a string is not UTF-8.
pub fn vocabulary(gguf: &Gguf<'_>, max_tokens: usize) -> Result<Option<GgufVocabulary>, LoadError> {
    let keys = Keys { gguf };
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let Some(tokens) = keys.array(TOKENS)? else { return Ok(None) };
    if tokens.is_empty() || tokens.len() > max_tokens {
        let problem = format!("has {} tokens, but the embedding has {max_tokens} rows", tokens.len());
        return Err(LoadError::config(TOKENS, problem));
    }
    const MERGES: &str = "tokenizer.ggml.merges";
    let merges = keys.array(MERGES)?;
    if merges.is_some_and(|merges| merges.len() / MAX_MERGES_PER_TOKEN > tokens.len()) {
        return Err(LoadError::config(MERGES, "has far more merges than there are tokens"));
    }
    let id = |key: &str| -> Result<Option<TokenId>, LoadError> {
        let id = keys.integer(key)?.filter(|&id| (id as usize) < max_tokens);
        Ok(id.and_then(|id| u32::try_from(id).ok()).map(TokenId))
    };
    let model = keys.string("tokenizer.ggml.model")?.unwrap_or("gpt2");
    Ok(Some(GgufVocabulary {
        model: model.into(),
        pre: keys.string("tokenizer.ggml.pre")?.map(str::to_owned),
        scores: keys.per_token("tokenizer.ggml.scores", tokens.len(), Array::floats)?,
        token_types: keys.per_token("tokenizer.ggml.token_type", tokens.len(), Array::integers)?,
        tokens: strings(TOKENS, tokens)?,
        merges: merges.map(|merges| strings(MERGES, merges)).transpose()?.unwrap_or_default(),
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        unknown: id("tokenizer.ggml.unknown_token_id")?,
        // SentencePiece models begin with BOS unless told otherwise; byte-level ones when told so, Llama 3's always.
        add_bos: keys.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or_else(|| default_add_bos(keys, model)),
        add_eos: false,
        add_space_prefix: keys.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(model == "llama"),
    }))
}

/// The graphs a GGUF file can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Architecture {
    /// `bitnet-b1.58` and its older name `bitnet-25`: relu2.
    BitNetB158,
    /// `bitnet`: SiLU unless the file says otherwise.
    BitNet,
    /// `llama`: SiLU, no sub-norms, interleaved heads.
    Llama,
}

impl Architecture {
    fn of(keys: Keys<'_>) -> Result<Self, LoadError> {
        match keys.required_string(ARCHITECTURE)? {
            "bitnet-b1.58" | "bitnet-25" => Ok(Self::BitNetB158),
            "bitnet" => Ok(Self::BitNet),
            "llama" => Ok(Self::Llama),
            other => Err(LoadError::unsupported(
                format!("architecture `{other}`"),
                "only bitnet-b1.58, bitnet-25, bitnet and llama with ternary weights are",
            )),
        }
    }

    fn activation(self, stated: Option<&str>) -> Result<Activation, LoadError> {
        match (stated, self) {
            (None, Self::BitNetB158) | (Some("relu2" | "relu_sqr"), _) => Ok(Activation::Relu2),
            (None, Self::BitNet | Self::Llama) | (Some("silu" | "swish"), _) => Ok(Activation::Silu),
            (Some(other), _) => Err(LoadError::unsupported(format!("activation `{other}`"), "only relu2 and silu are")),
        }
    }
}

const ARCHITECTURE: &str = "general.architecture";

fn model_config(keys: Keys<'_>, architecture: Architecture, table: &mut TensorTable) -> Result<ModelConfig, LoadError> {
    let prefix = keys.required_string(ARCHITECTURE)?;
    let key = |name: &str| format!("{prefix}.{name}");
    let size = |name: &str| keys.size(&key(name));
    let required = |name: &str| size(name)?.ok_or_else(|| LoadError::config(key(name), "is missing"));

    let (hidden_size, num_heads) = (required("embedding_length")?, required("attention.head_count")?);
    let head_dim = match size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => geometry::default_head_dim(hidden_size, num_heads)?,
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(found) = size(name)?.filter(|&found| found != head_dim) {
            return Err(LoadError::config(key(name), format!("is {found}, but the head dimension is {head_dim}")));
        }
    }
    if size("expert_count")?.is_some_and(|count| count > 0) {
        return Err(LoadError::unsupported(key("expert_count"), "mixtures of experts are not computed"));
    }
    let rows = names::vocabulary_rows(table, Naming::Gguf).and_then(|rows| usize::try_from(rows).ok());
    let vocab_size = match size("vocab_size")? {
        Some(stated) => stated,
        None => rows.ok_or_else(|| LoadError::MissingTensor { tensor: "token_embd.weight".into() })?,
    };
    let rope_theta = keys.float(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    let mut config = ModelConfig {
        architecture: prefix.into(),
        name: keys.string("general.name")?.map(str::to_owned),
        hidden_size,
        intermediate_size: required("feed_forward_length")?,
        num_layers: required("block_count")?,
        num_heads,
        num_kv_heads: size("attention.head_count_kv")?.unwrap_or(num_heads),
        head_dim,
        vocab_size,
        max_context: required("context_length")?,
        rope_theta,
        rope_freq_factors: None,
        rms_norm_eps: keys.float(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-5),
        activation: architecture.activation(keys.string(&key("hidden_activation"))?)?,
    };
    geometry::check(&config)?;
    config.rope_freq_factors = rope_freq_factors(keys, prefix, table, &config)?;
    geometry::check(&config)?;
    Ok(config)
}

/// What makes it an embedding model. Some of those let every token see the whole text, which is another graph.
fn pooling(keys: Keys<'_>) -> Result<Option<Pooling>, LoadError> {
    let prefix = keys.required_string(ARCHITECTURE)?;
    let causal = format!("{prefix}.attention.causal");
    if keys.boolean(&causal)? == Some(false) {
        return Err(LoadError::unsupported(format!("`{causal}` false"), "tokens attend to those before them only"));
    }
    let key = format!("{prefix}.pooling_type");
    pooling::of_gguf(&key, keys.integer(&key)?)
}

/// Frequency divisors from the tensor, or from a linear scaling, which is the same divisor for all.
fn rope_freq_factors(
    keys: Keys<'_>,
    prefix: &str,
    table: &mut TensorTable,
    config: &ModelConfig,
) -> Result<Option<Vec<f32>>, LoadError> {
    let type_key = format!("{prefix}.rope.scaling.type");
    let factor = match keys.float(&format!("{prefix}.rope.scaling.factor"))? {
        Some(factor) => Some(factor),
        None => keys.float(&format!("{prefix}.rope.scale_linear"))?,
    };
    let linear = match keys.string(&type_key)? {
        Some("none") => None,
        Some("linear") | None => factor.filter(|&factor| factor != 1.0 && factor != 0.0),
        Some(other) => {
            return Err(LoadError::unsupported(format!("RoPE scaling `{other}`"), "only linear and llama3 are"));
        }
    };
    let stored = names::rope_factors(table, config.head_dim)?;
    match (stored, linear) {
        (stored, None) => Ok(stored),
        (None, Some(factor)) => Ok(RopeScaling::Linear { factor }.freq_factors(config.head_dim, config.rope_theta)),
        (Some(_), Some(_)) => Err(LoadError::config(type_key, "stands beside `rope_freqs.weight`; only one can apply")),
    }
}

/// The three defects of the published 2B-4T file, each where it is seen; the third, the stop tokens, is in `generation`.
fn repair(vocabulary: Option<&mut GgufVocabulary>, chat_template: &mut Option<String>, notes: &mut Vec<String>) {
    if let Some(vocabulary) = vocabulary
        && vocabulary.model == "gpt2"
        && vocabulary.pre.is_none()
    {
        vocabulary.pre = Some("llama-bpe".into());
        notes.push("repaired: no tokenizer.ggml.pre in the file; using llama-bpe, the pre-tokenizer of Llama 3".into());
    }
    if chat_template.as_ref().is_some_and(|template| template.contains(PLACEHOLDER_MARK)) {
        *chat_template = Some(TRUE_CHAT_TEMPLATE.into());
        notes.push(format!(
            "repaired: the chat template in the file is a placeholder ({PLACEHOLDER_MARK}); using the model's own"
        ));
    }
}

fn generation_defaults(
    keys: Keys<'_>,
    vocabulary: Option<&GgufVocabulary>,
    vocab_size: usize,
    notes: &mut Vec<String>,
) -> Result<GenerationDefaults, LoadError> {
    let mut stated = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        stated.extend(keys.integer(key)?);
    }
    let tokens = vocabulary.map_or(&[][..], |vocabulary| &vocabulary.tokens);
    let by_name = EndOfTurn::find(tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id as u64)));
    let top_k = keys.integer("general.sampling.top_k")?.and_then(|top_k| u32::try_from(top_k).ok());
    let sampling = generation::Sampling {
        temperature: keys.float("general.sampling.temp")?,
        top_p: keys.float("general.sampling.top_p")?,
        top_k,
    };
    Ok(generation::defaults(sampling, &stated, by_name, vocab_size, notes))
}

fn default_add_bos(keys: Keys<'_>, model: &str) -> bool {
    let pre = keys.string("tokenizer.ggml.pre").ok().flatten();
    model == "llama" || pre.is_some_and(|pre| matches!(pre, "llama3" | "llama-v3" | "llama-bpe"))
}

fn strings(key: &str, array: Array<'_>) -> Result<Vec<String>, LoadError> {
    let elements = array.strings().ok_or_else(|| Keys::wrong_type(key, "an array of strings", array.element_name()))?;
    let mut owned = Vec::with_capacity(array.len());
    for element in elements {
        let element: &str =
            element.map_err(|error: GgufError| LoadError::config(key, format!("holds bad strings: {error}")))?;
        owned.push(element.to_owned());
    }
    Ok(owned)
}

fn tensor_table(gguf: &Gguf<'_>, file: &MappedBytes) -> Result<TensorTable, LoadError> {
    let raw = |tensor: &TensorInfo<'_>| RawTensor {
        name: tensor.name.into(),
        shape: tensor.shape(),
        encoding: encoding(tensor.kind.name),
        type_name: tensor.kind.name,
        data: file.slice(tensor.range.clone()).expect("the container keeps its tensors inside the file"),
    };
    TensorTable::new(gguf.tensors.iter().map(raw).collect())
}

fn encoding(kind: &str) -> Encoding {
    match kind {
        "F32" => Encoding::F32,
        "F16" => Encoding::F16,
        "BF16" => Encoding::Bf16,
        "Q8_0" => Encoding::Q8_0,
        "Q6_K" => Encoding::Q6K,
        "Q4_0" => Encoding::Q4_0,
        "I2_S" => Encoding::I2S,
        "TQ1_0" => Encoding::Tq1_0,
        "TQ2_0" => Encoding::Tq2_0,
        _ => Encoding::Other,
    }
}

/// Typed access to the metadata; every error names the key.
#[derive(Clone, Copy)]
struct Keys<'a> {
    gguf: &'a Gguf<'a>,
}

impl<'a> Keys<'a> {
    fn value(self, key: &str) -> Option<Value<'a>> {
        self.gguf.metadata.get(key).copied()
    }

    fn string(self, key: &str) -> Result<Option<&'a str>, LoadError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Str(value)) => Ok(Some(value)),
            Some(other) => Err(Self::wrong_type(key, "a string", type_name(&other))),
        }
    }

    fn required_string(self, key: &str) -> Result<&'a str, LoadError> {
        self.string(key)?.ok_or_else(|| LoadError::config(key, "is missing"))
    }

    /// A non-negative integer of whatever width.
    fn integer(self, key: &str) -> Result<Option<u64>, LoadError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(value)),
            Some(Value::Signed(value)) => match u64::try_from(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(LoadError::config(key, format!("is {value}, a negative number"))),
            },
            Some(other) => Err(Self::wrong_type(key, "an integer", type_name(&other))),
        }
    }

    fn size(self, key: &str) -> Result<Option<usize>, LoadError> {
        Ok(self.integer(key)?.map(|value| usize::try_from(value).unwrap_or(usize::MAX)))
    }

    fn float(self, key: &str) -> Result<Option<f32>, LoadError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(value as f32)),
            Some(other) => Err(Self::wrong_type(key, "a float", type_name(&other))),
        }
    }

    fn boolean(self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(Self::wrong_type(key, "a boolean", type_name(&other))),
        }
    }

    fn array(self, key: &str) -> Result<Option<Array<'a>>, LoadError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Array(value)) => Ok(Some(value)),
            Some(other) => Err(Self::wrong_type(key, "an array", type_name(&other))),
        }
    }

    /// An array with one element a token; empty when the key is absent.
    fn per_token<T, I: Iterator<Item = T>>(
        self,
        key: &str,
        num_tokens: usize,
        elements: impl FnOnce(&Array<'a>) -> Option<I>,
    ) -> Result<Vec<T>, LoadError> {
        let Some(array) = self.array(key)? else { return Ok(Vec::new()) };
        if array.len() != num_tokens {
            return Err(LoadError::config(key, format!("has {} elements for {num_tokens} tokens", array.len())));
        }
        let elements = elements(&array);
        Ok(elements.ok_or_else(|| Self::wrong_type(key, "an array of 32-bit numbers", array.element_name()))?.collect())
    }

    fn wrong_type(key: &str, expected: &str, found: &str) -> LoadError {
        LoadError::config(key, format!("is {found}, not {expected}"))
    }
}

fn type_name(value: &Value<'_>) -> &'static str {
    match value {
        Value::Unsigned(_) | Value::Signed(_) => "an integer",
        Value::Float(_) => "a float",
        Value::Bool(_) => "a boolean",
        Value::Str(_) => "a string",
        Value::Array(array) => array.element_name(),
    }
}
