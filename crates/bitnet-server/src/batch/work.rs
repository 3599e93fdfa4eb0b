//! Batches of clients, worked off while the server runs: a few lines at a time over all batches, in turn, and a line only
//! while nobody waits. What a restart interrupts goes on after it; a line that has its answer is not answered again.

use std::{collections::HashSet, io, pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinSet},
};

use super::{
    answered,
    input::{Lines, check},
};
use crate::{
    http::HttpState,
    openai::{BatchError, BatchErrors, BatchObject, BatchStatus, InputLine},
    service::{Phase, Service, unix_seconds},
    storage::{Answers, Outcome, SharedStorage, StorageError, Stored},
};

/// How often a batch looks whether anybody still waits.
const IDLE_CHECK: Duration = Duration::from_millis(50);

/// Works until it is dropped, `num_places` lines at a time.
pub(crate) async fn work_off(state: Arc<HttpState>, storage: SharedStorage, service: Arc<Service>, num_places: usize) {
    // First come, first served: batches that want a place take turns.
    let places = Arc::new(Semaphore::new(num_places));
    let mut begun = HashSet::new();
    let mut running = JoinSet::new();
    loop {
        let open = on_disk(&storage, |storage| Ok(storage.open_batches())).await.unwrap_or_default();
        for batch in open {
            if begun.insert(batch.object.id.clone()) {
                let (state, storage, service) = (Arc::clone(&state), Arc::clone(&storage), Arc::clone(&service));
                let places = Arc::clone(&places);
                running.spawn(Run { state, storage, service, places, batch }.run());
            }
        }
        // The numbers of batches and of lines in one are bounded by the storage.
        tokio::select! {
            () = storage.changed() => {}
            Some(Ok(id)) = running.join_next() => {
                if storage.batch_status(&id).is_none_or(BatchStatus::is_final) {
                    begun.remove(&id);
                }
            }
        }
    }
}

/// One batch from where it is to its end.
struct Run {
    state: Arc<HttpState>,
    storage: SharedStorage,
    service: Arc<Service>,
    places: Arc<Semaphore>,
    batch: Stored<BatchObject>,
}

/// How the lines of a batch came to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinesEnd {
    /// Every one has its answer, or the batch was cancelled.
    Done,
    /// The server ends; the rest waits for the next start.
    Interrupted,
}

impl Run {
    /// Gives the id back.
    async fn run(self) -> String {
        let id = self.batch.object.id.clone();
        if let Err(error) = self.to_the_end().await {
            self.fail(vec![not_stored(&id, &error)]).await;
        }
        id
    }

    async fn to_the_end(&self) -> Result<(), StorageError> {
        if self.batch.object.status == BatchStatus::Validating && !self.validate().await? {
            return Ok(());
        }
        let batch = self.batch.clone();
        let (answers, done) = on_disk(&self.storage, move |storage| storage.answers(&batch)).await?;
        let mut answers = Some(answers);
        let end = self.answer_lines(done, &mut answers).await;
        if end == Ok(LinesEnd::Interrupted) {
            return Ok(());
        }
        let id = self.batch.object.id.clone();
        // What was answered before the room ran out is kept all the same.
        let failure = end.err().map(|error| not_stored(&id, &error));
        on_disk(&self.storage, move |storage| {
            storage.change_batch(&id, |batch| {
                if batch.status == BatchStatus::InProgress {
                    batch.status = BatchStatus::Finalizing;
                    batch.finalizing_at = Some(unix_seconds());
                }
            })?;
            let files = answers.map_or(Ok([None, None]), |answers| answers.finish(unix_seconds()))?;
            storage.change_batch(&id, |batch| match failure {
                Some(error) => failed(batch, vec![error], files),
                None => finished(batch, files),
            })
        })
        .await
    }

    /// Looks at all lines; whether they are well.
    async fn validate(&self) -> Result<bool, StorageError> {
        let (endpoint, max_bytes) = (self.batch.object.endpoint, self.state.max_body_bytes());
        let (id, input) = (self.batch.object.id.clone(), self.batch.object.input_file_id.clone());
        let checked = on_disk(&self.storage, move |storage| {
            let lines = Lines::new(storage.input(&input)?, max_bytes);
            check(lines, Some(endpoint)).map_err(|error| StorageError::Disk(error.to_string()))
        });
        match checked.await? {
            Err(errors) => {
                self.fail(errors).await;
                Ok(false)
            }
            Ok(total) => {
                let begin = move |batch: &mut BatchObject| {
                    batch.request_counts.total = total;
                    if batch.status == BatchStatus::Validating {
                        batch.status = BatchStatus::InProgress;
                        batch.in_progress_at = Some(unix_seconds());
                    }
                };
                on_disk(&self.storage, move |storage| storage.change_batch(&id, begin)).await.map(|()| true)
            }
        }
    }

    async fn fail(&self, errors: Vec<BatchError>) {
        let id = self.batch.object.id.clone();
        let stored = on_disk(&self.storage, move |storage| {
            let fail = |batch: &mut BatchObject| failed(batch, errors.clone(), [None, None]);
            // Where not even that can be stored it is told all the same; the next start tries the batch again.
            storage.change_batch(&id, fail).inspect_err(|_| storage.count(&id, fail))
        });
        if let Err(error) = stored.await {
            tracing::error!(batch = self.batch.object.id, %error, "a batch's failure could not be stored");
        }
    }

