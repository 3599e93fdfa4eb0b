//! The head's first look: the products of the final hidden states with an 8-bit copy of the head, which say by proven
//! bounds which tokens can matter, and the exact logits of these few. Half the bytes of a 16-bit head are read, and
//! what is chosen is what the full-precision head would choose.
//!
//! Which tokens can matter is for the caller to say: a greedy choice, noise and top-k ask different questions.

use std::{convert::Infallible, ops::Range};

use super::{
    Model, Workspace,
    lm_head::{ROWS, ScoreTokens},
    workspace::Buffers,
};
use crate::{
    checkpoint::DenseMatrix,
    kernels::{
        Isa,
        packing::{ROW_TILE, rows_of_tiles},
        screen::{ScreenMatrix, Screened},
    },
    threads::{SharedRows, WorkerPool},
};

/// Tokens below which scoring them stays on the calling thread.
const MIN_TOKENS_TO_SPLIT: usize = 16;

/// Computes single logits of a row.
#[derive(Debug)]
pub struct Scorer<'a> {
    model: &'a Model,
    /// `[hidden_size]`
    hidden: &'a [f32],
    pool: &'a mut WorkerPool,
    /// `[num_threads, ROWS, hidden_size]` of scratch.
    decoded: &'a mut [f32],
}

impl<'a> Scorer<'a> {
    /// For row `row` of `hidden`, `[_, hidden_size]`.
    fn new(model: &'a Model, row: usize, hidden: &'a [f32], decoded: &'a mut [f32], pool: &'a mut WorkerPool) -> Self {
        let hidden_size = model.head().cols;
        Self { model, hidden: &hidden[row * hidden_size..][..hidden_size], pool, decoded }
    }

    /// `logits[i]` is that of the token `ids[i]`: the bits that [`Model::logits`] has there.
    ///
    /// # Panics
    /// When an id is outside the vocabulary, or the lengths differ.
    pub fn score(&mut self, ids: &[u32], logits: &mut [f32]) {
        assert_eq!(ids.len(), logits.len(), "a logit for each id");
        let (head, isa, hidden) = (self.model.head(), self.model.kernel.isa(), self.hidden);
        if ids.len() < MIN_TOKENS_TO_SPLIT {
            isa.run(ScoreTokens { isa, head, ids, hidden, decoded: self.decoded, out: logits });
            return;
        }
        let (out, decoded) = (SharedRows::new(logits, 1), SharedRows::new(self.decoded, ROWS * head.cols));
        self.pool.run(&|worker| {
            let share = worker.share(ids.len(), 1);
            let decoded = decoded.claim(worker.index()..worker.index() + 1);
            isa.run(ScoreTokens { isa, head, ids: &ids[share.clone()], hidden, decoded, out: out.claim(share) });
        });
    }
}

impl Model {
    /// Whether the head is large enough to have a screen.
    pub fn has_screen(&self) -> bool {
        self.screen.is_some()
    }

    /// Estimates all logits of rows `rows` among those that asked for them in the last `forward`, in batch order, for
    /// [`Model::screened`]. At most [`Workspace::MAX_SCREENED_ROWS`] at once.
    ///
    /// # Panics
    /// When the model has no screen, or `rows` reaches beyond the rows that asked or is longer than the maximum.
    pub fn screen(&self, rows: Range<usize>, workspace: &mut Workspace) {
        let screen = self.screen.as_ref().expect("a model whose head has a screen");
        assert!(workspace.fits(self) && rows.end <= workspace.num_logit_rows, "rows that asked for no logits");
        assert!(rows.len() <= Workspace::MAX_SCREENED_ROWS, "{} rows screened at once", rows.len());
        let (kernel, num_rows) = (self.kernel, rows.len());
        workspace.screened_rows = rows.clone();
        let buffers = &mut workspace.buffers;
        let hidden = &buffers.normed[rows.start * screen.cols()..rows.end * screen.cols()];
        buffers.screen_inputs.fill(hidden, kernel.screen_bits(num_rows), kernel.isa());
        let x = buffers.screen_inputs.view(num_rows);
        let screens = buffers.screens.shared(num_rows);
        workspace.pool.run_chunks(screen.rows().div_ceil(ROW_TILE), 1, &|tiles| {
            let rows = rows_of_tiles(tiles.clone(), screen.rows());
            kernel.screen(&screen.slice(rows), &x, &mut screens.claim(tiles));
        });
    }

    /// Computes logits of row `row` among those that asked for them in the last `forward`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn scorer<'a>(&'a self, row: usize, workspace: &'a mut Workspace) -> Scorer<'a> {
        assert!(workspace.fits(self) && row < workspace.num_logit_rows, "a row that asked for no logits");
        let Buffers { normed, head_rows, .. } = &mut workspace.buffers;
        Scorer::new(self, row, normed, head_rows, &mut workspace.pool)
    }

    /// What the last [`Model::screen`] says of row `row`, and its [`Model::scorer`].
    ///
    /// # Panics
    /// When it was not one of those screened.
    pub fn screened<'a>(&'a self, row: usize, workspace: &'a mut Workspace) -> (Screened<'a>, Scorer<'a>) {
        assert!(workspace.fits(self) && workspace.screened_rows.contains(&row), "a row that was not screened");
        let Buffers { normed, screens, head_rows, .. } = &mut workspace.buffers;
        let screened = screens.screened(row - workspace.screened_rows.start);
        (screened, Scorer::new(self, row, normed, head_rows, &mut workspace.pool))
    }
}

