//! `/v1/chat/completions`, `/v1/completions`, `/v1/responses` and `/v1/embeddings`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
};

use super::{ApiError, HttpState, body::read_json, heartbeat, observe::RequestId, sse};
use crate::{
    openai::{ChatCompletionRequest, CompletionRequest, EmbeddingList, EmbeddingRequest, ResponseRequest},
    service::{Answer, Caller, ServiceError},
};

pub(super) async fn chat(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let service = state.service()?;
    let heartbeat = heartbeat::is_wanted(&request);
    let body = read_json(request, state.max_body_bytes).await?;
    let wire = ChatCompletionRequest::from_json(&body, state.strict_params)?;
    respond(service.chat(wire, caller).await?, request_id, heartbeat).await
}

pub(super) async fn complete(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let service = state.service()?;
    let heartbeat = heartbeat::is_wanted(&request);
    let body = read_json(request, state.max_body_bytes).await?;
    let wire = CompletionRequest::from_json(&body, state.strict_params)?;
    respond(service.complete(wire, caller).await?, request_id, heartbeat).await
}

pub(super) async fn response(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let service = state.service()?;
    let heartbeat = heartbeat::is_wanted(&request);
    let body = read_json(request, state.max_body_bytes).await?;
    let wire = ResponseRequest::from_json(&body, state.strict_params)?;
    respond(service.respond(wire, caller).await?, request_id, heartbeat).await
}

pub(super) async fn embed(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<EmbeddingList>, ApiError> {
    let service = state.service()?;
    let body = read_json(request, state.max_body_bytes).await?;
    let wire = EmbeddingRequest::from_json(&body, state.strict_params)?;
    Ok(Json(service.embed(wire, caller).await?))
}

/// A response that was answered before: nothing of it was kept.
pub(super) async fn past_response(Path(id): Path<String>) -> ApiError {
    let id: String = id.chars().take(80).collect();
    let message = format!("Response with id '{id}' not found: this server keeps no responses.");
    ServiceError::NotFound(message).into()
}

async fn respond<A: Answer>(answer: A, request_id: RequestId, heartbeat: bool) -> Result<Response, ApiError> {
    match (answer.is_stream(), heartbeat) {
        (true, _) => Ok(sse::respond(answer, request_id)),
        (false, true) => heartbeat::respond(answer, request_id).await,
        (false, false) => Ok(Json(answer.whole().await?).into_response()),
    }
}
