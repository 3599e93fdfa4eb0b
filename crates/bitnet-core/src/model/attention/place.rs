//! Which worker does what: units of work in a fixed order, cut into equal shares of their cost, between partitions where need be.

use super::{PARTITION, QuerySpan};

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

/// All units: sequence by sequence, and head by head within one, for all its spans read the same keys and values. Balanced by
/// visible positions: a partition belongs to the worker in whose equal share of the total cost its middle lies.
pub(super) fn place(spans: &[QuerySpan], num_kv_heads: usize, num_threads: usize) -> impl Iterator<Item = Placed<'_>> {
    let cost = |span: &QuerySpan| span.rows.len() * (span.start + span.rows.len());
    let total = spans.iter().map(cost).sum::<usize>() * num_kv_heads;
    let (mut before, mut num_cut) = (0, 0);
    let sequences = spans.chunk_by(QuerySpan::same_sequence);
    let units = sequences
        .flat_map(move |spans| (0..num_kv_heads).flat_map(move |head| spans.iter().map(move |span| (span, head))));
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

    pub(super) fn partitions_of(&self, worker: usize) -> impl Iterator<Item = usize> + '_ {
        (0..num_partitions(self.span)).filter(move |&partition| self.worker_of(partition) == worker)
    }
}
