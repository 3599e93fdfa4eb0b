//! The figures: `/metrics` for Prometheus, `/stats` and `/stats/history` as JSON. Reads atomics, waits for nobody.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Query, State},
    http::header,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::Value;

use super::HttpState;
use crate::metrics::CONTENT_TYPE;

pub(super) async fn metrics(State(state): State<Arc<HttpState>>) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], state.metrics.render()).into_response()
}

pub(super) async fn stats(State(state): State<Arc<HttpState>>) -> Json<Value> {
    Json(state.metrics.snapshot())
}

#[derive(Deserialize)]
pub(super) struct Since {
    /// Seconds since 1970; everything when absent.
    #[serde(default)]
    since: u64,
}

pub(super) async fn history(State(state): State<Arc<HttpState>>, Query(query): Query<Since>) -> Json<Value> {
    Json(state.metrics.history(query.since))
}
