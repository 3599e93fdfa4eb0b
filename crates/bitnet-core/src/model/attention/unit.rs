//! One unit of work: a few rows of one sequence times the query heads that share one K/V head, whole or partition by
//! partition.

use std::ops::Range;

use super::{
    PARTITION, QuerySpan,
    tile::{self, WIDE, add_values, by_queries, max_queries, score},
};
use crate::{
    ids::BlockId,
    kernels::{
        FloatOp, Isa,
        math::{self, LANES},
    },
    kv_cache::{BLOCK_TOKENS, KvCache, KvTile},
    threads::SharedRows,
};

/// Positions whose values are decoded together: long runs of additions to sums in registers, in half a first-level cache.
const VALUE_TILE: usize = 64;
/// How many blocks ahead keys and values are asked for: those of one sequence are too far apart for the hardware to guess.
const AHEAD_BLOCKS: usize = 4;

/// Width of a head in scratch memory.
pub(super) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// Values of scratch memory for a unit of `max_queries`.
pub(super) fn scratch_len(max_queries: usize, head_dim: usize) -> usize {
    tile_len(head_dim) + max_queries * (PARTITION + 2 * padded(head_dim) + 2 * 2)
}

/// Decoded values of [`VALUE_TILE`] positions, or keys of fewer.
fn tile_len(head_dim: usize) -> usize {
    VALUE_TILE * padded(head_dim)
}

/// A few rows of one sequence times the query heads that share one K/V head. A query is (row, query head), rows outermost.
pub(super) struct Unit<'a> {
    /// What the code below is compiled for.
    pub(super) isa: Isa,
    pub(super) kv: &'a KvCache,
    pub(super) layer: usize,
    pub(super) head: usize,
    pub(super) head_dim: usize,
    /// Query heads per K/V head.
    pub(super) group: usize,
    pub(super) blocks: &'a [BlockId],
    pub(super) span: &'a QuerySpan,
    /// `[num_rows, num_heads, head_dim]` of the whole step.
    pub(super) q: &'a [f32],
}

/// Scratch memory of one unit.
struct Scratch<'a> {
    /// Decoded keys or values.
    tile: &'a mut [f32],
    /// `[num_queries, PARTITION]`
    scores: &'a mut [f32],
    /// The running sums, and those of the current partition: `[num_queries, padded head_dim]`.
    total: &'a mut [f32],
    partial: &'a mut [f32],
    /// The same of maximum and sum of weights: `[num_queries, 2]`.
    total_softmax: &'a mut [[f32; 2]],
    partial_softmax: &'a mut [[f32; 2]],
}

impl<'a> Scratch<'a> {
    /// Over `memory`, with the running sums at their start.
    fn new(memory: &'a mut [f32], unit: &Unit<'_>) -> Self {
        let (num_queries, padded) = (unit.num_queries(), padded(unit.head_dim));
        let (tile, rest) = memory.split_at_mut(tile_len(unit.head_dim));
        let (scores, rest) = rest.split_at_mut(num_queries * PARTITION);
        let (total, rest) = rest.split_at_mut(num_queries * padded);
        let (partial, rest) = rest.split_at_mut(num_queries * padded);
        let (total_softmax, rest) = rest.as_chunks_mut().0.split_at_mut(num_queries);
        total.fill(0.0);
        total_softmax.fill([f32::NEG_INFINITY, 0.0]);
        Self { tile, scores, total, partial, total_softmax, partial_softmax: &mut rest[..num_queries] }
    }
}

