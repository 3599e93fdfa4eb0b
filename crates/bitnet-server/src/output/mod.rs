//! Generated tokens -> text that may be sent: whole characters only, nothing of a stop string, and each token's
//! log-probability no earlier than its text.
//!
//! Data path: engine events -> [`TextDecoder`] -> (the service's output filter) -> [`Withheld`] -> wire. Nothing in here
//! knows requests, filters or JSON.

mod calls;
mod stop;
mod text;
mod withheld;

pub use calls::{CallPiece, CallReader};
pub use stop::{StopError, StopMatcher, StopStrings};
pub use text::{Piece, TextDecoder};
pub use withheld::Withheld;
