//! Load programs: each drives a real server and returns what its clients saw.
//!
//! `tests/tests/load.rs` asserts small forms of them in every run of the tests, never a time; the figures are taken by
//! `cargo run --release -p bitnet-tests --bin load -- NAME -m MODEL`, on a machine that does nothing else.

pub mod cached;
pub mod cancel;
pub mod client;
pub mod fairness;
pub mod figures;
pub mod gap;
pub mod overload;
pub mod process;
pub mod soak;
pub mod speculation;
pub mod streams;
