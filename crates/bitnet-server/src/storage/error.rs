//! Why something is not stored or not found.

use std::{io, path::Path};

/// Why something is not stored or not found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StorageError {
    /// There is no such file, or it is another client's.
    #[error("No such file: '{0}'.")]
    NoSuchFile(String),
    /// There is no such batch, or it is another client's.
    #[error("No such batch: '{0}'.")]
    NoSuchBatch(String),
    /// A batch that has ended cannot be cancelled.
    #[error("Batch '{0}' has ended and cannot be cancelled.")]
    Ended(String),
    /// A batch that is not finished reads the file.
    #[error("File '{0}' is the input of a batch that is not finished.")]
    InUse(String),
    /// The file is larger than files may be.
    #[error("The file is larger than the {0} bytes allowed (--max-file-bytes).")]
    TooLarge(u64),
    /// All files together are as large as they may be.
    #[error(
        "The server's files may take {0} bytes together (--max-data-bytes): delete files that are no longer needed."
    )]
    Full(u64),
    /// The client has as many as it may.
    #[error("A client may have {1} {0} here.")]
    TooMany(&'static str, usize),
    /// The disk is full.
    #[error("The server's disk is full: nothing was stored.")]
    NoSpace,
    /// The directory cannot be used at all.
    #[error("{0}")]
    Unusable(String),
    /// The disk failed.
    #[error("{0}")]
    Disk(String),
}

impl StorageError {
    /// What `error` at `path` means.
    pub(super) fn io(path: &Path, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            _ => Self::Disk(format!("{}: {error}", path.display())),
        }
    }
}
