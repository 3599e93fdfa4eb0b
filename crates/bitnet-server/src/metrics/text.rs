//! Registry -> Prometheus text 0.0.4 and JSON. The `prometheus` crate's own writer says `le="1"`, which Prometheus 3
//! rewrites to `le="1.0"`, so that queries by exact bucket break between versions; this one always writes floats.

use std::fmt::Write;

use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType};
use serde_json::{Map, Value, json};

/// The families as text 0.0.4.
pub(super) fn write_text(families: &[MetricFamily]) -> String {
    let mut out = String::new();
    for family in families {
        let name = family.name();
        let kind = kind_name(family.get_field_type());
        let help = family.help().replace('\\', "\\\\").replace('\n', "\\n");
        line(&mut out, format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
        for metric in family.get_metric() {
            write_metric(&mut out, name, family.get_field_type(), metric);
        }
    }
    out
}

/// The same families and figures as a JSON object, name -> type and samples.
pub(super) fn to_json(families: &[MetricFamily]) -> Value {
    let entries = families.iter().map(|family| {
        let kind = family.get_field_type();
        let samples: Vec<Value> = family.get_metric().iter().map(|metric| sample_json(kind, metric)).collect();
        (family.name().to_owned(), json!({ "type": kind_name(kind), "help": family.help(), "samples": samples }))
    });
    Value::Object(entries.collect::<Map<String, Value>>())
}

fn write_metric(out: &mut String, name: &str, kind: MetricType, metric: &Metric) {
    let labels = metric.get_label();
    if kind != MetricType::HISTOGRAM {
        line(out, format_args!("{name}{} {}\n", braces(labels, None), plain_value(kind, metric)));
        return;
    }
    let histogram = metric.get_histogram();
    for bucket in histogram.get_bucket() {
        let bound = bound_text(bucket.upper_bound());
        line(out, format_args!("{name}_bucket{} {}\n", braces(labels, Some(&bound)), bucket.cumulative_count()));
    }
    let count = histogram.get_sample_count();
    line(out, format_args!("{name}_bucket{} {count}\n", braces(labels, Some("+Inf"))));
    line(out, format_args!("{name}_sum{} {}\n", braces(labels, None), histogram.get_sample_sum()));
    line(out, format_args!("{name}_count{} {count}\n", braces(labels, None)));
}

fn sample_json(kind: MetricType, metric: &Metric) -> Value {
    let labels: Map<String, Value> =
        metric.get_label().iter().map(|pair| (pair.name().to_owned(), json!(pair.value()))).collect();
    if kind != MetricType::HISTOGRAM {
        return json!({ "labels": labels, "value": plain_value(kind, metric) });
    }
    let histogram = metric.get_histogram();
    let buckets: Map<String, Value> = histogram
        .get_bucket()
        .iter()
        .map(|bucket| (bound_text(bucket.upper_bound()), json!(bucket.cumulative_count())))
        .collect();
    let (count, sum) = (histogram.get_sample_count(), histogram.get_sample_sum());
    json!({ "labels": labels, "count": count, "sum": sum, "buckets": buckets })
}

fn plain_value(kind: MetricType, metric: &Metric) -> f64 {
    if kind == MetricType::COUNTER { metric.get_counter().get_value() } else { metric.get_gauge().get_value() }
}

fn kind_name(kind: MetricType) -> &'static str {
    match kind {
        MetricType::COUNTER => "counter",
        MetricType::HISTOGRAM => "histogram",
        _ => "gauge",
    }
}

/// `{a="b",le="1.0"}`, or nothing when there are no labels.
fn braces(labels: &[LabelPair], bound: Option<&str>) -> String {
    let own = labels.iter().map(|pair| (pair.name(), pair.value()));
    let pairs: Vec<String> = own
        .chain(bound.map(|bound| ("le", bound)))
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// A bucket's bound as Prometheus 3 stores it: `1.0`, `0.0001`, `1e-05`, `1e+06`.
fn bound_text(bound: f64) -> String {
    if bound == 0.0 || (1e-4..1e6).contains(&bound.abs()) {
        return format!("{bound:?}");
    }
    let text = format!("{bound:e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let (sign, digits) = exponent.strip_prefix('-').map_or(("+", exponent), |digits| ("-", digits));
            format!("{mantissa}e{sign}{digits:0>2}")
        }
        None => text,
    }
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("writing to a String cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_written_as_prometheus_3_stores_them() {
        let cases = [(1.0, "1.0"), (0.0001, "0.0001"), (1e-5, "1e-05"), (2.5, "2.5"), (100_000.0, "100000.0")];
        for (bound, text) in cases {
            assert_eq!(bound_text(bound), text);
        }
        assert_eq!(bound_text(1e6), "1e+06");
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(escape("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
