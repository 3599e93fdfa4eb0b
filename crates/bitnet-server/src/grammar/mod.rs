//! What an output must look like -> which tokens may come next. Schemas, expressions, choices, grammars and tool calls are
//! compiled for one vocabulary; a [`Matcher`] then walks along the tokens of one choice.
//!
//! It sits beside the engine, which asks for masks through a trait of its own; the service joins the two. Nothing here fails
//! open: what a schema asks for is enforced, or compiling is an error that names the place. No wire types, no sampling.

mod schema;
#[cfg(test)]
mod tests;
mod tools;
mod vocabulary;

pub use tools::{CALL_END, CALL_START, CallRule, Function};

use std::{
    fmt,
    num::NonZeroUsize,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
};

use bitnet_core::{TokenId, Tokenizer, sampling::TokenMask, tokenizer::EncodeOptions};
use llguidance::{ParserFactory, api::TopLevelGrammar};
use lru::LruCache;
use serde_json::{Value, json};

/// What an output must look like.
#[derive(Clone, Debug, PartialEq)]
pub enum Rule {
    /// JSON that validates against a schema.
    Schema(Value),
    /// Text that an expression matches as a whole.
    Regex(String),
    /// One of several texts.
    Choice(Vec<String>),
    /// A Lark grammar, in llguidance's variant.
    Lark(String),
    /// Text with tool calls.
    Calls(CallRule),
}

/// Why a rule cannot be enforced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct GrammarError {
    /// Where in the rule the fault is, such as `schema.properties.a.not`.
    pub path: String,
    /// What is wrong there.
    pub message: String,
}

/// Compiles rules for one model.
pub struct GrammarCompiler {
    tokenizer: Arc<Tokenizer>,
    stop_tokens: Vec<TokenId>,
    /// Built when the first rule comes: most servers never see one, and it takes a moment.
    factory: OnceLock<Result<ParserFactory, String>>,
    /// The latest rules: an agent sends the same few with each request.
    compiled: Mutex<LruCache<Arc<[u8]>, Arc<Grammar>>>,
}

/// A compiled rule.
pub struct Grammar {
    start: llguidance::Matcher,
    tokenizer: Arc<Tokenizer>,
    identity: Arc<[u8]>,
}

/// A rule in the middle of one output.
pub struct Matcher {
    inner: llguidance::Matcher,
    tokenizer: Arc<Tokenizer>,
}

/// What can be said of an output from one of its tokens on.
#[derive(Debug)]
pub struct Outlook {
    /// Tokens that come one after the other because each time no other is allowed; none ends the output.
    pub forced: Vec<TokenId>,
    /// After those: the matcher, and the tokens that may come next; or a sentence when the rule went beyond its limits there.
    pub then: Result<(Matcher, TokenMask), String>,
    /// After those: how the model would probably write what must come, where there are several ways to write it.
    pub likely: Vec<TokenId>,
}

impl Rule {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::Schema(json!({"type": "object"}))
    }
}

impl GrammarCompiler {
    /// For outputs of `tokenizer` that end with one of `stop_tokens`.
    pub fn new(tokenizer: Arc<Tokenizer>, stop_tokens: &[TokenId]) -> Self {
        let compiled = Mutex::new(LruCache::new(MAX_COMPILED));
        Self { tokenizer, stop_tokens: stop_tokens.to_vec(), factory: OnceLock::new(), compiled }
    }

    /// Compiles `rule`, whose place in the request is called `path`, unless it did so lately. Takes milliseconds; a rule that
    /// would take much longer is refused by the limits below.
    ///
    /// # Errors
    /// [`GrammarError`].
    pub fn compile(&self, rule: &Rule, path: &str) -> Result<Arc<Grammar>, GrammarError> {
        let source = source(rule, path)?;
        let fault = |message: String| GrammarError { path: path.to_owned(), message };
        let identity: Arc<[u8]> = serde_json::to_vec(&source).map_err(|error| fault(error.to_string()))?.into();
        let compiled = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(grammar) = compiled().get(&identity) {
            return Ok(Arc::clone(grammar));
        }
        let start = self.start(source).map_err(fault)?;
        let tokenizer = Arc::clone(&self.tokenizer);
        let grammar = Arc::new(Grammar { start, tokenizer, identity: Arc::clone(&identity) });
        if identity.len() <= MAX_KEPT_BYTES {
            compiled().put(identity, Arc::clone(&grammar));
        }
        Ok(grammar)
    }

    /// The matcher at the start of an output by `grammar`.
    fn start(&self, grammar: TopLevelGrammar) -> Result<llguidance::Matcher, String> {
        let factory = self.factory.get_or_init(|| vocabulary::factory(&self.tokenizer, &self.stop_tokens));
        let factory = factory.as_ref().map_err(String::clone)?;
        let mut start = on_deep_stack(|| llguidance::Matcher::new(factory.create_parser(grammar)))?;
        if let Some(error) = start.get_error() {
            return Err(first_line(&error));
        }
        // An output that cannot even begin shows now rather than in the engine.
        match start.compute_mask() {
            Ok(mask) if mask.num_set() > 0 => Ok(start),
            Ok(_) => Err("no output can satisfy it".to_owned()),
            Err(error) => Err(first_line(&error.to_string())),
        }
    }
}

