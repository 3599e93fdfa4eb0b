//! The directory itself: version, lock, and objects that are there whole or not at all.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use super::{StorageError, Stored, ids};

pub(super) const FILES: &str = "files";
pub(super) const BATCHES: &str = "batches";
/// What the file `version` says. Another number means another layout.
const VERSION: &str = "bitnet-data 1\n";

/// Makes `root` ready; the lock is held as long as the file is open.
pub(super) fn prepare(root: &Path) -> Result<File, StorageError> {
    let unusable = |error: io::Error| StorageError::Unusable(format!("{}: {error}", root.display()));
    for folder in [FILES, BATCHES] {
        fs::create_dir_all(root.join(folder)).map_err(unusable)?;
    }
    let lock = File::create(root.join("lock")).map_err(unusable)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let message = format!("{} is in use by another server: give each its own", root.display());
            return Err(StorageError::Unusable(message));
        }
        Err(TryLockError::Error(error)) => return Err(unusable(error)),
    }
    let version = root.join("version");
    match fs::read_to_string(&version) {
        Ok(text) if text == VERSION => {}
        Ok(text) => {
            let found: String = text.trim().chars().take(40).collect();
            let message =
                format!("{} holds data of layout '{found}', this server reads '{}'", root.display(), VERSION.trim());
            return Err(StorageError::Unusable(message));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            write_whole(&version, VERSION.as_bytes()).map_err(unusable)?;
        }
        Err(error) => return Err(unusable(error)),
    }
    Ok(lock)
}

/// Reads every object of `folder`. One that cannot be read is left alone and not served.
pub(super) fn read_all<T: DeserializeOwned>(folder: &Path) -> Result<BTreeMap<String, Stored<T>>, StorageError> {
    let mut found = BTreeMap::new();
    for path in entries(folder)? {
        let (Some(id), Some("json")) = (stem(&path), extension(&path)) else { continue };
        let object = fs::read(&path).map_err(|error| error.to_string());
        match object.and_then(|bytes| serde_json::from_slice(&bytes).map_err(|error| error.to_string())) {
            Ok(object) => {
                found.insert(id.to_owned(), object);
            }
            Err(error) => tracing::error!(path = %path.display(), error, "a stored object cannot be read"),
        }
    }
    Ok(found)
}

/// Removes what was being written when the process ended; gives the bytes of what stays.
pub(super) fn sweep(folder: &Path, keep: impl Fn(&str) -> bool) -> Result<u64, StorageError> {
    let mut bytes = 0;
    for path in entries(folder)? {
        let failed = |error: io::Error| StorageError::io(&path, &error);
        match extension(&path) {
            Some("data") if stem(&path).is_some_and(&keep) => bytes += fs::metadata(&path).map_err(failed)?.len(),
            Some("data" | "tmp") => fs::remove_file(&path).map_err(failed)?,
            _ => {}
        }
    }
    Ok(bytes)
}

/// Paths in `folder` whose names were made here.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, StorageError> {
    let failed = |error: io::Error| StorageError::io(folder, &error);
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if stem(&path).is_some_and(ids::is_ours) {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn stem(path: &Path) -> Option<&str> {
    path.file_stem()?.to_str()
}

fn extension(path: &Path) -> Option<&str> {
    path.extension()?.to_str()
}

/// Writes `object` as `ID.json`: there is the old one or the new one, whatever happens.
pub(super) fn write_json(folder: &Path, id: &str, object: &impl Serialize) -> Result<(), StorageError> {
    let path = folder.join(format!("{id}.json"));
    let bytes = serde_json::to_vec(object).map_err(|error| StorageError::Disk(error.to_string()))?;
    write_whole(&path, &bytes).map_err(|error| StorageError::io(&path, &error))
}

pub(super) fn remove_json(folder: &Path, id: &str) -> Result<(), StorageError> {
    let path = folder.join(format!("{id}.json"));
    fs::remove_file(&path).and_then(|()| sync_folder(folder)).map_err(|error| StorageError::io(&path, &error))
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("tmp");
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    if let Err(error) = written.and_then(|()| fs::rename(&beside, path)) {
        // It may not be there; a full disk still lets go of files.
        let _ = fs::remove_file(&beside);
        return Err(error);
    }
    path.parent().map_or(Ok(()), sync_folder)
}

/// Makes the names in `folder` last.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
