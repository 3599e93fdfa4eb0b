//! The flags that say how a model is held and computed, the same for every command that loads one without serving it.

use bitnet_server::config::RawConfig;

/// Flattened into the arguments of `run`, `bench` and `batch`.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// Compute threads [default: physical cores this process may use]
    #[arg(short, long, env = "BITNET_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Kernel by name, or auto for the fastest this CPU has [default: auto]
    #[arg(long, env = "BITNET_KERNEL", value_name = "auto|NAME")]
    kernel: Option<String>,
    /// Bits a weight in memory; auto measures which is faster here [default: auto]
    #[arg(long, env = "BITNET_PACKING", value_name = "auto|2bit|1.6bit")]
    packing: Option<String>,
    /// Copies of weights that let a single stream skip channels that are zero; auto where measured faster [default: off]
    #[arg(long, env = "BITNET_SPARSE_FFN", value_name = "off|auto|on")]
    sparse_ffn: Option<String>,
    /// Element type of the KV cache; int8 halves its memory and changes results a little [default: f16]
    #[arg(long, env = "BITNET_KV_CACHE_TYPE", value_name = "f32|f16|int8")]
    kv_cache_type: Option<String>,
    /// Physical layout of I2_S tensors in GGUF files [default: a]
    #[arg(long, env = "BITNET_I2S_LAYOUT", value_name = "a|b|c")]
    i2s_layout: Option<String>,
}

impl ModelArgs {
    /// These settings as they were written, and no others.
    pub(crate) fn raw_config(&self) -> RawConfig {
        RawConfig {
            threads: self.threads,
            kernel: self.kernel.clone(),
            packing: self.packing.clone(),
            sparse_ffn: self.sparse_ffn.clone(),
            kv_cache_type: self.kv_cache_type.clone(),
            i2s_layout: self.i2s_layout.clone(),
            ..RawConfig::default()
        }
    }
}
