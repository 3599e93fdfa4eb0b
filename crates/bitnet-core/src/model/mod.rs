//! The model: a loaded checkpoint, a checked [`Batch`] in, logits out. `forward.rs` is the forward pass on one page; the
//! other files are its steps, each written for many rows and run by the workers of the pool.
//!
//! A row's values depend on its own token and its K/V alone: never on the batch, the number of threads, the chunk a prompt
//! arrived in or the kernel. Safe code only, no allocation worth speaking of a token, no policy.

mod attention;
mod batch;
mod bit_linear;
mod channels;
mod feed_forward;
mod forward;
mod lm_head;
mod norm;
mod phases;
mod pooling;
mod rope;
mod screen;
mod self_test;
mod sparse;
mod weights;
mod workspace;

pub use batch::{Batch, BatchError, BatchSequence, LogitRows};
pub use forward::{Trace, TracePoint};
pub use pooling::PooledStates;
pub use screen::Scorer;
pub use sparse::SparseFfn;
pub use weights::{Model, ModelOptions, StepCost, WeightBytes};
pub use workspace::Workspace;

/// A geometry for unit tests: no two sizes are equal.
#[cfg(test)]
fn test_config() -> crate::checkpoint::ModelConfig {
    crate::checkpoint::ModelConfig {
        architecture: "test".into(),
        name: None,
        hidden_size: 48,
        intermediate_size: 72,
        num_layers: 2,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 8,
        vocab_size: 11,
        max_context: 64,
        rope_theta: 10_000.0,
        rope_freq_factors: None,
        rms_norm_eps: 1e-5,
        activation: crate::checkpoint::Activation::Relu2,
    }
}
