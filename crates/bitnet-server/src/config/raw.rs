//! [`RawConfig`]: the one definition of each setting's name. The flag is `--name`, its twins are `BITNET_NAME` and the
//! TOML key `name` (`-` or `_`). Every field is optional, so sources can be laid over each other:
//! flag > environment > `--config FILE` > `--profile NAME` > default. What a value means is `resolve.rs`' business.

use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use serde::{Deserialize, Deserializer};

use super::ConfigError;

/// Settings as written. Flatten it into a clap command; clap reads flags and the environment.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RawConfig {
    /// Model to serve: a GGUF file or a Hugging Face directory [default: the built-in one]
    #[arg(short, long, env = "BITNET_MODEL", value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Name clients use; repeat for aliases, '*' accepts every name [default: the file's name without extension]
    #[arg(long, env = "BITNET_MODEL_NAME", value_name = "NAME", value_delimiter = ',')]
    #[serde(deserialize_with = "one_or_many")]
    #[serde(default)]
    pub model_name: Option<Vec<String>>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, env = "BITNET_HOST", value_name = "HOST")]
    pub host: Option<String>,
    /// Port to listen on; 0 picks a free one and prints it [default: 8080]
    #[arg(long, env = "BITNET_PORT", value_name = "PORT")]
    pub port: Option<u16>,
    /// Port for health and metrics besides the main one; 0 picks a free one [default: none]
    #[arg(long, env = "BITNET_METRICS_PORT", value_name = "PORT")]
    pub metrics_port: Option<u16>,
    /// Compute threads [default: physical cores this process may use]
    #[arg(short, long, env = "BITNET_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Kernel by name, or auto for the fastest this CPU has [default: auto]
    #[arg(long, env = "BITNET_KERNEL", value_name = "auto|NAME")]
    pub kernel: Option<String>,
    /// Bits a weight in memory; auto measures which is faster here [default: auto]
    #[arg(long, env = "BITNET_PACKING", value_name = "auto|2bit|1.6bit")]
    pub packing: Option<String>,
    /// Copies of weights that let a single stream skip channels that are zero; auto where measured faster [default: off]
    #[arg(long, env = "BITNET_SPARSE_FFN", value_name = "off|auto|on")]
    pub sparse_ffn: Option<String>,
    /// Longest prompt and completion together, in tokens [default: the model's context]
    #[arg(long, env = "BITNET_CTX_SIZE", value_name = "TOKENS")]
    pub ctx_size: Option<usize>,
    /// Sequences computed at the same time [default: 16]
    #[arg(long, env = "BITNET_MAX_NUM_SEQS", value_name = "N")]
    pub max_num_seqs: Option<usize>,
    /// Tokens computed in one step [default: 512]
    #[arg(long, env = "BITNET_MAX_NUM_BATCHED_TOKENS", value_name = "N")]
    pub max_num_batched_tokens: Option<usize>,
    /// Requests that may wait; more are answered 503 [default: 128]
    #[arg(long, env = "BITNET_MAX_QUEUE", value_name = "N")]
    pub max_queue: Option<usize>,
    /// Prompt tokens that may wait; more are answered 503 [default: no limit of its own]
    #[arg(long, env = "BITNET_MAX_QUEUE_TOKENS", value_name = "N")]
    pub max_queue_tokens: Option<usize>,
    /// Memory for keys and values, in MiB [default: four full contexts if they fit]
    #[arg(long, env = "BITNET_KV_CACHE_MB", value_name = "MB")]
    pub kv_cache_mb: Option<u64>,
    /// Element type of the KV cache; int8 halves its memory and changes results a little [default: f16]
    #[arg(long, env = "BITNET_KV_CACHE_TYPE", value_name = "f32|f16|int8")]
    pub kv_cache_type: Option<String>,
    /// Physical layout of I2_S tensors in GGUF files [default: a]
    #[arg(long, env = "BITNET_I2S_LAYOUT", value_name = "a|b|c")]
    pub i2s_layout: Option<String>,
    /// Memory that weights, KV cache and caches may use together, e.g. 2GiB [default: the container's or the machine's]
    #[arg(long, env = "BITNET_MEMORY_LIMIT", value_name = "SIZE")]
    #[serde(deserialize_with = "text_or_number")]
    #[serde(default)]
    pub memory_limit: Option<String>,
    /// File of API keys, one a line: name:secret or name:sha256:HEX [default: none, no key is asked for]
    #[arg(long, env = "BITNET_API_KEY_FILE", value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Serve beyond loopback without keys
    #[arg(long, env = "BITNET_INSECURE", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    pub insecure: Option<bool>,
    /// Requests a minute for each client [default: no limit]
    #[arg(long, env = "BITNET_RATE_LIMIT_RPM", value_name = "N")]
    pub rate_limit_rpm: Option<u32>,
    /// Tokens a minute for each client, counted before anything is computed: the prompt and, for each choice, as many tokens
    /// as the answer may have [default: no limit]
    #[arg(long, env = "BITNET_RATE_LIMIT_TPM", value_name = "N")]
    pub rate_limit_tpm: Option<u32>,
    /// Largest request body, in bytes or as 4MiB [default: 4MiB]
    #[arg(long, env = "BITNET_MAX_BODY_BYTES", value_name = "N")]
    #[serde(deserialize_with = "text_or_number")]
    #[serde(default)]
    pub max_body_bytes: Option<String>,
    /// Directory for the files and batches of clients; without it there are none [default: none]
    #[arg(long, env = "BITNET_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Largest uploaded file [default: 100MiB]
    #[arg(long, env = "BITNET_MAX_FILE_BYTES", value_name = "SIZE")]
    #[serde(deserialize_with = "text_or_number")]
    #[serde(default)]
    pub max_file_bytes: Option<String>,
    /// All files of all clients together, answers of batches included [default: 4GiB]
    #[arg(long, env = "BITNET_MAX_DATA_BYTES", value_name = "SIZE")]
    #[serde(deserialize_with = "text_or_number")]
    #[serde(default)]
    pub max_data_bytes: Option<String>,
    /// Seconds a request may take from arrival to its last byte [default: 600]
    #[arg(long, env = "BITNET_REQUEST_TIMEOUT", value_name = "SECONDS")]
    pub request_timeout: Option<f64>,
    /// Seconds after which a client that reads nothing of its answer is cut off [default: 60, request-timeout at most]
    #[arg(long, env = "BITNET_SLOW_READER_TIMEOUT", value_name = "SECONDS")]
    pub slow_reader_timeout: Option<f64>,
    /// Seconds that running requests get to finish after SIGTERM [default: 45]
    #[arg(long, env = "BITNET_DRAIN_TIMEOUT", value_name = "SECONDS")]
    pub drain_timeout: Option<f64>,
    /// TOML file of content filter rules [default: none]
    #[arg(long, env = "BITNET_CONTENT_FILTER", value_name = "FILE")]
    pub content_filter: Option<PathBuf>,
    /// Memory for answers of deterministic requests, in MiB; 0 turns the cache off [default: 64]
    #[arg(long, env = "BITNET_RESPONSE_CACHE_MB", value_name = "MB")]
    pub response_cache_mb: Option<u64>,
    /// Keep keys and values of prompts for prompts that start the same [default: on]
    #[arg(long, env = "BITNET_PREFIX_CACHE", value_name = "on|off")]
    pub prefix_cache: Option<String>,
    /// Let clients find each other's prompts in the prefix cache, which lets them guess by timing what others asked
    #[arg(long, env = "BITNET_SHARED_PREFIX_CACHE", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    pub shared_prefix_cache: Option<bool>,
    /// Guess tokens that stood in the text before, or in `prediction`, and verify them together where that is faster; the
    /// Guess tokens that stood in the text before, in `prediction`, or that an output's form asks for, and verify them together
    /// where that is faster; tokens that the form forces are computed together. Off computes one token a step. The answers are
    /// the same [default: auto]
    #[arg(long, env = "BITNET_SPECULATION", value_name = "auto|off")]
    pub speculation: Option<String>,
    /// Choices (n) that one request may ask for [default: 8]
    #[arg(long, env = "BITNET_MAX_N", value_name = "N")]
    pub max_n: Option<u32>,
    /// Refuse request fields that are not known
    #[arg(long, env = "BITNET_STRICT_PARAMS", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    pub strict_params: Option<bool>,
    /// Temperature of requests that state none [default: the model's, else 1]
    #[arg(long, env = "BITNET_TEMPERATURE", value_name = "T")]
    pub temperature: Option<f32>,
    /// top_p of requests that state none [default: the model's, else 1]
    #[arg(long, env = "BITNET_TOP_P", value_name = "P")]
    pub top_p: Option<f32>,
    /// Completion tokens of requests that state no limit [default: chat to the end of the context, completions 16]
    #[arg(short = 'n', long, env = "BITNET_MAX_TOKENS", value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Form of the log on stderr [default: text]
    #[arg(long, env = "BITNET_LOG_FORMAT", value_name = "text|json")]
    pub log_format: Option<String>,
    /// Built-in set of defaults: mobile, edge, server or cloud [default: none]
    #[arg(long, env = "BITNET_PROFILE", value_name = "NAME")]
    pub profile: Option<String>,
    /// TOML file of these settings; a file is read only when named here
    #[arg(long, env = "BITNET_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// The profiles, compiled in.
