//! One unit of work: a few rows of one sequence times the query heads that share one K/V head, whole or partition by
//! partition.

use std::ops::Range;

use super::{
    PARTITION, QuerySpan,
    tile::{self, Halves, MAX_QUERIES, Rows, Vectors, WIDE, add_values, by_queries, score, transpose},
};
use crate::{
    ids::BlockId,
    kernels::{
        FloatOp, Isa, RUN, Widen, WideningOp,
        math::{self, LANES},
    },
    kv_cache::{BLOCK_TOKENS, KvCache, KvDtype, KvTile},
    threads::SharedRows,
};

/// Vectors of 16 values that are decoded together, of some columns of as many positions as there is room for: long runs of
/// additions to sums in registers, of columns that stay in the first-level cache.
const VALUE_TILE: usize = 256;
/// How many blocks ahead keys and values are asked for: those of one sequence are too far apart for the hardware to guess.
const AHEAD_BLOCKS: usize = 4;

/// Width of a head in scratch memory.
pub(super) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// Values of scratch memory for a unit of `max_queries`.
pub(super) fn scratch_len(max_queries: usize, head_dim: usize) -> usize {
    tile_len(head_dim) + max_queries * (PARTITION + 2 * padded(head_dim) + head_dim + 2 * 2)
}

/// Decoded keys of [`WIDE`] blocks, or values.
fn tile_len(head_dim: usize) -> usize {
    (head_dim * WIDE).max(VALUE_TILE) * LANES
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
    pub(super) span: QuerySpan,
    /// `[num_rows, num_heads, head_dim]` of the whole step.
    pub(super) q: &'a [f32],
}

/// Scratch memory of one unit.
struct Scratch<'a> {
    /// Decoded keys or values.
    tile: &'a mut [f32],
    /// `[num_queries]`
    scores: &'a mut [[f32; PARTITION]],
    /// The running sums, and those of the current partition: `[num_queries, padded head_dim]`.
    total: &'a mut [f32],
    partial: &'a mut [f32],
    /// The same of maximum and sum of weights: `[num_queries, 2]`.
    total_softmax: &'a mut [[f32; 2]],
    partial_softmax: &'a mut [[f32; 2]],
    /// Tiles of [`MAX_QUERIES`], of fewer at the end: `[head_dim][queries of the tile]`.
    queries: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    /// Over `memory`, with the running sums at their start.
    fn new(memory: &'a mut [f32], unit: &Unit<'_>) -> Self {
        let (num_queries, padded) = (unit.num_queries(), padded(unit.head_dim));
        let (tile, rest) = memory.split_at_mut(tile_len(unit.head_dim));
        let (scores, rest) = rest.split_at_mut(num_queries * PARTITION);
        let scores = scores.as_chunks_mut().0;
        let (total, rest) = rest.split_at_mut(num_queries * padded);
        let (partial, rest) = rest.split_at_mut(num_queries * padded);
        let (queries, rest) = rest.split_at_mut(num_queries * unit.head_dim);
        let (total_softmax, rest) = rest.as_chunks_mut().0.split_at_mut(num_queries);
        total.fill(0.0);
        total_softmax.fill([f32::NEG_INFINITY, 0.0]);
        Self { tile, scores, total, partial, total_softmax, partial_softmax: &mut rest[..num_queries], queries }
    }
}

