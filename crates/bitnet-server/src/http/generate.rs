//! `/v1/chat/completions` and `/v1/completions`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};

use super::{ApiError, HttpState, body::read_json, observe::RequestId, sse};
use crate::{
    openai::{ChatCompletionRequest, CompletionRequest},
    service::{Answer, Caller},
};

pub(super) async fn chat(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let service = state.service()?;
    let body = read_json(request, state.max_body_bytes).await?;
    let wire = ChatCompletionRequest::from_json(&body, state.strict_params)?;
    respond(service.chat(wire, caller).await?, request_id).await
}

pub(super) async fn complete(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Extension(request_id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ApiError> {
    let service = state.service()?;
    let body = read_json(request, state.max_body_bytes).await?;
    let wire = CompletionRequest::from_json(&body, state.strict_params)?;
    respond(service.complete(wire, caller).await?, request_id).await
}

async fn respond<A: Answer>(answer: A, request_id: RequestId) -> Result<Response, ApiError> {
    if answer.is_stream() {
        return Ok(sse::respond(answer, request_id));
    }
    Ok(Json(answer.whole().await?).into_response())
}
