//! Causal attention with grouped query heads over the paged cache, in an order of operations that depends on positions
//! alone.
//!
//! Per (query, head), with `p` ranging over the visible positions `0..=position`:
//!
//! ```text
//! score[p] = (sum over d of q[d] * K[p][d]) * head_dim^-0.5        sequential fused multiply-add over d
//! per partition of 256 absolute positions:
//!     m = max(score), weight[p] = exp(score[p] - m)
//!     l = sum(weight) in 16 lanes by p mod 16, then the tree       acc = sum of weight[p] * V[p], p ascending, fma
//! partitions ascending:  m' = max(m, m_i), a = exp(m - m'), b = exp(m_i - m'),  l = l a + l_i b,  acc = acc a + acc_i b
//! out = acc / l
//! ```
//!
//! What differs in the code, and changes no bit: a unit of work is up to 8 rows of one sequence times the query heads of one
//! K/V head, so that a block is decoded once for all of them; scores are computed for the 16 positions of a block side by
//! side. Invisible positions may be scored, but their scores and values are never used: a reused block may hold NaN.
//! Workers share the partitions evenly; of a unit cut between workers the sums of each partition are kept, and combined in
//! a second phase, ascending as ever.

use std::ops::Range;

use super::{
    batch::{Batch, QuerySpan, Row},
    phases::Phases,
};
use crate::{
    checkpoint::ModelConfig,
    ids::BlockId,
    kernels::{
        FloatOp,
        math::{self, LANES},
    },
    kv_cache::{BLOCK_TOKENS, KvCache},
    threads::SharedRows,
};

/// Absolute positions whose scores share one maximum.
const PARTITION: usize = 256;
/// Queries scored together: they share each load of a key.
const QUERY_TILE: usize = 4;

/// Rounds and stores `k` and `v` (`[num_rows, num_kv_heads, head_dim]`) of every row.
pub(super) fn store(phases: &mut Phases<'_>, kv: &mut KvCache, layer: usize, rows: &[Row], k: &[f32], v: &[f32]) {
    phases.isa().run(Store { kv, layer, rows, k, v });
}

/// `out = attention(q, cache)`; both `[num_rows, num_heads, head_dim]`. `scratch`: [`scratch_len`] values a worker;
/// `partials`: [`partial_len`] values for each partition of a context, times the workers but one.
#[expect(clippy::too_many_arguments, reason = "a step's cache, rows, input, output and memory")]
pub(super) fn attend(
    phases: &mut Phases<'_>,
    kv: &KvCache,
    layer: usize,
    batch: &Batch,
    q: &[f32],
    out: &mut [f32],
    scratch: &mut [f32],
    partials: &mut [f32],
) {
    let geometry = kv.geometry();
    let (isa, num_kv_heads, head_dim) = (phases.isa(), geometry.num_kv_heads, geometry.head_dim);
    let group_width = q.len() / phases.num_rows / num_kv_heads;
    let (group, num_threads) = (group_width / head_dim, phases.pool.num_threads());
    let max_queries = QuerySpan::MAX_ROWS * group;
    let unit_of = |span, head| Unit { kv, layer, head, head_dim, group, blocks: batch.blocks(span), span, q };
    let placed = || place(batch.spans(), num_kv_heads, num_threads);
    // out: [num_rows * num_kv_heads, group_width]
    let out = SharedRows::new(out, group_width);
    let scratch_len = scratch.len() / num_threads;
    let partial_len = partial_len(max_queries, head_dim);
    let per_slot = partials.len() / partial_len / (num_threads - 1).max(1);
    {
        let (scratch, partials) =
            (SharedRows::new(&mut *scratch, scratch_len), SharedRows::new(&mut *partials, partial_len));
        phases.pool.run(&|worker| {
            let scratch = scratch.claim(worker.index()..worker.index() + 1);
            for placed in placed() {
                let (unit, scratch) = (unit_of(placed.span, placed.head), &mut *scratch);
                match placed.slot {
                    None if placed.first == worker.index() => isa.run(Attend { unit, out: &out, scratch }),
                    None => {}
                    Some(slot) => {
                        for partition in placed.partitions_of(worker.index()) {
                            let cell = slot * per_slot + partition;
                            let kept = partials.claim(cell..cell + 1);
                            isa.run(AttendPartition { unit: &unit, partition, kept, scratch: &mut *scratch });
                        }
                    }
                }
            }
        });
    }
    if placed().all(|placed| placed.slot.is_none()) {
        return;
    }
    let scratch = SharedRows::new(scratch, scratch_len);
    let partials = &*partials;
    phases.pool.run(&|worker| {
        let scratch = scratch.claim(worker.index()..worker.index() + 1);
        let cut = placed().filter_map(|placed| placed.slot.map(|slot| (placed, slot)));
        for (placed, slot) in cut.filter(|(_, slot)| slot % num_threads == worker.index()) {
            let (unit, scratch) = (unit_of(placed.span, placed.head), &mut *scratch);
            let kept = &partials[slot * per_slot * partial_len..][..num_partitions(placed.span) * partial_len];
            isa.run(CombinePartitions { unit, kept, partial_len, out: &out, scratch });
        }
    });
}

