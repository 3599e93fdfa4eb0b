//! `/v1/files`: uploads piece by piece, lists, contents. The disk is waited for on threads that may wait.

use std::{fs::File, io::Read, sync::Arc, time::Duration};

use axum::{
    Extension, Json,
    body::{Body, Bytes},
    extract::{FromRequest, Multipart, Path, Query, Request, State, multipart::Field},
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;

use super::{ApiError, HttpState};
use crate::{
    openai::{BodyError, Deleted, FileObject, Page, PageQuery},
    service::{Caller, unix_seconds},
    storage::{SharedStorage, StorageError, Upload},
};

/// Pieces of an upload are collected up to this before they are written, and contents read in pieces of this.
const PIECE_BYTES: usize = 256 << 10;
/// The next piece of an upload has this long to arrive.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest value of a field that is no file.
const MAX_FIELD_BYTES: usize = 256;
/// Longest name of a file that is kept.
const MAX_NAME_CHARS: usize = 255;
/// What an upload may have around its file.
const FORM_BYTES: u64 = 64 << 10;
const DEFAULT_PAGE: u64 = 10_000;

impl HttpState {
    /// Files and batches, or the sentence that says how there would be some.
    pub(super) fn stored(&self) -> Result<&SharedStorage, ApiError> {
        self.storage().ok_or_else(|| {
            ApiError::not_found("Files and batches are off on this server: start it with --data-dir DIR.".to_owned())
        })
    }

    /// Largest body of an upload.
    pub(super) fn max_upload_bytes(&self) -> usize {
        let file = self.storage().map_or(0, |storage| storage.limits().max_file_bytes);
        usize::try_from(file.saturating_add(FORM_BYTES)).unwrap_or(usize::MAX)
    }
}

/// Runs `work` where it may wait for the disk.
pub(super) async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| ApiError::internal(format!("disk work ended early: {error}")))??)
}