impl Unit<'_> {
    /// The whole unit, to its end.
    pub(super) fn attend(&self, out: &SharedRows<'_, f32>, scratch: &mut [f32]) {
        let mut scratch = Scratch::new(scratch, self);
        self.copy_queries(scratch.queries);
        for start in (0..self.end()).step_by(PARTITION) {
            self.attend_partition(start, &mut scratch);
            self.isa.run(Combine { unit: self, start, scratch: &mut scratch });
        }
        self.isa.run(Finish { unit: self, scratch: &scratch, out });
    }

    /// Some partitions of a unit that is cut between workers: the sums of each are kept for [`Unit::combine_kept`].
    pub(super) fn attend_and_keep<'k>(
        &self,
        partitions: impl Iterator<Item = (usize, &'k mut [f32])>,
        scratch: &mut [f32],
    ) {
        let mut scratch = Scratch::new(scratch, self);
        self.copy_queries(scratch.queries);
        for (partition, kept) in partitions {
            self.attend_partition(partition * PARTITION, &mut scratch);
            let (sums, softmax) = kept.split_at_mut(scratch.partial.len());
            sums.copy_from_slice(scratch.partial);
            softmax.as_chunks_mut().0[..self.num_queries()].copy_from_slice(scratch.partial_softmax);
        }
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
        self.isa.run_widening(Score { unit: self, start, scratch });
        self.isa.run(Softmax { unit: self, start, scratch });
        self.isa.run_widening(Weigh { unit: self, start, scratch });
    }

    /// Whether halves are widened as they are multiplied, once for each tile of queries: a few do not use them often enough for
    /// writing them down to pay.
    #[inline(always)]
    fn multiplies_halves<W: Widen>(&self) -> bool {
        let max_tiles = if W::IS_WIDE { 3 } else { 1 };
        self.kv.dtype() == KvDtype::F16 && self.num_queries() <= max_tiles * MAX_QUERIES
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

    /// To tiles of [`MAX_QUERIES`].
    fn copy_queries(&self, queries: &mut [f32]) {
        for (tile, queries) in queries.chunks_mut(MAX_QUERIES * self.head_dim).enumerate() {
            by_queries!(queries.len() / self.head_dim, transpose::<N>(queries, |n| self.query(tile * MAX_QUERIES + n)));
        }
    }

    fn query(&self, index: usize) -> &[f32] {
        let (row, num_heads) =
            (self.span.rows.start + index / self.group, self.kv.geometry().num_kv_heads * self.group);
        let head = self.head * self.group + index % self.group;
        &self.q[(row * num_heads + head) * self.head_dim..][..self.head_dim]
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

    /// Scores of the partition at `start`: `scores[query][position - start]`, computed in tiles of `V` blocks at most.
    #[inline(always)]
    fn score<const V: usize, W: Widen>(&self, start: usize, scratch: &mut Scratch<'_>, widen: W) {
        let blocks = self.visible_blocks(start);
        let mut first = blocks.start;
        while first < blocks.end {
            // A narrower tile where the wider would be half empty.
            first = match (V, blocks.end - first) {
                (WIDE, 4..) => self.score_tile::<WIDE, W>(first, &blocks, start, scratch, widen),
                (WIDE, 2..) => self.score_tile::<2, W>(first, &blocks, start, scratch, widen),
                _ => self.score_tile::<1, W>(first, &blocks, start, scratch, widen),
            };
        }
    }

    /// The tile that begins with block `first`; returns its end.
    #[inline(always)]
    fn score_tile<const V: usize, W: Widen>(
        &self,
        first: usize,
        blocks: &Range<usize>,
        start: usize,
        scratch: &mut Scratch<'_>,
        widen: W,
    ) -> usize {
        let indices: [usize; V] = std::array::from_fn(|v| first + v);
        if self.multiplies_halves::<W>() {
            let keys = indices.map(|index| halves(self.keys(index)));
            // Where nothing follows, what is there already.
            let ahead = indices.map(|index| halves(self.ahead_of_keys(index, blocks).unwrap_or(self.keys(index))));
            self.score_rows::<V>(first, start, Halves::new(keys, ahead, widen), scratch.queries, scratch.scores);
        } else {
            let tile = &mut scratch.tile.as_chunks_mut().0.as_chunks_mut().0[..self.head_dim];
            for (v, index) in indices.into_iter().enumerate() {
                if let Some(ahead) = self.ahead_of_keys(index, blocks) {
                    ahead.prefetch();
                }
                self.keys(index).decode::<V>(widen, tile, v);
            }
            self.score_rows::<V>(first, start, &*tile, scratch.queries, scratch.scores);
        }
        first + V
    }

    /// Of all tiles of queries with one that sees any of them.
    #[inline(always)]
    fn score_rows<const V: usize>(
        &self,
        first: usize,
        start: usize,
        keys: impl Rows<V>,
        queries: &[f32],
        scores: &mut [[f32; PARTITION]],
    ) {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let offset = first * BLOCK_TOKENS - start;
        let Range { start: from, end } = self.queries_from(first * BLOCK_TOKENS);
        for query in (from - from % MAX_QUERIES..end).step_by(MAX_QUERIES) {
            let (queries, scores) = (&queries[query * self.head_dim..], &mut scores[query..]);
            let num_queries = (end - query).min(MAX_QUERIES);
            by_queries!(num_queries, score::<N, V>(queries, keys, scale, scores, offset));
        }
    }

    /// Scores -> weights, with their maximum and sum.
    #[inline(always)]
    fn softmax(&self, start: usize, scratch: &mut Scratch<'_>) {
        let Range { start: from, end } = self.queries_from(start);
        let mut max = self.largest_score(from, start, scratch.scores);
        for query in from..end {
            // On its way while the weights of this one are computed.
            let next = if query + 1 < end { self.largest_score(query + 1, start, scratch.scores) } else { max };
            let scores = self.visible_scores(query, start, scratch.scores);
            scratch.partial_softmax[query] = [max, tile::exp_and_sum(scores, max)];
            max = next;
        }
    }

    /// The largest score of `query`. What fills its last vector is made to weigh exactly nothing.
    #[inline(always)]
    fn largest_score(&self, query: usize, start: usize, scores: &mut [[f32; PARTITION]]) -> f32 {
        let num_visible = self.num_visible(query, start).min(PARTITION);
        let steps = self.visible_scores(query, start, scores);
        steps.as_flattened_mut()[num_visible..].fill(f32::NEG_INFINITY);
        tile::max_16(steps)
    }

    /// Whole vectors of the scores of what `query` sees.
    #[inline(always)]
    fn visible_scores<'s>(
        &self,
        query: usize,
        start: usize,
        scores: &'s mut [[f32; PARTITION]],
    ) -> &'s mut [[f32; LANES]] {
        let num_steps = self.num_visible(query, start).min(PARTITION).div_ceil(LANES);
        &mut scores[query].as_chunks_mut().0[..num_steps]
    }

    /// `partial[query] = sum of weight * V` over the partition's visible positions, computed in tiles of `V` vectors.
    #[inline(always)]
    fn weigh<const V: usize, W: Widen>(&self, start: usize, scratch: &mut Scratch<'_>, widen: W) {
        let padded = padded(self.head_dim);
        let whole_tiles = padded - padded % (V * LANES);
        self.weigh_columns::<V, W>(0..whole_tiles, start, scratch, widen);
        if V > 1 && whole_tiles < padded {
            self.weigh_columns::<1, W>(whole_tiles..padded, start, scratch, widen);
        }
    }

    /// The same of `columns`, a multiple of `V` vectors.
    #[inline(always)]
    fn weigh_columns<const V: usize, W: Widen>(
        &self,
        columns: Range<usize>,
        start: usize,
        scratch: &mut Scratch<'_>,
        widen: W,
    ) {
        let blocks = self.visible_blocks(start);
        let positions = |blocks: &Range<usize>| blocks.start * BLOCK_TOKENS..blocks.end * BLOCK_TOKENS;
        let columns = columns.step_by(V * LANES);
        if self.multiplies_halves::<W>() {
            for index in blocks.clone() {
                let values = self.values(index);
                let ahead = halves(self.ahead_of_values(index, &blocks).unwrap_or(values));
                for column in columns.clone() {
                    let dimensions: [usize; V] = std::array::from_fn(|v| column / LANES + v);
                    let ahead = dimensions.map(|dimension| &ahead[dimension * BLOCK_TOKENS..]);
                    let values = dimensions.map(|dimension| halves(values.dimensions(dimension)));
                    let (values, positions) = (Halves::new(values, ahead, widen), positions(&(index..index + 1)));
                    self.weigh_tile::<V>(positions, start, column, values, scratch.scores, scratch.partial);
                }
            }
            return;
        }
        // Columns outermost: fewer are in use at a time.
        for column in columns {
            for first in blocks.clone().step_by(VALUE_TILE / V / BLOCK_TOKENS) {
                let tile = first..blocks.end.min(first + VALUE_TILE / V / BLOCK_TOKENS);
                let values: &mut [Vectors<V>] = scratch.tile.as_chunks_mut().0.as_chunks_mut().0;
                for (index, values) in tile.clone().zip(values.chunks_exact_mut(BLOCK_TOKENS)) {
                    if column == 0
                        && let Some(ahead) = self.ahead_of_values(index, &blocks)
                    {
                        ahead.prefetch();
                    }
                    for v in 0..V {
                        self.values(index).dimensions(column / LANES + v).decode::<V>(widen, values, v);
                    }
                }
                self.weigh_tile::<V>(positions(&tile), start, column, &*values, scratch.scores, scratch.partial);
            }
        }
    }

    /// Adds columns `column..` of the visible ones of `positions`, whose values are `values`.
    #[inline(always)]
    fn weigh_tile<const V: usize>(
        &self,
        positions: Range<usize>,
        start: usize,
        column: usize,
        values: impl Rows<V>,
        weights: &[[f32; PARTITION]],
        partial: &mut [f32],
    ) {
        let padded = padded(self.head_dim);
        let Range { start: from, end } = self.queries_from(positions.start);
        for query in (from..end).step_by(MAX_QUERIES) {
            let queries = query..end.min(query + MAX_QUERIES);
            // The partition's first: their sums are cleared when they are about to be needed, not all of them in advance.
            if positions.start == start {
                for query in queries.clone() {
                    partial[query * padded + column..][..V * LANES].fill(0.0);
                }
            }
            let [num_shared, num_seen] =
                [query, queries.end - 1].map(|query| self.num_visible(query, positions.start).min(positions.len()));
            // What all of them see, then position by position what only the later ones do.
            let offset = positions.start - start;
            let mut seen = 0..num_shared;
            while seen.start < num_seen {
                let first = self.queries_from(positions.start + seen.start).start.max(queries.start);
                let (weights, acc) = (&weights[first..], &mut partial[first * padded + column..]);
                let (values, from) = (values.part(seen.clone()), offset + seen.start);
                by_queries!(queries.end - first, add_values::<N, V>(weights, from, values, padded, acc));
                seen = seen.end..seen.end + 1;
            }
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

    /// What is used [`AHEAD_BLOCKS`] after the keys of block `index`, of a partition of `blocks`.
    #[inline(always)]
    fn ahead_of_keys(&self, index: usize, blocks: &Range<usize>) -> Option<KvTile<'_>> {
        let ahead = index + AHEAD_BLOCKS;
        if ahead < blocks.end {
            Some(self.keys(ahead))
        } else {
            let ahead = blocks.start + ahead - blocks.end;
            (ahead < blocks.end).then(|| self.values(ahead))
        }
    }

    /// As [`Self::ahead_of_keys`] for the values of block `index`: the next keys are those of the next partition.
    #[inline(always)]
    fn ahead_of_values(&self, index: usize, blocks: &Range<usize>) -> Option<KvTile<'_>> {
        let ahead = index + AHEAD_BLOCKS;
        if ahead < blocks.end {
            Some(self.values(ahead))
        } else {
            (ahead * BLOCK_TOKENS < self.end()).then(|| self.keys(ahead))
        }
    }
}

#[inline(always)]
fn halves(tile: KvTile<'_>) -> &[[[u8; 2]; RUN]] {
    tile.halves().expect("a cache of halves")
}

/// Scores of the partition at `start`.
struct Score<'a, 's> {
    unit: &'a Unit<'a>,
    start: usize,
    scratch: &'a mut Scratch<'s>,
}

impl WideningOp for Score<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call<W: Widen>(self, widen: W) {
        if W::IS_WIDE {
            self.unit.score::<WIDE, W>(self.start, self.scratch, widen);
        } else {
            self.unit.score::<1, W>(self.start, self.scratch, widen);
        }
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
struct Weigh<'a, 's> {
    unit: &'a Unit<'a>,
    start: usize,
    scratch: &'a mut Scratch<'s>,
}

impl WideningOp for Weigh<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call<W: Widen>(self, widen: W) {
        if W::IS_WIDE {
            self.unit.weigh::<WIDE, W>(self.start, self.scratch, widen);
        } else {
            self.unit.weigh::<1, W>(self.start, self.scratch, widen);
        }
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
