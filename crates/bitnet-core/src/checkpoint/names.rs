//! The only file that knows tensor names, for every supported architecture: takes the weights of a model out of a
//! [`TensorTable`] by role, checks every shape, and refuses whatever would change the graph.

use super::{
    DenseEncoding, DenseMatrix, I2sLayout, LayerTensors, LoadError, ModelConfig, TernaryTensor, WeightTensors,
    table::{Encoding, RawTensor, TensorTable},
    tensors::{RowOrder, TernaryEncoding},
};
use crate::quant::formats::{i2_s, quarters, tq};

/// Norm weights below this become 0: dead channels hold about 1e-32, and denormal numbers are slow.
const SMALLEST_NORM_WEIGHT: f32 = 1e-20;

/// Which family of names a file uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// `blk.N.attn_q.weight`.
    Gguf,
    /// `model.layers.N.self_attn.q_proj.weight`.
    HuggingFace,
    /// The same without `model.`: a model saved without its head.
    HuggingFaceHeadless,
}

/// What the weights of a file mean, beyond names and shapes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Conventions {
    /// Family of names.
    pub(super) naming: Naming,
    /// Whether attention and feed-forward end in a norm of their own (BitNet, not Llama).
    pub(super) sub_norms: bool,
    /// Whether the head is the embedding; `None` when the absence of a head tells.
    pub(super) tied: Option<bool>,
    /// Whether rows of q and k are stored in interleaved order (GGUF of architecture `llama`).
    pub(super) interleaved_heads: bool,
    /// Whether `weight_scale` divides (BitLinear) instead of multiplying (AutoBitLinear).
    pub(super) scale_divides: bool,
    /// Physical layout of I2_S.
    pub(super) i2s_layout: I2sLayout,
}

/// A tensor of a layer, or of the whole model, by what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Embedding,
    OutputNorm,
    Head,
    AttnNorm,
    AttnSubNorm,
    FfnNorm,
    FfnSubNorm,
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

/// The seven linear layers as Hugging Face calls them: what `modules_to_not_convert` must not name.
pub(super) const LINEAR_MODULES: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Takes all weights out of `table`.
///
/// # Errors
/// When one is missing, of another shape or of an encoding that cannot be used, or when tensors are left over that
/// would change the graph.
pub(super) fn assemble(
    table: &mut TensorTable,
    config: &ModelConfig,
    conventions: Conventions,
) -> Result<WeightTensors, LoadError> {
    refuse_other_machines_codes(table)?;
    let mut builder = Builder { table, config, conventions };
    let token_embedding = builder.dense(Role::Embedding)?;
    let output_norm = builder.norm(Role::OutputNorm, 0, config.hidden_size)?;
    let lm_head = builder.head()?;
    let layers = (0..config.num_layers).map(|layer| builder.layer(layer)).collect::<Result<_, _>>()?;
    builder.refuse_left_overs()?;
    Ok(WeightTensors { token_embedding, layers, output_norm, lm_head })
}

/// Rows of the token embedding, which is the size of the vocabulary.
pub(super) fn vocabulary_rows(table: &TensorTable, naming: Naming) -> Option<u64> {
    let names = Role::Embedding.names(naming, 0);
    table.all().iter().find(|tensor| names.contains(&tensor.name)).and_then(|tensor| tensor.shape.first().copied())
}

/// Notes when linear layers are stored as floats: whether they are ternary already shows only when they are read.
pub(super) fn note_float_linears(weights: &WeightTensors, notes: &mut Vec<String>) {
    let is_float = |tensor: &TernaryTensor| matches!(tensor.encoding, TernaryEncoding::Float(_));
    if weights.layers.iter().any(|layer| is_float(&layer.q)) {
        let note = "linear layers are stored as floats: ternary ones are taken as they are, others are quantized by \
            absmean, which is right only for a model trained so";
        notes.push(note.into());
    }
}

