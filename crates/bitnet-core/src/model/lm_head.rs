//! The two ends of the model that are not ternary: rows of the embedding in, logits out. Both matrices stay mapped in the
//! file's encoding.

use std::ops::Range;

use super::{Model, Workspace, batch::Row, norm::RmsNorm, phases::Phases};
use crate::{
    checkpoint::{DenseEncoding, DenseMatrix},
    kernels::{
        FloatOp, Isa,
        math::{self, LANES},
    },
    threads::{ColumnsMut, SharedColumns, SharedRows},
};

/// Rows of the head a worker takes at a time: a cache line of logits.
const VOCAB_TILE: usize = 16;

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
        let decoded = SharedRows::new(&mut workspace.buffers.head_row, head.cols);
        workspace.pool.run(&|worker| {
            let share = worker.share(head.rows, VOCAB_TILE);
            let out = columns.claim(share.clone());
            let decoded = decoded.claim(worker.index()..worker.index() + 1);
            isa.run(Score { head, rows: share, hidden, decoded, out });
        });
        logits
    }
}

/// `out[i] = head[ids[i]] . hidden`: the values [`Model::logits`] has for these tokens. `decoded`: `[cols]` of scratch.
pub(super) struct ScoreTokens<'a> {
    pub(super) head: &'a DenseMatrix,
    pub(super) ids: &'a [u32],
    /// `[cols]`
    pub(super) hidden: &'a [f32],
    pub(super) decoded: &'a mut [f32],
    pub(super) out: &'a mut [f32],
}

impl FloatOp for ScoreTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        match self.head.encoding {
            DenseEncoding::F32 => self.score(f32_from_le_bytes),
            DenseEncoding::F16 => self.score(f16_from_le_bytes),
            DenseEncoding::Bf16 => self.score(bf16_from_le_bytes),
            DenseEncoding::Q8_0 | DenseEncoding::Q6K | DenseEncoding::Q4_0 => {
                for (&id, out) in self.ids.iter().zip(self.out) {
                    self.head.decode_row(id as usize, self.decoded);
                    *out = dot_one(self.decoded, self.hidden, unchanged);
                }
            }
        }
    }
}

impl ScoreTokens<'_> {
    #[inline(always)]
    fn score<const BYTES: usize>(self, widen: impl Fn([u8; BYTES]) -> f32 + Copy) {
        let (data, cols) = (self.head.data.bytes().as_chunks::<BYTES>().0, self.head.cols);
        for (&id, out) in self.ids.iter().zip(self.out) {
            *out = dot_one(&data[id as usize * cols..][..cols], self.hidden, widen);
        }
    }
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
    head: &'a DenseMatrix,
    rows: Range<usize>,
    /// `[num_logit_rows, cols]`
    hidden: &'a [f32],
    /// `[cols]`
    decoded: &'a mut [f32],
    out: ColumnsMut<'a>,
}

impl FloatOp for Score<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        match self.head.encoding {
            DenseEncoding::F32 => self.score(f32_from_le_bytes),
            DenseEncoding::F16 => self.score(f16_from_le_bytes),
            DenseEncoding::Bf16 => self.score(bf16_from_le_bytes),
            DenseEncoding::Q8_0 | DenseEncoding::Q6K | DenseEncoding::Q4_0 => self.score_decoded(),
        }
    }
}

impl Score<'_> {
    /// Rows of plain floats: for one token four at a time, widened in registers; for several tokens each is decoded once.
    #[inline(always)]
    fn score<const BYTES: usize>(mut self, widen: impl Fn([u8; BYTES]) -> f32 + Copy) {
        let cols = self.head.cols;
        let data = &self.head.data.bytes().as_chunks::<BYTES>().0[self.rows.start * cols..self.rows.end * cols];
        if self.hidden.len() == cols {
            dot_all(data, self.hidden, widen, self.out.row_mut(0));
            return;
        }
        for (i, row) in data.chunks_exact(cols).enumerate() {
            for (out, bytes) in self.decoded.iter_mut().zip(row) {
                *out = widen(*bytes);
            }
            self.score_decoded_row(i);
        }
    }

    #[inline(always)]
    fn score_decoded(mut self) {
        for (i, row) in self.rows.clone().enumerate() {
            self.head.decode_row(row, self.decoded);
            self.score_decoded_row(i);
        }
    }

    /// Column `i` of the window: the row in `decoded` with every token.
    #[inline(always)]
    fn score_decoded_row(&mut self, i: usize) {
        let mut logits = [0.0; Workspace::MAX_LOGIT_ROWS];
        let logits = &mut logits[..self.out.num_rows()];
        dot_all(self.hidden, self.decoded, unchanged, logits);
        for (token, logit) in logits.iter().enumerate() {
            self.out.row_mut(token)[i] = *logit;
        }
    }
}