/// Values of scratch memory one worker needs.
pub(super) fn scratch_len(config: &ModelConfig) -> usize {
    let max_queries = QuerySpan::MAX_ROWS * (config.num_heads / config.num_kv_heads);
    let padded = config.head_dim.next_multiple_of(LANES);
    BLOCK_TOKENS * padded + max_queries * (PARTITION + 2 * padded + 2 * 2)
}

/// Values that keep the partitions of all units that can be cut, for contexts of at most `max_context`.
pub(super) fn partials_len(config: &ModelConfig, max_context: usize, num_threads: usize) -> usize {
    let max_queries = QuerySpan::MAX_ROWS * (config.num_heads / config.num_kv_heads);
    (num_threads - 1) * max_context.div_ceil(PARTITION) * partial_len(max_queries, config.head_dim)
}

/// Values that keep one partition: sums, then maximum and sum of weights, for each query.
fn partial_len(max_queries: usize, head_dim: usize) -> usize {
    max_queries * (head_dim.next_multiple_of(LANES) + 2)
}

fn num_partitions(span: &QuerySpan) -> usize {
    (span.start + span.rows.len()).div_ceil(PARTITION)
}

/// A unit of work (span, K/V head) and the workers it falls to.
struct Placed<'a> {
    span: &'a QuerySpan,
    head: usize,
    /// The workers of the first and the last partition.
    first: usize,
    last: usize,
    /// Where its partitions are kept when these differ: there are fewer such units than workers.
    slot: Option<usize>,
    /// Cost of all units before, and of all units; the number of workers.
    before: usize,
    total: usize,
    num_threads: usize,
}

/// All units in order, balanced by visible positions: a partition belongs to the worker in whose equal share of the total
/// cost its middle lies.
fn place(spans: &[QuerySpan], num_kv_heads: usize, num_threads: usize) -> impl Iterator<Item = Placed<'_>> {
    let cost = |span: &QuerySpan| span.rows.len() * (span.start + span.rows.len());
    let total = spans.iter().map(cost).sum::<usize>() * num_kv_heads;
    let (mut before, mut num_cut) = (0, 0);
    let units = spans.iter().flat_map(move |span| (0..num_kv_heads).map(move |head| (span, head)));
    units.map(move |(span, head)| {
        let mut placed = Placed { span, head, first: 0, last: 0, slot: None, before, total, num_threads };
        (placed.first, placed.last) = (placed.worker_of(0), placed.worker_of(num_partitions(span) - 1));
        if placed.first != placed.last {
            placed.slot = Some(num_cut);
            num_cut += 1;
        }
        before += cost(span);
        placed
    })
}

impl Placed<'_> {
    /// Ascending with the partition, and from unit to unit.
    fn worker_of(&self, partition: usize) -> usize {
        let (num_rows, end) = (self.span.rows.len(), self.span.start + self.span.rows.len());
        let bounds = partition * PARTITION + end.min((partition + 1) * PARTITION);
        (2 * self.before + num_rows * bounds) * self.num_threads / (2 * self.total)
    }

    fn partitions_of(&self, worker: usize) -> impl Iterator<Item = usize> + '_ {
        (0..num_partitions(self.span)).filter(move |&partition| self.worker_of(partition) == worker)
    }
}

struct Store<'a> {
    kv: &'a mut KvCache,
    layer: usize,
    rows: &'a [Row],
    k: &'a [f32],
    v: &'a [f32],
}

impl FloatOp for Store<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let width = self.k.len() / self.rows.len();
        let values = self.k.chunks_exact(width).zip(self.v.chunks_exact(width));
        for (row, (k, v)) in self.rows.iter().zip(values) {
            self.kv.write(row.block, self.layer, row.position, k, v);
        }
    }
}

