//! Model files -> one typed [`Checkpoint`], whatever the format: GGUF (`gguf.rs`) or a Hugging Face directory
//! (`safetensors.rs`). After [`open`] nothing downstream knows formats, tensor names or row permutations.
//!
//! Every length, offset and id read from a file is checked before use; arithmetic on them is `checked_*`.
#![deny(clippy::arithmetic_side_effects)]

mod error;
mod generation;
mod geometry;
pub mod gguf;
mod gguf_model;
mod hugging_face;
mod hugging_face_text;
mod map;
mod names;
mod pooling;
pub mod safetensors;
mod synthetic;
mod table;
mod tensors;

pub use error::LoadError;
pub use gguf_model::vocabulary as gguf_vocabulary;
pub use map::MappedBytes;
pub use pooling::Pooling;
pub use synthetic::{SYNTHETIC_NAMES, synthetic};
pub use tensors::{DenseEncoding, DenseMatrix, LayerTensors, TernaryReader, TernaryTensor, WeightTensors};

use std::{borrow::Cow, path::Path};

use crate::ids::TokenId;

/// Opens the model at `path`: a GGUF file, a Hugging Face directory, or a safetensors file inside one.
///
/// # Errors
/// [`LoadError`]: not there, not readable, not a model, broken, or not supported.
pub fn open(path: &Path, options: &LoadOptions) -> Result<Checkpoint, LoadError> {
    let metadata = std::fs::metadata(path).map_err(|error| LoadError::io(path, error))?;
    if metadata.is_dir() {
        return hugging_face::open(path, options);
    }
    if path.extension().is_some_and(|extension| extension == "safetensors") {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        return hugging_face::open(dir, options);
    }
    open_gguf(path, &map_file(path)?, options)
}

/// Reads a GGUF model that is in memory, compiled into the program for instance; `name` stands in for its path in errors.
///
/// # Errors
/// [`LoadError`]: broken, or not supported.
pub fn open_bytes(name: &str, gguf: Cow<'static, [u8]>, options: &LoadOptions) -> Result<Checkpoint, LoadError> {
    open_gguf(Path::new(name), &MappedBytes::from_memory(gguf), options)
}

fn open_gguf(path: &Path, file: &MappedBytes, options: &LoadOptions) -> Result<Checkpoint, LoadError> {
    let gguf = gguf::parse(file.bytes()).map_err(|source| LoadError::Gguf { path: path.into(), source })?;
    gguf_model::read(&gguf, file, options)
}

/// Maps a regular file; pipes and devices are refused before anything waits on them.
fn map_file(path: &Path) -> Result<MappedBytes, LoadError> {
    let metadata = std::fs::metadata(path).map_err(|error| LoadError::io(path, error))?;
    if !metadata.is_file() {
        return Err(LoadError::NotAModel { path: path.into(), problem: "neither a file nor a directory" });
    }
    MappedBytes::open(path).map_err(|error| LoadError::io(path, error))
}

/// What a model file holds, typed and checked: the only thing the rest of the crate knows of files.
#[derive(Debug)]
pub struct Checkpoint {
    /// Geometry and the few switches of the graph.
    pub config: ModelConfig,
    /// Every weight, still mapped and in the file's encoding.
    pub weights: WeightTensors,
    /// Where the tokenizer comes from; `None` when the file has none.
    pub tokenizer: Option<TokenizerSource>,
    /// The Jinja chat template, repaired where a published file is known to be wrong.
    pub chat_template: Option<String>,
    /// Sampling defaults and end-of-generation tokens the file states.
    pub generation: GenerationDefaults,
    /// Set for an embedding model: what becomes of its hidden states.
    pub pooling: Option<Pooling>,
    /// What `bitnet inspect` prints beyond the above.
    pub summary: FileSummary,
    /// One line for each defect repaired and each choice made, to be logged once.
    pub notes: Vec<String>,
}

/// Choices the caller makes about how a file is read.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Physical layout of I2_S codes; nothing in the file tells it.
    pub i2s_layout: I2sLayout,
}