/// RoPE frequency factors stored as a tensor (GGUF of Llama 3).
pub(super) fn rope_factors(table: &mut TensorTable, head_dim: usize) -> Result<Option<Vec<f32>>, LoadError> {
    match table.take("rope_freqs.weight") {
        Some(tensor) => vector(tensor, head_dim / 2).map(Some),
        None => Ok(None),
    }
}

/// What [`assemble`] works with.
struct Builder<'a> {
    table: &'a mut TensorTable,
    config: &'a ModelConfig,
    conventions: Conventions,
}

impl Builder<'_> {
    fn layer(&mut self, layer: usize) -> Result<LayerTensors, LoadError> {
        let ModelConfig { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, .. } = *self.config;
        // `geometry::check` bounds both products.
        let (q_rows, kv_rows) = (num_heads.saturating_mul(head_dim), num_kv_heads.saturating_mul(head_dim));
        let sub_norms = self.conventions.sub_norms;
        let heads = match self.conventions.interleaved_heads {
            true => RowOrder::Interleaved { head_dim },
            false => RowOrder::AsStored,
        };
        let plain = RowOrder::AsStored;
        let attn_sub_norm = sub_norms.then(|| self.norm(Role::AttnSubNorm, layer, q_rows)).transpose()?;
        let ffn_sub_norm = sub_norms.then(|| self.norm(Role::FfnSubNorm, layer, intermediate_size)).transpose()?;
        Ok(LayerTensors {
            attn_norm: self.norm(Role::AttnNorm, layer, hidden_size)?,
            attn_sub_norm,
            ffn_norm: self.norm(Role::FfnNorm, layer, hidden_size)?,
            ffn_sub_norm,
            q: self.linear(Role::Q, layer, [q_rows, hidden_size], heads)?,
            k: self.linear(Role::K, layer, [kv_rows, hidden_size], heads)?,
            v: self.linear(Role::V, layer, [kv_rows, hidden_size], plain)?,
            o: self.linear(Role::O, layer, [hidden_size, q_rows], plain)?,
            gate: self.linear(Role::Gate, layer, [intermediate_size, hidden_size], plain)?,
            up: self.linear(Role::Up, layer, [intermediate_size, hidden_size], plain)?,
            down: self.linear(Role::Down, layer, [hidden_size, intermediate_size], plain)?,
        })
    }

    /// The output head; a copy beside a tied embedding is passed over.
    fn head(&mut self) -> Result<Option<DenseMatrix>, LoadError> {
        let names = Role::Head.names(self.conventions.naming, 0);
        let present = names.iter().any(|name| self.table.contains(name));
        match self.conventions.tied {
            Some(true) => {
                for name in &names {
                    self.table.take(name);
                }
                Ok(None)
            }
            None if !present => Ok(None),
            _ => self.dense(Role::Head).map(Some),
        }
    }

    fn norm(&mut self, role: Role, layer: usize, len: usize) -> Result<Vec<f32>, LoadError> {
        let mut weights = vector(self.take(role, layer)?, len)?;
        for weight in &mut weights {
            if weight.abs() < SMALLEST_NORM_WEIGHT {
                *weight = 0.0;
            }
        }
        Ok(weights)
    }

    /// The embedding or the head.
    fn dense(&mut self, role: Role) -> Result<DenseMatrix, LoadError> {
        let (rows, cols) = (self.config.vocab_size, self.config.hidden_size);
        let tensor = self.take(role, 0)?;
        expect_shape(tensor, &[rows, cols])?;
        let encoding = tensor.encoding.dense().filter(|encoding| {
            let bytes = encoding.row_bytes(cols).and_then(|row| row.checked_mul(rows));
            bytes == Some(tensor.data.bytes().len())
        });
        let encoding = encoding.ok_or_else(|| {
            let advice = "embeddings and heads can be F32, F16, BF16, Q8_0, Q6_K or Q4_0";
            LoadError::unsupported(format!("type {} of tensor `{}`", tensor.type_name, tensor.name), advice)
        })?;
        Ok(DenseMatrix { rows, cols, encoding, data: tensor.data.clone() })
    }

    fn linear(
        &mut self,
        role: Role,
        layer: usize,
        [rows, cols]: [usize; 2],
        row_order: RowOrder,
    ) -> Result<TernaryTensor, LoadError> {
        let tensor = self.take(role, layer)?.clone();
        let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        let multiplier = self.multiplier(module)?;
        let stored_rows = if tensor.encoding == Encoding::U8 { quarters::packed_rows(rows) } else { rows };
        expect_shape(&tensor, &[stored_rows, cols])?;
        let encoding = self.ternary_encoding(&tensor, multiplier.is_some())?;
        whole_blocks(&tensor, encoding, rows, cols)?;
        let multiplier = multiplier.unwrap_or(1.0);
        Ok(TernaryTensor { name: tensor.name, rows, cols, encoding, row_order, multiplier, data: tensor.data })
    }

    /// How the codes of a linear layer are stored.
    fn ternary_encoding(&self, tensor: &RawTensor, has_scale: bool) -> Result<TernaryEncoding, LoadError> {
        let hugging_face = self.conventions.naming != Naming::Gguf;
        let unsupported = |advice| {
            Err(LoadError::unsupported(format!("type {} of tensor `{}`", tensor.type_name, tensor.name), advice))
        };
        match tensor.encoding {
            Encoding::I2S => Ok(TernaryEncoding::I2S(self.conventions.i2s_layout)),
            Encoding::Tq1_0 => Ok(TernaryEncoding::Tq1_0),
            Encoding::Tq2_0 => Ok(TernaryEncoding::Tq2_0),
            Encoding::U8 if hugging_face && has_scale => Ok(TernaryEncoding::Quarters),
            Encoding::U8 if hugging_face => unsupported("packed codes need a `weight_scale` beside them"),
            Encoding::F32 | Encoding::F16 | Encoding::Bf16 if hugging_face && has_scale => {
                unsupported("float weights with a `weight_scale` beside them are ambiguous")
            }
            Encoding::F32 => Ok(TernaryEncoding::Float(DenseEncoding::F32)),
            Encoding::F16 => Ok(TernaryEncoding::Float(DenseEncoding::F16)),
            Encoding::Bf16 => Ok(TernaryEncoding::Float(DenseEncoding::Bf16)),
            Encoding::Q8_0 | Encoding::Q6K | Encoding::Q4_0 | Encoding::U8 | Encoding::Other => unsupported(
                "this is not a 1-bit model, or one requantized; linear layers can be I2_S, TQ1_0, TQ2_0, F32, F16 or BF16",
            ),
        }
    }

    /// The scalar stored beside a linear layer, as a factor.
    fn multiplier(&mut self, module: &str) -> Result<Option<f32>, LoadError> {
        let (suffix, divides) = match self.conventions.naming {
            Naming::Gguf => ("scale", false),
            Naming::HuggingFace | Naming::HuggingFaceHeadless => ("weight_scale", self.conventions.scale_divides),
        };
        let Some(tensor) = self.table.take(&format!("{module}.{suffix}")) else { return Ok(None) };
        if tensor.shape.iter().any(|&dimension| dimension != 1) {
            return Err(LoadError::Shape {
                tensor: tensor.name.clone(),
                expected: vec![1],
                found: tensor.shape.clone(),
            });
        }
        let stored = floats(tensor, 1)?.first().copied().unwrap_or(f32::NAN);
        let factor = if divides { 1.0 / stored } else { stored };
        match factor.is_finite() {
            true => Ok(Some(factor)),
            false => Err(LoadError::Values { tensor: tensor.name.clone(), problem: "a scale that is not finite" }),
        }
    }

    fn take(&mut self, role: Role, layer: usize) -> Result<&RawTensor, LoadError> {
        let mut names = role.names(self.conventions.naming, layer);
        let found = names.iter().position(|name| self.table.contains(name)).unwrap_or(0);
        let name = names.swap_remove(found);
        self.table.take(&name).ok_or(LoadError::MissingTensor { tensor: name })
    }

    /// Refuses tensors that belong to a graph other than this one; buffers that hold no weights are passed over.
    fn refuse_left_overs(&self) -> Result<(), LoadError> {
        let matters = |tensor: &&RawTensor| !tensor.name.ends_with("rotary_emb.inv_freq");
        let Some(tensor) = self.table.left_over().find(matters) else { return Ok(()) };
        let advice = match tensor.name.rsplit_once('.') {
            Some((_, "bias")) => "linear layers and norms have no bias in this architecture",
            Some((module, _)) if module.ends_with("rms_norm") => "norms inside linear layers are not computed",
            _ => "it is not part of this architecture's graph, and leaving it out would change the answers",
        };
        Err(LoadError::unsupported(format!("tensor `{}`", tensor.name), advice))
    }
}