/// A few rows of one sequence times the query heads that share one K/V head.
struct Unit<'a> {
    kv: &'a KvCache,
    layer: usize,
    head: usize,
    head_dim: usize,
    /// Query heads per K/V head.
    group: usize,
    blocks: &'a [BlockId],
    span: &'a QuerySpan,
    /// `[num_rows, num_heads, head_dim]` of the whole step.
    q: &'a [f32],
}

struct Attend<'a> {
    unit: Unit<'a>,
    out: &'a SharedRows<'a, f32>,
    scratch: &'a mut [f32],
}

/// Scratch memory of one unit; a query is (row, query head), rows outermost.
struct Scratch<'a> {
    /// One decoded block of keys or values.
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

impl FloatOp for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { unit, out, scratch } = self;
        let mut scratch = Scratch::split(scratch, unit.num_queries(), unit.head_dim.next_multiple_of(LANES));
        scratch.total.fill(0.0);
        scratch.total_softmax.fill([f32::NEG_INFINITY, 0.0]);
        for start in (0..unit.end()).step_by(PARTITION) {
            unit.attend_partition(start, &mut scratch);
            unit.combine(start, &mut scratch);
        }
        unit.finish(&scratch, out);
    }
}

/// One partition of a unit that is cut between workers; `kept` is for [`CombinePartitions`].
struct AttendPartition<'a> {
    unit: &'a Unit<'a>,
    partition: usize,
    kept: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl FloatOp for AttendPartition<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { unit, partition, kept, scratch } = self;
        let mut scratch = Scratch::split(scratch, unit.num_queries(), unit.head_dim.next_multiple_of(LANES));
        unit.attend_partition(partition * PARTITION, &mut scratch);
        let (sums, softmax) = kept.split_at_mut(scratch.partial.len());
        sums.copy_from_slice(scratch.partial);
        softmax.as_chunks_mut().0[..unit.num_queries()].copy_from_slice(scratch.partial_softmax);
    }
}

/// The end of [`Attend`] for a unit whose partitions were kept: `kept: [num_partitions, partial_len]`.
struct CombinePartitions<'a> {
    unit: Unit<'a>,
    kept: &'a [f32],
    partial_len: usize,
    out: &'a SharedRows<'a, f32>,
    scratch: &'a mut [f32],
}

impl FloatOp for CombinePartitions<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { unit, kept, partial_len, out, scratch } = self;
        let mut scratch = Scratch::split(scratch, unit.num_queries(), unit.head_dim.next_multiple_of(LANES));
        scratch.total.fill(0.0);
        scratch.total_softmax.fill([f32::NEG_INFINITY, 0.0]);
        for (kept, start) in kept.chunks_exact(partial_len).zip((0..).step_by(PARTITION)) {
            let (sums, softmax) = kept.split_at(scratch.partial.len());
            scratch.partial.copy_from_slice(sums);
            scratch.partial_softmax.copy_from_slice(&softmax.as_chunks().0[..unit.num_queries()]);
            unit.combine(start, &mut scratch);
        }
        unit.finish(&scratch, out);
    }
}

