//! [`RawConfig`] -> [`ServerConfig`]: what was written becomes what it means. The only place where settings are checked.

use std::{
    fmt::Display,
    net::{IpAddr, ToSocketAddrs},
    num::NonZeroU32,
    path::PathBuf,
    time::Duration,
};

use bitnet_core::{
    checkpoint::I2sLayout, kernels::packing::PackedLayout, kv_cache::KvDtype, model::SparseFfn,
    threads::default_num_threads,
};

use super::{ConfigError, FilterRules, KeySet, RawConfig};

/// Every setting, checked and complete.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Model to serve; `None`: the built-in one.
    pub model: Option<PathBuf>,
    /// Names clients may use, the id first; empty: the model's own name. `*` accepts every name.
    pub model_names: Vec<String>,
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on; 0: a free one.
    pub port: u16,
    /// A second port for health and metrics; 0: a free one.
    pub metrics_port: Option<u16>,
    /// Compute threads, at least 1.
    pub threads: usize,
    /// Kernel by name; `None`: the fastest this CPU has.
    pub kernel: Option<String>,
    /// Arrangement of the weights; `None` measures which is the fastest.
    pub packing: Option<PackedLayout>,
    /// Copies of weights that let a single stream skip channels.
    pub sparse_ffn: SparseFfn,
    /// Longest prompt and completion together; `None`: the model's.
    pub ctx_size: Option<usize>,
    /// Sequences computed at the same time, at least 1.
    pub max_num_seqs: usize,
    /// Tokens computed in one step, at least `max_num_seqs`.
    pub max_num_batched_tokens: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Prompt tokens of requests that wait; `usize::MAX`: no limit.
    pub max_queue_tokens: usize,
    /// Memory of the KV cache; `None`: from the memory limit.
    pub kv_cache_bytes: Option<u64>,
    /// Element type of the KV cache.
    pub kv_dtype: KvDtype,
    /// Physical layout of I2_S tensors.
    pub i2s_layout: I2sLayout,
    /// Memory that may be used, as set; `None`: as detected.
    pub memory_limit_bytes: Option<u64>,
    /// Who may call; empty: everyone.
    pub api_keys: KeySet,
    /// Requests a minute for each client.
    pub rate_limit_rpm: Option<NonZeroU32>,
    /// Tokens a minute for each client.
    pub rate_limit_tpm: Option<NonZeroU32>,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// Files and batches; `None`: there are none.
    pub data: Option<DataSettings>,
    /// Longest time from arrival to the last byte.
    pub request_timeout: Duration,
    /// Time after which a client that reads nothing of its answer is cut off.
    pub slow_reader_timeout: Duration,
    /// Time running requests get after the first SIGTERM.
    pub drain_timeout: Duration,
    /// Rules of the content filter.
    pub content_filter: Option<FilterRules>,
    /// Memory of the response cache; 0: off.
    pub response_cache_bytes: usize,
    /// Who finds whose prefixes in the KV cache.
    pub prefix_sharing: PrefixSharing,
    /// When tokens are guessed and verified together.
    pub speculation: Speculation,
    /// Choices one request may ask for.
    pub max_n: u32,
    /// Whether unknown request fields are refused.
    pub strict_params: bool,
    /// Sampling of requests that state none, as set by the operator.
    pub sampling: SamplingDefaults,
    /// Form of the log.
    pub log_format: LogFormat,
}

/// Where files and batches are stored, and how much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSettings {
    /// The directory.
    pub dir: PathBuf,
    /// Bytes of one uploaded file.
    pub max_file_bytes: u64,
    /// Bytes of all files.
    pub max_total_bytes: u64,
}

/// The operator's sampling defaults; they win over the model's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    /// 0..=2.
    pub temperature: Option<f32>,
    /// 0..=1.
    pub top_p: Option<f32>,
    /// At least 1.
    pub max_tokens: Option<usize>,
}

/// Who finds whose prefixes in the KV cache. The choices of one request share its prompt in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrefixSharing {
    /// Nobody finds anybody's.
    Off,
    /// A client finds its own, so nobody can learn by timing what others asked.
    #[default]
    PerClient,
    /// Everybody finds everybody's.
    Everyone,
}

/// When tokens are guessed and verified together. Answers are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// Never, forced ones neither: one token a step.
    Off,
    /// Where it pays, as measured.
    #[default]
    Auto,
    /// Wherever there is a guess, so that tests see many; not a setting.
    Always,
}

