//! The model's chat template: a conversation -> the text the model was trained to continue. Jinja as Hugging Face runs it,
//! inside fences, because templates come with downloaded files. Templates never come from a caller. No token ids here.

use std::{io, thread};

use minijinja::{
    Environment, Error, ErrorKind, Output, State, UndefinedBehavior, Value, escape_formatter, syntax::SyntaxConfig,
    value::Serde,
};
use serde_json::{Map, json};

use super::python_json;

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Of the words asked about, those its source holds.
    words: Vec<&'static str>,
}

/// What a template is rendered for. The values are JSON, because templates look at them as Python dictionaries.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// The messages, each an object with `role`, `content` and perhaps more.
    pub messages: Vec<serde_json::Value>,
    /// The tools on offer, as the request describes them.
    pub tools: Option<serde_json::Value>,
    /// Further variables, such as `enable_thinking`; they cannot replace those above.
    pub extra: Map<String, serde_json::Value>,
    /// Whether the text ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
}

/// Why a template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The source is no template this engine understands; usually a tag that only a newer transformers knows.
    #[error("the chat template cannot be compiled: {0}")]
    Syntax(String),
    /// The template itself refuses the conversation (`raise_exception`); usually roles in an order it does not allow.
    #[error("the chat template refuses this conversation: {0}")]
    Refused(String),
    /// A limit was reached: too many steps, too long an output, too deep a recursion.
    #[error("the chat template goes beyond its limits: {0}")]
    Limit(&'static str),
    /// Rendering failed; usually a message without a field that the template expects.
    #[error("the chat template failed: {0}")]
    Render(String),
}

impl ChatTemplate {
    /// Compiles `source`; `bos_token` and `eos_token` are the texts of the model's tokens, which templates write.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`], [`TemplateError::Limit`].
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TemplateError::Limit("its source is longer than 256 KiB"));
        }
        let mut environment = Environment::new();
        environment.set_syntax(whitespace_rules()?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_recursion_limit(MAX_RECURSION);
        environment.set_formatter(write_within_limit);
        environment.add_filter("tojson", python_json::tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_global("bos_token", bos_token.unwrap_or_default());
        environment.add_global("eos_token", eos_token.unwrap_or_default());
        // Constants are computed while compiling, so this needs the deep stack as well.
        let compiled = on_deep_stack(|| environment.add_template_owned(NAME, source.to_owned()))?;
        compiled.map_err(|error| TemplateError::Syntax(describe(&error)))?;
        let words = WORDS.iter().copied().filter(|word| source.contains(word)).collect();
        Ok(Self { environment, words })
    }

    /// Whether the source mentions `word`, one of [`WORDS`].
    pub(super) fn knows(&self, word: &str) -> bool {
        self.words.contains(&word)
    }

    /// The text of `conversation`.
    ///
    /// # Errors
    /// [`TemplateError::Refused`], [`TemplateError::Limit`], [`TemplateError::Render`].
    pub fn render(&self, conversation: &Conversation) -> Result<String, TemplateError> {
        on_deep_stack(|| self.render_here(conversation))?
    }

    fn render_here(&self, conversation: &Conversation) -> Result<String, TemplateError> {
        let mut variables = conversation.extra.clone();
        variables.insert("messages".to_owned(), conversation.messages.clone().into());
        variables.insert("tools".to_owned(), conversation.tools.clone().into());
        variables.insert("documents".to_owned(), json!(null));
        variables.insert("add_generation_prompt".to_owned(), conversation.add_generation_prompt.into());
        for constant in ["bos_token", "eos_token"] {
            variables.remove(constant);
        }
        let template = self.environment.get_template(NAME).map_err(|error| TemplateError::Render(describe(&error)))?;
        let mut text = LimitedText(Vec::new());
        template.render_captured_to(Value::from(Serde(&variables)), &mut text).map_err(|error| classify(&error))?;
        String::from_utf8(text.0).map_err(|error| TemplateError::Render(error.to_string()))
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").finish_non_exhaustive()
    }
}

