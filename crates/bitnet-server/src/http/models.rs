//! `/v1/models` and `/v1/models/{id}`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};

use super::{ApiError, HttpState};
use crate::openai::{ModelList, ModelObject};

pub(super) async fn list(State(state): State<Arc<HttpState>>) -> Result<Json<ModelList>, ApiError> {
    Ok(Json(state.service()?.card().list()))
}

pub(super) async fn one(
    State(state): State<Arc<HttpState>>,
    Path(id): Path<String>,
) -> Result<Json<ModelObject>, ApiError> {
    let card = state.service()?.card();
    card.names.resolve(Some(&id))?;
    Ok(Json(card.object()))
}
