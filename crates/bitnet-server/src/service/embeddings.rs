//! `/v1/embeddings`: what the served models, which generate text, say to it.

use super::{Service, ServiceError};
use crate::openai::EmbeddingRequest;

impl Service {
    /// Why there are no embeddings of this model.
    pub fn embed(&self, wire: &EmbeddingRequest) -> ServiceError {
        if let Err(error) = self.card.names.resolve(wire.model.as_deref()) {
            return error;
        }
        if wire.input.is_empty() {
            return ServiceError::invalid("input", "'input' must not be empty.");
        }
        let name = self.card.names.id();
        let message =
            format!("The model '{name}' generates text and gives no embeddings: serve an embedding model for this.");
        ServiceError::invalid("model", message)
    }
}
