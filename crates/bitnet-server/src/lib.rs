//! The serving library: HTTP request in, OpenAI-shaped answer out, over one engine thread.
//!
//! Layers, imports point down only: L0 `config`, `openai`, `metrics`; L1 `limits`, `filter`, `prompt`, `output`,
//! `response_cache`, `grammar`, `storage`, `engine` (siblings never meet); L2 `service`; L3 `http`; L4 this file, `batch`, `load` and
//! `shutdown`.

pub mod batch;
pub mod config;
pub mod engine;
pub mod filter;
pub mod grammar;
pub mod http;
pub mod limits;
pub mod load;
pub mod metrics;
pub mod openai;
pub mod output;
pub mod prompt;
pub mod response_cache;
pub mod service;
mod shutdown;
pub mod storage;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinSet,
};

use config::ServerConfig;
use engine::{EngineThread, StartError};
use filter::{ContentFilter, FilterError};
use http::{HttpState, serve_connections};
use load::{BUILT_IN_MODEL_NAME, LoadFailure, LoadedModel, default_model_name, start_service};
use metrics::{Metrics, MetricsLimits};
use service::{Lifecycle, ModelCard, ModelNames, Service, unix_seconds};
use shutdown::Signals;
use storage::{Storage, StorageError, StorageLimits};

/// A server that listens and has not begun.
#[derive(Debug)]
pub struct App {
    config: ServerConfig,
    filter: Option<ContentFilter>,
    state: Arc<HttpState>,
    listener: TcpListener,
    metrics_listener: Option<TcpListener>,
}

/// What the banner may say once requests are served.
#[derive(Clone, Debug)]
pub struct Serving {
    /// Where requests go.
    pub address: SocketAddr,
    /// Where health and metrics are as well.
    pub metrics_address: Option<SocketAddr>,
    /// The served model.
    pub model: ModelCard,
}