impl Role {
    /// The names a tensor can have: the usual one first, then that of the 1bitLLM repositories.
    fn names(self, naming: Naming, layer: usize) -> Vec<String> {
        let (whole_model, names): (bool, &[&str]) = match (naming, self) {
            (Naming::Gguf, Self::Embedding) => (true, &["token_embd"]),
            (Naming::Gguf, Self::OutputNorm) => (true, &["output_norm"]),
            (Naming::Gguf, Self::Head) => (true, &["output"]),
            (Naming::Gguf, Self::AttnNorm) => (false, &["attn_norm"]),
            (Naming::Gguf, Self::AttnSubNorm) => (false, &["attn_sub_norm"]),
            (Naming::Gguf, Self::FfnNorm) => (false, &["ffn_norm"]),
            (Naming::Gguf, Self::FfnSubNorm) => (false, &["ffn_sub_norm"]),
            (Naming::Gguf, Self::Q) => (false, &["attn_q"]),
            (Naming::Gguf, Self::K) => (false, &["attn_k"]),
            (Naming::Gguf, Self::V) => (false, &["attn_v"]),
            (Naming::Gguf, Self::O) => (false, &["attn_output"]),
            (Naming::Gguf, Self::Gate) => (false, &["ffn_gate"]),
            (Naming::Gguf, Self::Up) => (false, &["ffn_up"]),
            (Naming::Gguf, Self::Down) => (false, &["ffn_down"]),
            (_, Self::Embedding) => (true, &["model.embed_tokens"]),
            (_, Self::OutputNorm) => (true, &["model.norm"]),
            (_, Self::Head) => (true, &["lm_head"]),
            (_, Self::AttnNorm) => (false, &["input_layernorm"]),
            (_, Self::AttnSubNorm) => (false, &["self_attn.attn_sub_norm", "self_attn.inner_attn_ln"]),
            (_, Self::FfnNorm) => (false, &["post_attention_layernorm"]),
            (_, Self::FfnSubNorm) => (false, &["mlp.ffn_sub_norm", "mlp.ffn_layernorm"]),
            (_, Self::Q) => (false, &["self_attn.q_proj"]),
            (_, Self::K) => (false, &["self_attn.k_proj"]),
            (_, Self::V) => (false, &["self_attn.v_proj"]),
            (_, Self::O) => (false, &["self_attn.o_proj"]),
            (_, Self::Gate) => (false, &["mlp.gate_proj"]),
            (_, Self::Up) => (false, &["mlp.up_proj"]),
            (_, Self::Down) => (false, &["mlp.down_proj"]),
        };
        let prefix = match (whole_model, naming) {
            (true, _) => String::new(),
            (false, Naming::Gguf) => format!("blk.{layer}."),
            (false, _) => format!("model.layers.{layer}."),
        };
        let name = |name: &&str| {
            let name = format!("{prefix}{name}.weight");
            match naming {
                Naming::HuggingFaceHeadless => name.trim_start_matches("model.").to_owned(),
                Naming::Gguf | Naming::HuggingFace => name,
            }
        };
        names.iter().map(name).collect()
    }
}

