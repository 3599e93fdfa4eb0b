//! Request bodies: JSON by their own words, unencoded, counted while they arrive, and in time.

use std::time::Duration;

use axum::{
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderMap, HeaderName, header},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};

use super::ApiError;

/// A body has this long to arrive: a few seconds for megabytes on a slow line, no time to sit on a connection.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Of a body that is too large, so many times the limit is still read, and for so long.
const DISCARDED_BODIES: usize = 4;
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

/// The whole body of `request`.
pub(super) async fn read_json(request: Request<Body>, max_bytes: usize) -> Result<Bytes, ApiError> {
    let (parts, mut body) = request.into_parts();
    check_type(&parts.headers)?;
    let length = header_text(&parts.headers, header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    if length.is_some_and(|length| length > max_bytes as u64) {
        // Who asks first has not begun to send.
        if !parts.headers.contains_key(header::EXPECT) {
            discard(body, max_bytes).await;
        }
        return Err(ApiError::too_large(max_bytes));
    }
    let collected = tokio::time::timeout(BODY_TIMEOUT, Limited::new(&mut body, max_bytes).collect()).await;
    match collected {
        Err(_) => Err(ApiError::body_timeout()),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            discard(body, max_bytes).await;
            Err(ApiError::too_large(max_bytes))
        }
        Ok(Err(_)) => Err(ApiError::broken_body()),
    }
}

/// Reads on for a while and keeps nothing: a client that is still sending when the connection closes never sees why.
async fn discard(mut body: Body, max_bytes: usize) {
    let mut left = max_bytes.saturating_mul(DISCARDED_BODIES);
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            let Some(rest) = left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { break };
            left = rest;
        }
    };
    // Out of time or done: the answer is the same.
    let _ = tokio::time::timeout(DISCARD_TIMEOUT, reading).await;
}

fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let media_type = header_text(headers, header::CONTENT_TYPE).and_then(|value| value.split(';').next());
    if !media_type.is_some_and(|media_type| media_type.trim_end().eq_ignore_ascii_case("application/json")) {
        return Err(ApiError::unsupported_media("The request needs 'Content-Type: application/json'."));
    }
    let encoding = header_text(headers, header::CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case("identity")) {
        return Err(ApiError::unsupported_media("Encoded request bodies are not accepted: send plain JSON."));
    }
    Ok(())
}

/// The value of a header; what is no text is no value we know.
fn header_text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.to_str().unwrap_or("?").trim())
}
