//! Reading the golden references of `tests/golden/public`: made with Hugging Face transformers in float32.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

/// The four golden checkpoints.
pub const MODELS: [&str; 4] = ["p1_packed", "p2_master", "p3_llama", "p4_silu"];

/// The path of `name` below the golden directory.
pub fn path(name: &str) -> PathBuf {
    super::server::workspace_root().join("tests/golden/public").join(name)
}

/// The same as text, for a command line.
///
/// # Panics
/// When the path is no UTF-8.
pub fn arg(name: &str) -> String {
    path(name).to_str().expect("the path is UTF-8").to_owned()
}

/// `NAME.golden.json`.
#[derive(Debug, Deserialize)]
pub struct Golden {
    /// Six prompts with their greedy continuations.
    pub prompts: Vec<Prompt>,
    /// A text of some hundred tokens with the log-probability of each.
    pub fixed_text: FixedText,
    /// Strings and their ids.
    pub tokenizer_vectors: Vec<TokenizerVector>,
}

/// One prompt.
#[derive(Debug, Deserialize)]
pub struct Prompt {
    /// What kind of prompt it is.
    pub category: String,
    /// Ids with BOS.
    pub ids: Vec<u32>,
    /// 64 greedy tokens.
    pub greedy_f32: Vec<u32>,
    /// Whether variants of the reference itself agree on them.
    pub greedy_variants_agree: Value,
}

/// The fixed text.
#[derive(Debug, Deserialize)]
pub struct FixedText {
    /// Ids with BOS.
    pub ids: Vec<u32>,
    /// Log-probability of every token after the first.
    pub logprobs_f32: Vec<f64>,
    /// Minus their sum.
    pub nll_sum_f32: f64,
}

/// One string.
#[derive(Debug, Deserialize)]
pub struct TokenizerVector {
    /// The text.
    pub text: String,
    /// Its ids, without BOS.
    pub ids: Vec<u32>,
}

/// `NAME.clean.json`: prompts without a value near a rounding boundary.
#[derive(Debug, Deserialize)]
pub struct Clean {
    /// Sixteen short prompts.
    pub prompts: Vec<CleanPrompt>,
}

/// One clean prompt.
#[derive(Debug, Deserialize)]
pub struct CleanPrompt {
    /// Ids with BOS.
    pub ids: Vec<u32>,
    /// Best token at each position.
    pub argmax: Vec<u32>,
}

/// Reads `NAME.golden.json`.
///
/// # Panics
/// When it is missing or of another shape.
pub fn load(name: &str) -> Golden {
    let text = std::fs::read_to_string(path(&format!("{name}.golden.json"))).expect("the golden file is there");
    serde_json::from_str(&text).expect("the golden file has the known shape")
}

/// Reads `NAME.clean.json`.
///
/// # Panics
/// When it is missing or of another shape.
pub fn load_clean(name: &str) -> Clean {
    let text = std::fs::read_to_string(path(&format!("{name}.clean.json"))).expect("the golden file is there");
    serde_json::from_str(&text).expect("the golden file has the known shape")
}

/// Reads the float32 array `key` of a golden safetensors file.
///
/// # Panics
/// When the file or the key is missing.
pub fn array(file: &str, key: &str) -> Vec<f32> {
    let bytes = std::fs::read(path(file)).expect("the golden file is there");
    let header_len = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))).expect("small");
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).expect("a safetensors header");
    assert_eq!(header[key]["dtype"], "F32", "{file}: {key}");
    let offset =
        |i: usize| usize::try_from(header[key]["data_offsets"][i].as_u64().expect("an offset")).expect("small");
    bytes[8 + header_len..][offset(0)..offset(1)]
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().expect("four bytes")))
        .collect()
}