pub(super) async fn upload(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<FileObject>, ApiError> {
    let storage = state.stored()?;
    let form = Multipart::from_request(request, &()).await;
    let mut form =
        form.map_err(|_| ApiError::unsupported_media("The request needs 'Content-Type: multipart/form-data'."))?;
    let (mut purpose, mut file) = (None, None);
    while let Some(field) = in_time(form.next_field()).await?.map_err(|error| broken(&state, &error))? {
        match field.name() {
            Some("purpose") => purpose = Some(text(&state, field).await?),
            Some("file") => {
                let name = field.file_name().unwrap_or("file").chars().filter(|c| !c.is_control());
                let name: String = name.take(MAX_NAME_CHARS).collect();
                file = Some((name, store(&state, storage, field).await?));
            }
            // Fields that ask for something are refused, so that nobody relies on it.
            Some(name) => {
                let name: String = name.chars().take(80).collect();
                return Err(BodyError::unsupported(&name, format!("'{name}' is not supported by this server.")).into());
            }
            None => {}
        }
    }
    match purpose.as_deref() {
        Some("batch") => {}
        Some(_) => return Err(BodyError::invalid("purpose", "'purpose' must be batch.").into()),
        None => return Err(BodyError::missing("purpose").into()),
    }
    let (name, upload) = file.ok_or_else(|| BodyError::missing("file"))?;
    on_disk(move || upload.keep(caller.client, name, unix_seconds())).await.map(Json)
}

/// Writes the bytes of `field` to disk as they arrive.
async fn store(state: &HttpState, storage: &SharedStorage, mut field: Field<'_>) -> Result<Upload, ApiError> {
    let storage = Arc::clone(storage);
    let mut upload = on_disk(move || storage.upload()).await?;
    let mut pieces = Vec::with_capacity(PIECE_BYTES);
    loop {
        let piece = in_time(field.chunk()).await?.map_err(|error| broken(state, &error))?;
        let ended = piece.is_none();
        pieces.extend_from_slice(&piece.unwrap_or_default());
        if pieces.len() >= PIECE_BYTES || ended {
            let full = std::mem::take(&mut pieces);
            upload = on_disk(move || upload.write(&full).map(|()| upload)).await?;
        }
        if ended {
            return Ok(upload);
        }
    }
}

/// The text of a short field.
async fn text(state: &HttpState, mut field: Field<'_>) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(piece) = in_time(field.chunk()).await?.map_err(|error| broken(state, &error))? {
        bytes.extend_from_slice(&piece);
        if bytes.len() > MAX_FIELD_BYTES {
            return Err(BodyError::invalid("purpose", "'purpose' must be batch.").into());
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn in_time<T>(piece: impl Future<Output = T>) -> Result<T, ApiError> {
    tokio::time::timeout(PIECE_TIMEOUT, piece).await.map_err(|_| ApiError::body_timeout())
}

fn broken(state: &HttpState, error: &axum::extract::multipart::MultipartError) -> ApiError {
    if error.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE {
        return ApiError::too_large(state.max_upload_bytes());
    }
    ApiError::broken_body()
}

pub(super) async fn list(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<FileObject>>, ApiError> {
    let storage = Arc::clone(state.stored()?);
    let mut files = on_disk(move || Ok(storage.files(caller.client))).await?;
    if let Some(purpose) = &query.purpose {
        files.retain(|file| serde_json::to_value(file.purpose).is_ok_and(|own| own == *purpose));
    }
    page(files, &query, |file| &file.id, DEFAULT_PAGE, DEFAULT_PAGE).map(Json)
}

pub(super) async fn one(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<FileObject>, ApiError> {
    let storage = Arc::clone(state.stored()?);
    on_disk(move || storage.file(caller.client, &id)).await.map(Json)
}

pub(super) async fn delete(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Deleted>, ApiError> {
    let storage = Arc::clone(state.stored()?);
    let gone = id.clone();
    on_disk(move || storage.delete_file(caller.client, &gone)).await?;
    Ok(Json(Deleted { id, object: "file", deleted: true }))
}

pub(super) async fn content(
    State(state): State<Arc<HttpState>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let storage = Arc::clone(state.stored()?);
    let (object, file) = on_disk(move || storage.content(caller.client, &id)).await?;
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (header::CONTENT_LENGTH, HeaderValue::from(object.bytes)),
    ];
    Ok((headers, Body::from_stream(stream::try_unfold(file, next_piece))).into_response())
}

async fn next_piece(mut file: File) -> Result<Option<(Bytes, File)>, std::io::Error> {
    let read = tokio::task::spawn_blocking(move || {
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        file.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece)?;
        Ok::<_, std::io::Error>((Bytes::from(piece), file))
    });
    let (piece, file) = read.await.map_err(std::io::Error::other)??;
    Ok((!piece.is_empty()).then_some((piece, file)))
}

/// The page of `all`, oldest first, that `query` asks for.
pub(super) fn page<T>(
    mut all: Vec<T>,
    query: &PageQuery,
    id: impl Fn(&T) -> &String,
    default: u64,
    max: u64,
) -> Result<Page<T>, ApiError> {
    let limit = query.limit.unwrap_or(default);
    if !(1..=max).contains(&limit) {
        return Err(BodyError::invalid("limit", format!("'limit' must be between 1 and {max}.")).into());
    }
    match query.order.as_deref() {
        None | Some("desc") => all.reverse(),
        Some("asc") => {}
        Some(_) => return Err(BodyError::invalid("order", "'order' must be asc or desc.").into()),
    }
    if let Some(after) = &query.after {
        let Some(place) = all.iter().position(|object| id(object) == after) else {
            return Err(BodyError::invalid("after", "'after' names nothing in this list.").into());
        };
        all.drain(..=place);
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let has_more = all.len() > limit;
    all.truncate(limit);
    let (first_id, last_id) = (all.first().map(&id).cloned(), all.last().map(&id).cloned());
    Ok(Page { object: "list", data: all, first_id, last_id, has_more })
}