/// Form of the log on stderr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl ServerConfig {
    /// Lays the sources over each other, checks every value and reads the files that settings name (not the model).
    ///
    /// # Errors
    /// [`ConfigError`], naming the setting and the value.
    pub fn resolve(raw: RawConfig) -> Result<Self, ConfigError> {
        let raw = raw.with_sources()?;
        let host = parse_host(raw.host.as_deref().unwrap_or("127.0.0.1"))?;
        let api_keys = raw.api_key_file.as_deref().map(KeySet::read).transpose()?.unwrap_or_default();
        if !host.is_loopback() && api_keys.is_empty() && !raw.insecure.unwrap_or(false) {
            return Err(ConfigError::OpenToTheWorld(host.to_string()));
        }
        let max_num_seqs = within("max-num-seqs", raw.max_num_seqs.unwrap_or(16), 1, 1024)?;
        let threads = match raw.threads {
            Some(threads) => within("threads", threads, 1, 1024)?,
            None => default_num_threads(),
        };
        let request_timeout = seconds("request-timeout", raw.request_timeout.unwrap_or(600.0), f64::MIN_POSITIVE)?;
        let slow_reader_timeout = raw.slow_reader_timeout.unwrap_or(60.0);
        Ok(Self {
            model: raw.model,
            model_names: parse_model_names(raw.model_name.unwrap_or_default())?,
            host,
            port: raw.port.unwrap_or(8080),
            metrics_port: raw.metrics_port,
            threads,
            kernel: raw.kernel.filter(|name| name != "auto"),
            packing: one_of(
                "packing",
                raw.packing,
                &[
                    ("auto", None),
                    (PackedLayout::T32x2Bit.name(), Some(PackedLayout::T32x2Bit)),
                    (PackedLayout::T32x5Trit.name(), Some(PackedLayout::T32x5Trit)),
                ],
            )?,
            sparse_ffn: one_of("sparse-ffn", raw.sparse_ffn, &SparseFfn::NAMES)?,
            ctx_size: raw.ctx_size.map(|tokens| within("ctx-size", tokens, 1, 1 << 24)).transpose()?,
            max_num_seqs,
            max_num_batched_tokens: within(
                "max-num-batched-tokens",
                raw.max_num_batched_tokens.unwrap_or(512.max(max_num_seqs)),
                max_num_seqs,
                1 << 20,
            )?,
            max_queue: within("max-queue", raw.max_queue.unwrap_or(128), 1, 1 << 20)?,
            max_queue_tokens: match raw.max_queue_tokens {
                Some(tokens) => within("max-queue-tokens", tokens, 1, 1 << 40)?,
                None => usize::MAX,
            },
            kv_cache_bytes: raw.kv_cache_mb.map(|mb| mebibytes("kv-cache-mb", mb, 1)).transpose()?,
            kv_dtype: one_of(
                "kv-cache-type",
                raw.kv_cache_type,
                &[("f16", KvDtype::F16), ("f32", KvDtype::F32), ("int8", KvDtype::Int8)],
            )?,
            i2s_layout: one_of(
                "i2s-layout",
                raw.i2s_layout,
                &[("a", I2sLayout::A), ("b", I2sLayout::B), ("c", I2sLayout::C)],
            )?,
            memory_limit_bytes: raw.memory_limit.map(|size| parse_size("memory-limit", &size)).transpose()?,
            api_keys,
            rate_limit_rpm: parse_rate("rate-limit-rpm", raw.rate_limit_rpm)?,
            rate_limit_tpm: parse_rate("rate-limit-tpm", raw.rate_limit_tpm)?,
            max_body_bytes: parse_body_limit(raw.max_body_bytes)?,
            data: data_settings(raw.data_dir, raw.max_file_bytes, raw.max_data_bytes)?,
            request_timeout,
            slow_reader_timeout: seconds("slow-reader-timeout", slow_reader_timeout, f64::MIN_POSITIVE)?
                .min(request_timeout),
            drain_timeout: seconds("drain-timeout", raw.drain_timeout.unwrap_or(45.0), 0.0)?,
            content_filter: raw.content_filter.as_deref().map(FilterRules::read).transpose()?,
            response_cache_bytes: mebibytes("response-cache-mb", raw.response_cache_mb.unwrap_or(64), 0)? as usize,
            prefix_sharing: match one_of("prefix-cache", raw.prefix_cache, &[("on", true), ("off", false)])? {
                false => PrefixSharing::Off,
                true if raw.shared_prefix_cache.unwrap_or(false) => PrefixSharing::Everyone,
                true => PrefixSharing::PerClient,
            },
            speculation: one_of(
                "speculation",
                raw.speculation,
                &[("auto", Speculation::Auto), ("off", Speculation::Off)],
            )?,
            max_n: within("max-n", raw.max_n.unwrap_or(8), 1, 128)?,
            strict_params: raw.strict_params.unwrap_or(false),
            sampling: SamplingDefaults {
                temperature: raw.temperature.map(|value| within("temperature", value, 0.0, 2.0)).transpose()?,
                top_p: raw.top_p.map(|value| within("top-p", value, 0.0, 1.0)).transpose()?,
                max_tokens: raw.max_tokens.map(|value| within("max-tokens", value, 1, 1 << 24)).transpose()?,
            },
            log_format: one_of("log-format", raw.log_format, &[("text", LogFormat::Text), ("json", LogFormat::Json)])?,
        })
    }
}

