//! What all handlers share: settings, the phase of the process, and the service once it is there.

use std::sync::{Arc, OnceLock};

use super::ApiError;
use crate::{
    config::ServerConfig,
    limits::{KeySet, RateLimiter},
    metrics::Metrics,
    service::{Lifecycle, Phase, Service, ServiceError},
    storage::SharedStorage,
};

/// What all handlers share.
#[derive(Debug)]
pub struct HttpState {
    /// Where the process is.
    pub lifecycle: Arc<Lifecycle>,
    /// Every figure.
    pub metrics: Arc<Metrics>,
    /// Requests a client.
    pub limiter: RateLimiter,
    pub(super) keys: KeySet,
    pub(super) max_body_bytes: usize,
    pub(super) strict_params: bool,
    storage: Option<SharedStorage>,
    service: OnceLock<Arc<Service>>,
}

impl HttpState {
    /// Of a server that has no model yet.
    pub fn new(config: &ServerConfig, lifecycle: Arc<Lifecycle>, metrics: Arc<Metrics>) -> Self {
        Self {
            lifecycle,
            metrics,
            limiter: RateLimiter::new(config.rate_limit_rpm),
            keys: config.api_keys.clone(),
            max_body_bytes: config.max_body_bytes,
            strict_params: config.strict_params,
            storage: None,
            service: OnceLock::new(),
        }
    }

    /// The same, with files and batches.
    #[must_use]
    pub fn with_storage(self, storage: Option<SharedStorage>) -> Self {
        Self { storage, ..self }
    }

    /// Files and batches, where there are any.
    pub fn storage(&self) -> Option<&SharedStorage> {
        self.storage.as_ref()
    }

    /// Largest body of a request, and line of a batch.
    pub fn max_body_bytes(&self) -> usize {
        self.max_body_bytes
    }

    /// Whether request fields that are not known are refused.
    pub fn strict_params(&self) -> bool {
        self.strict_params
    }

    /// The model is there: requests are served from now on.
    pub fn install(&self, service: Arc<Service>) {
        if self.service.set(service).is_ok() {
            self.lifecycle.enter(Phase::Ready);
            self.metrics.set_ready(true);
        }
    }

    /// The service, if requests are taken.
    pub(super) fn service(&self) -> Result<&Arc<Service>, ApiError> {
        match (self.lifecycle.phase(), self.service.get()) {
            (Phase::Draining, _) => Err(ServiceError::Draining.into()),
            (Phase::Dead, _) => Err(ServiceError::EngineStopped.into()),
            (Phase::Ready, Some(service)) => Ok(service),
            (Phase::Loading | Phase::Ready, _) => Err(ServiceError::Loading.into()),
        }
    }

    /// The service, whatever the phase: for those who only look.
    pub(super) fn loaded(&self) -> Option<&Arc<Service>> {
        self.service.get()
    }
}
