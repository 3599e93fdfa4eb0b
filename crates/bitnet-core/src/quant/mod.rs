//! Quantization as arithmetic: absmean ternary weights, absmax int8 activations, and the stored formats of ternary codes.

pub mod activation;
pub mod formats;
pub mod screen;
pub mod ternary;
