//! Which worker does what, of units of work in a fixed order. Where they have many pieces, all small, workers take these as they
//! find time. Else they are cut into equal shares of their cost, between partitions where need be.

use std::ops::Range;

use super::{PARTITION, QuerySpan};

/// Rows of a piece of a unit.
const PIECE_ROWS: usize = 16;
/// Workers take pieces where an equal share of the cost is that of so many of the largest at least: the one that finishes first
/// waits for no longer than one of them takes.
const MIN_PIECES: usize = 8;

pub(super) fn num_partitions(span: &QuerySpan) -> usize {
    (span.start + span.rows.len()).div_ceil(PARTITION)
}

/// A unit of work (span, K/V head) and the workers it falls to.
pub(super) struct Placed<'a> {
    pub(super) span: &'a QuerySpan,
    pub(super) head: usize,
    /// The workers of the first and the last partition.
    pub(super) first: usize,
    pub(super) last: usize,
    /// Where its partitions are kept when these differ: there are fewer such units than workers.
    pub(super) slot: Option<usize>,
    /// Cost of all units before, and of all units; the number of workers.
    before: usize,
    total: usize,
    num_threads: usize,
}

/// All units: sequence by sequence, and head by head within one, for all its spans read the same keys and values.
fn units(spans: &[QuerySpan], num_kv_heads: usize) -> impl Iterator<Item = (&QuerySpan, usize)> {
    let sequences = spans.chunk_by(QuerySpan::same_sequence);
    sequences.flat_map(move |spans| (0..num_kv_heads).flat_map(move |head| spans.iter().map(move |span| (span, head))))
}

/// Positions that `num_rows` of the rows see, those up to the last counted for each.
fn cost(span: &QuerySpan, num_rows: usize) -> usize {
    num_rows * (span.start + span.rows.len())
}

fn total_cost(spans: &[QuerySpan], num_kv_heads: usize) -> usize {
    spans.iter().map(|span| cost(span, span.rows.len())).sum::<usize>() * num_kv_heads
}

/// Pieces of all units; `None` where workers had better have fixed shares.
pub(super) fn num_pieces(spans: &[QuerySpan], num_kv_heads: usize, num_threads: usize) -> Option<usize> {
    let largest = spans.iter().map(|span| cost(span, span.rows.len().min(PIECE_ROWS))).max()?;
    let are_many = MIN_PIECES * num_threads * largest <= total_cost(spans, num_kv_heads);
    (num_threads > 1 && are_many).then(|| spans.iter().map(pieces_of).sum::<usize>() * num_kv_heads)
}

fn pieces_of(span: &QuerySpan) -> usize {
    span.rows.len().div_ceil(PIECE_ROWS)
}

/// The units, or what is in `chunk` of them, and their heads.
pub(super) fn units_of(
    spans: &[QuerySpan],
    num_kv_heads: usize,
    chunk: Range<usize>,
) -> impl Iterator<Item = (QuerySpan, usize)> {
    let mut before = 0;
    units(spans, num_kv_heads).filter_map(move |(span, head)| {
        let first = before;
        before += pieces_of(span);
        let pieces = chunk.start.max(first)..chunk.end.min(before);
        let bound = |piece: usize| span.rows.len().min((piece - first) * PIECE_ROWS);
        (!pieces.is_empty()).then(|| (span.part(bound(pieces.start)..bound(pieces.end)), head))
    })
}

/// All units in fixed shares, balanced by visible positions: a partition belongs to the worker in whose equal share of the total
/// cost its middle lies.
pub(super) fn place(spans: &[QuerySpan], num_kv_heads: usize, num_threads: usize) -> impl Iterator<Item = Placed<'_>> {
    let total = total_cost(spans, num_kv_heads);
    let (mut before, mut num_cut) = (0, 0);
    units(spans, num_kv_heads).map(move |(span, head)| {
        let mut placed = Placed { span, head, first: 0, last: 0, slot: None, before, total, num_threads };
        (placed.first, placed.last) = (placed.worker_of(0), placed.worker_of(num_partitions(span) - 1));
        if placed.first != placed.last {
            placed.slot = Some(num_cut);
            num_cut += 1;
        }
        before += cost(span, span.rows.len());
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

    pub(super) fn partitions_of(&self, worker: usize) -> impl Iterator<Item = usize> + '_ {
        (0..num_partitions(self.span)).filter(move |&partition| self.worker_of(partition) == worker)
    }
}
