//! `/v1/batches`: made, looked at, cancelled. Who answers their lines is elsewhere.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, Query, Request, State},
};

use super::{
    ApiError, HttpState,
    body::read_json,
    files::{on_disk, page},
};
use crate::{
    openai::{BatchObject, BatchRequest, Page, PageQuery},
    service::{Caller, unix_seconds},
};

const DEFAULT_PAGE: u64 = 20;
const MAX_PAGE: u64 = 100;

pub(super) async fn create(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<BatchObject>, ApiError> {
    let storage = Arc::clone(state.stored()?);
    let body = read_json(request, state.max_body_bytes).await?;
    let wire = BatchRequest::from_json(&body, state.strict_params)?;
    on_disk(move || storage.create_batch(caller.client, wire, unix_seconds())).await.map(Json)
}

pub(super) async fn list(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<BatchObject>>, ApiError> {
    let storage = Arc::clone(state.stored()?);
    let batches = on_disk(move || Ok(storage.batches(caller.client))).await?;
    page(batches, &query, |batch| &batch.id, DEFAULT_PAGE, MAX_PAGE).map(Json)
}

pub(super) async fn one(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<BatchObject>, ApiError> {
    let storage = Arc::clone(state.stored()?);
    on_disk(move || storage.batch(caller.client, &id)).await.map(Json)
}

pub(super) async fn cancel(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<BatchObject>, ApiError> {
    let storage = Arc::clone(state.stored()?);
    on_disk(move || storage.cancel_batch(caller.client, &id, unix_seconds())).await.map(Json)
}
