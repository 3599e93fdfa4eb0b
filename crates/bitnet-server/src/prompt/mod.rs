//! Requests' words -> token ids: chat templates and the rule that content is text and never a special token.
//!
//! It sits between the parsed request and the engine. It knows no wire types and no scheduling; `template.rs` renders,
//! `tools.rs` describes tools to models that know none, `disguise.rs` keeps special tokens out of content, `python_json.rs` is the templates' `tojson`.

mod disguise;
mod python_json;
mod template;
mod tools;

pub use template::{ChatTemplate, Conversation, TemplateError};

use std::{borrow::Cow, sync::Arc};

use bitnet_core::{
    TokenId, Tokenizer,
    tokenizer::{EncodeOptions, TokenizerError},
};
use serde_json::{Map, Value};

use disguise::SpecialFinder;

/// Turns conversations and texts into token ids for one model.
#[derive(Debug)]
pub struct ChatPrompter {
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    specials: SpecialFinder,
}

/// One message, as the template shall see it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: String,
    /// What is said.
    pub content: String,
    /// The speaker's name.
    pub name: Option<String>,
    /// Calls the assistant made, as OpenAI writes them; arguments may be JSON text or the JSON itself.
    pub tool_calls: Option<Value>,
    /// The call that a tool message answers.
    pub tool_call_id: Option<String>,
}

/// What else a template may depend on.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatOptions {
    /// Whether the prompt ends where the assistant begins to speak.
    pub add_generation_prompt: bool,
    /// The prompt ends with the last message, which is not over.
    pub continue_final_message: bool,
    /// The tools on offer, as the request describes them.
    pub tools: Option<Value>,
    /// Further template variables.
    pub extra: Map<String, Value>,
    /// A prompt of more tokens need not be read to its end: it is too long, and other tokens come back.
    pub most_tokens: usize,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self {
            add_generation_prompt: true,
            continue_final_message: false,
            tools: None,
            extra: Map::new(),
            most_tokens: usize::MAX,
        }
    }
}

/// Why there is no prompt.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The template refuses the conversation or cannot be used at all.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The text cannot be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl ChatPrompter {
    /// A prompter for the model's own template, or [`DEFAULT_TEMPLATE`] if it has none. `bos` and `eos` are the tokens whose
    /// texts the template knows as `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`PromptError::Template`] when the template does not compile.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        template: Option<&str>,
        bos: Option<TokenId>,
        eos: Option<TokenId>,
    ) -> Result<Self, PromptError> {
        let text = |id: Option<TokenId>| id.map(|id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned());
        let template =
            ChatTemplate::new(template.unwrap_or(DEFAULT_TEMPLATE), text(bos).as_deref(), text(eos).as_deref())?;
        let specials = SpecialFinder::new(tokenizer.special_texts().map(str::to_owned))
            .map_err(|error| TokenizerError::Invalid(format!("special tokens: {error}")))?;
        Ok(Self { tokenizer, template, specials })
    }

    /// The tokenizer this prompter uses.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The rendered conversation, for people to read.
    ///
    /// # Errors
    /// [`PromptError::Template`].
    pub fn render_chat(&self, messages: &[ChatMessage], options: &ChatOptions) -> Result<String, PromptError> {
        self.rendered(&self.conversation(messages, options), options)
    }

    /// The conversation as token ids. The template's special tokens are special, those in messages, tool results and tools
    /// are text. BOS comes by the tokenizer's rule and once, even if the template writes it too.
    ///
    /// # Errors
    /// [`PromptError`].
    pub fn encode_chat(&self, messages: &[ChatMessage], options: &ChatOptions) -> Result<Vec<TokenId>, PromptError> {
        let conversation = self.conversation(messages, options);
        let disguised = self.specials.disguise(&conversation)?;
        let text = self.rendered(&disguised.conversation, options)?;
        let mut ids = self.tokenizer.encode_with_stand_ins(&text, &disguised.stand_ins, true, options.most_tokens)?;
        if let Some(bos) = self.tokenizer.bos()
            && ids.starts_with(&[bos, bos])
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// As [`Self::encode_text`] with special tokens, and no further than it takes to see that it is more than `most`.
    ///
    /// # Errors
    /// [`PromptError::Tokenizer`].
    pub fn encode_text_within(&self, text: &str, most: usize) -> Result<Vec<TokenId>, PromptError> {
        Ok(self.tokenizer.encode_with_stand_ins(text, &[], true, most)?)
    }

    /// A plain text as token ids; `<|eot_id|>` and its like are read as special tokens.
    ///
    /// # Errors
    /// [`PromptError::Tokenizer`].
    pub fn encode_text(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, PromptError> {
        Ok(self.tokenizer.encode(text, EncodeOptions { add_special_tokens, parse_special: true })?)
    }

    /// The text of `conversation`, cut after the last message's content if that is to be continued.
    fn rendered(&self, conversation: &Conversation, options: &ChatOptions) -> Result<String, PromptError> {
        let mut text = self.template.render(conversation)?;
        if options.continue_final_message {
            let last = conversation.messages.last().and_then(|message| message["content"].as_str()).unwrap_or_default();
            let end = match text.rfind(last.trim()) {
                // Templates trim, and what is continued goes on behind its own last space.
                Some(at) if !last.trim().is_empty() => at + last.trim().len(),
                _ => return Err(TemplateError::Refused("it does not end with the last message".to_owned()).into()),
            };
            text.truncate(end);
        }
        Ok(text)
    }

    /// What the template is given. A template that knows no tools gets them, and the calls made earlier, as text.
    fn conversation(&self, messages: &[ChatMessage], options: &ChatOptions) -> Conversation {
        let mut messages = Cow::Borrowed(messages);
        let mut tools = options.tools.clone();
        if !self.template.knows("tools")
            && let Some(tools) = tools.take()
        {
            messages = tools::described(&messages, &tools).into();
        }
        if !self.template.knows("tool_calls") && messages.iter().any(|message| message.tool_calls.is_some()) {
            messages = messages.iter().cloned().map(tools::spelled_out).collect();
        }
        Conversation {
            messages: messages.iter().map(message_value).collect(),
            tools,
            extra: options.extra.clone(),
            add_generation_prompt: options.add_generation_prompt,
        }
    }
}

/// The message as templates expect it: absent fields are absent, and the arguments of a call are a dictionary, not the JSON
/// text in which the OpenAI protocol wraps them.
fn message_value(message: &ChatMessage) -> Value {
    let mut value = Map::new();
    value.insert("role".to_owned(), message.role.clone().into());
    value.insert("content".to_owned(), message.content.clone().into());
    let optional = [("name", &message.name), ("tool_call_id", &message.tool_call_id)];
    for (key, text) in optional.into_iter().filter_map(|(key, text)| Some((key, text.clone()?))) {
        value.insert(key.to_owned(), text.into());
    }
    if let Some(mut calls) = message.tool_calls.clone() {
        for arguments in
            calls.as_array_mut().into_iter().flatten().filter_map(|call| call.pointer_mut("/function/arguments"))
        {
            if let Some(Ok(parsed @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str) {
                *arguments = parsed;
            }
        }
        value.insert("tool_calls".to_owned(), calls);
    }
    Value::Object(value)
}

/// For models without a template: the form of bitnet-b1.58-2B-4T, with the model's own end-of-sequence text.
pub const DEFAULT_TEMPLATE: &str = "\
{% for message in messages %}\
{{ message['role'] | capitalize + ': ' + message['content'] | trim + eos_token }}\
{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";
