//! `/v1/files`: a stored file as it is told, and pages of lists.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A stored file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileObject {
    /// `file-...`.
    pub id: String,
    /// Always `file`.
    #[serde(skip_deserializing, default = "file")]
    pub object: &'static str,
    /// Its size.
    pub bytes: u64,
    /// Seconds since 1970.
    pub created_at: u64,
    /// As its owner named it; never part of a path.
    pub filename: String,
    /// What it is for.
    pub purpose: FilePurpose,
    /// Always `processed`.
    #[serde(skip_deserializing, default = "processed")]
    pub status: &'static str,
}

fn file() -> &'static str {
    "file"
}

fn processed() -> &'static str {
    "processed"
}

impl FileObject {
    /// A file of `bytes` bytes that is whole.
    pub fn new(id: String, bytes: u64, created_at: u64, filename: String, purpose: FilePurpose) -> Self {
        Self { id, object: file(), bytes, created_at, filename, purpose, status: processed() }
    }
}

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FilePurpose {
    /// Input of a batch.
    Batch,
    /// What a batch gave.
    BatchOutput,
}

/// The answer to a deletion.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Deleted {
    /// What is gone.
    pub id: String,
    /// What it was.
    pub object: &'static str,
    /// Always true.
    pub deleted: bool,
}

/// One page of a list, newest first unless asked otherwise.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Page<T> {
    /// Always `list`.
    pub object: &'static str,
    /// The page.
    pub data: Vec<T>,
    /// Where it starts.
    pub first_id: Option<String>,
    /// Where it ends: the next one is `after` it.
    pub last_id: Option<String>,
    /// Whether there is a next one.
    pub has_more: bool,
}

/// Which page.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct PageQuery {
    /// Objects on a page.
    pub limit: Option<u64>,
    /// The object before the first one.
    pub after: Option<String>,
    /// `asc` or `desc`.
    pub order: Option<String>,
    /// Files for this only.
    pub purpose: Option<String>,
}
