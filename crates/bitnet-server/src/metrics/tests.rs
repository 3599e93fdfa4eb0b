//! What the outside relies on: the text's form and names, figures equal in every way out, and that every name used in
//! deploy/ exists here.

use std::{collections::BTreeMap, fs, path::Path};

use super::*;

/// Metrics in which every family has a sample.
fn exercised() -> Metrics {
    let metrics = Metrics::new("test", MetricsLimits { max_num_seqs: 16, max_queue: 128 });
    metrics.record_http("/v1/chat/completions", "POST", 200, 0.5);
    metrics.record_http("other", "BREW", 405, 0.01);
    metrics.http_connection_opened();
    metrics.record_rejected(RejectReason::QueueFull);
    metrics.record_finished(FinishLabel::Stop);
    metrics.record_cancelled(CancelCause::Timeout);
    metrics.observe_ttft(1.0);
    metrics.observe_inter_token(0.02);
    metrics.observe_e2e(3.0);
    metrics.record_usage(10, 4, 7);
    metrics.observe_queue(0.001);
    metrics.observe_prefill(0.3);
    metrics.observe_decode(2.0);
    metrics.record_step(StepPhase::Mixed, 0.05, 3);
    metrics.set_running(2);
    metrics.set_waiting(5);
    metrics.set_queued_prompt_tokens(99);
    metrics.set_kv_blocks(6, 3, 1);
    metrics.set_kv_cache_config(16, 10, "f16");
    metrics.record_security(SecurityEvent::AuthFailure);
    metrics.record_filter_match(FilterDirection::Output, "rule-1", FilterActionLabel::Block);
    metrics.observe_filter(FilterDirection::Input, 0.000_02);
    metrics.record_response_cache(CacheResult::Miss);
    metrics.set_response_cache(1000, 3);
    metrics.set_ready(true);
    metrics.set_memory(MemoryKind::Weights, 1 << 30);
    metrics.set_memory_limit(2 << 30);
    metrics.set_model_info(&ModelInfo { architecture: "bitnet".to_owned(), ..ModelInfo::default() });
    metrics.set_build_info("scalar");
    metrics.set_kernels(&[("scalar", true), ("broken", false)]);
    metrics.set_model_load_seconds(1.5);
    metrics.record_health_check(HealthResult::Ok, 0.2);
    metrics.set_tracked_clients(4);
    metrics
}

/// The value of one line of the text, by its name and labels as written.
fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().expect("a number")
}

