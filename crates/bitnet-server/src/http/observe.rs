//! Around everything: the request id, panics, the one place where error bodies are written, metrics and the access log.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use hyper::body::{Frame, SizeHint};

use super::{ApiError, HttpState};
use crate::{
    metrics::{Metrics, RejectReason, SecurityEvent},
    service::InFlight,
};

/// When the request arrived.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival(pub(super) Instant);

/// The request's id, in every log line and answer.
#[derive(Clone, Debug)]
pub(super) struct RequestId(pub(super) Arc<str>);

impl RequestId {
    /// One that nobody has.
    pub(super) fn new() -> Self {
        Self(format!("req-{:032x}", rand::random::<u128>()).into())
    }
}

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Runs the rest and sees to it that what leaves has an id, the right shape and a place in the figures.
pub(super) async fn observe(State(state): State<Arc<HttpState>>, mut request: Request<Body>, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(request.headers());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let method = request.method().clone();
    request.extensions_mut().insert(id.clone());
    request.extensions_mut().insert(Arrival(start));
    let in_flight = state.lifecycle.begin();

    let response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => ApiError::internal("a handler panicked").into_response(),
    };
    let mut response = shaped(response, &id, &state.metrics);
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let exchange = Exchange {
        metrics: Arc::clone(&state.metrics),
        route,
        method,
        code: response.status().as_u16(),
        start,
        id,
        _in_flight: in_flight,
    };
    response.map(|inner| Body::new(Observed { inner, _exchange: exchange }))
}

/// The caller's id if it is sane, else a new one.
fn request_id(headers: &HeaderMap) -> RequestId {
    let sane = |id: &&str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        (1..=128).contains(&id.len()) && id.bytes().all(allowed)
    };
    let sent = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(sane);
    sent.map_or_else(RequestId::new, |id| RequestId(id.into()))
}

/// Writes the body of an error, ours or the framework's.
fn shaped(mut response: Response, id: &RequestId, metrics: &Metrics) -> Response {
    let status = response.status();
    let error = match response.extensions_mut().remove::<ApiError>() {
        Some(error) => error,
        // The framework's own refusals are the only errors that do not carry one. Health routes answer 503 as JSON.
        None if status.is_client_error() => ApiError::framework(status),
        None => return response,
    };
    count(&error, id, metrics);
    let body = serde_json::to_vec(&error.body(&id.0)).unwrap_or_default();
    let (mut parts, _) = response.into_parts();
    parts.status = error.status;
    parts.headers.remove(axum::http::header::CONTENT_LENGTH);
    error.write_headers(&mut parts.headers);
    Response::from_parts(parts, Body::from(body))
}

fn count(error: &ApiError, id: &RequestId, metrics: &Metrics) {
    let Some(reason) = error.reason else { return };
    metrics.record_rejected(reason);
    let event = match reason {
        RejectReason::Unauthorized => SecurityEvent::AuthFailure,
        RejectReason::RateLimited => SecurityEvent::RateLimited,
        RejectReason::InvalidInput => SecurityEvent::InvalidInput,
        RejectReason::TooLarge => SecurityEvent::BodyTooLarge,
        _ => return,
    };
    metrics.record_security(event);
    tracing::info!(request_id = &*id.0, event = event.as_str(), "request refused");
}

/// One request and its answer; what is known at the end is recorded when the body has been sent or given up.
struct Exchange {
    metrics: Arc<Metrics>,
    route: Option<MatchedPath>,
    method: Method,
    code: u16,
    start: Instant,
    id: RequestId,
    _in_flight: InFlight,
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let seconds = self.start.elapsed().as_secs_f64();
        let route = self.route.as_ref().map_or("other", MatchedPath::as_str);
        // Methods are free text in HTTP; a label is not.
        let method = match self.method {
            Method::GET | Method::POST | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE => {
                self.method.as_str()
            }
            _ => "other",
        };
        self.metrics.record_http(route, method, self.code, seconds);
        tracing::debug!(request_id = &*self.id.0, route, method, code = self.code, seconds, "request");
    }
}

/// A body that carries its [`Exchange`] to its end.
struct Observed {
    inner: Body,
    _exchange: Exchange,
}

impl HttpBody for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
