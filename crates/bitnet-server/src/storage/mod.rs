//! Files and batches on disk, under `--data-dir`. Blocking, for threads that may block; it knows nothing of models or HTTP.
//!
//! ```text
//! version              bitnet-data 1
//! lock                 held by the process that serves from here
//! files/ID.json        what a file is; written last, so that a file without it was never finished
//! files/ID.data        its bytes
//! batches/ID.json      what a batch is
//! ```
//!
//! What is here is all read at the start and kept in memory, within the limits below. A change is on disk (written beside,
//! synced, renamed) before anybody hears of it. Ids are made here and compared, never turned into paths unchecked.

mod answers;
mod disk;
mod error;
mod files;
mod ids;
mod line_file;
#[cfg(test)]
mod tests;

pub use answers::{Answers, Outcome};
pub use error::StorageError;
pub use files::Upload;
pub use line_file::LineFile;

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::{
    config::ClientId,
    openai::{BatchObject, BatchRequest, BatchStatus, FileObject, FilePurpose},
};

/// What may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageLimits {
    /// Bytes of one uploaded file.
    pub max_file_bytes: u64,
    /// Bytes of all files, of all clients, answers included.
    pub max_total_bytes: u64,
}

/// Files of one client.
const MAX_FILES: usize = 1000;
/// Batches of one client; beyond it the oldest finished one is forgotten.
const MAX_BATCHES: usize = 1000;
/// Unfinished batches of one client.
const MAX_OPEN_BATCHES: usize = 32;

/// Everything stored.
#[derive(Debug)]
pub struct Storage {
    root: PathBuf,
    limits: StorageLimits,
    index: Mutex<Index>,
    /// Bytes of all files, those being written included.
    bytes: AtomicU64,
    /// Told when a batch was created or cancelled.
    changed: Notify,
    _lock: File,
}

/// What there is, by id.
#[derive(Debug, Default)]
struct Index {
    files: BTreeMap<String, Stored<FileObject>>,
    batches: BTreeMap<String, Stored<BatchObject>>,
    /// Above every serial number in use.
    next_serial: u64,
}

/// An object and whose it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stored<T> {
    /// In hexadecimal digits.
    owner: String,
    /// Orders objects of the same second.
    serial: u64,
    /// For batches: where answers and errors are written while it runs.
    answers: Option<[String; 2]>,
    /// The object.
    pub object: T,
}

impl<T> Stored<T> {
    /// Whose it is, for figures and turns: work of a batch is not mixed up with what its owner asks directly.
    pub fn background_client(&self) -> ClientId {
        ClientId::background(&self.owner)
    }
}

impl Storage {
    /// Opens `root`, which is made if it is not there. What was not finished when the process ended is removed.
    ///
    /// # Errors
    /// [`StorageError::Unusable`] when it is of another version, locked, or cannot be written.
    pub fn open(root: &Path, limits: StorageLimits) -> Result<Self, StorageError> {
        let lock = disk::prepare(root)?;
        let mut index = Index {
            files: disk::read_all(&root.join(disk::FILES))?,
            batches: disk::read_all(&root.join(disk::BATCHES))?,
            next_serial: 0,
        };
        let serials = index.files.values().map(|file| file.serial);
        index.next_serial = serials.chain(index.batches.values().map(|batch| batch.serial)).max().unwrap_or(0) + 1;
        let open = index.batches.values().filter(|batch| !batch.object.status.is_final());
        let growing: Vec<_> = open.filter_map(|batch| batch.answers.as_ref()).flatten().cloned().collect();
        let keep = |id: &str| index.files.contains_key(id) || growing.iter().any(|other| other == id);
        let bytes = disk::sweep(&root.join(disk::FILES), keep)?;
        Ok(Self {
            root: root.to_owned(),
            limits,
            index: Mutex::new(index),
            bytes: AtomicU64::new(bytes),
            changed: Notify::new(),
            _lock: lock,
        })
    }

    /// What may be stored.
    pub fn limits(&self) -> StorageLimits {
        self.limits
    }

    /// Waits until a batch is created or cancelled. Cancel-safe; what came before it was called is remembered.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Makes a batch over an uploaded file of `client`.
    ///
    /// # Errors
    /// [`StorageError::NoSuchFile`], [`StorageError::TooMany`], [`StorageError::Disk`].
    pub fn create_batch(&self, client: ClientId, request: BatchRequest, now: u64) -> Result<BatchObject, StorageError> {
        let owner = client.to_hex();
        let mut index = self.index();
        let input = index.files.get(&request.input_file_id).filter(|file| file.owner == owner);
        if input.is_none_or(|file| file.object.purpose != FilePurpose::Batch) {
            return Err(StorageError::NoSuchFile(ids::shown(&request.input_file_id)));
        }
        let own = index.batches.values().filter(|batch| batch.owner == owner);
        let (count, open) =
            own.fold((0, 0), |(all, open), batch| (all + 1, open + usize::from(!batch.object.status.is_final())));
        if open >= MAX_OPEN_BATCHES {
            return Err(StorageError::TooMany("unfinished batches", MAX_OPEN_BATCHES));
        }
        if count >= MAX_BATCHES {
            self.forget_oldest_batch(&mut index, &owner)?;
        }
        let serial = index.take_serial();
        let object = BatchObject::new(ids::batch(), request, now);
        let answers = Some([ids::file(), ids::file()]);
        self.put_batch(&mut index, Stored { owner, serial, answers, object: object.clone() })?;
        self.changed.notify_one();
        Ok(object)
    }

