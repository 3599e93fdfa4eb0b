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
//! What differs in the code, and changes no bit: a unit of work is up to 96 rows of one sequence times the query heads of one
//! K/V head, so that a block is decoded once for all of them (halves of few queries are widened as they are multiplied); scores
//! are computed for the positions of some blocks side by side. Invisible positions may be scored, but their scores and values
//! are never used: a reused block may hold NaN.
//! Workers take pieces of units, or where there are few share the partitions evenly (`place.rs`); of a unit cut between partitions
//! the sums of each are kept, and combined in a second phase, ascending as ever.

mod place;
#[cfg(test)]
mod tests;
mod tile;
mod unit;

use place::{num_partitions, num_pieces, place, units_of};
use unit::Unit;

use super::{
    batch::{Batch, QuerySpan, Row},
    phases::Phases,
};
use crate::{
    checkpoint::ModelConfig,
    kernels::FloatOp,
    kv_cache::{KvCache, SharedBlocks},
    threads::SharedRows,
};

/// Absolute positions whose scores share one maximum.
const PARTITION: usize = 256;

/// Rounds and stores `k` and `v` (`[num_rows, num_kv_heads, head_dim]`) of every row.
pub(super) fn store(phases: &mut Phases<'_>, kv: &mut KvCache, layer: usize, rows: &[Row], k: &[f32], v: &[f32]) {
    let (isa, blocks, width) = (phases.isa(), kv.shared(), k.len() / rows.len());
    // The first row from `row` on that is not in the block of the one before: a block has one writer.
    let edge = |row: usize| (row..rows.len()).find(|&row| row == 0 || rows[row].block != rows[row - 1].block);
    let edge = |row| edge(row).unwrap_or(rows.len());
    phases.over_rows(&|range| {
        let range = edge(range.start)..edge(range.end);
        let (k, v) = (&k[range.start * width..range.end * width], &v[range.start * width..range.end * width]);
        isa.run(Store { blocks: &blocks, layer, rows: &rows[range], width, k, v });
    });
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
    let unit_of = |span: &QuerySpan, head| {
        let (blocks, span) = (batch.blocks(span), span.clone());
        Unit { isa, kv, layer, head, head_dim, group, blocks, span, q }
    };
    // out: [num_rows * num_kv_heads, group_width]
    let out = SharedRows::new(out, group_width);
    let scratch_len = scratch.len() / num_threads;
    if let Some(num_pieces) = num_pieces(batch.spans(), num_kv_heads, num_threads) {
        let scratch = SharedRows::new(scratch, scratch_len);
        phases.pool.run_with_chunks(num_pieces, 1, &|worker, chunks| {
            let scratch = scratch.claim(worker.index()..worker.index() + 1);
            for (span, head) in chunks.flat_map(|chunk| units_of(batch.spans(), num_kv_heads, chunk)) {
                unit_of(&span, head).attend(&out, scratch);
            }
        });
        return;
    }
    let placed = || place(batch.spans(), num_kv_heads, num_threads);
    let partial_len = partial_len(max_queries, head_dim);
    let per_slot = partials.len() / partial_len / (num_threads - 1).max(1);
    {
        let (scratch, partials) =
            (SharedRows::new(&mut *scratch, scratch_len), SharedRows::new(&mut *partials, partial_len));
        phases.pool.run(&|worker| {
            let scratch = scratch.claim(worker.index()..worker.index() + 1);
            for placed in placed().filter(|placed| (placed.first..=placed.last).contains(&worker.index())) {
                let (unit, scratch) = (unit_of(placed.span, placed.head), &mut *scratch);
                match placed.slot {
                    None => unit.attend(&out, scratch),
                    Some(slot) => {
                        let partitions = placed.partitions_of(worker.index()).map(|partition| {
                            let cell = slot * per_slot + partition;
                            (partition, partials.claim(cell..cell + 1))
                        });
                        unit.attend_and_keep(partitions, scratch);
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
            unit.combine_kept(kept, partial_len, &out, scratch);
        }
    });
}

/// Values of scratch memory one worker needs.
pub(super) fn scratch_len(config: &ModelConfig) -> usize {
    let max_queries = QuerySpan::MAX_ROWS * (config.num_heads / config.num_kv_heads);
    unit::scratch_len(max_queries, config.head_dim)
}

/// Values that keep the partitions of all units that can be cut, for contexts of at most `max_context`.
pub(super) fn partials_len(config: &ModelConfig, max_context: usize, num_threads: usize) -> usize {
    let max_queries = QuerySpan::MAX_ROWS * (config.num_heads / config.num_kv_heads);
    (num_threads - 1) * max_context.div_ceil(PARTITION) * partial_len(max_queries, config.head_dim)
}

/// Values that keep one partition: sums, then maximum and sum of weights, for each query.
fn partial_len(max_queries: usize, head_dim: usize) -> usize {
    max_queries * (unit::padded(head_dim) + 2)
}

struct Store<'a> {
    blocks: &'a SharedBlocks<'a>,
    layer: usize,
    /// `k`, `v`: `[rows.len(), width]`
    rows: &'a [Row],
    width: usize,
    k: &'a [f32],
    v: &'a [f32],
}

impl FloatOp for Store<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let mut values = self.k.chunks_exact(self.width).zip(self.v.chunks_exact(self.width));
        for rows in self.rows.chunk_by(|row, next| row.block == next.block) {
            let mut block = rows[0].block.map(|block| self.blocks.claim(block));
            for (row, (k, v)) in rows.iter().zip(&mut values) {
                if let Some(block) = &mut block {
                    block.write(self.layer, row.position, k, v);
                }
            }
        }
    }
}
