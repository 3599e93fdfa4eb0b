//! The serving library: prompts so far.

pub mod prompt;
