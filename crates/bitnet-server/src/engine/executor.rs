//! One step's arithmetic: [`ScheduledBatch`] -> `core::Batch` -> logits -> token. The trait is the whole contract between the
//! scheduler's side and the model's; tests have a fake one.

use bitnet_core::{
    Batch, Model, TokenId,
    kv_cache::KvCache,
    model::{BatchSequence, LogitRows, Workspace},
    sampling::{SampleKey, Sampler, TokenLogprobs},
};

use super::{
    EngineError, TokenEvent,
    scheduler::{ScheduledBatch, Share, blocks_of},
    sequence::Sequence,
};

/// Computes steps. Everything it says about a sequence depends on that sequence's tokens and parameters alone.
pub trait Executor: Send + 'static {
    /// Token ids are below this.
    fn vocab_size(&self) -> usize;

    /// Called once, on the thread that will compute every step.
    fn enter_thread(&mut self) {}

    /// Computes `batch`: one output a share, in order. An error ends that share's sequence and no other.
    fn execute(&mut self, batch: &ScheduledBatch<'_>) -> Vec<Result<StepOutput, EngineError>>;
}

/// What one share gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// When the request asked: log-probabilities of the prompt tokens that follow the tokens computed.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// The next token, when the share ended with the last known one and more are wanted.
    pub token: Option<TokenEvent>,
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
}

impl ModelExecutor {
    /// Owns all that a step touches.
    pub fn new(model: Model, kv: KvCache, workspace: Workspace) -> Self {
        let reader = RowReader { sampler: Sampler::new(model.config().vocab_size), masked: Vec::new() };
        Self { model, kv, workspace, reader }
    }

    /// The batch of those shares that fit the model. A share that does not is a defect of ours or a request that was not
    /// validated; it ends with an error, and alone.
    fn checked_batch(&self, shares: &[Share<'_>], outputs: &mut [Result<StepOutput, EngineError>]) -> Option<Batch> {
        let batch_of = |parts: &[BatchSequence<'_>]| Batch::new(&self.model, &self.kv, &self.workspace, parts);
        let parts: Vec<_> = shares.iter().map(batch_sequence).collect();
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

    fn execute(&mut self, batch: &ScheduledBatch<'_>) -> Vec<Result<StepOutput, EngineError>> {
        let shares = &batch.shares;
        let mut outputs = vec![Ok(StepOutput::default()); shares.len()];
        let Some(batch) = self.checked_batch(shares, &mut outputs) else { return outputs };
        self.model.forward(&batch, &mut self.kv, &mut self.workspace);

        // Rows that asked for logits, in the batch's order: (share, position of the row's token).
        let ran = |index: &usize| outputs[*index].is_ok();
        let rows: Vec<(usize, usize)> = (0..shares.len())
            .filter(ran)
            .flat_map(|index| logit_positions(&shares[index]).map(move |position| (index, position)))
            .collect();
        let has_screen = self.model.has_screen();
        let is_whole = |row: &(usize, usize)| !has_screen || shares[row.0].needs_whole_rows();
        let mut first = 0;
        for same in rows.chunk_by(|a, b| is_whole(a) == is_whole(b)) {
            if is_whole(&same[0]) {
                self.read_rows(first, same, shares, &mut outputs);
            } else {
                self.read_screened_rows(first, same, shares, &mut outputs);
            }
            first += same.len();
        }
        outputs
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
                let done = match &mut outputs[index] {
                    Ok(output) => self.reader.read(row, &shares[index], position, output),
                    Err(error) => Err(*error),
                };
                if let Err(error) = done {
                    outputs[index] = Err(error);
                }
            }
        }
    }

    /// As [`Self::read_rows`], for shares that want a token and nothing else: by the head's screen.
    fn read_screened_rows(
        &mut self,
        first: usize,
        rows: &[(usize, usize)],
        shares: &[Share<'_>],
        outputs: &mut [Result<StepOutput, EngineError>],
    ) {
        for (group, first) in
            rows.chunks(Workspace::MAX_SCREENED_ROWS).zip((first..).step_by(Workspace::MAX_SCREENED_ROWS))
        {
            self.model.screen(first..first + group.len(), &mut self.workspace);
            for (i, &(index, _)) in group.iter().enumerate() {
                let (sequence, screened) = (shares[index].sequence, self.workspace.screened(i));
                let (params, key) = (&sequence.request.sampling, sample_key(sequence));
                let ids = self.reader.sampler.candidates(screened.estimates, screened.radii, params, key);
                let logits = self.model.score(first + i, ids, &mut self.workspace);
                outputs[index] = match self.reader.sampler.sample_among(logits, params, key) {
                    Ok(token) => {
                        Ok(StepOutput { token: Some(TokenEvent { token, logprobs: None }), ..Default::default() })
                    }
                    Err(_) => Err(EngineError::NotFinite),
                };
            }
        }
    }
}

impl Share<'_> {
    /// Positions computed.
    fn positions(&self) -> std::ops::Range<usize> {
        let start = self.sequence.num_computed_tokens;
        start..start + self.num_tokens
    }

    /// Whether the next token is drawn from the last row.
    fn draws(&self) -> bool {
        self.sequence.request.max_tokens > 0 && self.positions().end == self.sequence.tokens.len()
    }

    /// Whether more than the next token is wanted of its rows, or that token depends on all logits.
    fn needs_whole_rows(&self) -> bool {
        let request = &self.sequence.request;
        let bans = self.sequence.generated().len() < request.min_tokens && !request.stop_tokens.is_empty();
        let ruled = self.sequence.constraint.is_some();
        self.scores_prompt() || request.logprobs.is_some() || bans || ruled || request.sampling.needs_whole_row()
    }

    /// Whether rows score prompt tokens.
    fn scores_prompt(&self) -> bool {
        self.sequence.scores_prompt() && self.sequence.num_computed_tokens + 1 < self.sequence.prompt_len()
    }
}

fn batch_sequence<'a>(share: &Share<'a>) -> BatchSequence<'a> {
    let positions = share.positions();
    let logits = match (share.scores_prompt(), share.draws()) {
        (true, _) => LogitRows::All,
        (false, true) => LogitRows::Last,
        (false, false) => LogitRows::None,
    };
    BatchSequence {
        tokens: &share.sequence.tokens[positions.clone()],
        start: positions.start,
        block_table: &share.sequence.block_table[..blocks_of(positions.end)],
        logits,
    }
}

