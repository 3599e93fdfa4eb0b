//! The answers of a running batch: one file of answers, one of those that are errors.

use std::{collections::HashSet, fs, sync::Arc};

use super::{LineFile, Storage, StorageError, Stored, disk};
use crate::openai::{BatchObject, BatchUsage, FileObject, FilePurpose};

/// Which of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An answer.
    Answered,
    /// An answer that is an error.
    Failed,
}

/// The answers of one batch.
#[derive(Debug)]
pub struct Answers {
    storage: Arc<Storage>,
    batch: String,
    owner: String,
    /// By [`Outcome`], with the ids of the files.
    files: [(String, LineFile); 2],
}

impl Storage {
    /// Goes on with the answers of `batch`; with them, the custom ids that are done.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`], [`StorageError::Disk`].
    pub fn answers(self: &Arc<Self>, batch: &Stored<BatchObject>) -> Result<(Answers, HashSet<String>), StorageError> {
        let Some([answered, failed]) = batch.answers.clone() else {
            return Err(StorageError::Disk(format!("{} names no files for its answers", batch.object.id)));
        };
        let mut done = HashSet::new();
        let mut open = |id: String| {
            let path = self.data_path(&id);
            let before = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            let file = LineFile::open(&path, &mut done).map_err(|error| StorageError::io(&path, &error))?;
            self.give_bytes(before.saturating_sub(file.num_bytes()));
            Ok((id, file))
        };
        let files = [open(answered)?, open(failed)?];
        disk::sync_folder(&self.root.join(disk::FILES)).map_err(|error| StorageError::io(&self.root, &error))?;
        let (batch, owner) = (batch.object.id.clone(), batch.owner.clone());
        let answers = Answers { storage: Arc::clone(self), batch, owner, files };
        answers.count();
        Ok((answers, done))
    }
}

impl Answers {
    /// Adds one line, which ends with a line feed. It is on disk when this returns.
    ///
    /// # Errors
    /// [`StorageError::Full`], [`StorageError::NoSpace`], [`StorageError::Disk`]; then nothing of it is there.
    pub fn add(&mut self, outcome: Outcome, line: &[u8]) -> Result<(), StorageError> {
        let (id, file) = &mut self.files[outcome as usize];
        let more = line.len() as u64;
        self.storage.take_bytes(more)?;
        if let Err(error) = file.add(line) {
            self.storage.give_bytes(more);
            return Err(StorageError::io(&self.storage.data_path(id), &error));
        }
        self.count();
        Ok(())
    }

    /// Makes files of what is there and gives their ids, by [`Outcome`].
    ///
    /// # Errors
    /// [`StorageError::NoSpace`], [`StorageError::Disk`].
    pub fn finish(self, now: u64) -> Result<[Option<String>; 2], StorageError> {
        let mut ids = [None, None];
        for (((file_id, file), name), id) in self.files.into_iter().zip(["output", "error"]).zip(&mut ids) {
            if file.num_lines() == 0 {
                // If it stays, the next start removes it.
                let _ = fs::remove_file(self.storage.data_path(&file_id));
                continue;
            }
            // A crash may have come right after this line the last time.
            if !self.storage.has_file(&file_id) {
                let filename = format!("{}_{name}.jsonl", self.batch);
                let object =
                    FileObject::new(file_id.clone(), file.num_bytes(), now, filename, FilePurpose::BatchOutput);
                self.storage.put_file(self.owner.clone(), object)?;
            }
            *id = Some(file_id);
        }
        Ok(ids)
    }

    fn count(&self) {
        let [completed, failed] = self.files.each_ref().map(|(_, file)| file.num_lines());
        let mut usage = BatchUsage::default();
        self.files.iter().for_each(|(_, file)| usage += file.usage());
        self.storage.count(&self.batch, |batch| {
            batch.usage = usage;
            batch.request_counts.completed = completed;
            batch.request_counts.failed = failed;
        });
    }
}