impl Unit<'_> {
    /// The whole unit, to its end.
    pub(super) fn attend(&self, out: &SharedRows<'_, f32>, scratch: &mut [f32]) {
        let mut scratch = Scratch::new(scratch, self);
        for start in (0..self.end()).step_by(PARTITION) {
            self.attend_partition(start, &mut scratch);
            self.isa.run(Combine { unit: self, start, scratch: &mut scratch });
        }
        self.isa.run(Finish { unit: self, scratch: &scratch, out });
    }

    /// One partition, of a unit that is cut between workers: its sums are kept for [`Unit::combine_kept`].
    pub(super) fn attend_and_keep(&self, partition: usize, kept: &mut [f32], scratch: &mut [f32]) {
        let mut scratch = Scratch::new(scratch, self);
        self.attend_partition(partition * PARTITION, &mut scratch);
        let (sums, softmax) = kept.split_at_mut(scratch.partial.len());
        sums.copy_from_slice(scratch.partial);
        softmax.as_chunks_mut().0[..self.num_queries()].copy_from_slice(scratch.partial_softmax);
    }

    /// The end of [`Unit::attend`] for a unit whose partitions were kept: `kept: [num_partitions, partial_len]`.
    pub(super) fn combine_kept(
        &self,
        kept: &[f32],
        partial_len: usize,
        out: &SharedRows<'_, f32>,
        scratch: &mut [f32],
    ) {
        let mut scratch = Scratch::new(scratch, self);
        for (kept, start) in kept.chunks_exact(partial_len).zip((0..).step_by(PARTITION)) {
            let (sums, softmax) = kept.split_at(scratch.partial.len());
            scratch.partial.copy_from_slice(sums);
            scratch.partial_softmax.copy_from_slice(&softmax.as_chunks().0[..self.num_queries()]);
            self.isa.run(Combine { unit: self, start, scratch: &mut scratch });
        }
        self.isa.run(Finish { unit: self, scratch: &scratch, out });
    }

    /// Maximum, sum of weights and weighted values of the partition at `start`.
    fn attend_partition(&self, start: usize, scratch: &mut Scratch<'_>) {
        // Each compiled by itself: in one function they would compete for registers.
        if self.isa.is_wide() {
            self.isa.run(Score::<WIDE> { unit: self, start, scratch });
            self.isa.run(Softmax { unit: self, start, scratch });
            self.isa.run(Weigh::<WIDE> { unit: self, start, scratch });
        } else {
            self.isa.run(Score::<LANES> { unit: self, start, scratch });
            self.isa.run(Softmax { unit: self, start, scratch });
            self.isa.run(Weigh::<LANES> { unit: self, start, scratch });
        }
    }

    fn num_queries(&self) -> usize {
        self.span.rows.len() * self.group
    }

    /// One past the last position any query sees.
    fn end(&self) -> usize {
        self.span.start + self.span.rows.len()
    }

    /// Positions of `first..` that `query` sees.
    #[inline(always)]
    fn num_visible(&self, query: usize, first: usize) -> usize {
        (self.span.start + query / self.group + 1).saturating_sub(first)
    }

    /// The queries that see position `position`: all from some row on.
    #[inline(always)]
    fn queries_from(&self, position: usize) -> Range<usize> {
        position.saturating_sub(self.span.start) * self.group..self.num_queries()
    }

    /// `[head_dim]`
    #[inline(always)]
    fn query(&self, query: usize) -> &[f32] {
        let width = self.kv.geometry().num_kv_heads * self.group * self.head_dim;
        let row = self.span.rows.start + query / self.group;
        &self.q[row * width + (self.head * self.group + query % self.group) * self.head_dim..][..self.head_dim]
    }

    /// Indices of the visible blocks of the partition at `start`.
    #[inline(always)]
    fn visible_blocks(&self, start: usize) -> Range<usize> {
        start / BLOCK_TOKENS..self.end().min(start + PARTITION).div_ceil(BLOCK_TOKENS)
    }

    #[inline(always)]
    fn keys(&self, index: usize) -> KvTile<'_> {
        self.kv.keys(self.blocks[index], self.layer, self.head)
    }

    #[inline(always)]
    fn values(&self, index: usize) -> KvTile<'_> {
        self.kv.values(self.blocks[index], self.layer, self.head)
    }

    /// Scores of the partition at `start`: `scores[query][position - start]`, computed in tiles of `W` positions.
    #[inline(always)]
    fn score<const W: usize>(&self, start: usize, scratch: &mut Scratch<'_>) {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let blocks = self.visible_blocks(start);
        let keys = &mut scratch.tile[..self.head_dim * W];
        for first in blocks.clone().step_by(W / BLOCK_TOKENS) {
            // Without a second block its columns are scored as they are, and never used.
            for (column, index) in (first..blocks.end.min(first + W / BLOCK_TOKENS)).enumerate() {
                self.prefetch_after_keys(index, &blocks);
                self.keys(index).decode(self.isa, &mut keys[column * BLOCK_TOKENS..], W);
            }
            let offset = first * BLOCK_TOKENS - start;
            let Range { start: from, end } = self.queries_from(first * BLOCK_TOKENS);
            for query in (from..end).step_by(max_queries::<W>()) {
                let num_queries = (end - query).min(max_queries::<W>());
                let mut queries = [&[][..]; max_queries::<WIDE>()];
                for (i, row) in queries[..num_queries].iter_mut().enumerate() {
                    *row = self.query(query + i);
                }
                let scores = &mut scratch.scores[query * PARTITION + offset..];
                by_queries!(num_queries, score::<N, W>(&queries, keys, scale, scores));
            }
        }
    }

    /// Scores -> weights, with their maximum and sum.
    #[inline(always)]
    fn softmax(&self, start: usize, scratch: &mut Scratch<'_>) {
        for query in self.queries_from(start) {
            let scores = &mut scratch.scores[query * PARTITION..][..PARTITION];
            scratch.partial_softmax[query] = tile::softmax(scores, self.num_visible(query, start).min(PARTITION));
        }
    }

    /// `partial[query] = sum of weight * V` over the partition's visible positions, computed in tiles of `W` columns.
    #[inline(always)]
    fn weigh<const W: usize>(&self, start: usize, scratch: &mut Scratch<'_>) {
        let padded = padded(self.head_dim);
        let blocks = self.visible_blocks(start);
        scratch.partial.fill(0.0);
        for first in blocks.clone().step_by(VALUE_TILE / BLOCK_TOKENS) {
            let indices = first..blocks.end.min(first + VALUE_TILE / BLOCK_TOKENS);
            for (index, values) in indices.zip(scratch.tile.chunks_exact_mut(BLOCK_TOKENS * padded)) {
                self.prefetch_after_values(index, &blocks);
                self.values(index).decode(self.isa, values, LANES);
            }
            let Range { start: from, end } = self.queries_from(first * BLOCK_TOKENS);
            for query in (from..end).step_by(max_queries::<W>()) {
                let queries = query..end.min(query + max_queries::<W>());
                // What all of them see, then what only the later ones do.
                let num_shared = self.num_visible(query, first * BLOCK_TOKENS).min(VALUE_TILE);
                let offset = first * BLOCK_TOKENS - start;
                self.add_values::<W>(queries.clone(), offset, 0..num_shared, scratch);
                for query in queries {
                    let num_own = self.num_visible(query, first * BLOCK_TOKENS).min(VALUE_TILE);
                    if num_own > num_shared {
                        self.add_values::<W>(query..query + 1, offset, num_shared..num_own, scratch);
                    }
                }
            }
        }
    }

    /// `partial[queries] += weights * values` for `positions` of the tile, which begins at `offset` of the partition.
    #[inline(always)]
    fn add_values<const W: usize>(
        &self,
        queries: Range<usize>,
        offset: usize,
        positions: Range<usize>,
        scratch: &mut Scratch<'_>,
    ) {
        let stride = padded(self.head_dim);
        let weights = &scratch.scores[queries.start * PARTITION + offset + positions.start..];
        let values = &scratch.tile[positions.start * stride..];
        let acc = &mut scratch.partial[queries.start * stride..];
        let whole_tiles = stride - stride % W;
        for column in (0..whole_tiles).step_by(W) {
            let (values, acc) = (&values[column..], &mut acc[column..]);
            by_queries!(queries.len(), add_values::<N, W>(weights, positions.len(), values, stride, acc));
        }
        for column in (whole_tiles..stride).step_by(LANES) {
            let (values, acc) = (&values[column..], &mut acc[column..]);
            by_queries!(queries.len(), add_values::<N, LANES>(weights, positions.len(), values, stride, acc));
        }
    }

    /// Adds the partition at `start` to the running sums.
    #[inline(always)]
    fn combine(&self, start: usize, scratch: &mut Scratch<'_>) {
        let padded = padded(self.head_dim);
        for query in self.queries_from(start) {
            let [max, sum] = scratch.total_softmax[query];
            let [partial_max, partial_sum] = scratch.partial_softmax[query];
            let new_max = max.max(partial_max);
            let (a, b) = (math::exp(max - new_max), math::exp(partial_max - new_max));
            scratch.total_softmax[query] = [new_max, sum * a + partial_sum * b];
            let total = &mut scratch.total[query * padded..][..padded];
            for (total, partial) in total.iter_mut().zip(&scratch.partial[query * padded..][..padded]) {
                *total = *total * a + partial * b;
            }
        }
    }

    #[inline(always)]
    fn finish(&self, scratch: &Scratch<'_>, out: &SharedRows<'_, f32>) {
        let padded = padded(self.head_dim);
        let num_kv_heads = self.kv.geometry().num_kv_heads;
        for (index, row) in self.span.rows.clone().enumerate() {
            let cell = row * num_kv_heads + self.head;
            for (i, out) in out.claim(cell..cell + 1).chunks_exact_mut(self.head_dim).enumerate() {
                let query = index * self.group + i;
                let sum = scratch.total_softmax[query][1];
                for (out, total) in out.iter_mut().zip(&scratch.total[query * padded..]) {
                    *out = total / sum;
                }
            }
        }
    }

    /// Asks for what is decoded [`AHEAD_BLOCKS`] after the keys of block `index`, of a partition of `blocks`.
    #[inline(always)]
    fn prefetch_after_keys(&self, index: usize, blocks: &Range<usize>) {
        let ahead = index + AHEAD_BLOCKS;
        if ahead < blocks.end {
            self.keys(ahead).prefetch();
        } else if blocks.start + ahead - blocks.end < blocks.end {
            self.values(blocks.start + ahead - blocks.end).prefetch();
        }
    }

    /// As [`Self::prefetch_after_keys`] after the values of block `index`: the next keys are those of the next partition.
    #[inline(always)]
    fn prefetch_after_values(&self, index: usize, blocks: &Range<usize>) {
        let ahead = index + AHEAD_BLOCKS;
        if ahead < blocks.end {
            self.values(ahead).prefetch();
        } else if ahead * BLOCK_TOKENS < self.end() {
            self.keys(ahead).prefetch();
        }
    }
}

