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
    /// Rows of plain floats: widened in registers for one token, once into `decoded` for several.
    #[inline(always)]
    fn score<const BYTES: usize>(mut self, widen: impl Fn([u8; BYTES]) -> f32 + Copy) {
        let cols = self.head.cols;
        let data = self.head.data.bytes().as_chunks::<BYTES>().0;
        let single = self.hidden.len() == cols;
        for (i, row) in self.rows.clone().enumerate() {
            let row = &data[row * cols..][..cols];
            if single {
                self.out.row_mut(0)[i] = dots([self.hidden], row, widen)[0];
            } else {
                for (out, bytes) in self.decoded.iter_mut().zip(row) {
                    *out = widen(*bytes);
                }
                self.score_row(i);
            }
        }
    }

    #[inline(always)]
    fn score_decoded(mut self) {
        for (i, row) in self.rows.clone().enumerate() {
            self.head.decode_row(row, self.decoded);
            self.score_row(i);
        }
    }

    /// Column `i` of the window: the row in `decoded`, four tokens at a time.
    #[inline(always)]
    fn score_row(&mut self, i: usize) {
        let cols = self.head.cols;
        let (tiles, rest) = self.hidden.split_at(self.hidden.len() / (4 * cols) * 4 * cols);
        let mut token = 0;
        for tile in tiles.chunks_exact(4 * cols) {
            let four = std::array::from_fn::<_, 4, _>(|n| &tile[n * cols..][..cols]);
            for logit in dots(four, self.decoded, unchanged) {
                self.out.row_mut(token)[i] = logit;
                token += 1;
            }
        }
        for one in rest.chunks_exact(cols) {
            self.out.row_mut(token)[i] = dots([one], self.decoded, unchanged)[0];
            token += 1;
        }
    }
}

/// `row . x` for `N` vectors at once, each in 16 lanes of fused multiply-adds and the tree.
#[inline(always)]
fn dots<W: Copy, const N: usize>(vectors: [&[f32]; N], row: &[W], widen: impl Fn(W) -> f32 + Copy) -> [f32; N] {
    let mut lanes = [[0.0f32; LANES]; N];
    let (steps, tail) = row.as_chunks::<LANES>();
    let vectors = vectors.map(|x| x[..row.len()].as_chunks::<LANES>());
    for (i, step) in steps.iter().enumerate() {
        for lane in 0..LANES {
            let weight = widen(step[lane]);
            for n in 0..N {
                lanes[n][lane] = weight.mul_add(vectors[n].0[i][lane], lanes[n][lane]);
            }
        }
    }
    for (lane, &weight) in tail.iter().enumerate() {
        for n in 0..N {
            lanes[n][lane] = widen(weight).mul_add(vectors[n].1[lane], lanes[n][lane]);
        }
    }
    let mut sums = [0.0; N];
    for n in 0..N {
        sums[n] = math::lane_tree(&lanes[n]);
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
    fn vectors_side_by_side_give_the_bits_of_one_alone() {
        for len in [1, 15, 16, 48, 70] {
            let vector =
                |seed: usize| (0..len).map(|i| ((i * 37 + seed * 11) % 19) as f32 / 7.0 - 1.3).collect::<Vec<_>>();
            let (row, vectors) = (vector(9), [vector(0), vector(1), vector(2), vector(3)]);
            let together = dots(std::array::from_fn::<_, 4, _>(|n| &vectors[n][..]), &row, unchanged);
            for (vector, sum) in vectors.iter().zip(together) {
                assert_eq!(sum.to_bits(), math::dot_16(&row, vector).to_bits());
            }
        }
    }
}
