//! The engine: one thread owns the model, the KV cache, the scheduler and the block pool; everything else talks to it
//! through [`handle::EngineHandle`]. Below this line nothing knows text, JSON or HTTP.
//!
//! `GenerationRequest -> Sequence -> ScheduledBatch -> core::Batch -> logits -> TokenId -> SequenceEvent`
//!
//! The policy is in [`scheduler`], the arithmetic behind [`executor::Executor`]; each can be read and changed alone.

pub mod block_pool;
pub mod budget;
mod constraint;
pub mod executor;
pub mod fairness;
pub mod handle;
pub mod lookup;
pub mod pace;
pub mod prefix_cache;
pub mod scheduler;
pub mod sequence;
pub mod speculation;
mod start;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod thread;

pub use constraint::{ConstraintFailed, OutputRule, TokenConstraint};
pub use handle::{
    EngineError, EngineHandle, EngineStatus, FinishReason, GenerationRequest, PromptLogprobs, SequenceEvent,
    SequenceStream, SubmitError, SubmitPermit, TokenEvent,
};
pub use lookup::{Draft, MAX_DRAFT, Prediction};
pub use start::{Engine, EngineConfig, EngineEnd, EngineThread, StartError};
