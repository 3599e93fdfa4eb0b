//! `/tokenize`, `/detokenize`, `/apply-template`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
};

use super::{ApiError, HttpState, body::read_json};
use crate::openai::{
    ApplyTemplateRequest, DetokenizeRequest, DetokenizeResponse, TemplateResponse, TokenizeRequest, TokenizeResponse,
};

pub(super) async fn tokenize(
    State(state): State<Arc<HttpState>>,
    request: Request,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let service = state.service()?;
    let body = read_json(request, state.max_body_bytes).await?;
    Ok(Json(service.tokenize(TokenizeRequest::from_json(&body, state.strict_params)?).await?))
}

pub(super) async fn detokenize(
    State(state): State<Arc<HttpState>>,
    request: Request,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let service = state.service()?;
    let body = read_json(request, state.max_body_bytes).await?;
    Ok(Json(service.detokenize(DetokenizeRequest::from_json(&body, state.strict_params)?)?))
}

pub(super) async fn apply_template(
    State(state): State<Arc<HttpState>>,
    request: Request,
) -> Result<Json<TemplateResponse>, ApiError> {
    let service = state.service()?;
    let body = read_json(request, state.max_body_bytes).await?;
    Ok(Json(service.apply_template(ApplyTemplateRequest::from_json(&body, state.strict_params)?).await?))
}
