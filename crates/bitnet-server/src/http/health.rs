//! Health routes. Busy is never down: only loading, draining, a stalled or a dead engine are.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::json;

use super::HttpState;
use crate::service::{Health, Phase};

/// The summary for people and load balancers.
pub(super) async fn summary(State(state): State<Arc<HttpState>>) -> Response {
    let (status, name) = readiness(&state);
    let health = match state.loaded() {
        Some(service) => service.health(name),
        None => Health::without_model(name),
    };
    (status, Json(health)).into_response()
}

/// Restart me? Only when nothing else helps.
pub(super) async fn live(State(state): State<Arc<HttpState>>) -> Response {
    let beyond_help = state.loaded().is_some_and(|service| service.is_beyond_help());
    let dead = state.lifecycle.phase() == Phase::Dead || (beyond_help && state.lifecycle.phase() == Phase::Ready);
    answer(if dead { (StatusCode::SERVICE_UNAVAILABLE, "failed") } else { (StatusCode::OK, "ok") })
}

/// Send me requests?
pub(super) async fn ready(State(state): State<Arc<HttpState>>) -> Response {
    answer(readiness(&state))
}

/// Has the model been loaded?
pub(super) async fn startup(State(state): State<Arc<HttpState>>) -> Response {
    answer(match state.lifecycle.phase() {
        Phase::Loading => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        Phase::Ready | Phase::Draining | Phase::Dead => (StatusCode::OK, "ok"),
    })
}

/// Generates a token, really.
pub(super) async fn generate(State(state): State<Arc<HttpState>>) -> Response {
    let (status, name) = readiness(&state);
    let Some(service) = state.loaded().filter(|_| status == StatusCode::OK) else { return answer((status, name)) };
    let (works, report) = service.probe().await;
    let status = if works { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(report)).into_response()
}

fn readiness(state: &HttpState) -> (StatusCode, &'static str) {
    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
    match (state.lifecycle.phase(), state.loaded()) {
        (Phase::Draining, _) => (unavailable, "draining"),
        (Phase::Ready, Some(service)) if service.is_responsive() => (StatusCode::OK, "ok"),
        (Phase::Ready, Some(_)) | (Phase::Dead, _) => (unavailable, "failed"),
        (Phase::Loading, _) | (Phase::Ready, None) => (unavailable, "loading"),
    }
}

fn answer((status, name): (StatusCode, &'static str)) -> Response {
    (status, Json(json!({ "status": name }))).into_response()
}