impl Encoding {
    /// The encoding as one of real numbers.
    fn dense(self) -> Option<DenseEncoding> {
        Some(match self {
            Self::F32 => DenseEncoding::F32,
            Self::F16 => DenseEncoding::F16,
            Self::Bf16 => DenseEncoding::Bf16,
            Self::Q8_0 => DenseEncoding::Q8_0,
            Self::Q6K => DenseEncoding::Q6K,
            Self::Q4_0 => DenseEncoding::Q4_0,
            Self::I2S | Self::Tq1_0 | Self::Tq2_0 | Self::U8 | Self::Other => return None,
        })
    }
}

/// TL1 and TL2 codes are permuted for one machine's kernels, in an order that the file does not tell.
fn refuse_other_machines_codes(table: &TensorTable) -> Result<(), LoadError> {
    let tl = |tensor: &&RawTensor| matches!(tensor.type_name, "TL1" | "TL2");
    let Some(tensor) = table.all().iter().find(tl) else { return Ok(()) };
    let what = format!("type {} of tensor `{}`", tensor.type_name, tensor.name);
    Err(LoadError::unsupported(
        what,
        "its codes are permuted for one machine's kernels; use the I2_S file of the same model (ggml-model-i2_s.gguf)",
    ))
}

/// A vector of floats as `f32`.
fn vector(tensor: &RawTensor, len: usize) -> Result<Vec<f32>, LoadError> {
    expect_shape(tensor, &[len])?;
    floats(tensor, len)
}