/// What templates may or may not know of.
const WORDS: &[&str] = &["tools", "tool_calls"];

/// Hugging Face's: a line that holds only a block tag leaves no line behind.
fn whitespace_rules() -> Result<SyntaxConfig, TemplateError> {
    let rules = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    rules.map_err(|error| TemplateError::Syntax(describe(&error)))
}

/// A template can nest a value as deeply as it has steps, and dropping or printing it recurses as deeply; on a stack made for
/// that depth this is memory, not a crash.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, TemplateError> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("chat-template".to_owned()).stack_size(STACK_BYTES);
        let handle = builder.spawn_scoped(scope, work).map_err(|error| TemplateError::Render(error.to_string()))?;
        handle.join().map_err(|_| TemplateError::Render("the template engine panicked".to_owned()))
    })
}

/// What was written so far, captured blocks and macros included.
#[derive(Default)]
struct Written(usize);

/// The engine's own formatter, which also counts: a macro or a captured block can grow in memory before any of it is output.
fn write_within_limit(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    if let Some(text) = value.as_str() {
        let written = state.get_or_insert_extension_with(Written::default);
        written.0 = written.0.saturating_add(text.len());
        if written.0 > MAX_OUTPUT_BYTES {
            return Err(Error::new(ErrorKind::WriteFailure, "too much output"));
        }
    }
    escape_formatter(out, state, value)
}

/// The output, refusing to grow beyond the limit.
struct LimitedText(Vec<u8>);

impl io::Write for LimitedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Marks an error that the template raised on purpose.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: Serde<serde_json::Value>) -> Result<Value, Error> {
    let message = message.as_str().map_or_else(|| message.to_string(), str::to_owned);
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let text = jiff::fmt::strtime::format(format, &jiff::Zoned::now());
    text.map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

fn classify(error: &Error) -> TemplateError {
    let causes = || std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    if let Some(Raised(message)) = causes().find_map(|cause| cause.downcast_ref()) {
        return TemplateError::Refused(message.clone());
    }
    let kinds = || causes().filter_map(|cause| cause.downcast_ref::<Error>()).map(Error::kind);
    let too_large = || {
        causes().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|e| e.kind() == io::ErrorKind::FileTooLarge)
    };
    if kinds().any(|kind| kind == ErrorKind::OutOfFuel) {
        TemplateError::Limit("more than half a million steps")
    } else if kinds().any(|kind| kind == ErrorKind::WriteFailure) || too_large() {
        TemplateError::Limit("more than 16 MiB of output")
    } else {
        TemplateError::Render(describe(error))
    }
}

/// The message and where it happened, without the dump of variables that debug output would add.
fn describe(error: &Error) -> String {
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    format!("{error}{cause}")
}

const NAME: &str = "chat";

/// The longest published templates have about 20 KiB.
const MAX_SOURCE_BYTES: usize = 256 << 10;

/// A template takes 15 to 100 steps a message; half a million take about 12 ms.
const MAX_STEPS: u64 = 500_000;

/// Macros, loops and includes within one another. Real templates stay below 10.
const MAX_RECURSION: usize = 64;

/// Four times the default limit of a request body.
const MAX_OUTPUT_BYTES: usize = 16 << 20;