#[test]
fn what_is_recorded_is_rendered() {
    let text = exercised().render();
    let expected = [
        (r#"bitnet_http_requests_total{code="200",method="POST",route="/v1/chat/completions"}"#, 1.0),
        (r#"bitnet_http_requests_total{code="405",method="other",route="other"}"#, 1.0),
        (r#"bitnet_requests_rejected_total{reason="queue_full"}"#, 1.0),
        (r#"bitnet_requests_rejected_total{reason="draining"}"#, 0.0),
        (r#"bitnet_requests_finished_total{finish_reason="stop",model="test"}"#, 1.0),
        (r#"bitnet_requests_running{model="test"}"#, 2.0),
        (r#"bitnet_kernel_self_test_failed{kernel="scalar"}"#, 0.0),
        (r#"bitnet_kernel_self_test_failed{kernel="broken"}"#, 1.0),
        (r#"bitnet_requests_waiting_limit{model="test"}"#, 128.0),
        (r#"bitnet_time_to_first_token_seconds_bucket{model="test",le="0.75"}"#, 0.0),
        (r#"bitnet_time_to_first_token_seconds_bucket{model="test",le="1.0"}"#, 1.0),
        (r#"bitnet_time_to_first_token_seconds_bucket{model="test",le="+Inf"}"#, 1.0),
        (r#"bitnet_time_to_first_token_seconds_count{model="test"}"#, 1.0),
        (r#"bitnet_content_filter_duration_seconds_bucket{direction="input",le="1e-05"}"#, 0.0),
        (r#"bitnet_prompt_tokens_cached_total{model="test"}"#, 4.0),
        (r#"bitnet_generation_tokens_total{model="test"}"#, 7.0),
        (r#"bitnet_engine_step_sequences_sum{model="test",phase="mixed"}"#, 3.0),
        (r#"bitnet_kv_cache_blocks{model="test",state="cached"}"#, 1.0),
        (r#"bitnet_kv_cache_usage_ratio{model="test"}"#, 0.3),
        (r#"bitnet_kv_cache_config_info{block_size="16",dtype="f16",model="test",num_blocks="10"}"#, 1.0),
        (r#"bitnet_memory_bytes{kind="response_cache"}"#, 1000.0),
        (r#"bitnet_content_filter_matches_total{action="block",direction="output",rule="rule-1"}"#, 1.0),
        ("bitnet_ready", 1.0),
    ];
    for (series, expected) in expected {
        assert_eq!(value(&text, series), expected, "{series}");
    }
    assert!(!text.contains("le=\"1\""), "bounds are floats");
    #[cfg(target_os = "linux")]
    assert!(value(&text, "process_anonymous_memory_bytes") > 0.0 && value(&text, "process_start_time_seconds") > 0.0);
}

#[test]
fn series_with_known_labels_start_at_zero() {
    let text = Metrics::new("fresh", MetricsLimits { max_num_seqs: 1, max_queue: 1 }).render();
    for reason in RejectReason::ALL {
        assert_eq!(value(&text, &format!("bitnet_requests_rejected_total{{reason=\"{}\"}}", reason.as_str())), 0.0);
    }
    for finish in FinishLabel::ALL {
        let series = format!("bitnet_requests_finished_total{{finish_reason=\"{}\",model=\"fresh\"}}", finish.as_str());
        assert_eq!(value(&text, &series), 0.0);
    }
    assert_eq!(value(&text, r#"bitnet_engine_step_duration_seconds_count{model="fresh",phase="prefill"}"#), 0.0);
}

#[test]
fn the_text_keeps_the_conventions_that_promtool_checks() {
    let text = exercised().render();
    let mut kinds = BTreeMap::new();
    let lines: Vec<&str> = text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) else { continue };
        let kind = lines[index + 1].strip_prefix(&format!("# TYPE {name} ")).expect("a type follows each help");
        assert!(!help.is_empty() && help.ends_with('.'), "{name}: {help}");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'), "{name}");
        for suffix in ["_count", "_sum", "_bucket", "_ms", "_milliseconds", "_mb", "_kb", "_percent"] {
            assert!(!name.ends_with(suffix), "{name}");
        }
        assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
    }
    assert!(kinds.len() > 40);
}

#[test]
fn json_says_the_same_as_the_text() {
    let metrics = exercised();
    let (text, json) = (metrics.render(), metrics.snapshot());
    let families = json["metrics"].as_object().expect("an object");
    assert_eq!(families.len(), text.lines().filter(|line| line.starts_with("# TYPE ")).count());
    let mut compared = 0;
    for (name, family) in families.iter().filter(|(name, _)| name.starts_with("bitnet_")) {
        for sample in family["samples"].as_array().expect("an array") {
            let labels: Vec<String> = sample["labels"]
                .as_object()
                .expect("an object")
                .iter()
                .map(|(name, value)| format!("{name}=\"{}\"", value.as_str().expect("text")))
                .collect();
            let braces = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let (series, number) = match family["type"].as_str() {
                Some("histogram") => (format!("{name}_count{braces}"), &sample["count"]),
                _ => (format!("{name}{braces}"), &sample["value"]),
            };
            assert_eq!(Some(value(&text, &series)), number.as_f64(), "{series}");
            compared += 1;
        }
    }
    assert!(compared > 60, "{compared}");
}

#[test]
fn evictions_reported_as_totals_are_counted_once() {
    let metrics = exercised();
    for total in [3, 5, 4, 9] {
        metrics.set_response_cache(10, total);
    }
    assert_eq!(value(&metrics.render(), "bitnet_response_cache_evictions_total"), 9.0);
}

#[test]
fn history_is_a_day_long() {
    let metrics = exercised();
    for minute in 1..=1500 {
        metrics.record_minute(minute * 60);
    }
    let all = metrics.history(0);
    let points = all["points"].as_array().expect("an array");
    assert_eq!((points.len(), points[0]["unix_seconds"].as_u64()), (1440, Some(61 * 60)));
    assert_eq!(points[0]["generation_tokens_total"], 7);
    assert_eq!(points[0]["requests_rejected_total"], 1);
    assert!(all.to_string().len() < 1 << 20);
    assert_eq!(metrics.history(1499 * 60)["points"].as_array().map(Vec::len), Some(1));
}

/// Rules, dashboards and manifests speak of metrics by name: each must be one of ours.
#[test]
fn every_metric_named_in_deploy_exists() {
    let snapshot = exercised().snapshot();
    let families = snapshot["metrics"].as_object().expect("an object");
    let exists = |name: &str| {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        families.contains_key(name)
            || base.is_some_and(|base| families.get(base).is_some_and(|f| f["type"] == "histogram"))
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut files = Vec::new();
    collect_files(&root.join("deploy"), &mut files);
    collect_files(&root.join("docker"), &mut files);
    let mut num_names = 0;
    for file in files {
        let text = fs::read_to_string(&file).expect("deploy files are text");
        for name in metric_names(&text) {
            assert!(exists(name), "{} speaks of {name}, which does not exist", file.display());
            num_names += 1;
        }
    }
    assert!(num_names > 40, "{num_names}");
    assert!(exists("bitnet_time_to_first_token_seconds_bucket") && !exists("bitnet_requests_running_count"));
}

fn collect_files(folder: &Path, files: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("readable").path();
        if path.is_dir() { collect_files(&path, files) } else { files.push(path) }
    }
}

/// Words that start with `bitnet_`; recording rules (`bitnet:...`) are other words.
fn metric_names(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    words.filter(|word| word.starts_with("bitnet_"))
}
