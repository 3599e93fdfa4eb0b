//! Grammars at work: joins the engine's masks with the grammar's matcher. A mask is computed on a thread of its own as soon as
//! the token before it is known, while the model computes, so the engine rarely waits and never long. Where a rule leaves no
//! choice, the thread goes on to where there is one, and the engine hears of all tokens up to there at once.

use std::{
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use bitnet_core::{TokenId, sampling::TokenMask};
use tokio::runtime::Handle;

use super::{Service, ServiceError};
use crate::{
    engine::{ConstraintFailed, Draft, MAX_DRAFT, OutputRule, TokenConstraint},
    grammar::{Grammar, Matcher, Outlook, Rule},
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
        let stop_tokens = Arc::clone(&self.stop_tokens);
        Ok(Some(Arc::new(CompiledRule { grammar, stop_tokens, runtime: Handle::current() })))
    }
}

/// A grammar and the threads its masks are computed on.
#[derive(Debug)]
struct CompiledRule {
    grammar: Arc<Grammar>,
    stop_tokens: Arc<[TokenId]>,
    runtime: Handle,
}

impl OutputRule for CompiledRule {
    fn start(&self) -> Box<dyn TokenConstraint> {
        let (stop_tokens, runtime) = (Arc::clone(&self.stop_tokens), self.runtime.clone());
        let mut running = Running { stop_tokens, runtime, pending: None, ready: None };
        let grammar = Arc::clone(&self.grammar);
        running.compute(move || Some(grammar.start()));
        Box::new(running)
    }

    fn identity(&self) -> &[u8] {
        self.grammar.identity()
    }
}

/// One choice on its way.
#[derive(Debug)]
struct Running {
    stop_tokens: Arc<[TokenId]>,
    runtime: Handle,
    /// What is being computed.
    pending: Option<mpsc::Receiver<Step>>,
    /// What was computed last. Neither: the rule failed.
    ready: Option<Step>,
}

/// What may follow.
#[derive(Debug)]
struct Step {
    /// The forced tokens, then likely ones.
    draft: Draft,
    /// The first of the forced tokens alone, once somebody asked.
    only: TokenMask,
    /// Where the forced tokens lead, and what may come there; `None` when the rule fails there.
    then: Option<(Matcher, TokenMask)>,
}

impl Step {
    fn new(outlook: Outlook) -> Self {
        let Outlook { forced, then, likely } = outlook;
        let draft = Draft { num_forced: forced.len(), tokens: [forced, likely].concat() };
        let then = then.inspect_err(|error| tracing::warn!(%error, "a mask failed")).ok();
        Self { draft, only: TokenMask::default(), then }
    }
}

impl Running {
    /// Looks ahead from the matcher that `advance` gives.
    fn compute(&mut self, advance: impl FnOnce() -> Option<Matcher> + Send + 'static) {
        // One answer is ever sent.
        let (sender, receiver) = mpsc::sync_channel(1);
        self.pending = Some(receiver);
        let stop_tokens = Arc::clone(&self.stop_tokens);
        self.runtime.spawn_blocking(move || {
            if let Some(matcher) = advance() {
                // The choice may be gone by now.
                let _ = sender.send(Step::new(matcher.look_ahead(MAX_DRAFT, &stop_tokens)));
            }
        });
    }

    fn wait(&mut self, patience: Duration) {
        match self.pending.as_ref().map(|pending| pending.recv_timeout(patience)) {
            None | Some(Err(RecvTimeoutError::Timeout)) => {}
            Some(step) => (self.pending, self.ready) = (None, step.ok()),
        }
    }
}

impl TokenConstraint for Running {
    fn allowed(&mut self) -> Result<&TokenMask, ConstraintFailed> {
        self.wait(PATIENCE);
        self.pending = None;
        let step = self.ready.as_mut().ok_or(ConstraintFailed)?;
        if step.draft.num_forced > 0 {
            step.only = TokenMask::only(step.draft.tokens[0]);
            return Ok(&step.only);
        }
        step.then.as_ref().map(|(_, mask)| mask).ok_or(ConstraintFailed)
    }

    fn upcoming(&mut self, until: Instant) -> Option<&Draft> {
        self.wait(until.saturating_duration_since(Instant::now()));
        self.ready.as_ref().map(|step| &step.draft)
    }

    fn accept(&mut self, token: TokenId) {
        let Some(mut step) = self.ready.take() else { return };
        if step.draft.num_forced > 0 {
            step.draft.num_forced -= 1;
            step.draft.tokens.remove(0);
            self.ready = Some(step);
        } else if let Some((mut matcher, _)) = step.then {
            self.compute(move || {
                matcher.accept(token).inspect_err(|error| tracing::warn!(%error, "a token failed")).ok()?;
                Some(matcher)
            });
        }
    }
}
