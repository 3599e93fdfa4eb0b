//! Grammars at work: joins the engine's masks with the grammar's matcher. A mask is computed on a thread of its own as soon as
//! the token before it is known, while the model computes, so the engine rarely waits and never long.

use std::{sync::Arc, sync::mpsc, time::Duration};

use bitnet_core::{TokenId, sampling::TokenMask};
use tokio::runtime::Handle;

use super::{Service, ServiceError};
use crate::{
    engine::{ConstraintFailed, OutputRule, TokenConstraint},
    grammar::{Grammar, Matcher, Rule},
};

/// The engine waits this long for a mask; the grammar's own limits strike long before.
const PATIENCE: Duration = Duration::from_secs(5);

/// A rule as sent, and the field it came in.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestRule {
    /// The top-level field.
    pub param: &'static str,
    /// Where in the request the rule is.
    pub path: String,
    /// The rule.
    pub rule: Rule,
}

impl RequestRule {
    /// Whether the output may hold tool calls.
    pub(super) fn has_calls(&self) -> bool {
        matches!(self.rule, Rule::Calls(_))
    }

    /// Whether all of the output has a form, so that it cannot just end anywhere.
    pub(super) fn is_closed(&self) -> bool {
        match &self.rule {
            Rule::Calls(calls) => calls.required || calls.otherwise.is_some(),
            _ => true,
        }
    }
}

impl Service {
    /// `rule` compiled for the engine.
    pub(super) async fn constraint(
        &self,
        rule: Option<&RequestRule>,
    ) -> Result<Option<Arc<dyn OutputRule>>, ServiceError> {
        let Some(RequestRule { param, path, rule }) = rule.cloned() else { return Ok(None) };
        let grammars = Arc::clone(&self.grammars);
        let compiled = tokio::task::spawn_blocking(move || grammars.compile(&rule, &path)).await;
        let compiled = compiled.map_err(|error| ServiceError::Internal(format!("compiling ended early: {error}")))?;
        let grammar = compiled.map_err(|error| ServiceError::Unsupported {
            param: param.to_owned(),
            message: format!("Invalid or unsupported output rule at '{}': {}.", error.path, error.message),
        })?;
        Ok(Some(Arc::new(CompiledRule { grammar: Arc::new(grammar), runtime: Handle::current() })))
    }
}

/// A grammar and the threads its masks are computed on.
#[derive(Debug)]
struct CompiledRule {
    grammar: Arc<Grammar>,
    runtime: Handle,
}

impl OutputRule for CompiledRule {
    fn start(&self) -> Box<dyn TokenConstraint> {
        let mut running = Running { runtime: self.runtime.clone(), pending: None, ready: None };
        let grammar = Arc::clone(&self.grammar);
        running.compute(move || Some(grammar.start()));
        Box::new(running)
    }

    fn identity(&self) -> &[u8] {
        self.grammar.identity()
    }
}

/// A matcher and the mask of what may follow.
type Step = (Matcher, TokenMask);

/// One choice on its way.
#[derive(Debug)]
struct Running {
    runtime: Handle,
    /// The mask that is being computed.
    pending: Option<mpsc::Receiver<Option<Step>>>,
    /// The mask that was asked for last. Neither: the rule failed.
    ready: Option<Step>,
}

impl Running {
    /// Computes the mask of the matcher that `advance` gives.
    fn compute(&mut self, advance: impl FnOnce() -> Option<Matcher> + Send + 'static) {
        // One answer is ever sent.
        let (sender, receiver) = mpsc::sync_channel(1);
        self.pending = Some(receiver);
        self.runtime.spawn_blocking(move || {
            let step = advance().and_then(|mut matcher| {
                let mask = matcher.mask().inspect_err(|error| tracing::warn!(%error, "a mask failed")).ok()?;
                Some((matcher, mask))
            });
            // The choice may be gone by now.
            let _ = sender.send(step);
        });
    }
}

impl TokenConstraint for Running {
    fn allowed(&mut self) -> Result<&TokenMask, ConstraintFailed> {
        if let Some(pending) = self.pending.take() {
            self.ready = pending.recv_timeout(PATIENCE).ok().flatten();
        }
        self.ready.as_ref().map(|(_, mask)| mask).ok_or(ConstraintFailed)
    }

    fn accept(&mut self, token: TokenId) {
        let Some((mut matcher, _)) = self.ready.take() else { return };
        self.compute(move || {
            matcher.accept(token).inspect_err(|error| tracing::warn!(%error, "a token failed")).ok()?;
            Some(matcher)
        });
    }
}
