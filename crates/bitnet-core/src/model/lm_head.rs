//! The two ends of the model that are not ternary: rows of the embedding in, logits out. Both matrices stay mapped in the
//! file's encoding.

use std::ops::Range;

use super::{Model, Workspace, batch::Row, norm::RmsNorm, phases::Phases};
use crate::{
    checkpoint::{DenseEncoding, DenseMatrix},
    kernels::{
        FloatOp, Isa,
        math::{self, LANES},
        prefetch_all,
    },
    threads::{ColumnsMut, SharedColumns, SharedRows},
};

/// Rows of the head a worker takes at a time: a cache line of logits.
const VOCAB_TILE: usize = 16;
/// Rows of the head, and tokens, whose products are summed side by side: what one sum loads, the others use.
pub(super) const ROWS: usize = 4;
const TOKENS: usize = 4;

impl Model {
    /// Logits `[rows.len(), vocab_size]` of rows `rows` among those that asked for them in the last `forward`, in batch
    /// order. At most [`Workspace::MAX_LOGIT_ROWS`] at once. Values may be NaN or infinite when the weights are.
    ///
    /// # Panics
    /// When `rows` reaches beyond the rows that asked, or is longer than the maximum.
    pub fn logits<'w>(&self, rows: Range<usize>, workspace: &'w mut Workspace) -> &'w [f32] {
        assert!(workspace.fits(self) && rows.end <= workspace.num_logit_rows, "rows that asked for no logits");
        assert!(rows.len() <= Workspace::MAX_LOGIT_ROWS, "{} rows of logits at once", rows.len());
        let (head, isa) = (self.head(), self.kernel.isa());
        let hidden = &workspace.buffers.normed[rows.start * head.cols..rows.end * head.cols];
        let logits = &mut workspace.buffers.logits[..rows.len() * head.rows];
        let columns = SharedColumns::new(&mut *logits, head.rows, VOCAB_TILE);
        let decoded = SharedRows::new(&mut workspace.buffers.head_rows, ROWS * head.cols);
        workspace.pool.run(&|worker| {
            let share = worker.share(head.rows, VOCAB_TILE);
            let out = columns.claim(share.clone());
            let decoded = decoded.claim(worker.index()..worker.index() + 1);
            isa.run(Score { isa, head, rows: share, hidden, decoded, out });
        });
        logits
    }
}

/// `out[i] = head[ids[i]] . hidden`: the values [`Model::logits`] has for these tokens.
pub(super) struct ScoreTokens<'a> {
    pub(super) isa: Isa,
    pub(super) head: &'a DenseMatrix,
    pub(super) ids: &'a [u32],
    /// `[cols]`
    pub(super) hidden: &'a [f32],
    /// `[ROWS, cols]` of scratch.
    pub(super) decoded: &'a mut [f32],
    pub(super) out: &'a mut [f32],
}

impl FloatOp for ScoreTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let cols = self.head.cols;
        let groups = self.ids.chunks(ROWS).zip(self.out.chunks_mut(ROWS));
        for ((ids, out), first) in groups.zip((0..).step_by(ROWS)) {
            let decoded = &mut self.decoded[..ids.len() * cols];
            for ((&id, row), index) in ids.iter().zip(decoded.chunks_exact_mut(cols)).zip(first..) {
                // Rows lie anywhere.
                if let Some(&next) = self.ids.get(index + ROWS) {
                    prefetch_all(self.head.row_bytes(next as usize));
                }
                decode_row(self.isa, self.head, id as usize, row);
            }
            dot_rows(decoded, self.hidden, cols, (0, &mut ColumnsMut::new(out, ids.len())));
        }
    }
}

/// Row `row` of `head`, at the speed of the instruction set where the encoding is plain floats.
#[inline(always)]
fn decode_row(isa: Isa, head: &DenseMatrix, row: usize, out: &mut [f32]) {
    let bytes = head.row_bytes(row);
    match head.encoding {
        DenseEncoding::F32 => decode_floats(bytes.as_chunks().0, f32_from_le_bytes, out),
        DenseEncoding::F16 => decode_halves(isa, bytes.as_chunks().0, out),
        DenseEncoding::Bf16 => decode_floats(bytes.as_chunks().0, bf16_from_le_bytes, out),
        DenseEncoding::Q8_0 | DenseEncoding::Q6K | DenseEncoding::Q4_0 => head.decode_row(row, out),
    }
}

