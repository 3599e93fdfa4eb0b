//! A Hugging Face directory -> [`Checkpoint`]: `config.json`, one or several safetensors files, and the small JSON files
//! that `hugging_face_text.rs` reads.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
};

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::{
    Activation, Checkpoint, FileSummary, LoadError, LoadOptions, MappedBytes, ModelConfig,
    geometry::{self, RopeScaling},
    hugging_face_text::{self, Text},
    names::{self, Conventions, LINEAR_MODULES, Naming},
    pooling,
    safetensors::{self, TensorEntry},
    table::{Encoding, RawTensor, TensorTable},
};

/// Longest `config.json`; real ones have a few kilobytes.
pub(super) const MAX_CONFIG_BYTES: u64 = 128 << 10;

/// Longest index of a sharded model.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// Most files a model may be split into.
const MAX_SHARDS: usize = 1_024;

/// Opens the directory `dir`.
///
/// # Errors
/// [`LoadError`].
pub(super) fn open(dir: &Path, options: &LoadOptions) -> Result<Checkpoint, LoadError> {
    let config_path = dir.join("config.json");
    if !config_path.exists() {
        let problem = "no config.json in this directory: give a .gguf file, or a Hugging Face model directory";
        return Err(LoadError::NotAModel { path: dir.into(), problem });
    }
    let json = ConfigJson(read_json(&config_path, MAX_CONFIG_BYTES)?);
    let architecture = Architecture::of(&json)?;
    let quantization = Quantization::of(&json)?;
    let pooling = pooling::of_directory(dir)?;
    let has_head = !json.class().is_some_and(|class| class.ends_with("Model"));
    if !has_head && pooling.is_none() {
        let what = format!("class `{}` without modules.json", json.class().unwrap_or_default());
        return Err(LoadError::unsupported(
            what,
            "a model without a head generates no text; only embedding models are",
        ));
    }
    let (mut table, file_bytes) = tensor_table(dir)?;
    let config = model_config(&json, architecture)?;
    let conventions = Conventions {
        naming: if has_head { Naming::HuggingFace } else { Naming::HuggingFaceHeadless },
        sub_norms: architecture != Architecture::Llama,
        tied: Some(!has_head || json.boolean("tie_word_embeddings")?.unwrap_or(false)),
        interleaved_heads: false,
        scale_divides: quantization.scale_divides,
        i2s_layout: options.i2s_layout,
    };
    let weights = names::assemble(&mut table, &config, conventions)?;
    let mut notes = Vec::new();
    names::note_float_linears(&weights, &mut notes);
    let ends = hugging_face_text::ids(&json.0, "eos_token_id");
    let bos = hugging_face_text::ids(&json.0, "bos_token_id").first().copied();
    let Text { tokenizer, chat_template, generation } =
        hugging_face_text::read(dir, &ends, bos, config.vocab_size, &mut notes)?;
    let summary = FileSummary { format: "safetensors".into(), file_bytes, tensors: table.summary() };
    Ok(Checkpoint { config, weights, tokenizer, chat_template, generation, pooling, summary, notes })
}

/// Reads a small JSON file; of a key that occurs twice the last one counts, as in Python.
pub(super) fn read_json<T: de::DeserializeOwned>(path: &Path, max_bytes: u64) -> Result<T, LoadError> {
    let bytes = read_file(path, max_bytes)?;
    serde_json::from_slice(&bytes).map_err(|error| LoadError::Json {
        path: path.into(),
        problem: format!("is not the JSON it should be: {error}"),
    })
}

/// Reads a file of at most `max_bytes`.
pub(super) fn read_file(path: &Path, max_bytes: u64) -> Result<Vec<u8>, LoadError> {
    let metadata = std::fs::metadata(path).map_err(|error| LoadError::io(path, error))?;
    if !metadata.is_file() || metadata.len() > max_bytes {
        let problem = format!("is no file, or longer than the {max_bytes} bytes that are accepted");
        return Err(LoadError::Json { path: path.into(), problem });
    }
    std::fs::read(path).map_err(|error| LoadError::io(path, error))
}

/// The graphs a `config.json` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Architecture {
    /// `BitNetForCausalLM`, without its head `BitNetModel`: relu2 unless the file says otherwise.
    BitNet,
    /// `BitnetForCausalLM` of the 1bitLLM repositories: SiLU unless the file says otherwise.
    OneBitLlm,
    /// `LlamaForCausalLM`, without its head `LlamaModel`: SiLU, no sub-norms.
    Llama,
}

