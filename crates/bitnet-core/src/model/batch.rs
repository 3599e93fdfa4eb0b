//! What one step computes: rows of many sequences, checked once so that the forward pass cannot fail.
//!
//! A row is one token of one sequence at one position; prefill chunks and decode rows stand side by side. Scheduling
//! policy does not live here, arithmetic neither.

use std::ops::Range;

use super::{Model, Workspace};
use crate::{
    ids::{BlockId, TokenId},
    kv_cache::{BLOCK_TOKENS, KvCache},
};

/// One sequence's share of a step: `tokens` at positions `start..start + tokens.len()`.
#[derive(Clone, Copy, Debug)]
pub struct BatchSequence<'a> {
    /// Tokens to compute, at least one.
    pub tokens: &'a [TokenId],
    /// Absolute position of the first; everything before is already in the cache.
    pub start: usize,
    /// Positions below this are in the cache already: their rows are computed for what follows them and not written.
    pub stored: usize,
    /// Blocks of positions `0..start + tokens.len()`, in order.
    pub block_table: &'a [BlockId],
    /// Which rows need logits.
    pub logits: LogitRows,
}

/// Which rows of a sequence's share need logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prompt chunk that is not the last.
    None,
    /// The last row.
    Last,
    /// Every row (echo with log-probabilities, a mean of hidden states).
    All,
}

/// A checked step: every id inside the vocabulary, every block inside the cache, every position inside the context.
#[derive(Debug)]
pub struct Batch {
    rows: Vec<Row>,
    /// Block tables of all sequences, one after the other.
    blocks: Vec<BlockId>,
    spans: Vec<QuerySpan>,
    logit_rows: Vec<usize>,
    num_blocks: usize,
}

/// One token to compute.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) token: TokenId,
    pub(super) position: usize,
    /// Where K and V of this position go; `None` when the cache holds them.
    pub(super) block: Option<BlockId>,
}

/// At most [`QuerySpan::MAX_ROWS`] consecutive rows of one sequence: they attend to the same blocks together, so each
/// block is decoded once for all of them.
#[derive(Clone, Debug)]
pub(super) struct QuerySpan {
    pub(super) rows: Range<usize>,
    /// Position of the first row.
    pub(super) start: usize,
    /// The sequence's blocks in [`Batch::blocks`].
    blocks: Range<usize>,
}

/// Why a batch cannot be built. Always a defect of the caller or a request that was not validated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// No sequence, or one without tokens.
    #[error("the batch or one of its sequences is empty")]
    Empty,
    /// More rows than the workspace was made for.
    #[error("{rows} rows exceed the {max} the workspace holds")]
    TooManyRows {
        /// Rows asked for.
        rows: usize,
        /// Rows allowed.
        max: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A position at or beyond the context, or not covered by the block table.
    #[error("position {position} is outside the context or the block table")]
    PositionOutOfRange {
        /// The position.
        position: usize,
    },
    /// A block id outside the cache, or one block in two places of the batch's writes.
    #[error("block {id} is outside the cache or written twice")]
    BlockOutOfRange {
        /// The id.
        id: u32,
    },
}

