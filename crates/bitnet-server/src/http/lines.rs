//! One line of a batch: the same request and the same answer as over HTTP, without a connection.

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::ApiError;
use crate::{
    openai::{
        BatchEndpoint, ChatCompletionRequest, CompletionRequest, EmbeddingRequest, InputLine, Params, ResponseRequest,
    },
    service::{Answer, Caller, Service, ServiceError},
};

/// The priority of lines: after everything else that their client asks.
const BACKGROUND: i64 = i64::MAX;

/// What became of a line.
#[derive(Debug)]
pub enum LineAnswer {
    /// Status and body.
    Given(u16, Box<RawValue>),
    /// The server is busy, loading or ending: nothing was said about the request itself.
    NotNow(ServiceError),
}

/// Answers `line`; `request_id` goes into messages and the log.
pub async fn answer_line(
    service: &Service,
    line: &InputLine,
    strict: bool,
    caller: Caller,
    request_id: &str,
) -> LineAnswer {
    match answer(service, line, strict, caller).await {
        Ok(body) => LineAnswer::Given(200, body),
        Err(
            error @ (ServiceError::Overloaded { .. }
            | ServiceError::OverloadedByTokens { .. }
            | ServiceError::Loading
            | ServiceError::Draining
            | ServiceError::EngineStopped),
        ) => LineAnswer::NotNow(error),
        Err(error) => {
            let error = ApiError::from(error);
            let body = to_raw_value(&error.body(request_id));
            LineAnswer::Given(error.status.as_u16(), body.unwrap_or_else(|_| RawValue::NULL.to_owned()))
        }
    }
}

async fn answer(
    service: &Service,
    line: &InputLine,
    strict: bool,
    caller: Caller,
) -> Result<Box<RawValue>, ServiceError> {
    let body = line.body.get().as_bytes();
    match line.url {
        BatchEndpoint::Chat => {
            let mut wire = ChatCompletionRequest::from_json(body, strict)?;
            background(&mut wire.params)?;
            whole(service.chat(wire, caller).await?).await
        }
        BatchEndpoint::Completions => {
            let mut wire = CompletionRequest::from_json(body, strict)?;
            background(&mut wire.params)?;
            whole(service.complete(wire, caller).await?).await
        }
        BatchEndpoint::Responses => {
            let mut wire = ResponseRequest::from_json(body, strict)?;
            background(&mut wire.chat.params)?;
            whole(service.respond(wire, caller).await?).await
        }
        BatchEndpoint::Embeddings => {
            let mut wire = EmbeddingRequest::from_json(body, strict)?;
            wire.priority = Some(BACKGROUND);
            told(&service.embed(wire, caller).await?)
        }
    }
}

/// A line is answered whole, and in the background.
fn background(params: &mut Params) -> Result<(), ServiceError> {
    if params.stream {
        return Err(ServiceError::invalid("stream", "'stream' must not be true in a batch."));
    }
    params.priority = Some(BACKGROUND);
    Ok(())
}

async fn whole<A: Answer>(answer: A) -> Result<Box<RawValue>, ServiceError> {
    told(&answer.whole().await?)
}

fn told(answer: &impl Serialize) -> Result<Box<RawValue>, ServiceError> {
    to_raw_value(answer).map_err(|error| ServiceError::Internal(error.to_string()))
}