/// The positions behind the rows that [`batch_sequence`] asks logits for.
fn logit_positions(share: &Share<'_>) -> std::ops::Range<usize> {
    let positions = share.positions();
    match batch_sequence(share).logits {
        LogitRows::All => positions,
        LogitRows::Last => positions.end - 1..positions.end,
        LogitRows::None => 0..0,
    }
}

impl RowReader {
    /// Scores the prompt token after `position`, or draws the token after it when it is the last known one.
    fn read(
        &mut self,
        logits: &[f32],
        share: &Share<'_>,
        position: usize,
        output: &mut StepOutput,
    ) -> Result<(), EngineError> {
        let sequence = share.sequence;
        let request = &*sequence.request;
        if let Some(&next) = sequence.tokens.get(position + 1) {
            let scored = self.sampler.logprobs(logits, next, request.prompt_logprobs.unwrap_or(0));
            output.prompt_logprobs.push(scored.map_err(|_| EngineError::NotFinite)?);
        } else if share.draws() {
            let token = self.draw(logits, sequence)?;
            let scored = request.logprobs.map(|top| self.sampler.logprobs(logits, token, top)).transpose();
            output.token = Some(TokenEvent { token, logprobs: scored.map_err(|_| EngineError::NotFinite)? });
        }
        Ok(())
    }

    /// The next token of `sequence`, which its constraint learns unless it is the last.
    fn draw(&mut self, logits: &[f32], sequence: &Sequence) -> Result<TokenId, EngineError> {
        let request = &*sequence.request;
        let (prompt, generated) = sequence.tokens.split_at(sequence.prompt_len());
        let banned = if generated.len() < request.min_tokens { &*request.stop_tokens } else { &[] };
        let mut constraint = sequence.constraint.as_ref().map(|constraint| constraint.borrow_mut());
        let row = match &mut constraint {
            None => logits,
            Some(constraint) => {
                let allowed = constraint.allowed().map_err(|_| EngineError::Constraint)?;
                allowed.apply(logits, &mut self.masked);
                &self.masked
            }
        };
        let drawn = self.sampler.sample(row, &request.sampling, prompt, generated, banned, sample_key(sequence));
        let token = drawn.map_err(|_| EngineError::NotFinite)?;
        if let Some(constraint) = &mut constraint
            && !request.stop_tokens.contains(&token)
            && generated.len() + 1 < request.max_tokens
        {
            constraint.accept(token);
        }
        Ok(token)
    }
}

/// Where the next token of `sequence` is drawn.
fn sample_key(sequence: &Sequence) -> SampleKey {
    SampleKey { choice: sequence.choice, position: sequence.tokens.len() as u32 }
}
