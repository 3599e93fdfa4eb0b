//! The lines of batches: those of clients, worked off behind everything else while the server runs, and those of a file on the
//! command line. Each line takes the way of a request over HTTP.

mod input;
mod offline;
mod work;

pub use offline::{OfflineError, OfflineSummary, run_offline};
pub(crate) use work::work_off;

use std::time::{Duration, Instant};

use crate::{
    config::ClientId,
    http::{LineAnswer, answer_line},
    openai::{InputLine, LineResponse, OutputLine},
    service::{Caller, CutOff, Service, ServiceError},
    storage::Outcome,
};

/// A busy server is asked again after so long.
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// The answer of `line` as a line of a file; `None` when the server ends first.
async fn answered(service: &Service, line: &InputLine, strict: bool, client: ClientId) -> Option<(Outcome, Vec<u8>)> {
    let request_id = format!("req-{:032x}", rand::random::<u128>());
    let (status_code, body) = loop {
        let caller = Caller { client, arrival: Instant::now(), is_limited: false, cut_off: CutOff::default() };
        match answer_line(service, line, strict, caller, &request_id).await {
            LineAnswer::Given(status_code, body) => break (status_code, body),
            LineAnswer::NotNow(ServiceError::Draining | ServiceError::EngineStopped) => return None,
            LineAnswer::NotNow(_) => tokio::time::sleep(BUSY_PAUSE).await,
        }
    };
    let outcome = if status_code == 200 { Outcome::Answered } else { Outcome::Failed };
    let line = OutputLine {
        id: format!("batch_req_{:032x}", rand::random::<u128>()),
        custom_id: &line.custom_id,
        response: LineResponse { status_code, request_id, body },
        error: None,
    };
    let mut bytes = serde_json::to_vec(&line).ok()?;
    bytes.push(b'\n');
    Some((outcome, bytes))
}
