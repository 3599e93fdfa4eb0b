//! How the process ends: one line on stderr that says what is wrong and what to do, and the exit code of the contract.

use std::{fmt, io::Write as _, process::ExitCode};

use bitnet_core::{LoadError, kernels::KernelError};

/// Why the process ends, with its exit code: 0 where that is no failure.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// 64: the command line is wrong.
    pub(crate) fn usage(message: impl fmt::Display) -> Self {
        Self::new(64, message)
    }

    /// 65: a file (of a model, of requests) is broken or of a kind that cannot be served.
    pub(crate) fn model(message: impl fmt::Display) -> Self {
        Self::new(65, message)
    }

    /// 66: a file is not there.
    pub(crate) fn not_found(message: impl fmt::Display) -> Self {
        Self::new(66, message)
    }

    /// 70: the engine died.
    pub(crate) fn engine(message: impl fmt::Display) -> Self {
        Self::new(70, message)
    }

    /// 78: the configuration is wrong.
    pub(crate) fn configuration(message: impl fmt::Display) -> Self {
        Self::new(78, message)
    }

    /// 64: no more can be read or written.
    pub(crate) fn terminal(error: std::io::Error) -> Self {
        Self::usage(format_args!("the terminal went away: {error}"))
    }

    /// 0, and not a word: nobody reads any more.
    pub(crate) fn quiet() -> Self {
        Self::new(0, "")
    }

    /// Says the one line of a failure and gives the code.
    pub(crate) fn report(&self) -> ExitCode {
        if self.code != 0 {
            // A full disk behind stderr must not change the exit code.
            let _ = writeln!(std::io::stderr(), "bitnet: {}", self.message);
        }
        ExitCode::from(self.code)
    }

    fn new(code: u8, message: impl fmt::Display) -> Self {
        let message = message.to_string();
        Self { code, message: message.split_whitespace().collect::<Vec<_>>().join(" ") }
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::NotFound { .. } => Self::not_found(error),
            other => Self::model(other),
        }
    }
}

impl From<KernelError> for Failure {
    fn from(error: KernelError) -> Self {
        Self::configuration(error)
    }
}
