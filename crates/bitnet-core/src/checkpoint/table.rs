//! What both containers come down to: named tensors with a shape, an encoding and mapped bytes. `gguf_model.rs` and
//! `hugging_face.rs` fill it, `names.rs` takes the model's weights out of it.

use std::collections::HashMap;

use super::{LoadError, MappedBytes, TensorSummary};

/// How a tensor's bytes are to be read, whichever container they come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q6K,
    Q4_0,
    I2S,
    Tq1_0,
    Tq2_0,
    /// Bytes; for a linear layer the packed codes of Hugging Face checkpoints.
    U8,
    /// A type whose values nothing here can read; the name is in [`RawTensor::type_name`].
    Other,
}

/// A tensor as the container describes it; `data` is as long as shape and encoding say.
#[derive(Clone, Debug)]
pub(super) struct RawTensor {
    pub(super) name: String,
    /// Rows first.
    pub(super) shape: Vec<u64>,
    pub(super) encoding: Encoding,
    pub(super) type_name: &'static str,
    pub(super) data: MappedBytes,
}

/// Every tensor of a model, with a mark on those that have been taken.
#[derive(Debug)]
pub(super) struct TensorTable {
    tensors: Vec<RawTensor>,
    index: HashMap<String, usize>,
    taken: Vec<bool>,
}

impl TensorTable {
    /// A table in file order.
    ///
    /// # Errors
    /// When a name occurs twice, in two shards for instance.
    pub(super) fn new(tensors: Vec<RawTensor>) -> Result<Self, LoadError> {
        let mut index = HashMap::with_capacity(tensors.len());
        for (position, tensor) in tensors.iter().enumerate() {
            if index.insert(tensor.name.clone(), position).is_some() {
                return Err(LoadError::Values { tensor: tensor.name.clone(), problem: "a second copy of itself" });
            }
        }
        Ok(Self { taken: vec![false; tensors.len()], tensors, index })
    }

    /// The tensor `name`, which from now on counts as used.
    pub(super) fn take(&mut self, name: &str) -> Option<&RawTensor> {
        let position = *self.index.get(name)?;
        *self.taken.get_mut(position)? = true;
        self.tensors.get(position)
    }

    /// Whether there is a tensor `name`.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The tensors that nobody has taken.
    pub(super) fn left_over(&self) -> impl Iterator<Item = &RawTensor> {
        self.tensors.iter().zip(&self.taken).filter(|(_, taken)| !**taken).map(|(tensor, _)| tensor)
    }

    /// All tensors in file order.
    pub(super) fn all(&self) -> &[RawTensor] {
        &self.tensors
    }

    /// What `bitnet inspect` lists.
    pub(super) fn summary(&self) -> Vec<TensorSummary> {
        let summary = |tensor: &RawTensor| TensorSummary {
            name: tensor.name.clone(),
            encoding: tensor.type_name.into(),
            shape: tensor.shape.clone(),
            bytes: tensor.data.bytes().len() as u64,
        };
        self.tensors.iter().map(summary).collect()
    }
}