impl Architecture {
    fn of(json: &ConfigJson) -> Result<Self, LoadError> {
        let class = json.class();
        match (class, json.string("model_type")?) {
            (Some("BitNetForCausalLM" | "BitNetModel"), _) | (None, Some("bitnet")) => Ok(Self::BitNet),
            (Some("BitnetForCausalLM"), _) => Ok(Self::OneBitLlm),
            (Some("LlamaForCausalLM" | "LlamaModel"), _) | (None, Some("llama")) => Ok(Self::Llama),
            (class, model_type) => Err(LoadError::unsupported(
                format!("architecture `{}`", class.or(model_type).unwrap_or("not stated")),
                "only BitNetForCausalLM, BitnetForCausalLM and LlamaForCausalLM with ternary weights are",
            )),
        }
    }

    fn activation(self, stated: Option<&str>) -> Result<Activation, LoadError> {
        match (stated, self) {
            (None, Self::BitNet) | (Some("relu2"), _) => Ok(Activation::Relu2),
            (None, Self::OneBitLlm | Self::Llama) | (Some("silu" | "swish"), _) => Ok(Activation::Silu),
            (Some(other), _) => Err(LoadError::unsupported(format!("hidden_act `{other}`"), "only relu2 and silu are")),
        }
    }

    /// The RoPE base when the file states none.
    fn rope_theta(self) -> f32 {
        match self {
            Self::BitNet => 500_000.0,
            Self::OneBitLlm | Self::Llama => 10_000.0,
        }
    }
}

/// What `quantization_config` means for the arithmetic.
struct Quantization {
    scale_divides: bool,
}

impl Quantization {
    fn of(json: &ConfigJson) -> Result<Self, LoadError> {
        let Some(section) = json.0.get("quantization_config").filter(|section| !section.is_null()) else {
            return Ok(Self { scale_divides: true });
        };
        let string = |key: &str| section.get(key).and_then(Value::as_str);
        match string("quant_method") {
            Some("bitnet") | None => {}
            Some(other) => {
                let what = format!("quantization_config.quant_method `{other}`");
                return Err(LoadError::unsupported(what, "only `bitnet` models are 1-bit models"));
            }
        }
        if section.get("use_rms_norm").and_then(Value::as_bool) == Some(true) {
            let what = "quantization_config.use_rms_norm";
            return Err(LoadError::unsupported(what, "norms inside linear layers are not computed"));
        }
        let kept = section.get("modules_to_not_convert").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let names_linear = |module: &&Value| {
            module.as_str().is_some_and(|module| LINEAR_MODULES.iter().any(|linear| module.contains(linear)))
        };
        if let Some(module) = kept.iter().find(names_linear) {
            let what = format!("quantization_config.modules_to_not_convert with {module}");
            return Err(LoadError::unsupported(what, "every linear layer must be ternary"));
        }
        Ok(Self { scale_divides: string("linear_class") != Some("autobitlinear") })
    }
}

fn model_config(json: &ConfigJson, architecture: Architecture) -> Result<ModelConfig, LoadError> {
    let (hidden_size, num_heads) = (json.required("hidden_size")?, json.required("num_attention_heads")?);
    let head_dim = match json.size("head_dim")? {
        Some(head_dim) => head_dim,
        None => geometry::default_head_dim(hidden_size, num_heads)?,
    };
    // The section of transformers 5 holds the base too; the older one only the scaling.
    let rope = json.section("rope_parameters").or_else(|| json.section("rope_scaling"));
    let rope_theta = match (json.float("rope_theta")?, &rope) {
        (Some(theta), _) => theta,
        (None, Some(rope)) => rope.float("rope_theta")?.unwrap_or(architecture.rope_theta()),
        (None, None) => architecture.rope_theta(),
    };
    for source in [Some(json), rope.as_ref()].into_iter().flatten() {
        if source.float("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(LoadError::unsupported("partial_rotary_factor", "heads are rotated whole"));
        }
    }
    let class = json.class();
    let mut config = ModelConfig {
        architecture: class.or(json.string("model_type")?).unwrap_or_default().into(),
        name: None,
        hidden_size,
        intermediate_size: json.required("intermediate_size")?,
        num_layers: json.required("num_hidden_layers")?,
        num_heads,
        num_kv_heads: json.size("num_key_value_heads")?.unwrap_or(num_heads),
        head_dim,
        vocab_size: json.required("vocab_size")?,
        max_context: json.size("max_position_embeddings")?.unwrap_or(2_048),
        rope_theta,
        rope_freq_factors: None,
        rms_norm_eps: json.float("rms_norm_eps")?.unwrap_or(1e-5),
        activation: architecture.activation(json.string("hidden_act")?)?,
    };
    geometry::check(&config)?;
    let scaling = rope.map(|rope| rope_scaling(&rope, config.max_context)).transpose()?.flatten();
    config.rope_freq_factors = scaling.and_then(|scaling| scaling.freq_factors(config.head_dim, rope_theta));
    geometry::check(&config)?;
    Ok(config)
}

