//! The served model as callers see it: its names and its card.

use bitnet_core::checkpoint::Pooling;

use super::ServiceError;
use crate::openai::{ModelList, ModelObject};

/// The names requests may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelNames {
    id: String,
    aliases: Vec<String>,
    any: bool,
}

impl ModelNames {
    /// From the configured names: the first is the id, the rest are aliases, `*` accepts every name. `fallback` is the id
    /// when no name is given.
    pub fn new(names: &[String], fallback: &str) -> Self {
        let mut given = names.iter().filter(|name| *name != "*").cloned();
        Self {
            id: given.next().unwrap_or_else(|| fallback.to_owned()),
            aliases: given.collect(),
            any: names.iter().any(|name| name == "*"),
        }
    }

    /// The name answers carry.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Accepts `name`; none means the served model.
    ///
    /// # Errors
    /// [`ServiceError::ModelNotFound`], listing the names that work.
    pub fn resolve(&self, name: Option<&str>) -> Result<(), ServiceError> {
        let Some(name) = name else { return Ok(()) };
        if self.any || name == self.id || self.aliases.iter().any(|alias| alias == name) {
            return Ok(());
        }
        let served: Vec<_> = std::iter::once(&self.id).chain(&self.aliases).map(|name| format!("'{name}'")).collect();
        // A name from outside may be of any length; the message repeats no more than helps.
        let model = name.chars().take(200).collect();
        Err(ServiceError::ModelNotFound { model, served: served.join(", ") })
    }
}

/// What there is to say about the served model.
#[derive(Clone, Debug)]
pub struct ModelCard {
    /// Its names.
    pub names: ModelNames,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
    /// What people should know about it.
    pub description: Option<String>,
    /// Tokens of prompt and completion together.
    pub max_model_len: usize,
    /// Ids in the vocabulary.
    pub vocab_size: usize,
    /// Set for an embedding model, which generates nothing.
    pub pooling: Option<Pooling>,
    /// The kernel in use.
    pub kernel: String,
    /// Kernels of this CPU that failed their self-test and are not used.
    pub failed_kernels: Vec<String>,
    /// Which weights and version answer.
    pub fingerprint: String,
}

impl ModelCard {
    /// That the model gives vectors, and of what.
    ///
    /// # Errors
    /// [`ServiceError::Invalid`] when it generates text.
    pub(super) fn embeds(&self) -> Result<Pooling, ServiceError> {
        self.pooling.ok_or_else(|| {
            let name = self.names.id();
            let message = format!(
                "The model '{name}' generates text and gives no embeddings: serve an embedding model for this."
            );
            ServiceError::invalid("model", message)
        })
    }

    /// That the model generates text.
    ///
    /// # Errors
    /// [`ServiceError::Invalid`] when it gives vectors.
    pub(super) fn generates(&self) -> Result<(), ServiceError> {
        if self.pooling.is_none() {
            return Ok(());
        }
        let name = self.names.id();
        let message = format!("The model '{name}' is an embedding model and generates no text: ask /v1/embeddings.");
        Err(ServiceError::invalid("model", message))
    }

    /// `/v1/models`.
    pub fn list(&self) -> ModelList {
        ModelList { object: "list", data: vec![self.object()] }
    }

    /// `/v1/models/{id}`.
    pub fn object(&self) -> ModelObject {
        ModelObject {
            id: self.names.id.clone(),
            object: "model",
            created: self.created,
            owned_by: "bitnet",
            max_model_len: self.max_model_len,
            aliases: self.names.aliases.clone(),
            description: self.description.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> ModelNames {
        ModelNames::new(&names.iter().map(ToString::to_string).collect::<Vec<_>>(), "file")
    }

    #[test]
    fn names_resolve() {
        let names = names(&["a", "b"]);
        assert_eq!(names.id(), "a");
        assert!(names.resolve(None).is_ok() && names.resolve(Some("a")).is_ok() && names.resolve(Some("b")).is_ok());
        let error = names.resolve(Some("c")).unwrap_err();
        assert_eq!(error.to_string(), "The model 'c' does not exist. Models served here: 'a', 'b'.");
    }

    #[test]
    fn star_accepts_every_name() {
        let names = names(&["*"]);
        assert_eq!(names.id(), "file");
        assert!(names.resolve(Some("anything")).is_ok());
    }
}
