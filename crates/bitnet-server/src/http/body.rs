//! Request bodies: JSON by their own words, unencoded, counted while they arrive, and in time.

use std::time::Duration;

use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderMap, header},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};

use super::ApiError;

/// A body has this long to arrive: a few seconds for megabytes on a slow line, no time to sit on a connection.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The whole body of `request`.
pub(super) async fn read_json(request: Request<Body>, max_bytes: usize) -> Result<Bytes, ApiError> {
    let (parts, body) = request.into_parts();
    check_headers(&parts.headers, max_bytes)?;
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, max_bytes).collect()).await;
    match collected {
        Err(_) => Err(ApiError::body_timeout()),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::too_large(max_bytes)),
        Ok(Err(_)) => Err(ApiError::broken_body()),
    }
}

fn check_headers(headers: &HeaderMap, max_bytes: usize) -> Result<(), ApiError> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?").trim());
    let media_type = text(header::CONTENT_TYPE).and_then(|value| value.split(';').next()).unwrap_or("").trim_end();
    if !media_type.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::unsupported_media("The request needs 'Content-Type: application/json'."));
    }
    if text(header::CONTENT_ENCODING).is_some_and(|encoding| !encoding.eq_ignore_ascii_case("identity")) {
        return Err(ApiError::unsupported_media("Encoded request bodies are not accepted: send plain JSON."));
    }
    let length = text(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    if length.is_some_and(|length| length > max_bytes as u64) {
        return Err(ApiError::too_large(max_bytes));
    }
    Ok(())
}