impl Unit<'_> {
    fn num_queries(&self) -> usize {
        self.span.rows.len() * self.group
    }

    /// One past the last position any query sees.
    fn end(&self) -> usize {
        self.span.start + self.span.rows.len()
    }

    /// Positions of the partition at `start` that `query` sees.
    #[inline(always)]
    fn num_visible(&self, query: usize, start: usize) -> usize {
        (self.span.start + query / self.group + 1).saturating_sub(start).min(PARTITION)
    }

    /// The queries that see position `position`: all from some row on.
    #[inline(always)]
    fn queries_from(&self, position: usize) -> Range<usize> {
        position.saturating_sub(self.span.start) * self.group..self.num_queries()
    }

    /// `[head_dim]`
    #[inline(always)]
    fn query(&self, query: usize) -> &[f32] {
        let width = self.q.len() / self.num_rows();
        let row = self.span.rows.start + query / self.group;
        &self.q[row * width + (self.head * self.group + query % self.group) * self.head_dim..][..self.head_dim]
    }

    /// Each visible block of the partition at `start`, and where in the partition it begins.
    #[inline(always)]
    fn visible_blocks(&self, start: usize) -> impl Iterator<Item = (BlockId, usize)> + '_ {
        let end = self.end().min(start + PARTITION);
        self.blocks[start / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS)].iter().copied().zip((0..).step_by(BLOCK_TOKENS))
    }

    /// Maximum, sum of weights and weighted values of the partition at `start`.
    #[inline(always)]
    fn attend_partition(&self, start: usize, scratch: &mut Scratch<'_>) {
        self.score(start, scratch);
        self.softmax(start, scratch);
        self.weigh(start, scratch);
    }

    /// Scores of the partition at `start`: `scores[query][position - start]`.
    #[inline(always)]
    fn score(&self, start: usize, scratch: &mut Scratch<'_>) {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        for (block, offset) in self.visible_blocks(start) {
            let keys = &mut scratch.tile[..self.head_dim * BLOCK_TOKENS];
            self.kv.keys(block, self.layer, self.head).decode(keys);
            let keys = keys.as_chunks().0;
            let Range { start: first, end } = self.queries_from(start + offset);
            let tiles_end = end - (end - first) % QUERY_TILE;
            for query in (first..tiles_end).step_by(QUERY_TILE) {
                let queries = std::array::from_fn::<_, QUERY_TILE, _>(|i| self.query(query + i));
                store_scores(dot_keys(queries, keys), scale, &mut scratch.scores[query * PARTITION + offset..]);
            }
            for query in tiles_end..end {
                store_scores(
                    dot_keys([self.query(query)], keys),
                    scale,
                    &mut scratch.scores[query * PARTITION + offset..],
                );
            }
        }
    }

    /// Scores -> weights, with their maximum and sum.
    #[inline(always)]
    fn softmax(&self, start: usize, scratch: &mut Scratch<'_>) {
        let queries = scratch.scores.chunks_exact_mut(PARTITION).zip(scratch.partial_softmax.iter_mut());
        for (query, (scores, softmax)) in queries.enumerate().skip(self.queries_from(start).start) {
            let (visible, rest) = scores.split_at_mut(self.num_visible(query, start));
            let max = max_16(visible);
            for score in visible.iter_mut() {
                *score = math::exp(*score - max);
            }
            // The sum goes lane by lane over whole blocks: what is not visible adds nothing.
            let padding = visible.len().next_multiple_of(LANES) - visible.len();
            rest[..padding].fill(0.0);
            let num_padded = visible.len() + padding;
            *softmax = [max, sum_16(&scores[..num_padded])];
        }
    }

    /// `partial[query] = sum of weight * V` over the partition's visible positions.
    #[inline(always)]
    fn weigh(&self, start: usize, scratch: &mut Scratch<'_>) {
        let padded = scratch.tile.len() / BLOCK_TOKENS;
        scratch.partial.fill(0.0);
        for (block, offset) in self.visible_blocks(start) {
            self.kv.values(block, self.layer, self.head).decode(scratch.tile);
            for query in self.queries_from(start + offset) {
                let num_visible = (self.num_visible(query, start) - offset).min(BLOCK_TOKENS);
                let weights = &scratch.scores[query * PARTITION + offset..][..num_visible];
                add_weighted(weights, scratch.tile, &mut scratch.partial[query * padded..][..padded]);
            }
        }
    }

    /// Adds the partition at `start` to the running sums.
    #[inline(always)]
    fn combine(&self, start: usize, scratch: &mut Scratch<'_>) {
        let padded = scratch.tile.len() / BLOCK_TOKENS;
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
        let padded = scratch.tile.len() / BLOCK_TOKENS;
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

    fn num_rows(&self) -> usize {
        self.q.len() / (self.kv.geometry().num_kv_heads * self.group * self.head_dim)
    }
}

impl<'a> Scratch<'a> {
    fn split(scratch: &'a mut [f32], num_queries: usize, padded: usize) -> Self {
        let (tile, rest) = scratch.split_at_mut(BLOCK_TOKENS * padded);
        let (scores, rest) = rest.split_at_mut(num_queries * PARTITION);
        let (total, rest) = rest.split_at_mut(num_queries * padded);
        let (partial, rest) = rest.split_at_mut(num_queries * padded);
        let (total_softmax, rest) = rest.as_chunks_mut().0.split_at_mut(num_queries);
        Self { tile, scores, total, partial, total_softmax, partial_softmax: &mut rest[..num_queries] }
    }
}

