//! The end: the first signal starts the drain, the second ends it.

use std::{io, time::Duration};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    engine::{EngineEnd, EngineHandle, EngineThread},
    service::{Lifecycle, Phase},
};

/// SIGTERM and SIGINT, from the moment of [`Signals::listen`] on.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// What is left to be written when everything has ended gets this long.
const FAREWELL: Duration = Duration::from_secs(2);

impl Signals {
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next signal. Cancel-safe.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Finishes what is in flight within `drain_timeout`; what is left then ends with an error. A second signal ends the wait.
/// New requests are refused meanwhile, by the phase.
pub(crate) async fn drain(
    lifecycle: &Lifecycle,
    engine: &EngineHandle,
    thread: &mut EngineThread,
    signals: &mut Signals,
    drain_timeout: Duration,
) {
    lifecycle.enter(Phase::Draining);
    tracing::info!(seconds = drain_timeout.as_secs_f64(), "draining: open requests are finished, new ones refused");
    tokio::select! {
        () = lifecycle.idle() => {}
        () = tokio::time::sleep(drain_timeout) => tracing::warn!("the drain time is over: open requests end with an error"),
        () = signals.next() => tracing::warn!("second signal: open requests end with an error"),
        end = thread.stopped() => tracing::error!(?end, "the engine ended during the drain"),
    }
    engine.shutdown();
    // Streams learn of the end through the engine; their last words still have to be written.
    let _ = tokio::time::timeout(FAREWELL, lifecycle.idle()).await;
}

/// The engine ended although nobody asked it to: its streams end with an error, the process will.
pub(crate) async fn mourn(lifecycle: &Lifecycle, end: EngineEnd) -> String {
    lifecycle.enter(Phase::Dead);
    // Short: a supervisor is waiting to restart us.
    let _ = tokio::time::timeout(FAREWELL / 4, lifecycle.idle()).await;
    match end {
        EngineEnd::Died(reason) => reason,
        EngineEnd::Shutdown => "it ended without being asked to".to_owned(),
    }
}
