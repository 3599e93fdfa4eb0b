//! One step's arithmetic: [`ScheduledBatch`] -> `core::Batch` -> logits -> token. The trait is the whole contract between the
//! scheduler's side and the model's; tests have a fake one.

use std::{
    borrow::Cow,
    cell::{RefCell, RefMut},
};

use bitnet_core::{
    Batch, Model, TokenId,
    checkpoint::Pooling,
    kv_cache::KvCache,
    model::{BatchSequence, LogitRows, Workspace},
    sampling::{SampleKey, Sampler, TokenLogprobs},
};

use super::{
    EngineError, TokenConstraint, TokenEvent,
    scheduler::{ScheduledBatch, Share, blocks_of},
};

/// Computes steps. Everything it says about a sequence depends on that sequence's tokens and parameters alone.
pub trait Executor: Send + 'static {
    /// Token ids are below this.
    fn vocab_size(&self) -> usize;

    /// Called once, on the thread that will compute every step.
    fn enter_thread(&mut self) {}

    /// Computes `batch`: one output a share, in order. An error ends that share's sequence and no other. `None` when it gave up
    /// on the way because the batch was not `is_wanted` any more: then nothing was computed.
    fn execute(&mut self, batch: &ScheduledBatch<'_>, is_wanted: &dyn Fn() -> bool) -> Option<StepOutputs>;
}

/// What each share of a step gave.
pub type StepOutputs = Vec<Result<StepOutput, EngineError>>;

/// What one share gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// When the request asked: log-probabilities of the prompt tokens that follow the tokens computed.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// When the request asked, and the share ended with the last token of the prompt: its vector.
    pub embedding: Option<Vec<f32>>,
    /// The next token, when the share ended with the last known one and more are wanted; then the one after each guess that
    /// came true, up to a stop token. They are those that would be drawn one by one.
    pub tokens: Vec<TokenEvent>,
}

/// The executor over `bitnet_core`.
#[derive(Debug)]
pub struct ModelExecutor {
    model: Model,
    kv: KvCache,
    workspace: Workspace,
    reader: RowReader,
}

/// What turns rows of logits into tokens.
#[derive(Debug)]
struct RowReader {
    sampler: Sampler,
    /// A row after a constraint; kept for its memory.
    masked: Vec<f32>,
    /// A row of which few logits are known; kept for its memory.
    few: Vec<f32>,
    /// The tokens before a row that verifies a guess; kept for its memory.
    known: Vec<TokenId>,
}

impl ModelExecutor {
    /// Owns all that a step touches.
    pub fn new(model: Model, kv: KvCache, workspace: Workspace) -> Self {
        let reader = RowReader {
            sampler: Sampler::new(model.config().vocab_size),
            masked: Vec::new(),
            few: Vec::new(),
            known: Vec::new(),
        };
        Self { model, kv, workspace, reader }
    }

