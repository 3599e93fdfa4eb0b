//! HTTP: routes, thin handlers, and what is around them. It turns service answers into responses and decides nothing
//! about them; `error.rs` alone picks status codes.

mod bare;
mod batches;
mod body;
mod connections;
mod error;
mod files;
mod generate;
mod guard;
mod health;
mod heartbeat;
mod lines;
mod models;
mod observe;
mod openapi;
mod sse;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod tokens;

pub use connections::serve_connections;
pub use error::ApiError;
pub use lines::{LineAnswer, answer_line};
pub use state::HttpState;

use std::sync::Arc;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::StatusCode,
    middleware::from_fn_with_state,
    routing::{get, post},
};

/// Every route.
pub fn router(state: Arc<HttpState>) -> Router {
    let api = Router::new()
        .route("/chat/completions", post(generate::chat))
        .route("/completions", post(generate::complete))
        .route("/responses", post(generate::response))
        .route("/responses/{id}", get(generate::past_response).delete(generate::past_response))
        .route("/responses/{id}/cancel", post(generate::past_response))
        .route("/responses/{id}/input_items", get(generate::past_response))
        .route("/embeddings", post(generate::embed))
        // An upload has its own limit, and is never held in memory.
        .route("/files", get(files::list).post(files::upload).layer(DefaultBodyLimit::max(state.max_upload_bytes())))
        .route("/files/{id}", get(files::one).delete(files::delete))
        .route("/files/{id}/content", get(files::content))
        .route("/batches", get(batches::list).post(batches::create))
        .route("/batches/{id}", get(batches::one))
        .route("/batches/{id}/cancel", post(batches::cancel))
        .route("/models", get(models::list))
        // The rest of the path is the id: names hold slashes, sent plain or as %2F.
        .route("/models/{*id}", get(models::one));
    let routes = Router::new()
        // Clients differ in whether their base URL ends in /v1.
        .merge(api.clone())
        .nest("/v1", api)
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/apply-template", post(tokens::apply_template))
        .route("/stats", get(stats::stats))
        .route("/stats/history", get(stats::history))
        .route("/openapi.json", get(openapi::document))
        .route("/docs", get(openapi::page))
        .merge(open_routes());
    layered(routes, state)
}

/// The routes of `--metrics-port`: what needs no key.
pub fn metrics_router(state: Arc<HttpState>) -> Router {
    layered(open_routes(), state)
}

fn open_routes() -> Router<Arc<HttpState>> {
    Router::new()
        .route("/health", get(health::summary))
        .route("/health/live", get(health::live))
        .route("/livez", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/readyz", get(health::ready))
        .route("/health/startup", get(health::startup))
        .route("/health/generate", get(health::generate))
        .route("/metrics", get(stats::metrics))
}

fn layered(routes: Router<Arc<HttpState>>, state: Arc<HttpState>) -> Router {
    routes
        .fallback(|| async { StatusCode::NOT_FOUND })
        // Inside: who may call, so that refusals are observed and shaped like everything else.
        .layer(from_fn_with_state(Arc::clone(&state), guard::guard))
        // Outside: ids, panics, error bodies and figures, for whatever comes out of the inner layers.
        .layer(from_fn_with_state(Arc::clone(&state), observe::observe))
        .with_state(state)
}