#[inline(always)]
fn decode_floats<const BYTES: usize>(stored: &[[u8; BYTES]], widen: impl Fn([u8; BYTES]) -> f32, out: &mut [f32]) {
    for (out, stored) in out.iter_mut().zip(stored) {
        *out = widen(*stored);
    }
}

/// By the instruction for it, which takes memory to memory.
#[inline(always)]
fn decode_halves(isa: Isa, halves: &[[u8; 2]], out: &mut [f32]) {
    let whole_runs = if cfg!(target_endian = "little") { halves.len() / LANES * LANES } else { 0 };
    let (runs, rest) = out.split_at_mut(whole_runs);
    isa.widen_f16(halves[..whole_runs].as_chunks().0, runs.as_chunks_mut().0);
    decode_floats(&halves[whole_runs..], f16_from_le_bytes, rest);
}

/// `x[row] = embedding[token]`
pub(super) fn embed(phases: &mut Phases<'_>, embedding: &DenseMatrix, rows: &[Row], x: &mut [f32]) {
    let x = SharedRows::new(x, embedding.cols);
    phases.over_rows(&|range| {
        let out = x.claim(range.clone()).chunks_exact_mut(embedding.cols);
        rows[range].iter().zip(out).for_each(|(row, out)| embedding.decode_row(row.token.index(), out));
    });
}

/// The final hidden states of the rows `logit_rows` of `x`, one after the other into `hidden`.
pub(super) fn final_norm(isa: Isa, norm: RmsNorm<'_>, logit_rows: &[usize], x: &[f32], hidden: &mut [f32]) {
    isa.run(FinalNorm { norm, logit_rows, x, hidden });
}

struct FinalNorm<'a> {
    norm: RmsNorm<'a>,
    logit_rows: &'a [usize],
    x: &'a [f32],
    hidden: &'a mut [f32],
}

impl FloatOp for FinalNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let width = self.norm.weight.len();
        for (&row, out) in self.logit_rows.iter().zip(self.hidden.chunks_exact_mut(width)) {
            self.norm.apply(&self.x[row * width..][..width], out);
        }
    }
}

/// `out[i][row] = head[row] . hidden[i]` for a worker's rows of the head.
struct Score<'a> {
    isa: Isa,
    head: &'a DenseMatrix,
    rows: Range<usize>,
    /// `[num_logit_rows, cols]`
    hidden: &'a [f32],
    /// `[ROWS, cols]`
    decoded: &'a mut [f32],
    out: ColumnsMut<'a>,
}

impl FloatOp for Score<'_> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        let cols = self.head.cols;
        let num_rows = self.rows.len();
        for column in (0..num_rows).step_by(ROWS) {
            let decoded = &mut self.decoded[..ROWS.min(num_rows - column) * cols];
            for (row, index) in decoded.chunks_exact_mut(cols).zip(self.rows.start + column..) {
                decode_row(self.isa, self.head, index, row);
            }
            dot_rows(decoded, self.hidden, cols, (column, &mut self.out));
        }
    }
}

