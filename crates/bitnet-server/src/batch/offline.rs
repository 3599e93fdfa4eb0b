//! A batch without a server: lines of one file in, lines of another out. An output that is there already is continued.

use std::{
    cell::Cell,
    collections::HashSet,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use futures_util::{StreamExt, stream};

use super::{
    answered,
    input::{Lines, check},
};
use crate::{
    config::ClientId,
    openai::{BatchError, InputLine},
    service::Service,
    storage::{LineFile, Outcome},
};

/// What became of the lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OfflineSummary {
    /// Lines of the input.
    pub total: u64,
    /// Of them, how many had their answer already.
    pub skipped: u64,
    /// Answered now.
    pub answered: u64,
    /// Of them, how many with an error.
    pub failed: u64,
}

/// Why a batch ended early.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// The input is not there.
    #[error("{0}: {1}")]
    NoInput(PathBuf, io::Error),
    /// A line of the input is not what it should be.
    #[error("{path}: line {line}: {message}", line = .error.line.unwrap_or(0), message = .error.message)]
    BadLine {
        /// The input.
        path: PathBuf,
        /// What is wrong.
        error: BatchError,
    },
    /// The output cannot be written.
    #[error("{0}: {1}")]
    Output(PathBuf, io::Error),
    /// The engine ended.
    #[error("the engine has stopped")]
    EngineStopped,
}

/// Answers the lines of `input` into `output`, `num_places` at a time; `progress(done, total)` is told of each.
///
/// # Errors
/// [`OfflineError`]; answers that are in the output stay there.
pub async fn run_offline(
    service: &Service,
    input: &Path,
    output: &Path,
    max_line_bytes: usize,
    num_places: usize,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<OfflineSummary, OfflineError> {
    let open = || File::open(input).map_err(|error| OfflineError::NoInput(input.to_owned(), error));
    let unreadable = |error| OfflineError::NoInput(input.to_owned(), error);
    let unwritable = |error| OfflineError::Output(output.to_owned(), error);
    let bad = |error| OfflineError::BadLine { path: input.to_owned(), error };
    let total = match check(Lines::new(open()?, max_line_bytes), None).map_err(unreadable)? {
        Ok(total) => total,
        Err(errors) => return Err(errors.into_iter().next().map_or(OfflineError::EngineStopped, bad)),
    };
    let mut done = HashSet::new();
    let mut file = LineFile::open(output, &mut done).map_err(unwritable)?;
    let mut summary = OfflineSummary { total, skipped: 0, answered: 0, failed: 0 };

    let mut lines = Lines::new(open()?, max_line_bytes);
    let skipped = Cell::new(0);
    // Read as they are needed: the input may be larger than memory.
    let unanswered = std::iter::from_fn(|| {
        loop {
            match lines.next().map_err(unreadable).transpose()? {
                Ok(Ok(line)) if done.contains(&line.custom_id) => skipped.set(skipped.get() + 1),
                Ok(line) => return Some(line.map_err(bad)),
                Err(error) => return Some(Err(error)),
            }
        }
    });
    let answer = |line: Result<InputLine, OfflineError>| async move {
        answered(service, &line?, false, ClientId::local()).await.ok_or(OfflineError::EngineStopped)
    };
    let mut answers = stream::iter(unanswered).map(answer).buffer_unordered(num_places);
    progress(0, total);
    while let Some(answer) = answers.next().await {
        let (outcome, bytes) = answer?;
        file.add(&bytes).map_err(unwritable)?;
        summary.answered += 1;
        summary.failed += u64::from(outcome == Outcome::Failed);
        progress(skipped.get() + summary.answered, total);
    }
    drop(answers);
    summary.skipped = skipped.get();
    Ok(summary)
}
