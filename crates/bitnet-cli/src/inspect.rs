//! `bitnet inspect`: what a model file holds, for people or as JSON.

use std::path::PathBuf;

use bitnet_core::{
    Checkpoint,
    checkpoint::{self, Activation, Pooling, TokenizerSource},
};
use serde_json::{Value, json};

use crate::{exit::Failure, output};

/// Shows what a model file holds: architecture, geometry, tensors, tokenizer, chat template.
#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// A GGUF file or a Hugging Face directory
    #[arg(short, long, value_name = "PATH")]
    model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints the facts to stdout.
///
/// # Errors
/// When the model cannot be opened.
pub(crate) fn inspect(args: &InspectArgs) -> Result<(), Failure> {
    let checkpoint = checkpoint::open(&args.model, &checkpoint::LoadOptions::default())?;
    let facts = facts(&checkpoint);
    if args.json { output::write_line(format_args!("{facts:#}")) } else { print_text(&args.model, &facts) }
}

fn facts(checkpoint: &Checkpoint) -> Value {
    let config = &checkpoint.config;
    let tensors: Vec<Value> = checkpoint
        .summary
        .tensors
        .iter()
        .map(|t| json!({"name": t.name, "type": t.encoding, "shape": t.shape, "bytes": t.bytes}))
        .collect();
    json!({
        "format": checkpoint.summary.format,
        "file_bytes": checkpoint.summary.file_bytes,
        "name": config.name,
        "architecture": config.architecture,
        "geometry": {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "max_context": config.max_context,
            "rope_theta": as_written(config.rope_theta),
            "rms_norm_eps": as_written(config.rms_norm_eps),
            "activation": match config.activation { Activation::Relu2 => "relu2", Activation::Silu => "silu" },
            "tied_head": checkpoint.weights.lm_head.is_none(),
        },
        "pooling": checkpoint.pooling.map(Pooling::name),
        "tokenizer": tokenizer(checkpoint.tokenizer.as_ref()),
        "chat_template": checkpoint.chat_template,
        "generation": {
            "temperature": checkpoint.generation.temperature.map(as_written),
            "top_p": checkpoint.generation.top_p.map(as_written),
            "top_k": checkpoint.generation.top_k,
            "stop_tokens": checkpoint.generation.stop_tokens,
        },
        "notes": checkpoint.notes,
        "tensors": tensors,
    })
}

/// The short decimal of a float32, which its float64 would print in seventeen digits.
fn as_written(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

fn tokenizer(source: Option<&TokenizerSource>) -> Value {
    match source {
        None => Value::Null,
        Some(TokenizerSource::HuggingFace { bos, .. }) => json!({"source": "tokenizer.json", "bos": bos}),
        Some(TokenizerSource::Gguf(v)) => json!({
            "source": "gguf", "model": v.model, "pre": v.pre, "tokens": v.tokens.len(), "merges": v.merges.len(),
            "bos": v.bos, "eos": v.eos, "add_bos": v.add_bos, "add_eos": v.add_eos,
        }),
    }
}

fn print_text(path: &std::path::Path, facts: &Value) -> Result<(), Failure> {
    output::write_line(path.display())?;
    for key in ["format", "architecture", "name", "file_bytes", "pooling"] {
        output::write_line(format_args!("  {key:<18} {}", plain(&facts[key])))?;
    }
    for section in ["geometry", "tokenizer", "generation"] {
        output::write_line(section)?;
        for (key, value) in facts[section].as_object().into_iter().flatten() {
            output::write_line(format_args!("  {key:<18} {}", plain(value)))?;
        }
    }
    output::write_line(format_args!("chat_template\n  {}", plain(&facts["chat_template"])))?;
    for note in facts["notes"].as_array().into_iter().flatten() {
        output::write_line(format_args!("note\n  {}", plain(note)))?;
    }
    output::write_line("tensors")?;
    for tensor in facts["tensors"].as_array().into_iter().flatten() {
        let (name, kind) = (plain(&tensor["name"]), plain(&tensor["type"]));
        output::write_line(format_args!(
            "  {name:<48} {kind:<6} {:>16} {:>12} bytes",
            plain(&tensor["shape"]),
            plain(&tensor["bytes"])
        ))?;
    }
    Ok(())
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