/// `N` queries times the keys of a block (`[head_dim][16]`).
#[inline(always)]
fn dot_keys<const N: usize>(queries: [&[f32]; N], keys: &[[f32; BLOCK_TOKENS]]) -> [[f32; BLOCK_TOKENS]; N] {
    for query in &queries {
        assert_eq!(query.len(), keys.len(), "a query as wide as the keys");
    }
    let mut sums = [[0.0f32; BLOCK_TOKENS]; N];
    for (d, key) in keys.iter().enumerate() {
        for n in 0..N {
            for t in 0..BLOCK_TOKENS {
                sums[n][t] = queries[n][d].mul_add(key[t], sums[n][t]);
            }
        }
    }
    sums
}

#[inline(always)]
fn store_scores<const N: usize>(sums: [[f32; BLOCK_TOKENS]; N], scale: f32, scores: &mut [f32]) {
    for (sums, scores) in sums.iter().zip(scores.chunks_mut(PARTITION)) {
        for (score, sum) in scores[..BLOCK_TOKENS].iter_mut().zip(sums) {
            *score = sum * scale;
        }
    }
}

/// `acc += weights[t] * values[t]`, t ascending. `values: [16][acc.len()]`
#[inline(always)]
fn add_weighted(weights: &[f32], values: &[f32], acc: &mut [f32]) {
    let width = acc.len();
    let (wide, narrow) = acc.as_chunks_mut::<{ 4 * LANES }>();
    let narrow_start = wide.len() * 4 * LANES;
    for (i, acc) in wide.iter_mut().enumerate() {
        add_weighted_columns(weights, &values[i * 4 * LANES..], width, acc);
    }
    for (i, acc) in narrow.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        add_weighted_columns(weights, &values[narrow_start + i * LANES..], width, acc);
    }
}

#[inline(always)]
fn add_weighted_columns<const N: usize>(weights: &[f32], values: &[f32], stride: usize, acc: &mut [f32; N]) {
    let mut sums = *acc;
    for (weight, values) in weights.iter().zip(values.chunks(stride)) {
        let values = values.first_chunk::<N>().expect("a whole row of values");
        for d in 0..N {
            sums[d] = weight.mul_add(values[d], sums[d]);
        }
    }
    *acc = sums;
}

/// The largest value, NaN left out.
#[inline(always)]
fn max_16(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (steps, tail) = values.as_chunks::<LANES>();
    for step in steps {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], step[lane]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(tail) {
        *lane = larger(*lane, *value);
    }
    let mut max = f32::NEG_INFINITY;
    for lane in lanes {
        max = larger(max, lane);
    }
    max
}

#[inline(always)]
fn larger(max: f32, value: f32) -> f32 {
    if value > max { value } else { max }
}