fn invalid(setting: &'static str, value: impl Display, reason: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { setting, value: value.to_string(), reason: reason.into() }
}

/// `value` when it lies in `min..=max` (NaN never does).
fn within<T: PartialOrd + Display>(setting: &'static str, value: T, min: T, max: T) -> Result<T, ConfigError> {
    if value >= min && value <= max {
        return Ok(value);
    }
    Err(invalid(setting, &value, format!("must be from {min} to {max}")))
}

/// The meaning of `written` in `choices`; the first one when nothing was written.
fn one_of<T: Copy>(setting: &'static str, written: Option<String>, choices: &[(&str, T)]) -> Result<T, ConfigError> {
    let names = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or ");
    let chosen = match &written {
        None => choices.first(),
        Some(written) => choices.iter().find(|(name, _)| *name == written),
    };
    chosen
        .map(|(_, value)| *value)
        .ok_or_else(|| invalid(setting, written.as_deref().unwrap_or_default(), format!("must be {}", names())))
}

/// An address, or a name that stands for one (`localhost`).
fn parse_host(written: &str) -> Result<IpAddr, ConfigError> {
    let bare = written.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(written);
    if let Ok(address) = bare.parse() {
        return Ok(address);
    }
    let refused = |why: String| invalid("host", written, why);
    let mut addresses = (bare, 0_u16).to_socket_addrs().map_err(|error| refused(error.to_string()))?;
    addresses.next().map(|address| address.ip()).ok_or_else(|| refused("stands for no address".to_owned()))
}

fn parse_model_names(names: Vec<String>) -> Result<Vec<String>, ConfigError> {
    match names.iter().find(|name| name.trim().is_empty() || name.len() > 256 || name.chars().any(char::is_control)) {
        Some(bad) => Err(invalid("model-name", format!("{bad:?}"), "must have 1 to 256 printable bytes")),
        None => Ok(names),
    }
}

fn parse_rate(name: &'static str, per_minute: Option<u32>) -> Result<Option<NonZeroU32>, ConfigError> {
    let parse = |per_minute| {
        NonZeroU32::new(per_minute)
            .ok_or_else(|| invalid(name, per_minute, "must be at least 1; leave it out for no limit"))
    };
    per_minute.map(parse).transpose()
}

fn parse_body_limit(written: Option<String>) -> Result<usize, ConfigError> {
    let Some(written) = written else { return Ok(4 << 20) };
    let bytes = parse_size("max-body-bytes", &written)?;
    usize::try_from(bytes)
        .ok()
        .filter(|bytes| *bytes <= 1 << 30)
        .ok_or_else(|| invalid("max-body-bytes", &written, "must be 1GiB at most"))
}

fn data_settings(
    dir: Option<PathBuf>,
    max_file: Option<String>,
    max_total: Option<String>,
) -> Result<Option<DataSettings>, ConfigError> {
    let size =
        |setting, written: Option<String>, default| written.map_or(Ok(default), |text| parse_size(setting, &text));
    let max_file_bytes = size("max-file-bytes", max_file, 100 << 20)?;
    let max_total_bytes = size("max-data-bytes", max_total, 4 << 30)?;
    Ok(dir.map(|dir| DataSettings { dir, max_file_bytes, max_total_bytes }))
}

/// A size: a whole number of bytes, or a number with B, KB/MB/GB/TB (powers of 1000) or KiB/MiB/GiB/TiB (of 1024;
/// K/M/G/T alone mean these, as in Kubernetes' Ki/Mi/Gi/Ti, which work too).
pub(super) fn parse_size(setting: &'static str, written: &str) -> Result<u64, ConfigError> {
    let refused = || invalid(setting, written, "must be a size above 0 such as 536870912, 512MiB or 1GB");
    let text = written.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1000_u64.pow(2),
        "gb" => 1000_u64.pow(3),
        "tb" => 1000_u64.pow(4),
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "t" | "ti" | "tib" => 1 << 40,
        _ => return Err(refused()),
    };
    let bytes = match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(scale),
        // A fraction makes sense of a unit only.
        Err(_) if scale > 1 => {
            number.parse::<f64>().ok().map(|value| value * scale as f64).filter(|v| *v < 1e18).map(|v| v as u64)
        }
        Err(_) => None,
    };
    bytes.filter(|bytes| *bytes > 0).ok_or_else(refused)
}

/// A setting in MiB as bytes, up to 1 PiB.
fn mebibytes(setting: &'static str, mb: u64, min: u64) -> Result<u64, ConfigError> {
    Ok(within(setting, mb, min, 1 << 30)? << 20)
}

/// A setting in seconds, up to a week.
fn seconds(setting: &'static str, value: f64, min: f64) -> Result<Duration, ConfigError> {
    if value >= min && value <= 604_800.0 {
        return Ok(Duration::from_secs_f64(value));
    }
    Err(invalid(
        setting,
        value,
        "must be a number of seconds up to 604800 (a week), and not negative or 0 where time is needed",
    ))
}
