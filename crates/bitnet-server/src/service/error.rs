//! Why a request is not answered, in words of the service. Which status that is, `http::error` decides.

use crate::{
    engine::{EngineError, SubmitError},
    limits::{Refused, retry_after_seconds},
    openai::{BodyError, BodyErrorKind},
};

/// Why a request is not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// A field with a wrong type or value; usually the caller's mistake.
    #[error("{message}")]
    Invalid {
        /// The top-level field, if one is at fault.
        param: Option<String>,
        /// What is allowed.
        message: String,
    },
    /// A required field is absent.
    #[error("{message}")]
    Missing {
        /// The field.
        param: String,
        /// A sentence for people.
        message: String,
    },
    /// A field asks for something this server does not do.
    #[error("{message}")]
    Unsupported {
        /// The field.
        param: String,
        /// A sentence for people.
        message: String,
    },
    /// No model of that name is served.
    #[error("The model '{model}' does not exist. Models served here: {served}.")]
    ModelNotFound {
        /// The name asked for.
        model: String,
        /// The names that work.
        served: String,
    },
    /// There is no such object, or it is another client's.
    #[error("{0}")]
    NotFound(String),
    /// Prompt and `max_tokens` together do not fit the context.
    #[error("{message}")]
    ContextLength {
        /// The field that holds the prompt.
        param: &'static str,
        /// The sizes.
        message: String,
    },
    /// The content filter refused the prompt.
    #[error("The prompt was refused by the content filter (rule '{rule}', category '{category}').")]
    ContentFiltered {
        /// The field that holds the prompt.
        param: &'static str,
        /// The rule that matched.
        rule: String,
        /// Its category.
        category: String,
    },
    /// The caller's own limit.
    #[error("Rate limit reached: {limit} {unit} per minute. Please try again in {retry_after_seconds} seconds.")]
    RateLimited {
        /// What is counted.
        unit: &'static str,
        /// What a minute allows.
        limit: u32,
        /// Waiting so long is enough.
        retry_after_seconds: u64,
    },
    /// The queue is full.
    #[error("The server is overloaded: its queue is full. Please retry later.")]
    Overloaded {
        /// Seconds until a place is likely to be free.
        retry_after_seconds: u32,
    },
    /// The queue holds as many prompt tokens as it may.
    #[error("The server is overloaded: too many prompt tokens are waiting. Please retry later.")]
    OverloadedByTokens {
        /// Seconds until a place is likely to be free.
        retry_after_seconds: u32,
    },
    /// The model is still being loaded.
    #[error("The model is being loaded. Please retry later.")]
    Loading,
    /// The server is shutting down and takes no new requests.
    #[error("The server is shutting down. Please retry elsewhere.")]
    Draining,
    /// The request ran into `--request-timeout`.
    #[error("The request ran into the server's time limit.")]
    Timeout,
    /// The engine has ended.
    #[error("the engine has stopped")]
    EngineStopped,
    /// Something that is nobody's fault outside: a value that is not finite, a template or tokenizer that fails.
    #[error("{0}")]
    Internal(String),
}

impl ServiceError {
    /// The caller's limit of `unit` a minute does not allow it; `asked` is the field at fault and what it comes to.
    pub fn refused_by_limit(refused: Refused, unit: &'static str, asked: Option<(&str, usize)>) -> Self {
        match refused {
            Refused::Wait { limit, retry_after } => {
                Self::RateLimited { unit, limit, retry_after_seconds: retry_after_seconds(retry_after) }
            }
            Refused::TooMuch { limit } => Self::Invalid {
                param: asked.map(|(param, _)| param.to_owned()),
                message: format!(
                    "This request needs {} {unit}, prompt and possible completion together, and the limit is {limit} per minute. \
                     Please shorten it or lower max_tokens.",
                    asked.map_or(1, |(_, amount)| amount)
                ),
            },
        }
    }

    /// `param` has a wrong value.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.to_owned()), message: message.into() }
    }
}

impl ServiceError {
    /// The same error, about field `new` where it was about `old`: the caller wrote it by that name.
    pub(super) fn about(self, old: &'static str, new: &'static str) -> Self {
        let renamed = |param: &'static str| if param == old { new } else { param };
        match self {
            Self::Invalid { param: Some(param), message } if param == old => Self::invalid(new, message),
            Self::Unsupported { param, message } if param == old => {
                Self::Unsupported { param: new.to_owned(), message }
            }
            Self::ContextLength { param, message } => Self::ContextLength { param: renamed(param), message },
            Self::ContentFiltered { param, rule, category } => {
                Self::ContentFiltered { param: renamed(param), rule, category }
            }
            other => other,
        }
    }
}

impl From<BodyError> for ServiceError {
    fn from(error: BodyError) -> Self {
        let BodyError { kind, param, message } = error;
        match (kind, param) {
            (BodyErrorKind::Missing, Some(param)) => Self::Missing { param, message },
            (BodyErrorKind::Unsupported, Some(param)) => Self::Unsupported { param, message },
            (_, param) => Self::Invalid { param, message },
        }
    }
}

impl From<EngineError> for ServiceError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Timeout => Self::Timeout,
            EngineError::ShuttingDown => Self::Draining,
            EngineError::Stopped => Self::EngineStopped,
            EngineError::NotFinite | EngineError::Invalid | EngineError::Constraint => {
                Self::Internal(error.to_string())
            }
        }
    }
}

impl ServiceError {
    /// `error` of an engine that expects a free place in `retry_after_seconds`.
    pub(super) fn refused(error: SubmitError, retry_after_seconds: u32) -> Self {
        match error {
            SubmitError::QueueFull => Self::Overloaded { retry_after_seconds },
            SubmitError::QueueTokens => Self::OverloadedByTokens { retry_after_seconds },
            SubmitError::Stopped => Self::EngineStopped,
        }
    }
}