    /// A batch of `client`.
    ///
    /// # Errors
    /// [`StorageError::NoSuchBatch`].
    pub fn batch(&self, client: ClientId, id: &str) -> Result<BatchObject, StorageError> {
        Ok(self.index().own_batch(client, id)?.object.clone())
    }

    /// The batches of `client`, oldest first.
    pub fn batches(&self, client: ClientId) -> Vec<BatchObject> {
        self.index().batches.own(client)
    }

    /// Cancels a batch of `client`.
    ///
    /// # Errors
    /// [`StorageError::NoSuchBatch`], [`StorageError::Ended`], [`StorageError::Disk`].
    pub fn cancel_batch(&self, client: ClientId, id: &str, now: u64) -> Result<BatchObject, StorageError> {
        let status = self.index().own_batch(client, id)?.object.status;
        match status {
            BatchStatus::Cancelling => {}
            BatchStatus::Validating | BatchStatus::InProgress => {
                self.change_batch(id, |batch| {
                    batch.status = BatchStatus::Cancelling;
                    batch.cancelling_at = Some(now);
                })?;
                self.changed.notify_one();
            }
            _ => return Err(StorageError::Ended(ids::shown(id))),
        }
        self.batch(client, id)
    }

    /// Batches that are not finished, oldest first.
    pub fn open_batches(&self) -> Vec<Stored<BatchObject>> {
        let index = self.index();
        let open = index.batches.values().filter(|batch| !batch.object.status.is_final());
        let mut open: Vec<_> = open.cloned().collect();
        open.sort_by_key(|batch| batch.serial);
        open
    }

    /// How far batch `id` is; `None` when it is gone.
    pub fn batch_status(&self, id: &str) -> Option<BatchStatus> {
        self.index().batches.get(id).map(|batch| batch.object.status)
    }

    /// Changes batch `id`, on disk first.
    ///
    /// # Errors
    /// [`StorageError::NoSuchBatch`], [`StorageError::Disk`].
    pub fn change_batch(&self, id: &str, change: impl FnOnce(&mut BatchObject)) -> Result<(), StorageError> {
        let mut index = self.index();
        let mut changed = index.batches.get(id).cloned().ok_or_else(|| StorageError::NoSuchBatch(ids::shown(id)))?;
        change(&mut changed.object);
        self.put_batch(&mut index, changed)
    }

    /// Changes batch `id` in memory: for counts, which the files of answers hold as well.
    pub fn count(&self, id: &str, change: impl FnOnce(&mut BatchObject)) {
        if let Some(batch) = self.index().batches.get_mut(id) {
            change(&mut batch.object);
        }
    }

    fn put_batch(&self, index: &mut Index, batch: Stored<BatchObject>) -> Result<(), StorageError> {
        disk::write_json(&self.root.join(disk::BATCHES), &batch.object.id, &batch)?;
        index.batches.insert(batch.object.id.clone(), batch);
        Ok(())
    }

    fn forget_oldest_batch(&self, index: &mut Index, owner: &str) -> Result<(), StorageError> {
        let finished = index.batches.values().filter(|batch| batch.owner == owner && batch.object.status.is_final());
        let Some(id) = finished.min_by_key(|batch| batch.serial).map(|batch| batch.object.id.clone()) else {
            return Err(StorageError::TooMany("batches", MAX_BATCHES));
        };
        disk::remove_json(&self.root.join(disk::BATCHES), &id)?;
        index.batches.remove(&id);
        Ok(())
    }

    /// Takes room for `more` bytes.
    fn take_bytes(&self, more: u64) -> Result<(), StorageError> {
        let max = self.limits.max_total_bytes;
        let room = |bytes: u64| bytes.checked_add(more).filter(|sum| *sum <= max);
        self.bytes
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, room)
            .map(|_| ())
            .map_err(|_| StorageError::Full(max))
    }

    fn give_bytes(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Index {
    fn take_serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial - 1
    }

    fn own_batch(&self, client: ClientId, id: &str) -> Result<&Stored<BatchObject>, StorageError> {
        let own = self.batches.get(id).filter(|batch| batch.owner == client.to_hex());
        own.ok_or_else(|| StorageError::NoSuchBatch(ids::shown(id)))
    }

    fn own_file(&self, client: ClientId, id: &str) -> Result<&Stored<FileObject>, StorageError> {
        let own = self.files.get(id).filter(|file| file.owner == client.to_hex());
        own.ok_or_else(|| StorageError::NoSuchFile(ids::shown(id)))
    }
}

/// What a client finds in a map of stored objects.
trait Own<T> {
    /// Oldest first.
    fn own(&self, client: ClientId) -> Vec<T>;
}

impl<T: Clone> Own<T> for BTreeMap<String, Stored<T>> {
    fn own(&self, client: ClientId) -> Vec<T> {
        let owner = client.to_hex();
        let mut own: Vec<_> = self.values().filter(|stored| stored.owner == owner).collect();
        own.sort_by_key(|stored| stored.serial);
        own.into_iter().map(|stored| stored.object.clone()).collect()
    }
}

/// A storage that many hold.
pub type SharedStorage = Arc<Storage>;
