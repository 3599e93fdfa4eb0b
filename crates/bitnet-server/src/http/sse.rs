//! An answer as server-sent events: comments while there is nothing to say, `data:` lines, `[DONE]`, or one error and
//! the end.

use std::{convert::Infallible, panic::AssertUnwindSafe, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use serde::Serialize;

use super::{ApiError, observe::RequestId};
use crate::service::Answer;

/// Silence on the line is broken this often: proxies stay patient, and a client that went away is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A comment, never an event: clients take every event for a chunk.
const COMMENT: &[u8] = b": keep-alive\n\n";
const DONE: &[u8] = b"data: [DONE]\n\n";

/// The response that streams `answer`. Dropping its body drops the answer, and with it what still runs.
pub(super) fn respond<A: Answer>(answer: A, request_id: RequestId) -> Response {
    let id = request_id.clone();
    let frames = stream::unfold(Some(answer), move |answer| {
        let request_id = request_id.clone();
        async move {
            let mut answer = answer?;
            let next = tokio::time::timeout(KEEP_ALIVE, answer.next()).await;
            Some(match next {
                Err(_) => (Bytes::from_static(COMMENT), Some(answer)),
                Ok(Ok(Some(chunks))) => (events::<A>(&chunks), Some(answer)),
                Ok(Ok(None)) if A::ENDS_WITH_DONE => (Bytes::from_static(DONE), None),
                Ok(Ok(None)) => return None,
                Ok(Err(error)) => (failure(answer, &error.into(), &request_id), None),
            })
        }
    });
    let unharmed = AssertUnwindSafe(frames).catch_unwind().map(move |frame| {
        Ok::<_, Infallible>(frame.unwrap_or_else(|_| error_event(&ApiError::internal("a stream panicked"), &id)))
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (
        headers,
        Body::from_stream(unharmed.filter(|frame| std::future::ready(!frame.as_ref().is_ok_and(Bytes::is_empty)))),
    )
        .into_response()
}

fn events<A: Answer>(chunks: &[A::Chunk]) -> Bytes {
    let mut frame = Vec::with_capacity(256 * chunks.len());
    for chunk in chunks {
        if let Some(name) = A::event_name(chunk) {
            frame.extend_from_slice(b"event: ");
            frame.extend_from_slice(name.as_bytes());
            frame.push(b'\n');
        }
        event(&mut frame, chunk);
    }
    frame.into()
}

/// The end of a stream by `error`, in the words of its API.
fn failure<A: Answer>(answer: A, error: &ApiError, request_id: &RequestId) -> Bytes {
    match answer.failed(&error.body(&request_id.0).error) {
        Some(chunk) => events::<A>(&[chunk]),
        None => error_event(error, request_id),
    }
}

fn error_event(error: &ApiError, request_id: &RequestId) -> Bytes {
    let mut frame = Vec::new();
    event(&mut frame, &error.body(&request_id.0));
    frame.into()
}

fn event(frame: &mut Vec<u8>, value: &impl Serialize) {
    let start = frame.len();
    frame.extend_from_slice(b"data: ");
    match serde_json::to_writer(&mut *frame, value) {
        Ok(()) => frame.extend_from_slice(b"\n\n"),
        // Our own types always serialize; half a line must not leave all the same.
        Err(_) => frame.truncate(start),
    }
}
