//! Who may call, and how often: keys, then the caller's own limit. Before anything of the request is read.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Instant,
};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{ApiError, HttpState, observe::Arrival};
use crate::{
    limits::{Account, ClientId},
    service::{Caller, CutOff, ServiceError},
};

/// The other end of the connection. Headers that claim another are not believed.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) address: IpAddr,
    pub(super) cut_off: CutOff,
}

/// Lets requests pass whose caller may call, with a [`Caller`] in their extensions.
pub(super) async fn guard(State(state): State<Arc<HttpState>>, mut request: Request<Body>, next: Next) -> Response {
    if is_open(request.uri().path()) {
        return next.run(request).await;
    }
    let client = match identify(&state, &request) {
        Ok(client) => client,
        Err(error) => return error.into_response(),
    };
    let mut response = match state.limiter.take(&client, 1) {
        Ok(()) => {
            let arrival = request.extensions().get::<Arrival>().map_or_else(Instant::now, |arrival| arrival.0);
            let cut_off = request.extensions().get::<Peer>().map(|peer| peer.cut_off.clone()).unwrap_or_default();
            request.extensions_mut().insert(Caller { client, arrival, is_limited: true, cut_off });
            next.run(request).await
        }
        Err(refused) => ApiError::from(ServiceError::refused_by_limit(refused, "requests", None)).into_response(),
    };
    let tokens = state.loaded().and_then(|service| service.token_limiter().account(&client));
    write_account(response.headers_mut(), REQUEST_HEADERS, state.limiter.account(&client));
    write_account(response.headers_mut(), TOKEN_HEADERS, tokens);
    response
}

/// Probes and scrapers have no keys and no limits, and the description of the API holds nothing of anybody's.
fn is_open(path: &str) -> bool {
    matches!(path, "/health" | "/livez" | "/readyz" | "/metrics" | "/openapi.json" | "/docs")
        || path.starts_with("/health/")
}

fn identify(state: &HttpState, request: &Request<Body>) -> Result<ClientId, ApiError> {
    if state.keys.is_empty() {
        let peer = request.extensions().get::<Peer>().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |peer| peer.address);
        return Ok(ClientId::from_address(peer));
    }
    let header = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let presented = header.and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    let presented = presented.ok_or_else(|| ApiError::unauthorized(false))?;
    state.keys.authenticate(presented).ok_or_else(|| ApiError::unauthorized(true))
}

/// The state of the caller's account.
fn write_account(headers: &mut HeaderMap, names: [&'static str; 3], account: Option<Account>) {
    for (name, text) in account.iter().flat_map(|account| names.into_iter().zip(account.texts())) {
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}

const REQUEST_HEADERS: [&str; 3] =
    ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
const TOKEN_HEADERS: [&str; 3] =
    ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];
