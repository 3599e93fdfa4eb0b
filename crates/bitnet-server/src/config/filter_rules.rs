//! The content filter's rules file, parsed and checked. Compiling the rules into automata is `filter`'s business.

use std::{collections::HashSet, path::Path};

use serde::Deserialize;

use super::{ConfigError, raw::toml_reason};

/// Longest rule id: it is a metric label and a log field.
const MAX_ID_BYTES: usize = 64;
/// Longest pattern; it bounds how much streamed text may have to be held back.
const MAX_PATTERN_BYTES: usize = 1024;
/// Most patterns of all rules together; they bound the automaton's memory.
const MAX_PATTERNS: usize = 100_000;

/// Every rule of a file, in its order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilterRules {
    /// The rules; ids are unique.
    pub rules: Vec<FilterRule>,
}

/// One `[[rule]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilterRule {
    /// Name in logs, metrics and answers.
    pub id: String,
    /// What kind of content it is about, in the operator's words.
    #[serde(default = "default_category")]
    pub category: String,
    /// How the patterns are read.
    #[serde(rename = "match")]
    pub kind: MatchKind,
    /// What is looked for; any one of them is a match.
    pub patterns: Vec<String>,
    /// Where it is looked for.
    #[serde(default)]
    pub direction: Direction,
    /// What a match does.
    #[serde(default)]
    pub action: FilterAction,
    /// How grave a match is, for the log.
    #[serde(default)]
    pub severity: Severity,
}

/// How patterns are read. All compare after normalisation: case, width, accents and invisible characters do not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MatchKind {
    /// Anywhere in the text.
    Literal,
    /// Only where no letter or digit stands directly before or behind it.
    Word,
    /// A regular expression. Known so that it can be refused by name; no compiled filter holds one.
    Regex,
}

/// Which text a rule reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Prompts.
    Input,
    /// Generated text.
    Output,
    /// Both.
    #[default]
    Both,
}

impl Direction {
    /// Whether prompts are read.
    pub fn reads_input(self) -> bool {
        self != Self::Output
    }

    /// Whether generated text is read.
    pub fn reads_output(self) -> bool {
        self != Self::Input
    }
}

/// What a match does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FilterAction {
    /// Only counted and logged.
    Flag,
    /// Each matched character becomes `*`.
    Mask,
    /// A prompt is refused, generated text ends before the match.
    #[default]
    Block,
}

/// How grave a match is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Low,
    /// The default.
    #[default]
    Medium,
    /// Someone should look.
    High,
}

impl FilterRules {
    /// Reads the rules file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`] when it cannot be read or parsed.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable {
            setting: "content-filter",
            path: origin.clone(),
            reason: error.to_string(),
        })?;
        Self::from_toml(&text, &origin)
    }

    /// Parses a rules file; `origin` is named in errors.
    ///
    /// # Errors
    /// [`ConfigError::File`], with TOML's line or the rule's id.
    pub fn from_toml(text: &str, origin: &str) -> Result<Self, ConfigError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct File {
            #[serde(default)]
            rule: Vec<FilterRule>,
        }
        let refused = |reason: String| ConfigError::File { path: origin.to_owned(), reason };
        let file: File = toml::from_str(text).map_err(|error| refused(toml_reason(text, &error)))?;
        let mut ids = HashSet::new();
        for rule in &file.rule {
            if !ids.insert(&rule.id) {
                return Err(refused(format!("two rules have the id `{}`", rule.id)));
            }
            rule.check().map_err(|why| refused(format!("rule `{}`: {why}", rule.id)))?;
        }
        let num_patterns: usize = file.rule.iter().map(|rule| rule.patterns.len()).sum();
        if num_patterns > MAX_PATTERNS {
            return Err(refused(format!("{num_patterns} patterns are too many: up to {MAX_PATTERNS}")));
        }
        Ok(Self { rules: file.rule })
    }
}

impl FilterRule {
    fn check(&self) -> Result<(), String> {
        if self.id.is_empty() || self.id.len() > MAX_ID_BYTES || self.id.chars().any(char::is_control) {
            return Err(format!("an id has 1 to {MAX_ID_BYTES} bytes and no control characters"));
        }
        if self.kind == MatchKind::Regex {
            return Err("match = \"regex\" is not supported by this version: use literal or word".to_owned());
        }
        if self.patterns.is_empty() {
            return Err("has no patterns".to_owned());
        }
        match self.patterns.iter().find(|pattern| pattern.is_empty() || pattern.len() > MAX_PATTERN_BYTES) {
            Some(_) => Err(format!("a pattern has 1 to {MAX_PATTERN_BYTES} bytes")),
            None => Ok(()),
        }
    }
}

fn default_category() -> String {
    "custom".to_owned()
}