/// Why serving ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The content filter's rules do not compile.
    #[error("--content-filter: {0}")]
    Filter(#[from] FilterError),
    /// The address cannot be listened on; usually another process does.
    #[error("cannot listen on {address}: {source}; choose another port with --port")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The operating system's word.
        source: io::Error,
    },
    /// `--data-dir` cannot be used.
    #[error("--data-dir: {0}")]
    Data(#[from] StorageError),
    /// Signals cannot be listened for, or a thread cannot be started.
    #[error("cannot start: {0}")]
    Start(#[from] io::Error),
    /// There is no model to serve.
    #[error(transparent)]
    Load(#[from] LoadFailure),
    /// The engine died: the process has to exit with 70.
    #[error("the engine died: {0}")]
    EngineDied(String),
}

/// What is left to be written when the server closes gets this long.
const CLOSING: Duration = Duration::from_secs(2);

impl App {
    /// Compiles what can be compiled and opens the listeners; `--check-config` ends here.
    ///
    /// # Errors
    /// [`ServeError::Filter`], [`ServeError::Bind`].
    pub async fn build(config: ServerConfig) -> Result<Self, ServeError> {
        let filter = config.content_filter.as_ref().map(ContentFilter::new).transpose()?;
        let fallback = config.model.as_deref().map_or_else(|| BUILT_IN_MODEL_NAME.to_owned(), default_model_name);
        let names = ModelNames::new(&config.model_names, &fallback);
        let limits = MetricsLimits { max_num_seqs: config.max_num_seqs, max_queue: config.max_queue };
        let metrics = Arc::new(Metrics::new(names.id(), limits));
        let listener = bind(SocketAddr::new(config.host, config.port)).await?;
        let metrics_listener = match config.metrics_port {
            Some(port) => Some(bind(SocketAddr::new(config.host, port)).await?),
            None => None,
        };
        let storage = config.data.as_ref().map(|data| {
            let limits = StorageLimits { max_file_bytes: data.max_file_bytes, max_total_bytes: data.max_total_bytes };
            Storage::open(&data.dir, limits).map(Arc::new)
        });
        let state = Arc::new(HttpState::new(&config, Lifecycle::new(), metrics).with_storage(storage.transpose()?));
        Ok(Self { config, filter, state, listener, metrics_listener })
    }

    /// Every route, over this app's state.
    pub fn router(&self) -> Router {
        http::router(Arc::clone(&self.state))
    }

    /// Serves until a signal, or until the engine dies. Health routes answer at once; `loader` runs on a thread of its own,
    /// and `on_ready` is called when requests are served.
    ///
    /// # Errors
    /// [`ServeError::Load`], [`ServeError::EngineDied`].
    pub async fn run(
        self,
        loader: impl FnOnce() -> Result<LoadedModel, LoadFailure> + Send + 'static,
        on_ready: impl FnOnce(&Serving),
    ) -> Result<(), ServeError> {
        let mut signals = Signals::listen()?;
        let (close, closing) = watch::channel(false);
        let address = self.listener.local_addr()?;
        let metrics_address = self.metrics_listener.as_ref().map(TcpListener::local_addr).transpose()?;
        let router = self.router();
        let mut servers = JoinSet::new();
        let (metrics, patience) = (&self.state.metrics, self.config.slow_reader_timeout);
        servers.spawn(serve_connections(self.listener, router, Arc::clone(metrics), patience, closing.clone()));
        if let Some(listener) = self.metrics_listener {
            let router = http::metrics_router(Arc::clone(&self.state));
            servers.spawn(serve_connections(listener, router, Arc::clone(metrics), patience, closing));
        }
        let housekeeping = tokio::spawn(housekeeping(Arc::clone(&self.state)));

        let drain_timeout = self.config.drain_timeout;
        // Of the places that sequences have, few are for batches: somebody may come at any time.
        let batch_places = (self.config.max_num_seqs / 4).max(1);
        let loading = load_on_thread(loader, self.config, self.filter, Arc::clone(metrics))?;
        let mut background = JoinSet::new();
        let announce = |service: &Arc<Service>| {
            on_ready(&Serving { address, metrics_address, model: service.card().clone() });
            if let Some(storage) = self.state.storage() {
                let (state, storage) = (Arc::clone(&self.state), Arc::clone(storage));
                background.spawn(batch::work_off(state, storage, Arc::clone(service), batch_places));
            }
        };
        let result = live(&self.state, loading, &mut signals, drain_timeout, announce).await;

        housekeeping.abort();
        background.shutdown().await;
        close.send_replace(true);
        // A second signal must not wait for a connection that does not close.
        let _ = tokio::time::timeout(CLOSING, async { while servers.join_next().await.is_some() {} }).await;
        result
    }
}

/// A model that is being loaded.
type Loading = oneshot::Receiver<Result<(Service, EngineThread), LoadFailure>>;

/// From the load to the last answer.
async fn live(
    state: &HttpState,
    loading: Loading,
    signals: &mut Signals,
    drain_timeout: Duration,
    announce: impl FnOnce(&Arc<Service>),
) -> Result<(), ServeError> {
    let loaded = tokio::select! {
        loaded = loading => loaded,
        () = signals.next() => return Ok(()),
    };
    let died = |_| ServeError::EngineDied("loading the model panicked".to_owned());
    let (service, mut thread) = loaded.map_err(died)?.map_err(surfaced)?;
    let service = Arc::new(service);
    let engine = service.engine().clone();
    state.install(Arc::clone(&service));
    announce(&service);

    let end = tokio::select! {
        () = signals.next() => None,
        end = thread.stopped() => Some(end),
    };
    state.metrics.set_ready(false);
    match end {
        None => {
            shutdown::drain(&state.lifecycle, &engine, &mut thread, signals, drain_timeout).await;
            Ok(())
        }
        Some(end) => Err(ServeError::EngineDied(shutdown::mourn(&state.lifecycle, end).await)),
    }
}

/// An engine that dies on its first token has died, it was not misconfigured.
fn surfaced(failure: LoadFailure) -> ServeError {
    match failure {
        LoadFailure::Engine(error @ StartError::WarmUp(_)) => ServeError::EngineDied(error.to_string()),
        failure => failure.into(),
    }
}

fn load_on_thread(
    loader: impl FnOnce() -> Result<LoadedModel, LoadFailure> + Send + 'static,
    config: ServerConfig,
    filter: Option<ContentFilter>,
    metrics: Arc<Metrics>,
) -> io::Result<Loading> {
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new().name("load".to_owned()).spawn(move || {
        let result = loader().and_then(|loaded| start_service(loaded, &config, filter, &metrics));
        // A signal may have ended the process's wait for it.
        let _ = sender.send(result);
    })?;
    Ok(receiver)
}

async fn bind(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| ServeError::Bind { address, source })
}

/// Once a minute, what has to be looked at now and then.
async fn housekeeping(state: Arc<HttpState>) {
    let mut minutes = tokio::time::interval(Duration::from_secs(60));
    loop {
        minutes.tick().await;
        state.metrics.set_tracked_clients(state.limiter.num_tracked_clients());
        state.metrics.record_minute(unix_seconds());
    }
}