/// `out[i] = rows[i] . x`, four rows side by side. `rows: [out.len(), x.len()]`
#[inline(always)]
fn dot_all<W: Copy>(rows: &[W], x: &[f32], widen: impl Fn(W) -> f32 + Copy, out: &mut [f32]) {
    let (out_tiles, out_rest) = out.as_chunks_mut::<4>();
    let (tiles, rest) = rows.split_at(out_tiles.len() * 4 * x.len());
    for (out, tile) in out_tiles.iter_mut().zip(tiles.chunks_exact(4 * x.len())) {
        *out = dot_four(tile, x, widen);
    }
    for (out, row) in out_rest.iter_mut().zip(rest.chunks_exact(x.len())) {
        *out = dot_one(row, x, widen);
    }
}

/// `row . x` in 16 lanes of fused multiply-adds and the tree.
#[inline(always)]
fn dot_one<W: Copy>(row: &[W], x: &[f32], widen: impl Fn(W) -> f32 + Copy) -> f32 {
    let (row, row_tail) = row.as_chunks::<LANES>();
    let (x, x_tail) = x.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (row, x) in row.iter().zip(x) {
        sums = multiply_add(sums, row, x, widen);
    }
    math::lane_tree(&multiply_add_tail(sums, row_tail, x_tail, widen))
}

/// [`dot_one`] of four rows: the same sums, four chains of additions at once.
#[inline(always)]
fn dot_four<W: Copy>(rows: &[W], x: &[f32], widen: impl Fn(W) -> f32 + Copy) -> [f32; 4] {
    let (a, rest) = rows.split_at(x.len());
    let (b, rest) = rest.split_at(x.len());
    let (c, d) = rest.split_at(x.len());
    let [(a, a_tail), (b, b_tail), (c, c_tail), (d, d_tail)] =
        [a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>(), d.as_chunks::<LANES>()];
    let (x, x_tail) = x.as_chunks::<LANES>();
    let mut sums = [[0.0; LANES]; 4];
    for ((((x, a), b), c), d) in x.iter().zip(a).zip(b).zip(c).zip(d) {
        sums = [
            multiply_add(sums[0], a, x, widen),
            multiply_add(sums[1], b, x, widen),
            multiply_add(sums[2], c, x, widen),
            multiply_add(sums[3], d, x, widen),
        ];
    }
    [
        math::lane_tree(&multiply_add_tail(sums[0], a_tail, x_tail, widen)),
        math::lane_tree(&multiply_add_tail(sums[1], b_tail, x_tail, widen)),
        math::lane_tree(&multiply_add_tail(sums[2], c_tail, x_tail, widen)),
        math::lane_tree(&multiply_add_tail(sums[3], d_tail, x_tail, widen)),
    ]
}

/// `sums + weights * x`, fused, lane by lane.
#[inline(always)]
fn multiply_add<W: Copy>(
    mut sums: [f32; LANES],
    weights: &[W; LANES],
    x: &[f32; LANES],
    widen: impl Fn(W) -> f32,
) -> [f32; LANES] {
    for lane in 0..LANES {
        sums[lane] = widen(weights[lane]).mul_add(x[lane], sums[lane]);
    }
    sums
}

/// [`multiply_add`] of the last, shorter step.
#[inline(always)]
fn multiply_add_tail<W: Copy>(
    mut sums: [f32; LANES],
    weights: &[W],
    x: &[f32],
    widen: impl Fn(W) -> f32,
) -> [f32; LANES] {
    for ((sum, weight), x) in sums.iter_mut().zip(weights).zip(x) {
        *sum = widen(*weight).mul_add(*x, *sum);
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

#[inline(always)]
fn unchanged(value: f32) -> f32 {
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_side_by_side_give_the_bits_of_one_alone() {
        for len in [1, 15, 16, 48, 70] {
            let values =
                |seed: usize, len: usize| (0..len).map(move |i| ((i * 37 + seed * 11) % 19) as f32 / 7.0 - 1.3);
            let (rows, x): (Vec<_>, Vec<_>) = (values(3, 7 * len).collect(), values(9, len).collect());
            let mut out = [0.0; 7];
            dot_all(&rows, &x, unchanged, &mut out);
            for (row, out) in rows.chunks_exact(len).zip(out) {
                assert_eq!(out.to_bits(), math::dot_16(row, &x).to_bits());
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