impl Batch {
    /// Checks `sequences` against the model, the cache and the workspace. Rows keep the order given.
    ///
    /// # Errors
    /// [`BatchError`], naming what is wrong.
    pub fn new(
        model: &Model,
        kv: &KvCache,
        workspace: &Workspace,
        sequences: &[BatchSequence<'_>],
    ) -> Result<Self, BatchError> {
        let limits = Limits {
            vocab_size: model.config().vocab_size,
            num_blocks: kv.num_blocks(),
            max_rows: workspace.max_batch_tokens(),
            max_context: workspace.max_context(),
        };
        Self::checked(&limits, sequences)
    }

    /// Rows that asked for logits, over all sequences.
    pub fn num_logit_rows(&self) -> usize {
        self.logit_rows.len()
    }

    /// The rows, in the order given.
    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Indices of the rows that asked for logits, ascending.
    pub(super) fn logit_rows(&self) -> &[usize] {
        &self.logit_rows
    }

    /// The spans of rows that attend together, in row order.
    pub(super) fn spans(&self) -> &[QuerySpan] {
        &self.spans
    }

    /// The blocks of positions `0..` of the span's sequence.
    pub(super) fn blocks(&self, span: &QuerySpan) -> &[BlockId] {
        &self.blocks[span.blocks.clone()]
    }

    /// Blocks in the cache this batch was checked against.
    pub(super) fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    pub(super) fn checked(limits: &Limits, sequences: &[BatchSequence<'_>]) -> Result<Self, BatchError> {
        let num_rows = sequences.iter().map(|s| s.tokens.len()).fold(0, usize::saturating_add);
        if sequences.is_empty() || sequences.iter().any(|s| s.tokens.is_empty()) {
            return Err(BatchError::Empty);
        }
        if num_rows > limits.max_rows {
            return Err(BatchError::TooManyRows { rows: num_rows, max: limits.max_rows });
        }
        let num_table_entries = sequences.iter().map(|s| s.block_table.len()).sum();
        let mut batch = Self {
            rows: Vec::with_capacity(num_rows),
            blocks: Vec::with_capacity(num_table_entries),
            spans: Vec::with_capacity(num_rows.div_ceil(QuerySpan::MAX_ROWS) + sequences.len()),
            logit_rows: Vec::with_capacity(num_rows),
            num_blocks: limits.num_blocks,
        };
        for sequence in sequences {
            limits.check(sequence)?;
            batch.push(sequence);
        }
        check_writes(sequences)?;
        Ok(batch)
    }

    /// Appends a sequence that [`Limits::check`] accepted.
    fn push(&mut self, sequence: &BatchSequence<'_>) {
        let first_row = self.rows.len();
        self.rows.extend(sequence.tokens.iter().zip(sequence.start..).map(|(&token, position)| Row {
            token,
            position,
            block: (position >= sequence.stored).then(|| sequence.block_table[position / BLOCK_TOKENS]),
        }));
        let last_row = self.rows.len() - 1;
        match sequence.logits {
            LogitRows::None => {}
            LogitRows::Last => self.logit_rows.push(last_row),
            LogitRows::All => self.logit_rows.extend(first_row..=last_row),
        }
        let blocks = self.blocks.len()..self.blocks.len() + sequence.block_table.len();
        self.blocks.extend_from_slice(sequence.block_table);
        self.spans.extend((first_row..=last_row).step_by(QuerySpan::MAX_ROWS).map(|row| QuerySpan {
            rows: row..(row + QuerySpan::MAX_ROWS).min(last_row + 1),
            start: sequence.start + row - first_row,
            blocks: blocks.clone(),
        }));
    }
}

/// No block is written by two sequences, or at two positions of one.
fn check_writes(sequences: &[BatchSequence<'_>]) -> Result<(), BatchError> {
    let written_by = |sequence: &BatchSequence<'_>| {
        let end = sequence.start + sequence.tokens.len();
        let first = sequence.start.max(sequence.stored);
        if first < end { first / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) } else { 0..0 }
    };
    let mut written: Vec<BlockId> = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        written.extend_from_slice(&sequence.block_table[written_by(sequence)]);
    }
    written.sort_unstable_by_key(|block| block.0);
    match written.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(BatchError::BlockOutOfRange { id: pair[0].0 }),
        None => Ok(()),
    }
}

impl QuerySpan {
    /// Rows of a span at most: enough to share the decoding of a block, few enough for their scores to stay in the
    /// second-level cache; and of four heads they are whole tiles.
    pub(super) const MAX_ROWS: usize = 96;

    /// Whether both are rows of one sequence.
    pub(super) fn same_sequence(&self, other: &Self) -> bool {
        self.blocks == other.blocks
    }

    /// Some of its rows, counted from its first.
    pub(super) fn part(&self, rows: Range<usize>) -> Self {
        let Range { start, end } = rows;
        Self { rows: self.rows.start + start..self.rows.start + end, start: self.start + start, ..self.clone() }
    }
}

/// What a batch is checked against.
pub(super) struct Limits {
    pub(super) vocab_size: usize,
    pub(super) num_blocks: usize,
    pub(super) max_rows: usize,
    pub(super) max_context: usize,
}

