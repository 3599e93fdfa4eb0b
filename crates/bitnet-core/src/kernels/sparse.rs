//! Ternary weights of which a product reads only some channels: `ChannelRows` when few outputs are wanted, `ChannelColumns`
//! when few inputs are not zero. Both hold 2 bits a weight as code = weight + 1, a channel's weights in whole cache lines.
//!
//! A line has 64 bytes for 256 weights. Of `ChannelRows` byte `b` holds the weights `64 * p + b` in its bit pairs `p = 0..4`, so
//! a plane is multiplied by 64 activations that lie together. Of `ChannelColumns` byte `16 * l + 4 * k + i` holds the
//! outputs `64 * p + 16 * k + 4 * l + i`: interleaving the bytes of four columns then leaves 16 outputs in order.
//!
//! What is skipped are exact zeros, and what is left are sums of integers: the bits are those of the whole product. The
//! functions here are the definition, written so that they also vectorize.

use std::ops::Range;

use super::{
    FloatOp,
    arena::{Arena, Piece},
    epilogue,
    packing::{DecodeRow, MAX_COLS, in_parallel},
};
use crate::{
    quant::activation::QuantizedActivations,
    threads::{SharedRows, WorkerPool},
};

/// Weights of a cache line.
pub const LINE_WEIGHTS: usize = 256;
/// Bytes of a cache line, one of each bit plane.
pub(super) const LINE_BYTES: usize = 64;
/// Lines whose sums of one byte fit 16 bits: each adds at most 4 * 2 * 128.
const LINES_IN_I16: usize = 31;
/// Columns whose sums of one output fit 16 bits: each adds at most 2 * 128.
const COLUMNS_IN_I16: usize = 127;

/// A matrix whose rows are channels: `up`.
#[derive(Debug)]
pub struct ChannelRows {
    /// `[channels, cols / LINE_WEIGHTS, LINE_BYTES]`
    memory: Piece,
    cols: usize,
    scale: f32,
}

/// A matrix whose columns are channels: `down`.
#[derive(Debug)]
pub struct ChannelColumns {
    /// `[channels, rows / LINE_WEIGHTS, LINE_BYTES]`
    memory: Piece,
    rows: usize,
    channels: usize,
    scale: f32,
}

impl ChannelRows {
    /// Packs a matrix `[channels, cols]` that `decode_row` gives row by row, in parallel on `pool`.
    ///
    /// # Errors
    /// The error of the lowest row that could not be decoded.
    ///
    /// # Panics
    /// When `cols` is not a multiple of [`LINE_WEIGHTS`], too large or 0, or memory is exhausted.
    pub fn pack<E: Send>(
        (channels, cols): (usize, usize),
        scale: f32,
        pool: &mut WorkerPool,
        decode_row: &DecodeRow<'_, E>,
    ) -> Result<Self, E> {
        assert!(is_whole_lines(cols) && cols <= MAX_COLS && channels > 0, "{channels} rows of {cols}");
        let mut memory = Arena::whole(channels * cols / 4);
        let rows = SharedRows::new(&mut memory[..], cols / 4);
        in_parallel(channels, pool, &|share| {
            let mut weights = vec![0; cols];
            for (row, bytes) in share.clone().zip(rows.claim(share).chunks_exact_mut(cols / 4)) {
                decode_row(row, &mut weights).map_err(|error| (row, error))?;
                let lines = bytes.as_chunks_mut::<LINE_BYTES>().0;
                for (line, weights) in lines.iter_mut().zip(weights.as_chunks::<LINE_WEIGHTS>().0) {
                    *line = std::array::from_fn(|b| {
                        pack_codes([weights[b], weights[64 + b], weights[128 + b], weights[192 + b]])
                    });
                }
            }
            Ok(())
        })?;
        Ok(Self { memory, cols, scale })
    }

    /// Inputs of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// What the integer product is multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Bytes of the packed codes.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Every row, `cols / 4` bytes each.
    pub(super) fn codes(&self) -> &[u8] {
        &self.memory
    }
}

