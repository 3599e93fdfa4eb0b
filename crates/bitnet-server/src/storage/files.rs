//! Files: uploaded piece by piece, there when whole, read again, deleted.

use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
    sync::Arc,
};

use super::{MAX_FILES, Own, Storage, StorageError, Stored, disk, ids};
use crate::{
    config::ClientId,
    openai::{FileObject, FilePurpose},
};

/// A file that is arriving. Dropped before [`Upload::keep`], it was never there.
#[derive(Debug)]
pub struct Upload {
    storage: Arc<Storage>,
    id: String,
    file: File,
    bytes: u64,
    kept: bool,
}

impl Upload {
    /// Adds `piece`.
    ///
    /// # Errors
    /// [`StorageError::TooLarge`], [`StorageError::Full`], [`StorageError::NoSpace`], [`StorageError::Disk`].
    pub fn write(&mut self, piece: &[u8]) -> Result<(), StorageError> {
        let max = self.storage.limits.max_file_bytes;
        let more = piece.len() as u64;
        if self.bytes + more > max {
            return Err(StorageError::TooLarge(max));
        }
        self.storage.take_bytes(more)?;
        self.bytes += more;
        self.file.write_all(piece).map_err(|error| StorageError::io(&self.storage.data_path(&self.id), &error))
    }

    /// The file is whole.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`], [`StorageError::Disk`], [`StorageError::TooMany`].
    pub fn keep(mut self, client: ClientId, filename: String, now: u64) -> Result<FileObject, StorageError> {
        let storage = Arc::clone(&self.storage);
        self.file.sync_all().map_err(|error| StorageError::io(&storage.data_path(&self.id), &error))?;
        let object = FileObject::new(self.id.clone(), self.bytes, now, filename, FilePurpose::Batch);
        storage.put_file(client.to_hex(), object.clone())?;
        self.kept = true;
        Ok(object)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.kept {
            self.storage.give_bytes(self.bytes);
            // If it stays, the next start removes it.
            let _ = fs::remove_file(self.storage.data_path(&self.id));
        }
    }
}

impl Storage {
    /// Begins to store a file.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`], [`StorageError::Disk`].
    pub fn upload(self: &Arc<Self>) -> Result<Upload, StorageError> {
        let id = ids::file();
        let path = self.data_path(&id);
        let file = File::create_new(&path).map_err(|error| StorageError::io(&path, &error))?;
        Ok(Upload { storage: Arc::clone(self), id, file, bytes: 0, kept: false })
    }

    /// A file of `client`.
    ///
    /// # Errors
    /// [`StorageError::NoSuchFile`].
    pub fn file(&self, client: ClientId, id: &str) -> Result<FileObject, StorageError> {
        Ok(self.index().own_file(client, id)?.object.clone())
    }

    /// The files of `client`, oldest first.
    pub fn files(&self, client: ClientId) -> Vec<FileObject> {
        self.index().files.own(client)
    }

    /// The bytes of a file of `client`.
    ///
    /// # Errors
    /// [`StorageError::NoSuchFile`], [`StorageError::Disk`].
    pub fn content(&self, client: ClientId, id: &str) -> Result<(FileObject, File), StorageError> {
        let object = self.file(client, id)?;
        Ok((object, self.open_data(id)?))
    }

    /// The bytes of the input of a batch.
    ///
    /// # Errors
    /// [`StorageError::NoSuchFile`], [`StorageError::Disk`].
    pub fn input(&self, id: &str) -> Result<File, StorageError> {
        if !self.has_file(id) {
            return Err(StorageError::NoSuchFile(ids::shown(id)));
        }
        self.open_data(id)
    }

    /// Deletes a file of `client`.
    ///
    /// # Errors
    /// [`StorageError::NoSuchFile`], [`StorageError::InUse`], [`StorageError::Disk`].
    pub fn delete_file(&self, client: ClientId, id: &str) -> Result<(), StorageError> {
        let mut index = self.index();
        let bytes = index.own_file(client, id)?.object.bytes;
        let open = index.batches.values().filter(|batch| !batch.object.status.is_final());
        if open.map(|batch| &batch.object.input_file_id).any(|input| input == id) {
            return Err(StorageError::InUse(ids::shown(id)));
        }
        disk::remove_json(&self.root.join(disk::FILES), id)?;
        index.files.remove(id);
        let path = self.data_path(id);
        fs::remove_file(&path).map_err(|error| StorageError::io(&path, &error))?;
        self.give_bytes(bytes);
        Ok(())
    }

    /// Makes a file of bytes that are there.
    pub(super) fn put_file(&self, owner: String, object: FileObject) -> Result<(), StorageError> {
        let mut index = self.index();
        let own = index.files.values().filter(|file| file.owner == owner).count();
        // What a batch gave is always kept: it was asked for before.
        if own >= MAX_FILES && object.purpose == FilePurpose::Batch {
            return Err(StorageError::TooMany("files", MAX_FILES));
        }
        let stored = Stored { owner, serial: index.take_serial(), answers: None, object };
        disk::write_json(&self.root.join(disk::FILES), &stored.object.id, &stored)?;
        index.files.insert(stored.object.id.clone(), stored);
        Ok(())
    }

    pub(super) fn has_file(&self, id: &str) -> bool {
        self.index().files.contains_key(id)
    }

    fn open_data(&self, id: &str) -> Result<File, StorageError> {
        let path = self.data_path(id);
        File::open(&path).map_err(|error| StorageError::io(&path, &error))
    }

    /// `id` was made here.
    pub(super) fn data_path(&self, id: &str) -> PathBuf {
        self.root.join(disk::FILES).join(format!("{id}.data"))
    }
}
