//! The typed weights of a checkpoint: matrices that decode themselves a row at a time, still mapped.
//!
//! `model` reads them row by row. The bytes are known to be as long as the shape says (`names.rs` makes these types and
//! nothing else does); the arithmetic of the encodings is in `quant::formats`.
#![expect(clippy::arithmetic_side_effects, reason = "sizes were checked against the bytes when these types were made")]

use std::ops::Range;

use super::{I2sLayout, LoadError, MappedBytes};
use crate::quant::{
    formats::{InvalidCode, dense, i2_s, quarters, tq},
    ternary::{TernaryRule, WeightStatistics},
};

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
#[derive(Clone, Debug)]
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

/// The `[rows, cols]` weights of a linear layer, ternary in the file or to be made so when read.
#[derive(Clone, Debug)]
pub struct TernaryTensor {
    /// Name in the file, for messages.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features (contiguous).
    pub cols: usize,
    pub(super) encoding: TernaryEncoding,
    pub(super) row_order: RowOrder,
    /// What stands beside the tensor: `weight_scale` or its inverse, a `.scale` tensor; else 1.
    pub(super) multiplier: f32,
    pub(super) data: MappedBytes,
}

/// How the weights of a linear layer are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TernaryEncoding {
    I2S(I2sLayout),
    Tq1_0,
    Tq2_0,
    /// Hugging Face's packed `uint8`; all of the scale is in the multiplier.
    Quarters,
    /// Ternary already or masters, one of the three float encodings.
    Float(DenseEncoding),
}

/// Which row of the file is row r of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// Row r: the file is in half-rotation order, or the rows are no heads.
    AsStored,
    /// The file pairs rows 2i and 2i+1 of a head, where half rotation pairs i and i + hd/2.
    Interleaved { head_dim: usize },
}

/// A [`TernaryTensor`] whose scale is known: decodes rows of {-1, 0, +1}, from several threads at once.
#[derive(Debug)]
pub struct TernaryReader<'a> {
    tensor: &'a TernaryTensor,
    scale: f32,
    /// How floats become trits; `None` for stored codes.
    rule: Option<TernaryRule>,
}

/// Floats are decoded so many at a time, on the stack; a multiple of the lanes of the absmean.
const CHUNK: usize = 512;

impl DenseEncoding {
    /// Bytes of a row of `cols` values; `None` when that is no whole number of blocks.
    pub(super) fn row_bytes(self, cols: usize) -> Option<usize> {
        let (values, bytes) = match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (dense::SMALL_BLOCK, dense::Q8_0_BYTES),
            Self::Q6K => (dense::Q6_K_BLOCK, dense::Q6_K_BYTES),
            Self::Q4_0 => (dense::SMALL_BLOCK, dense::Q4_0_BYTES),
        };
        cols.is_multiple_of(values).then(|| cols.checked_div(values))??.checked_mul(bytes)
    }

    /// Decodes `out.len()` values from the start of `bytes`.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => dense::decode_f32(bytes, out),
            Self::F16 => dense::decode_f16(bytes, out),
            Self::Bf16 => dense::decode_bf16(bytes, out),
            Self::Q8_0 => dense::decode_q8_0(bytes, out),
            Self::Q6K => dense::decode_q6_k(bytes, out),
            Self::Q4_0 => dense::decode_q4_0(bytes, out),
        }
    }
}

impl DenseMatrix {
    /// Decodes row `row` into `out` (`cols` values).
    ///
    /// # Panics
    /// When `row >= rows` or `out.len() != cols`.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a buffer of one row");
        self.encoding.decode(self.row_bytes(row), out);
    }

    /// Row `row` as it is stored.
    ///
    /// # Panics
    /// When `row >= rows`.
    pub fn row_bytes(&self, row: usize) -> &[u8] {
        nth_row(self.data.bytes(), self.rows, row)
    }

    /// Gives the file pages of `rows` back to the kernel; they are read again when next needed. Nothing happens for rows
    /// that are not there.
    pub fn release_rows(&self, rows: Range<usize>) {
        let row_bytes = self.data.bytes().len().checked_div(self.rows).unwrap_or(0);
        let bytes = rows.start.checked_mul(row_bytes).zip(rows.end.checked_mul(row_bytes));
        if let Some(part) = bytes.and_then(|(start, end)| self.data.slice(start..end)) {
            part.release();
        }
    }
}

