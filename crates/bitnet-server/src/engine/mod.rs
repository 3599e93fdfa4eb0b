//! The engine: one thread owns the model, the KV cache, the scheduler and the block pool; everything else talks to it
//! through [`handle::EngineHandle`]. Below this line nothing knows text, JSON or HTTP.
//!
//! `Sequence -> ScheduledBatch -> core::Batch -> logits -> TokenId -> SequenceEvent`

pub mod handle;
mod thread;

pub use handle::{
    EngineError, EngineHandle, EngineStatus, FinishReason, GenerationRequest, PromptLogprobs, SequenceEvent,
    SequenceStream, SubmitError, SubmitPermit, TokenEvent,
};
pub use thread::{Engine, EngineConfig, EngineEnd, EngineThread, StartError};
