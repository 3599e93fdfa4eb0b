//! Where the process is between its first second and its last, and how many requests it still owes an answer.

use std::sync::Arc;

use tokio::sync::watch;

/// The stations, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Health routes answer, the model is being loaded.
    Loading,
    /// Requests are served.
    Ready,
    /// No new requests; open ones are finished.
    Draining,
    /// The engine has ended although nobody asked it to.
    Dead,
}

/// The current [`Phase`] and the requests in flight.
#[derive(Debug)]
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
    in_flight: watch::Sender<usize>,
}

impl Lifecycle {
    /// At [`Phase::Loading`], nothing in flight.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { phase: watch::Sender::new(Phase::Loading), in_flight: watch::Sender::new(0) })
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves on to `phase`.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Counts one request until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> InFlight {
        self.in_flight.send_modify(|count| *count += 1);
        InFlight(Arc::clone(self))
    }

    /// Waits until nothing is in flight.
    pub async fn idle(&self) {
        // The sender lives in `self`, so the channel cannot close while we wait.
        let _ = self.in_flight.subscribe().wait_for(|count| *count == 0).await;
    }
}

/// A request that is owed an answer.
#[derive(Debug)]
pub struct InFlight(Arc<Lifecycle>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.send_modify(|count| *count -= 1);
    }
}
