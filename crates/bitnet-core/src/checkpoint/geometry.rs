//! The limits of a geometry, and the RoPE scalings that come down to one divisor a frequency.
//!
//! Both formats fill a [`ModelConfig`] from what they call their keys and hand it to [`check`]; no later code checks
//! these numbers again. The limits are those of the arithmetic, or far above every model.

use super::{LoadError, ModelConfig};

/// Deepest model.
const MAX_LAYERS: usize = 1_024;

/// Longest row of a linear layer: up to here the integer sum of a row, at most 127 times its length, is exact in `f32`.
const MAX_WIDTH: usize = 131_072;

/// Largest vocabulary.
const MAX_VOCABULARY: usize = 1 << 24;

/// Longest context.
const MAX_CONTEXT: usize = 1 << 24;

/// A RoPE scaling as a file states it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum RopeScaling {
    /// Every frequency divided by the factor.
    Linear { factor: f32 },
    /// Llama 3: long wavelengths divided by the factor, short ones untouched, a smooth step between.
    Llama3 { factor: f32, low_freq_factor: f32, high_freq_factor: f32, original_context: f32 },
}

/// Refuses a geometry that the arithmetic cannot take.
///
/// # Errors
/// [`LoadError::Config`] naming the first number that is out of range.
pub(super) fn check(config: &ModelConfig) -> Result<(), LoadError> {
    let ranges = [
        ("hidden size", config.hidden_size, MAX_WIDTH),
        ("feed-forward size", config.intermediate_size, MAX_WIDTH),
        ("number of layers", config.num_layers, MAX_LAYERS),
        ("number of heads", config.num_heads, MAX_WIDTH),
        ("number of key/value heads", config.num_kv_heads, config.num_heads),
        ("head dimension", config.head_dim, MAX_WIDTH),
        ("vocabulary size", config.vocab_size, MAX_VOCABULARY),
        ("context length", config.max_context, MAX_CONTEXT),
    ];
    for (what, found, limit) in ranges {
        if found == 0 || found > limit {
            return Err(LoadError::config(what, format!("is {found}, outside 1..={limit}")));
        }
    }
    if !config.head_dim.is_multiple_of(2) {
        return Err(LoadError::config("head dimension", format!("is {}, an odd number", config.head_dim)));
    }
    if !config.num_heads.is_multiple_of(config.num_kv_heads) {
        let problem = format!("is {}, no multiple of the {} key/value heads", config.num_heads, config.num_kv_heads);
        return Err(LoadError::config("number of heads", problem));
    }
    let attention = config.num_heads.checked_mul(config.head_dim).filter(|&width| width <= MAX_WIDTH);
    attention.ok_or_else(|| LoadError::config("head dimension", format!("times the heads exceeds {MAX_WIDTH}")))?;
    for (what, found) in [("RoPE base", config.rope_theta), ("RMSNorm epsilon", config.rms_norm_eps)] {
        if !(found.is_finite() && found > 0.0) {
            return Err(LoadError::config(what, format!("is {found}, not a positive number")));
        }
    }
    match &config.rope_freq_factors {
        Some(factors) if !factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) => {
            Err(LoadError::config("RoPE frequency factors", "hold a value that is not a positive number"))
        }
        _ => Ok(()),
    }
}

/// The head dimension when a file does not state it.
///
/// # Errors
/// [`LoadError::Config`] when the heads do not divide the hidden size.
pub(super) fn default_head_dim(hidden_size: usize, num_heads: usize) -> Result<usize, LoadError> {
    match hidden_size.checked_div(num_heads) {
        Some(head_dim) if hidden_size.is_multiple_of(num_heads) => Ok(head_dim),
        _ => Err(LoadError::config(
            "number of heads",
            format!("is {num_heads}, which does not divide the hidden size {hidden_size}"),
        )),
    }
}

impl RopeScaling {
    /// The divisor of each of the `head_dim / 2` frequencies; `None` when all are 1.
    pub(super) fn freq_factors(self, head_dim: usize, theta: f32) -> Option<Vec<f32>> {
        let factor = |pair: usize| match self {
            Self::Linear { factor } => factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let (factor, low, high) = (f64::from(factor), f64::from(low_freq_factor), f64::from(high_freq_factor));
                let exponent = 2.0 * pair as f64 / head_dim as f64;
                let wavelength = 2.0 * std::f64::consts::PI * libm::pow(f64::from(theta), exponent);
                let turns = f64::from(original_context) / wavelength;
                // The frequency is (1 - smooth) / factor + smooth times the plain one, from none to all of it.
                let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            }
        };
        let factors: Vec<f32> = (0..head_dim / 2).map(factor).collect();
        factors.iter().any(|&factor| factor != 1.0).then_some(factors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Activation;

    fn config() -> ModelConfig {
        ModelConfig {
            architecture: "test".into(),
            name: None,
            hidden_size: 256,
            intermediate_size: 512,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 64,
            vocab_size: 512,
            max_context: 4096,
            rope_theta: 10000.0,
            rope_freq_factors: None,
            rms_norm_eps: 1e-5,
            activation: Activation::Silu,
        }
    }

    #[test]
    fn each_limit_refuses_by_name() {
        assert!(check(&config()).is_ok());
        type Edit = fn(&mut ModelConfig);
        let cases: [(&str, Edit); 14] = [
            ("hidden size", |c| c.hidden_size = 0),
            ("hidden size", |c| c.hidden_size = MAX_WIDTH + 1),
            ("feed-forward size", |c| c.intermediate_size = usize::MAX),
            ("number of layers", |c| c.num_layers = 1025),
            ("number of key/value heads", |c| c.num_kv_heads = 5),
            ("number of heads", |c| c.num_kv_heads = 3),
            ("head dimension", |c| c.head_dim = 63),
            ("head dimension", |c| c.head_dim = 65_536),
            ("vocabulary size", |c| c.vocab_size = (1 << 24) + 1),
            ("context length", |c| c.max_context = 0),
            ("RoPE base", |c| c.rope_theta = f32::NAN),
            ("RoPE base", |c| c.rope_theta = 0.0),
            ("RMSNorm epsilon", |c| c.rms_norm_eps = f32::INFINITY),
            ("RoPE frequency factors", |c| c.rope_freq_factors = Some(vec![1.0, 0.0])),
        ];
        for (expected, edit) in cases {
            let mut config = config();
            edit(&mut config);
            let Err(LoadError::Config { key, .. }) = check(&config) else { panic!("{expected} was accepted") };
            assert_eq!(key, expected);
        }
    }

    #[test]
    fn llama3_scaling_keeps_short_waves_and_divides_long_ones() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 };
        let factors = scaling.freq_factors(128, 500_000.0).unwrap();
        assert_eq!(factors.len(), 64);
        assert_eq!((factors[0], factors[63]), (1.0, 8.0));
        assert!(factors.is_sorted());
        // Wavelengths of 8192 / 4 and 8192 / 1 positions lie between pairs 28 and 29, and 34 and 35.
        assert!(factors[28] == 1.0 && factors[29] > 1.0 && factors[34] < 8.0 && factors[35] == 8.0, "{factors:?}");
        assert_eq!(RopeScaling::Linear { factor: 1.0 }.freq_factors(8, 1e4), None);
        assert_eq!(RopeScaling::Linear { factor: 4.0 }.freq_factors(4, 1e4), Some(vec![4.0, 4.0]));
    }
}