impl ChannelColumns {
    /// Packs a matrix `[rows, channels]` that `decode_row` gives row by row, in parallel on `pool`.
    ///
    /// # Errors
    /// The error of some row that could not be decoded.
    ///
    /// # Panics
    /// When `rows` is not a multiple of [`LINE_WEIGHTS`] or 0, there are too many channels or none, or memory is exhausted.
    pub fn pack<E: Send>(
        (rows, channels): (usize, usize),
        scale: f32,
        pool: &mut WorkerPool,
        decode_row: &DecodeRow<'_, E>,
    ) -> Result<Self, E> {
        assert!(is_whole_lines(rows) && (1..=MAX_COLS).contains(&channels), "{channels} columns of {rows}");
        let mut memory = Arena::whole(channels * rows / 4);
        let columns = SharedRows::new(&mut memory[..], rows / 4);
        // A worker writes whole columns, so each decodes all rows, as many at a time as one line holds.
        in_parallel(channels, pool, &|share| {
            let bytes = columns.claim(share.clone());
            let mut weights = vec![0; LINE_WEIGHTS * channels];
            for line in 0..rows / LINE_WEIGHTS {
                for (index, weights) in weights.chunks_exact_mut(channels).enumerate() {
                    let row = line * LINE_WEIGHTS + index;
                    decode_row(row, weights).map_err(|error| (row, error))?;
                }
                for (channel, column) in share.clone().zip(bytes.chunks_exact_mut(rows / 4)) {
                    for (b, byte) in column[line * LINE_BYTES..][..LINE_BYTES].iter_mut().enumerate() {
                        let weight = |plane: usize| weights[(64 * plane + output_of_byte(b)) * channels + channel];
                        *byte = pack_codes([weight(0), weight(1), weight(2), weight(3)]);
                    }
                }
            }
            Ok(())
        })?;
        Ok(Self { memory, rows, channels, scale })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// What the integer product is multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Bytes of the packed codes.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Every column, `rows / 4` bytes each.
    pub(super) fn codes(&self) -> &[u8] {
        &self.memory
    }
}

/// The channels whose code is not zero, and their codes, in fours; the last four may end with codes of zero.
#[derive(Debug)]
pub struct ActiveChannels {
    channels: Vec<u32>,
    codes: Vec<i8>,
    len: usize,
}

impl ActiveChannels {
    /// Room for all of `channels`.
    pub fn new(channels: usize) -> Self {
        let len = channels.next_multiple_of(4);
        Self { channels: vec![0; len], codes: vec![0; len], len: 0 }
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        size_of_val(self.channels.as_slice()) + self.codes.len()
    }

    /// Lists the codes that are not zero.
    ///
    /// # Panics
    /// When there are more codes than there is room for.
    pub fn set(&mut self, codes: &[i8]) {
        assert!(codes.len() <= self.channels.len(), "{} channels in a list of {}", codes.len(), self.channels.len());
        let mut len = 0;
        // Without a branch: every code is written and the next overwrites those that are zero.
        for (channel, &code) in codes.iter().enumerate() {
            self.channels[len] = channel as u32;
            self.codes[len] = code;
            len += usize::from(code != 0);
        }
        self.len = len.next_multiple_of(4);
        self.channels[len..self.len].fill(0);
        self.codes[len..self.len].fill(0);
    }

    /// Fours of channels with their codes.
    pub(super) fn quads(&self) -> (&[[u32; 4]], &[[i8; 4]]) {
        (self.channels[..self.len].as_chunks().0, self.codes[..self.len].as_chunks().0)
    }
}

/// The definition of [`super::TernaryKernel::gemv_channels`].
pub(super) struct MultiplyRows<'a> {
    pub(super) w: &'a ChannelRows,
    pub(super) channels: &'a [u32],
    pub(super) first: usize,
    pub(super) x: &'a QuantizedActivations<'a>,
    pub(super) out: &'a mut [f32],
}