    /// The batch of those shares that fit the model. A share that does not is a defect of ours or a request that was not
    /// validated; it ends with an error, and alone.
    fn checked_batch(&self, shares: &[Share<'_>], outputs: &mut [Result<StepOutput, EngineError>]) -> Option<Batch> {
        let batch_of = |parts: &[BatchSequence<'_>]| Batch::new(&self.model, &self.kv, &self.workspace, parts);
        let rows: Vec<_> = shares.iter().map(Share::rows).collect();
        let parts: Vec<_> = shares.iter().zip(&rows).map(|(share, rows)| batch_sequence(share, rows)).collect();
        match batch_of(&parts) {
            Ok(batch) => return Some(batch),
            Err(error) => tracing::error!(%error, "the model refused a step"),
        }
        let fits: Vec<bool> = parts.iter().map(|part| batch_of(std::slice::from_ref(part)).is_ok()).collect();
        for (output, _) in outputs.iter_mut().zip(&fits).filter(|(_, fits)| !**fits) {
            *output = Err(EngineError::Invalid);
        }
        let rest: Vec<_> = parts.iter().zip(&fits).filter(|(_, fits)| **fits).map(|(part, _)| *part).collect();
        let batch = batch_of(&rest).ok();
        if batch.is_none() {
            outputs.fill(Err(EngineError::Invalid));
        }
        batch
    }
}

impl Executor for ModelExecutor {
    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn enter_thread(&mut self) {
        self.workspace.pin_caller();
    }

    fn execute(&mut self, batch: &ScheduledBatch<'_>, is_wanted: &dyn Fn() -> bool) -> Option<StepOutputs> {
        let shares = &batch.shares;
        let mut outputs = vec![Ok(StepOutput::default()); shares.len()];
        let Some(batch) = self.checked_batch(shares, &mut outputs) else { return Some(outputs) };
        if !self.model.forward_while(&batch, &mut self.kv, &mut self.workspace, is_wanted) {
            return None;
        }

        // Rows that asked for logits, in the batch's order: (share, position of the row's token).
        let ran = |index: &usize| outputs[*index].is_ok();
        let rows: Vec<(usize, usize)> = (0..shares.len())
            .filter(ran)
            .flat_map(|index| logit_positions(&shares[index]).map(move |position| (index, position)))
            .collect();
        let most_few = self.model.has_screen().then(|| self.vocab_size() / FEW_OF_VOCAB);
        let readings: Vec<_> =
            rows.iter().map(|&(index, position)| shares[index].reading(position, most_few)).collect();
        let mut first = 0;
        for same in readings.chunk_by(Reading::is_read_with) {
            let rows = &rows[first..first + same.len()];
            match same[0] {
                Reading::Hidden => self.pool_rows(first, rows, shares, &mut outputs),
                Reading::Forced => pass_rows(rows, shares, &mut outputs),
                Reading::Whole => self.read_rows(first, rows, shares, &mut outputs),
                Reading::Few(_) | Reading::Screened => {
                    self.read_screened_rows(first, rows, same, shares, &mut outputs);
                }
            }
            first += same.len();
        }
        Some(outputs)
    }
}

/// The logits of this part of the vocabulary cost hardly anything beside a look at all of it.
const FEW_OF_VOCAB: usize = 128;

/// What a share wants of its rows that asked for logits.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Reading {
    /// What the logits would be made of.
    Hidden,
    /// Nothing: the next token is known.
    Forced,
    /// All logits.
    Whole,
    /// Those of the few tokens that its rule allows, these.
    Few(Vec<u32>),
    /// Those that matter for the next token, by the head's screen.
    Screened,
}

impl Reading {
    /// Whether rows of both are read at once.
    fn is_read_with(&self, other: &Self) -> bool {
        let by_screen = |reading: &Self| matches!(reading, Self::Few(_) | Self::Screened);
        self == other || by_screen(self) && by_screen(other)
    }
}

/// Reading the rows of one step that asked for logits: (share, position of the row's token), the `first` and the following.
impl ModelExecutor {
    fn read_rows(
        &mut self,
        first: usize,
        rows: &[(usize, usize)],
        shares: &[Share<'_>],
        outputs: &mut [Result<StepOutput, EngineError>],
    ) {
        let vocab_size = self.vocab_size();
        for (group, first) in rows.chunks(Workspace::MAX_LOGIT_ROWS).zip((first..).step_by(Workspace::MAX_LOGIT_ROWS)) {
            let logits = self.model.logits(first..first + group.len(), &mut self.workspace);
            for (&(index, position), row) in group.iter().zip(logits.chunks_exact(vocab_size)) {
                self.reader.read(row, &shares[index], position, &mut outputs[index]);
            }
        }
    }

    /// As [`Self::read_rows`], for shares that want a vector.
    fn pool_rows(
        &self,
        first: usize,
        rows: &[(usize, usize)],
        shares: &[Share<'_>],
        outputs: &mut [Result<StepOutput, EngineError>],
    ) {
        for (row, &(index, position)) in (first..).zip(rows) {
            let sequence = shares[index].sequence;
            let Some(pooled) = &sequence.pooled else { continue };
            pooled.borrow_mut().add(position, self.workspace.hidden_state(row));
            if position + 1 == sequence.prompt_len() {
                let embedding = pooled.borrow().embedding().ok_or(EngineError::NotFinite);
                outputs[index] =
                    embedding.map(|embedding| StepOutput { embedding: Some(embedding), ..StepOutput::default() });
            }
        }
    }

    /// As [`Self::read_rows`], for shares that want a token and nothing else: by the head's screen, unless `readings` say that
    /// none of them needs it.
    fn read_screened_rows(
        &mut self,
        first: usize,
        rows: &[(usize, usize)],
        readings: &[Reading],
        shares: &[Share<'_>],
        outputs: &mut [Result<StepOutput, EngineError>],
    ) {
        const MAX_ROWS: usize = Workspace::MAX_SCREENED_ROWS;
        let groups = rows.chunks(MAX_ROWS).zip(readings.chunks(MAX_ROWS));
        for ((group, readings), first) in groups.zip((first..).step_by(MAX_ROWS)) {
            if readings.contains(&Reading::Screened) {
                self.model.screen(first..first + group.len(), &mut self.workspace);
            }
            for (i, (&(index, position), reading)) in group.iter().zip(readings).enumerate() {
                let (share, output) = (&shares[index], &mut outputs[index]);
                if !share.reaches(position, output) {
                    continue;
                }
                let drawn = match reading {
                    Reading::Few(ids) => self.draw_of_few(first + i, ids, share, position),
                    _ => self.draw_screened(first + i, share, position),
                };
                share.note(drawn, output);
            }
        }
    }

    /// The token after `position`, with the logits of `ids`, all that the rule allows: those of the others would be excluded.
    /// `row` of the rows that asked for logits.
    fn draw_of_few(
        &mut self,
        row: usize,
        ids: &[u32],
        share: &Share<'_>,
        position: usize,
    ) -> Result<TokenEvent, EngineError> {
        let mut few = std::mem::take(&mut self.reader.few);
        few.clear();
        few.resize(self.vocab_size(), f32::NEG_INFINITY);
        self.model.scorer(row, &mut self.workspace).score(ids, &mut few[..ids.len()]);
        // To their places, the last first: ids ascend, so no place is before what is still to be moved.
        for (i, &id) in ids.iter().enumerate().rev() {
            few[id as usize] = std::mem::replace(&mut few[i], f32::NEG_INFINITY);
        }
        let drawn = self.reader.draw(&few, share, position);
        self.reader.few = few;
        drawn
    }

    /// The token after `position` by what the screen says of its row, and by all its logits where that is not enough.
    fn draw_screened(&mut self, row: usize, share: &Share<'_>, position: usize) -> Result<TokenEvent, EngineError> {
        let (params, key) = (&share.sequence.request.sampling, share.sample_key(position));
        let mut constraint = share.constraint();
        let allowed = constraint.as_mut().map(|constraint| constraint.allowed()).transpose();
        let allowed = allowed.map_err(|_| EngineError::Constraint)?;
        let (screened, mut scorer) = self.model.screened(row, &mut self.workspace);
        let score = &mut |ids: &[u32], logits: &mut [f32]| scorer.score(ids, logits);
        let drawn = self.reader.sampler.sample_screened(screened, allowed, params, key, score);
        let drawn = drawn.map_err(|_| EngineError::NotFinite)?;
        drop(constraint);
        let Some(token) = drawn else {
            let logits = self.model.logits(row..row + 1, &mut self.workspace);
            return self.reader.draw(logits, share, position);
        };
        share.accept(token, position);
        Ok(TokenEvent { token, logprobs: None })
    }
}

impl Share<'_> {
    /// Guesses computed after the known tokens.
    pub fn draft(&self) -> &[TokenId] {
        &self.sequence.draft.tokens[..self.num_drafted]
    }

    /// How many of them come whatever the model says.
    pub fn num_forced(&self) -> usize {
        self.sequence.draft.num_forced.min(self.num_drafted)
    }

    /// The token after `position` when it comes whatever the model says, and nobody asks how likely it was.
    fn forced_after(&self, position: usize) -> Option<TokenId> {
        let at = (position + 1).checked_sub(self.sequence.tokens.len())?;
        let asked = self.sequence.request.logprobs.is_some();
        self.draft()[..self.num_forced()].get(at).copied().filter(|_| !asked)
    }

    /// Positions computed, those of guesses included.
    fn positions(&self) -> std::ops::Range<usize> {
        let start = self.sequence.num_computed_tokens;
        start..start + self.num_tokens + self.num_drafted
    }

    /// The tokens at these positions.
    fn rows(&self) -> Cow<'_, [TokenId]> {
        let start = self.sequence.num_computed_tokens;
        let known = &self.sequence.tokens[start..start + self.num_tokens];
        if self.num_drafted == 0 { known.into() } else { [known, self.draft()].concat().into() }
    }

    /// Whether the next token is drawn from the last row, or with guesses the next ones from the last rows.
    fn draws(&self) -> bool {
        self.sequence.request.max_tokens > 0 && self.ends()
    }

    /// Whether its last token, guesses aside, is the last known one.
    fn ends(&self) -> bool {
        self.sequence.num_computed_tokens + self.num_tokens == self.sequence.tokens.len()
    }

    /// How its rows become a vector, if they do.
    fn pooling(&self) -> Option<Pooling> {
        self.sequence.request.pooling
    }

    /// Whether the row of `position` is one from which a token is drawn: the first, or one whose guess came true.
    fn reaches(&self, position: usize, output: &Result<StepOutput, EngineError>) -> bool {
        let (Ok(output), Some(at)) = (output, (position + 1).checked_sub(self.sequence.tokens.len())) else {
            return false;
        };
        let came_true = |event: &TokenEvent| {
            event.token == self.draft()[at - 1] && !self.sequence.request.stop_tokens.contains(&event.token)
        };
        self.draws() && output.tokens.len() == at && output.tokens.last().is_none_or(came_true)
    }

    /// Adds what was drawn. An error after the first token waits until its row is the first one: then it is said.
    fn note(&self, drawn: Result<TokenEvent, EngineError>, output: &mut Result<StepOutput, EngineError>) {
        match (drawn, output) {
            (Ok(token), Ok(output)) => output.tokens.push(token),
            (Err(_), Ok(output)) if !output.tokens.is_empty() => {}
            (Err(error), output) => *output = Err(error),
            (Ok(_), Err(_)) => {}
        }
    }

    /// Where the token after `position` is drawn.
    fn sample_key(&self, position: usize) -> SampleKey {
        SampleKey { choice: self.sequence.choice, position: position as u32 + 1 }
    }

    /// How its row of `position` is read, by a model with a screen if there is a number of tokens that are few.
    fn reading(&self, position: usize, most_few: Option<usize>) -> Reading {
        if self.sequence.pooled.is_some() {
            return Reading::Hidden;
        }
        if self.forced_after(position).is_some() {
            return Reading::Forced;
        }
        let Some(most_few) = most_few else { return Reading::Whole };
        let few = if self.is_first(position) { self.few_allowed(most_few) } else { None };
        match few {
            Some(ids) => Reading::Few(ids),
            None if self.needs_whole_rows() => Reading::Whole,
            None => Reading::Screened,
        }
    }

    /// Whether more than the next token is wanted of its rows, or that token depends on all logits.
    fn needs_whole_rows(&self) -> bool {
        let request = &self.sequence.request;
        let bans = self.sequence.generated().len() < request.min_tokens && !request.stop_tokens.is_empty();
        self.scores_prompt() || request.logprobs.is_some() || bans || request.sampling.needs_whole_row()
    }

    /// The tokens that its rule allows, if it has one and they are at most `most`, and nobody asks how likely they were among all.
    fn few_allowed(&self, most: usize) -> Option<Vec<u32>> {
        if self.sequence.request.logprobs.is_some() {
            return None;
        }
        let mut constraint = self.constraint()?;
        let allowed = constraint.allowed().ok()?;
        (allowed.len() <= most).then(|| allowed.ids().collect())
    }

    /// What its output has to look like, which nobody else is looking at.
    fn constraint(&self) -> Option<RefMut<'_, Box<dyn TokenConstraint>>> {
        self.sequence.constraint.as_ref().map(RefCell::borrow_mut)
    }

