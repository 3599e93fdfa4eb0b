//! What makes a file an embedding model: GGUF's `pooling_type`, or the modules of sentence-transformers in a Hugging Face
//! directory. Every form of pooling that is not computed is refused by name, for another one would give wrong vectors.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{
    LoadError,
    hugging_face::{MAX_CONFIG_BYTES, read_json},
};

/// How an embedding model turns the final hidden states of a text into one vector, which then gets the length 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the last token.
    Last,
}

impl Pooling {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Last => "last",
        }
    }
}

/// `{arch}.pooling_type` of a GGUF file; 0 is none, as in any model that generates text.
pub(super) fn of_gguf(key: &str, pooling_type: Option<u64>) -> Result<Option<Pooling>, LoadError> {
    match pooling_type {
        None | Some(0) => Ok(None),
        Some(1) => Ok(Some(Pooling::Mean)),
        Some(3) => Ok(Some(Pooling::Last)),
        Some(2) => Err(unsupported(format!("`{key}` 2 (the first token's state)"))),
        Some(4) => Err(unsupported(format!("`{key}` 4 (a ranking model)"))),
        Some(other) => Err(unsupported(format!("`{key}` {other}"))),
    }
}

/// What the modules of `dir` say, or without them the configuration of the pooling alone.
pub(super) fn of_directory(dir: &Path) -> Result<Option<Pooling>, LoadError> {
    const MODULES: &str = "modules.json";
    let mut folder = "1_Pooling".to_owned();
    if dir.join(MODULES).exists() {
        let modules: Vec<Module> = read_json(&dir.join(MODULES), MAX_CONFIG_BYTES)?;
        let mut found = None;
        for module in modules {
            match module.class() {
                "Transformer" | "Normalize" => {}
                "Pooling" if found.is_none() => found = Some(module.path),
                other => {
                    let what = format!("module `{}` of {MODULES}", other.chars().take(80).collect::<String>());
                    return Err(LoadError::unsupported(
                        what,
                        "only Transformer, one Pooling and Normalize are computed",
                    ));
                }
            }
        }
        folder = found.ok_or_else(|| LoadError::config(MODULES, "names no pooling: this makes no embeddings"))?;
        if Path::new(&folder).file_name().is_none_or(|name| name != folder.as_str()) {
            return Err(LoadError::config(MODULES, "has a pooling whose path is no plain folder name"));
        }
    }
    let path = dir.join(folder).join("config.json");
    if !dir.join(MODULES).exists() && !path.exists() {
        return Ok(None);
    }
    of_config(&read_json(&path, MAX_CONFIG_BYTES)?).map(Some)
}

/// One entry of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Module {
    /// The last part of the name of its Python class.
    fn class(&self) -> &str {
        self.kind.rsplit_once('.').map_or(&self.kind, |(_, class)| class)
    }
}

/// The one kind of pooling that `config` asks for; several would be joined end to end.
fn of_config(config: &Value) -> Result<Pooling, LoadError> {
    const PREFIX: &str = "pooling_mode_";
    let fields = config.as_object().ok_or_else(|| LoadError::config("1_Pooling/config.json", "is no object"))?;
    let asked = fields.iter().filter(|(_, value)| **value == Value::Bool(true));
    let mut modes: Vec<&str> = asked.filter_map(|(key, _)| key.strip_prefix(PREFIX)).collect();
    modes.extend(config.get("pooling_mode").and_then(Value::as_str));
    match modes[..] {
        ["mean" | "mean_tokens"] => Ok(Pooling::Mean),
        ["lasttoken"] => Ok(Pooling::Last),
        [] if fields.get("pooling_mode_mean_tokens").is_none() => Ok(Pooling::Mean),
        [] => Err(LoadError::config("pooling_mode_*", "asks for no pooling at all")),
        _ => {
            let modes: String = modes.join(", ").chars().take(80).collect();
            Err(unsupported(format!("pooling by {modes}")))
        }
    }
}

fn unsupported(what: String) -> LoadError {
    LoadError::unsupported(what, "only embedding models that take the mean or the last token are computed")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_pooling_of_gguf_files() {
        let of = |value| of_gguf("llama.pooling_type", value).map_err(|error| error.to_string());
        assert_eq!(
            [of(None), of(Some(0)), of(Some(1)), of(Some(3))].map(Result::unwrap),
            [None, None, Some(Pooling::Mean), Some(Pooling::Last)]
        );
        for refused in [2, 4, 5, u64::MAX] {
            assert!(of(Some(refused)).unwrap_err().contains("llama.pooling_type"), "{refused}");
        }
    }

    #[test]
    fn the_pooling_of_configurations() {
        let of = |config: Value| of_config(&config).map_err(|error| error.to_string());
        let flags = |mean: bool, last: bool, cls: bool| {
            json!({"word_embedding_dimension": 4, "pooling_mode_mean_tokens": mean, "pooling_mode_lasttoken": last,
                "pooling_mode_cls_token": cls, "include_prompt": true})
        };
        assert_eq!(of(flags(true, false, false)), Ok(Pooling::Mean));
        assert_eq!(of(flags(false, true, false)), Ok(Pooling::Last));
        assert_eq!(of(json!({"word_embedding_dimension": 4})), Ok(Pooling::Mean));
        assert_eq!(of(json!({"pooling_mode": "lasttoken"})), Ok(Pooling::Last));
        assert!(of(flags(false, false, true)).unwrap_err().contains("cls_token"));
        assert!(of(flags(true, true, false)).unwrap_err().contains("mean_tokens, lasttoken"));
        assert!(of(json!({"pooling_mode": "max"})).unwrap_err().contains("max"));
        assert!(of(flags(false, false, false)).is_err() && of(json!([])).is_err());
    }
}