impl Limits {
    fn check(&self, sequence: &BatchSequence<'_>) -> Result<(), BatchError> {
        if let Some(&TokenId(id)) = sequence.tokens.iter().find(|token| token.index() >= self.vocab_size) {
            return Err(BatchError::TokenOutOfRange { id, vocab_size: self.vocab_size });
        }
        let last = sequence.start.saturating_add(sequence.tokens.len() - 1);
        let covered = self.max_context.min(sequence.block_table.len().saturating_mul(BLOCK_TOKENS));
        if last >= covered {
            return Err(BatchError::PositionOutOfRange { position: sequence.start.max(covered) });
        }
        match sequence.block_table.iter().find(|block| block.index() >= self.num_blocks) {
            Some(&BlockId(id)) => Err(BatchError::BlockOutOfRange { id }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { vocab_size: 10, num_blocks: 4, max_rows: 40, max_context: 48 };

    fn sequence<'a>(tokens: &'a [TokenId], start: usize, block_table: &'a [BlockId]) -> BatchSequence<'a> {
        BatchSequence { tokens, start, stored: 0, block_table, logits: LogitRows::Last }
    }

    fn check(sequences: &[BatchSequence<'_>]) -> Result<Batch, BatchError> {
        Batch::checked(&LIMITS, sequences)
    }

    #[test]
    fn rows_keep_their_order_and_know_their_blocks() {
        let limits = Limits { num_blocks: 16, max_rows: 110, max_context: 112, ..LIMITS };
        let prompt = [TokenId(3); 98];
        let tables = [[2, 0, 4, 5, 8, 9, 10], [1, 3, 6, 7, 11, 12, 13]].map(|table| table.map(BlockId));
        let decode = BatchSequence { logits: LogitRows::All, ..sequence(&prompt[..1], 16, &tables[1]) };
        let batch = Batch::checked(&limits, &[sequence(&prompt, 0, &tables[0]), decode]).expect("valid");
        assert_eq!(batch.logit_rows(), [97, 98]);
        assert_eq!(batch.num_logit_rows(), 2);
        let at = |row: usize| (batch.rows()[row].position, batch.rows()[row].block.expect("it is written"));
        assert_eq!(
            [at(0), at(15), at(16), at(98)],
            [(0, BlockId(2)), (15, BlockId(2)), (16, BlockId(0)), (16, BlockId(3))]
        );
        let spans: Vec<_> = batch.spans().iter().map(|s| (s.rows.clone(), s.start, batch.blocks(s)[0])).collect();
        assert_eq!(spans, [(0..96, 0, BlockId(2)), (96..98, 96, BlockId(2)), (98..99, 16, BlockId(1))]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let t = [TokenId(1); 41];
        let table = [BlockId(0), BlockId(1), BlockId(2), BlockId(3)];
        assert_eq!(check(&[]).expect_err("refused"), BatchError::Empty);
        assert_eq!(check(&[sequence(&[], 0, &table)]).expect_err("refused"), BatchError::Empty);
        assert_eq!(
            check(&[sequence(&t, 0, &table)]).expect_err("refused"),
            BatchError::TooManyRows { rows: 41, max: 40 }
        );
        assert_eq!(
            check(&[sequence(&[TokenId(10)], 0, &table)]).expect_err("refused"),
            BatchError::TokenOutOfRange { id: 10, vocab_size: 10 }
        );
        for (start, covered, position) in [(48, 4, 48), (usize::MAX, 4, usize::MAX), (16, 1, 16), (0, 0, 0)] {
            assert_eq!(
                check(&[sequence(&t[..1], start, &table[..covered])]).expect_err("refused"),
                BatchError::PositionOutOfRange { position }
            );
        }
        assert_eq!(
            check(&[sequence(&t[..1], 0, &[BlockId(4)])]).expect_err("refused"),
            BatchError::BlockOutOfRange { id: 4 }
        );
    }

    #[test]
    fn stored_positions_are_not_written() {
        let (t, table) = ([TokenId(1); 3], [BlockId(1), BlockId(2)]);
        let again = |table| BatchSequence { stored: 16, ..sequence(&t, 15, table) };
        let batch = check(&[again(&table), BatchSequence { stored: 16, ..sequence(&t[..1], 15, &table[..1]) }]);
        let blocks: Vec<_> = batch.expect("block 1 is only read").rows().iter().map(|row| row.block).collect();
        assert_eq!(blocks, [None, Some(BlockId(2)), Some(BlockId(2)), None]);
        assert!(check(&[again(&table), again(&[BlockId(3), BlockId(2)])]).is_err());
    }

    #[test]
    fn no_block_is_written_twice_but_any_may_be_read_twice() {
        let t = [TokenId(1); 17];
        let twice = BatchError::BlockOutOfRange { id: 1 };
        assert_eq!(check(&[sequence(&t, 0, &[BlockId(1), BlockId(1)])]).expect_err("refused"), twice);
        let (one, other) = ([BlockId(0), BlockId(1)], [BlockId(0), BlockId(2)]);
        assert_eq!(check(&[sequence(&t[..1], 16, &one), sequence(&t[..1], 17, &one)]).expect_err("refused"), twice);
        assert_eq!(check(&[sequence(&t[..1], 16, &one), sequence(&t[..1], 20, &one)]).expect_err("refused"), twice);
        assert!(check(&[sequence(&t[..1], 16, &one), sequence(&t[..1], 16, &other)]).is_ok(), "a shared prefix");
    }
}
