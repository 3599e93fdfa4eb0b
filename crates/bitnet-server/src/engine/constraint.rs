//! What a choice may say, token by token: the engine's side of structured output. The engine asks for a mask before it samples
//! and reports what was drawn; it knows nothing of grammars. A constraint that fails ends its sequence, never the engine.

use std::{fmt::Debug, time::Instant};

use bitnet_core::{TokenId, sampling::TokenMask};

use super::lookup::Draft;

/// A rule for the output of a request, shared by its choices.
pub trait OutputRule: Debug + Send + Sync {
    /// The rule at the start of one choice.
    fn start(&self) -> Box<dyn TokenConstraint>;

    /// Bytes equal for equal rules: part of what identifies a request.
    fn identity(&self) -> &[u8];
}

/// The rule in the middle of one choice.
pub trait TokenConstraint: Debug + Send {
    /// The tokens that may come next, never none; may wait for a bounded time.
    ///
    /// # Errors
    /// [`ConstraintFailed`]: the sequence ends with it.
    fn allowed(&mut self) -> Result<&TokenMask, ConstraintFailed>;

    /// What the rule foresees, if that is known by `until`: at most [`super::lookup::MAX_DRAFT`] tokens, none of which ends the
    /// output. The forced ones are the only ones allowed, the others one way of several to write what must come.
    fn upcoming(&mut self, until: Instant) -> Option<&Draft>;

    /// `token`, one of those allowed, was drawn and more will follow.
    fn accept(&mut self, token: TokenId);
}

/// The mask could not be computed: the rule grew beyond its limits, or took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the output constraint failed")]
pub struct ConstraintFailed;
