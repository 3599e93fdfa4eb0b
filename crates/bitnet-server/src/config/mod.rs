//! What the operator wrote -> what it means: [`RawConfig`] (flags, environment, file, profile; all optional) ->
//! [`ServerConfig, Speculation::resolve`] -> [`ServerConfig`] (typed, checked, complete). Files that settings name are read here,
//! so a bad one is found before anything is loaded; nothing behind this room reads the environment or re-checks a value.

mod filter_rules;
mod keys;
mod memory;
mod raw;
mod resolve;

#[cfg(test)]
mod tests;

pub use filter_rules::{Direction, FilterAction, FilterRule, FilterRules, MatchKind, Severity};
pub use keys::{ClientId, KeySet};
pub use memory::{MemoryPlan, MemoryRequest, detected_memory_limit, memory_plan};
pub use raw::RawConfig;
pub use resolve::{DataSettings, LogFormat, PrefixSharing, SamplingDefaults, ServerConfig, Speculation};

/// Why the configuration was refused. Every variant is exit code 78 and one line that names the setting and the value.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A value outside its range or of the wrong form, whoever wrote it.
    #[error("--{setting} {value}: {reason}")]
    Invalid {
        /// The setting's name, as a flag without the dashes.
        setting: &'static str,
        /// What was written.
        value: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A file that a setting names cannot be read: usually a typo or a missing mount.
    #[error("--{setting} {path}: {reason}")]
    Unreadable {
        /// The setting that names the file.
        setting: &'static str,
        /// The path as written.
        path: String,
        /// The operating system's words.
        reason: String,
    },
    /// A file was read and its content is wrong: unknown names, wrong types, broken lines.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// What is wrong in it, with the line or the name.
        reason: String,
    },
    /// Listening beyond loopback without keys.
    #[error(
        "--host {0} is reachable from outside and no keys are set: give --api-key-file FILE, or --insecure to serve everyone"
    )]
    OpenToTheWorld(
        /// The host.
        String,
    ),
    /// The model and its caches do not fit the memory they may use.
    #[error(
        "needs {needed_mib} MiB ({breakdown}) but the memory limit is {limit_mib} MiB: raise --memory-limit or lower --ctx-size"
    )]
    DoesNotFit {
        /// What the smallest working configuration needs.
        needed_mib: u64,
        /// What it consists of.
        breakdown: String,
        /// What there is.
        limit_mib: u64,
    },
}
