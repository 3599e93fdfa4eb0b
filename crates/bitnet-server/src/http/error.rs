//! Errors as clients see them. This file alone picks status codes; the body is written once, by `http::observe`, which
//! knows the request id.

use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

use crate::{
    metrics::RejectReason,
    openai::{BodyError, ErrorBody, ErrorObject},
    service::ServiceError,
    storage::StorageError,
};

/// An error on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub(super) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: Message,
    retry_after_seconds: Option<u64>,
    /// Whether retrying cannot help, whatever the status suggests.
    no_retry: bool,
    /// Whether the connection should go elsewhere.
    close: bool,
    /// What is counted.
    pub(super) reason: Option<RejectReason>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Message {
    /// For the client.
    Public(String),
    /// For the log; the client gets a fixed sentence and the request id.
    Internal(String),
}

const INVALID_REQUEST: &str = "invalid_request_error";
const RATE_LIMIT: &str = "rate_limit_error";
const SERVER: &str = "server_error";
/// A model takes seconds to load, a shutdown as long as its drain: soon enough to notice, late enough not to hammer.
const LOADING_RETRY_SECONDS: u64 = 5;
const DRAINING_RETRY_SECONDS: u64 = 10;

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            code,
            param: None,
            message: Message::Public(message.into()),
            retry_after_seconds: None,
            no_retry: false,
            close: false,
            reason: None,
        }
    }

    /// A request that is wrong in itself: sending it again changes nothing.
    fn invalid(status: StatusCode, code: Option<&'static str>, param: Option<String>, message: String) -> Self {
        let reason = Some(RejectReason::InvalidInput);
        Self { param, no_retry: true, reason, ..Self::new(status, INVALID_REQUEST, code, message) }
    }

    fn unavailable(code: &'static str, retry_after_seconds: u64, message: String) -> Self {
        let retry_after_seconds = Some(retry_after_seconds.clamp(1, 60));
        Self { retry_after_seconds, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, Some(code), message) }
    }

    /// Something that is our fault. `cause` goes to the log only.
    pub(super) fn internal(cause: impl Into<String>) -> Self {
        let message = Message::Internal(cause.into());
        Self { message, ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, None, "") }
    }

    /// No key, or a wrong one.
    pub(super) fn unauthorized(presented: bool) -> Self {
        let message = match presented {
            true => "Incorrect API key provided.",
            false => {
                "You didn't provide an API key. Send it in an Authorization header: 'Authorization: Bearer YOUR_KEY'."
            }
        };
        let reason = Some(RejectReason::Unauthorized);
        Self { reason, ..Self::new(StatusCode::UNAUTHORIZED, INVALID_REQUEST, Some("invalid_api_key"), message) }
    }

    /// The caller's own limit.
    fn rate_limited(retry_after_seconds: u64, message: String) -> Self {
        let code = Some("rate_limit_exceeded");
        Self {
            retry_after_seconds: Some(retry_after_seconds),
            reason: Some(RejectReason::RateLimited),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, RATE_LIMIT, code, message)
        }
    }

    /// The body is larger than allowed. The rest of it is not read, so the connection cannot go on.
    pub(super) fn too_large(limit: usize) -> Self {
        let message = format!("The request body is larger than the {limit} bytes allowed.");
        let reason = Some(RejectReason::TooLarge);
        Self { reason, close: true, ..Self::invalid(StatusCode::PAYLOAD_TOO_LARGE, None, None, message) }
    }

    /// There is no such thing.
    pub(super) fn not_found(message: String) -> Self {
        Self::invalid(StatusCode::NOT_FOUND, None, None, message)
    }

    /// The body is not JSON by its own words, or encoded.
    pub(super) fn unsupported_media(message: impl Into<String>) -> Self {
        Self::invalid(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, None, message.into())
    }

    /// The body did not arrive in time.
    pub(super) fn body_timeout() -> Self {
        let message = "The request body did not arrive in time.".to_owned();
        Self { close: true, ..Self::invalid(StatusCode::REQUEST_TIMEOUT, None, None, message) }
    }

    /// The body ended early or was no HTTP.
    pub(super) fn broken_body() -> Self {
        let message = "The request body could not be read.".to_owned();
        Self { close: true, ..Self::invalid(StatusCode::BAD_REQUEST, Some("invalid_value"), None, message) }
    }

    /// What the framework refused with nothing but a status.
    pub(super) fn framework(status: StatusCode) -> Self {
        let message = match status {
            StatusCode::NOT_FOUND => "There is no such route.",
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "The request's headers are too many or too long.",
            StatusCode::METHOD_NOT_ALLOWED => "This route does not answer that method.",
            _ if status.is_server_error() => return Self::internal(format!("the framework answered {status}")),
            _ => "The request is not valid.",
        };
        Self::invalid(status, None, None, message.to_owned())
    }

    /// The body of the request with id `request_id`. Internal causes end here, in the log.
    pub(super) fn body(&self, request_id: &str) -> ErrorBody {
        let message = match &self.message {
            Message::Public(message) => message.clone(),
            Message::Internal(cause) => {
                tracing::error!(request_id, cause, "request failed");
                format!("The server had an error while processing your request. Request id: {request_id}.")
            }
        };
        ErrorBody {
            error: ErrorObject {
                message,
                kind: self.kind.to_owned(),
                param: self.param.clone(),
                code: self.code.map(str::to_owned),
            },
        }
    }

    /// The headers that go with it.
    pub(super) fn write_headers(&self, headers: &mut HeaderMap) {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(seconds * 1000));
        }
        if self.no_retry {
            headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
        }
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
    }
}

