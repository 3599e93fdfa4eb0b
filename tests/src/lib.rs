//! The harness of the end-to-end tests: starts the real `bitnet` binary on a free port and talks to it over HTTP.
//!
//! Tests see what users see. Only the tokenizer's vectors, of which the real ones are not shipped, go through the library.

pub mod golden;
pub mod load;
pub mod server;
pub mod tokenizer_support;