/// All values of a small float tensor; `len` is what its shape says.
fn floats(tensor: &RawTensor, len: usize) -> Result<Vec<f32>, LoadError> {
    match tensor.encoding.dense() {
        Some(encoding @ (DenseEncoding::F32 | DenseEncoding::F16 | DenseEncoding::Bf16)) => {
            let mut values = vec![0.0; len];
            encoding.decode(tensor.data.bytes(), &mut values);
            Ok(values)
        }
        _ => {
            let what = format!("type {} of tensor `{}`", tensor.type_name, tensor.name);
            Err(LoadError::unsupported(what, "norms and scales can be F32, F16 or BF16"))
        }
    }
}

fn expect_shape(tensor: &RawTensor, expected: &[usize]) -> Result<(), LoadError> {
    let expected: Vec<u64> = expected.iter().map(|&dimension| dimension as u64).collect();
    match tensor.shape == expected {
        true => Ok(()),
        false => Err(LoadError::Shape { tensor: tensor.name.clone(), expected, found: tensor.shape.clone() }),
    }
}

/// Refuses a linear layer that is no whole number of the blocks its encoding works in.
fn whole_blocks(tensor: &RawTensor, encoding: TernaryEncoding, rows: usize, cols: usize) -> Result<(), LoadError> {
    let values = rows.saturating_mul(cols);
    let whole = match encoding {
        TernaryEncoding::I2S(I2sLayout::A) => values.is_multiple_of(i2_s::BLOCK_A),
        TernaryEncoding::I2S(I2sLayout::B) => values.is_multiple_of(i2_s::BLOCK_B),
        TernaryEncoding::I2S(I2sLayout::C) => rows.is_multiple_of(i2_s::ROWS_C),
        TernaryEncoding::Tq1_0 | TernaryEncoding::Tq2_0 => cols.is_multiple_of(tq::BLOCK),
        TernaryEncoding::Quarters | TernaryEncoding::Float(_) => true,
    };
    match whole {
        true => Ok(()),
        false => {
            Err(LoadError::Values { tensor: tensor.name.clone(), problem: "no whole number of blocks of its type" })
        }
    }
}
