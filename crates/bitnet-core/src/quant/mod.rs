//! Quantization as arithmetic: absmean ternary weights, absmax int8 activations, and the stored formats of ternary codes.

pub mod formats;
pub mod ternary;
