//! The serving library: HTTP request in, OpenAI-shaped answer out, over one engine thread.
//!
//! Layers, imports point down only: L0 `config`, `openai`, `metrics`; L1 `limits`, `filter`, `prompt`, `output`,
//! `response_cache`, `engine` (siblings never meet); L2 `service`; L3 `http`; L4 this file, `load` and `shutdown`.

pub mod config;
pub mod engine;
pub mod filter;
pub mod limits;
pub mod metrics;
pub mod openai;
pub mod output;
pub mod prompt;
pub mod response_cache;
pub mod service;
