//! Why a model could not be loaded: one enum for everything between a path and a checked [`super::Checkpoint`].

use std::path::PathBuf;

use super::{gguf::GgufError, safetensors::SafetensorsError};

/// Why a model could not be loaded. Every message names the file, tensor or key, and what usually causes it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The path, or a file that the model needs, does not exist: usually a typing error or an incomplete download.
    #[error("{path}: no such file or directory")]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// The file exists but cannot be read: usually permissions.
    #[error("{path}: {source}")]
    Io {
        /// The path as given.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// Neither a GGUF file nor a Hugging Face directory.
    #[error("{path}: {problem}")]
    NotAModel {
        /// The path as given.
        path: PathBuf,
        /// What was found, and what would do.
        problem: &'static str,
    },
    /// A broken GGUF container: usually a download that was cut short.
    #[error("{path}: {source}")]
    Gguf {
        /// The file.
        path: PathBuf,
        /// The defect.
        source: GgufError,
    },
    /// A broken safetensors container: usually a download that was cut short.
    #[error("{path}: {source}")]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The defect.
        source: SafetensorsError,
    },
    /// A JSON file that does not parse, or is larger than any such file.
    #[error("{path}: {problem}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        problem: String,
    },
    /// A key of the metadata or of `config.json` is missing, of the wrong type, or states what cannot be: usually a
    /// broken converter.
    #[error("`{key}` {problem}")]
    Config {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor that the architecture needs is not there: usually a missing shard, or a file of another architecture.
    #[error("tensor `{tensor}` is missing")]
    MissingTensor {
        /// Its name.
        tensor: String,
    },
    /// A tensor does not have the shape that the geometry asks for: usually metadata of another model.
    #[error("tensor `{tensor}` has the shape {found:?}, but the geometry asks for {expected:?}")]
    Shape {
        /// Its name.
        tensor: String,
        /// Rows first.
        expected: Vec<u64>,
        /// Rows first.
        found: Vec<u64>,
    },
    /// A tensor's contents are impossible: usually a corrupt file, or the wrong `--i2s-layout`.
    #[error("tensor `{tensor}` holds {problem}")]
    Values {
        /// Its name.
        tensor: String,
        /// What was found.
        problem: &'static str,
    },
    /// The file is sound, but of a kind that this program does not compute.
    #[error("{what} is not supported: {advice}")]
    Unsupported {
        /// What the file has.
        what: String,
        /// What to do instead, or why not.
        advice: &'static str,
    },
}

impl LoadError {
    /// An operating system's error about `path`, "not found" told apart.
    pub(super) fn io(path: &std::path::Path, source: std::io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            std::io::ErrorKind::NotFound => Self::NotFound { path },
            _ => Self::Io { path, source },
        }
    }

    /// A [`LoadError::Config`].
    pub(super) fn config(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Config { key: key.into(), problem: problem.into() }
    }

    /// A [`LoadError::Unsupported`].
    pub(super) fn unsupported(what: impl Into<String>, advice: &'static str) -> Self {
        Self::Unsupported { what: what.into(), advice }
    }
}