impl FloatOp for MultiplyRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let (row_bytes, s, sum_of_codes) = (self.w.cols / 4, self.x.scales()[0], self.x.sums()[0]);
        for &channel in self.channels {
            let row = &self.w.codes()[channel as usize * row_bytes..][..row_bytes];
            let sum = dot_row(row, self.x.codes(0)) - sum_of_codes;
            self.out[channel as usize - self.first] = epilogue(sum, s, self.w.scale);
        }
    }
}

#[inline(always)]
fn dot_row(row: &[u8], x: &[i8]) -> i32 {
    let (lines, x) = (row.as_chunks::<LINE_BYTES>().0, x.as_chunks::<LINE_WEIGHTS>().0);
    let mut total = 0;
    for (lines, x) in lines.chunks(LINES_IN_I16).zip(x.chunks(LINES_IN_I16)) {
        let mut sums = [0_i16; LINE_BYTES];
        for (line, x) in lines.iter().zip(x) {
            for (plane, x) in x.as_chunks::<LINE_BYTES>().0.iter().enumerate() {
                for b in 0..LINE_BYTES {
                    sums[b] += i16::from(line[b] >> (2 * plane) & 3) * i16::from(x[b]);
                }
            }
        }
        total += sums.iter().map(|&sum| i32::from(sum)).sum::<i32>();
    }
    total
}

/// The definition of [`super::TernaryKernel::gemv_active`].
pub(super) struct MultiplyColumns<'a> {
    pub(super) w: &'a ChannelColumns,
    pub(super) active: &'a ActiveChannels,
    pub(super) lines: Range<usize>,
    pub(super) x: &'a QuantizedActivations<'a>,
    pub(super) out: &'a mut [f32],
}

impl FloatOp for MultiplyColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let (s, sum_of_codes) = (self.x.scales()[0], self.x.sums()[0]);
        let (channels, codes) = self.active.quads();
        let (channels, codes) = (channels.as_flattened(), codes.as_flattened());
        for (line, out) in self.lines.zip(self.out.as_chunks_mut::<LINE_WEIGHTS>().0) {
            let sums = sum_columns(self.w, line, channels, codes);
            for (index, sum) in sums.iter().enumerate() {
                let (plane, b) = (index / LINE_BYTES, index % LINE_BYTES);
                out[64 * plane + output_of_byte(b)] = epilogue(sum - sum_of_codes, s, self.w.scale);
            }
        }
    }
}

/// Sums of the outputs of a line, in the order of its planes and bytes.
#[inline(always)]
fn sum_columns(w: &ChannelColumns, line: usize, channels: &[u32], codes: &[i8]) -> [i32; LINE_WEIGHTS] {
    let lines = w.codes().as_chunks::<LINE_BYTES>().0;
    let lines_of_column = w.rows / LINE_WEIGHTS;
    let mut totals = [0; LINE_WEIGHTS];
    for (channels, codes) in channels.chunks(COLUMNS_IN_I16).zip(codes.chunks(COLUMNS_IN_I16)) {
        let mut sums = [0_i16; LINE_WEIGHTS];
        for (&channel, &code) in channels.iter().zip(codes) {
            let line = &lines[channel as usize * lines_of_column + line];
            for (plane, sums) in sums.as_chunks_mut::<LINE_BYTES>().0.iter_mut().enumerate() {
                for b in 0..LINE_BYTES {
                    sums[b] += i16::from(line[b] >> (2 * plane) & 3) * i16::from(code);
                }
            }
        }
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total += i32::from(sum);
        }
    }
    totals
}

/// Whether `weights` fill cache lines.
pub fn is_whole_lines(weights: usize) -> bool {
    weights > 0 && weights.is_multiple_of(LINE_WEIGHTS)
}

/// Where, among the 64 outputs of a plane, byte `b` of a column's line belongs.
const fn output_of_byte(b: usize) -> usize {
    16 * (b / 4 % 4) + 4 * (b / 16) + b % 4
}

#[inline(always)]
fn pack_codes(weights: [i8; 4]) -> u8 {
    let [a, b, c, d] = weights.map(|weight| (weight + 1).cast_unsigned());
    a | b << 2 | c << 4 | d << 6
}