    /// Tells the constraint that `token` comes after `position`, unless the output ends with it.
    fn accept(&self, token: TokenId, position: usize) {
        let request = &self.sequence.request;
        let num_generated = position + 1 - self.sequence.prompt_len();
        let goes_on = !request.stop_tokens.contains(&token) && num_generated + 1 < request.max_tokens;
        if let Some(mut constraint) = self.constraint().filter(|_| goes_on) {
            constraint.accept(token);
        }
    }

    /// Whether the token after `position` is the first one to be drawn.
    fn is_first(&self, position: usize) -> bool {
        self.draws() && position + 1 == self.sequence.tokens.len()
    }

    /// Whether rows score prompt tokens.
    fn scores_prompt(&self) -> bool {
        self.sequence.scores_prompt() && self.sequence.num_computed_tokens + 1 < self.sequence.prompt_len()
    }
}

fn batch_sequence<'a>(share: &Share<'a>, rows: &'a [TokenId]) -> BatchSequence<'a> {
    let positions = share.positions();
    BatchSequence {
        tokens: rows,
        start: positions.start,
        stored: share.sequence.num_stored_tokens,
        block_table: &share.sequence.block_table[..blocks_of(positions.end)],
        logits: logit_rows(share),
    }
}

fn logit_rows(share: &Share<'_>) -> LogitRows {
    let all = share.scores_prompt() || share.num_drafted > 0 || share.pooling() == Some(Pooling::Mean);
    match (all, share.draws() || share.pooling().is_some() && share.ends()) {
        (true, _) => LogitRows::All,
        (false, true) => LogitRows::Last,
        (false, false) => LogitRows::None,
    }
}

/// The positions behind the rows that ask for logits.
fn logit_positions(share: &Share<'_>) -> std::ops::Range<usize> {
    let positions = share.positions();
    match logit_rows(share) {
        LogitRows::All => positions,
        LogitRows::Last => positions.end - 1..positions.end,
        LogitRows::None => 0..0,
    }
}

/// As [`ModelExecutor::read_rows`], for rows whose next token is known.
fn pass_rows(rows: &[(usize, usize)], shares: &[Share<'_>], outputs: &mut [Result<StepOutput, EngineError>]) {
    for &(index, position) in rows {
        let (share, output) = (&shares[index], &mut outputs[index]);
        let Some(token) = share.forced_after(position).filter(|_| share.reaches(position, output)) else { continue };
        share.accept(token, position);
        share.note(Ok(TokenEvent { token, logprobs: None }), output);
    }
}

impl RowReader {
    /// Scores the prompt token after `position`, or draws the token after it when it is the last known one, or a guess that
    /// came true.
    fn read(
        &mut self,
        logits: &[f32],
        share: &Share<'_>,
        position: usize,
        output: &mut Result<StepOutput, EngineError>,
    ) {
        let request = &*share.sequence.request;
        if let (Some(&next), Ok(scores)) = (share.sequence.tokens.get(position + 1), &mut *output) {
            match self.sampler.logprobs(logits, next, request.prompt_logprobs.unwrap_or(0)) {
                Ok(score) => scores.prompt_logprobs.push(score),
                Err(_) => *output = Err(EngineError::NotFinite),
            }
        } else if share.reaches(position, output) {
            share.note(self.draw(logits, share, position), output);
        }
    }

    /// The token after `position`, which the sequence's constraint learns unless it is the last.
    fn draw(&mut self, logits: &[f32], share: &Share<'_>, position: usize) -> Result<TokenEvent, EngineError> {
        let sequence = share.sequence;
        let request = &*sequence.request;
        let num_true = position + 1 - sequence.tokens.len();
        self.known.clear();
        self.known.extend_from_slice(&sequence.tokens);
        self.known.extend_from_slice(&share.draft()[..num_true]);
        let (prompt, generated) = self.known.split_at(sequence.prompt_len());
        let banned = if generated.len() < request.min_tokens { &*request.stop_tokens } else { &[] };
        let row = match share.constraint() {
            None => logits,
            Some(mut constraint) => {
                let allowed = constraint.allowed().map_err(|_| EngineError::Constraint)?;
                allowed.apply(logits, &mut self.masked);
                &self.masked
            }
        };
        let key = share.sample_key(position);
        let drawn = self.sampler.sample(row, &request.sampling, prompt, generated, banned, key);
        let token = drawn.map_err(|_| EngineError::NotFinite)?;
        let scored = request.logprobs.map(|top| self.sampler.logprobs(logits, token, top)).transpose();
        let logprobs = scored.map_err(|_| EngineError::NotFinite)?;
        share.accept(token, position);
        Ok(TokenEvent { token, logprobs })
    }
}