    /// `answers` are taken only while the disk has them, and stay with it when its work ends early.
    async fn answer_lines(
        &self,
        done: HashSet<String>,
        answers: &mut Option<Answers>,
    ) -> Result<LinesEnd, StorageError> {
        let (input, max_bytes) = (self.batch.object.input_file_id.clone(), self.state.max_body_bytes());
        let lines = on_disk(&self.storage, move |storage| Ok(Lines::new(storage.input(&input)?, max_bytes)));
        let mut unread = Some((lines.await?, done));
        let mut under_way = JoinSet::new();
        let mut end = LinesEnd::Done;
        while let Some((lines, done)) = unread.take() {
            let (line, rest) = on_disk(&self.storage, move |_| next_line(lines, done)).await?;
            unread = rest;
            let Some(line) = line else { continue };
            let mut place = pin!(self.place());
            let place = loop {
                tokio::select! {
                    // What is answered is stored before more is begun.
                    biased;
                    Some(ended) = under_way.join_next() => end = end.and(self.keep(ended, answers).await?),
                    place = &mut place => break place,
                }
            };
            match (self.stops(), self.storage.batch_status(&self.batch.object.id)) {
                (true, _) => {
                    end = LinesEnd::Interrupted;
                    break;
                }
                (false, Some(BatchStatus::InProgress)) => {}
                (false, _) => break,
            }
            under_way.spawn(self.line(line, place));
        }
        while let Some(ended) = under_way.join_next().await {
            end = end.and(self.keep(ended, answers).await?);
        }
        Ok(end)
    }

    /// A place, once nobody else waits for one.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        while self.service.engine().status().waiting > 0 && !self.stops() {
            tokio::time::sleep(IDLE_CHECK).await;
        }
        place
    }

    fn stops(&self) -> bool {
        self.state.lifecycle.phase() != Phase::Ready
    }

    /// Answers `line`; `None` when the server ends first.
    fn line(
        &self,
        line: InputLine,
        place: Option<OwnedSemaphorePermit>,
    ) -> impl Future<Output = Answered> + Send + 'static {
        let (service, strict, client) =
            (Arc::clone(&self.service), self.state.strict_params(), self.batch.background_client());
        async move {
            let answer = answered(&service, &line, strict, client).await;
            drop(place);
            answer
        }
    }

    /// Stores what a line `ended` with.
    async fn keep(
        &self,
        ended: Result<Answered, JoinError>,
        answers: &mut Option<Answers>,
    ) -> Result<LinesEnd, StorageError> {
        let ended = ended.map_err(|error| StorageError::Disk(format!("a line ended early: {error}")))?;
        let Some((outcome, bytes)) = ended else { return Ok(LinesEnd::Interrupted) };
        let Some(mut taken) = answers.take() else { return Err(StorageError::Disk("the answers are gone".to_owned())) };
        let (taken, added) = on_disk(&self.storage, move |_| {
            let added = taken.add(outcome, &bytes);
            Ok((taken, added))
        })
        .await?;
        *answers = Some(taken);
        added.map(|()| LinesEnd::Done)
    }
}

impl LinesEnd {
    fn and(self, other: Self) -> Self {
        if self == Self::Done { other } else { self }
    }
}

/// What a client is told when `error` ends batch `id`.
fn not_stored(id: &str, error: &StorageError) -> BatchError {
    tracing::error!(batch = id, %error, "a batch failed");
    let message = match error {
        StorageError::Disk(_) | StorageError::Unusable(_) => "The server could not store the answers.".to_owned(),
        told => told.to_string(),
    };
    BatchError { code: "storage".to_owned(), message, param: None, line: None }
}

fn failed(batch: &mut BatchObject, errors: Vec<BatchError>, [output, error]: [Option<String>; 2]) {
    (batch.output_file_id, batch.error_file_id) = (output, error);
    batch.status = BatchStatus::Failed;
    batch.failed_at = Some(unix_seconds());
    batch.errors = Some(BatchErrors::new(errors));
}

fn finished(batch: &mut BatchObject, [output, errors]: [Option<String>; 2]) {
    (batch.output_file_id, batch.error_file_id) = (output, errors);
    if batch.status == BatchStatus::Cancelling {
        batch.status = BatchStatus::Cancelled;
        batch.cancelled_at = Some(unix_seconds());
    } else {
        batch.status = BatchStatus::Completed;
        batch.completed_at = Some(unix_seconds());
    }
}

/// `None`: the server ended first.
type Answered = Option<(Outcome, Vec<u8>)>;
type Unread = (Lines, HashSet<String>);

/// The next line that is not done, and what comes after it.
fn next_line(mut lines: Lines, done: HashSet<String>) -> Result<(Option<InputLine>, Option<Unread>), StorageError> {
    let failed = |error: io::Error| StorageError::Disk(error.to_string());
    while let Some(line) = lines.next().map_err(failed)? {
        // All lines were found well before the first was answered.
        if let Some(line) = line.ok().filter(|line| !done.contains(&line.custom_id)) {
            return Ok((Some(line), Some((lines, done))));
        }
    }
    Ok((None, None))
}

/// Runs `work` where it may wait for the disk.
async fn on_disk<T: Send + 'static>(
    storage: &SharedStorage,
    work: impl FnOnce(&SharedStorage) -> Result<T, StorageError> + Send + 'static,
) -> Result<T, StorageError> {
    let storage = Arc::clone(storage);
    let done = tokio::task::spawn_blocking(move || work(&storage)).await;
    done.unwrap_or_else(|error| Err(StorageError::Disk(format!("disk work ended early: {error}"))))
}
