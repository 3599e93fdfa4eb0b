//! The harness of the end-to-end tests: starts the real `bitnet` binary on a free port and talks to it over HTTP.
//!
//! Tests see what users see, so nothing in here reaches into the crates; golden files are read from `tests/golden`.

pub mod golden;
pub mod server;