impl Grammar {
    /// At the start of an output. Nothing is shared with other outputs, so that the limits strike at the same place whatever
    /// else runs.
    pub fn start(&self) -> Matcher {
        Matcher { inner: self.start.deep_clone(), tokenizer: Arc::clone(&self.tokenizer) }
    }

    /// Bytes equal for equal rules.
    pub fn identity(&self) -> &[u8] {
        &self.identity
    }
}

impl Matcher {
    /// The tokens that may come next; stop tokens are among them where the output may end.
    ///
    /// # Errors
    /// A sentence: the rule went beyond its limits.
    pub fn mask(&mut self) -> Result<TokenMask, String> {
        let mask = self.inner.compute_mask_or_eos().map_err(|error| first_line(&error.to_string()))?;
        let mask = TokenMask::from_words(mask.as_slice().to_vec());
        if mask.is_empty() { Err("no token can follow".to_owned()) } else { Ok(mask) }
    }

    /// Goes on by `token`.
    ///
    /// # Errors
    /// A sentence: the token was not allowed, or the rule went beyond its limits.
    pub fn accept(&mut self, token: TokenId) -> Result<(), String> {
        self.inner.consume_token(token.0).map_err(|error| first_line(&error.to_string()))
    }

    /// Goes on along what is forced, by at most `most` tokens, and says what comes then.
    pub fn look_ahead(mut self, most: usize, stop_tokens: &[TokenId]) -> Outlook {
        let mut forced = Vec::new();
        let mask = loop {
            let mask = self.mask();
            let only = mask.as_ref().ok().and_then(TokenMask::single).filter(|id| !stop_tokens.contains(id));
            let Some(token) = only.filter(|_| forced.len() < most) else { break mask };
            forced.push(token);
            if let Err(error) = self.accept(token) {
                break Err(error);
            }
        };
        let is_narrow = mask.as_ref().is_ok_and(|mask| mask.len() <= MAX_TOKENS_OF_ONE_TEXT);
        let mut likely = if is_narrow { self.forced_text() } else { Vec::new() };
        likely.truncate(most - forced.len());
        Outlook { forced, then: mask.map(|mask| (self, mask)), likely }
    }

    /// The text that must come, as the tokenizer would write it.
    fn forced_text(&self) -> Vec<TokenId> {
        // On a copy: a matcher remembers what it found, and to ask must change nothing.
        let bytes = self.inner.clone().compute_ff_bytes();
        let options = EncodeOptions { add_special_tokens: false, parse_special: false };
        self.tokenizer.encode(&String::from_utf8_lossy(&bytes), options).unwrap_or_default()
    }
}

/// `rule` in the compiler's words, after our own checks.
fn source(rule: &Rule, path: &str) -> Result<TopLevelGrammar, GrammarError> {
    let too_long = |text: &str| {
        let message = format!("is longer than {MAX_TEXT_BYTES} bytes");
        (text.len() > MAX_TEXT_BYTES).then(|| GrammarError { path: path.to_owned(), message })
    };
    match rule {
        Rule::Schema(value) => Ok(TopLevelGrammar::from_json_schema(schema::checked(value, path)?)),
        Rule::Regex(text) => too_long(text).map_or_else(|| Ok(TopLevelGrammar::from_regex(text)), Err),
        Rule::Lark(text) => too_long(text).map_or_else(|| Ok(TopLevelGrammar::from_lark(text.clone())), Err),
        Rule::Choice(texts) => {
            let alternatives: Vec<_> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
            let lark = format!("start: {}", alternatives.join(" | "));
            too_long(&lark).map_or_else(|| Ok(TopLevelGrammar::from_lark(lark)), Err)
        }
        Rule::Calls(calls) => Ok(TopLevelGrammar::from_lark(calls.to_lark(path)?)),
    }
}

/// Compiling recurses along the rule, which comes from outside; on a stack made for the longest one this is memory, not a crash.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, String> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
        let handle = builder.spawn_scoped(scope, work).map_err(|error| error.to_string())?;
        handle.join().map_err(|_| "the grammar compiler failed on it".to_owned())
    })
}

/// The compiler's messages go on with its whole state.
fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().chars().take(300).collect()
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarCompiler").finish_non_exhaustive()
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher").finish_non_exhaustive()
    }
}

/// Rules kept compiled: more than the agents of a small server use in turn.
const MAX_COMPILED: NonZeroUsize = NonZeroUsize::new(32).expect("not 0");
/// A longer rule is not kept, because what it compiles to grows with it.
const MAX_KEPT_BYTES: usize = 16 << 10;
/// Longest expression, grammar and list of choices.
const MAX_TEXT_BYTES: usize = 64 << 10;
/// More tokens than this are not the beginnings of one text, of which there are as many as the longest has bytes.
const MAX_TOKENS_OF_ONE_TEXT: usize = 64;
/// Reserved, not used: for a chain of two thousand references, each a few frames deep.
const STACK_BYTES: usize = 256 << 20;