/// The three physical layouts of I2_S (research: formats section 8). Published files hold `A`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum I2sLayout {
    /// Blocks of 128 values in 32 bytes, flat over the tensor.
    #[default]
    A,
    /// Blocks of 64 values in 16 bytes (quantized on ARM by some versions of bitnet.cpp).
    B,
    /// Four rows interleaved a byte (x86 without ACT_PARALLEL).
    C,
}

/// The activation of the feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `relu(x)^2`, the BitNet b1.58 2B-4T choice.
    Relu2,
    /// `x * sigmoid(x)`.
    Silu,
}

/// Geometry and graph switches, checked: no field is zero, heads divide evenly, and `head_dim` is even.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Architecture as the file names it (`bitnet-b1.58`, `llama`, `BitNetForCausalLM`, ...), for people to read.
    pub architecture: String,
    /// The model's name if the file states one.
    pub name: Option<String>,
    /// D: width of the residual stream.
    pub hidden_size: usize,
    /// F: width of the feed-forward block.
    pub intermediate_size: usize,
    /// L: number of layers.
    pub num_layers: usize,
    /// Hq: query heads.
    pub num_heads: usize,
    /// Hkv: key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// hd: width of one head, even.
    pub head_dim: usize,
    /// V: rows of the embedding.
    pub vocab_size: usize,
    /// The longest context the model was made for.
    pub max_context: usize,
    /// RoPE base.
    pub rope_theta: f32,
    /// RoPE frequency divisors per pair (`rope_freqs.weight`, llama3 scaling), `head_dim / 2` of them.
    pub rope_freq_factors: Option<Vec<f32>>,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Activation of the feed-forward block.
    pub activation: Activation,
}

/// Sampling defaults from `generation_config.json` or GGUF `general.sampling.*`, and the tokens that end a generation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Default temperature.
    pub temperature: Option<f32>,
    /// Default nucleus.
    pub top_p: Option<f32>,
    /// Default top-k (0 and absent mean off).
    pub top_k: Option<u32>,
    /// Tokens that end a generation, those of the repairs included, ascending, without duplicates.
    pub stop_tokens: Vec<TokenId>,
}

/// The raw material of a tokenizer.
#[derive(Clone, Debug)]
pub enum TokenizerSource {
    /// A `tokenizer.json` and what its neighbours say.
    HuggingFace {
        /// The bytes of `tokenizer.json`.
        json: Vec<u8>,
        /// Id of the beginning-of-sequence token, if any.
        bos: Option<TokenId>,
    },
    /// Vocabulary and merges of a GGUF file.
    Gguf(GgufVocabulary),
}

/// `tokenizer.ggml.*` of a GGUF file, repaired where needed.
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary {
    /// `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// Pre-tokenizer name (`llama-bpe`, `falcon3`, `default`, ...), after the repair.
    pub pre: Option<String>,
    /// Token strings by id.
    pub tokens: Vec<String>,
    /// SentencePiece scores by id; empty when absent.
    pub scores: Vec<f32>,
    /// Token types by id (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte); empty when absent.
    pub token_types: Vec<i32>,
    /// BPE merges, `"left right"`.
    pub merges: Vec<String>,
    /// Beginning-of-sequence token.
    pub bos: Option<TokenId>,
    /// End-of-sequence token.
    pub eos: Option<TokenId>,
    /// Unknown token (SentencePiece).
    pub unknown: Option<TokenId>,
    /// Whether a prompt starts with `bos`.
    pub add_bos: bool,
    /// Whether a text ends with `eos`; only texts that are embedded do.
    pub add_eos: bool,
    /// SentencePiece: prefix the text with a space.
    pub add_space_prefix: bool,
}

/// What `bitnet inspect` shows of the file itself.
#[derive(Clone, Debug, Default)]
pub struct FileSummary {
    /// `gguf` or `safetensors`.
    pub format: String,
    /// Bytes of all weight files together.
    pub file_bytes: u64,
    /// Every tensor in file order.
    pub tensors: Vec<TensorSummary>,
}

/// One tensor of the file.
#[derive(Clone, Debug)]
pub struct TensorSummary {
    /// Name in the file.
    pub name: String,
    /// Type as its format names it (`I2_S`, `F16`, `U8`, ...).
    pub encoding: String,
    /// Shape, rows first (outermost dimension first).
    pub shape: Vec<u64>,
    /// Bytes in the file.
    pub bytes: u64,
}
