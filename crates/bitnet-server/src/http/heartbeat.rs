//! Whole answers that take long, for clients that ask for signs of life (`x-heartbeat: whitespace`): spaces in front of the JSON,
//! which every reader skips, so that no proxy or client takes the silence for a dead line. The price is told in the contract of
//! HTTP: the status has gone out as 200 by then, so an error that comes later is known by its body only.

use std::{pin::Pin, time::Duration};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;

use super::{ApiError, observe::RequestId};
use crate::service::{Answer, ServiceError};

const HEADER: HeaderName = HeaderName::from_static("x-heartbeat");
/// An answer that takes no longer needs none.
const INTERVAL: Duration = Duration::from_secs(5);

/// Whether `request` asks for it.
pub(super) fn is_wanted(request: &Request) -> bool {
    request.headers().get(HEADER).is_some_and(|value| value == "whitespace")
}

type Whole<A> = Pin<Box<dyn Future<Output = Result<<A as Answer>::Whole, ServiceError>> + Send>>;

/// The whole of `answer`, with spaces in front of it if it takes long.
pub(super) async fn respond<A: Answer>(answer: A, request_id: RequestId) -> Result<Response, ApiError> {
    let mut whole: Whole<A> = Box::pin(answer.whole());
    if let Ok(whole) = tokio::time::timeout(INTERVAL, &mut whole).await {
        return Ok(Json(whole?).into_response());
    }
    // The first space leaves at once: the client has waited an interval already.
    let frames = stream::unfold((Some(whole), Duration::ZERO), move |(whole, patience)| {
        let request_id = request_id.clone();
        async move {
            let mut whole = whole?;
            let (frame, rest) = match tokio::time::timeout(patience, &mut whole).await {
                Err(_) => (Bytes::from_static(b" "), Some(whole)),
                Ok(Ok(whole)) => (Bytes::from(serde_json::to_vec(&whole).unwrap_or_default()), None),
                Ok(Err(error)) => {
                    let body = ApiError::from(error).body(&request_id.0);
                    (Bytes::from(serde_json::to_vec(&body).unwrap_or_default()), None)
                }
            };
            Some((Ok::<_, std::convert::Infallible>(frame), (rest, INTERVAL)))
        }
    });
    let json = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, json)], Body::from_stream(frames)).into_response())
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use serde_json::Value;

    use super::*;

    /// An answer that takes its time.
    struct Slow(u64, Result<&'static str, ServiceError>);

    impl Answer for Slow {
        type Chunk = &'static str;
        type Whole = &'static str;

        async fn next(&mut self) -> Result<Option<Vec<&'static str>>, ServiceError> {
            Ok(None)
        }

        async fn whole(self) -> Result<&'static str, ServiceError> {
            tokio::time::sleep(Duration::from_secs(self.0)).await;
            self.1
        }

        fn is_stream(&self) -> bool {
            false
        }
    }

    async fn body(seconds: u64, result: Result<&'static str, ServiceError>) -> String {
        let response = respond(Slow(seconds, result), RequestId("req-1".into())).await.unwrap();
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn spaces_come_before_what_takes_long() {
        assert_eq!(body(4, Ok("quick")).await, "\"quick\"");
        assert_eq!(body(17, Ok("slow")).await, "   \"slow\"");
        let failed: Value = serde_json::from_str(&body(8, Err(ServiceError::Timeout)).await).unwrap();
        assert_eq!(failed["error"]["type"], "server_error");
        assert!(respond(Slow(1, Err(ServiceError::Timeout)), RequestId("req-1".into())).await.is_err());
    }
}