impl From<ServiceError> for ApiError {
    fn from(error: ServiceError) -> Self {
        let message = error.to_string();
        let bad_request = StatusCode::BAD_REQUEST;
        match error {
            ServiceError::Invalid { param, .. } => Self::invalid(bad_request, Some("invalid_value"), param, message),
            ServiceError::Missing { param, .. } => {
                Self::invalid(bad_request, Some("missing_required_parameter"), Some(param), message)
            }
            ServiceError::Unsupported { param, .. } => {
                Self::invalid(bad_request, Some("unsupported_parameter"), Some(param), message)
            }
            ServiceError::ModelNotFound { .. } => {
                Self::invalid(StatusCode::NOT_FOUND, Some("model_not_found"), Some("model".to_owned()), message)
            }
            ServiceError::NotFound(_) => Self::not_found(message),
            ServiceError::ContextLength { param, .. } => {
                Self::invalid(bad_request, Some("context_length_exceeded"), Some(param.to_owned()), message)
            }
            ServiceError::ContentFiltered { param, .. } => {
                let reason = Some(RejectReason::ContentFiltered);
                Self { reason, ..Self::invalid(bad_request, Some("content_filtered"), Some(param.to_owned()), message) }
            }
            ServiceError::RateLimited { retry_after_seconds, .. } => Self::rate_limited(retry_after_seconds, message),
            ServiceError::Overloaded { retry_after_seconds } => {
                let reason = Some(RejectReason::QueueFull);
                Self { reason, ..Self::unavailable("server_overloaded", retry_after_seconds.into(), message) }
            }
            ServiceError::OverloadedByTokens { retry_after_seconds } => {
                let reason = Some(RejectReason::QueueTokens);
                Self { reason, ..Self::unavailable("server_overloaded", retry_after_seconds.into(), message) }
            }
            ServiceError::Loading => {
                let reason = Some(RejectReason::Draining);
                Self { reason, ..Self::unavailable("server_loading", LOADING_RETRY_SECONDS, message) }
            }
            ServiceError::Draining => {
                let reason = Some(RejectReason::Draining);
                Self { reason, close: true, ..Self::unavailable("server_draining", DRAINING_RETRY_SECONDS, message) }
            }
            // A second try would take as long again.
            ServiceError::Timeout => {
                Self { no_retry: true, ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, None, message) }
            }
            ServiceError::EngineStopped | ServiceError::Internal(_) => Self::internal(message),
        }
    }
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        ServiceError::from(error).into()
    }
}

impl From<StorageError> for ApiError {
    fn from(error: StorageError) -> Self {
        let message = error.to_string();
        match error {
            StorageError::NoSuchFile(_) | StorageError::NoSuchBatch(_) => Self::not_found(message),
            StorageError::Ended(_) | StorageError::InUse(_) | StorageError::Full(_) | StorageError::TooMany(..) => {
                Self::invalid(StatusCode::BAD_REQUEST, Some("invalid_value"), None, message)
            }
            StorageError::TooLarge(_) => {
                let reason = Some(RejectReason::TooLarge);
                Self { reason, close: true, ..Self::invalid(StatusCode::PAYLOAD_TOO_LARGE, None, None, message) }
            }
            // Trying again at once finds the disk as full as before.
            StorageError::NoSpace => {
                Self { no_retry: true, ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, None, message) }
            }
            StorageError::Unusable(_) | StorageError::Disk(_) => Self::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    /// The status and the error itself; `http::observe` writes the rest.
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}