/// The scaling of a `rope_scaling` or `rope_parameters` section.
fn rope_scaling(rope: &ConfigJson, max_context: usize) -> Result<Option<RopeScaling>, LoadError> {
    let kind = match rope.string("rope_type")? {
        Some(kind) => Some(kind),
        None => rope.string("type")?,
    };
    let number =
        |key: &str| rope.float(key)?.ok_or_else(|| LoadError::config(format!("rope_scaling.{key}"), "is missing"));
    match kind {
        None | Some("default") => Ok(None),
        Some("linear") => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
        Some("llama3") => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: rope.float("original_max_position_embeddings")?.unwrap_or(max_context as f32),
        })),
        Some(other) => Err(LoadError::unsupported(format!("RoPE scaling `{other}`"), "only linear and llama3 are")),
    }
}

/// All tensors of all weight files, and the bytes of those files together.
fn tensor_table(dir: &Path) -> Result<(TensorTable, u64), LoadError> {
    let mut tensors = Vec::new();
    let mut file_bytes = 0u64;
    for path in weight_files(dir)? {
        let map = super::map_file(&path)?;
        let header =
            safetensors::parse(map.bytes()).map_err(|source| LoadError::Safetensors { path: path.clone(), source })?;
        file_bytes = file_bytes.saturating_add(map.bytes().len() as u64);
        tensors.extend(header.tensors.into_iter().map(|entry| raw_tensor(entry, &map)));
    }
    Ok((TensorTable::new(tensors)?, file_bytes))
}

/// `model.safetensors`, or the shards its index names.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if single.exists() || !index.exists() {
        return Ok(vec![single]);
    }
    let ShardIndex { weight_map: Shards(shards) } = read_json(&index, MAX_INDEX_BYTES)?;
    Ok(shards.iter().map(|shard| dir.join(shard)).collect())
}

fn raw_tensor(entry: TensorEntry, file: &MappedBytes) -> RawTensor {
    let encoding = match entry.dtype.name {
        "F32" => Encoding::F32,
        "F16" => Encoding::F16,
        "BF16" => Encoding::Bf16,
        "U8" => Encoding::U8,
        _ => Encoding::Other,
    };
    let data = file.slice(entry.range).expect("the container keeps its tensors inside the file");
    RawTensor { name: entry.name, shape: entry.shape, encoding, type_name: entry.dtype.name, data }
}

#[derive(serde::Deserialize)]
struct ShardIndex {
    weight_map: Shards,
}

/// The different file names of a weight map; which tensor is where, the files themselves say.
struct Shards(BTreeSet<String>);

impl<'de> Deserialize<'de> for Shards {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Shards;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shards, A::Error> {
                let mut names = BTreeSet::new();
                while let Some((IgnoredAny, name)) = map.next_entry::<IgnoredAny, String>()? {
                    let plain = Path::new(&name).file_name().is_some_and(|file_name| file_name == name.as_str());
                    if !plain || name.contains('\\') {
                        return Err(de::Error::custom(format_args!("`{name}` is not a plain file name")));
                    }
                    names.insert(name);
                    if names.len() > MAX_SHARDS {
                        return Err(de::Error::custom("more shards than any model has"));
                    }
                }
                Ok(Shards(names))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// Typed access to `config.json` or a section of it; `null` is absent, every error names the key.
struct ConfigJson(Value);

impl ConfigJson {
    /// The class that computes the model, the first of `architectures`.
    fn class(&self) -> Option<&str> {
        self.value("architectures")?.get(0)?.as_str()
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, LoadError> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(typed) => Ok(Some(typed)),
                None => Err(LoadError::config(key, format!("is not {expected}"))),
            },
        }
    }

    fn string(&self, key: &str) -> Result<Option<&str>, LoadError> {
        self.typed(key, "a string", Value::as_str)
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>, LoadError> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    fn float(&self, key: &str) -> Result<Option<f32>, LoadError> {
        self.typed(key, "a number", |value| value.as_f64().map(|value| value as f32))
    }

    fn size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        self.typed(key, "a non-negative integer", |value| value.as_u64().and_then(|value| usize::try_from(value).ok()))
    }

    fn required(&self, key: &str) -> Result<usize, LoadError> {
        self.size(key)?.ok_or_else(|| LoadError::config(key, "is missing"))
    }

    fn section(&self, key: &str) -> Option<Self> {
        self.value(key).filter(|value| value.is_object()).cloned().map(Self)
    }
}