/// `out[token][column + r] = rows[r] . hidden[token]` of at most [`ROWS`] rows. `rows: [_, cols]`, `hidden: [num_tokens, cols]`
#[inline(always)]
fn dot_rows(rows: &[f32], hidden: &[f32], cols: usize, (column, out): (usize, &mut ColumnsMut<'_>)) {
    if rows.len() == ROWS * cols {
        dot_tokens::<ROWS>(rows, hidden, cols, (column, out));
        return;
    }
    for (row, column) in rows.chunks_exact(cols).zip(column..) {
        dot_tokens::<1>(row, hidden, cols, (column, out));
    }
}

/// [`dot_rows`] of `R` rows.
#[inline(always)]
fn dot_tokens<const R: usize>(rows: &[f32], hidden: &[f32], cols: usize, (column, out): (usize, &mut ColumnsMut<'_>)) {
    for (tokens, first) in hidden.chunks(TOKENS * cols).zip((0..).step_by(TOKENS)) {
        let mut tile = [[0.0; R]; TOKENS];
        match tokens.len() / cols {
            1 => dot_tile::<R, 1>(rows, tokens, cols, &mut tile),
            2 => dot_tile::<R, 2>(rows, tokens, cols, &mut tile),
            3 => dot_tile::<R, 3>(rows, tokens, cols, &mut tile),
            _ => dot_tile::<R, TOKENS>(rows, tokens, cols, &mut tile),
        }
        for (token, dots) in (first..out.num_rows()).zip(tile) {
            out.row_mut(token)[column..column + R].copy_from_slice(&dots);
        }
    }
}

/// `out[t][r] = rows[r] . tokens[t]`, each in 16 lanes of fused multiply-adds and the tree.
#[inline(always)]
fn dot_tile<const R: usize, const T: usize>(rows: &[f32], tokens: &[f32], cols: usize, out: &mut [[f32; R]]) {
    let rows: [_; R] = std::array::from_fn(|r| rows[r * cols..][..cols].as_chunks::<LANES>());
    let tokens: [_; T] = std::array::from_fn(|t| tokens[t * cols..][..cols].as_chunks::<LANES>());
    let mut sums = [[[0.0; LANES]; R]; T];
    for step in 0..cols / LANES {
        for r in 0..R {
            for t in 0..T {
                sums[t][r] = multiply_add(sums[t][r], &rows[r].0[step], &tokens[t].0[step]);
            }
        }
    }
    for t in 0..T {
        for r in 0..R {
            out[t][r] = math::lane_tree(&multiply_add_tail(sums[t][r], rows[r].1, tokens[t].1));
        }
    }
}

/// `sums + weights * x`, fused, lane by lane.
#[inline(always)]
fn multiply_add(mut sums: [f32; LANES], weights: &[f32; LANES], x: &[f32; LANES]) -> [f32; LANES] {
    for lane in 0..LANES {
        sums[lane] = weights[lane].mul_add(x[lane], sums[lane]);
    }
    sums
}

/// [`multiply_add`] of the last, shorter step.
#[inline(always)]
fn multiply_add_tail(mut sums: [f32; LANES], weights: &[f32], x: &[f32]) -> [f32; LANES] {
    for ((sum, weight), x) in sums.iter_mut().zip(weights).zip(x) {
        *sum = weight.mul_add(*x, *sum);
    }
    sums
}

// Functions, not closures: only they can be told to be inlined into the code compiled for the instruction set.

#[inline(always)]
fn f32_from_le_bytes(bytes: [u8; 4]) -> f32 {
    f32::from_le_bytes(bytes)
}

#[inline(always)]
fn f16_from_le_bytes(bytes: [u8; 2]) -> f32 {
    math::f16_to_f32(u16::from_le_bytes(bytes))
}

#[inline(always)]
fn bf16_from_le_bytes(bytes: [u8; 2]) -> f32 {
    math::bf16_to_f32(u16::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_side_by_side_give_the_bits_of_one_alone() {
        for len in [1, 15, 16, 48, 70] {
            let values =
                |seed: usize, len: usize| (0..len).map(move |i| ((i * 37 + seed * 11) % 19) as f32 / 7.0 - 1.3);
            let (rows, hidden): (Vec<_>, Vec<_>) = (values(3, 7 * len).collect(), values(9, 6 * len).collect());
            let mut out = [0.0; 6 * 7];
            for (tile, first) in rows.chunks(ROWS * len).zip([0, ROWS]) {
                dot_rows(tile, &hidden, len, (first, &mut ColumnsMut::new(&mut out, 7)));
            }
            for (x, out) in hidden.chunks_exact(len).zip(out.chunks_exact(7)) {
                for (row, out) in rows.chunks_exact(len).zip(out) {
                    assert_eq!(out.to_bits(), math::dot_16(row, x).to_bits());
                }
            }
        }
    }

    #[test]
    fn stored_floats_are_little_endian() {
        assert_eq!(f32_from_le_bytes([0, 0, 0xc0, 0x3f]), 1.5);
        assert_eq!(f16_from_le_bytes([0, 0x3e]), 1.5);
        assert_eq!(bf16_from_le_bytes([0xc0, 0x3f]), 1.5);
    }
}
