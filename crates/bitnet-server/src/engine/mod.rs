//! The engine: one thread owns the model, the KV cache, the scheduler and the block pool; everything else talks to it
//! through [`handle::EngineHandle`]. Below this line nothing knows text, JSON or HTTP.

pub mod handle;

pub use handle::{
    EngineError, EngineHandle, EngineStatus, FinishReason, GenerationRequest, PromptLogprobs, SequenceEvent,
    SequenceStream, SubmitError, SubmitPermit, TokenEvent,
};