/// Scores of the partition at `start`.
struct Score<'a, 's, const W: usize> {
    unit: &'a Unit<'a>,
    start: usize,
    scratch: &'a mut Scratch<'s>,
}

impl<const W: usize> FloatOp for Score<'_, '_, W> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.unit.score::<W>(self.start, self.scratch);
    }
}

/// Its scores -> weights.
struct Softmax<'a, 's> {
    unit: &'a Unit<'a>,
    start: usize,
    scratch: &'a mut Scratch<'s>,
}

impl FloatOp for Softmax<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.unit.softmax(self.start, self.scratch);
    }
}

/// Its weighted values.
struct Weigh<'a, 's, const W: usize> {
    unit: &'a Unit<'a>,
    start: usize,
    scratch: &'a mut Scratch<'s>,
}

impl<const W: usize> FloatOp for Weigh<'_, '_, W> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.unit.weigh::<W>(self.start, self.scratch);
    }
}

/// Its sums added to the running ones.
struct Combine<'a, 's> {
    unit: &'a Unit<'a>,
    start: usize,
    scratch: &'a mut Scratch<'s>,
}

impl FloatOp for Combine<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.unit.combine(self.start, self.scratch);
    }
}

/// The running sums -> the result.
struct Finish<'a, 's> {
    unit: &'a Unit<'a>,
    scratch: &'a Scratch<'s>,
    out: &'a SharedRows<'a, f32>,
}

impl FloatOp for Finish<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.unit.finish(self.scratch, self.out);
    }
}