/// The sum of whole blocks, by lanes and the tree.
#[inline(always)]
fn sum_16(values: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    for step in values.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] += step[lane];
        }
    }
    math::lane_tree(&lanes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::TokenId,
        kernels,
        kv_cache::{Geometry, KvDtype},
        model::{
            batch::{BatchSequence, Limits, LogitRows},
            test_config,
        },
        threads::WorkerPool,
    };

    const NUM_BLOCKS: usize = 40;

    /// Three query heads a K/V head, heads of 20: neither fills a tile.
    fn config() -> ModelConfig {
        ModelConfig { num_layers: 2, num_heads: 6, num_kv_heads: 2, head_dim: 20, ..test_config() }
    }

    /// A value in -1..1 that depends on everything given.
    fn value(kind: usize, position: usize, i: usize) -> f32 {
        ((kind * 7919 + position * 104_729 + i * 1299) % 2000) as f32 / 1000.0 - 1.0
    }

    fn rows(kind: usize, positions: Range<usize>, width: usize) -> Vec<f32> {
        positions.flat_map(|position| (0..width).map(move |i| value(kind, position, i))).collect()
    }

    /// Attention of one query as the text at the top says it, position by position.
    fn specification(q: &[f32], position: usize, kv_head: usize, config: &ModelConfig) -> Vec<f32> {
        let hd = config.head_dim;
        let key = |p: usize, d: usize| value(1, p, kv_head * hd + d);
        let (mut m, mut l, mut acc) = (f32::NEG_INFINITY, 0.0, vec![0.0; hd]);
        for first in (0..=position).step_by(PARTITION) {
            let visible = first..(position + 1).min(first + PARTITION);
            let dot = |p| (0..hd).fold(0.0f32, |sum, d| q[d].mul_add(key(p, d), sum));
            let scores: Vec<f32> = visible.clone().map(|p| dot(p) * (1.0 / (hd as f32).sqrt())).collect();
            let m_i = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = scores.iter().map(|score| math::exp(score - m_i)).collect();
            let mut lanes = [0.0; 16];
            weights.iter().enumerate().for_each(|(p, weight)| lanes[p % 16] += weight);
            let (a, b) = (math::exp(m - m.max(m_i)), math::exp(m_i - m.max(m_i)));
            l = l * a + math::lane_tree(&lanes) * b;
            for (d, acc) in acc.iter_mut().enumerate() {
                let v = |p| value(2, p, kv_head * hd + d);
                let sum = visible.clone().zip(&weights).fold(0.0f32, |sum, (p, weight)| weight.mul_add(v(p), sum));
                *acc = *acc * a + sum * b;
            }
            m = m.max(m_i);
        }
        acc.iter().map(|acc| acc / l).collect()
    }

    #[test]
    fn every_kernel_follows_the_specification_to_the_bit() {
        let config = config();
        let (q_width, kv_width) = (6 * 20, 2 * 20);
        let table: Vec<_> = (0..NUM_BLOCKS).rev().map(|block| BlockId(block as u32)).collect();
        let limits = Limits { vocab_size: 9, num_blocks: NUM_BLOCKS, max_rows: 64, max_context: 600 };
        for kernel in kernels::available() {
            let mut kv = KvCache::with_geometry(Geometry::new(&config, KvDtype::F32), NUM_BLOCKS).expect("small");
            // Three workers cut units of one partition and of two.
            let mut pool = WorkerPool::new(3);
            for (start, end) in [(0, 1), (1, 33), (33, 84), (84, 148), (148, 212), (212, 250), (250, 270), (270, 271)] {
                let tokens = vec![TokenId(1); end - start];
                let sequence = BatchSequence { tokens: &tokens, start, block_table: &table, logits: LogitRows::None };
                let batch = Batch::checked(&limits, &[sequence]).expect("valid");
                let phases = &mut Phases { pool: &mut pool, kernel: *kernel, num_rows: end - start };
                let (k, v) = (rows(1, start..end, kv_width), rows(2, start..end, kv_width));
                store(phases, &mut kv, 1, batch.rows(), &k, &v);
                let q = rows(0, start..end, q_width);
                let mut out = vec![0.0; q.len()];
                let mut scratch = vec![f32::NAN; 3 * scratch_len(&config)];
                let mut partials = vec![f32::NAN; partials_len(&config, 600, 3)];
                attend(phases, &kv, 1, &batch, &q, &mut out, &mut scratch, &mut partials);
                for (i, (q, out)) in q.chunks_exact(20).zip(out.chunks_exact(20)).enumerate() {
                    let expected = specification(q, start + i / 6, i % 6 / 3, &config);
                    assert_eq!(out, expected, "{} row {} head {}", kernel.name(), start + i / 6, i % 6);
                }
            }
        }
    }

    #[test]
    fn units_of_work_are_all_done_once_whatever_the_number_of_workers() {
        let table: Vec<_> = (0..NUM_BLOCKS as u32).map(BlockId).collect();
        let limits = Limits { vocab_size: 9, num_blocks: NUM_BLOCKS, max_rows: 64, max_context: 600 };
        let tokens = [TokenId(0); 30];
        let sequence = |len: usize, start, block| BatchSequence {
            tokens: &tokens[..len],
            start,
            block_table: &table[block..],
            logits: LogitRows::None,
        };
        let batch =
            Batch::checked(&limits, &[sequence(30, 0, 0), sequence(1, 300, 10), sequence(2, 17, 35)]).expect("valid");
        for num_threads in [1, 2, 3, 5, 16] {
            let placed: Vec<_> = place(batch.spans(), 3, num_threads).collect();
            let units: Vec<_> = placed.iter().map(|placed| (placed.span.rows.start, placed.head)).collect();
            let starts = [0, 8, 16, 24, 30, 31];
            let expected: Vec<_> = starts.into_iter().flat_map(|row| (0..3).map(move |head| (row, head))).collect();
            assert_eq!(units, expected);
            let mut slots = 0..num_threads - 1;
            for placed in &placed {
                let mut partitions: Vec<_> =
                    (placed.first..=placed.last).flat_map(|w| placed.partitions_of(w)).collect();
                partitions.sort_unstable();
                assert_eq!(partitions, (0..num_partitions(placed.span)).collect::<Vec<_>>());
                assert!(placed.first <= placed.last && placed.last < num_threads);
                assert_eq!(placed.slot, if placed.first == placed.last { None } else { slots.next() });
            }
        }
    }
}
