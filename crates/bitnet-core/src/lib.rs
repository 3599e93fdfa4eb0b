//! Ternary kernels, model files, forward pass, sampling and tokenizer for 1-bit language models (BitNet b1.58).
//!
//! The crate knows no HTTP, no wire types, no text protocol and no async. Data flows one way:
//! file -> [`checkpoint::Checkpoint`] -> [`model::Model`] -> [`model::Batch`] in, logits out -> [`sampling`] -> token ids
//! -> [`tokenizer::Tokenizer`] -> text. Imports between the modules: `kernels`, `checkpoint` -> `quant`;
//! `kernels`, `quant` -> `threads`; `tokenizer` -> `checkpoint`; `sampling` -> `kernels`; `model` -> `checkpoint`, `quant`, `kernels`, `kv_cache`,
//! `threads`; all others only `ids`.
//!
//! Unsafe code is denied here and allowed only in `kernels`, `threads` and `checkpoint::map`.

pub mod checkpoint;
pub mod ids;
pub mod kernels;
pub mod kv_cache;
pub mod model;
pub mod quant;
pub mod sampling;
pub mod threads;
pub mod tokenizer;

pub use checkpoint::{Checkpoint, LoadError, LoadOptions};
pub use ids::{BlockId, TokenId};
pub use model::{Batch, Model};
pub use tokenizer::Tokenizer;