const PROFILES: [(&str, &str); 4] = [
    ("mobile", include_str!("../../../../config/profiles/mobile.toml")),
    ("edge", include_str!("../../../../config/profiles/edge.toml")),
    ("server", include_str!("../../../../config/profiles/server.toml")),
    ("cloud", include_str!("../../../../config/profiles/cloud.toml")),
];

impl RawConfig {
    /// These settings over those of the file they name, over those of the profile named by either.
    ///
    /// # Errors
    /// [`ConfigError`] when the file or the profile cannot be read.
    pub fn with_sources(self) -> Result<Self, ConfigError> {
        let mut merged = self;
        if let Some(path) = merged.config.clone() {
            let file = Self::from_file(&path)?;
            merged = merged.over(file);
        }
        if let Some(name) = merged.profile.clone() {
            let Some((name, text)) = PROFILES.iter().find(|(known, _)| *known == name) else {
                let reason = format!("no such profile: there are {}", PROFILES.map(|(known, _)| known).join(", "));
                return Err(ConfigError::Invalid { setting: "profile", value: name, reason });
            };
            merged = merged.over(Self::from_toml(text, name)?);
        }
        Ok(merged)
    }

    /// Settings of a TOML text; `origin` is named in errors. Keys are flag names, with `-` or `_`.
    ///
    /// # Errors
    /// [`ConfigError::File`] for broken TOML, an unknown key or a value of the wrong type, naming it.
    pub fn from_toml(text: &str, origin: &str) -> Result<Self, ConfigError> {
        let broken = |reason: String| ConfigError::File { path: origin.to_owned(), reason };
        let table: toml::Table = toml::from_str(text).map_err(|error| broken(toml_reason(text, &error)))?;
        let mut settings = toml::Table::new();
        for (key, value) in table {
            let name = key.replace('_', "-");
            if settings.insert(name, value).is_some() {
                return Err(broken(format!("`{key}` is set twice")));
            }
        }
        serde_path_to_error::deserialize(toml::Value::Table(settings)).map_err(|error| {
            let at = error.path().to_string();
            let reason = error.inner().message();
            broken(if at == "." { reason.to_owned() } else { format!("{at}: {reason}") })
        })
    }

    fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable {
            setting: "config",
            path: origin.clone(),
            reason: error.to_string(),
        })?;
        Self::from_toml(&text, &origin)
    }
}

/// A TOML error as one line, with the number of the line it is about.
pub(super) fn toml_reason(text: &str, error: &toml::de::Error) -> String {
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => format!("line {}: {}", before.matches('\n').count() + 1, error.message()),
        None => error.message().to_owned(),
    }
}

/// `over` for every field listed; the struct literal makes a forgotten one a compile error.
macro_rules! overlay {
    ($($field:ident),* $(,)?) => {
        impl RawConfig {
            /// These settings where they say something, `lower`'s elsewhere.
            #[must_use]
            pub fn over(self, lower: Self) -> Self {
                Self { $($field: self.$field.or(lower.$field)),* }
            }
        }
    };
}

overlay!(
    model,
    model_name,
    host,
    port,
    metrics_port,
    threads,
    kernel,
    packing,
    sparse_ffn,
    ctx_size,
    max_num_seqs,
    max_num_batched_tokens,
    max_queue,
    max_queue_tokens,
    kv_cache_mb,
    kv_cache_type,
    i2s_layout,
    memory_limit,
    api_key_file,
    insecure,
    rate_limit_rpm,
    rate_limit_tpm,
    max_body_bytes,
    data_dir,
    max_file_bytes,
    max_data_bytes,
    request_timeout,
    slow_reader_timeout,
    drain_timeout,
    content_filter,
    response_cache_mb,
    prefix_cache,
    shared_prefix_cache,
    speculation,
    max_n,
    strict_params,
    temperature,
    top_p,
    max_tokens,
    log_format,
    profile,
    config,
);

/// A string or an array of strings.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a string or an array of strings")]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(Some(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(name) => vec![name],
        OneOrMany::Many(names) => names,
    }))
}

/// A size as `"512MiB"` or as a plain number of bytes.
fn text_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a size such as \"512MiB\" or a number of bytes")]
    enum TextOrNumber {
        Text(String),
        Number(u64),
    }
    Ok(Some(match TextOrNumber::deserialize(deserializer)? {
        TextOrNumber::Text(text) => text,
        TextOrNumber::Number(number) => number.to_string(),
    }))
}