/// Address space, not memory: what is not touched costs nothing.
const STACK_BYTES: usize = 256 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(messages: serde_json::Value) -> Conversation {
        let messages = messages.as_array().unwrap().clone();
        Conversation { messages, add_generation_prompt: true, ..Conversation::default() }
    }

    fn hello() -> Conversation {
        conversation(json!([{"role": "user", "content": "  Hello "}]))
    }

    fn render(source: &str) -> Result<String, TemplateError> {
        ChatTemplate::new(source, Some("<s>"), Some("</s>"))?.render(&hello())
    }

    #[test]
    fn blocks_leave_no_lines_and_python_methods_work() {
        let source = "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m['content'].strip() }}]\n  {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source).unwrap(), "[Hello]\n");
        assert_eq!(render("{{ bos_token + 'a,b'.split(',')[-1].upper() + eos_token }}").unwrap(), "<s>B</s>");
        assert_eq!(render("{{ tools is none }} {{ documents }} {{ missing }}|").unwrap(), "True None |");
        assert_eq!(
            render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}").unwrap(),
            "01"
        );
        assert_eq!(render("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}").unwrap(), "2");
        assert_eq!(render("{{ messages[0] | tojson }}").unwrap(), r#"{"role": "user", "content": "  Hello "}"#);
        assert_eq!(render("{{ strftime_now('%Y') | length }}").unwrap(), "4");
    }

    #[test]
    fn variables_of_a_caller_cannot_replace_the_conversation() {
        let template =
            ChatTemplate::new("{{ messages[0].content }}{{ eos_token }}{{ mood }}", None, Some("</s>")).unwrap();
        let mut conversation = hello();
        conversation.extra = json!({"messages": [], "eos_token": "X", "mood": "good"}).as_object().unwrap().clone();
        assert_eq!(template.render(&conversation).unwrap(), "  Hello </s>good");
    }

    #[test]
    fn a_refusal_carries_the_templates_words() {
        let source = "{% macro check() %}{{ raise_exception('roles must alternate') }}{% endmacro %}{{ check() }}";
        for source in [source, "{{ raise_exception('roles must alternate') }}"] {
            let Err(TemplateError::Refused(message)) = render(source) else { panic!("no refusal") };
            assert_eq!(message, "roles must alternate");
        }
    }

    #[test]
    fn errors_are_typed() {
        assert!(matches!(render("{% if %}"), Err(TemplateError::Syntax(_))));
        assert!(matches!(render("{{ nothing.at.all }}"), Err(TemplateError::Render(_))));
        assert!(matches!(render("{{ strftime_now('%Q%') }}"), Err(TemplateError::Render(_))));
        assert!(matches!(render(&" ".repeat(MAX_SOURCE_BYTES + 1)), Err(TemplateError::Limit(_))));
    }

    #[test]
    fn bombs_are_refused() {
        let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}";
        let macros = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
        let capture = "{% set s = 'x' * 10000 %}{% set t %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}{{ t | length }}";
        let macro_capture = "{% macro f(s) %}{% for i in range(9999) %}{{ s }}{% endfor %}{% endmacro %}\
            {% for i in range(99) %}{% set t = f('x' * 9999) %}{% endfor %}";
        let output = "{% set s = 'x' * 100000 %}{% for i in range(99999) %}{{ s }}{% endfor %}";
        for bomb in [loops, capture, macro_capture, output] {
            assert!(matches!(render(bomb), Err(TemplateError::Limit(_))), "{bomb}: {:?}", render(bomb));
        }
        for bomb in ["{{ '-' * 10**10 }}", "{{ range(10**9) }}", macros, "{{ [] | tojson(indent=1000000000) }}"] {
            assert!(render(bomb).is_err(), "{bomb}");
        }
    }

    #[test]
    fn deep_nesting_neither_crashes_in_values_nor_in_the_source() {
        let nest = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [[[[ns.x]]]] %}{% endfor %}";
        for rest in ["", "{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x == ns.x }}", "{{ ns.x | string | length }}"] {
            let _typed_whatever_it_is = render(&format!("{nest}{rest}"));
        }
        for (open, close) in [("(", ")"), ("[", "]"), ("not ", ""), ("-", ""), ("{1:", "}"), ("a if ", "")] {
            let source = format!("{{{{ {}1{} }}}}", open.repeat(20_000), close.repeat(20_000));
            let _typed_whatever_it_is = render(&source);
        }
        let blocks = format!("{}{}", "{% if true %}".repeat(10_000), "{% endif %}".repeat(10_000));
        assert!(render(&blocks).is_err());
    }
}