/// The 8-bit copy of `head`, whose pages are given back on the way: few of its rows will be read again, and both copies
/// need not be in memory at once.
pub(super) fn pack(head: &DenseMatrix, isa: Isa, pool: &mut WorkerPool) -> ScreenMatrix {
    const RELEASED_AT_ONCE: usize = 1024;
    let decode_row = |row: usize, out: &mut [f32]| {
        head.decode_row(row, out);
        let end = row + 1;
        if end.is_multiple_of(RELEASED_AT_ONCE) || end == head.rows {
            head.release_rows(row / RELEASED_AT_ONCE * RELEASED_AT_ONCE..end);
        }
        Ok::<(), Infallible>(())
    };
    let Ok(screen) = ScreenMatrix::pack(head.rows, head.cols, isa, pool, &decode_row);
    screen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::{DenseEncoding, MappedBytes},
        kernels::{self, screen::Selection},
        model::{rope::Rope, sparse::SparseLimits, test_config},
    };

    const VOCAB: usize = 300;
    const STATES: usize = 10_000;

    /// A sequence of numbers that look random: the top bits of a multiplicative generator.
    fn noise(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        move || {
            state = state.wrapping_mul(0xda94_2042_e4dd_58b5);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        }
    }

    /// A model that is only a head. Every third row equals its neighbour, every other third differs from it by one weight's
    /// last place: ties and near ties for any hidden state.
    fn head_only(kernel: &'static dyn kernels::TernaryKernel, pool: &mut WorkerPool) -> Model {
        let config = crate::checkpoint::ModelConfig { vocab_size: VOCAB, num_layers: 0, ..test_config() };
        let cols = config.hidden_size;
        let mut next = noise(7);
        let mut rows: Vec<f32> = (0..VOCAB * cols).map(|_| next()).collect();
        for row in 1..VOCAB {
            if row % 3 != 0 {
                rows.copy_within((row - 1) * cols..row * cols, row * cols);
            }
            if row % 3 == 2 {
                rows[row * cols + row % cols] = rows[row * cols + row % cols].next_up();
            }
        }
        let bytes: Vec<u8> = rows.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        let data = MappedBytes::from_memory(bytes.into());
        let embedding = DenseMatrix { rows: VOCAB, cols, encoding: DenseEncoding::F32, data };
        let screen = Some(pack(&embedding, kernel.isa(), pool));
        let (rope, output_norm, layout) = (Rope::new(&config), vec![1.0; cols], kernel.layout());
        let sparse_limits = SparseLimits::NONE;
        Model {
            config,
            kernel,
            rope,
            embedding,
            layers: Vec::new(),
            output_norm,
            head: None,
            screen,
            layout,
            sparse_limits,
            num_dropped_channels: 0,
        }
    }

    #[test]
    fn the_greedy_choice_is_that_of_the_full_precision_head() {
        for &kernel in kernels::available() {
            let mut pool = WorkerPool::new(2);
            let model = head_only(kernel, &mut pool);
            let mut workspace = Workspace::new(&model, Workspace::MAX_LOGIT_ROWS, 16, pool);
            let (mut selection, mut num_scored) = (Selection::default(), 0);
            for round in 0..STATES / Workspace::MAX_LOGIT_ROWS {
                let mut next = noise(round as u64 + 100);
                workspace.buffers.normed.fill_with(|| next().powi(3));
                workspace.num_logit_rows = Workspace::MAX_LOGIT_ROWS;
                let exact = model.logits(0..Workspace::MAX_LOGIT_ROWS, &mut workspace).to_vec();
                model.screen(0..Workspace::MAX_LOGIT_ROWS, &mut workspace);
                for (row, exact) in exact.chunks_exact(VOCAB).enumerate() {
                    let (screened, mut scorer) = model.screened(row, &mut workspace);
                    let mut best_known = [0.0];
                    scorer.score(selection.promising(&screened, 1), &mut best_known);
                    let ids = selection.reaching(&screened, best_known[0]);
                    let mut scores = vec![0.0; ids.len()];
                    scorer.score(ids, &mut scores);
                    let max = exact.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let best = exact.iter().position(|&logit| logit == max).expect("not empty");
                    let chosen = scores.iter().position(|&score| score == max).map(|index| ids[index] as usize);
                    assert_eq!(chosen, Some(best), "{} row {row} of round {round}", kernel.name());
                    for (&id, score) in ids.iter().zip(&scores) {
                        assert_eq!(score.to_bits(), exact[id as usize].to_bits());
                    }
                    num_scored += ids.len();
                }
            }
            assert!(num_scored < STATES * VOCAB / 10, "{num_scored} scores of {STATES} states");
        }
    }

    #[test]
    fn a_state_that_is_not_finite_rules_nothing_out() {
        let kernel = kernels::select("auto").expect("there is always one");
        let mut pool = WorkerPool::new(1);
        let model = head_only(kernel, &mut pool);
        let mut workspace = Workspace::new(&model, 1, 16, pool);
        workspace.buffers.normed.fill(1.0);
        workspace.buffers.normed[5] = f32::NAN;
        workspace.num_logit_rows = 1;
        model.screen(0..1, &mut workspace);
        let (screened, mut scorer) = model.screened(0, &mut workspace);
        let mut selection = Selection::default();
        assert_eq!(selection.reaching(&screened, f32::MAX).len(), VOCAB);
        scorer.score(&[], &mut []);
    }
}
