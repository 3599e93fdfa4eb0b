//! Settings by example: names and precedence, ranges, files, keys and memory.

use std::{collections::BTreeMap, io::Write, path::PathBuf};

use clap::{Args, Command, FromArgMatches};

use super::*;

/// A file with `text` that is gone when dropped.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bitnet-config-{}-{name}", std::process::id()));
        let mut file = std::fs::File::create(&path).expect("the temporary folder is writable");
        file.write_all(text.as_bytes()).expect("the temporary folder is writable");
        Self(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

fn command() -> Command {
    RawConfig::augment_args(Command::new("test"))
}

/// What flags alone say; the number of threads is set, since the default asks the machine.
fn flags(arguments: &[&str]) -> RawConfig {
    let all = ["test", "--threads", "2"].iter().chain(arguments);
    let matches = command().try_get_matches_from(all).unwrap_or_else(|error| panic!("{error}"));
    RawConfig::from_arg_matches(&matches).unwrap_or_else(|error| panic!("{error}"))
}

fn resolve(arguments: &[&str]) -> Result<ServerConfig, ConfigError> {
    ServerConfig::resolve(flags(arguments))
}

#[test]
fn defaults_are_those_of_the_contract() {
    let config = resolve(&[]).expect("defaults are valid");
    assert_eq!((config.host.to_string().as_str(), config.port, config.metrics_port), ("127.0.0.1", 8080, None));
    assert_eq!((config.max_num_seqs, config.max_queue, config.max_n), (16, 128, 8));
    assert_eq!((config.max_body_bytes, config.response_cache_bytes), (4 << 20, 64 << 20));
    assert_eq!((config.request_timeout.as_secs(), config.drain_timeout.as_secs()), (600, 45));
    assert_eq!((config.kernel, config.ctx_size, config.kv_cache_bytes), (None, None, None));
    assert_eq!(config.kv_dtype, bitnet_core::kv_cache::KvDtype::F16);
    assert!(config.api_keys.is_empty() && config.rate_limit_rpm.is_none() && config.content_filter.is_none());
    assert_eq!(config.sampling, SamplingDefaults::default());
}

#[test]
fn each_setting_has_one_name_everywhere() {
    let mut names = Vec::new();
    for argument in
        command().get_arguments().filter(|argument| !["help", "version"].contains(&argument.get_id().as_str()))
    {
        let flag = argument.get_long().expect("every setting has a flag");
        let variable = format!("BITNET_{}", flag.replace('-', "_").to_uppercase());
        assert_eq!(argument.get_env().and_then(|name| name.to_str()), Some(variable.as_str()));
        assert!(argument.get_help().is_some(), "{flag}");
        names.push(flag.to_owned());
    }
    assert!(names.len() > 25);
    // A wrong type is an error of its own kind, so a key that is known never reads as unknown.
    for name in names.iter().filter(|name| *name != "config") {
        for key in [name.clone(), name.replace('-', "_")] {
            let error =
                RawConfig::from_toml(&format!("{key} = {{}}"), "x").expect_err("no setting is a table").to_string();
            assert!(error.contains(name.as_str()) && !error.contains("unknown field"), "{error}");
        }
    }
}

#[test]
fn default_toml_documents_every_setting_with_its_default() {
    let text = include_str!("../../../../config/default.toml");
    assert_eq!(RawConfig::from_toml(text, "default.toml"), Ok(RawConfig::default()), "all lines are comments");
    let settings: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.strip_prefix('#')?.split_once(" = "))
        .filter(|(key, _)| !key.contains(' '))
        .collect();
    for argument in command().get_arguments().filter(|argument| argument.get_id() != "config") {
        let Some(flag) = argument.get_long().filter(|flag| *flag != "help") else { continue };
        let value = settings.get(flag).unwrap_or_else(|| panic!("{flag} is not documented"));
        RawConfig::from_toml(&format!("{flag} = {value}"), "default.toml").unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn flags_win_over_the_file_and_the_file_over_the_profile() {
    let file = TempFile::new("sources.toml", "profile = \"edge\"\nmax_queue = 7\nport = 1000\nmodel-name = \"one\"\n");
    let path = file.0.to_str().expect("utf-8");
    let config =
        resolve(&["--config", path, "--port", "2000", "--model-name", "a", "--model-name", "b"]).expect("valid");
    assert_eq!((config.port, config.max_queue, config.max_num_seqs), (2000, 7, 4));
    assert_eq!(config.model_names, ["a", "b"]);
    let config = resolve(&["--config", path, "--profile", "mobile"]).expect("valid");
    assert_eq!((config.max_num_seqs, config.ctx_size, config.model_names), (1, Some(2048), vec!["one".to_owned()]));
}

#[test]
fn every_profile_is_valid() {
    for name in ["mobile", "edge", "server", "cloud"] {
        resolve(&["--profile", name, "--insecure"]).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let error = resolve(&["--profile", "laptop"]).expect_err("unknown");
    assert_eq!(error.to_string(), "--profile laptop: no such profile: there are mobile, edge, server, cloud");
}

#[test]
fn the_files_of_deploy_are_valid() {
    for text in [
        include_str!("../../../../deploy/kubernetes/base/config.toml"),
        include_str!("../../../../deploy/kubernetes/overlays/edge/config.toml"),
        include_str!("../../../../deploy/kubernetes/overlays/server/config.toml"),
        include_str!("../../../../deploy/kubernetes/overlays/cloud/config.toml"),
    ] {
        let raw = RawConfig::from_toml(text, "config.toml").unwrap_or_else(|error| panic!("{error}"));
        assert!(raw.api_key_file.is_some() && raw.metrics_port == Some(9090), "what the manifests mount and probe");
        let drain_seconds = raw.drain_timeout.expect("the grace period depends on it");
        assert!(15.0 + drain_seconds < 75.0, "preStop and drain fit the grace period");
        let elsewhere = RawConfig { api_key_file: None, insecure: Some(true), threads: Some(1), ..raw };
        ServerConfig::resolve(elsewhere).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_bad_file_is_refused_by_name() {
    let error = |text: &str| RawConfig::from_toml(text, "my.toml").expect_err("bad").to_string();
    assert!(error("max-que = 1").starts_with("my.toml: ") && error("max-que = 1").contains("`max-que`"));
    assert!(error("port = \"x\"").contains("port") && error("port = 70000").contains("port"));
    assert!(
        error("port = 1\nport = 2").contains("line 2: duplicate key")
            && error("max-n = 1\nmax_n = 2").contains("set twice")
    );
    assert!(error("config = \"other.toml\"").contains("`config`"));
    assert!(error("# x\nport 1").starts_with("my.toml: line 2: "));
    assert!(["port 1", "port = \"x\"", "max-que = 1"].iter().all(|text| !error(text).contains('\n')), "one line");
    let missing = resolve(&["--config", "/nonexistent/x.toml"]).expect_err("missing");
    assert!(missing.to_string().starts_with("--config /nonexistent/x.toml: "), "{missing}");
}

#[test]
fn values_outside_their_range_are_refused_by_flag_and_value() {
    let cases = [
        ("--max-num-seqs", "0"),
        ("--threads", "0"),
        ("--ctx-size", "0"),
        ("--max-num-batched-tokens", "3"),
        ("--max-queue", "0"),
        ("--kv-cache-mb", "0"),
        ("--kv-cache-type", "int4"),
        ("--i2s-layout", "d"),
        ("--packing", "2"),
        ("--sparse-ffn", "yes"),
        ("--memory-limit", "lots"),
        ("--memory-limit", "0"),
        ("--memory-limit", "1.5"),
        ("--rate-limit-rpm", "0"),
        ("--max-body-bytes", "2GiB"),
        ("--request-timeout", "0"),
        ("--request-timeout", "NaN"),
        ("--drain-timeout", "700000"),
        ("--max-n", "0"),
        ("--temperature", "2.5"),
        ("--temperature", "NaN"),
        ("--top-p", "1.1"),
        ("--max-tokens", "0"),
        ("--log-format", "xml"),
        ("--host", "no such host"),
        ("--model-name", " "),
    ];
    for (flag, value) in cases {
        let mut raw = RawConfig { threads: None, ..RawConfig::default() };
        let matches =
            command().try_get_matches_from(["test", &format!("{flag}={value}")]).unwrap_or_else(|e| panic!("{e}"));
        raw.update_from_arg_matches(&matches).unwrap_or_else(|error| panic!("{error}"));
        raw.threads = raw.threads.or(Some(1));
        let error = ServerConfig::resolve(raw).expect_err(flag).to_string();
        assert!(error.starts_with(flag) && error.contains(value), "{flag} {value}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn sizes_are_read_in_both_systems() {
    let size = |text: &str| resolve(&["--memory-limit", text]).map(|config| config.memory_limit_bytes);
    let cases = [
        ("536870912", 512 << 20),
        ("512MiB", 512 << 20),
        ("512 mib", 512 << 20),
        ("1.5Gi", 3 << 29),
        ("1GB", 1_000_000_000),
        ("2k", 2048),
    ];
    for (text, bytes) in cases {
        assert_eq!(size(text), Ok(Some(bytes)), "{text}");
    }
    for text in ["", "MiB", "-1", "1.2.3MiB", "99999999999999TiB", "1XB", "1e3"] {
        assert!(resolve(&[&format!("--memory-limit={text}")]).is_err(), "{text}");
    }
}

#[test]
fn beyond_loopback_takes_keys_or_a_word() {
    let error = resolve(&["--host", "0.0.0.0"]).expect_err("open to the world");
    assert!(error.to_string().starts_with("--host 0.0.0.0 ") && error.to_string().contains("--api-key-file"));
    assert!(resolve(&["--host", "0.0.0.0", "--insecure"]).is_ok());
    assert!(resolve(&["--host", "::1"]).is_ok() && resolve(&["--host", "[::1]"]).is_ok());
    assert!(resolve(&["--host", "127.9.9.9"]).is_ok() && resolve(&["--host", "localhost"]).is_ok());
    let file = TempFile::new("open.keys", "app:secret\n");
    assert!(resolve(&["--host", "::", "--api-key-file", file.0.to_str().expect("utf-8")]).is_ok());
    assert!(resolve(&["--host", "0.0.0.0", "--insecure=false"]).is_err());
}

#[test]
fn keys_are_known_by_secret_or_by_hash() {
    let text = "# team\nalice:s3cret:with:colons\n\n bob : sha256:2BB80D537B1DA3E38BD30361AA855686BDE0EACD7162FEF6A25FE97BF527A25B \n";
    let keys = KeySet::parse(text, "keys").expect("valid");
    let alice = keys.authenticate("s3cret:with:colons").expect("alice");
    let bob = keys.authenticate("secret").expect("bob, by the hash of `secret`");
    assert_ne!(alice, bob);
    assert_eq!(keys.authenticate("s3cret:with:colons"), Some(alice));
    for wrong in ["", "s3cret", "sha256:2BB8", "alice", "Secret"] {
        assert_eq!(keys.authenticate(wrong), None, "{wrong}");
    }
    assert_eq!(format!("{keys:?}"), "KeySet(2 keys)");
    assert_eq!(KeySet::default().authenticate(""), None);
}

#[test]
fn a_bad_key_file_is_refused_by_line_without_its_secret() {
    let cases = [
        ("a:1\nhunter2", "keys: line 2: "),
        ("a:", "keys: line 1: "),
        (":hunter2", "keys: line 1: "),
        ("a:sha256:hunter2", "keys: line 1: "),
        ("a:hunter2\n#\na:hunter2", "keys: line 3: "),
        ("# nothing\n", "keys: holds no key"),
    ];
    for (text, start) in cases {
        let error = KeySet::parse(text, "keys").expect_err(text).to_string();
        assert!(error.starts_with(start) && !error.contains("hunter2"), "{error}");
    }
}

#[test]
fn clients_are_addresses_networks_or_key_names() {
    let of = |address: &str| ClientId::from_address(address.parse().expect("an address"));
    assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
    assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
    assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
    assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    assert_eq!(of("10.0.0.1").to_string().len(), 16);
}

#[test]
fn the_example_filter_is_valid_and_bad_rules_are_named() {
    let example = include_str!("../../../../config/content-filter.toml");
    let rules = FilterRules::from_toml(example, "content-filter.toml").expect("valid");
    assert_eq!(rules.rules[0].id, "no-secret-project");
    assert!(rules.rules.len() >= 3);
    let error = |text: &str| FilterRules::from_toml(text, "f.toml").expect_err(text).to_string();
    let rule = "[[rule]]\nid = \"r\"\npatterns = [\"x\"]\n";
    assert!(error(&format!("{rule}match = \"regex\"")).contains("rule `r`: match = \"regex\" is not supported"));
    assert!(error(&format!("{rule}match = \"word\"\n{rule}match = \"word\"")).contains("two rules have the id `r`"));
    assert!(error(&format!("{rule}match = \"word\"\nactoin = \"mask\"")).contains("actoin"));
    assert!(error(&format!("{rule}match = \"word\"\naction = \"drop\"")).contains("drop"));
    assert!(error("[[rule]]\nid = \"r\"\nmatch = \"word\"\npatterns = []").contains("has no patterns"));
    assert!(error("[[rule]]\nid = \"r\"\nmatch = \"word\"\npatterns = [\"\"]").contains("a pattern has"));
    assert!(error("[[rules]]\nid = \"r\"").contains("rules"));
    assert!(error(&format!("{rule}match = \"wrod\"")).starts_with("f.toml: line 4: "));
    assert!(!error(&format!("{rule}match = \"wrod\"")).contains('\n'));
}

/// Two contexts of 4 blocks of 1 MiB cost 8 MiB; the process 24 MiB.
const REQUEST: MemoryRequest = MemoryRequest {
    limit_bytes: None,
    weights_bytes: 100 << 20,
    scratch_bytes: 6 << 20,
    response_cache_bytes: 10 << 20,
    block_bytes: 1 << 20,
    block_tokens: 16,
    ctx_size: 50,
    kv_cache_bytes: None,
};

#[test]
fn memory_goes_to_four_contexts_or_as_many_as_fit() {
    let blocks = |limit_mib: u64| {
        memory_plan(&MemoryRequest { limit_bytes: Some(limit_mib << 20), ..REQUEST }).map(|plan| plan.num_kv_blocks)
    };
    assert_eq!(memory_plan(&REQUEST).map(|plan| plan.num_kv_blocks), Ok(16));
    assert_eq!((blocks(1000), blocks(156), blocks(150), blocks(144)), (Ok(16), Ok(16), Ok(10), Ok(4)));
    let error = blocks(143).expect_err("one context needs 144 MiB").to_string();
    assert!(error.contains("needs 144 MiB") && error.contains("limit is 143 MiB"), "{error}");
    let plan = memory_plan(&MemoryRequest { limit_bytes: Some(150 << 20), ..REQUEST }).expect("fits");
    assert_eq!((plan.kv_cache_bytes, plan.total_bytes), (10 << 20, 150 << 20));
}

#[test]
fn memory_that_was_asked_for_is_given_whole_or_refused() {
    let plan = |kv_mib: u64, limit_mib: Option<u64>| {
        let limit_bytes = limit_mib.map(|mib| mib << 20);
        memory_plan(&MemoryRequest { kv_cache_bytes: Some(kv_mib << 20), limit_bytes, ..REQUEST })
            .map(|plan| plan.num_kv_blocks)
            .map_err(|error| error.to_string())
    };
    assert_eq!((plan(50, None), plan(10, Some(150))), (Ok(50), Ok(10)));
    assert!(plan(11, Some(150)).expect_err("151 MiB").contains("needs 151 MiB"));
    assert!(plan(3, None).expect_err("less than a context").starts_with("--kv-cache-mb 3: one context of 50 tokens"));
    let absurd = MemoryRequest { weights_bytes: u64::MAX, limit_bytes: Some(1 << 30), ..REQUEST };
    assert!(matches!(memory_plan(&absurd), Err(ConfigError::DoesNotFit { .. })));
}
