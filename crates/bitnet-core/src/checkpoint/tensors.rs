//! The typed weights of a checkpoint: matrices that decode themselves a row at a time, still mapped.
//!
//! `quant` and `model` read them row by row; the encodings are decoded here and in `gguf.rs`, nowhere else.

use super::MappedBytes;

/// Every weight of a model, by role.
#[derive(Debug)]
pub struct WeightTensors {
    /// `[vocab_size, hidden_size]`.
    pub token_embedding: DenseMatrix,
    /// One entry a layer.
    pub layers: Vec<LayerTensors>,
    /// `[hidden_size]`.
    pub output_norm: Vec<f32>,
    /// `[vocab_size, hidden_size]`; `None` when the head is the embedding.
    pub lm_head: Option<DenseMatrix>,
}

/// The weights of one layer. Norm weights below 1e-20 in magnitude are already 0.
#[derive(Debug)]
pub struct LayerTensors {
    /// `[hidden_size]`.
    pub attn_norm: Vec<f32>,
    /// `[num_heads * head_dim]`; absent in Llama.
    pub attn_sub_norm: Option<Vec<f32>>,
    /// `[hidden_size]`.
    pub ffn_norm: Vec<f32>,
    /// `[intermediate_size]`; absent in Llama.
    pub ffn_sub_norm: Option<Vec<f32>>,
    /// `[num_heads * head_dim, hidden_size]`, rows in half-rotation order whatever the file's.
    pub q: TernaryTensor,
    /// `[num_kv_heads * head_dim, hidden_size]`, rows in half-rotation order whatever the file's.
    pub k: TernaryTensor,
    /// `[num_kv_heads * head_dim, hidden_size]`.
    pub v: TernaryTensor,
    /// `[hidden_size, num_heads * head_dim]`.
    pub o: TernaryTensor,
    /// `[intermediate_size, hidden_size]`.
    pub gate: TernaryTensor,
    /// `[intermediate_size, hidden_size]`.
    pub up: TernaryTensor,
    /// `[hidden_size, intermediate_size]`.
    pub down: TernaryTensor,
}

/// How the values of a dense matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenseEncoding {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 values in 34 bytes: f16 scale, int8 codes.
    Q8_0,
    /// 256 values in 210 bytes.
    Q6K,
    /// 32 values in 18 bytes: f16 scale, 4-bit codes.
    Q4_0,
}

/// A `[rows, cols]` matrix of real numbers (embedding or head) in the file's encoding.
#[derive(Clone, Debug)]
pub struct DenseMatrix {
    /// Rows.
    pub rows: usize,
    /// Columns (contiguous).
    pub cols: usize,
    /// Encoding of `data`.
    pub encoding: DenseEncoding,
    /// Exactly `rows` encoded rows.
    pub data: MappedBytes,
}

/// How the weights of a linear layer are stored. Opaque outside `checkpoint`: use [`TernaryTensor::reader`].
#[derive(Clone, Debug)]
pub enum CodesEncoding {}

/// The `[rows, cols]` weights of a linear layer, ternary in the file or to be made so when read.
#[derive(Clone, Debug)]
pub struct TernaryTensor {
    /// Output features.
    pub rows: usize,
    /// Input features (contiguous).
    pub cols: usize,
    pub(super) codes: CodesEncoding,
    pub(super) data: MappedBytes,
}

/// A [`TernaryTensor`] whose scale is known: decodes rows of {-1, 0, +1}, from several threads at once.
#[derive(Debug)]
pub struct TernaryReader<'a> {
    tensor: &'a TernaryTensor,
    scale: f32,
}

impl DenseMatrix {
    /// Decodes row `row` into `out` (`cols` values).
    ///
    /// # Panics
    /// When `row >= rows` or `out.len() != cols`.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        let _ = (row, out);
        unimplemented!()
    }
}

impl TernaryTensor {
    /// Finds the scale (for float weights by one pass over the tensor) and makes the rows readable.
    ///
    /// # Errors
    /// When a float weight or the scale is not finite.
    pub fn reader(&self) -> Result<TernaryReader<'_>, super::LoadError> {
        unimplemented!()
    }

    /// Gives the file pages of this tensor back to the kernel, once it has been repacked.
    pub fn release(&self) {
        self.data.release();
    }
}

impl TernaryReader<'_> {
    /// Multiplies the integer sum: `y = sum(t * q) / s * scale`.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Decodes row `row` into `out` (`cols` values in {-1, 0, 1}).
    ///
    /// # Errors
    /// When the file holds a code that is no trit.
    ///
    /// # Panics
    /// When `row >= rows` or `out.len() != cols`.
    pub fn decode_row(&self, row: usize, out: &mut [i8]) -> Result<(), super::LoadError> {
        let _ = (row, out, self.tensor);
        unimplemented!()
    }
}