impl TernaryTensor {
    /// Finds the scale (for float weights by one pass over the tensor) and makes the rows readable.
    ///
    /// # Errors
    /// When a float weight or the scale is not finite, or the blocks of a TQ tensor have different scales.
    pub fn reader(&self) -> Result<TernaryReader<'_>, LoadError> {
        let mut rule = None;
        let stored = match self.encoding {
            TernaryEncoding::I2S(_) => self.i2_s_scale(),
            TernaryEncoding::Tq1_0 => self.block_scale(tq::TQ1_0_BYTES)?,
            TernaryEncoding::Tq2_0 => self.block_scale(tq::TQ2_0_BYTES)?,
            TernaryEncoding::Quarters => 1.0,
            TernaryEncoding::Float(encoding) => rule.insert(self.rule(encoding)?).scale(),
        };
        let scale = stored * self.multiplier;
        if !scale.is_finite() {
            return Err(self.values_error("a scale that is not finite"));
        }
        Ok(TernaryReader { tensor: self, scale, rule })
    }

    /// Gives the file pages of this tensor back to the kernel, once it has been repacked.
    pub fn release(&self) {
        self.data.release();
    }

    /// The `f32` after the codes.
    fn i2_s_scale(&self) -> f32 {
        let tail = self.data.bytes().last_chunk::<{ i2_s::TAIL_BYTES }>();
        let scale = tail.and_then(|tail| tail.first_chunk()).expect("an I2_S tensor ends in its tail");
        f32::from_le_bytes(*scale)
    }

    fn block_scale(&self, block_bytes: usize) -> Result<f32, LoadError> {
        let scale = tq::common_scale(self.data.bytes(), block_bytes);
        scale.ok_or_else(|| self.values_error("blocks of different scales: it is not a 1-bit tensor with one scale"))
    }

    /// One pass over float weights.
    fn rule(&self, encoding: DenseEncoding) -> Result<TernaryRule, LoadError> {
        let mut statistics = WeightStatistics::default();
        for row in 0..self.rows {
            for_chunks(encoding, nth_row(self.data.bytes(), self.rows, row), self.cols, |_, values| {
                statistics.observe(values);
            });
        }
        statistics.rule().map_err(|_| self.values_error("a weight that is not finite"))
    }

    fn values_error(&self, problem: &'static str) -> LoadError {
        LoadError::Values { tensor: self.name.clone(), problem }
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
    pub fn decode_row(&self, row: usize, out: &mut [i8]) -> Result<(), LoadError> {
        let tensor = self.tensor;
        assert!(row < tensor.rows && out.len() == tensor.cols, "row {row} of {}", tensor.rows);
        let row = tensor.row_order.in_file(row);
        let bytes = tensor.data.bytes();
        let stored_row = || nth_row(bytes, tensor.rows, row);
        let decoded = match tensor.encoding {
            TernaryEncoding::I2S(layout) => decode_i2_s(layout, bytes, row, out),
            TernaryEncoding::Tq1_0 => tq::decode_tq1_0(stored_row(), out),
            TernaryEncoding::Tq2_0 => tq::decode_tq2_0(stored_row(), out),
            TernaryEncoding::Quarters => quarters::decode_row(bytes, tensor.rows, row, out),
            TernaryEncoding::Float(encoding) => {
                let rule = self.rule.expect("a reader of floats has a rule");
                for_chunks(encoding, stored_row(), tensor.cols, |columns, values| {
                    rule.apply(values, &mut out[columns])
                });
                Ok(())
            }
        };
        decoded.map_err(|InvalidCode| {
            tensor.values_error("a code that is none of -1, 0, +1: corrupt, or another physical layout")
        })
    }
}

impl RowOrder {
    /// The row of the file that holds row `row`.
    fn in_file(self, row: usize) -> usize {
        match self {
            Self::AsStored => row,
            Self::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + half
            }
        }
    }
}

fn decode_i2_s(layout: I2sLayout, bytes: &[u8], row: usize, out: &mut [i8]) -> Result<(), InvalidCode> {
    match layout {
        I2sLayout::A => i2_s::decode_a(bytes, row * out.len(), out),
        I2sLayout::B => i2_s::decode_b(bytes, row * out.len(), out),
        I2sLayout::C => i2_s::decode_c(bytes, row, out),
    }
}

/// Row `row` of `rows` equally long rows.
fn nth_row(bytes: &[u8], rows: usize, row: usize) -> &[u8] {
    let row_bytes = bytes.len() / rows;
    &bytes[row * row_bytes..][..row_bytes]
}

/// Decodes a row of floats piece by piece: `with(columns, values)`.
fn for_chunks(encoding: DenseEncoding, row: &[u8], cols: usize, mut with: impl FnMut(std::ops::Range<usize>, &[f32])) {
    let mut buffer = [0.0; CHUNK];
    let value_bytes = row.len() / cols;
    for start in (0..cols).step_by(CHUNK) {
        let columns = start..cols.min(start + CHUNK);
        let values = &mut buffer[..columns.len()];
        encoding.decode(&row[start * value_bytes..], values);
        with(columns, values);
    }
}
